"""Locates the first non-finite value of a step: the layer, and the samples by name."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from megabatch.comm.launch import all_gather_objects
from megabatch.data.loading.batch import Batch
from megabatch.nn.batch_norm.evaluation_statistics import discard_step
from megabatch.train.gradients import Objective, forward_loss
from megabatch.train.schedule import StepSettings
from megabatch.train.state import Run

_SHOWN = 3  # samples that are named


@runtime_checkable
class NamesSamples(Protocol):
    """A loader that names its samples (data/loading/train_loader.py)."""

    def sample_names(self, positions: range) -> list[str]:
        """Name of the sample at each stream position."""
        ...


class Finding(NamedTuple):
    """A tensor with a non-finite value, in words, and the rows of the batch that it concerns."""

    where: str
    rows: list[int]


def describe_non_finite(run: Run, settings: StepSettings) -> str:
    """Repeats the step on every worker and describes the first non-finite value of the first worker that has one.

    A collective. Gradients in `.grad` and the statistics of batch norm stay as they were before the step.
    """
    found = all_gather_objects(_search(run, settings), run.world)
    first = next(((rank, text) for rank, text in enumerate(found) if text), None)
    if first is None:
        return f"{_first_gradient(run.state.module) or 'the loss'} is not finite"
    return first[1] + (f" (worker {first[0]})" if run.world.world_size > 1 else "")


def _search(run: Run, settings: StepSettings) -> str | None:
    """All micro-batches run, also after a finding: a layer may exchange statistics with other workers."""
    smoothing, weights = run.recipe.label_smoothing, run.class_weights
    objective = Objective(settings.count, smoothing, run.state.precision, class_weights=weights)
    ranges = run.micro_batches(settings)
    text = None
    for positions, batch in zip(
        ranges, run.loader.batches((positions, settings.resolution) for positions in ranges), strict=True
    ):
        finding = first_not_finite(run.state.module, batch, objective)
        if finding and text is None:
            text = f"{finding.where} is not finite, {_named(run, positions, finding.rows)}"
    discard_step(run.state.module)
    return text


def _named(run: Run, positions: range, rows: Sequence[int]) -> str:
    if not isinstance(run.loader, NamesSamples):
        return f"at stream positions {positions.start} to {positions.stop - 1}"
    names = run.loader.sample_names(positions)
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return "from " + ", ".join(names[row] for row in rows[:_SHOWN]) + more


def first_not_finite(module: nn.Module, batch: Batch, objective: Objective) -> Finding | None:
    """The first tensor with a non-finite value: the images, a layer's parameter or output, the loss, or a gradient.

    Repeats forward and backward and checks every layer in order of execution; layers have their names in the module.
    """
    found: list[Finding] = []
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    with _watching(module, found, batch.count):
        loss, _ = forward_loss(module, batch, objective)
        gradients = torch.autograd.grad(loss / objective.global_count, list(parameters.values()), allow_unused=True)
    everything = list(range(batch.count))
    if not _finite(batch.images):
        return Finding("an input image", _rows(batch.images, batch.count))
    if found:
        return found[0]
    if not _finite(loss):
        return Finding("the loss", everything)
    # Backward runs from the last layer to the first.
    for name, gradient in reversed(list(zip(parameters, gradients, strict=True))):
        if gradient is not None and not _finite(gradient):
            return Finding(f"the gradient of {name}", everything)
    return None


@contextmanager
def _watching(module: nn.Module, found: list[Finding], count: int) -> Iterator[None]:
    """Within the block a forward appends non-finite tensors to `found`, in order of execution."""
    hooks = []
    for name, layer in module.named_modules():
        if not list(layer.children()):
            hooks.append(layer.register_forward_hook(_watcher(name, found, count)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _watcher(name: str, found: list[Finding], count: int) -> Any:
    def check(layer: nn.Module, _: Any, output: Tensor) -> None:
        if found:
            return
        for parameter_name, parameter in layer.named_parameters(recurse=False):
            if not _finite(parameter):
                found.append(Finding(f"the {parameter_name} of {name}", list(range(count))))
                return
        if not _finite(output):
            found.append(Finding(f"the output of {name}", _rows(output, count)))

    return check


def _rows(values: Tensor, count: int) -> list[int]:
    """Rows of a batch that hold a non-finite value; all of them if `values` has another first dimension."""
    if values.dim() < 1 or len(values) != count:
        return list(range(count))
    rows: list[int] = (~torch.isfinite(values.detach()).reshape(count, -1).all(1)).nonzero().flatten().tolist()
    return rows


def _first_gradient(module: nn.Module) -> str | None:
    for name, parameter in reversed(list(module.named_parameters())):
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"the gradient of {name}"
    return None


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())
