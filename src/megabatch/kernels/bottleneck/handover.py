"""How a batch norm leaves the end of its backward to the convolution before it.

What autograd carries from one function to the next is a tensor in memory. Here it is the gradient of the batch norm's
output, and what makes the gradient of its input from that is left at a place that both functions know.
"""

from typing import NamedTuple

from torch import Tensor

from megabatch.kernels.norm.passes import Normalisation, input_gradient


class DeferredNormBackward(NamedTuple):
    """What is left of a batch norm's backward where the gradient of its input y is made as it is read.

    That is `input_gradient` with the gradient of its output: with `relu` of ReLU's, else with ReLU's mask on it.
    """

    y: Tensor
    norm: Normalisation
    sums: Tensor
    relu: bool

    def applied(self, dz: Tensor, *, span: int, triton: bool) -> Tensor:
        """The gradient of y, in memory."""
        return input_gradient(dz, self.y, self.norm, self.sums, span=span, triton=triton, relu=self.relu)


class Handover:
    """Where a batch norm's backward leaves its rest to the convolution that wrote its input, and nobody else reads.

    What autograd then brings that convolution is the gradient of the batch norm's output.
    """

    def __init__(self) -> None:
        self._rest: DeferredNormBackward | None = None

    def leave(self, rest: DeferredNormBackward) -> None:
        """Called by the batch norm."""
        self._rest = rest._replace(y=rest.y.detach())  # or what is left, if nobody takes it, would hold its own graph

    def take(self) -> DeferredNormBackward | None:
        """Called by the convolution, once for each time something was left."""
        rest, self._rest = self._rest, None
        return rest
