"""`Runtime`: where and how a recipe runs. Nothing here may change the weights in exact arithmetic. No torch.

`megabatch train` has one option per field, generated from this class (cli/options.py).
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megabatch.errors import SettingsError

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
AllReduce = Literal["auto", "flat", "hierarchical", "torus", "split_torus"]
Wire = Literal["fp32", "fp16", "bf16"]
BucketPlan = Literal["size", "cubic"]
Decode = Literal["auto", "cpu", "gpu"]
Fusion = Literal["auto", "plain"]
Switch = Literal["auto", "on", "off"]
Part = Literal["train", "val", "test"]
EvaluationPart = Literal["auto", "train", "val", "test"]
Track = Literal["auto", "none", "tensorboard", "wandb", "mlflow"]

_FORM = re.compile(r"(\d+(?:\.\d+)?) *(steps?|epochs?|s|min|h)")
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Interval:
    """One of the three lengths is set, or none: an interval that never ends."""

    steps: int = 0
    epochs: float = 0.0
    seconds: float = 0.0

    def crossed(self, before: float, after: float) -> bool:
        """True if a multiple of the interval's steps or epochs lies in (before, after], both in that unit."""
        length = self.steps or self.epochs
        return bool(length) and math.floor(after / length + 1e-9) > math.floor(before / length + 1e-9)


def parse_interval(option: str, text: str) -> Interval:
    """Returns the interval of "100steps", "2epochs", "90s", "10min", "1h" or "never".

    Raises:
        SettingsError: `text` has another form, or is 0; the message names `option`.
    """
    if text == "never":
        return Interval()
    found = _FORM.fullmatch(text)
    length, unit = (float(found[1]), found[2].removesuffix("s") or "s") if found else (0.0, "")
    if length == 0 or (unit == "step" and not length.is_integer()):
        needed = "a number above 0 with a unit, as 100steps, 2epochs, 90s, 10min or 1h, or never"
        raise SettingsError(f"{option} {text}: needed {needed}; {option} 10min works")
    if unit == "step":
        return Interval(steps=int(length))
    return Interval(epochs=length) if unit == "epoch" else Interval(seconds=length * _SECONDS[unit])


