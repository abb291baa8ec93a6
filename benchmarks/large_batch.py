"""Accuracy at large batches with one tuning budget for every optimizer, on real Fashion-MNIST.

    python benchmarks/large_batch.py --output DIR [--method NAME ...] [--batch N ...] [--epochs E ...]
                                     [--trials 8] [--seeds 5] [--parallel 2] [--ablate] [--set NAME=VALUE ...]

For each method, batch size and number of epochs: `--trials` random draws of the same number of hyper-parameters, each
trained on 50,000 training images and judged on the other 10,000 (never on the test set); then the best draw is trained
on all 60,000 images with `--seeds` seeds and judged on the test set. Every run is one line of DIR/runs.jsonl; a run
that is there is not repeated, so the benchmark may be stopped and started again. `--ablate` also trains each method's
best draw with one of `ABLATIONS` changed, with the same seeds. `--set` changes recipe fields of every run, as
`--set stem=pooled eval_flip=true`. `--parallel` processes run at a time, with one thread each on a CPU. Prints
the table and writes DIR/summary.json and DIR/accuracy.png.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Settings = dict[str, str]
Range = tuple[float, float]  # of a logarithmic draw

COMMON: Settings = {"augmentation": "none", "zero_gamma": "false", "bn_span": "128", "eval_every_epochs": "1000"}
COMMON |= {"eval_stats": "precise"}  # after so few updates running averages still hold statistics of older weights
STATISTICS_IMAGES = 16_384
LINEAR: Settings = {"decay": "poly", "poly_power": "1"}
MUON: Settings = {"optimizer": "muon", "nesterov": "true", "normalize_weights": "true", "sgd_lr_factor": "4"}
METHODS: dict[str, tuple[Settings, dict[str, Range]]] = {
    "SGD, linear scaling": (
        LINEAR | {"optimizer": "sgd", "lr_scaling": "linear"},
        {"peak_lr": (0.01, 0.4), "weight_decay": (1e-5, 2e-3)},
    ),
    "LARS": (
        {"optimizer": "lars", "trust_coefficient": "0.02"},
        {"peak_lr": (0.3, 6.0), "weight_decay": (1e-5, 2e-3)},
    ),
    "LAMB": (LINEAR | {"optimizer": "lamb"}, {"peak_lr": (3e-3, 0.1), "weight_decay": (1e-4, 0.1)}),
    "RMSprop warm-up": (
        LINEAR | {"optimizer": "rmsprop_warmup", "warmup": "none", "lr_scaling": "linear"},
        {"peak_lr": (0.01, 0.4), "rmsprop_lr": (3e-4, 1e-2)},
    ),
    "LARS, batch-size control": (
        {"optimizer": "lars", "trust_coefficient": "0.02", "batch_size_rule": "fixed"},
        {"peak_lr": (0.3, 6.0), "weight_decay": (1e-5, 2e-3)},
    ),
    "Muon": (LINEAR | MUON, {"peak_lr": (0.03, 0.4), "weight_decay": (1e-5, 2e-3)}),
    "Shampoo": (
        LINEAR | {"optimizer": "shampoo", "graft": "lars", "trust_coefficient": "0.02"},
        {"peak_lr": (0.3, 6.0), "weight_decay": (1e-5, 2e-3)},
    ),
}
SHARED: dict[str, Range] = {"warmup_share": (0.05, 0.3), "label_smoothing": (0.01, 0.2)}
"""Drawn for every method besides its own two, so that each tunes four numbers."""

ABLATIONS: dict[str, Settings] = {
    "no warm-up": {"warmup": "none", "warmup_epochs": "0"},
    "no label smoothing": {"label_smoothing": "0"},
    "decay of norms and biases": {"decay_norm_and_bias": "true"},
    "zero gamma": {"zero_gamma": "true"},
    "spans of 16": {"bn_span": "16"},
    "spans of 1,024": {"bn_span": "1024"},
    "span of the whole batch": {"bn_span": "BATCH"},
    "running averages of statistics": {"eval_stats": "running_all_reduced"},
    "statistics of the last batch": {"eval_stats": "last_batch"},
}

HELD_OUT = 10_000


def draw(method: str, batch: int, epochs: float, trial: int) -> Settings:
    """Settings of one trial: a function of its arguments alone."""
    fixed, ranges = METHODS[method]
    generator = random.Random(f"{method} {batch} {epochs} {trial}")
    drawn = {
        name: math.exp(generator.uniform(math.log(low), math.log(high)))
        for name, (low, high) in (ranges | SHARED).items()
    }
    warmup = drawn.pop("warmup_share") * epochs
    settings = COMMON | fixed | {name: f"{value:.4g}" for name, value in drawn.items()}
    settings |= {"global_batch_size": str(batch), "total_epochs": f"{epochs:g}"}
    settings["precise_batches"] = str(max(1, STATISTICS_IMAGES // batch))
    if settings.get("warmup") != "none":
        settings["warmup_epochs"] = f"{warmup:.4g}"
    if method == "LARS, batch-size control":  # half the batch in the first third, twice the batch at the end
        sizes = {0.0: batch // 2, epochs / 3: batch, 2 * epochs / 3: 2 * batch}
        settings["batch_sizes"] = ",".join(f"{at:.4g}:{size}" for at, size in sizes.items())
    return settings


def train(settings: Mapping[str, str], *, held_out: bool) -> dict[str, Any]:
    """Trains once in this process; returns top-1, updates and seconds."""
    import torch

    from megabatch import recipes
    from megabatch.app.data import Data, fit_to_data, open_data
    from megabatch.app.run import open_run
    from megabatch.comm.launch import join
    from megabatch.recipe import override
    from megabatch.runtime import Runtime
    from megabatch.train.loop import train as run_loop

    recipe, runtime = override(recipes.get("fashion_mnist"), settings), Runtime()
    data = open_data(recipe, runtime)
    if held_out:
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
        parts = [_subset(data.train, order[HELD_OUT:]), _subset(data.train, order[:HELD_OUT])]
        data = Data(*parts, f"{data.origin}, {HELD_OUT:,} training images held out")
    with (
        join(device="auto", threads=1) as world,
        tempfile.TemporaryDirectory() as folder,
        open_run(
            fit_to_data(recipe, data),
            runtime,
            data,
            world=world,
            folder=Path(folder) / "run",
            stop_requested=lambda: False,
            quiet=True,
        ) as run,
    ):
        started = time.perf_counter()
        result = run_loop(run)
        seconds = time.perf_counter() - started
        updates = run.state.step
    return {"top1": result.top1 if result else None, "updates": updates, "seconds": seconds}


def _subset(source: Any, indices: Any) -> Any:
    from megabatch.data.sources.arrays import ArraySource

    return ArraySource(source.images[indices], source.labels[indices], source.class_names)


class Runs:
    """Finished runs by their settings, kept in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.done = {self.key(row["settings"], row["held_out"]): row for row in map(json.loads, lines)}

    @staticmethod
    def key(settings: Mapping[str, str], held_out: bool) -> str:
        return json.dumps([sorted(settings.items()), held_out])

    def get(self, settings: Mapping[str, str], *, held_out: bool) -> dict[str, Any]:
        """A run's row; trains it in a process of its own if it is missing. A run that diverges has top-1 0."""
        key = self.key(settings, held_out)
        if key not in self.done:
            request = json.dumps({"settings": settings, "held_out": held_out})
            command = [sys.executable, __file__, "--run", request]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            row: dict[str, Any] = {"settings": dict(settings), "held_out": held_out}
            row |= json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else _failed(done.stderr)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.done[key] = row
            print(f"top-1 {row['top1']:.4f} {_brief(settings)}", file=sys.stderr, flush=True)
        return self.done[key]


