"""`megabatch launch kubernetes`: a job that the published schemas of Kubeflow Trainer and Kubernetes accept."""

import copy
import json
import re

import pytest
from command_line import error_line, megabatch

SIZE = ["--nodes", 4, "--gpus-per-node", 8, "--cpus-per-worker", 12, "--memory", "512Gi", "--shared-memory", "16Gi"]
VOLUMES = ["--volume", "imagenet:/data", "--volume", "runs:/runs"]
TRAIN = ["mlperf_32768", "--data", "/data/my photos; rm x", "--output", "/runs/first"]
NEEDED = "needs the extra kubernetes: kubeflow-trainer-api and kubernetes-validate"


@pytest.fixture(scope="module")
def written():
    options = ["--image", "registry/megabatch:cuda", "--grace-s", 90, "--max-restarts", 5, "--name", "first"]
    done = megabatch("launch", "kubernetes", *options, *SIZE, *VOLUMES, "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    return {item["kind"]: item for item in listed["items"]}


def job_set(written):
    return written["TrainingRuntime"]["spec"]["template"]["spec"]


def job(written):
    return job_set(written)["replicatedJobs"][0]["template"]["spec"]


def job_failure(written, exit_code):
    """Reason and message of the Job when a container ends with that code or, without one, when a pod is disrupted.

    The messages are those of the Job controller of Kubernetes (pkg/controller/job/pod_failure_policy.go).
    """
    for index, rule in enumerate(job(written)["podFailurePolicy"]["rules"]):
        end = f"matching {rule['action']} rule at index {index}"
        if exit_code in rule.get("onExitCodes", {}).get("values", []):
            return "PodFailurePolicy", f"Container node for pod default/a failed with exit code {exit_code} {end}"
        if exit_code is None and "onPodConditions" in rule:
            return "PodFailurePolicy", f"Pod default/a has condition DisruptionTarget {end}"
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


def action_after(written, exit_code=None):
    reason, message = job_failure(written, exit_code)
    for rule in job_set(written)["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"  # the default: at most maxRestarts times


def test_the_job_has_a_worker_per_gpu_and_keeps_arguments_as_they_are(written):
    trainer = written["TrainJob"]["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (4, 8, "registry/megabatch:cuda")
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "96", "memory": "512Gi", "nvidia.com/gpu": "8"}
    assert trainer["command"][:3] == ["python", "-m", "megabatch.comm.torchrun"]
    assert trainer["args"][:4] == ["train", "mlperf_32768", "--resume", "auto"]
    assert trainer["args"][-6:] == ["--grace-s", "90", *TRAIN[1:]]


def test_a_stopped_run_starts_again_without_spending_a_restart_and_has_time_for_a_checkpoint(written):
    policy = job_set(written)["failurePolicy"]
    assert policy["maxRestarts"] == 5
    assert job(written)["template"]["spec"]["terminationGracePeriodSeconds"] > 90
    assert [action_after(written, exit_code=75), action_after(written)] == ["RestartJobSetAndIgnoreMaxRestarts"] * 2


def test_invalid_input_ends_the_job_and_other_failures_spend_restarts(written):
    assert action_after(written, exit_code=2) == "FailJobSet"
    assert action_after(written, exit_code=1) == "RestartJobSet"
    assert action_after(written, exit_code=127) == "RestartJobSet"


def test_volumes_and_shared_memory_are_mounted(written):
    pod = job(written)["template"]["spec"]
    sources = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = {mount["mountPath"]: sources[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted["/dev/shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}  # noqa: S108
    assert mounted["/data"]["persistentVolumeClaim"] == {"claimName": "imagenet"}
    assert mounted["/runs"]["persistentVolumeClaim"] == {"claimName": "runs"}


@pytest.mark.parametrize("kind", ["TrainJob", "TrainingRuntime"])
def test_the_schema_of_kubeflow_knows_every_field(written, kind):
    models = pytest.importorskip("kubeflow_trainer_api.models", reason=NEEDED)
    model = getattr(models, f"TrainerV1alpha1{kind}")
    read = model.from_dict(written[kind])  # checks types, and drops unknown fields
    assert read.to_dict() == written[kind]


def test_the_schema_of_kubernetes_accepts_the_pods(written):
    validate = pytest.importorskip("kubernetes_validate", reason=NEEDED)
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}, "spec": job(written)}
    validate.validate(whole, "1.33", strict=True)
    broken = copy.deepcopy(whole)
    broken["spec"]["template"]["spec"]["unknown"] = 1
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, "1.33", strict=True)


def test_the_job_is_written_to_a_file(tmp_path):
    options = ["--image", "i", "--volume", "c:/d", "--to", tmp_path / "job.yaml"]
    assert megabatch("launch", "kubernetes", *options, "--", *TRAIN).stdout == ""
    assert json.loads((tmp_path / "job.yaml").read_text())["kind"] == "List"


@pytest.mark.parametrize(
    ("option", "works"),
    [
        (["--volume", "imagenet"], "--volume imagenet:/data works"),
        (["--name", "My Job"], "--name resnet works"),
        (["--memory", "much"], "--memory 64Gi works"),
        (["--gpus-per-node", 4, "--workers-per-node", 2], "--workers-per-node 4 works"),
    ],
)
def test_mistakes_are_refused(option, works):
    done = megabatch("launch", "kubernetes", "--image", "i", "--volume", "c:/d", *option, "--", *TRAIN)
    assert works in error_line(done)
