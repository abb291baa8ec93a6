"""torch.compile around a model, without its surprises: no key changes, and no minutes for a shape that comes once."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from megabatch.errors import SettingsError


class CompiledModel(nn.Module):
    """Calls `module` compiled, shape by shape, from a shape's second training forward on; otherwise as it is.

    So a run's last short batch and evaluation, which are few, cost no compilation. Compilation is for fixed shapes:
    oneDNN's and cuDNN's convolutions want to know theirs. Wrap this in DistributedDataParallel as any module. Keep
    the original for checkpoints: this wrapper's keys begin with `module.`.

    Raises:
        SettingsError: compilation failed, usually for lack of a C++ compiler; raised in the second forward of a
            shape.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__()
        self.module = module
        self._calls: Counter[torch.Size] = Counter()
        # As a list: a compiled module is a module, and its parameters would be there twice.
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
                raise  # of the model, not of its compilation
            reason = str(error).strip().splitlines()[0]
            raise SettingsError(f"torch.compile failed: {reason}; compile=False works") from error
