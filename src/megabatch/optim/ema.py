"""Exponential moving average of the weights, with a half-life in epochs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megabatch.errors import UserError
from megabatch.optim.engine.multi_tensor import wide_dtype
from megabatch.optim.engine.shards import local


class WeightAverage:
    """Exponential moving average of a model's weights with a half-life in epochs.

        d = 0.5^(step_epochs / half_life_epochs);   average = d average + (1 - d) weights,   bias-corrected

    The decay depends on the fraction of an epoch that a step covers, so the average covers the same number of samples
    when the batch size changes (the rule of Busbridge et al. 2023, arXiv:2307.13813; a decay per step, as in timm or
    torch.optim.swa_utils, does not have this property). The bias correction divides by the sum of weights so far, as
    Adam's does: the initial weights do not count, and the start of a short run does not dominate its average.

    Parameters and floating-point buffers (such as batch norm's running averages, which belong to the weights they were
    measured with) are averaged in fp32, or float64 for float64; other buffers (counters) are copied. Of parameters that
    `fully_shard` has sharded, each rank averages its part.

        average = WeightAverage(model, half_life_epochs=0.5)
        for images, labels in loader:
            train_step(model, images, labels)
            average.update(len(images) / num_train_images)
        with average.swapped():
            evaluate(model)

    Args:
        model: read at each `update`; it may be moved to another device or loaded in between.
        half_life_epochs: epochs after which weights count half; above 0.

    Raises:
        UserError: half_life_epochs or step_epochs of 0 or less; in `load_state_dict`, another model's state.
    """

    def __init__(self, model: nn.Module, half_life_epochs: float) -> None:
        if not half_life_epochs > 0:
            raise UserError(
                f"half_life_epochs={half_life_epochs} was given, needed: above 0; half_life_epochs=1.0 works"
            )
        self._half_life = half_life_epochs
        self._weight = 0.0  # sum of the weights of all updates so far, in [0, 1)
        self._model = model
        floats, others = _tensors(model)
        self._averages = {name: _wide_copy(tensor) for name, tensor in floats.items()}
        self._copies = {name: tensor.detach().clone() for name, tensor in others.items()}

    @torch.no_grad()
    def update(self, step_epochs: float) -> None:
        """Adds the present weights to the average, after a step that covered `step_epochs` epochs (a fraction of one).

        Costs one multi-tensor operation over the weights, without a device synchronisation.
        """
        if not step_epochs > 0:
            raise UserError(f"step_epochs={step_epochs} was given, needed: above 0; batch / num_train_images works")
        newest = 1 - 0.5 ** (step_epochs / self._half_life)
        self._weight += newest * (1 - self._weight)
        floats, others = _tensors(self._model)
        averages = [local(average) for average in self._averages.values()]
        current = [local(floats[name]).to(average) for name, average in zip(self._averages, averages, strict=True)]
        torch._foreach_lerp_(averages, current, newest / self._weight)
        for name, tensor in others.items():
            self._copies[name].copy_(tensor)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Context manager in which the model holds the average; afterwards it holds its own weights again.

        Changes made to the model's tensors inside are undone. Before the first update the average is the initial model.
        """
        floats, others = _tensors(self._model)
        live = [*floats.values(), *others.values()]
        saved = [tensor.detach().clone() for tensor in live]
        try:
            _copy_(live, [*self._averages.values(), *self._copies.values()])
            yield
        finally:
            _copy_(live, saved)

    def state_dict(self) -> dict[str, Any]:
        """Copies of the averages by name, and the sum of weights so far."""
        tensors = {name: tensor.clone() for name, tensor in (self._averages | self._copies).items()}
        return {"weight": self._weight, "tensors": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; raises UserError if the names are not those of this model."""
        targets = self._averages | self._copies
        # Until November 2026 the sums of a step were buffers of span layers, and so part of the average.
        names = {name for name in state["tensors"] if not name.endswith((".span_sum", ".first_span"))}
        if targets.keys() != names:
            differing = sorted(targets.keys() ^ names)
            raise UserError(
                f"the average of another model was given: {', '.join(differing[:5])} differ; needed: the same names; "
                "the model that was averaged works"
            )
        for name, tensor in targets.items():
            tensor.copy_(state["tensors"][name])
        self._weight = float(state["weight"])


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Floating-point parameters and buffers by name, and the others. Not cached, since `.to` replaces buffers."""
    named = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    floats = {name: tensor for name, tensor in named.items() if tensor.is_floating_point()}
    return floats, {name: tensor for name, tensor in named.items() if name not in floats}


def _wide_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(wide_dtype(tensor.dtype), copy=True)


@torch.no_grad()
def _copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
