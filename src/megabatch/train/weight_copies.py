"""16-bit copies of weights, which live from step to step: a forward that reads them casts no weight.

    copies = WeightCopies(model, torch.bfloat16)
    optimizer = SGD(model.parameters(), lr=0.1, copies=copies.tensors)   # writes them as it moves the weights
    for images, labels in batches:
        copies.follow()
        with torch.autocast("cuda", torch.bfloat16), copies.read():
            loss = loss_of(model(images), labels)
        loss.backward()
        copies.hand_over(widen=False)
        optimizer.step()
        copies.written_by(optimizer)
        optimizer.zero_grad()

Autocast casts every weight of a convolution or linear layer anew in each step, and its gradient back: two launches for
each of them, and 12 bytes a parameter to and from memory. The values are the same, so the results are, bit for bit.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megabatch.train.precision import WideLinear

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


class _Copy(NamedTuple):
    """A weight and its copy, as two tensors that share their memory: one for each way back from a gradient."""

    weight: nn.Parameter
    leaf: Tensor  # keeps its gradient, in 16 bit
    cast: Tensor  # its gradient goes on to the weight, in the weight's type, as that of autocast's cast does


class WeightCopies:
    """Copies in `dtype` of what the convolutions and linear layers of `module` learn; without a module, of nothing.

    A `WideLinear` is left out, as are parameters that are not fp32 or have no gradient. Copies lie in memory as their
    weights do and stay where they are, as a CUDA graph needs it. They hold what the weights held at the last `follow`
    or step of an optimizer that writes them. Module tree and state dict do not change.

    Attributes:
        tensors: each copy by its parameter, as the optimizers of `megabatch.optim` take them.
    """

    def __init__(self, module: nn.Module | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        copies: dict[nn.Parameter, _Copy] = {}
        self._places: list[tuple[dict[str, Any], str, _Copy]] = []
        for layer in _layers(module) if module is not None else ():
            for name, weight in layer.named_parameters(recurse=False):
                if weight.requires_grad and weight.dtype == torch.float32:
                    if weight not in copies:
                        copies[weight] = _copied(weight, dtype)
                    self._places.append((layer._parameters, name, copies[weight]))
        self._copies = list(copies.values())
        self.tensors: dict[Tensor, Tensor] = {copy.weight: copy.leaf.detach() for copy in self._copies}
        self._counted = self._counts()

    def follow(self) -> None:
        """Rewrites the copies if a weight has changed since they were written, by a checkpoint or a swap, say.

        torch counts what changes a tensor, except through `.data` and kernels of others. To be called before a step's
        first forward, and outside of a CUDA graph, which asks nothing.
        """
        if self._counts() != self._counted:
            with torch.no_grad():
                torch._foreach_copy_(list(self.tensors.values()), list(self.tensors))
            self._counted = self._counts()

    def written_by(self, optimizer: torch.optim.Optimizer) -> None:
        """Spares the next `follow` what a step of `optimizer` has done, if these are among its `copies`."""
        written = getattr(optimizer, "copies", {})
        if all(written.get(weight) is tensor for weight, tensor in self.tensors.items()):
            self._counted = self._counts()

    @contextmanager
    def read(self, *, linked: bool = False) -> Iterator[None]:
        """Within the block, which is for a forward, the layers' weights are the copies.

        What backward leaves at the copies is for `hand_over`. With `linked` each gradient goes on to its weight at
        once, in fp32, where DistributedDataParallel waits for it.
        """
        for parameters, name, copy in self._places:
            parameters[name] = copy.cast if linked else copy.leaf
        try:
            yield
        finally:
            for parameters, name, copy in self._places:
                parameters[name] = copy.weight

    @torch.no_grad()
    def hand_over(self, *, widen: bool) -> None:
        """Moves the gradients of a backward to the weights: as they are, or in fp32, added to what is there."""
        found = [copy for copy in self._copies if copy.leaf.grad is not None]
        gradients = [_taken(copy.leaf) for copy in found]
        if widen and found:
            wide = [torch.empty_like(copy.weight) for copy in found]
            torch._foreach_copy_(wide, gradients)
            gradients = wide
        _accumulate([copy.weight for copy in found], gradients)

    def _counts(self) -> list[int]:
        return [copy.weight._version for copy in self._copies]


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    return (layer for layer in module.modules() if isinstance(layer, _LAYERS) and not isinstance(layer, WideLinear))


def _copied(weight: nn.Parameter, dtype: torch.dtype) -> _Copy:
    with torch.enable_grad():
        cast = weight.to(dtype)
    assert cast.grad_fn is not None
    # Backward takes nodes in the order of these numbers, the highest first. As the cast is older than any forward it
    # would come last, and no gradient could be exchanged before the whole backward is through.
    cast.grad_fn._set_sequence_nr(sys.maxsize)  # type: ignore[attr-defined]
    weight.grad_dtype = None  # may be 16 bit, and fp32 at another step
    return _Copy(weight, cast.detach().requires_grad_(), cast)


def _taken(leaf: Tensor) -> Tensor:
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None
    return gradient


def _accumulate(weights: list[nn.Parameter], gradients: list[Tensor]) -> None:
    """As a backward does."""
    sums, terms = [], []
    for weight, gradient in zip(weights, gradients, strict=True):
        if weight.grad is None:
            weight.grad = gradient
        else:
            sums.append(weight.grad)
            terms.append(gradient)
    if sums:
        torch._foreach_add_(sums, terms)
