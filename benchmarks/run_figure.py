"""Draws learning rate and accuracy of a run against the epoch, from its events: the picture in the README.

megabatch train fashion_mnist_2048 --workers 2 --output runs/demo
python benchmarks/run_figure.py runs/demo docs/images/fashion_mnist.svg
"""

import argparse
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from megabatch.observe.events import read_events


def draw(run: Path, output: Path) -> None:
    """Writes the figure to `output`, an .svg or .png file."""
    events = read_events(run / "events.jsonl")
    steps = [event for event in events if event["event"] == "step"]
    evaluations = [event for event in events if event["event"] == "evaluation"]
    mpl.rcParams.update({"svg.hashsalt": "megabatch", "font.size": 9})  # equal runs give equal files
    figure = Figure(figsize=(7.2, 2.4), layout="constrained")
    rate, accuracy = figure.subplots(1, 2)
    rate.plot([event["epoch"] for event in steps], [event["lr"] for event in steps], color="tab:orange")
    rate.set_ylabel("learning rate")
    accuracy.plot([event["epoch"] for event in evaluations], [100 * event["top1"] for event in evaluations], marker="o")
    accuracy.set_ylabel("top-1, %")
    for panel in (rate, accuracy):
        panel.set_xlabel("epoch")
        panel.set_xlim(left=0)
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    figure.set_facecolor("white")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("output", type=Path, help="file to write, .svg or .png")
    options = parser.parse_args()
    draw(options.run, options.output)
