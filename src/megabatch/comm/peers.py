"""Failure detection: a dead or frozen worker raises a `PeerError` that names its rank and host, instead of a hang.

Heartbeats go through the rendezvous store. Each rank increments a counter of its own and reads the counter of its
right neighbour. A rank that detects a silent neighbour publishes it to the store, and every rank reads it from there,
so all ranks know within about `timeout_s`. The cost is three small requests per rank and interval. Only the time since
a counter's last change is measured, on the reader's clock: clocks of different hosts are never compared.
"""

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store  # type checkers do not find them in torch.distributed
from torch.distributed.distributed_c10d import _get_default_store

from megabatch.errors import PeerError

_STORE_LOST = "the rendezvous store does not answer; the process that hosts it has probably ended"
_ENDED = 2**40  # added to the beat counter of a rank that ended normally; no run beats that often
_CALLBACK_PREFIX = "Got the following error when running the callback: "  # put there by torch.futures
_NETWORK_WORDS = re.compile(
    r"connection|timed? ?out|socket|closed by peer|reset by peer|broken pipe|gloo|nccl|unreachable|store|aborted", re.I
)


def host_name() -> str:
    """Name of this host, the same for all its ranks."""
    return socket.gethostname()


class PeerMonitor:
    """Sends this rank's heartbeats, watches its right neighbour, and reports a failed rank to all ranks.

        with PeerMonitor.of_job(hosts=hosts) as monitor:
            monitor.on_failure(model.exchange_state.fail)  # pending buckets fail at once
            with monitor.guard():                          # errors of other collectives become PeerError
                train()

    A rank that leaves the context normally is not reported. A rank that leaves it with an exception publishes that
    exception's type and text. `timeout_s` is how long a rank, or the store, may be silent, in seconds; `hosts`, one
    name per rank, adds host names to the errors.

    `on_stuck(error)` is called on a thread of its own `timeout_s` after a failure was found, unless the process has
    ended by then: a collective of gloo that waits for a frozen rank returns at its own timeout only, and nothing but
    the end of the process interrupts it.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        world_size: int,
        hosts: Sequence[str] | None = None,
        timeout_s: float = 30.0,
        on_stuck: Callable[[PeerError], None] | None = None,
    ) -> None:
        # A second connection: on a shared one, a main thread that waits for a key would block the heartbeats.
        clone = getattr(store, "clone", None)
        connection: Store = clone() if clone is not None else store
        self._store = PrefixStore("peers", connection)
        self._rank = rank
        self._world_size = world_size
        self._hosts = list(hosts) if hosts is not None else None
        self._timeout_s = timeout_s
        self._interval_s = max(min(timeout_s / 8, 1.0), 0.05)  # eight missed beats before a report
        self._failure: str | None = None
        self._failing = threading.Lock()
        self._answered_at = time.monotonic()
        self._callbacks: list[Callable[[PeerError], None]] = []
        self._on_stuck = on_stuck
        self._stop = threading.Event()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peer monitor", daemon=True)
        self._store_watch = threading.Thread(target=self._watch_store, name="store watch", daemon=True)

    @classmethod
    def of_job(
        cls,
        *,
        hosts: Sequence[str] | None = None,
        timeout_s: float = 30.0,
        on_stuck: Callable[[PeerError], None] | None = None,
    ) -> "PeerMonitor":
        """Returns a monitor of `torch.distributed`'s default group, over that group's rendezvous store.

        Where a launcher keeps one store over restarts, the group must have been joined by `join`, or counters of the
        previous workers would be read.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        return cls(
            _get_default_store(),
            rank=rank,
            world_size=world_size,
            hosts=hosts,
            timeout_s=timeout_s,
            on_stuck=on_stuck,
        )

    def __enter__(self) -> "PeerMonitor":
        self._store.add(_beat(self._rank), 1)
        self._answered_at = time.monotonic()
        self._thread.start()
        self._store_watch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        self._stop.set()
        self._thread.join(self._timeout_s)
        if error is not None and not isinstance(error, PeerError):  # a PeerError is another rank's failure
            self._announce(f"{self._name(self._rank)} failed with {type(error).__name__}: {error}")
        with contextlib.suppress(RuntimeError):
            self._store.add(_beat(self._rank), _ENDED)
        self._left.set()

    def on_failure(self, callback: Callable[[PeerError], None]) -> None:
        """Registers `callback(error)`, which the monitor's thread calls once when a peer has failed."""
        self._callbacks.append(callback)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Replaces communication errors raised inside the block by a PeerError that names the failed rank."""
        try:
            yield
        except PeerError:
            raise
        except (RuntimeError, OSError) as error:
            if self._failure is None and not _NETWORK_WORDS.search(str(error)):
                raise
            raise self.explain(error) from error

    def explain(self, error: BaseException) -> PeerError:
        """Returns the PeerError for a collective's `error`; compares heartbeats for up to 3 s if no cause is known."""
        reason = self._failure or self._read_announcement() or self._name_silent()
        seen = str(error).strip().split("\n", 1)[0].removeprefix(_CALLBACK_PREFIX)
        self._fail(reason or seen)
        if reason is None:
            return PeerError(f"a collective failed on rank {self._rank}, but every peer still sends heartbeats: {seen}")
        if reason in seen:
            return PeerError(reason)
        return PeerError(f"{reason} (error on rank {self._rank}: {seen})")

    def _run(self) -> None:
        """Body of the monitor's thread: beat, read the neighbour's counter and any announcement, once per interval."""
        neighbour = (self._rank + 1) % self._world_size
        seen, since = -1, time.monotonic()
        for was_frozen in self._intervals(self._stop):
            try:
                self._store.add(_beat(self._rank), 1)
                beats = self._store.add(_beat(neighbour), 0)
                reason = self._read_announcement()
            except RuntimeError as error:
                reason = f"{_STORE_LOST}: {error}"
                beats = seen
            now = self._answered_at = time.monotonic()
            if beats != seen or was_frozen:
                seen, since = beats, now
            # A count of 0 is a rank that has not entered the context yet; start-up may take longer than the timeout.
            if reason is None and 0 < beats < _ENDED and now - since > self._timeout_s:
                reason = self._announce(f"{self._name(neighbour)} has been silent for {now - since:.1f} s")
            if reason is not None:
                self._call_back(reason)
                return

    def _watch_store(self) -> None:
        """Body of a thread that talks to nobody: a request to a frozen host returns at no timeout."""
        for was_frozen in self._intervals(self._left):
            if was_frozen:
                self._answered_at = time.monotonic()
            if time.monotonic() - self._answered_at > self._timeout_s:
                self._call_back(f"{_STORE_LOST}, or is frozen")
                return

    def _intervals(self, end: threading.Event) -> Iterator[bool]:
        """Yields once per interval until `end`; True if this process itself stood still, as Ctrl-Z makes it."""
        looked_at = time.monotonic()
        while not end.wait(self._interval_s):
            yield time.monotonic() - looked_at > self._timeout_s / 2
            looked_at = time.monotonic()

    def _call_back(self, reason: str) -> None:
        if self._fail(reason) and not self._stop.is_set():
            for callback in self._callbacks:
                callback(PeerError(reason))

    def _fail(self, reason: str) -> bool:
        """Notes the first failure and starts the time that the process has to end; False at later ones."""
        with self._failing:
            if self._failure is not None:
                return False
            self._failure = reason
        if self._on_stuck is not None:
            timer = threading.Timer(self._timeout_s, self._on_stuck, [PeerError(reason)])
            timer.daemon = True
            timer.start()
        return True

    def _announce(self, reason: str) -> str:
        """Publishes `reason` unless a rank did so before: the first report is the cause, later ones are its effects."""
        with contextlib.suppress(RuntimeError):  # the failed peer may have hosted the store
            if self._store.add("announcements", 1) == 1:
                self._store.set("announcement", json.dumps(reason))
        return reason

    def _read_announcement(self) -> str | None:
        with contextlib.suppress(RuntimeError):
            if self._store.check(["announcement"]):
                return str(json.loads(self._store.get("announcement")))
        return None

    def _name_silent(self) -> str | None:
        """Compares all peers' counters over three intervals; returns and publishes the silent ones, or None."""
        try:
            before = self._all_beats()
            time.sleep(min(3 * self._interval_s, self._timeout_s))
            after = self._all_beats()
        except RuntimeError as error:
            return f"{_STORE_LOST}: {error}"
        announced = self._read_announcement()
        if announced is not None:
            return announced
        silent = [rank for rank, beats in after.items() if beats == before[rank] and beats < _ENDED]
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
