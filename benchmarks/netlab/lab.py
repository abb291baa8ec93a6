"""A network of hosts on one machine: each host is a network namespace whose link has a given rate and delay.

    with NetworkLab(4, rate_mbit=200, delay_ms=0.5) as lab:
        lab.run_everywhere([sys.executable, "train.py"], ranks_per_host=2)

Ranks of one host share its namespace and communicate over its loopback, at the machine's speed. Traffic between hosts
passes a token bucket (tc) at the sender and another at the receiver. A delay is added by a small user-space switch on
TAP devices (forwarder.c), because many kernels have no sch_netem. Needs root and, for a delay, /dev/net/tun and gcc.
All namespaces are named mblPID... and are removed when the context ends, also after an error or a signal;
`remove_leftovers` removes those of a killed process.
"""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO

HERE = Path(__file__).resolve().parent
MTU = 9000
CONGESTION_CONTROL = "reno"  # available in every kernel; with bbr two flows on a link left a tenth of it idle
GRACE_S = 5.0  # time that the other ranks have after a failure to print their errors
CLONE_NEWUTS, CLONE_NEWNET = 0x04000000, 0x40000000
_NAME = re.compile(r"mbl(\d+)(?:s|h\d+)")
_libc = ctypes.CDLL(None, use_errno=True)


class LabUnavailable(RuntimeError):  # noqa: N818 - a reason to skip, not an error
    """The laboratory cannot be built on this machine; the message names what is missing."""


@dataclass(frozen=True)
class Host:
    """One host of the laboratory."""

    index: int
    name: str
    namespace: str
    address: str

    def enter(self) -> None:
        """Moves the calling process into this host's network namespace and host name; cannot be undone."""
        with open(f"/run/netns/{self.namespace}", encoding="ascii") as handle:
            _check(_libc.setns(handle.fileno(), CLONE_NEWNET))
        _check(_libc.unshare(CLONE_NEWUTS))
        name = self.name.encode()
        _check(_libc.sethostname(name, len(name)))


class NetworkLab:
    """`num_hosts` hosts whose links carry `rate_mbit` in each direction, with `delay_ms` one way."""

    def __init__(
        self,
        num_hosts: int,
        *,
        rate_mbit: float,
        delay_ms: float = 0.0,
        delayed: bool | None = None,
        realtime: bool = False,
    ) -> None:
        self._prefix = f"mbl{os.getpid()}"
        self.hosts = [Host(i, f"host{i}", f"{self._prefix}h{i}", f"10.77.0.{i + 1}") for i in range(num_hosts)]
        self.rate_mbit = rate_mbit
        self.delay_ms = delay_ms
        self._delayed = delay_ms > 0 if delayed is None else delayed  # True: links pass through the forwarder
        self._realtime = realtime
        self._switch = f"{self._prefix}s"
        self._stack = contextlib.ExitStack()
        self._forwarder: subprocess.Popen[str] | None = None

    def __enter__(self) -> "NetworkLab":
        require()
        remove_leftovers()
        self._stack.enter_context(_interruptible())
        try:
            for namespace in (self._switch, *(host.namespace for host in self.hosts)):
                self._stack.callback(_quietly, "ip", "netns", "del", namespace)
                _run("ip", "netns", "add", namespace)
            (self._make_taps if self._delayed else self._make_bridge)()
            for host in self.hosts:
                self._make_host(host)
            self.shape(self.rate_mbit, self.delay_ms)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def shape(self, rate_mbit: float, delay_ms: float = 0.0) -> None:
        """Changes the rate and delay of every link, effective at once."""
        if delay_ms and not self._delayed:
            raise ValueError("links without a forwarder have no delay; build the lab with delayed=True")
        self.rate_mbit, self.delay_ms = rate_mbit, delay_ms
        for host in self.hosts:
            _shape(host.namespace, "eth0", rate_mbit)
            if not self._delayed:
                _shape(self._switch, f"port{host.index}", rate_mbit)
        if self._forwarder is not None and self._forwarder.stdin is not None:
            self._forwarder.stdin.write(f"{round(1000 * delay_ms)}\n")
            self._forwarder.stdin.flush()

    def connect(self, index: int, connected: bool) -> None:
        """Connects the link of a host, or cuts it: both directions lose all packets. Links without a delay only."""
        if self._delayed:
            raise ValueError("links through the forwarder cannot be cut; build the lab with delay_ms=0")
        _run("ip", "-n", self._switch, "link", "set", f"port{index}", "up" if connected else "down")

    def run_everywhere(
        self,
        command: Sequence[str],
        *,
        ranks_per_host: int,
        order: str = "block",
        environment: dict[str, str] | None = None,
        timeout_s: float = 600.0,
        output: Path | None = None,
    ) -> list[int]:
        """Runs `command` as every rank of every host, with torchrun's environment; returns exit codes in rank order.

        Each rank is bound to one core. Rank 0 writes to this process's stdout and stderr, the others to `rankN.txt` in
        the folder `output`, or nowhere. Ranks are killed after `timeout_s`, or `GRACE_S` after a rank has failed.
        """
        processes = []
        with contextlib.ExitStack() as files:
            for rank, (host, local_rank) in enumerate(self.places(ranks_per_host, order)):
                variables = self.environment(rank, local_rank, host, ranks_per_host)
                sink: IO[str] | int | None = None if rank == 0 else subprocess.DEVNULL
                if rank and output is not None:
                    sink = files.enter_context((output / f"rank{rank}.txt").open("w"))
                processes.append(
                    subprocess.Popen(
                        list(command),
                        env=os.environ | variables | (environment or {}),
                        stdout=sink,
                        stderr=sink,
                        start_new_session=True,
                        preexec_fn=partial(_become, host, rank),  # noqa: PLW1509 - this process has one thread
                    )
                )
            return _wait_all(processes, timeout_s)

    def places(self, ranks_per_host: int, order: str) -> list[tuple[Host, int]]:
        """Returns (host, local rank) of every rank; "block" fills one host after another, "round_robin" alternates."""
        if order == "block":
            return [(host, local) for host in self.hosts for local in range(ranks_per_host)]
        return [(host, local) for local in range(ranks_per_host) for host in self.hosts]

    def environment(self, rank: int, local_rank: int, host: Host, ranks_per_host: int) -> dict[str, str]:
        """Returns the environment variables that torchrun would set for this rank."""
        return {
            "MASTER_ADDR": self.hosts[0].address,
            "MASTER_PORT": "29500",
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks_per_host * len(self.hosts)),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(ranks_per_host),
            "GROUP_RANK": str(host.index),
            "GLOO_SOCKET_IFNAME": "eth0",
            "TP_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
        }

    def _make_bridge(self) -> None:
        _run("ip", "-n", self._switch, "link", "add", "br0", "mtu", str(MTU), "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "br0", "up")
        for host in self.hosts:
            port = f"port{host.index}"
            _run(*f"ip -n {self._switch} link add {port} mtu {MTU} type veth".split(), "peer", "name", "eth0",
                 "mtu", str(MTU), "netns", host.namespace)  # fmt: skip
            _run("ip", "-n", self._switch, "link", "set", port, "master", "br0", "up")

    def _make_taps(self) -> None:
        taps = [f"tap{host.index}" for host in self.hosts]
        self._forwarder = process = subprocess.Popen(
            [str(_build_forwarder(self._stack)), "0", *taps],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: _enter_switch(self._switch, self._realtime),  # noqa: PLW1509 - this process has one thread
        )
        self._stack.callback(_stop, process)
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise LabUnavailable("the forwarder could not create its TAP devices; it needs /dev/net/tun")
        for host, tap in zip(self.hosts, taps, strict=True):
            _run("ip", "-n", self._switch, "link", "set", tap, "mtu", str(MTU), "txqueuelen", "20000",
                 "netns", host.namespace, "name", "eth0")  # fmt: skip

    def _make_host(self, host: Host) -> None:
        inside = ("ip", "-n", host.namespace)
        _run(*inside, "link", "set", "eth0", "address", f"02:00:00:00:00:{host.index + 1:02x}", "up")
        _run(*inside, "link", "set", "lo", "up")
        _run(*inside, "address", "add", f"{host.address}/24", "dev", "eth0")
        for other in self.hosts:  # static neighbours: no ARP traffic during measurements
            if other != host:
                _run(*inside, "neigh", "replace", other.address, "lladdr", f"02:00:00:00:00:{other.index + 1:02x}",
                     "dev", "eth0", "nud", "permanent")  # fmt: skip
        _run(
            "ip",
            "netns",
            "exec",
            host.namespace,
            "sysctl",
            "-qw",
            f"net.ipv4.tcp_congestion_control={CONGESTION_CONTROL}",
        )


def _become(host: Host, rank: int) -> None:
    """Enters `host` and binds the process to one core: a rank that sees all cores would start threads for all."""
    host.enter()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})