def _option(
    default: Any, text: str, *, least: float | None = None, most: float | None = None, none: str | None = None
) -> Any:
    """A field with the help text of its option; `none` is the word that stands for None on the command line."""
    return field(default=default, metadata={"help": text, "least": least, "most": most, "none": none})


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where a recipe runs: data and output paths, workers, precision, gradient exchange, threads, caches."""

    model: str | None = _option(
        None, "Model instead of the recipe's: a name, timm:NAME, torchvision:NAME, or FILE.py:FUNCTION of your own."
    )
    init_from: Path | None = _option(
        None, "Run folder, checkpoint, .safetensors or .pth of weights to start from; the last layer may differ."
    )
    data: Path | str | None = _option(
        None, "Folder with train/ and val/, or URL of shards, instead of the recipe's data set."
    )
    train_split: Part = _option("train", "Part of --data to train on.")
    val_split: EvaluationPart = _option("auto", "Part of --data to evaluate on; auto: val, or else test.")
    val_fraction: float | None = _option(
        None, "Share of each class of the training part to hold out and evaluate on.", least=0.001, most=0.9
    )
    output: Path | None = _option(None, "Run folder; default runs/RECIPE-TIME.")
    resume: bool | Literal["auto"] = _option(
        False,
        "Resume from the newest checkpoint in --output, with the same recipe; auto: or start, if it holds no run. "
        "--resume alone is on.",
    )
    workers: int | None = _option(
        None, "Local workers, or auto: one per GPU, else one per core, at most 8.", least=1, none="auto"
    )
    device: Device = _option("auto", "Device to compute on.")
    micro_batch_size: int | None = _option(
        None, "Samples per forward and backward on one worker; default chosen for the device.", least=1
    )
    precision: Precision = _option("auto", "Precision of forward and backward; auto takes the fastest.")
    loss_scale: float | None = _option(None, "Loss scale of fp16: dynamic, or a power of two.", least=1, none="dynamic")
    channels_last: bool | None = _option(
        None, "Memory layout of images and weights: NHWC, or NCHW; default the faster one."
    )
    compile: bool = _option(False, "Compile the model with torch.compile, which takes minutes at the start.")
    capture: Switch = _option("auto", "Capture whole steps in a CUDA graph; auto: on one GPU.")
    fusion: Fusion = _option("auto", "auto: fused kernels where they are faster; plain: torch's operations.")
    cudnn_benchmark: bool = _option(
        True, "On a GPU, benchmark cuDNN's algorithms; without it a resumed run is bitwise equal there."
    )
    weight_copies: bool = _option(True, "In bf16 and fp16 the optimizer writes 16-bit weights, so no step casts them.")
    keep_memory: bool = _option(True, "On a CPU, keep freed memory for the next step.")
    threads: int | None = _option(
        None,
        "CPU threads per worker; default OMP_NUM_THREADS, else the cores divided among workers.",
        least=1,
        most=4096,
    )

    all_reduce: AllReduce = _option("auto", "All-reduce algorithm of the gradient exchange.")
    wire: Wire = _option("fp32", "Data type of gradients in the exchange.")
    bucket_plan: BucketPlan = _option(
        "size", "Gradients exchanged together: --bucket-mib at a time, or 3 (k + 1)^3 tensors by group k."
    )
    bucket_mib: float = _option(25.0, "MiB per bucket of gradients; not used by --bucket-plan cubic.", least=0.001)
    bn_tile_rows: int = _option(
        1,
        "Rows of the grid of workers (one per host) that a batch-norm span shared by workers covers; "
        "1: consecutive workers.",
        least=1,
    )
    compare_every_steps: int = _option(
        100, "Updates between comparisons of the workers' weights, data position and time; 0 for none.", least=0
    )
    memory_copy_every_steps: int = _option(
        0,
        "Updates between copies of the state in the memory of each host, from which a job continues that has lost a "
        "host and its disk; 0 for none.",
        least=0,
    )
    timeout_s: float = _option(300.0, "Seconds after which a collective times out.", least=1)
    peer_timeout_s: float = _option(
        30.0, "Seconds without a sign of life after which a worker counts as lost; at most --timeout-s.", least=1
    )
    max_restarts: int = _option(
        3, "Restarts of local workers after one was lost, counted anew after each new checkpoint.", least=0
    )
    min_workers: int | None = _option(
        None,
        "Fewest local workers: from the second restart without a new checkpoint on, each has one fewer; "
        "default --workers.",
        least=1,
    )
    grace_s: float = _option(
        30.0, "Seconds that a run has to write a checkpoint after SIGTERM, SIGHUP or Ctrl-C.", least=1
    )

    cache: Path | None = _option(None, "Folder of downloaded data sets and shards; default ~/.cache/megabatch.")
    remote_cache_gib: float = _option(
        64.0, "GiB of disk for copies of remote shards, shared by all workers of a machine.", least=0
    )
    max_bad_share: float | None = _option(
        None, "Share of unreadable images above which a run stops; default 0.01.", least=0, most=1
    )
    decode: Decode = _option("auto", "JPEG decoder; auto: the GPU if a worker has few cores, else the cores.")
    decoded_cache_gib: float = _option(0.0, "GiB of each GPU's memory that cache images it has decoded.", least=0)
    decode_threads: int | None = _option(
        None, "Threads per worker that decode images; default one per core.", least=1, most=4096
    )
    prefetch_batches: int = _option(4, "Batches that the loader prefetches.", least=1)

    checkpoint_every: str = _option(
        "10min",
        "Interval between checkpoints, besides those at evaluations: as 100steps, 2epochs, 90s, 10min, 1h; or never.",
    )
    keep_checkpoints: int = _option(2, "Newest checkpoints to keep, besides the best.", least=1)
    trace_steps: int = _option(
        0,
        "Updates before the first evaluation to trace on all workers, with it and its checkpoint, in trace.json; "
        "0 for none.",
        least=0,
    )
    track: Track = _option(
        "auto", "Tracker that gets all numbers, besides events.jsonl; auto: TensorBoard if installed."
    )

    def __post_init__(self) -> None:
        """Expands `~` in paths; raises SettingsError for an interval of another form."""
        parse_interval("--checkpoint-every", self.checkpoint_every)
        for name in ("data", "output", "cache", "init_from"):
            path = getattr(self, name)
            if path is not None and str(path).startswith("~"):
                object.__setattr__(self, name, Path(path).expanduser())
