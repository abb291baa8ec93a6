"""A moving average of the weights with a half-life in epochs: it means the same at every batch size."""

import torch
from torch import nn

from megabatch import WeightAverage

model = nn.Linear(4, 2)
average = WeightAverage(model, half_life_epochs=0.5)
for _ in range(10):
    with torch.no_grad():
        model.weight.add_(1.0)  # a training step
    average.update(step_epochs=0.1)  # global batch size / number of training images

trained = model.weight.clone()
with average.swapped():  # evaluate here: the model holds the averaged weights
    assert (model.weight < trained).all()
assert torch.equal(model.weight, trained)
print("averaged weights were swapped in and out")
