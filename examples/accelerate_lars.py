"""LARS and TrainLoader with accelerate: `accelerate launch accelerate_lars.py`, or `python accelerate_lars.py`."""

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from megabatch import LARS, ArraySource, TrainLoader, create_model, param_groups

accelerator = Accelerator(cpu=True)
labels = torch.arange(64) % 2
source = ArraySource((200 * labels).view(-1, 1, 1, 1).expand(-1, 1, 16, 16).to(torch.uint8), labels, ("dark", "light"))
loader = TrainLoader(
    source,
    local_batch_size=16,
    resolution=16,
    rank=accelerator.process_index,  # the loader shards itself, so it is not prepared
    world_size=accelerator.num_processes,
    device=accelerator.device,
    seed=0,
    pixel_mean=(0.5,),
    pixel_std=(0.25,),
    image_channels=1,
)
model = create_model("resnet8", num_classes=2, in_channels=1, width=8)
model, optimizer = accelerator.prepare(model, LARS(param_groups(model, weight_decay=1e-4), lr=1.0))
for batch in loader:
    loss = cross_entropy(model(batch.images), batch.labels)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss.item():.3f} after {loader.state_dict()['samples_seen']} samples")
