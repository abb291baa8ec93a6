"""Persistent 16-bit copies of weights, written by the optimizer, so that no forward casts a weight.

    copies = WeightCopies(model, torch.bfloat16)
    optimizer = SGD(model.parameters(), lr=0.1, copies=copies.tensors)   # updates the copies with the weights
    for images, labels in batches:
        copies.refresh()
        with torch.autocast("cuda", torch.bfloat16), copies.read():
            loss = loss_of(model(images), labels)
        loss.backward()
        copies.return_gradients(widen=False)
        optimizer.step()
        copies.written_by(optimizer)
        optimizer.zero_grad()

Autocast casts every weight of a convolution or linear layer in each step, and its gradient back: two launches per
weight and 12 bytes of memory traffic per parameter. The copies hold the same values, so results are equal bit for bit.
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
    """A weight and its copy, as two tensors on the same memory that differ in where their gradient goes."""

    weight: nn.Parameter
    leaf: Tensor  # accumulates its own 16-bit gradient
    cast: Tensor  # passes its gradient on to the weight in fp32, as autocast's cast does


class WeightCopies:
    """Copies in `dtype` of the parameters of the convolutions and linear layers of `module`; empty without a module.

    `WideLinear` layers and parameters that are not fp32 or need no gradient are excluded. Copies have the memory layout
    of their weights and fixed addresses, as CUDA graphs require. They hold the values of the last `refresh`, or of the
    last step of an optimizer that writes them. Module tree and state dict do not change.

    Attributes:
        tensors: copies by parameter, the argument `copies` of the optimizers in `megabatch.optim`.
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

    def refresh(self) -> None:
        """Rewrites the copies if a weight changed since they were written, e.g. by a checkpoint or a swapped average.

        Changes are detected by torch's version counters, which miss writes through `.data` and custom kernels. Call it
        before the first forward of a step, outside of a CUDA graph.
        """
        if self._counts() != self._counted:
            with torch.no_grad():
                torch._foreach_copy_(list(self.tensors.values()), list(self.tensors))
            self._counted = self._counts()

    def written_by(self, optimizer: torch.optim.Optimizer) -> None:
        """Marks the copies as current after a step of `optimizer`, if it writes all of them."""
        written = getattr(optimizer, "copies", {})
        if all(written.get(weight) is tensor for weight, tensor in self.tensors.items()):
            self._counted = self._counts()

    @contextmanager
    def read(self, *, linked: bool = False) -> Iterator[None]:
        """Within the block, which contains a forward, the layers' parameters are the copies.

        Backward leaves gradients at the copies; `return_gradients` moves them to the weights. With `linked` each
        gradient passes to its weight during backward, in fp32, where DistributedDataParallel expects it.
        """
        for parameters, name, copy in self._places:
            parameters[name] = copy.cast if linked else copy.leaf
        try:
            yield
        finally:
            for parameters, name, copy in self._places:
                parameters[name] = copy.weight

    @torch.no_grad()
    def return_gradients(self, *, widen: bool) -> None:
        """Moves gradients from the copies to `weight.grad`, in 16 bit or (`widen`) in fp32; adds to existing ones."""
        found = [copy for copy in self._copies if copy.leaf.grad is not None]
        gradients = [_pop_gradient(copy.leaf) for copy in found]
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
    # Backward executes nodes in descending order of sequence number. The cast is older than any forward, so it would
    # run last, and no gradient could be exchanged before the whole backward is done.
    cast.grad_fn._set_sequence_nr(sys.maxsize)  # type: ignore[attr-defined]
    weight.grad_dtype = None  # allows 16-bit gradients, and fp32 ones in other steps
    return _Copy(weight, cast.detach().requires_grad_(), cast)


def _pop_gradient(leaf: Tensor) -> Tensor:
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None
    return gradient


def _accumulate(weights: list[nn.Parameter], gradients: list[Tensor]) -> None:
    """Adds gradients to `weight.grad`, as backward does."""
    sums, terms = [], []
    for weight, gradient in zip(weights, gradients, strict=True):
        if weight.grad is None:
            weight.grad = gradient
        else:
            sums.append(weight.grad)
            terms.append(gradient)
    if sums:
        torch._foreach_add_(sums, terms)
