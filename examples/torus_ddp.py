"""Torus all-reduce in plain DistributedDataParallel: `torchrun --standalone --nproc-per-node 4 torus_ddp.py`."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megabatch import ExchangeState, make_grid, torus_hook

dist.init_process_group("gloo")  # "nccl" on GPUs
torch.manual_seed(0)
model = DistributedDataParallel(nn.Linear(8, 3))
exchange = ExchangeState(make_grid(shape=(2, 2)), wire="bf16")  # 2 rows x 2 columns; gradients are sent in bfloat16
model.register_comm_hook(exchange, torus_hook)

torch.manual_seed(dist.get_rank())  # other data on every rank
model(torch.randn(32, 8)).square().mean().backward()

gradients = [torch.empty(3, 8) for _ in range(4)]
dist.all_gather(gradients, model.module.weight.grad)
assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)  # bit for bit
if dist.get_rank() == 0:
    print("all ranks hold the same mean gradient")
exchange.close()
dist.destroy_process_group()
