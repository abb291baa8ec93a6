"""Which gradients travel together, and the one call that sets up a model's gradient exchange.

DDP fills buckets with gradients in the order in which backward makes them, last layer first. Sizes are in MiB. A
small first bucket starts the exchange early (DDP's own default is 1 MiB); Fujitsu's plan (Yamazaki et al. 2019,
arXiv:1903.12650, and their MLPerf v0.6 code) cuts by count instead: 3, 24, 81, 161 ... tensors from the last layer.
"""

import inspect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megabatch.comm.autotune.choose import Choice, choose
from megabatch.comm.exchange.grid import Grid, choose_rows, make_grid
from megabatch.comm.exchange.hooks import HOOKS
from megabatch.comm.exchange.state import ExchangeState
from megabatch.comm.exchange.timeline import Timeline
from megabatch.errors import SettingsError

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
        raise SettingsError(f"bucket_mib {bucket_mib} must be positive; for example 25")
    if plan == "size":
        return [min(first_bucket_mib, bucket_mib), bucket_mib]
    if plan != "cubic":
        raise SettingsError(f"bucket plan {plan!r} is unknown, needed 'size' or 'cubic'; for example 'size'")
    sizes = [p.numel() * p.element_size() for p in reversed(parameters) if p.requires_grad]
    caps, start = [], 0
    for count in cubic_groups(len(sizes)):
        caps.append(sum(sizes[start : start + count]) / 2**20)
        start += count
    return caps


class ExchangingDDP(DistributedDataParallel):
    """DistributedDataParallel whose gradients go through one of our communication hooks."""

    exchange_state: ExchangeState
    exchange_choice: Choice | None  # of `algorithm="auto"`


def wrap(
    model: nn.Module,
    *,
    algorithm: str = "flat",
    wire: str = "fp32",
    grid: Grid | None = None,
    shape: tuple[int, int] | None = None,
    hosts: Sequence[str] | None = None,
    tuning: Path | None = None,
    bucket_mib: float = 25.0,
    first_bucket_mib: float = FIRST_BUCKET_MIB,
    bucket_plan: str = "size",
    device_ids: list[int] | None = None,
    timeline: Timeline | None = None,
    error_feedback: bool = False,
    average: bool = True,
    wire_scale: float | None = None,
    static_graph: bool = False,
    init_sync: bool = False,
) -> ExchangingDDP:
    """`model` in DDP with one of our hooks: the whole set-up of the gradient exchange.

    Weights are expected to be equal on all ranks, by initialisation from one seed (Yamazaki et al. 2019), so none are
    broadcast unless `init_sync`. Buffers are never broadcast. Gradients are views of the buckets. "auto" reads the
    table `tuning` of the first rank's host (`comm.autotune.choose.choose`), or asks the cost model, and decides
    algorithm, shape and bucket size. `hosts`, one name per rank, makes hosts the rows of the grid.

    The result has `exchange_state`, the hook's state, and `exchange_choice`, what `auto` chose or None.
    """
    if algorithm not in (*HOOKS, "auto"):
        raise SettingsError(
            f"all-reduce {algorithm!r} is unknown, needed one of auto, {', '.join(HOOKS)}; 'torus' works"
        )
    parameters = list(model.parameters())
    choice = None
    if algorithm == "auto":
        choice = choose_on_rank0(parameters, wire=wire, shape=grid.shape if grid else shape, hosts=hosts, tuning=tuning)
        algorithm, shape, bucket_mib = choice.cell.algorithm, choice.cell.shape, choice.cell.bucket_mib
    caps = bucket_caps_mib(parameters, plan=bucket_plan, bucket_mib=bucket_mib, first_bucket_mib=first_bucket_mib)
    state = ExchangeState(
        grid if grid is not None and shape in (None, grid.shape) else make_grid(shape=shape, hosts=hosts),
        wire=wire,
        error_feedback=error_feedback,
        average=average,
        wire_scale=wire_scale,
        timeline=timeline,
    )
    wrapped = ExchangingDDP(
        model,
        device_ids=device_ids,
        process_group=state.grid.group("world"),
        init_sync=init_sync,
        gradient_as_bucket_view=True,
        static_graph=static_graph,
        **_ddp_options(caps),
    )
    wrapped.register_comm_hook(state, HOOKS[algorithm])
    object.__setattr__(wrapped, "exchange_state", state)  # past nn.Module's look for submodules
    object.__setattr__(wrapped, "exchange_choice", choice)
    return wrapped


def choose_on_rank0(
    parameters: Sequence[torch.Tensor],
    *,
    wire: str,
    shape: tuple[int, int] | None,
    hosts: Sequence[str] | None,
    tuning: Path | None,
) -> Choice:
    """The first rank's choice for these parameters' gradients, on all ranks."""
    num_bytes = 4 * sum(p.numel() for p in parameters if p.requires_grad)
    hosts = hosts or ["this host"] * dist.get_world_size()
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        rows, _ = choose_rows(len(hosts), shape=shape, hosts=hosts)
        grid, backend = (len(rows[0]), len(rows)), dist.get_backend()
        try:
            box[0] = choose(num_bytes=num_bytes, hosts=hosts, backend=backend, shape=grid, wires=(wire,), path=tuning)
        except SettingsError as error:
            box[0] = str(error)  # to be raised on every rank, or the others would wait for a choice
    dist.broadcast_object_list(box, src=0)
    if not isinstance(box[0], Choice):
        raise SettingsError(box[0])
    return box[0]


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