def _failed(stderr: str) -> dict[str, Any]:
    """A run that ended with an error: only divergence counts as a result."""
    last = stderr.strip().splitlines()[-1] if stderr.strip() else "no output"
    if "DivergedError" not in stderr:
        raise RuntimeError(f"a run failed: {last}")
    return {"top1": 0.0, "updates": 0, "seconds": 0.0, "error": last}


def _brief(settings: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items() if name not in COMMON)


def study(
    runs: Runs, method: str, batch: int, epochs: float, *, trials: int, seeds: int, parallel: int, changed: Settings
) -> dict[str, Any]:
    """Tunes one method, then trains its best draw with every seed; returns a row of the table."""
    draws = (draw(method, batch, epochs, trial) | changed for trial in range(trials))
    tried = _all_of(runs, draws, parallel, held_out=True)
    best = max(tried, key=lambda row: row["top1"])["settings"]
    return {
        "method": ", ".join([method, *(f"{name}={value}" for name, value in changed.items())]),
        "batch": batch,
        "epochs": epochs,
        "trials": trials,
        **_over_seeds(runs, best, seeds, parallel),
        "held_out": sorted((row["top1"] for row in tried), reverse=True),
    }


def ablate(runs: Runs, row: Mapping[str, Any], *, seeds: int, parallel: int) -> list[dict[str, Any]]:
    """Trains the settings of `row`, from `study`, with each change of `ABLATIONS`; returns rows of the table."""
    facts = {key: row[key] for key in ("batch", "epochs", "trials")}
    rows = []
    for name, changes in ABLATIONS.items():
        settings = row["settings"] | changes
        if settings["bn_span"] == "BATCH":
            settings["bn_span"] = str(row["batch"])
        results = _over_seeds(runs, settings, seeds, parallel)
        rows.append({"method": f"{row['method']}, {name}", **facts, **results})
    return rows


