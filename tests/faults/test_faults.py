"""Faults in real runs: a short campaign of the harness behind `make faults`, and the harness's own counts."""

import json
import shutil
import signal
import subprocess

import pytest
import torch
from fault_runs import (
    KINDS,
    Fault,
    Verdict,
    count_samples,
    differences,
    draw_faults,
    judge,
    run_campaign,
    run_with_faults,
)
from host_runs import HostFault, run_with_host_faults
from lab import LabUnavailable, NetworkLab
from plain_photos import write_plain_photos
from tiny_run import run_tiny, tiny_recipe

from megabatch.observe.events import read_events

SETTINGS = ["model=resnet8", "resolution=0:16", "eval_resolution=16", "bn_span=4", "global_batch_size=16"]
SETTINGS += ["total_epochs=300", "eval_every_epochs=100000"]


@pytest.fixture
def arguments(tmp_path):
    """Arguments of a run over 48 photographs that makes 900 steps."""
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    photos = write_plain_photos(tmp_path / "photos", train=24)
    given = ["photos", "--data", str(photos), "--precision", "fp32", "--workers", "2", *settings]
    return [*given, "--checkpoint-every", "20steps", "--peer-timeout-s", "5"]


def test_faults_of_each_kind_are_drawn_in_turn_and_equal_for_equal_seeds():
    faults = draw_faults(3, 10, num_workers=4)
    assert faults == draw_faults(3, 10, num_workers=4)
    assert faults != draw_faults(4, 10, num_workers=4)
    assert [fault.kind for fault in faults] == [*KINDS, *KINDS]


def test_a_lost_and_a_repeated_step_and_another_weight_are_found(tmp_path):
    run_tiny(tmp_path / "unharmed", tiny_recipe())
    shutil.copytree(tmp_path / "unharmed", tmp_path / "other")
    assert judge(tmp_path / "other", tmp_path / "unharmed").differing == ()
    assert count_samples(tmp_path / "unharmed").tolist() == [1] * 480
    path = tmp_path / "other" / "events.jsonl"
    events = read_events(path)
    third = next(event for event in events if event.get("step") == 3)
    lines = [event for event in events if event is not third]
    path.write_text("".join(json.dumps(event) + "\n" for event in lines))
    assert judge(tmp_path / "other", tmp_path / "unharmed").num_lost_samples == 48
    fourth = next(event for event in events if event.get("step") == 4)
    third["epoch"] = fourth["epoch"]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert judge(tmp_path / "other", tmp_path / "unharmed").num_repeated_samples == 48
    assert list(differences({"a": [torch.zeros(2), 1]}, {"a": [torch.tensor([0.0, 1e-30]), 1]})) == ["state.a.0"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_recovers_from_faults_of_each_kind_and_ends_bitwise_as_an_unharmed_one(arguments, tmp_path):
    faults = draw_faults(0, 3, num_workers=2, kinds=("kill worker", "freeze worker", "kill launcher"))
    recoveries, verdicts = run_campaign(tmp_path / "runs", arguments, faults, say=print)
    assert [recovery.fault for recovery in recoveries] == faults
    assert [recovery.exit_codes for recovery in recoveries] == [(), (), (-signal.SIGKILL,)]
    assert set(verdicts) == {Verdict(0, 0, 0, ())}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_torchrun_restarts_workers_of_which_one_was_killed_or_terminated(arguments, tmp_path):
    faults = [Fault("kill worker", 0, 0.5), Fault("terminate worker", 1, 0.5)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    recoveries, num_orphans = run_with_faults(tmp_path / "run", arguments, faults, say=print, launcher=torchrun)
    assert [(recovery.fault, recovery.exit_codes) for recovery in recoveries] == [(fault, ()) for fault in faults]
    assert num_orphans == 0
    assert set(count_samples(tmp_path / "run").tolist()) == {1}


@pytest.fixture
def two_hosts():
    try:
        with NetworkLab(2, rate_mbit=1000) as lab:
            yield lab
    except (LabUnavailable, subprocess.CalledProcessError, OSError) as missing:
        pytest.skip(f"network namespaces cannot be made: {missing}")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_hosts_that_are_cut_off_or_killed_end_are_replaced_and_change_nothing(arguments, two_hosts, tmp_path):
    shorter = [word.replace("epochs=300", "epochs=60") for word in arguments]  # 180 steps
    run_with_host_faults(tmp_path / "unharmed", shorter, [], lab=two_hosts, say=print)
    faults = [HostFault("cut link", 1, 0.5), HostFault("kill host", 0, 0.5)]
    recoveries, num_orphans, run = run_with_host_faults(tmp_path / "run", shorter, faults, lab=two_hosts, say=print)
    assert [recovery.fault for recovery in recoveries] == faults
    assert judge(run, tmp_path / "unharmed-host0", num_orphans=num_orphans) == Verdict(0, 0, 0, ())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_that_lost_a_host_and_its_disk_continues_from_the_memory_of_the_other(arguments, two_hosts, tmp_path):
    changes = {"total_epochs=300": "total_epochs=60", "20steps": "never"}
    copied = [*(changes.get(word, word) for word in arguments), "--memory-copy-every-steps", "10"]
    run_with_host_faults(tmp_path / "unharmed", copied, [], lab=two_hosts, say=print)
    faults = [HostFault("lose host and disk", host, 2.0) for host in (0, 1)]
    recoveries, num_orphans, run = run_with_host_faults(
        tmp_path / "run", copied, faults, lab=two_hosts, say=print, own_disks=True
    )
    assert all(recovery.from_step > 0 for recovery in recoveries)
    assert judge(run, tmp_path / "unharmed-host0", num_orphans=num_orphans) == Verdict(0, 0, 0, ())
