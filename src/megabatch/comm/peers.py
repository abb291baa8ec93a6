"""Which peers there are, how to reach them, and which one died: an error that names rank and host, never a hang.

Heartbeats go through the rendezvous store: each rank counts its own beats and watches its right neighbour's. Who
finds a silent neighbour writes it down for all, so every rank knows within about `timeout_s`, at three small requests
per rank and interval. Clocks are not compared between hosts.
"""

import contextlib
import fcntl
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store  # torch.distributed's, where type checkers find them
from torch.distributed.distributed_c10d import _get_default_store

from megabatch.errors import PeerError, SettingsError

_LEFT = 2**40  # added to the beats of a rank that ended as planned
_NETWORK_WORDS = re.compile(
    r"connection|timed? ?out|socket|closed by peer|reset by peer|broken pipe|gloo|nccl|unreachable|store|aborted", re.I
)


def host_name() -> str:
    """The name of this host, equal on all its ranks."""
    return socket.gethostname()


def interface_towards(address: str) -> str:
    """The name of the network interface that packets to `address` leave by, for GLOO_/NCCL_SOCKET_IFNAME.

    Gloo takes the interface that the host's own name resolves to, which on many hosts is loopback or a management
    network: ranks on other hosts cannot reach it. The one that leads to the rendezvous is the right one.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing: it only picks the route
            own_address = probe.getsockname()[0]
    except OSError as error:
        raise SettingsError(
            f"no route to the rendezvous at {address!r} ({error}); give a name such as 10.0.0.1"
        ) from error
    for _, name in socket.if_nameindex():
        if own_address in _addresses_of(name):
            return name
    raise SettingsError(
        f"no interface holds {own_address}, the way to {address!r}; set GLOO_SOCKET_IFNAME, for example eth0"
    )


def _addresses_of(interface: str) -> list[str]:
    """Its IPv4 address, and its IPv6 addresses where /proc lists them."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        request = struct.pack("256s", interface.encode()[:15])
        answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
        found.append(socket.inet_ntoa(answer[20:24]))
    with contextlib.suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as table:
        rows = [line.split() for line in table]
        found += [socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row[0])) for row in rows if row[5] == interface]
    return found


def gather_hosts(
    store: Store, rank: int, world_size: int, *, host: str | None = None, timeout_s: float = 300.0
) -> list[str]:
    """The host of every rank, in rank order: the meeting of all ranks before any collective.

    Raises PeerError naming the ranks that did not come within `timeout_s`.
    """
    store.set(f"host/{rank}", host or host_name())
    keys = [f"host/{peer}" for peer in range(world_size)]
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError as error:
        missing = [peer for peer, key in enumerate(keys) if not store.check([key])]
        raise PeerError(
            f"{len(missing)} of {world_size} ranks did not come within {timeout_s:g} s: ranks {_short(missing)}; "
            "start them with the same rendezvous address, or give a longer timeout"
        ) from error
    return [store.get(key).decode() for key in keys]


