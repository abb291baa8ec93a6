"""A batch size that grows with the gradient noise scale (McCandlish et al. 2018, arXiv:1812.06162).

It costs two norms a step: of the micro-batches' gradients and of the whole batch's gradient.
"""

import torch
from torch import Tensor

from megabatch import NoiseScaleBatchPolicy

torch.manual_seed(0)
policy = NoiseScaleBatchPolicy(256, unit=64, max_batch_size=4096, min_steps_between=20)
true_gradient = torch.full((1000,), 0.01)  # |G|^2 = 0.1; the noise below has a trace of 100: a noise scale of 1,000


def mean_gradient(count: int) -> Tensor:
    """A gradient averaged over `count` samples, with the noise of such an average."""
    return true_gradient + torch.randn(1000) * (100 / 1000 / count) ** 0.5


for _ in range(200):
    batch = policy.global_batch_size
    gradients = torch.stack([mean_gradient(64) for _ in range(batch // 64)])
    local_sq_norm = gradients.square().sum(1).mean().item()
    global_sq_norm = gradients.mean(0).square().sum().item()
    policy.observe(local_sq_norm, 64, global_sq_norm, batch)

print(f"batch size {policy.global_batch_size}")
assert policy.global_batch_size == 512  # the next size, 1,024, exceeds the noise scale
