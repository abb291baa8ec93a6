"""Time of a layer's forward and backward pass on a device: a roofline, a share of it, and an overhead per kernel.

    t_layer = (sum over its kernels of max(operations / peak, bytes / bandwidth)) / share + overhead * kernels

(Williams et al. 2009). Forward of a convolution reads its input and writes its output; backward has two such products.
Batch norm with its activation makes 3 passes over the output forward and 5 backward; an addition makes 3 and 2. `share`
and `overhead` belong to a software stack and are fitted to its single-node rows alone. The optimizer makes 7 passes of
4 bytes over the parameters (LARS: norms, weights, gradients, momentum).
"""

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megabatch.errors import SettingsError
from megabatch.plan.hardware import Device, Hardware, Row, Stack
from megabatch.plan.layers import Layer, layers_of

OPTIMIZER_BYTES_PER_PARAMETER = 28
ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Speed:
    """A stack's fitted speed: share of the roofline in (0, 1], seconds per kernel, peaks."""

    share: float
    overhead_s: float
    device: Device
    precision: str

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - speeds are few and live as long as the process
    def forward_s(self, layer: Layer, batch: float) -> float:
        """Seconds of the layer's forward pass over `batch` images."""
        return self._roofline_s(layer, batch, forward=True) / self.share + forward_kernels(layer) * self.overhead_s

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def backward_s(self, layer: Layer, batch: float) -> float:
        """Seconds of the layer's backward pass over `batch` images."""
        return self._roofline_s(layer, batch, forward=False) / self.share + backward_kernels(layer) * self.overhead_s

    def optimizer_s(self, num_parameters: int) -> float:
        """Seconds of an update with momentum and norms per layer (LARS)."""
        passes_s = OPTIMIZER_BYTES_PER_PARAMETER * num_parameters / self.device.memory_bytes_per_s
        return passes_s / self.share

    def compute_s(self, layers: Sequence[Layer], batch: float) -> float:
        """Seconds of forward, backward and update over `batch` images, without communication."""
        passes_s = sum(self.forward_s(layer, batch) + self.backward_s(layer, batch) for layer in layers)
        return passes_s + self.optimizer_s(sum(layer.num_parameters for layer in layers))

    def _roofline_s(self, layer: Layer, batch: float, *, forward: bool) -> float:
        size, bandwidth = ELEMENT_BYTES[self.precision], self.device.memory_bytes_per_s
        moved = batch * (layer.in_elements + layer.out_elements) + layer.num_parameters
        product_s = max(batch * layer.forward_flops / self.device.flops[self.precision], moved * size / bandwidth)
        passes = (3 if forward else 5) * bool(layer.norm_channels) + (3 if forward else 2) * layer.joins
        return product_s * (1 if forward else 2) + passes * batch * layer.out_elements * size / bandwidth


def forward_kernels(layer: Layer) -> int:
    """Kernels of a forward pass: the product, batch norm with activation, addition."""
    return 1 + bool(layer.norm_channels) + layer.joins


def backward_kernels(layer: Layer) -> int:
    """Kernels of a backward pass: two products, batch norm with activation, addition."""
    return 2 + bool(layer.norm_channels) + layer.joins


def expected_maximum(num_values: int) -> float:
    """Expected largest of `num_values` independent standard normal values, in standard deviations (Blom 1958)."""
    if num_values == 1:
        return 0.0
    return statistics.NormalDist().inv_cdf((num_values - 0.375) / (num_values + 0.25))


@functools.cache
def step_jitter(hardware: Hardware) -> float:
    """Standard deviation of a worker's step time, relative to its mean.

    A synchronous step takes as long as its slowest worker, so that n workers lose sigma * expected_maximum(n). Least
    squares over the weak scaling inside single hosts, whose losses also hold what an exchange over NVLink exposes: for
    one host it is an upper bound.
    """
    pairs = []
    for points in hardware.scaling:
        (_, single), *more = points
        pairs += [(expected_maximum(int(n)), n * single / rate - 1) for n, rate in more]
    return sum(x * y for x, y in pairs) / sum(x * x for x, _ in pairs)


@functools.cache
def speed_of(stack_name: str, hardware: Hardware) -> Speed:
    """Returns the speed of a stack, fitted to its single-node rows."""
    stack = hardware.stack[stack_name]
    device = hardware.device[stack.device]
    unit = Speed(1.0, 0.0, device, stack.precision)
    jitter = step_jitter(hardware)
    if len({row.batch for row in stack.rows}) > 1:
        points = [(*_work(unit, row), _compute_s(row, jitter), 1 / _compute_s(row, jitter)) for row in stack.rows]
        roofline_factor, overhead_s = _fit_two(points)
    else:
        overhead_s = _overhead_s(stack, hardware)
        if stack.share_of is not None:
            return Speed(speed_of(stack.share_of, hardware).share, overhead_s, device, stack.precision)
        roofline_factor = statistics.fmean(
            (_compute_s(row, jitter) - overhead_s * _work(unit, row)[1]) / _work(unit, row)[0] for row in stack.rows
        )
    if not roofline_factor > 0:
        raise SettingsError(f"stack {stack_name!r}: its rows leave no time for arithmetic; check images_per_s")
    return Speed(1 / roofline_factor, overhead_s, device, stack.precision)


def _compute_s(row: Row, jitter: float) -> float:
    """Seconds of a step without the wait for the slowest worker of the node."""
    return row.batch / row.images_per_s / (1 + jitter * expected_maximum(row.workers))


def _work(unit: Speed, row: Row) -> tuple[float, int]:
    """Roofline seconds and kernels of a step of the row."""
    layers = layers_of(
        row.model,
        resolution=row.resolution,
        num_classes=row.num_classes,
        in_channels=row.in_channels,
        width=row.width,
    )
    return unit.compute_s(layers, row.batch), sum(forward_kernels(it) + backward_kernels(it) for it in layers)


def _overhead_s(stack: Stack, hardware: Hardware) -> float:
    """Seconds per kernel: from forward passes, from another stack, or 0."""
    if stack.forward_rows:
        layers = layers_of("resnet50")
        unit = Speed(1.0, 0.0, hardware.device[stack.device], stack.precision)
        kernels = sum(map(forward_kernels, layers))
        points = [
            (sum(unit.forward_s(layer, batch) for layer in layers), kernels, ms / 1e3, 1e3 / ms)
            for batch, ms in stack.forward_rows
        ]
        return _fit_two(points)[1]
    return speed_of(stack.overhead_of, hardware).overhead_s if stack.overhead_of else 0.0


def _fit_two(points: Sequence[tuple[float, float, float, float]]) -> tuple[float, float]:
    """Least squares of `time = a * x + b * y` over points (x, y, time, weight): returns a and b, b at least 0."""
    sxx, sxy, syy, sxt, syt = (
        sum(w * w * p * q for p, q, w in columns)
        for columns in (
            [(x, x, w) for x, _, _, w in points],
            [(x, y, w) for x, y, _, w in points],
            [(y, y, w) for _, y, _, w in points],
            [(x, t, w) for x, _, t, w in points],
            [(y, t, w) for _, y, t, w in points],
        )
    )
    determinant = sxx * syy - sxy * sxy
    b = (sxx * syt - sxy * sxt) / determinant
    return ((sxt / sxx), 0.0) if b < 0 else ((sxt * syy - syt * sxy) / determinant, b)
