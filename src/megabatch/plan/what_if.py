"""One change to a plan: faster links, another batch, wire, algorithm or grid; the rest stays as it was."""

import dataclasses
from collections.abc import Callable

from megabatch.errors import SettingsError
from megabatch.plan import CHANGES
from megabatch.plan.hardware import Cluster, Hardware
from megabatch.plan.predict import Job, Phase, Prediction, predict


def what_if(before: Prediction, change: str, cluster: Cluster, hardware: Hardware) -> Prediction:
    """Returns the prediction after `change`, a text as in `CHANGES`; everything else is that of `before`.

    `bandwidth` and `latency` multiply those of every link of the cluster; `batch` multiplies the global batch, at the
    same number of epochs.

    Raises SettingsError for an unknown change or value.
    """
    key, _, value = change.partition("=")
    if key in {"bandwidth", "latency"}:
        return predict(before.job, before.num_workers, cluster, _scaled(hardware, key, _factor(change, value)))
    if key not in _EDITS or not value:
        raise SettingsError(f"--what-if {change}: needed one of {CHANGES}")
    return predict(_EDITS[key](before.job, value, change), before.num_workers, cluster, hardware)


def _scaled(hardware: Hardware, key: str, factor: float) -> Hardware:
    links = {}
    for name, link in hardware.link.items():
        small = link.small_latency_us
        links[name] = (
            dataclasses.replace(link, bytes_per_s=link.bytes_per_s * factor)
            if key == "bandwidth"
            else dataclasses.replace(
                link,
                latency_us=link.latency_us * factor,
                small_latency_us=small * factor if small is not None else None,
            )
        )
    return dataclasses.replace(hardware, link=links)


def _batch(job: Job, value: str, change: str) -> Job:
    factor = _factor(change, value)
    scaled = [max(1, round(phase.global_batch_size * factor)) for phase in job.phases]
    phases = [Phase(it.epochs, size, it.resolution) for it, size in zip(job.phases, scaled, strict=True)]
    return dataclasses.replace(job, phases=tuple(phases))


def _wire(job: Job, value: str, change: str) -> Job:
    if value not in {"fp32", "fp16", "bf16"}:
        raise SettingsError(f"--what-if {change}: needed fp32, fp16 or bf16; wire=fp32 works")
    return _exchange(job, wire=value)


def _all_reduce(job: Job, value: str, change: str) -> Job:
    names = ("flat", "hierarchical", "torus", "split_torus", "tree", "halving_doubling", "nccl")
    if value not in names:
        raise SettingsError(f"--what-if {change}: needed one of {', '.join(names)}; all-reduce=torus works")
    return _exchange(job, algorithm=value)


def _shape(job: Job, value: str, change: str) -> Job:
    x, _, y = value.partition("x")
    if not (x.isdecimal() and y.isdecimal()):
        raise SettingsError(f"--what-if {change}: needed ranks per row x per column; shape=8x16 works for 128 workers")
    return _exchange(job, shape=(int(x), int(y)))


def _bucket(job: Job, value: str, change: str) -> Job:
    return _exchange(job, bucket="size", bucket_mib=_factor(change, value))


def _overlap(job: Job, value: str, change: str) -> Job:
    if value not in {"yes", "no"}:
        raise SettingsError(f"--what-if {change}: needed yes or no; overlap=no works")
    return _exchange(job, overlap=value == "yes")


def _exchange(job: Job, **changes: object) -> Job:
    return dataclasses.replace(job, exchange=dataclasses.replace(job.exchange, **changes))  # type: ignore[arg-type]


def _factor(change: str, value: str) -> float:
    try:
        factor = float(value)
    except ValueError:
        factor = 0.0
    if not 0 < factor < 1e6:
        raise SettingsError(f"--what-if {change}: needed a positive number; {change.partition('=')[0]}=2 works")
    return factor


_EDITS: dict[str, Callable[[Job, str, str], Job]] = {
    "batch": _batch,
    "wire": _wire,
    "all-reduce": _all_reduce,
    "shape": _shape,
    "bucket": _bucket,
    "overlap": _overlap,
}
