"""The gradients of `residual`'s functions: each is asked of its parts, in whichever way is the fastest (`products`).

dy is the gradient of a 1x1 convolution's output; with a `rest` it is that of what batch norm made of the output, and
the rest of that batch norm's backward is still to be done.
"""

from typing import NamedTuple

from torch import Tensor

from megabatch.kernels.bottleneck import conv1x1, products
from megabatch.kernels.bottleneck.handover import DeferredNormBackward
from megabatch.kernels.bottleneck.tiles import Tiling
from megabatch.kernels.norm import join as join_passes
from megabatch.kernels.norm import passes
from megabatch.kernels.norm.passes import Normalisation

Gradients = tuple[Tensor, Tensor, Tensor]


class NormGradients(NamedTuple):
    """Of y = weight relu(batch norm of x); `h` is what the convolution read, where it is in memory."""

    x: Tensor
    norm: Normalisation
    small: Tensor
    h: Tensor | None
    own: products.Filter
    span: int
    triton: bool

    def of(self, dy: Tensor, rest: DeferredNormBackward | None) -> Gradients:
        """dx, the batch norm's sums (spans, 2, C), and dweight."""
        dx, sums = self._of_input(dy, rest)
        dweight = products.weight_gradient(
            "norm_conv weight", dy, self.x, self.norm, self.small, self.h, self.own, rest, self.span, self.triton
        )
        return dx, sums, dweight

    def _of_input(self, dy: Tensor, rest: DeferredNormBackward | None) -> tuple[Tensor, Tensor]:
        x, norm, span, triton = self.x, self.norm, self.span, self.triton

        def plain() -> tuple[Tensor, Tensor]:
            dh = products.data_gradient(dy, x, self.small, rest, span=span, triton=triton)
            sums = passes.gradient_sums(dh, x, norm, span=span, triton=triton)
            return passes.input_gradient(dh, x, norm, sums, relu=True, span=span, triton=triton), sums

        def fused(tiling: Tiling) -> tuple[Tensor, Tensor]:
            dz, sums = conv1x1.conv1x1_data_gradient(
                dy, self.small, x, norm, span=span, rest=rest, tiling=tiling, backend="triton"
            )
            return passes.input_gradient(dz, x, norm, sums, relu=False, span=span, triton=triton), sums

        tilings, more = conv1x1.DATA_GRADIENT_TILINGS, (int(rest is not None),)
        return products.take("norm_conv data", x, self.small, plain, fused, tilings, triton=triton, more=more)


class JoinGradients(NamedTuple):
    """Of y = weight z and of z = relu(batch norm of x + residual), which passed where `passed` has bits.

    `past` is what reached z by other ways; `residual_norm` is the batch norm of `residual`, where it has one.
    """

    x: Tensor
    norm: Normalisation
    small: Tensor
    z: Tensor
    passed: Tensor
    past: Tensor | None
    residual: Tensor | None
    residual_norm: Normalisation | None
    own: products.Filter
    span: int
    triton: bool

    def of(self, dy: Tensor, rest: DeferredNormBackward | None) -> Gradients:
        """dz as ReLU lets it pass, sums as of `join_passes.join_gradient`, and dweight."""
        dz, sums = self._of_join(dy, rest)
        dweight = products.weight_gradient(
            "join_conv weight", dy, self.z, None, self.small, self.z, self.own, rest, self.span, self.triton
        )
        return dz, sums, dweight

    def _of_join(self, dy: Tensor, rest: DeferredNormBackward | None) -> tuple[Tensor, Tensor]:
        x, norm, span, triton = self.x, self.norm, self.span, self.triton

        def plain() -> tuple[Tensor, Tensor]:
            through = products.data_gradient(dy, self.z, self.small, rest, span=span, triton=triton)
            return join_passes.join_gradient(
                through,
                x,
                norm,
                self.passed,
                span=span,
                triton=triton,
                addend=self.past,
                residual=self.residual,
                residual_norm=self.residual_norm,
            )

        def fused(tiling: Tiling) -> tuple[Tensor, Tensor]:
            return conv1x1.conv1x1_data_gradient(
                dy,
                self.small,
                x,
                norm,
                span=span,
                passed=self.passed,
                addend=self.past,
                residual=self.residual,
                residual_norm=self.residual_norm,
                rest=rest,
                tiling=tiling,
                backend="triton",
            )

        tilings, more = conv1x1.DATA_GRADIENT_TILINGS, (int(self.residual_norm is not None), int(rest is not None))
        return products.take("join_conv data", x, self.small, plain, fused, tilings, triton=triton, more=more)
