"""Batch-norm spans and LARS in a network of timm: `python timm_net.py`."""

import timm
import torch
from torch.nn.functional import cross_entropy

from megabatch import LARS, collect_statistics, convert, finish_step, param_groups

model = convert(timm.create_model("resnet10t", num_classes=10), span=8)
collect_statistics(model)  # statistics of a step are those of all its spans
optimizer = LARS(param_groups(model, weight_decay=1e-4), lr=1.0)
for _ in range(2):
    images, labels = torch.randn(32, 3, 64, 64), torch.randint(0, 10, (32,))
    for part in range(0, 32, 16):  # micro-batches of two spans each
        (cross_entropy(model(images[part : part + 16]), labels[part : part + 16]) / 2).backward()
    optimizer.step()
    optimizer.zero_grad()
    finish_step(model, eval_stats="running")
print(f"loss {cross_entropy(model.eval()(images), labels).item():.2f}")
