"""Trained models from checkpoints."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from megabatch.app.model import build_model
from megabatch.comm.launch import World
from megabatch.errors import CheckpointError
from megabatch.optim.ema import WeightAverage
from megabatch.recipe import Recipe, from_json
from megabatch.runtime import Runtime
from megabatch.train.checkpoint import open_checkpoint


class TrainedModel(nn.Module):
    """Type of what `load_model` returns: the recipe's own module, with the facts that using it needs as attributes."""

    class_names: tuple[str, ...]
    """Name of each class, in the order of the logits; "0", "1", ... if the checkpoint or its data set had no names."""


def load_model(path: Path | str, *, device: torch.device | str = "cpu", model: str | None = None) -> TrainedModel:
    """Loads the trained model of a run folder (its best checkpoint) or of one checkpoint file, in evaluation mode.

    It has the averaged weights where the recipe averages them. Its input are images (N, C, H, W), float32, normalised
    with the recipe's `pixel_mean` and `pixel_std`; its output are logits (N, classes). `class_names` is an attribute of
    the model: the name of each class, in the order of the logits ("0", "1", ... if the data set had no names, or the
    checkpoint was written by a version that stored none).

    A model that a user's function made needs `model`, the same FILE.py:FUNCTION, whose file is run: a checkpoint runs
    no code of its own.

        model = load_model("runs/mine")
        names = [model.class_names[k] for k in model(images).argmax(1)]

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or its checksum differs.
        SettingsError: the model's library is missing, or the model is a function and `model` does not name it.
    """
    info, state = open_checkpoint(Path(path).expanduser())
    world = World(device=torch.device(device))
    runtime = Runtime(model=model)
    loaded = cast("TrainedModel", load_for_evaluation(from_json(info.recipe), runtime, state, world=world).eval())
    loaded.class_names = info.names()
    return loaded


def load_for_evaluation(recipe: Recipe, runtime: Runtime, state: dict[str, Any], *, world: World) -> nn.Module:
    """The checkpoint's model, with its averaged weights where the recipe averages them."""
    single = World(device=world.device)
    module = build_model(recipe, runtime, world=single, micro_batch_size=recipe.bn_span)
    try:
        _load_weights(module, recipe, state)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(
            f"the checkpoint's weights do not fit its recipe ({reason}); another one works"
        ) from error
    return module


def _load_weights(module: nn.Module, recipe: Recipe, state: dict[str, Any]) -> None:
    module.load_state_dict(state["module"])
    if state["average"]:
        average = WeightAverage(module, recipe.ema_half_life_epochs)
        average.load_state_dict(state["average"])
        with average.swapped():
            averaged = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        module.load_state_dict(averaged)
