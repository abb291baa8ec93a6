"""A whole training step in one CUDA graph; on a machine without a GPU the step runs uncaptured.

Rates that change are tensors, which the graph reads at every replay.
"""

import torch
from torch import Tensor

from megabatch import LARS, CapturedStep, create_model, cross_entropy_sum, learning_rate, param_groups

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = create_model("resnet8", num_classes=10, image_size=32).to(device, memory_format=torch.channels_last)
lr = torch.tensor(0.0, device=device)
optimizer = LARS(param_groups(model, weight_decay=5e-4), lr, trust_coefficient=0.02, capturable=True)


def train_step(images: Tensor, labels: Tensor) -> Tensor:
    """One update; reads nothing back to the host."""
    optimizer.zero_grad(set_to_none=True)
    loss = cross_entropy_sum(model(images), labels) / len(labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


step = CapturedStep(train_step) if device == "cuda" else train_step
images = torch.randn(16, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
labels = torch.arange(16, device=device) % 10
losses = []
for number in range(20):
    lr.fill_(learning_rate(number, peak_lr=0.5, total_epochs=20, warmup="linear", warmup_epochs=4, decay="poly"))
    losses.append(step(images, labels).item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0]
