"""torch.compile around a model: state-dict keys stay, and a shape that occurs once is not compiled."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from megabatch.errors import SettingsError


class CompiledModel(nn.Module):
    """Calls `module` compiled from the second training forward of each input shape on, and uncompiled otherwise.

    Evaluation and a run's last short batch therefore cost no compilation. Shapes are static, because oneDNN's and
    cuDNN's convolutions need them. The wrapper works inside DistributedDataParallel. Save the original module in
    checkpoints: this wrapper's keys begin with `module.`.

    Raises:
        SettingsError: compilation failed, usually for lack of a C++ compiler; raised in the second forward of a
            shape.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__()
        self.module = module
        self._calls: Counter[torch.Size] = Counter()
        # In a list, because nn.Module would register the compiled module's parameters a second time.
        self._compiled = [torch.compile(module, dynamic=False, **options)]

    def forward(self, images: Tensor) -> Any:
        self._calls[images.shape] += self.training
        if not self.training or self._calls[images.shape] < 2:
            return self.module(images)
        try:
            return self._compiled[0](images)
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException

            if not isinstance(error, TorchDynamoException):
                raise  # an error of the model, not of compilation
            reason = str(error).strip().splitlines()[0]
            raise SettingsError(f"torch.compile failed: {reason}; compile=False works") from error
