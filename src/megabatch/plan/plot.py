"""Plot of plans over the number of workers: time, efficiency and, with a price, cost."""

from collections.abc import Sequence
from pathlib import Path

from megabatch.errors import UserError
from megabatch.plan.predict import Prediction


def plot_plans(plans: Sequence[Prediction], price: float | None, path: Path, *, title: str) -> Path:
    """Plots `plans` to `path`, a .svg or .png file, and returns `path`."""
    if path.suffix.lower() not in {".svg", ".png"}:
        raise UserError(f"{path} was given, needed a file name that ends in .svg or .png; plan.svg works")
    from matplotlib.figure import Figure

    ordered = sorted(plans, key=lambda it: it.num_workers)
    panels = {"time (min)": [it.total_s / 60 for it in ordered], "efficiency": [it.step.efficiency for it in ordered]}
    if price is not None:
        panels["cost"] = [it.cost(price) for it in ordered]
    figure = Figure(figsize=(7.5, 0.6 + 2.1 * len(panels)), layout="constrained")
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (label, values) in zip(axes, panels.items(), strict=True):
        axis.plot([it.num_workers for it in ordered], values, marker="o")
        axis.set_ylabel(label)
        axis.set_xscale("log", base=2)
        axis.grid(color="0.9")
        if label != "efficiency":
            axis.set_yscale("log")
    axes[-1].set_xlabel("workers")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