def _over_seeds(runs: Runs, settings: Settings, seeds: int, parallel: int) -> dict[str, Any]:
    """Accuracy on the test set after training on all training images, with seeds 0 to `seeds` - 1."""
    final = _all_of(runs, (settings | {"seed": str(seed)} for seed in range(seeds)), parallel, held_out=False)
    top1 = [row["top1"] for row in final]
    return {
        "updates": max(row["updates"] for row in final),
        "top1": top1,
        "mean": statistics.mean(top1),
        "deviation": statistics.stdev(top1) if len(top1) > 1 else 0.0,
        "settings": settings,
    }


def _all_of(runs: Runs, requests: Iterable[Settings], parallel: int, *, held_out: bool) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(lambda settings: runs.get(settings, held_out=held_out), requests))


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: one line per method, batch and number of epochs."""
    lines = ["| method | batch | epochs | updates | top-1, mean ± deviation | lowest | highest | seeds | trials |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        accuracy = f"{row['mean']:.4f} ± {row['deviation']:.4f} | {min(row['top1']):.4f} | {max(row['top1']):.4f}"
        sizes = f"{row['batch']:,} | {row['epochs']:g} | {row['updates']:,}"
        lines.append(f"| {row['method']} | {sizes} | {accuracy} | {len(row['top1'])} | {row['trials']} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against batch size, one line per method, one panel per number of epochs."""
    from matplotlib.figure import Figure

    epochs = sorted({row["epochs"] for row in rows})
    figure = Figure(figsize=(6.0 * len(epochs), 4.0), layout="constrained")
    for number, count in enumerate(epochs, start=1):
        axes = figure.add_subplot(1, len(epochs), number, title=f"Fashion-MNIST, {count:g} epochs")
        for method in dict.fromkeys(row["method"] for row in rows):
            points = sorted(
                (r["batch"], r["mean"], r["deviation"]) for r in rows if (r["method"], r["epochs"]) == (method, count)
            )
            if points:
                batches, means, deviations = zip(*points, strict=True)
                axes.errorbar(batches, means, deviations, label=method, marker="o", capsize=3)
        axes.set(xscale="log", xlabel="global batch size, images", ylabel="top-1 on the test set")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Runs what is missing, prints the table, writes summary and plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--method", nargs="*", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--batch", nargs="*", type=int, default=[256, 1024, 4096, 8192, 16384])
    parser.add_argument("--epochs", nargs="*", type=float, default=[10.0, 32.0])
    parser.add_argument("--trials", type=int, default=8, help="random draws of each method")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("--ablate", action="store_true", help="also train the best draws with one setting changed")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="recipe fields of every run")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one run, in this process
    options = parser.parse_args()
    if options.run:
        request = json.loads(options.run)
        print(json.dumps(train(request["settings"], held_out=request["held_out"])))
        return
    if options.output is None:
        parser.error("--output is needed: the folder for runs.jsonl, summary.json and accuracy.png")
    options.output.mkdir(parents=True, exist_ok=True)
    runs, rows, ablations = Runs(options.output / "runs.jsonl"), [], []
    again = {"seeds": options.seeds, "parallel": options.parallel}
    changed = dict(text.split("=", 1) for text in options.set)
    for epochs in options.epochs:
        for batch in options.batch:
            for method in options.method:
                rows.append(study(runs, method, batch, epochs, trials=options.trials, changed=changed, **again))
                ablations += ablate(runs, rows[-1], **again) if options.ablate else []
                print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table([*rows, *ablations]))
    (options.output / "summary.json").write_text(json.dumps([*rows, *ablations], indent=1) + "\n")
    plot(rows, options.output / "accuracy.png")


if __name__ == "__main__":
    main()
