"""What a run holds while it trains, and what of it a checkpoint keeps."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from megabatch.comm.launch import World
from megabatch.data.loading.batch import Batch
from megabatch.train.cuda_graph import CapturedStep
from megabatch.train.precision import Precision
from megabatch.train.weight_copies import WeightCopies


@dataclass(frozen=True)
class StepSettings:
    """Everything that one optimizer step needs to know: a pure function of the samples seen so far."""

    step: int
    first: int  # stream position of the step's first sample
    count: int  # samples of the global batch
    epoch: float  # fractional, at the start of the step
    resolution: int  # pixels
    lr: float
    momentum: float
    weight_decay_factor: float = 1.0
    sgd_share: float | None = None  # RMSprop warm-up only
    augmented: bool = True

    @property
    def next_sample(self) -> int:
        """Stream position after this step."""
        return self.first + self.count


class Loader(Protocol):
    """The training data: batches of stream ranges, in the order asked for."""

    def batches(self, requests: Iterable[tuple[range, int]]) -> Iterator[Batch]:
        """One batch per request `(positions, resolution)`."""
        ...


class BatchPolicy(Protocol):
    """Grows the global batch as the gradient noise scale grows (optim/batch_size.py)."""

    global_batch_size: int

    def observe(self, local_sq_norm: float, local_count: float, global_sq_norm: float, global_count: float) -> int:
        """Takes in one step's gradient norms; the global batch from the next step on."""
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
    """Mutable: the weights, the optimizer, and how far the run is. Position in the data is `samples_seen`.

    What error feedback on the wire has kept is left out: it is another on every worker, and as large as the gradients,
    and a checkpoint continues on any number of workers.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    average: WeightAverage | None = None
    batch_policy: BatchPolicy | None = None
    step: int = 0
    samples_seen: int = 0
    best_top1: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    wire_scales: WireScales | None = None
    copies: WeightCopies = field(default_factory=WeightCopies)  # follow the weights, so no checkpoint keeps them
    _saved_scales: dict[int, float] = field(default_factory=dict)

    def keep_wire_scales(self, scales: WireScales) -> None:
        """Makes the exchange's scales part of the state, and goes on with those that a checkpoint held."""
        self.wire_scales = scales
        scales.load_state_dict(self._saved_scales)

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
            "best_top1": self.best_top1,
            "skipped_steps": self.skipped_steps,
            "wire_scales": self.wire_scales.state_dict() if self.wire_scales else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.load_state_dict(state["precision"])
        if self.average and state["average"]:
            self.average.load_state_dict(state["average"])
        if self.batch_policy and state["batch_policy"]:
            self.batch_policy.load_state_dict(state["batch_policy"])
        self.step, self.samples_seen = state["step"], state["samples_seen"]
        self.best_top1, self.skipped_steps = state["best_top1"], state["skipped_steps"]
        self._saved_scales = state.get("wire_scales", {})


@dataclass(frozen=True)
class Evaluation:
    """Exact counts over the whole evaluation set."""

    num_samples: int
    correct1: int
    correct5: int
    loss: float

    @property
    def top1(self) -> float:
        """Share of samples whose likeliest class is right, in [0, 1]."""
        return self.correct1 / max(1, self.num_samples)

    @property
    def top5(self) -> float:
        """Share of samples whose class is among the five likeliest, in [0, 1]."""
        return self.correct5 / max(1, self.num_samples)


@dataclass(kw_only=True)
class Run:
    """One training run, wired by build.py; the loop reads it and calls free functions."""

    world: World
    state: TrainState
    model: nn.Module  # what is called: the module, or its DistributedDataParallel wrapper
    loader: Loader
    settings_at: Callable[[int, int], StepSettings]  # of (step, samples seen)
    micro_batches: Callable[[StepSettings], list[range]]  # this worker's stream ranges of a step
    apply_settings: Callable[[StepSettings], None]  # rates into the optimizer's groups
    finish_statistics: Callable[[], None]  # batch-norm running averages, once a step
    discard_statistics: Callable[[], None]  # the same of a step that was skipped
    evaluate: Callable[[], Evaluation]
    save: Callable[[Evaluation | None], None]  # a checkpoint
    log: Callable[[dict[str, Any]], None]
    total_samples: int
    num_train_images: int
    label_smoothing: float
    eval_every_epochs: float
    eval_offset_epochs: float = 0.0
    checkpoint_every_steps: int = 0
    max_steps: int | None = None
    stop_requested: Callable[[], bool]
    exchange_report: Callable[[], dict[str, Any]] | None = None
    captured: CapturedStep | None = None  # of train/step.py's `captured_work`; None: every step is taken as written
