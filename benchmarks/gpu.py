"""How fast one GPU trains ResNet-50 here, kernel by kernel and as whole steps, in under nine minutes.

    PYTHONPATH=src python benchmarks/gpu.py --output benchmarks/out [--section NAME ...] [--quick] [--device cpu|cuda]

Needs torch, Triton and, for the peer and for JPEGs, torchvision; no data. Every section and every case runs by itself:
one that fails or finds no time left becomes a line of the table. All results go to `gpu.json` as they come. With
`--quick` sizes are tiny, to see that everything runs; on a CPU that is all there is.

Times are medians with quartiles. Kernels and optimizers are timed as replays of CUDA graphs, interleaved with what they
replace. `of copy` is bytes that must be moved, over time, as a share of what a plain copy of 1 GiB reaches.
"""

import argparse
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gpu_kernels
import gpu_steps
from gpu_session import Session, guarded
from megabatch.kernels import has_triton
from megabatch.kernels.tuning import Table, use_table
from megabatch.observe.environment import describe

LIMIT_S = 520.0

SECTIONS: dict[str, Callable[[Session], None]] = {
    "ceilings": gpu_kernels.ceilings,
    "optimizers": gpu_kernels.optimizers,
    "loss": gpu_kernels.loss,
    "batch_norm": gpu_kernels.batch_norm,
    "stem": gpu_kernels.stem,
    "gradients": gpu_steps.gradients,
    "input": gpu_kernels.input_images,
    "conv1x1": gpu_kernels.convolutions,
    "profile": gpu_steps.profile,
    "step": gpu_steps.step_speed,
    "choices": gpu_steps.choices,
}
"""In the order in which they run; whole steps near the end, as they take what time is left."""


def main() -> None:
    """Runs the sections asked for, writes `gpu.json` and `gpu.txt`, prints the table last."""
    options = _options()
    torch.backends.cudnn.benchmark = True  # for torch's convolutions and ours alike
    session = Session(torch.device(options.device), options.quick, options.output, options.limit)
    use_table(Table(gpu_steps.tables(session)))
    session.add("environment", "machine", triton=_triton_version(), machine=platform.machine(), **describe())
    for name in options.section or SECTIONS:
        guarded(session, name, "whole section", lambda name=name: SECTIONS[name](session))
    table = "\n".join([*map(line, session.results), "", *gpu_steps.fastest(session)])
    (options.output / "gpu.txt").write_text(table + "\n")
    print(table, flush=True)


def line(result: dict[str, Any]) -> str:
    """One result as a line of the table."""
    start = f"{result['section']:<11} {result['case']:<62}"
    for problem in ("error", "skipped"):
        if problem in result:
            return f"{start} {problem}: {result[problem]}"[:180]
    parts = [f"{result['way']}"] if "way" in result else []
    if "bytes_per_image" in result:
        parts.append(f"{result['bytes_per_image'] / 1e6:.1f} MB an image")
    if "total_ms" in result:
        parts.append(f"{result['total_ms']:9.3f} ms in {result['calls']} calls")
    if "median_ms" in result:
        first, third = result["quartiles_ms"]
        parts.append(f"{result['median_ms']:9.3f} ms ({first:.3f} .. {third:.3f})")
    if "images_per_s" in result:
        parts.append(f"{result['images_per_s']:,.0f} images/s")
    for name, words in (
        ("of_copy_rate", "of copy"),
        ("of_product_rate", "of a product"),
        ("of_fused_floor", "of the fused floor"),
        ("share", "of the step"),
    ):
        if name in result:
            parts.append(f"{100 * result[name]:.1f} % {words}")
    if "of_all" in result:
        parts.append(f"relative error {result['of_all']:.2e}, median tensor {result['median']:.2e}")
    return f"{start} {'  '.join(parts)}"


def _triton_version() -> str | None:
    if not has_triton():
        return None
    from importlib.metadata import version

    return version("triton")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for gpu.json and gpu.txt")
    parser.add_argument("--section", action="append", choices=tuple(SECTIONS), help="may be given several times")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether everything runs, not how fast")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds; cases that do not fit are skipped")
    options = parser.parse_args()
    if options.device == "cpu" and not options.quick:
        parser.error("a CPU runs with --quick alone: the sizes are those of a GPU")
    return options


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(16, os.cpu_count() or 1)))
    main()
