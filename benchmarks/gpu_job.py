"""The process of one job of `gpu.py`: calls MODULE.FUNCTION(session, *words), and exits at once if the GPU is lost."""

import argparse
import importlib
import os
import sys
from pathlib import Path

LOST = 3
"""Exit code."""


def main() -> None:
    """Imports what the job needs, waits for its turn unless it is told to warm up first, runs it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--warm", action="store_true", help="the function itself waits for its turn")
    parser.add_argument("function")
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    module, function = options.function.split(".")
    job = getattr(importlib.import_module(module), function)
    import torch

    from gpu_session import LostError, Session

    torch.backends.cudnn.benchmark = True  # for torch's convolutions and ours alike
    session = Session(options.name, torch.device(options.device), options.quick, options.output)
    if not options.warm:
        session.wait_for_go()
    try:
        job(session, *options.words)
    except LostError:
        sys.stdout.flush()
        os._exit(LOST)  # at once: what torch does at an end would wait for the device


if __name__ == "__main__":
    main()