class PeerMonitor:
    """Beats for this rank, watches its neighbour, and tells everyone who died.

        with PeerMonitor.of_job(hosts=hosts) as monitor:
            monitor.on_failure(model.exchange_state.fail)  # waiting for a bucket ends at once
            with monitor.guard():                          # other collectives' errors become PeerError
                train()

    A rank that leaves the context as planned is not missed; one that leaves with an exception tells the others which.
    """

    def __init__(
        self, store: Store, *, rank: int, world_size: int, hosts: Sequence[str] | None = None, timeout_s: float = 30.0
    ) -> None:
        clone = getattr(store, "clone", None)  # a store of its own: a waiting main thread must not hold up the beats
        own: Store = clone() if clone is not None else store
        self._store = PrefixStore("peers", own)
        self._rank = rank
        self._world_size = world_size
        self._hosts = list(hosts) if hosts is not None else None
        self._timeout_s = timeout_s
        self._interval_s = max(min(timeout_s / 8, 1.0), 0.05)
        self._failure: str | None = None
        self._callbacks: list[Callable[[PeerError], None]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peer monitor", daemon=True)

    @classmethod
    def of_job(
        cls, *, hosts: Sequence[str] | None = None, timeout_s: float = 30.0, generation: int = 0
    ) -> "PeerMonitor":
        """The monitor of `torch.distributed`'s default group, over the store that the group met by.

        `generation` must differ between restarts that share a store; torchrun counts them in
        TORCHELASTIC_RESTART_COUNT.
        """
        store = PrefixStore(f"generation {generation}", _get_default_store())
        rank, world_size = dist.get_rank(), dist.get_world_size()
        return cls(store, rank=rank, world_size=world_size, hosts=hosts, timeout_s=timeout_s)

    def __enter__(self) -> "PeerMonitor":
        self._store.add(_beat(self._rank), 1)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        self._stop.set()
        self._thread.join(self._timeout_s)
        if error is not None and not isinstance(error, PeerError):
            self._announce(f"{self._name(self._rank)} failed with {type(error).__name__}: {error}")
        with contextlib.suppress(RuntimeError):
            self._store.add(_beat(self._rank), _LEFT)

    def on_failure(self, callback: Callable[[PeerError], None]) -> None:
        """Have `callback(error)` called from the monitor's thread when a peer is found dead."""
        self._callbacks.append(callback)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Turn a failure of communication inside the block into a PeerError that names the peer."""
        try:
            yield
        except PeerError:
            raise
        except (RuntimeError, OSError) as error:
            if self._failure is None and not _NETWORK_WORDS.search(str(error)):
                raise
            raise self.explain(error) from error

    def explain(self, error: BaseException) -> PeerError:
        """The PeerError for a collective's `error`; looks for up to about a second for peers that stopped beating."""
        reason = self._failure or self._read_announcement() or self._name_silent()
        seen = str(error).strip().split("\n", 1)[0].removeprefix("Got the following error when running the callback: ")
        if reason is None:
            return PeerError(f"a collective failed on rank {self._rank} though every peer is alive: {seen}")
        if reason in seen:
            return PeerError(reason)
        return PeerError(f"{reason} (rank {self._rank} saw: {seen})")

    def _run(self) -> None:
        neighbour = (self._rank + 1) % self._world_size
        seen, since = -1, time.monotonic()
        while not self._stop.wait(self._interval_s):
            try:
                self._store.add(_beat(self._rank), 1)
                beats = self._store.add(_beat(neighbour), 0)
                reason = self._read_announcement()
            except RuntimeError as error:
                reason = f"the rendezvous store is gone, and with it the process that held it: {error}"
                beats = seen
            now = time.monotonic()
            if beats != seen:
                seen, since = beats, now
            if reason is None and 0 < beats < _LEFT and now - since > self._timeout_s:
                reason = self._announce(f"{self._name(neighbour)} has been silent for {now - since:.1f} s")
            if reason is not None:
                self._tell(reason)
                return

    def _tell(self, reason: str) -> None:
        if self._stop.is_set():
            return
        self._failure = reason
        for callback in self._callbacks:
            callback(PeerError(reason))

    def _announce(self, reason: str) -> str:
        """Tell all ranks; the first report is the cause, later ones are its effects and are dropped."""
        with contextlib.suppress(RuntimeError):  # the store may be gone with the peer that held it
            if self._store.add("announcements", 1) == 1:
                self._store.set("announcement", json.dumps(reason))
        return reason

    def _read_announcement(self) -> str | None:
        with contextlib.suppress(RuntimeError):
            if self._store.check(["announcement"]):
                return str(json.loads(self._store.get("announcement")))
        return None

    def _name_silent(self) -> str | None:
        """Compare all peers' beats over a little more than two intervals."""
        try:
            before = self._all_beats()
            time.sleep(min(3 * self._interval_s, self._timeout_s))
            after = self._all_beats()
        except RuntimeError as error:
            return f"the rendezvous store is gone, and with it the process that held it: {error}"
        announced = self._read_announcement()
        if announced is not None:
            return announced
        silent = [rank for rank, beats in after.items() if beats == before[rank] and beats < _LEFT]
        if not silent:
            return None
        names = ", ".join(map(self._name, silent[:8]))
        return self._announce(f"{names} {'has' if len(silent) == 1 else 'have'} stopped answering")

    def _all_beats(self) -> dict[int, int]:
        return {rank: self._store.add(_beat(rank), 0) for rank in range(self._world_size) if rank != self._rank}

    def _name(self, rank: int) -> str:
        return f"rank {rank} on host {self._hosts[rank]}" if self._hosts is not None else f"rank {rank}"


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def _short(ranks: Sequence[Any]) -> str:
    return ", ".join(map(str, ranks[:16])) + (" ..." if len(ranks) > 16 else "")
