"""Fused batch norm, ReLU and residual in a model of megabatch; weights and state dict do not change."""

import torch

from megabatch import create_model, set_fusion

torch.manual_seed(0)
images = torch.randn(16, 3, 32, 32).contiguous(memory_format=torch.channels_last)
model = create_model("resnet18", num_classes=10, image_size=32).to(memory_format=torch.channels_last)

plain = model(images)
set_fusion(model, "auto")  # compiled kernels on a CPU, Triton kernels on a GPU, torch's operations elsewhere
fused = model(images)
fused.square().mean().backward()

print(f"largest difference {(fused - plain).abs().max().item():.1e}")
torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-3)
