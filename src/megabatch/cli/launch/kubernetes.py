"""`megabatch launch kubernetes`: a TrainJob of Kubeflow Trainer (v1alpha1) that runs `megabatch train`."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from megabatch.cli.launch.command import (
    Arguments,
    CpusPerWorker,
    GpusPerNode,
    GraceS,
    Nodes,
    WorkersPerNode,
    num_workers,
    train_command,
)
from megabatch.errors import INVALID_INPUT, STOPPED, SettingsError
from megabatch.files import write_text

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")  # with "-node-0-0" appended it still is a DNS label
_QUANTITY = re.compile(r"[1-9]\d*(Ki|Mi|Gi|Ti|k|M|G|T)?")
_TERMINATION_MARGIN_S = 30  # between the run's last checkpoint and SIGKILL


def launch_kubernetes(
    arguments: Arguments,
    image: Annotated[str, typer.Option(help="Container image with megabatch, as registry/megabatch:cuda.")],
    volume: Annotated[
        list[str],
        typer.Option(help="CLAIM:PATH, a persistent volume claim for data or runs; repeatable.", metavar="CLAIM:PATH"),
    ],
    name: Annotated[str, typer.Option(help="Name of the job.")] = "megabatch",
    namespace: Annotated[str, typer.Option(help="Namespace of the job.")] = "default",
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = 0,
    gpu_resource: Annotated[str, typer.Option(help="Resource name of a GPU.")] = "nvidia.com/gpu",
    workers_per_node: WorkersPerNode = None,
    cpus_per_worker: CpusPerWorker = 8,
    memory: Annotated[str, typer.Option(help="Memory of a pod, shared memory included.")] = "64Gi",
    shared_memory: Annotated[str, typer.Option(help="Size of /dev/shm, which NCCL uses within a node.")] = "8Gi",
    grace_s: GraceS = 120,
    max_restarts: Annotated[int, typer.Option(help="Restarts after failures; stops are not counted.", min=0)] = 3,
    to: Annotated[Path | None, typer.Option(help="File to write, instead of stdout.")] = None,
) -> None:
    """Writes a job for Kubernetes with Kubeflow Trainer. `... | kubectl apply -f -` runs it.

    The text is JSON, which is YAML. It holds a TrainingRuntime (pods, volumes, restarts) and the TrainJob that uses it.
    """
    _check("--name", name, _NAME, "resnet")
    _check("--namespace", namespace, _NAME, "default")
    _check("--memory", memory, _QUANTITY, "64Gi")
    _check("--shared-memory", shared_memory, _QUANTITY, "8Gi")
    workers = num_workers(gpus_per_node, workers_per_node)
    command = train_command(arguments, cpus_per_worker=cpus_per_worker, grace_s=grace_s)
    resources = {"cpu": str(cpus_per_worker * workers), "memory": memory}
    resources |= {gpu_resource: str(gpus_per_node)} if gpus_per_node else {}
    trainer = {
        "image": image,
        "command": ["python", "-m", "megabatch.comm.torchrun", f"--shutdown-timeout={grace_s}", "-m", "megabatch"],
        "args": command,
        "numNodes": nodes,
        "numProcPerNode": workers,
        "resourcesPerNode": {"requests": resources, "limits": resources},
    }
    pod = _pod(volume, image, shared_memory=shared_memory, grace_s=grace_s)
    metadata = {"name": name, "namespace": namespace}
    runtime = {"mlPolicy": {"torch": {}}, "template": {"spec": _job_set(pod, max_restarts)}}
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name}
    items = [
        _trainer_object("TrainingRuntime", metadata, runtime),
        _trainer_object("TrainJob", metadata, {"runtimeRef": reference, "trainer": trainer}),
    ]
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": items}, indent=2)
    if to is None:
        typer.echo(text)
    else:
        write_text(to, text + "\n")


def _trainer_object(kind: str, metadata: dict[str, str], spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}


def _job_set(pod: dict[str, Any], max_restarts: int) -> dict[str, Any]:
    """The JobSet of a run: all pods start again when one ends, without limit after a checkpoint or a disruption, and
    never after invalid input.

    A JobSet does not see exit codes, only the reason and the message of the Job that failed by its `podFailurePolicy`.
    """
    codes = {"containerName": "node", "operator": "In", "values": [INVALID_INPUT, STOPPED]}
    rules = [
        {"action": "FailJob", "onExitCodes": codes},
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    by_policy = {"onJobFailureReasons": ["PodFailurePolicy"]}
    invalid = {"onJobFailureMessagePatterns": [f"failed with exit code {INVALID_INPUT} "]}
    actions = [
        {"name": "invalid", "action": "FailJobSet", **by_policy, **invalid},
        {"name": "stopped", "action": "RestartJobSetAndIgnoreMaxRestarts", **by_policy},
    ]
    job = {"backoffLimit": 0, "podFailurePolicy": {"rules": rules}, "template": {"spec": pod}}
    labels = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    return {
        "failurePolicy": {"maxRestarts": max_restarts, "rules": actions},
        "replicatedJobs": [{"name": "node", "template": {"metadata": {"labels": labels}, "spec": job}}],
    }


def _pod(volumes: list[str], image: str, *, shared_memory: str, grace_s: int) -> dict[str, Any]:
    shared = {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}}
    claims = dict.fromkeys(_claim(text)[0] for text in volumes)
    names = {claim: f"volume-{number}" for number, claim in enumerate(claims)}
    mounts = [{"name": names[claim], "mountPath": path} for claim, path in map(_claim, volumes)]
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace_s + _TERMINATION_MARGIN_S,
        "containers": [
            {
                "name": "node",
                "image": image,
                "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}, *mounts],  # noqa: S108
            }
        ],
        "volumes": [
            shared,
            *({"name": names[claim], "persistentVolumeClaim": {"claimName": claim}} for claim in claims),
        ],
    }


def _claim(text: str) -> tuple[str, str]:
    """CLAIM and PATH of `--volume CLAIM:PATH`."""
    claim, colon, path = text.partition(":")
    if not colon or not path.startswith("/") or not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", claim):
        raise SettingsError(f"--volume {text}: needed CLAIM:PATH; --volume imagenet:/data works")
    return claim, path


def _check(option: str, value: str, form: re.Pattern[str], example: str) -> None:
    if not form.fullmatch(value):
        raise SettingsError(f"{option} {value!r} is no such value of Kubernetes; {option} {example} works")
