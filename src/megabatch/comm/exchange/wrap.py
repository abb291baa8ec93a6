"""`wrap`: one call that sets up a model's gradient exchange in DistributedDataParallel."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megabatch.comm.autotune.choose import Cell, Choice, choose
from megabatch.comm.exchange.buckets import FIRST_BUCKET_MIB, bucket_caps_mib
from megabatch.comm.exchange.capturable import CapturableExchange
from megabatch.comm.exchange.grid import Grid, choose_rows, make_grid
from megabatch.comm.exchange.hooks import HOOKS
from megabatch.comm.exchange.state import ExchangeState
from megabatch.comm.exchange.timeline import Timeline
from megabatch.errors import SettingsError


class ExchangingDDP(DistributedDataParallel):
    """DistributedDataParallel whose gradients are reduced by one of our communication hooks."""

    exchange_state: ExchangeState
    exchange_choice: Choice  # the algorithm, grid shape, bucket size and wire in use, and the reason for them


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
    """Returns `model` in DistributedDataParallel with one of our hooks: the whole set-up of the gradient exchange.

    After backward every rank holds the mean of the ranks' gradients (the sum if not `average`), the same bits on all
    ranks. For M bytes of gradients on X ranks per row and Y rows, N = XY, a rank sends on average

        flat          2 M (N - 1) / N, in 2 (N - 1) hops            the backend's all-reduce, on gloo a ring
        torus         2 M (N - 1) / N, in 4 hops on gloo, 2 (X - 1) + 2 (Y - 1) on NCCL
                                                                    Mikami et al. 2018, arXiv:1811.05233
        split_torus   as torus; both halves of M at once            Ying et al. 2018, arXiv:1811.06992
        hierarchical  about 2 M (X - 1) / X + 2 M (Y - 1) / N       reduce to, and broadcast from, each row's leader

    and the torus sends only 2 M (Y - 1) / N of it between rows. The model's weights must be equal on all ranks, for
    example by initialisation from one seed (Yamazaki et al. 2019, arXiv:1903.12650): they are not broadcast unless
    `init_sync`. Buffers are never broadcast. Gradients are views of the buckets. All ranks must call `wrap` with the
    same arguments, after `torch.distributed.init_process_group`.

    The result's `exchange_state` is the hook's state (call its `close` at the end), and `str(exchange_choice)` says
    which exchange is in use and why.

    Args:
        algorithm: "flat", "hierarchical", "torus", "split_torus", or "auto": algorithm, grid shape and bucket size
            come from the table `tuning` on rank 0's host, or from a rule (`comm.autotune.choose`).
        wire: type in which gradients are sent: "fp32", "fp16" or "bf16".
        grid: the ranks in rows and columns; None makes a grid of all ranks from `shape` and `hosts`.
        shape: (X, Y), ranks per row and ranks per column; X Y must be the number of ranks.
        hosts: host name of every rank, in rank order; ranks of a host become a row.
        tuning: file of `megabatch bench allreduce --tune`; used by "auto" only.
        bucket_mib, first_bucket_mib, bucket_plan: sizes in MiB of the buckets and of the first one, which starts the
            exchange early; plan "size" or "cubic" (see `comm.exchange.buckets.bucket_caps_mib`).
        timeline: records when each bucket was ready, sent and done.
        error_feedback, average, wire_scale: see `ExchangeState`.
        device_ids, static_graph, init_sync: as in DistributedDataParallel.

    Raises:
        SettingsError: an unknown algorithm, wire or plan; a shape or hosts that do not fit the number of ranks;
            `tuning` is not a table of measurements; or plan "cubic" with torch 2.11 or 2.12.
    """
    state, choice, caps = _set_up(
        model, algorithm, grid=grid, shape=shape, hosts=hosts, tuning=tuning, bucket_mib=bucket_mib,
        first_bucket_mib=first_bucket_mib, bucket_plan=bucket_plan, wire=wire, timeline=timeline,
        error_feedback=error_feedback, average=average, wire_scale=wire_scale,
    )  # fmt: skip
    wrapped = ExchangingDDP(
        model,
        device_ids=device_ids,
        process_group=state.grid.group("world"),
        init_sync=init_sync,
        gradient_as_bucket_view=True,
        static_graph=static_graph,
        **_ddp_options(caps, bucket_plan),
    )
    wrapped.register_comm_hook(state, HOOKS[choice.cell.algorithm])
    # nn.Module.__setattr__ is bypassed: it searches each value for parameters and submodules.
    object.__setattr__(wrapped, "exchange_state", state)
    object.__setattr__(wrapped, "exchange_choice", choice)
    return wrapped


def wrap_capturable(
    model: nn.Module,
    *,
    algorithm: str = "flat",
    wire: str = "fp32",
    hosts: Sequence[str] | None = None,
    tuning: Path | None = None,
    bucket_mib: float = 25.0,
    bucket_plan: str = "size",
) -> CapturableExchange:
    """As `wrap`, by work that a CUDA graph can hold. No GPU has run it."""
    return CapturableExchange(
        model,
        *_set_up(
            model, algorithm, grid=None, shape=None, hosts=hosts, tuning=tuning, bucket_mib=bucket_mib,
            first_bucket_mib=FIRST_BUCKET_MIB, bucket_plan=bucket_plan, wire=wire,
        ),
    )  # fmt: skip


def _set_up(
    model: nn.Module,
    algorithm: str,
    *,
    grid: Grid | None,
    shape: tuple[int, int] | None,
    hosts: Sequence[str] | None,
    tuning: Path | None,
    bucket_mib: float,
    first_bucket_mib: float,
    bucket_plan: str,
    wire: str,
    **options: Any,
) -> tuple[ExchangeState, Choice, list[float]]:
    """The exchange's state with these options, what was chosen for it, and the sizes of its buckets."""
    if algorithm not in (*HOOKS, "auto"):
        raise SettingsError(
            f"all-reduce {algorithm!r} is unknown, needed one of auto, {', '.join(HOOKS)}; 'torus' works"
        )
    if grid is not None and shape not in {None, grid.shape}:
        raise SettingsError(
            f"shape {shape} was given with a grid of shape {grid.shape}, needed: one of the two; grid=grid works"
        )
    parameters = list(model.parameters())
    why = "as given"
    if algorithm == "auto":
        wanted = grid.shape if grid else shape
        choice = choose_on_rank0(parameters, wire=wire, shape=wanted, hosts=hosts, tuning=tuning, bucket_mib=bucket_mib)
        algorithm, shape, bucket_mib, why = choice.cell.algorithm, choice.cell.shape, choice.cell.bucket_mib, choice.why
    caps = bucket_caps_mib(parameters, plan=bucket_plan, bucket_mib=bucket_mib, first_bucket_mib=first_bucket_mib)
    state = ExchangeState(grid or make_grid(shape=shape, hosts=hosts), wire=wire, **options)
    return state, Choice(Cell(algorithm, state.grid.shape, bucket_mib, wire), why, bucket_plan), caps


