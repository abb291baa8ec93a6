"""Muon in a plain PyTorch loop: filter banks of hidden layers are orthogonalised, everything else steps by SGD."""

import torch
from torch import nn

from megabatch import Muon, learning_rate, param_groups

TOTAL_EPOCHS = 20

torch.manual_seed(0)
labels = torch.arange(256) % 4
images = torch.randn(256, 1, 8, 8)
for corner in range(4):
    top, left = 4 * (corner // 2), 4 * (corner % 2)
    images[labels == corner, :, top : top + 4, left : left + 4] += 0.5  # the class is the bright corner
layers = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()]
model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 4))

# The second filter bank; the first and the last weight, scales, shifts and biases are in groups that step by SGD.
groups = param_groups(model, weight_decay=0.0, separate_ends=True)
optimizer = Muon(groups, lr=0.0, normalize_weights=True, sgd_lr_factor=0.5)
for epoch in range(TOTAL_EPOCHS):
    lr = learning_rate(epoch, peak_lr=0.1, total_epochs=TOTAL_EPOCHS, decay="poly", poly_power=1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

accuracy = (model(images).argmax(1) == labels).float().mean().item()
print(f"accuracy {accuracy:.3f}")
assert accuracy > 0.95
