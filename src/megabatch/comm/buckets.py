"""Which gradients travel together, and the one call that sets up a model's gradient exchange.

DDP fills buckets with gradients in the order in which backward makes them, last layer first. Sizes are in MiB. A
small first bucket starts the exchange early (DDP's own default is 1 MiB); Fujitsu's plan (Yamazaki et al. 2019,
arXiv:1903.12650, and their MLPerf v0.6 code) cuts by count instead: 3, 24, 81, 161 ... tensors from the last layer.
"""

import inspect
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megabatch.comm.exchange import ExchangeState
from megabatch.comm.grid import Grid, make_grid
from megabatch.comm.hooks import HOOKS
from megabatch.comm.timeline import Timeline
from megabatch.errors import SiteError

FIRST_BUCKET_MIB = 1.0
BucketPlan = Literal["size", "cubic"]


def cubic_groups(num_tensors: int) -> list[int]:
    """How many tensors each group holds, from the last layer backwards.

    group k ends after 3 (k + 1)^3 tensors        Fujitsu, MLPerf v0.6; 161 tensors -> 3, 21, 57, 80
    """
    ends, k = [0], 1
    while ends[-1] < num_tensors:
        ends.append(min(3 * k**3, num_tensors))
        k += 1
    return [end - start for start, end in itertools.pairwise(ends)]


def bucket_caps_mib(
    parameters: Sequence[torch.Tensor],
    *,
    plan: str = "size",
    bucket_mib: float = 25.0,
    first_bucket_mib: float = FIRST_BUCKET_MIB,
) -> list[float]:
    """Bucket sizes in MiB, in the order of backward, as DDP's `bucket_cap_mb_list` takes them.

    "size": a small first bucket, then `bucket_mib` each. "cubic": the bytes of Fujitsu's groups; DDP closes a bucket
    when it has reached its size, so each cap is the bytes of its tensors, and the buckets are the groups as long as
    backward makes the gradients in the reverse order of `parameters` (elsewhere boundaries shift by a few tensors).
    The last cap holds for all buckets after it.
    """
    if bucket_mib <= 0:
        raise SiteError(f"bucket_mib {bucket_mib} must be positive; for example 25")
    if plan == "size":
        return [min(first_bucket_mib, bucket_mib), bucket_mib]
    if plan != "cubic":
        raise SiteError(f"bucket plan {plan!r} is unknown, needed 'size' or 'cubic'; for example 'size'")
    sizes = [p.numel() * p.element_size() for p in reversed(parameters) if p.requires_grad]
    caps, start = [], 0
    for count in cubic_groups(len(sizes)):
        caps.append(sum(sizes[start : start + count]) / 2**20)
        start += count
    return caps


def wrap(
    model: nn.Module,
    *,
    algorithm: str = "flat",
    wire: str = "fp32",
    grid: Grid | None = None,
    shape: tuple[int, int] | None = None,
    bucket_mib: float = 25.0,
    bucket_plan: str = "size",
    device_ids: list[int] | None = None,
    timeline: Timeline | None = None,
    error_feedback: bool = False,
    average: bool = True,
    wire_scale: float = 1.0,
    static_graph: bool = False,
    init_sync: bool = False,
) -> DistributedDataParallel:
    """`model` in DDP with one of our hooks: the whole set-up of the gradient exchange.

    Weights are expected to be equal on all ranks, by initialisation from one seed (Yamazaki et al. 2019), so none are
    broadcast unless `init_sync`. Buffers are never broadcast. Gradients are views of the buckets. The hook's
    `ExchangeState` is the result's attribute `exchange_state`.
    """
    if algorithm not in HOOKS:
        raise SiteError(f"all-reduce {algorithm!r} is unknown, needed one of {', '.join(HOOKS)}; for example 'torus'")
    caps = bucket_caps_mib(list(model.parameters()), plan=bucket_plan, bucket_mib=bucket_mib)
    state = ExchangeState(
        grid or make_grid(shape=shape),
        wire=wire,
        error_feedback=error_feedback,
        average=average,
        wire_scale=wire_scale,
        timeline=timeline,
    )
    wrapped = DistributedDataParallel(
        model,
        device_ids=device_ids,
        process_group=state.grid.group("world"),
        init_sync=init_sync,
        gradient_as_bucket_view=True,
        static_graph=static_graph,
        **_ddp_options(caps),
    )
    wrapped.register_comm_hook(state, HOOKS[algorithm])
    object.__setattr__(wrapped, "exchange_state", state)  # not a submodule, which is what nn.Module's own looks for
    return wrapped


def _ddp_options(caps_mib: list[float]) -> dict[str, Any]:
    """The options whose names differ between versions: before `bucket_cap_mb_list` one size holds for all buckets."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    options: dict[str, Any] = {}
    options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
    if "bucket_cap_mb_list" in known:
        options["bucket_cap_mb_list"] = caps_mib
    else:
        options["bucket_cap_mb"] = max(caps_mib)
    return options
