"""What the site leaves open: micro-batch, workers, precision; and whether recipe and site fit together."""

import torch

from megabatch.comm.launch import available_cores
from megabatch.data.split import check_split
from megabatch.errors import SiteError
from megabatch.recipe import Recipe, validate
from megabatch.site import Site
from megabatch.train.precision import Precision, fastest_precision


def choose_micro_batch(recipe: Recipe, site: Site, *, world_size: int, device: torch.device) -> int:
    """Samples of one forward and backward: the site's word, or what suits the device.

    Chosen as whole batch-norm spans, and without regard to the number of workers where that is possible, so that the
    same micro-batches are computed (bit for bit) whatever the world size.
    """
    if site.micro_batch_size is not None:
        return site.micro_batch_size
    if recipe.max_global_batch_size:
        return recipe.bn_span  # the noise scale is measured between one span and the global batch
    pixels = max(value for _, value in recipe.resolution)
    # A CPU wants its activations near the caches: 256 samples of 32 px, 36 of 224; a GPU wants to be filled.
    budget = 256 * (224 / pixels) ** 2 if device.type == "cuda" else 256 * 32 / pixels
    # One span a micro-batch is normalised in one call; several only where one is too little work.
    spans = 1 if recipe.bn_span >= budget / 4 else int(budget // recipe.bn_span)
    return recipe.bn_span * min(spans, max(1, recipe.global_batch_size // world_size // recipe.bn_span))


def check(recipe: Recipe, site: Site, *, world_size: int, device: torch.device) -> int:
    """The micro-batch size; RecipeError or SiteError if recipe and site do not fit together."""
    validate(recipe)
    micro_batch_size = choose_micro_batch(recipe, site, world_size=world_size, device=device)
    if recipe.max_global_batch_size and micro_batch_size != recipe.bn_span:
        raise SiteError(
            f"micro_batch_size={micro_batch_size} contradicts max_global_batch_size: the noise scale is measured on "
            f"one batch-norm span; micro_batch_size={recipe.bn_span} works"
        )
    for _, size in recipe.batch_sizes or ((0.0, recipe.global_batch_size),):
        check_split(
            global_batch_size=int(size),
            world_size=world_size,
            micro_batch_size=micro_batch_size,
            bn_span=recipe.bn_span,
        )
    return micro_batch_size


def default_workers(recipe: Recipe, site: Site) -> int:
    """Local workers where the user names no number: one a GPU, else one a core up to eight, none without a span."""
    gpus = torch.cuda.device_count() if site.device != "cpu" and torch.cuda.is_available() else 0
    smallest = min([recipe.global_batch_size, *(int(size) for _, size in recipe.batch_sizes)])
    return max(1, min(gpus or min(available_cores(), 8), smallest // recipe.bn_span))


def choose_precision(site: Site, device: torch.device) -> Precision:
    """The precision the site names, or the device's fastest."""
    return Precision(fastest_precision(device) if site.precision == "auto" else site.precision, device)
