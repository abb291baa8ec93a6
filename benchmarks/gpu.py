"""How fast one GPU trains ResNet-50 here, kernel by kernel and as whole steps, in under nine minutes.

    PYTHONPATH=src python benchmarks/gpu.py --output benchmarks/out [--section NAME ...] [--quick] [--device cpu|cuda]

Needs torch, Triton and, for the peer and for JPEGs, torchvision; no data. Whether gradients are right comes first, then
whole steps, then their parts; last what torch.compile takes minutes for. All results go to `gpu.json` as they come.

Cases that do not fit into the time left are skipped, each with a line of the table. One that fails costs no other: a
second process does the work, and where that loses the GPU or hangs, another goes on behind the section. This one keeps
the time and prints the table last. With `--quick` sizes are tiny, to see that everything runs; on a CPU that is all
there is.

Times are medians with quartiles. Kernels and optimizers are timed as replays of CUDA graphs, interleaved with what they
replace. `of copy` is bytes that must be moved, over time, as a share of what a plain copy of 1 GiB reaches.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_report import table

LIMIT_S = 500.0
GRACE_S = 25.0
"""What is under way at the limit may end; then the table is printed without it."""
USUAL_S = 60.0
WORKER = Path(__file__).with_name("gpu_worker.py")
BAD_OPTIONS = 2

SECTIONS: dict[str, tuple[float, str]] = {
    "environment": (USUAL_S, ""),
    "ceilings": (USUAL_S, ""),
    "gradients": (200.0, "compiles about 25 kernels and times them by shape: a minute or two"),
    "step": (300.0, "times kernels for each batch size"),
    "profile": (USUAL_S, ""),
    "choices": (USUAL_S, ""),
    "optimizers": (USUAL_S, "compiles 10 kernels"),
    "loss": (USUAL_S, ""),
    "batch_norm": (USUAL_S, ""),
    "stem": (USUAL_S, ""),
    "input": (USUAL_S, ""),
    "conv1x1": (150.0, "compiles 13 tilings of each convolution"),
    "compiled": (400.0, "torch.compile: about a minute a case"),
}
"""In the order in which they run: seconds after which one is given up as hanging, and why it may take long."""


@dataclass
class Watch:
    """What is known of the process that works."""

    process: subprocess.Popen[bytes]
    running: Path
    section: str = ""
    begun_s: float = 0.0

    def look(self, start_s: float) -> None:
        """Notes and says when another section has begun."""
        section = self.running.read_text() if self.running.exists() else ""
        if section != self.section:
            self.section, self.begun_s = section, time.monotonic()
            words = f"[{self.begun_s - start_s:4.0f} s] {section:<12} {SECTIONS[section][1]}"
            print(words.rstrip(), file=sys.stderr, flush=True)

    def hangs(self) -> bool:
        """Whether the section takes longer than it ever should."""
        return bool(self.section) and time.monotonic() - self.begun_s > SECTIONS[self.section][0]


def main() -> None:
    """Runs the sections asked for, writes `gpu.json` and `gpu.txt`, prints the table last."""
    start_s, options = time.monotonic(), _options()
    options.output.mkdir(parents=True, exist_ok=True)
    results = options.output / "gpu.json"
    results.write_text("[]")
    names = ["environment", *(options.section or [name for name in SECTIONS if name != "environment"])]
    while names:
        code, name, reason = _work(options, names, start_s)
        if code == BAD_OPTIONS:
            raise SystemExit(BAD_OPTIONS)
        if reason:
            _add(results, {"section": name or names[0], "case": "whole section", "error": reason})
        names = [] if code == 0 else names[names.index(name) + 1 if name in names else 1 :]
    text = table(json.loads(results.read_text()))
    (options.output / "gpu.txt").write_text(text + "\n")
    print(text, flush=True)


def _work(options: argparse.Namespace, names: list[str], start_s: float) -> tuple[int, str, str | None]:
    """Exit code of a process that runs these sections, 0 too if time is over; its last section; what went wrong."""
    end_s = start_s + options.limit
    running = options.output / "running"
    running.unlink(missing_ok=True)
    words = ["--output", str(options.output), "--device", options.device, "--limit", str(end_s - time.monotonic())]
    words += ["--quick"] if options.quick else []
    command = [sys.executable, str(WORKER), *words, *names]
    watch = Watch(subprocess.Popen(command), running)
    try:
        while (code := watch.process.poll()) is None:
            watch.look(start_s)
            if time.monotonic() > end_s + GRACE_S:
                return 0, watch.section, "the time was over"
            if watch.hangs():
                return 1, watch.section, "took too long and was given up; sections behind it went on"
            time.sleep(0.1)
    finally:
        watch.process.kill()
        watch.process.wait()
    watch.look(start_s)
    return code, watch.section, f"the process ended with code {code}" if code else None


def _add(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps([*json.loads(path.read_text()), result], indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for gpu.json and gpu.txt")
    parser.add_argument("--section", action="append", choices=tuple(SECTIONS)[1:], help="may be given several times")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether everything runs, not how fast")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds; cases that do not fit are skipped")
    return parser.parse_args()


if __name__ == "__main__":
    main()
