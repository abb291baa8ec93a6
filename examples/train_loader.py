"""TrainLoader and EvalLoader in place of a DataLoader: `python train_loader.py FOLDER`.

FOLDER has train/CLASS/*.jpg and val/CLASS/*.jpg. Iterations follow on in one stream of samples, whose position is all
that a checkpoint needs. With several ranks, give each its `rank` and `world_size`.
"""

import sys

import torch
from torch import nn

from megabatch import EvalLoader, TrainLoader, open_folder

EPOCHS, RESOLUTION = 2, 96
PIXELS = {"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}  # of pixels in [0, 1]

train, val = open_folder(sys.argv[1])
shape = {"local_batch_size": 8, "resolution": RESOLUTION}
loader = TrainLoader(train, seed=0, augmentation="random_resized_crop", **shape, **PIXELS)
eval_loader = EvalLoader(val, resolution=RESOLUTION, **PIXELS)
head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, len(train.class_names)))
model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=4), nn.ReLU(), head)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

for _ in range(EPOCHS):
    for batch in loader:  # len(loader) batches
        loss = nn.functional.cross_entropy(model(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
position = loader.state_dict()  # loader.load_state_dict(position) resumes here

correct = sum(int((model(b.images).argmax(1) == b.labels).sum()) for b in eval_loader.batches(0, len(val), 8))
print(f"{position['samples_seen']} samples seen, {correct} of {len(val)} correct")
loader.close()
eval_loader.close()
