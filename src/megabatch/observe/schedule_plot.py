"""Plots a recipe's schedule against the epoch: one panel per value that changes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megabatch.errors import UserError

PANELS = {
    "lr": "learning rate",
    "momentum": "momentum",
    "global_batch_size": "global batch",
    "resolution": "resolution (pixels)",
    "weight_decay": "weight decay",
    "sgd_share": "share of SGD",
}
STEPPED = {"global_batch_size", "resolution"}
SUFFIXES = {".svg", ".png"}


def plot_schedule(rows: Sequence[Mapping[str, float]], path: Path, *, title: str) -> Path:
    """Plots the columns of `rows` that change, and always the learning rate, to `path`, and returns `path`.

    Each row has an `epoch`.

    Raises:
        UserError: `path` ends in neither .svg nor .png.
    """
    require_drawable(path)
    from matplotlib.figure import Figure

    keys = [key for key in PANELS if key == "lr" or len({row[key] for row in rows if key in row}) > 1]
    figure = Figure(figsize=(7.5, 0.6 + 2.1 * len(keys)), layout="constrained")
    figure.suptitle(title, parse_math=False)
    panels = figure.subplots(len(keys), 1, sharex=True, squeeze=False)[:, 0]
    epochs = [row["epoch"] for row in rows]
    for panel, key in zip(panels, keys, strict=True):
        panel.plot(epochs, [row[key] for row in rows], drawstyle="steps-post" if key in STEPPED else "default")
        panel.set_ylabel(PANELS[key])
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}" if value < 1e6 else f"{value:,.0f}")
    panels[-1].set_xlabel("epoch")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def require_drawable(path: Path) -> None:
    """Checks the suffix of `path`.

    Raises:
        UserError: `path` ends in neither .svg nor .png.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} was given, needed a file name that ends in .svg or .png; schedule.svg works")
