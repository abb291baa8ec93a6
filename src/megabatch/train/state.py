"""State of a training run: what it holds in memory, and the part of it that a checkpoint keeps."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from megabatch.comm.launch import World
from megabatch.data.loading.batch import Batch
from megabatch.data.loading.split import micro_batches
from megabatch.errors import CheckpointError
from megabatch.recipe import Recipe
from megabatch.runtime import Interval
from megabatch.train.checkpoint import CheckpointWriter
from megabatch.train.cuda_graph import CapturedStep
from megabatch.train.health.memory_copies import MemoryCopies
from megabatch.train.measuring.trace import Trace
from megabatch.train.precision import Precision
from megabatch.train.schedule import StepSettings, settings_at, total_samples
from megabatch.train.weight_copies import WeightCopies


class Loader(Protocol):
    """Training data: batches of stream ranges, in the order requested."""

    def batches(self, requests: Iterable[tuple[range, int]]) -> Iterator[Batch]:
        """One batch per request `(positions, resolution)`."""
        ...


class EvalData(Protocol):
    """The evaluation set in index order."""

    @property
    def num_samples(self) -> int:
        """Samples in all."""
        ...

    def batches(self, first: int, last: int, batch_size: int) -> Iterator[Batch]:
        """Samples [first, last) in batches of `batch_size`."""
        ...


class BatchPolicy(Protocol):
    """Grows the global batch as the gradient noise scale grows (optim/batch_size.py)."""

    global_batch_size: int

    def observe(self, local_sq_norm: float, local_count: float, global_sq_norm: float, global_count: float) -> int:
        """Adds one step's gradient norms; returns the global batch size from the next step on."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        ...


class WeightAverage(Protocol):
    """An average of the weights (optim/ema.py)."""

    def update(self, step_epochs: float) -> None:
        """Moves the average towards the weights."""
        ...

    def swapped(self) -> AbstractContextManager[None]:
        """Within the block the module holds the average."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        ...


class WireScales(Protocol):
    """Per-bucket scale factors for fp16 gradient communication (comm/exchange/wire.py); equal on all workers."""

    def state_dict(self) -> dict[int, float]:
        """Plain numbers, by bucket."""
        ...

    def load_state_dict(self, kept: dict[int, float]) -> None:
        """Inverse of `state_dict`."""
        ...


@dataclass
class TrainState:
    """Mutable: weights, optimizer and progress. `samples_seen` is the position in the data.

    Error-feedback residuals of the gradient exchange are not part of it: they differ per rank and are as large as the
    gradients, and a checkpoint resumes on any number of workers.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    average: WeightAverage | None = None
    batch_policy: BatchPolicy | None = None
    step: int = 0
    samples_seen: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    lr_factor: float = 1.0  # of all learning rates; lower after a rollback
    best_top1: float = -1.0  # of the evaluations that count as better, at `best_at` samples
    best_at: int = 0
    evaluated_at: int = 0
    wire_scales: WireScales | None = None
    copies: WeightCopies = field(default_factory=WeightCopies)  # derived from the weights, so not checkpointed
    _saved_scales: dict[int, float] = field(default_factory=dict)

    def keep_wire_scales(self, scales: WireScales) -> None:
        """Makes the exchange's scales part of the state, and restores those of a loaded checkpoint."""
        self.wire_scales = scales
        scales.load_state_dict(self._saved_scales)

    def evaluated(self, top1: float, *, min_rise: float) -> None:
        """Records an evaluation of the present weights for early stopping."""
        self.evaluated_at = self.samples_seen
        if top1 > self.best_top1 + (min_rise if self.best_at else 0.0):
            self.best_top1, self.best_at = top1, self.samples_seen

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers only, so that `torch.load(weights_only=True)` reads it back."""
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.precision.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "batch_policy": self.batch_policy.state_dict() if self.batch_policy else None,
            "step": self.step,
            "samples_seen": self.samples_seen,
            "skipped_steps": self.skipped_steps,
            "lr_factor": self.lr_factor,
            "evaluations": [self.best_top1, self.best_at, self.evaluated_at],
            "wire_scales": self.wire_scales.state_dict() if self.wire_scales else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            CheckpointError: the content does not fit the model, optimizer or policies of this recipe.
        """
        try:
            self._load(state)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise CheckpointError(
                f"the checkpoint does not fit this recipe ({type(error).__name__}: {str(error)[:200]}); the checkpoint "
                "before it, or another --output, works"
            ) from error

    def _load(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.load_state_dict(state["precision"])
        if self.average and state["average"]:
            self.average.load_state_dict(state["average"])
        if self.batch_policy and state["batch_policy"]:
            self.batch_policy.load_state_dict(state["batch_policy"])
        counts = (state["step"], state["samples_seen"], state["skipped_steps"])
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"step, samples seen and skipped steps are {counts}")
        self.step, self.samples_seen, self.skipped_steps = counts
        self.skipped_in_a_row, self.lr_factor = 0, float(state.get("lr_factor", 1.0))
        if not 0 < self.lr_factor <= 1:
            raise ValueError(f"the factor of the learning rates is {self.lr_factor}")
        self.best_top1, self.best_at, self.evaluated_at = state.get("evaluations", (-1.0, 0, 0))
        self._saved_scales = state.get("wire_scales", {})
        if self.wire_scales:
            self.wire_scales.load_state_dict(self._saved_scales)


