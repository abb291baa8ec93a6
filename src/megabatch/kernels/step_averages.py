"""Running averages of all batch-norm layers, updated from the sums of a step in two launches.

One layer after another takes eleven launches each: 583 for the 53 layers of a ResNet-50, more than its forward and
backward. `StepAverages.take` and `StepAverages.move` are one launch each for all layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megabatch.errors import UserError
from megabatch.kernels.dispatch import Backend, load, on_device, use_triton

BLOCK = 512
"""Values of a layer that one program handles."""


class LayerStatistics(NamedTuple):
    """Tensors of one layer of C channels: the sums of `statistics.SpanSums`, running averages (C,), update counter."""

    first: Tensor
    total: Tensor
    mean: Tensor
    var: Tensor
    num_updates: Tensor


def supports(layers: Sequence[LayerStatistics], backend: Backend) -> bool:
    """True if the kernels can update these layers: contiguous float32 on one device, and int64 counters."""
    device = layers[0].mean.device
    return (
        use_triton(layers[0].mean, backend)
        and all(
            tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.device == device
            for layer in layers
            for tensor in layer[:-1]
        )
        and all(layer.num_updates.dtype == torch.int64 and layer.num_updates.device == device for layer in layers)
    )


class StepAverages:
    """Updates of one list of layers. Their addresses are kept on the device between steps.

    Raises:
        UserError: a CUDA graph captures the update of layers whose tensors were replaced since the last update.
    """

    def __init__(self) -> None:
        self._rows: list[list[int]] = []
        self._table = torch.empty(0)
        self._captured: set[Tensor] = set()  # read by graphs at every replay

    @torch.no_grad()
    def take(self, layers: Sequence[LayerStatistics], *, first: bool) -> Tensor:
        """Returns `first` or `total` of all layers, one after another in one vector, and zeroes both in the layers."""
        table = self._send(layers)
        taken = layers[0].total.new_empty(sum(len(layer.total) for layer in layers))
        with on_device(taken):
            load("kernels._statistics_triton").take_sums_kernel[_grid(layers)](
                table, taken, first=first, block=BLOCK, num_warps=4
            )
        return taken

    @torch.no_grad()
    def move(
        self, layers: Sequence[LayerStatistics], taken: Tensor, momentum: float, overflow: Tensor | None = None
    ) -> None:
        """running = (1 - momentum) running + momentum (mean over spans), for all layers; `taken` is as from `take`.

        Averages of a layer without spans are unchanged. The counter of each layer is incremented. If `overflow`, a 0-d
        float32 tensor, is not 0, nothing changes.
        """
        skips = overflow is not None
        with on_device(taken):
            load("kernels._statistics_triton").move_averages_kernel[_grid(layers)](
                self._send(layers), taken, momentum, overflow if skips else taken, skips=skips, block=BLOCK, num_warps=4
            )

    def _send(self, layers: Sequence[LayerStatistics]) -> Tensor:
        """Table of the layers: five addresses, the number of channels, and the layer's place in the vector."""
        rows, start = [], 0
        for layer in layers:
            rows.append([*(tensor.data_ptr() for tensor in layer), len(layer.mean), start])
            start += len(layer.total)
        device = layers[0].mean.device
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if rows != self._rows:
            if capturing:
                raise UserError(
                    "a CUDA graph captures an update of new batch-norm averages; one update outside of capture first "
                    "works"
                )
            self._rows, self._table = rows, torch.tensor(rows, dtype=torch.int64, device=device)
        if capturing:
            self._captured.add(self._table)
        return self._table


def _grid(layers: Sequence[LayerStatistics]) -> tuple[int, int]:
    return len(layers), -(-max(len(layer.total) for layer in layers) // BLOCK)
