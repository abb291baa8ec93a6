"""Defers the last pass of a batch norm's backward to the convolution whose output the batch norm reads.

autograd passes one tensor between two functions: the gradient dy of the convolution's output y, in memory. Here the
batch norm returns the gradient dz of its own output instead, and puts the values that turn dz into dy into a
`Handover` that both functions hold. The convolution's gradient kernels then compute dy as they read dz and y, and dy
is never in memory.
"""

from typing import NamedTuple

from torch import Tensor

from megabatch.kernels.norm.passes import Normalisation, input_gradient


class DeferredNormBackward(NamedTuple):
    """Inputs of the elementwise pass dy = scale rstd (dz - sum(dz) / n - h sum(dz h) / n), with h = (y - mean) rstd.

    `sums` (spans, 2, C) holds sum(dz) and sum(dz h) over each span of n values. With `relu` the gradient that comes
    with it is that of ReLU's output, and the pass also applies ReLU's mask; else the mask is already applied.
    """

    y: Tensor
    norm: Normalisation
    sums: Tensor
    relu: bool

    def apply(self, dz: Tensor, *, span: int, triton: bool) -> Tensor:
        """dy, computed by a separate pass and written to memory."""
        return input_gradient(dz, self.y, self.norm, self.sums, span=span, triton=triton, relu=self.relu)


class Handover:
    """Slot through which a batch norm's backward defers its final elementwise pass to the preceding convolution.

    Only that convolution may read the gradient that the batch norm returns: it is not yet dy.
    """

    def __init__(self) -> None:
        self._deferred: DeferredNormBackward | None = None

    def put(self, deferred: DeferredNormBackward) -> None:
        """Called by the batch norm's backward, before the convolution's."""
        # Detached, so that a value which is never popped does not keep the graph of y alive.
        self._deferred = deferred._replace(y=deferred.y.detach())

    def pop(self) -> DeferredNormBackward | None:
        """Called by the convolution's backward: returns what was put, once, and None if nothing was put."""
        deferred, self._deferred = self._deferred, None
        return deferred
