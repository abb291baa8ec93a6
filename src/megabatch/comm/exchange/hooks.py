"""The gradient exchange as DDP communication hooks, for any script:

    state = ExchangeState(make_grid(), wire="bf16")
    model = DistributedDataParallel(model)
    model.register_comm_hook(state, torus_hook)

After backward every rank holds the mean of the ranks' gradients, the same bits on all ranks. The exchange of a bucket
overlaps with backward and with the exchange of other buckets.
"""

import torch
from torch._C._distributed_c10d import GradBucket  # type checkers do not find it in torch.distributed

from megabatch.comm.exchange.state import ExchangeState
from megabatch.errors import SettingsError

HookFuture = torch.futures.Future[torch.Tensor]


def flat_hook(state: ExchangeState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The backend's own all-reduce over all ranks."""
    return _exchange(state, bucket, "flat")


def hierarchical_hook(state: ExchangeState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Reduce in the row, all-reduce among the leaders of the rows, broadcast in the row."""
    return _exchange(state, bucket, "hierarchical")


def torus_hook(state: ExchangeState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """All-reduce of a bucket over a 2-D grid of ranks (Mikami et al. 2018, arXiv:1811.05233), as a DDP hook.

    On X ranks per row and Y per column, a bucket of M bytes goes through

        reduce-scatter in the row     each rank sends  M (X - 1) / X
        all-reduce in the column      each rank sends  2 (M / X) (Y - 1) / Y
        all-gather in the row         each rank sends  M (X - 1) / X

    in total 2 M (XY - 1) / XY, the same as a ring, of which only the column's part leaves the host if rows are hosts.
    It takes 4 hops on gloo (for shards up to 32 KiB) and 2 (X - 1) + 2 (Y - 1) on NCCL; a ring takes 2 (XY - 1).

    Use `model.register_comm_hook(ExchangeState(), torus_hook)`. The returned future holds the bucket's flat buffer with
    the mean (or, if the state has average=False, the sum) of the ranks' gradients. An error of a collective is raised
    by backward. `ExchangeState.close` stops the threads.

    Raises:
        SettingsError: `state` is not an ExchangeState.
    """
    return _exchange(state, bucket, "torus")


def split_torus_hook(state: ExchangeState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Half of the bucket by rows first and, at the same time, half by columns (Ying et al. 2018, arXiv:1811.06992)."""
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
