"""`Runtime`: where a recipe runs. Nothing here may change the weights in exact arithmetic. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Precision = Literal["auto", "fp32", "bf16", "fp16"]
AllReduce = Literal["auto", "flat", "hierarchical", "torus", "split_torus"]
Wire = Literal["fp32", "fp16", "bf16"]
Decode = Literal["auto", "cpu", "gpu"]
Fusion = Literal["auto", "plain"]
Switch = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where it runs: workers, micro-batch, precision, gradient exchange, threads and paths."""

    workers: int | None = None  # None: as many as the machine bears
    micro_batch_size: int | None = None  # samples of one forward and backward on one worker; None: chosen
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "auto"
    loss_scale: float | None = None  # fp16's, a power of two; None: follows the gradients
    channels_last: bool = True
    compile: bool = False  # by torch.compile; costs minutes at the start
    capture: Switch = "auto"  # whole steps in a CUDA graph
    fusion: Fusion = "auto"  # by kernels of ours, where they serve: batch norm, ReLU, residuals, convolutions
    cudnn_benchmark: bool = True  # on a GPU, cuDNN's fastest algorithms by measuring; rounding differs from run to run
    weight_copies: bool = True  # in bf16 and fp16 the optimizer writes 16-bit weights, so that no step casts them
    keep_memory: bool = True  # a worker on a CPU keeps what it frees instead of handing it back at every step
    threads_per_worker: int | None = None

    all_reduce: AllReduce = "auto"
    wire: Wire = "fp32"
    bucket_mib: float = 25.0
    timeout_s: float = 300.0

    data: Path | str | None = None  # a folder with train/ and val/, or the URL of shards, instead of the recipe's data
    cache: Path | None = None  # where fetched data sets and shards are kept; None: ~/.cache/megabatch
    remote_cache_gib: float = 64.0  # local copies of remote shards, shared by all workers of a machine
    max_bad_share: float | None = None  # unreadable samples that stop a run; None: 1 %, and any seen before the start
    output: Path | None = None  # the run folder; None: runs/RECIPE-DATE
    decode: Decode = "auto"  # what decodes JPEGs; auto: a GPU where few cores are left to a worker, else the cores
    decoded_cache_gib: float = 0.0  # of each GPU's memory, for training images that it has decoded
    decode_threads: int | None = None
    prefetch_batches: int = 4

    checkpoint_every_steps: int = 0  # 0: at each evaluation
    keep_checkpoints: int = 2
    resume: bool = False