def choose_on_rank0(
    parameters: Sequence[Tensor],
    *,
    wire: str,
    shape: tuple[int, int] | None,
    hosts: Sequence[str] | None,
    tuning: Path | None,
    bucket_mib: float,
) -> Choice:
    """Returns rank 0's choice for the gradients of `parameters`, on all ranks."""
    num_bytes = 4 * sum(p.numel() for p in parameters if p.requires_grad)
    hosts = hosts or ["this host"] * dist.get_world_size()
    result: list[Choice | str | None] = [None]  # broadcast_object_list replaces the items of a list
    if dist.get_rank() == 0:
        try:
            rows, _ = choose_rows(dist.get_world_size(), shape=shape, hosts=hosts)
            grid, backend = (len(rows[0]), len(rows)), dist.get_backend()
            result[0] = choose(
                num_bytes=num_bytes, hosts=hosts, backend=backend, shape=grid, wires=(wire,), bucket_mib=bucket_mib,
                path=tuning,
            )  # fmt: skip
        except SettingsError as error:
            result[0] = str(error)  # raised on every rank below; otherwise the other ranks would wait for a choice
    dist.broadcast_object_list(result, src=0)
    choice = result[0]
    if not isinstance(choice, Choice):
        raise SettingsError(str(choice))
    return choice


def _ddp_options(caps_mib: list[float], plan: str) -> dict[str, Any]:
    """DDP options whose names depend on torch's version; without `bucket_cap_mb_list` all buckets have one size."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    options: dict[str, Any] = {}
    options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
    if "bucket_cap_mb_list" in known:
        options["bucket_cap_mb_list"] = caps_mib
    elif plan == "cubic":
        raise SettingsError(
            "bucket plan 'cubic' needs torch 2.13 or newer, which takes a size per bucket; 'size' works"
        )
    else:
        options["bucket_cap_mb"] = max(caps_mib)
    return options
