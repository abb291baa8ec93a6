"""Gradient exchange as DDP communication hooks, for any script:

    state = ExchangeState(make_grid(), wire="bf16")
    model = DistributedDataParallel(model)
    model.register_comm_hook(state, torus_hook)

Each hook has DDP's meaning: after backward every rank holds the mean of the ranks' gradients, the same bits on all.
The exchange of a bucket runs beside backward and beside the other buckets'.
"""

import torch
from torch._C._distributed_c10d import GradBucket  # torch.distributed's, where type checkers find it

from megabatch.comm.exchange.state import ExchangeState
from megabatch.errors import SettingsError

HookFuture = torch.futures.Future[torch.Tensor]


def flat_hook(state: ExchangeState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The backend's own all-reduce over all ranks."""
    return _exchange(state, bucket, "flat")


def hierarchical_hook(state: ExchangeState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Reduce in the row, all-reduce among the rows' leaders, broadcast in the row."""
    return _exchange(state, bucket, "hierarchical")


def torus_hook(state: ExchangeState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Reduce-scatter in the row, all-reduce in the column, all-gather in the row (Mikami et al. 2018, 1811.05233)."""
    return _exchange(state, bucket, "torus")


def split_torus_hook(state: ExchangeState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Half of the bucket by rows first, half by columns first, at once (Ying et al. 2018, arXiv:1811.06992)."""
    return _exchange(state, bucket, "split_torus")


HOOKS = {
    "flat": flat_hook,
    "hierarchical": hierarchical_hook,
    "torus": torus_hook,
    "split_torus": split_torus_hook,
}


def _exchange(state: ExchangeState, bucket: GradBucket, algorithm: str) -> HookFuture:
    if not isinstance(state, ExchangeState):
        raise SettingsError(
            f"the hook's state is {type(state).__name__}, needed an ExchangeState; "
            "for example model.register_comm_hook(ExchangeState(), torus_hook)"
        )
    parameters = bucket.parameters() if state.error_feedback else ()
    return state.exchange(bucket.buffer(), algorithm, index=bucket.index(), parameters=parameters)
