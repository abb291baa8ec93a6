"""Gradients of the two functions in `residual`, each part by its fastest candidate (`products`).

dy is the gradient of a 1x1 convolution's output y. With a `deferred` norm backward it is the gradient of the batch
norm's output instead, and `deferred` is still to be applied.
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
    """Backward of y = weight relu(norm(x)).

    `weight_cast` is the filter in x's dtype, `layout` the parameter's layout. `h` is relu(norm(x)) where forward kept
    it in memory.
    """

    x: Tensor
    norm: Normalisation
    weight_cast: Tensor
    h: Tensor | None
    layout: products.FilterLayout
    span: int
    triton: bool

    def compute(self, dy: Tensor, deferred: DeferredNormBackward | None) -> Gradients:
        """Returns dx, the batch norm's sums (spans, 2, C), and dweight."""
        dx, sums = self._input_gradient(dy, deferred)
        dweight = products.weight_gradient(
            "norm_conv weight",
            dy,
            self.x,
            self.norm,
            self.weight_cast,
            self.h,
            self.layout,
            deferred,
            self.span,
            self.triton,
        )
        return dx, sums, dweight

    def _input_gradient(self, dy: Tensor, deferred: DeferredNormBackward | None) -> tuple[Tensor, Tensor]:
        x, norm, span, triton = self.x, self.norm, self.span, self.triton

        # Three passes: dh, the sums of dh behind ReLU's mask, then dx with the mask applied again as dh is read.
        def plain() -> tuple[Tensor, Tensor]:
            dh = products.data_gradient(dy, x, self.weight_cast, deferred, span=span, triton=triton)
            sums = passes.gradient_sums(dh, x, norm, span=span, triton=triton)
            return passes.input_gradient(dh, x, norm, sums, relu=True, span=span, triton=triton), sums

        # Two passes: the product's kernel masks dh and sums it as it writes.
        def fused(tiling: Tiling) -> tuple[Tensor, Tensor]:
            dz, sums = conv1x1.conv1x1_data_gradient(
                dy, self.weight_cast, x, norm, span=span, deferred=deferred, tiling=tiling, backend="triton"
            )
            return passes.input_gradient(dz, x, norm, sums, relu=False, span=span, triton=triton), sums

        tilings, flags = conv1x1.DATA_GRADIENT_TILINGS, (int(deferred is not None),)
        return products.run_fastest(
            "norm_conv data", x, self.weight_cast, plain, fused, tilings, triton=triton, extra_sizes=flags
        )


class JoinGradients(NamedTuple):
    """Backward of z = relu(norm(x) + residual) and y = weight z, up to the gradient dz of ReLU's input.

    `relu_mask` has one bit per value of z, set where ReLU passes. `residual_grad` is the gradient that reaches z other
    than through y, or None. `residual_norm` is the batch norm of `residual`, where it has one.
    """

    x: Tensor
    norm: Normalisation
    weight_cast: Tensor
    z: Tensor
    relu_mask: Tensor
    residual_grad: Tensor | None
    residual: Tensor | None
    residual_norm: Normalisation | None
    layout: products.FilterLayout
    span: int
    triton: bool

    def compute(self, dy: Tensor, deferred: DeferredNormBackward | None) -> Gradients:
        """Returns dz behind ReLU's mask, the sums of `join_passes.join_gradient`, and dweight."""
        dz, sums = self._join_gradient(dy, deferred)
        dweight = products.weight_gradient(
            "join_conv weight",
            dy,
            self.z,
            None,
            self.weight_cast,
            self.z,
            self.layout,
            deferred,
            self.span,
            self.triton,
        )
        return dz, sums, dweight

    def _join_gradient(self, dy: Tensor, deferred: DeferredNormBackward | None) -> tuple[Tensor, Tensor]:
        x, norm, span, triton = self.x, self.norm, self.span, self.triton

        # The product is written, then one more pass adds `residual_grad`, masks and sums.
        def plain() -> tuple[Tensor, Tensor]:
            product = products.data_gradient(dy, self.z, self.weight_cast, deferred, span=span, triton=triton)
            return join_passes.join_gradient(
                product,
                x,
                norm,
                self.relu_mask,
                span=span,
                triton=triton,
                addend=self.residual_grad,
                residual=self.residual,
                residual_norm=self.residual_norm,
            )

        # The product's kernel does the same before it writes.
        def fused(tiling: Tiling) -> tuple[Tensor, Tensor]:
            return conv1x1.conv1x1_data_gradient(
                dy,
                self.weight_cast,
                x,
                norm,
                span=span,
                relu_mask=self.relu_mask,
                addend=self.residual_grad,
                residual=self.residual,
                residual_norm=self.residual_norm,
                deferred=deferred,
                tiling=tiling,
                backend="triton",
            )

        tilings = conv1x1.DATA_GRADIENT_TILINGS
        flags = (int(self.residual_norm is not None), int(deferred is not None))
        return products.run_fastest(
            "join_conv data", x, self.weight_cast, plain, fused, tilings, triton=triton, extra_sizes=flags
        )
