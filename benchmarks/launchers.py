"""One recipe through every launcher, on four workers each: are losses and weights the same?

    sudo python benchmarks/launchers.py run local torchrun ipv6 interfaces slurm ray --folder RUNS
    sudo python benchmarks/launchers.py run local torchrun ... --folder RUNS_FLAT --all-reduce flat
    python benchmarks/launchers.py compare RUNS

`local` is --workers 4; the others are two hosts with two workers each. `torchrun` runs once per host, a network
namespace (netlab/lab.py); `ipv6` has no IPv4 addresses; `interfaces` has a second network, of which the workers are
told by GLOO_SOCKET_IFNAME. `slurm` starts a controller and two daemons on this machine (packages slurm-wlm, munge) and
runs the batch file of `launch slurm`; `ray` runs `launch ray` on a local cluster (extra ray).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "netlab"))
from lab import NetworkLab

from megabatch.observe.events import read_events

STEPS, LIMIT_S = 12, 600
THREADS = ["--threads", "1", "--decode-threads", "1"]
RECIPE = ["fashion_mnist", "--steps", str(STEPS), "--device", "cpu", "--precision", "fp32", "--micro-batch-size", "256"]
MEGABATCH = [sys.executable, "-m", "megabatch"]
SECOND = "10.78.0"  # the second network, of eth1
RAY = """
import sys
import ray
ray.init(num_cpus=4, include_dashboard=False, _temp_dir=sys.argv.pop(1))
from megabatch.cli.main import main
main()
"""
SLURM = """\
ClusterName=launchers
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.sock
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port=17001 CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port=17002 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def local(run: Path) -> None:
    """Four workers that `megabatch train` starts."""
    _call([*MEGABATCH, "train", *RECIPE, *THREADS, "--workers", "4", "--output", str(run)])


def torchrun(run: Path, network: str = "") -> None:
    """torchrun on each of two hosts, which meet on the plain network, over IPv6, or on a second network."""
    with NetworkLab(2, rate_mbit=1000) as lab:
        address, variables = lab.hosts[0].address, {}
        if network == "ipv6":
            for host in lab.hosts:
                _ip(host.namespace, "address", "flush", "dev", "eth0")
                _ip(host.namespace, "-6", "address", "add", f"fd77::{host.index + 1}/64", "dev", "eth0", "nodad")
            address = "fd77::1"
        if network == "interfaces":
            first, second = (host.namespace for host in lab.hosts)
            _ip(first, "link", "add", "eth1", "type", "veth", "peer", "name", "eth1", "netns", second)
            for host in lab.hosts:
                _ip(host.namespace, "address", "add", f"{SECOND}.{host.index + 1}/24", "dev", "eth1")
                _ip(host.namespace, "link", "set", "eth1", "up")
            address, variables = f"{SECOND}.1", {"GLOO_SOCKET_IFNAME": "eth1"}
        before = [_sent_bytes(host.namespace) for host in lab.hosts]
        start = f'exec "$@" --node-rank $RANK --master-addr {address} --master-port 29600 -m megabatch train '
        arguments = [*RECIPE, *THREADS, "--output", str(run)]
        agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
        command = ["bash", "-c", f"{start} {' '.join(arguments)}", "bash", *agent]
        codes = lab.run_everywhere(
            command, ranks_per_host=1, environment=variables, timeout_s=LIMIT_S, output=run.parent
        )
        assert codes == [0, 0], codes
        sent = [
            {name: after[name] - start[name] for name in after}
            for start, after in zip(before, (_sent_bytes(host.namespace) for host in lab.hosts), strict=True)
        ]
    (run / "network.json").write_text(json.dumps({"address": address, **variables, "sent_bytes": sent}) + "\n")


def slurm(run: Path) -> None:
    """A batch file of `launch slurm` on two nodes."""
    size = ["--nodes", "2", "--workers-per-node", "2", "--cpus-per-worker", "1"]
    batch = _call([*MEGABATCH, "launch", "slurm", *size, "--", *RECIPE, "--output", str(run)])
    with _slurm_cluster() as (folder, environment):
        tools = folder / "bin"
        tools.mkdir()
        (tools / "megabatch").write_text(f'#!/bin/sh\nexec {" ".join(MEGABATCH)} "$@"\n')
        (tools / "megabatch").chmod(0o755)
        (folder / "job.sh").write_text(batch)
        environment["PATH"] = f"{tools}:{environment['PATH']}"
        environment["MASTER_ADDR"] = "127.0.0.1"  # a pseudo node's name has no address
        submit = [
            "sbatch",
            "--wait",
            "--time=5",
            f"--output={run}.slurm.txt",
            f"--chdir={folder}",
            str(folder / "job.sh"),
        ]
        _call(submit, environment)


def ray(run: Path) -> None:
    """`launch ray` on two placements of a local cluster."""
    size = ["--nodes", "2", "--workers-per-node", "2", "--cpus-per-worker", "1"]
    environment = os.environ | {"RAY_raylet_start_wait_time_s": "200", "RAY_AUTH_MODE": "disabled"}
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        launch = ["launch", "ray", *size, "--", *RECIPE, "--output", str(run)]
        _call([sys.executable, "-c", RAY, folder, *launch], environment)


