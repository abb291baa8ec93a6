"""What the sections of `gpu.py` share: device, time limit, timing by graph replay, and the list of results."""

import functools
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabatch.bench.timing import Timing, Work, compare
from megabatch.train.cuda_graph import CudaRecorder

MILLI = 1e-3
QUEUED = 3
"""Timed replays of a graph behind one that is not."""


class LostError(Exception):
    """The GPU answers this process no more: an illegal access stays with it to its end."""


@dataclass
class Session:
    """One run. Results are kept as JSON values and written after each, so that nothing is lost if a later one fails."""

    device: torch.device
    quick: bool
    output: Path
    limit_s: float
    start_s: float = field(default_factory=time.monotonic)
    results: list[dict[str, Any]] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)

    @property
    def is_cuda(self) -> bool:
        """Whether graphs, events and the kernels are there."""
        return self.device.type == "cuda"

    def remaining_s(self) -> float:
        """Seconds left."""
        return self.limit_s - (time.monotonic() - self.start_s)

    def has_time_for(self, section: str, case: str, seconds: float) -> bool:
        """Whether that many seconds are left; a case that is left out is a result too."""
        if self.remaining_s() >= seconds:
            return True
        self.add(section, case, skipped=f"{seconds:.0f} s needed, {self.remaining_s():.0f} s left")
        return False

    def add(self, section: str, case: str, timing: Timing | None = None, **facts: Any) -> None:
        """Keeps one result and writes all."""
        values: dict[str, Any] = {"section": section, "case": case, **facts}
        if timing is not None:
            first, third = timing.quartiles_s
            values |= {"median_ms": timing.median_s / MILLI, "quartiles_ms": [first / MILLI, third / MILLI]}
        self.results.append(values)
        self.write()

    def load(self) -> None:
        """Takes over what an earlier process found."""
        path = self.output / "gpu.json"
        self.results = json.loads(path.read_text()) if path.exists() else []
        names = {"bytes_per_s": "copy_bytes_per_s", "flop_per_s": "flop_per_s"}
        for result in self.results:
            if result["section"] == "ceilings":
                self.ceilings |= {names[name]: result[name] for name in names if name in result}

    def write(self) -> None:
        """All results so far as one JSON file."""
        self.output.mkdir(parents=True, exist_ok=True)
        put(self.output / "gpu.json", json.dumps(self.results, indent=1) + "\n")

    def time(self, section: str, case: str, works: Mapping[str, Work], *, replays: int = 1) -> dict[str, Timing]:
        """Each work timed, interleaved; on a GPU as replays of a CUDA graph, so that launches cost nothing.

        A work that fails becomes a result, and the others are timed.
        """
        ready: dict[str, Work] = {}

        def prepare(name: str) -> None:
            if self.is_cuda:
                ready[name] = graph_of(works[name], replays)
            else:
                works[name]()
                ready[name] = works[name]

        for name in works:
            guarded(self, section, f"{case}, {name}" if case else name, functools.partial(prepare, name))
        repeats = 3 if self.quick else 20
        timings = compare(ready, warmup=2 if self.quick else 3, repeats=repeats, queued=QUEUED if self.is_cuda else 0)
        scale = replays if self.is_cuda else 1
        return {name: Timing(tuple(s / scale for s in timing.seconds)) for name, timing in timings.items()}

    def bandwidth(self, num_bytes: float, timing: Timing) -> dict[str, float]:
        """Bytes that must be moved, at what rate that was, and which share of a plain copy's rate."""
        rate = num_bytes / timing.median_s
        facts = {"bytes": num_bytes, "bytes_per_s": rate}
        if "copy_bytes_per_s" in self.ceilings:
            facts["of_copy_rate"] = rate / self.ceilings["copy_bytes_per_s"]
        return facts

    def images(self, count: int, channels: int, pixels: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
        """Random images with the channels last."""
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.randn(count, pixels, pixels, channels, generator=generator, device=self.device)
        return values.to(dtype).permute(0, 3, 1, 2)


def graph_of(work: Work, replays: int = 1) -> Work:
    """A replay of `replays` runs of `work` in one CUDA graph; three runs outside come first."""
    recorder = CudaRecorder()
    for _ in range(3):
        recorder.run(work)
    return recorder.record(lambda: [work() for _ in range(replays)])[1]


def free() -> None:
    """Gives memory of what came before back."""
    gc.collect()
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def put(path: Path, text: str) -> None:
    """Writes a file at once: who watches this process, or ends it, finds a whole one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def guarded(session: Session, section: str, case: str, run: Callable[[], None]) -> None:
    """Runs one case; a failure becomes its result, and the next case runs, unless the GPU is lost to this process.

    Raises:
        LostError: it is; the result is noted.
    """
    try:
        run()
    except LostError:
        raise
    except Exception as error:  # whatever one case meets, the others are still worth their time
        session.add(section, case, error=f"{type(error).__name__}: {error}"[:500])
        if session.is_cuda and not _answers():
            raise LostError from error
    free()


def _answers() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
