"""Batch norm over a fixed number of samples, in a model that is not one of megabatch's.

Gradients do not depend on how a batch is cut into micro-batches.
"""

import torch
from torch import Tensor, nn

from megabatch import convert, cross_entropy_sum

torch.manual_seed(0)
images, labels = torch.randn(32, 3, 8, 8, dtype=torch.float64), torch.randint(10, (32,))
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
model = convert(model.double(), span=8)


def gradient(micro_batch_size: int) -> Tensor:
    """Gradient of the mean loss over all 32 images, accumulated over micro-batches."""
    model.zero_grad()
    for part, wanted in zip(images.split(micro_batch_size), labels.split(micro_batch_size), strict=True):
        loss = cross_entropy_sum(model(part), wanted, label_smoothing=0.1) / len(images)  # the global batch
        loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


torch.testing.assert_close(gradient(32), gradient(8), rtol=1e-9, atol=1e-12)
print("gradients of one batch of 32 and of four micro-batches of 8 agree")
