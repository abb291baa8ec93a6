"""A whole run in a second: a small net on a few hundred made images, wired by the same code as any other run."""

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist

from megabatch import recipes
from megabatch.app.data import Data
from megabatch.app.run import open_run
from megabatch.comm.launch import World
from megabatch.data.sources.arrays import ArraySource
from megabatch.recipe import Recipe
from megabatch.recipe_validation import validate
from megabatch.runtime import Runtime
from megabatch.train.loop import train


def tiny_recipe(**changes) -> Recipe:
    """Two epochs of 240 images in batches of 48, spans of 8."""
    base = dataclasses.replace(
        recipes.get("fashion_mnist"),
        name="tiny",
        num_train_images=240,
        num_classes=4,
        width=8,
        flip=False,
        resolution=((0.0, 12.0),),
        eval_resolution=12,
        crop_padding=1,
        global_batch_size=48,
        bn_span=8,
        total_epochs=2.0,
        warmup_epochs=0.5,
        peak_lr=1.0,
        trust_coefficient=0.03,
    )
    return validate(dataclasses.replace(base, **changes))


def tiny_data(recipe: Recipe, num_test: int = 100) -> Data:
    """Images whose class is the bright quadrant, with noise: learnt within an epoch or two."""
    sets = []
    for seed, count in ((1, recipe.num_train_images), (2, num_test)):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 4, (count,), generator=generator)
        images = torch.randint(0, 100, (count, recipe.image_channels, 12, 12), generator=generator)
        for index, label in enumerate(labels.tolist()):
            top, left = divmod(label, 2)
            images[index, :, 6 * top : 6 * top + 6, 6 * left : 6 * left + 6] += 100
        sets.append(ArraySource(images.to(torch.uint8), labels, ("a", "b", "c", "d")))
    return Data(sets[0], sets[1], "made images")


def here() -> World:
    """The world of the default process group, or of one."""
    return World(dist.get_rank(), dist.get_world_size(), 0, 1) if dist.is_initialized() else World()


def run_tiny(folder, recipe, *, runtime=None, max_steps=None, stop_at=None, data=None):
    """Trains in this process (a rank of the default group, if there is one); losses, weights, last evaluation."""
    world, losses = here(), []
    runtime = runtime or Runtime(precision="fp32", micro_batch_size=recipe.bn_span)
    asked = {"stop": False}
    with open_run(
        recipe,
        runtime,
        data or tiny_data(recipe),
        world=world,
        folder=Path(folder),
        stop_requested=lambda: asked["stop"],
        max_steps=max_steps,
        quiet=True,
    ) as run:
        inner = run.log

        def log(event):
            inner(event)
            if event["event"] == "step":
                losses.append(event["loss"])
                asked["stop"] = stop_at is not None and event["step"] + 1 >= stop_at

        run.log = log
        evaluation = train(run)
        weights = {name: tensor.detach().clone() for name, tensor in run.state.module.state_dict().items()}
    return {
        "losses": losses,
        "weights": weights,
        "correct": evaluation.correct1 if evaluation else None,
        "step": run.state.step,
        "samples_seen": run.state.samples_seen,
    }