def require() -> None:
    """Raises LabUnavailable if root rights, `ip` or `tc` are missing."""
    if os.geteuid() != 0:
        raise LabUnavailable("the network laboratory needs root, to make network namespaces; run it with sudo")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise LabUnavailable(f"`{tool}` is not installed; on Debian it is in the package iproute2")


def remove_leftovers() -> list[str]:
    """Removes the namespaces of laboratories whose process has ended; returns their names."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    removed = []
    for name in listed:
        owner = _NAME.fullmatch(name)
        if owner is not None and not Path(f"/proc/{owner[1]}").exists():
            _quietly("ip", "netns", "del", name)
            removed.append(name)
    return removed


def _shape(namespace: str, device: str, rate_mbit: float) -> None:
    """Sets a token bucket: bursts of 64 KiB, as a network card sends, and a queue long enough to drop nothing."""
    _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf",
         "rate", f"{rate_mbit}mbit", "burst", "66000", "limit", "16000000")  # fmt: skip


def _build_forwarder(stack: contextlib.ExitStack) -> Path:
    if shutil.which("gcc") is None:
        raise LabUnavailable("a delay needs gcc to build the forwarder; on Debian it is in the package gcc")
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="netlab-"))
    program = Path(folder) / "forwarder"
    _run("gcc", "-O2", "-o", str(program), str(HERE / "forwarder.c"))
    return program


def _enter_switch(namespace: str, realtime: bool) -> None:
    with open(f"/run/netns/{namespace}", encoding="ascii") as handle:
        _check(_libc.setns(handle.fileno(), CLONE_NEWNET))
    if realtime:  # priority above the ranks': scheduling must not lengthen the delay
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(2))


def _wait_all(processes: Sequence["subprocess.Popen[bytes]"], timeout_s: float) -> list[int]:
    deadline, failed = time.monotonic() + timeout_s, False
    try:
        while None in (codes := [process.poll() for process in processes]) and time.monotonic() < deadline:
            if not failed and any(codes):
                failed, deadline = True, min(deadline, time.monotonic() + GRACE_S)
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return [process.wait() for process in processes]


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into SystemExit, so that contexts end and namespaces are removed."""
    before = {number: signal.signal(number, _raise_exit) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_exit(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def _stop(process: "subprocess.Popen[str]") -> None:
    """Closes the forwarder's stdin, on which it reports its lost frames and exits; kills it after 3 s."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(3.0)
    process.kill()
    process.wait()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=60)


def _quietly(*command: str) -> None:
    subprocess.run(command, check=False, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
