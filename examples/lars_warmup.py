"""LARS with a warm-up in a plain PyTorch loop.

The learning rate is a function of the fractional epoch, so it does not depend on the number of steps per epoch.
"""

import torch
from torch import nn

from megabatch import LARS, learning_rate, param_groups

TOTAL_EPOCHS = 30

torch.manual_seed(0)
inputs = torch.randn(512, 16)
labels = (inputs[:, :4].sum(1) > 0).long()
model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))

# Scales, shifts and biases get neither a trust ratio nor weight decay.
optimizer = LARS(param_groups(model, weight_decay=1e-4), lr=0.0, momentum=0.9, trust_coefficient=0.02)
for epoch in range(TOTAL_EPOCHS):
    lr = learning_rate(epoch, peak_lr=5.0, total_epochs=TOTAL_EPOCHS, warmup="linear", warmup_epochs=5, decay="poly")
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = nn.functional.cross_entropy(model(inputs), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

accuracy = (model(inputs).argmax(1) == labels).float().mean().item()
print(f"accuracy {accuracy:.3f}")
assert accuracy > 0.95
