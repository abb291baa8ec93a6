"""Hardware as plain data: devices, links, software stacks and clusters of `hardware.toml` and of a user's file."""

import dataclasses
import functools
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from megabatch.errors import SettingsError

Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True, eq=False)  # compared by identity, so that speeds can be cached
class Device:
    """Peak rates of an accelerator or processor."""

    memory_bytes_per_s: float
    flops: Mapping[str, float]  # operations/s by precision


@dataclass(frozen=True, kw_only=True)
class LinkData:
    """A link in one direction: time per hop and the rate that an all-reduce reaches."""

    latency_us: float
    bytes_per_s: float
    small_latency_us: float | None = None  # of messages of some KB; None: as of large ones


@dataclass(frozen=True, kw_only=True)
class Row:
    """Images/s per worker on one node, at `batch` images per worker."""

    workers: int
    batch: int
    images_per_s: float
    source: str
    model: str = "resnet50"
    resolution: int = 224
    num_classes: int = 1000
    in_channels: int = 3
    width: int = 16


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A device with a framework, and the single-node rows that its speed is fitted to."""

    device: str
    precision: str
    rows: tuple[Row, ...] = ()
    forward_rows: tuple[tuple[float, float], ...] = ()  # batch, ms of a forward pass of ResNet-50
    overhead_of: str | None = None
    share_of: str | None = None


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Hosts of `devices_per_host` devices and the network between them."""

    stack: str
    devices_per_host: int
    about: str = ""
    row: str | None = None  # link of a device inside its host
    host_link: str | None = None
    host_links: int = 1
    hosts_per_leaf: int = 0  # 0: one switch for all
    taper: float = 1.0
    torus: bool = False
    input_images_per_s: float = 0.0  # that a host can decode; 0: any number
    price_per_device_hour: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)  # compared by identity, so that fits can be cached
class Hardware:
    """All known parts by name."""

    device: Mapping[str, Device]
    link: Mapping[str, LinkData]
    stack: Mapping[str, Stack]
    cluster: Mapping[str, Cluster]
    scaling: tuple[tuple[tuple[float, float], ...], ...]  # per source: (workers, images/s of all)

    def find_cluster(self, name: str) -> Cluster:
        """Returns the cluster of that name; raises SettingsError, which suggests one, otherwise."""
        return _find(self.cluster, "cluster", name)


@functools.cache
def load_hardware(path: Path | None = None) -> Hardware:
    """Returns the hardware of the package, and of the TOML file at `path`, whose entries replace those of equal name.

    Raises SettingsError if the file cannot be read, or holds an unknown or missing field.
    """
    text = resources.files("megabatch.plan").joinpath("hardware.toml").read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    if path is not None:
        for kind, entries in _read(path).items():
            if kind not in {"device", "link", "stack", "cluster"}:
                raise SettingsError(f"{path}: table [{kind}] is unknown, needed device, link, stack or cluster")
            tables[kind] = tables[kind] | entries
    made = Hardware(
        device=_parts(Device, tables["device"], path),
        link=_parts(LinkData, tables["link"], path),
        stack=_parts(Stack, tables["stack"], path),
        cluster=_parts(Cluster, tables["cluster"], path),
        scaling=tuple(tuple((n, rate) for n, rate in entry["points"]) for entry in tables["scaling"]),
    )
    _check_references(made)
    return made


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: {error}; needed a TOML file with tables as [cluster.NAME]") from error


def _parts(kind: type[Part], entries: Mapping[str, Any], path: Path | None) -> dict[str, Part]:
    return {name: _part(kind, name, values, path) for name, values in entries.items()}


def _part(kind: type[Part], name: str, values: dict[str, Any], path: Path | None) -> Part:
    where = f"{path or 'hardware.toml'}: {kind.__name__.lower().removesuffix('data')} {name!r}"
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise SettingsError(f"{where} has unknown fields {', '.join(unknown)}; known: {', '.join(fields)}")
    made = dict(values)
    if kind is Stack:
        made["rows"] = tuple(_part(Row, f"of {name}", row, path) for row in values.get("rows", ()))
        made["forward_rows"] = tuple((batch, ms) for batch, ms in values.get("forward_rows", ()))
    try:
        part = kind(**made)
    except TypeError as error:
        raise SettingsError(f"{where}: {error}") from error
    for field, hint in typing.get_type_hints(kind).items():
        value = getattr(part, field)
        if hint in {int, float} and not (isinstance(value, int | float) and value >= 0):
            raise SettingsError(f"{where}: {field} = {value!r}, needed a number of at least 0; for example {field} = 1")
    return part


def _check_references(made: Hardware) -> None:
    for name, stack in made.stack.items():
        _find(made.device, f"device of stack {name!r},", stack.device)
        for other in (stack.overhead_of, stack.share_of):
            if other is not None:
                _find(made.stack, f"stack in stack {name!r},", other)
        if stack.precision not in made.device[stack.device].flops:
            raise SettingsError(f"stack {name!r}: device {stack.device!r} has no flops for {stack.precision!r}")
        if not stack.rows and stack.share_of is None:
            raise SettingsError(f"stack {name!r} has no rows; needed one, or share_of; `plan --calibrate` writes rows")
    for name, cluster in made.cluster.items():
        _find(made.stack, f"stack of cluster {name!r},", cluster.stack)
        for link in (cluster.row, cluster.host_link):
            if link is not None:
                _find(made.link, f"link of cluster {name!r},", link)
        if cluster.row is None and (cluster.devices_per_host > 1 or cluster.torus):
            raise SettingsError(f"cluster {name!r} has several devices per host and no row link; row = 'pcie3' works")


def _find(parts: Mapping[str, Part], what: str, name: str) -> Part:
    if name not in parts:
        near = get_close_matches(name, parts, n=1, cutoff=0.4) or [next(iter(parts))]
        raise SettingsError(f"{what} {name!r} is unknown, needed one of {', '.join(sorted(parts))}; try {near[0]}")
    return parts[name]
