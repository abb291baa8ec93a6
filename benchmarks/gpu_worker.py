"""The process that `gpu.py` starts: runs sections one after another, and ends where the GPU is lost to it."""

import argparse
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

import gpu_kernels
import gpu_steps
from gpu_session import LostError, Session, guarded, put
from megabatch.kernels.dispatch import has_triton
from megabatch.kernels.tuning import Table, use_table
from megabatch.observe.environment import describe

LOST = 3
"""Exit code."""

SECTIONS: dict[str, Callable[[Session], None]] = {
    "environment": lambda session: session.add(
        "environment",
        "machine",
        triton=version("triton") if has_triton() else None,
        machine=platform.machine(),
        **describe(),
    ),
    "ceilings": gpu_kernels.ceilings,
    "gradients": gpu_steps.gradients,
    "step": gpu_steps.step_speed,
    "profile": gpu_steps.profile,
    "choices": gpu_steps.choices,
    "optimizers": gpu_kernels.optimizers,
    "loss": gpu_kernels.loss,
    "batch_norm": gpu_kernels.batch_norm,
    "stem": gpu_kernels.stem,
    "input": gpu_kernels.input_images,
    "conv1x1": gpu_kernels.convolutions,
    "compiled": gpu_steps.compiled_step_speed,
}


def main() -> None:
    """Runs the sections it is told to; the name of the one under way is in the file `running`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("sections", nargs="+", choices=tuple(SECTIONS))
    options = parser.parse_args()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    if device == "cpu" and not options.quick:
        parser.error("a CPU runs with --quick alone: the sizes are those of a GPU")
    torch.backends.cudnn.benchmark = True  # for torch's convolutions and ours alike
    session = Session(torch.device(device), options.quick, options.output, options.limit)
    session.load()
    use_table(Table(gpu_steps.tables(session)))
    for name in options.sections:
        _run(session, name)


def _run(session: Session, name: str) -> None:
    put(session.output / "running", name)
    if session.remaining_s() <= 0:
        session.add(name, "whole section", skipped="no time left")
        return
    try:
        guarded(session, name, "whole section", lambda: SECTIONS[name](session))
    except LostError:
        sys.stdout.flush()
        os._exit(LOST)  # at once: what torch does at an end would wait for the device


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(16, os.cpu_count() or 1)))
    main()
