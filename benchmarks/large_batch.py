"""What large batches do to accuracy, and what each method gives back: real Fashion-MNIST, equal epochs, several seeds.

    python benchmarks/large_batch.py --output DIR [--seeds 3] [--epochs 10] [--only NAME ...]

Each run is `megabatch train fashion_mnist` with settings; a finished run is kept and not repeated, so the benchmark may
be stopped and started again. Prints one row per method: mean and standard deviation of the final top-1 over the seeds.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

COMMON = {"augmentation": "none", "label_smoothing": "0", "zero_gamma": "false", "bn_span": "64"}
SGD = {"optimizer": "sgd", "momentum": "0.9", "weight_decay": "5e-4", "decay": "poly", "poly_power": "1"}
METHODS: dict[str, dict[str, str]] = {
    "SGD, batch 256": SGD | {"global_batch_size": "256", "peak_lr": "0.1", "warmup_epochs": "0.5"},
    "SGD, linear scaling, batch 8,192": SGD
    | {"global_batch_size": "8192", "peak_lr": "0.1", "lr_scaling": "linear", "warmup_epochs": "2"},
    "LARS with warm-up, batch 8,192": {
        "optimizer": "lars",
        "global_batch_size": "8192",
        "peak_lr": "3",
        "trust_coefficient": "0.005",
        "weight_decay": "5e-4",
        "warmup_epochs": "2",
        "poly_power": "2",
    },
    "RMSprop warm-up, batch 8,192": {
        "optimizer": "rmsprop_warmup",
        "global_batch_size": "8192",
        "peak_lr": "1.6",
        "weight_decay": "1e-4",
        "warmup": "none",
        "decay": "poly",
        "poly_power": "1",
        "rmsprop_lr": "3e-3",
        "rmsprop_center_epoch": "1.5",
        "rmsprop_period_epochs": "1",
    },
    "LARS, batch-size control 2,048 to 16,384": {
        "optimizer": "lars",
        "global_batch_size": "2048",
        "batch_sizes": "0:2048,3:4096,5:8192,7:16384",
        "peak_lr": "1.6",
        "trust_coefficient": "0.02",
        "weight_decay": "5e-4",
        "warmup_epochs": "1",
        "poly_power": "2",
    },
}


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def run(folder: Path, settings: dict[str, str]) -> float:
    """Top-1 of one run; read from its folder if it has ended before."""
    events = folder / "events.jsonl"
    if not (events.exists() and '"run_end"' in events.read_text()):
        command = [sys.executable, "-m", "megabatch", "train", "fashion_mnist", "--workers", "2", "--quiet"]
        command += ["--output", str(folder)] + (["--resume"] if events.exists() else [])
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    ends = [json.loads(line) for line in events.read_text().splitlines() if '"run_end"' in line]
    return float(ends[-1]["top1"])


def with_recomputed_statistics(folder: Path) -> float:
    """Top-1 of a run's last weights, batch-norm statistics taken anew over 16,384 training images (eval_stats=precise).

    A run of 73 steps ends before running averages have caught up with its weights.
    """
    import torch

    from megabatch import nn as models
    from megabatch.app.data import build_eval_loader, build_train_loader, eval_block_size, open_data
    from megabatch.app.run import load_for_evaluation
    from megabatch.comm.launch import World
    from megabatch.recipe import from_json
    from megabatch.runtime import Runtime
    from megabatch.train.checkpoint import list_checkpoints, load_state
    from megabatch.train.evaluate import evaluate
    from megabatch.train.precision import Precision

    info = list_checkpoints(folder / "checkpoints")[-1]
    recipe, runtime, world = from_json(info.recipe), Runtime(), World()
    data = open_data(recipe, runtime)
    module = load_for_evaluation(recipe, runtime, load_state(info), world=world)
    loader = build_train_loader(recipe, runtime, data.train, world=world)
    models.begin_precise(module)
    with torch.no_grad():
        for batch in loader.batches((range(first, first + 512), 28) for first in range(0, 16_384, 512)):
            module(batch.images)
    models.finish_precise(module)
    loader.close()
    precision = Precision("fp32", world.device)
    eval_loader = build_eval_loader(recipe, runtime, data.evaluation, world=world)
    return evaluate(module, eval_loader, world=world, precision=precision, block_size=eval_block_size(recipe)).top1


def main() -> None:
    """Runs every method with every seed and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--only", nargs="*", default=list(METHODS))
    options = parser.parse_args()
    rows = []
    for name in options.only:
        top1, recomputed = [], []
        for seed in range(options.seeds):
            ordered = {"total_epochs": f"{options.epochs:g}"} | COMMON | METHODS[name] | {"seed": str(seed)}
            folder = options.output / f"{''.join(c if c.isalnum() else '_' for c in name)}_{seed}"
            top1.append(run(folder, ordered))
            recomputed.append(with_recomputed_statistics(folder))
            print(f"{name}, seed {seed}: top1 {top1[-1]:.4f}, recomputed {recomputed[-1]:.4f}", flush=True)
        rows.append({"method": name, "running_averages": top1, "recomputed": recomputed})
    print("\n| method | top-1 with running averages | with recomputed statistics | seeds |\n|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['method']} | {spread(row['running_averages'])} | {spread(row['recomputed'])} | {options.seeds} |"
        )
    settings = {name: COMMON | METHODS[name] for name in options.only}
    summary = {"epochs": options.epochs, "rows": rows, "settings": settings}
    (options.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