LAUNCHERS = {
    "local": local,
    "torchrun": torchrun,
    "ipv6": partial(torchrun, network="ipv6"),
    "interfaces": partial(torchrun, network="interfaces"),
    "slurm": slurm,
    "ray": ray,
}


@contextmanager
def _slurm_cluster() -> Iterator[tuple[Path, dict[str, str]]]:
    """A controller and two nodes on this machine; yields their folder and the environment of their commands."""
    with tempfile.TemporaryDirectory(prefix="slurm") as name, _processes() as start:
        folder = Path(name)
        host = _call(["hostname", "-s"]).strip()
        (folder / "slurm.conf").write_text(SLURM.format(host=host, folder=folder))
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        files = {"socket": "sock", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = [f"--{option}={folder}/munge.{ending}" for option, ending in files.items()]
        environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        start(["munged", "--foreground", "--force", *munge], environment)
        start(["slurmctld", "-D"], environment)
        for node in ("n1", "n2"):
            start(["slurmd", "-D", "-N", node], environment)
        deadline = time.monotonic() + 120
        while "idle" not in (state := _state(environment)):
            assert time.monotonic() < deadline, state
            time.sleep(0.5)
        try:
            yield folder, environment
        finally:
            subprocess.run(["scancel", "--user=root"], env=environment, check=False, timeout=60)


def _state(environment: dict[str, str]) -> str:
    shown = subprocess.run(["sinfo", "-h", "-o", "%D%T"], env=environment, capture_output=True, text=True, check=False)
    return shown.stdout.strip() if shown.stdout.strip() == "2idle" else f"waiting: {shown.stdout}{shown.stderr}"


@contextmanager
def _processes() -> Iterator[partial[None]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(command: Sequence[str], environment: dict[str, str]) -> None:
        quiet = subprocess.DEVNULL
        started.append(subprocess.Popen(command, env=environment, stdin=quiet, stdout=quiet, stderr=quiet))

    try:
        yield partial(start)
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(60)


def _call(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True)
    return done.stdout


def _ip(namespace: str, *words: str) -> None:
    subprocess.run(["ip", "-n", namespace, *words], check=True)


def _sent_bytes(namespace: str) -> dict[str, int]:
    shown = json.loads(_call(["ip", "-n", namespace, "-s", "-j", "link"]))
    return {link["ifname"]: link["stats64"]["tx"]["bytes"] for link in shown if link["ifname"].startswith("eth")}


def compare(folder: Path, lines: Path | None) -> bool:
    """Prints a table of all runs against `local`; returns True if all losses and weights are bitwise equal.

    `lines` receives one JSON line per run, with all losses.
    """
    wanted, weights = _result(folder / "local")
    print(f"| launcher | losses of {len(wanted)} updates | largest relative difference | weights |\n|---|---|---|---|")
    texts, equal = [], True
    for name in (name for name in LAUNCHERS if (folder / name / "events.jsonl").is_file()):
        losses, found = _result(folder / name)
        difference = max(abs(loss / other - 1) for loss, other in zip(losses, wanted, strict=True))
        is_same = losses == wanted and all(torch.equal(found[key], weights[key]) for key in weights | found)
        word = "bitwise equal" if is_same else "differ"
        print(f"| {name} | {losses[0]:.7f} to {losses[-1]:.7f} | {difference:.1g} | {word} |")
        equal &= is_same
        network = folder / name / "network.json"
        fields = {"launcher": name, "weights": word, "losses": losses, "choices": _choices(folder / name)}
        texts.append(json.dumps(fields | (json.loads(network.read_text()) if network.is_file() else {})))
    if lines:
        lines.write_text("".join(f"{text}\n" for text in texts))
    return equal


def _choices(run: Path) -> str:
    """What the run says about its exchange."""
    start = next(event for event in read_events(run / "events.jsonl") if event["event"] == "run_start")
    return next(choice for choice in start["choices"] if choice.startswith("all-reduce"))


def _result(run: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of every update, and tensors of the model in the last checkpoint."""
    losses = [event["loss"] for event in read_events(run / "events.jsonl") if event["event"] == "step"]
    state = torch.load(run / "checkpoints" / f"step-{STEPS:08d}.pt", weights_only=True)
    return losses, state["module"]


def main() -> None:
    """Entry point of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    run.add_argument("launchers", nargs="+", choices=LAUNCHERS)
    run.add_argument("--folder", type=Path, required=True)
    run.add_argument("--all-reduce", default="auto")
    comparison = verbs.add_parser("compare")
    comparison.add_argument("folder", type=Path)
    comparison.add_argument("--lines", type=Path)
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.verb == "compare":
        sys.exit(not compare(folder, options.lines))
    folder.mkdir(parents=True, exist_ok=True)
    RECIPE.extend(["--all-reduce", options.all_reduce])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that contexts end
    for name in options.launchers:
        LAUNCHERS[name](folder / name)
        print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main()
