"""Shampoo divided among workers: `torchrun --standalone --nproc-per-node 4 shampoo.py`.

Shampoo takes the learning rates of SGD or LARS. Each worker computes the preconditioners of its share of the matrices.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megabatch import Shampoo, learning_rate, param_groups
from megabatch.comm.launch import shutdown_process_group

TOTAL_STEPS = 60

dist.init_process_group("gloo")  # "nccl" on GPUs
rank, world_size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
inputs = torch.randn(512, 16) @ torch.diag(torch.logspace(-1, 1, 16))  # the class is in the four smallest inputs
labels = (inputs[:, :4].sum(1) > 0).long()
model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))
replica = DistributedDataParallel(model)
optimizer = Shampoo(param_groups(model, weight_decay=1e-4), lr=0.0, process_group=dist.group.WORLD)
for step in range(TOTAL_STEPS):
    lr = learning_rate(step, peak_lr=0.4, total_epochs=TOTAL_STEPS, decay="poly", poly_power=1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = nn.functional.cross_entropy(replica(inputs[rank::world_size]), labels[rank::world_size])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
state = optimizer.state_dict()  # on every worker: it gathers the preconditioners

accuracy = (model(inputs).argmax(1) == labels).float().mean().item()
print(f"rank {rank}: accuracy {accuracy:.3f}")
assert accuracy > 0.9
shutdown_process_group()
