"""A trained model without megabatch's layers, with the facts that its use needs."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megabatch.app.load import load_for_evaluation
from megabatch.app.model import make_model
from megabatch.comm.launch import World
from megabatch.recipe import Recipe, from_json
from megabatch.runtime import Runtime
from megabatch.train.checkpoint import CheckpointInfo


class PixelModel(nn.Module):
    """Logits of unnormalised pixels: network((images / 255 - mean) / std).

    Shapes: images [n, channels, side, side] uint8, logits [n, classes] float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(recipe.pixel_mean)[:, None, None])
        self.register_buffer("std", torch.tensor(recipe.pixel_std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits."""
        logits: Tensor = self.network((images.float() / 255 - self.mean) / self.std)
        return logits


@dataclass(frozen=True)
class Trained:
    """A checkpoint's model for export; `pixel_model.network` has the plain layers of torch.nn."""

    info: CheckpointInfo
    recipe: Recipe
    pixel_model: PixelModel
    code: str | None = None  # FILE.py:FUNCTION that the user named

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Steps from an image file to the network's input, as JSON values."""
        return {
            "colours": "RGB" if self.recipe.image_channels == 3 else f"{self.recipe.image_channels} channel(s)",
            "crop": "central square",
            "crop_ratio_of_shorter_side": self.recipe.eval_crop_ratio,
            "resize_to": self.recipe.eval_resolution,
            "interpolation": "bilinear, antialiased",
            "divide_by": 255,
            "mean": list(self.recipe.pixel_mean),
            "std": list(self.recipe.pixel_std),
        }

    def facts(self) -> dict[str, str]:
        """Class names, preprocessing, recipe and accuracy as JSON texts, for the metadata of a file."""
        result = {"step": self.info.step, "epoch": self.info.epoch, "top1": self.info.top1}
        values = {
            "class_names": self.info.names(),
            "preprocessing": self.preprocessing,
            "recipe": self.info.recipe,
            "result": result,
        }
        return {name: json.dumps(value) for name, value in values.items()}

    def sample_images(self, count: int = 4) -> Tensor:
        """Random pixels [count, channels, side, side] uint8, the same in every call."""
        side = self.recipe.eval_resolution
        shape = (count, self.recipe.image_channels, side, side)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def plain_network(recipe: Recipe, code: str | None = None) -> nn.Module:
    """The recipe's untrained network of torch.nn's layers, in evaluation mode; its state dict has the same keys."""
    return make_model(recipe, code).eval()


def trained_model(info: CheckpointInfo, state: dict[str, Any], code: str | None = None) -> Trained:
    """The checkpoint's model, with averaged weights where the recipe averages them.

    A model that a user's function made needs `code`, the same FILE.py:FUNCTION, whose file is run.
    """
    recipe = from_json(info.recipe)
    network, runtime = plain_network(recipe, code), Runtime(channels_last=False, model=code)
    network.load_state_dict(load_for_evaluation(recipe, runtime, state, world=World()).state_dict())
    return Trained(info, recipe, PixelModel(network.requires_grad_(False), recipe).eval(), code)
