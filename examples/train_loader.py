"""TrainLoader and EvalLoader in place of a DataLoader: `python train_loader.py FOLDER`.

FOLDER has train/CLASS/*.jpg and val/CLASS/*.jpg. A batch is a function of the stream positions asked for: position p is
place p % n of epoch p // n. To resume, ask for the next positions; with several ranks, give each its own positions.
"""

import sys

import torch
from torch import nn

from megabatch import EvalLoader, TrainLoader, open_folder

EPOCHS, GLOBAL_BATCH_SIZE, RESOLUTION = 2, 8, 96
PIXELS = {"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}  # of pixels in [0, 1]

train, val = open_folder(sys.argv[1])
loader = TrainLoader(train, seed=0, augmentation="random_resized_crop", **PIXELS)
eval_loader = EvalLoader(val, resolution=RESOLUTION, **PIXELS)
head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, len(train.class_names)))
model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=4), nn.ReLU(), head)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

samples_seen = 0  # all there is to save of the loader
starts = range(samples_seen, EPOCHS * len(train) - GLOBAL_BATCH_SIZE + 1, GLOBAL_BATCH_SIZE)
for batch in loader.batches((range(start, start + GLOBAL_BATCH_SIZE), RESOLUTION) for start in starts):
    loss = nn.functional.cross_entropy(model(batch.images), batch.labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    samples_seen += batch.count

correct = sum(int((model(b.images).argmax(1) == b.labels).sum()) for b in eval_loader.batches(0, len(val), 8))
print(f"{samples_seen} samples seen, {correct} of {len(val)} correct")
loader.close()
eval_loader.close()