@dataclass(frozen=True)
class Evaluation:
    """Exact counts over the whole evaluation set."""

    num_samples: int
    correct1: int
    correct5: int
    loss: float

    @property
    def top1(self) -> float:
        """Share of samples whose most likely class is the label, in [0, 1]."""
        return self.correct1 / max(1, self.num_samples)

    @property
    def top5(self) -> float:
        """Share of samples whose label is among the five most likely classes, in [0, 1]."""
        return self.correct5 / max(1, self.num_samples)


@dataclass(kw_only=True)
class Run:
    """One training run, wired by app/run.py; the loop and the step are free functions of it."""

    recipe: Recipe
    world: World
    state: TrainState
    model: nn.Module  # called in training: the module, compiled or wrapped in DistributedDataParallel or neither
    loader: Loader
    eval_data: EvalData
    micro_batch_size: int
    stream_rank: int  # place of this worker in the order in which samples are dealt: its rank, except under span tiles
    log: Callable[[dict[str, Any]], None]  # writes one event
    stop_requested: Callable[[], bool]
    checkpoints: CheckpointWriter | None = None  # on rank 0
    memory_copies: MemoryCopies | None = None  # on the first worker of each host
    memory_copy_every_steps: int = 0  # steps between copies of the state in the memory of each host, 0 for none
    checkpoint_every: Interval = field(default_factory=Interval)
    last_checkpoint_at: float = field(default_factory=time.monotonic)  # or the run's start, on rank 0's clock
    max_steps: int | None = None
    observe_every_steps: int = 0  # steps between two events with the norms of all layers; 0: chosen from the recipe
    exchange_report: Callable[[], dict[str, Any]] | None = None  # of one step's gradient exchange, for its event
    show_mistakes: Callable[[Sequence[Any], Mapping[str, Any]], None] | None = None  # on rank 0, at an evaluation
    device_use: Callable[[], dict[str, Any]] | None = None  # load of the processors for an event, on rank 0
    trace: Trace | None = None
    num_rollbacks: int = 0
    compare_every_steps: int = 0  # steps between comparisons of the workers, 0 for none
    class_weights: torch.Tensor | None = None  # of the loss, on the device
    captured: CapturedStep | None = None  # of `captured_work` in train/step.py; None: steps run uncaptured

    def settings_at(self, step: int, first: int) -> StepSettings:
        """Settings of `step`, which starts at stream position `first`."""
        policy = self.state.batch_policy
        batch = policy.global_batch_size if policy else None
        settings = settings_at(self.recipe, step, first, global_batch_size=batch)
        return dataclasses.replace(settings, lr=settings.lr * self.state.lr_factor)

    def micro_batches(self, settings: StepSettings, *, stream_rank: int | None = None) -> list[range]:
        """Stream ranges of the micro-batches of a step of this worker, or of the one with that `stream_rank`."""
        ranges = micro_batches(
            settings.first,
            settings.count,
            rank=self.stream_rank if stream_rank is None else stream_rank,
            world_size=self.world.world_size,
            micro_batch_size=self.micro_batch_size,
            bn_span=self.recipe.bn_span,
        )
        # A worker without samples (only in the run's last, short batch) still takes part in the exchange.
        return ranges or [range(settings.first, settings.first)]

    def checkpoint_is_overdue(self) -> bool:
        """True if the interval in seconds has passed on this worker's clock."""
        seconds = self.checkpoint_every.seconds
        return seconds > 0 and time.monotonic() - self.last_checkpoint_at >= seconds

    @property
    def is_complete(self) -> bool:
        """True when every sample of the run has been trained on, or the recipe's rule of early stopping applies."""
        return self.state.samples_seen >= total_samples(self.recipe) or self.stops_early

    @property
    def stops_early(self) -> bool:
        """True if the evaluations of the last `early_stop_epochs` epochs brought no better top-1."""
        epochs = (self.state.evaluated_at - self.state.best_at) / self.recipe.num_train_images
        return 0 < self.recipe.early_stop_epochs <= epochs + 1e-9
