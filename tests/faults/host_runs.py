"""Faults of whole hosts: each host is a network namespace with a torchrun agent, memory and a disk of its own.

    with NetworkLab(2, rate_mbit=1000) as lab:
        recoveries, num_orphans = run_with_host_faults(folder, arguments, faults, lab=lab, say=print)

A minimal job scheduler starts the command of a host again until it succeeds, as on a replaced host. The agent of host 0
keeps the rendezvous store. All hosts see one disk, or, with `own_disks`, each one of its own. Needs root.
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fault_runs import Job, wait_for

from megabatch.comm.worker_watch import ORPHAN_GRACE_S

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "netlab"))

from lab import Host, NetworkLab

KINDS = ("kill host", "cut link", "lose host and disk")
WORKERS_PER_HOST = 2
END_S = 180.0
"""Seconds within which all processes of a host whose link was cut, and the workers that it left alone, must end."""
# A host sees the names of all hosts, a folder of its own as `/dev/shm`, and its disk at the output's path.
_MOUNTS = 'mount --bind "$0" /etc/hosts && mount --bind "$1" /dev/shm && mount --bind "$2" "$3" && shift 3'


@dataclass(frozen=True)
class HostFault:
    """A fault of `KINDS`, `delay_s` after training has begun."""

    kind: str
    host: int
    delay_s: float


@dataclass(frozen=True)
class HostRecovery:
    """Outcome of a fault: the step that the run continued from, and seconds from the new host to the next step."""

    fault: HostFault
    at_step: int
    from_step: int | None
    to_training_s: float


class Cluster:
    """`megabatch train` on all hosts of a laboratory; all processes end with the `with` block."""

    def __init__(self, folder: Path, arguments: Sequence[str], *, lab: NetworkLab, own_disks: bool) -> None:
        self._lab = lab
        self._lost_events = ""
        disks = [folder.with_name(f"{folder.name}-host{host.index if own_disks else 0}") for host in lab.hosts]
        self._memory = [folder.with_name(f"{folder.name}-memory{host.index}") for host in lab.hosts]
        for path in {folder, *disks, *self._memory}:
            path.mkdir()
        self._names = folder.with_name(f"{folder.name}-hosts")
        names = [f"{host.address} {host.name}\n" for host in lab.hosts]
        self._names.write_text("127.0.0.1 localhost\n" + "".join(names))
        self.jobs = [self._job(folder, arguments, host, disk) for host, disk in zip(lab.hosts, disks, strict=True)]

    def _job(self, folder: Path, arguments: Sequence[str], host: Host, disk: Path) -> Job:
        address = self._lab.hosts[0].address
        torchrun = f"-m torch.distributed.run --nnodes {len(self._lab.hosts)} --nproc-per-node {WORKERS_PER_HOST}"
        torchrun += f" --max-restarts 20 --rdzv-backend c10d --rdzv-endpoint {address}:29500 --rdzv-id faults"
        torchrun += f" --local-addr {host.address} --rdzv-conf join_timeout={END_S / 3:.0f},keep_alive_interval=2"
        paths = (self._names, self._memory[host.index], disk, folder)
        return Job(
            disk,
            arguments,
            launcher=torchrun.split(),
            output=folder,
            prefix=["unshare", "--mount", "sh", "-c", f'{_MOUNTS} && exec "$@"', *map(str, paths)],
            enter=lambda: _enter(host),
            GLOO_SOCKET_IFNAME="eth0",
            OMP_NUM_THREADS="1",
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
            TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5",
        )

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *error: object) -> None:
        for job in self.jobs:
            job.__exit__(*error)

    def has_succeeded(self) -> bool:
        """True after exit code 0 on all hosts; starts the command again on each host after another code."""
        return [job.has_succeeded() for job in self.jobs].count(False) == 0

    def inject(self, fault: HostFault) -> HostRecovery:
        """Injects the fault into a run that trains, and waits until it trains again."""
        time.sleep(fault.delay_s)
        job, since_s = self.jobs[fault.host], time.time()
        at_step = int(self.jobs[0].events("step")[-1]["step"])
        self._lab.connect(fault.host, False)
        if fault.kind == "cut link":
            self._wait_for_end_of_both_sides(fault.host)
        job.kill()
        _empty(self._memory[fault.host])
        if fault.kind == "lose host and disk":
            self._lose_disk(job)
        self._lab.connect(fault.host, True)
        seconds = wait_for(lambda: self.has_succeeded() or self.jobs[0].is_training(since_s), str(fault))
        start = next(event for event in self.jobs[0].events("run_start") if event["time_s"] > since_s)
        return HostRecovery(fault, at_step, start["resumed_from_step"], seconds)

    def _wait_for_end_of_both_sides(self, cut: int) -> None:
        """Waits until all processes of the host `cut` have ended, and all workers of the others."""
        workers = {
            number
            for job in self.jobs
            for number, variables in job.processes().items()
            if job is self.jobs[cut] or "RANK" in variables
        }
        wait_for(lambda: not any(workers & job.processes().keys() for job in self.jobs), "a cut link", END_S)
        wait_for(lambda: not self.jobs[cut].processes(), "the end of a host without a link", END_S)

    def _lose_disk(self, job: Job) -> None:
        events = job.folder / "events.jsonl"
        if events.exists():
            self._lost_events += events.read_text()
        _empty(job.folder)

    def restore_lost_events(self) -> None:
        """Puts the events that were lost with disks back, for a count over the whole run."""
        events = self.jobs[0].folder / "events.jsonl"
        events.write_text(self._lost_events + events.read_text())


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _enter(host: Host) -> None:
    """Moves this process to `host`, where a connection without answers breaks after about 25 s, not 15 min."""
    host.enter()
    Path("/proc/sys/net/ipv4/tcp_retries2").write_text("6")


def run_with_host_faults(
    folder: Path,
    arguments: Sequence[str],
    faults: Sequence[HostFault],
    *,
    lab: NetworkLab,
    say: Callable[[str], None],
    own_disks: bool = False,
) -> tuple[list[HostRecovery], int, Path]:
    """Trains on the hosts of `lab`; returns a recovery per fault, the number of orphans, and rank 0's run folder."""
    recoveries: list[HostRecovery] = []
    with Cluster(folder, arguments, lab=lab, own_disks=own_disks) as cluster:
        wait_for(lambda: cluster.has_succeeded() or cluster.jobs[0].is_training(), "the start")
        for fault in faults:
            recoveries.append(cluster.inject(fault))
            say(str(recoveries[-1]))
        wait_for(cluster.has_succeeded, "the end")
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not any(job.processes() for job in cluster.jobs), "the end", 2 * ORPHAN_GRACE_S)
        cluster.restore_lost_events()
        return recoveries, sum(len(job.processes()) for job in cluster.jobs), cluster.jobs[0].folder
