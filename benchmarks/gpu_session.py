"""What the jobs of `gpu.py` share: device, results, timing by graph replay, and cases that fail alone."""

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_schedule import read_lines
from megabatch.bench.timing import Timing, Work, compare
from megabatch.train.cuda_graph import CudaRecorder

MILLI = 1e-3
QUEUED = 3
"""Timed replays of a graph behind one that is not."""


class LostError(Exception):
    """The GPU no longer answers this process: an illegal access stays with it to its end."""


@dataclass
class Session:
    """One job: `name`.jsonl in `output` receives each result at once."""

    name: str
    device: torch.device
    quick: bool
    output: Path
    begun: set[str] = field(default_factory=set)
    ceilings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Reads the cases that an earlier process of this job began, and the ceilings."""
        self.begun = {result["case"] for result in read_lines(self._path(".jsonl")) if result.get("begun")}
        for result in read_lines(self.output / "ceilings.jsonl"):
            self.ceilings |= {key: result[key] for key in ("copy_bytes_per_s", "flop_per_s") if key in result}

    @property
    def is_cuda(self) -> bool:
        """True where graphs, events and kernels can run."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The 16-bit type of measurements by shape."""
        return torch.float16 if self.is_cuda else torch.bfloat16

    def add(self, case: str, timing: Timing | None = None, **facts: Any) -> None:
        """Appends one result."""
        values: dict[str, Any] = {"job": self.name, "case": case, **facts}
        if timing is not None:
            first, third = timing.quartiles_s
            values |= {"median_ms": timing.median_s / MILLI, "quartiles_ms": [first / MILLI, third / MILLI]}
        with self._path(".jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    def guarded(self, case: str, run: Callable[[], object]) -> None:
        """Runs one case unless it was begun before; an error becomes its result.

        Raises:
            LostError: the GPU no longer answers this process.
        """
        if case in self.begun:
            return
        self.begun.add(case)
        self.add(case, begun=True)
        try:
            run()
        except LostError:
            raise
        except Exception as error:  # the other cases are still worth their time
            self.add(case, error=f"{type(error).__name__}: {error}"[:500])
            if self.is_cuda and not _answers():
                raise LostError from error
        free()

    def time(self, works: Mapping[str, Work], *, replays: int = 1) -> dict[str, Timing]:
        """Times works, interleaved; on a GPU as replays of a CUDA graph, without the cost of launches from Python.

        A work that fails becomes a result, and the others are timed.
        """
        ready: dict[str, Work] = {}
        for name, work in works.items():
            try:
                if self.is_cuda:
                    ready[name] = graph_of(work, replays)
                else:
                    work()
                    ready[name] = work
            except Exception as error:  # e.g. a tiling that needs more shared memory than there is
                self.add(name, error=f"{type(error).__name__}: {error}"[:500])
                if self.is_cuda and not _answers():
                    raise LostError from error
        repeats = 1 if self.quick else 20
        timings = compare(ready, warmup=0 if self.quick else 3, repeats=repeats, queued=QUEUED if self.is_cuda else 0)
        scale = replays if self.is_cuda else 1
        return {name: Timing(tuple(s / scale for s in timing.seconds)) for name, timing in timings.items()}

    def bandwidth(self, num_bytes: float, timing: Timing) -> dict[str, float]:
        """Bytes that must be moved, their rate, and its share of a plain copy's rate."""
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

    def wait_for_go(self) -> None:
        """Says that the job is ready and waits for its turn; ends the process if its parent is gone."""
        parent = os.getppid()
        self._path(".ready").touch()
        while not self._path(".go").exists():
            if os.getppid() != parent:
                os._exit(1)
            time.sleep(0.02)

    def _path(self, ending: str) -> Path:
        return self.output / (self.name + ending)


def graph_of(work: Work, replays: int = 1) -> Work:
    """A replay of `replays` runs of `work` in one CUDA graph; three runs outside come first."""
    recorder = CudaRecorder()
    for _ in range(3):
        recorder.run(work)
    return recorder.record(lambda: [work() for _ in range(replays)])[1]


def free() -> None:
    """Releases memory of earlier cases."""
    gc.collect()
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _answers() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
