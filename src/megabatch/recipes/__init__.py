"""Recipes: functions without arguments that return a complete `Recipe`. Imports no torch.

A recipe's docstring gives the command that runs it, the published result, the result measured by this project, and the
certainty of each number: *read* in a public source, *recalled* from memory of it, *derived* by arithmetic, or *chosen*
by this project; *departs* lists deliberate differences from the source.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from megabatch.errors import RecipeError
from megabatch.recipe import Recipe
from megabatch.recipe_file import SUFFIX, read_toml
from megabatch.recipe_text import as_text
from megabatch.recipe_validation import validate
from megabatch.recipes import (
    akiba2017,
    best_accuracy,
    cifar10,
    fashion_mnist,
    fast,
    finetune,
    goyal2017,
    mikami2018,
    photos,
    yamazaki2019,
    ying2018,
    you2017,
)
from megabatch.recipes.mlperf import google, nvidia

RECIPES: dict[str, Callable[[], Recipe]] = {
    "fashion_mnist": fashion_mnist.fashion_mnist,
    "fashion_mnist_2048": fashion_mnist.fashion_mnist_2048,
    "cifar10": cifar10.cifar10,
    "cifar10_2000": cifar10.cifar10_2000,
    "photos": photos.photos,
    "finetune": finetune.finetune,
    "fast_16": fast.fast_16,
    "fast_32": fast.fast_32,
    "fast_88": fast.fast_88,
    "best_accuracy": best_accuracy.best_accuracy,
    "goyal2017_8k": goyal2017.goyal2017_8k,
    "you2017_alexnet_32k": you2017.you2017_alexnet_32k,
    "you2017_resnet50_32k": you2017.you2017_resnet50_32k,
    "akiba2017_32k": akiba2017.akiba2017_32k,
    "mikami2018_34k_68k": mikami2018.mikami2018_34k_68k,
    "mikami2018_54k": mikami2018.mikami2018_54k,
    "ying2018_32k": ying2018.ying2018_32k,
    "ying2018_65k": ying2018.ying2018_65k,
    "yamazaki2019_81k": yamazaki2019.yamazaki2019_81k,
    "mlperf_1632": nvidia.mlperf_1632,
    "mlperf_3264": nvidia.mlperf_3264,
    "mlperf_4096": google.mlperf_4096,
    "mlperf_8192": google.mlperf_8192,
    "mlperf_13056": nvidia.mlperf_13056,
    "mlperf_32768": google.mlperf_32768,
    "mlperf_49152": nvidia.mlperf_49152,
    "mlperf_58880": nvidia.mlperf_58880,
    "mlperf_65536": google.mlperf_65536,
    "mlperf_67840": nvidia.mlperf_67840,
}

MAX_PAIRS = 12


@dataclass(frozen=True)
class Summary:
    """The parts of a recipe's docstring."""

    title: str  # model, data and batch size
    source: str  # the paper or project that the recipe follows
    command: str
    published: str
    measured: str
    notes: str  # paragraphs between the results and the sources
    sources: str  # source and certainty of each number

    @property
    def measured_top1(self) -> float | None:
        """Measured top-1 in [0, 1], the first `top-1 0.xxx` of `measured`; None if not measured."""
        found = re.search(r"top-1 (0\.\d+)", self.measured)
        return float(found[1]) if found else None


def names() -> tuple[str, ...]:
    """Returns the names of all recipes: small and general ones, then papers by year, then MLPerf by batch size."""
    return tuple(RECIPES)


def get(name: str) -> Recipe:
    """Returns the recipe called `name`, or the one in the TOML file `name`, which ends in .toml; validated.

    Raises:
        RecipeError: no recipe has that name (the message suggests the nearest), or the file is not a valid recipe.
    """
    return read_toml(Path(name)) if name.endswith(SUFFIX) else validate(_function(name)())


def docstring(name: str) -> str:
    """Returns the recipe's docstring without indentation; "" for a file."""
    if name.endswith(SUFFIX):
        return ""
    return inspect.getdoc(_function(name)) or ""


def summary(name: str) -> Summary:
    """Returns the parts of a recipe's docstring.

    Raises:
        RecipeError: no recipe has that name.
    """
    text = docstring(name)
    title, _, source = text.partition("\n")[0].removesuffix(").").rpartition(" (")
    return Summary(
        title=title,
        source=source,
        command=_line(text, "Command"),
        published=_line(text, "Published"),
        measured=_line(text, "Measured"),
        notes=" ".join(_between(text, "Measured").split()),
        sources=text.partition("Sources:\n")[2],
    )


def value_text(value: object) -> str:
    """Returns a field's value as `--set` takes it; of more than `MAX_PAIRS` pairs, the first three and the last."""
    return as_text(value, max_items=MAX_PAIRS)


def _function(name: str) -> Callable[[], Recipe]:
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "`megabatch recipes` lists all names; fashion_mnist works"
        raise RecipeError(f"unknown recipe '{name}'; {hint}")
    return RECIPES[name]


def _between(text: str, label: str) -> str:
    """Returns the paragraphs between that of `label` and the sources."""
    return text.partition(f"\n{label}: ")[2].partition("\n\n")[2].partition("Sources:\n")[0]


def _line(text: str, label: str) -> str:
    """Returns the text after `label:`, with its continuation lines."""
    found = re.search(rf"^{label}: (.+(?:\n[ ]+\S.*)*)", text, flags=re.MULTILINE)
    return " ".join(found[1].split()) if found else ""
