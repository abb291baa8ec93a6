"""The page `docs/recipes.md`, made from the recipes themselves: `megabatch recipes --markdown > docs/recipes.md`."""

import dataclasses

from megabatch import recipes
from megabatch.recipe import Recipe

HEAD = """# Recipes

<!-- Made by `megabatch recipes --markdown`; edit the recipes' docstrings, not this page. -->

A recipe says what is trained, never where: it runs on two CPU cores by accumulation as on thousands of GPUs, and a
field is changed with `--set key=value`. `megabatch recipes NAME` shows its schedule epoch by epoch.

How certain a number is stands beside it: **read** in a public source, **recalled** from memory of the source and not
checked, **derived** by arithmetic, **chosen** here; **departs** says where a recipe differs from its source on purpose.
Top-1 is a share of the evaluation images. "Measured" is what this project measured; most recipes need a cluster and
have not been run to the end.
"""


def as_markdown() -> str:
    """The whole page."""
    return "\n".join([HEAD, _table(), *(_section(name) for name in recipes.names())])


def _table() -> str:
    lines = [
        "| recipe | after | model | global batch | epochs | published top-1 | measured top-1 |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for name in recipes.names():
        recipe, told = recipes.get(name), recipes.summary(name)
        cells = (
            f"[`{name}`](#{name})",
            told.source,
            recipe.model,
            f"{recipe.global_batch_size:,}",
            f"{recipe.total_epochs:g}",
            _top1(recipe.published_top1),
            _top1(told.measured_top1),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _top1(value: float | None) -> str:
    return f"{value:.4f}" if value is not None else "–"


def _section(name: str) -> str:
    """One recipe: what it is, what is known of it, where the numbers are from, and the fields it sets."""
    told = recipes.summary(name)
    parts = [f"## {name}\n", f"{told.title}. {_sentence(told.source)}\n", f"    {told.command}\n"]
    parts.append(f"Published: {told.published}.  \nMeasured: {told.measured}.\n")
    parts += [told.notes + "\n"] if told.notes else []
    parts.append(_sources(told.sources))
    parts.append(_fields(recipes.get(name)))
    return "\n".join(parts)


def _sentence(source: str) -> str:
    return f"{source[0].upper()}{source[1:]}."


def _sources(text: str) -> str:
    """The docstring's list of sources, one item per entry."""
    items: list[str] = []
    for line in text.splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            kind, colon, rest = line.strip().partition(":")
            items.append(f"- **{kind}**{colon}{rest}")
        else:
            items[-1] += f" {line.strip()}"
    return "\n".join(items) + "\n"


def _fields(recipe: Recipe) -> str:
    """Fields that are not at their default, as `--set` would write them."""
    values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe)}
    shown = [
        f"{field.name}={recipes.value_text(values[field.name])}"
        for field in dataclasses.fields(Recipe)
        if values[field.name] != field.default and field.name != "name"
    ]
    return "```\n" + "\n".join(shown) + "\n```\n"
