"""Copies of the state in a host's memory: written and removed, read by workers of other hosts, refused if too large."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_threads
from tiny_run import here, run_tiny, tiny_recipe

from megabatch.app.measured.choices import CHOICES_FILE, keep_choices, with_earlier_choices
from megabatch.comm.launch import World
from megabatch.errors import SettingsError
from megabatch.runtime import Runtime
from megabatch.train import loop
from megabatch.train.checkpoint import agree_on_checkpoint, list_checkpoints, write_checkpoint
from megabatch.train.health import memory_copies
from megabatch.train.health.memory_copies import MemoryCopies, copies_folder, remove_outdated_copies

RUNTIME = Runtime(precision="fp32", micro_batch_size=8, memory_copy_every_steps=2, checkpoint_every="never")
STATE = {"module": {"weight": torch.arange(1024.0)}}


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(memory_copies, "MEMORY", folder)
    return folder


def run_until_step_4(folder, recipe, monkeypatch):
    def break_off(run, settings, batches):
        if settings.step == 4:
            raise RuntimeError("lost")
        return start_step(run, settings, batches)

    start_step = loop.start_step
    with monkeypatch.context() as patch:
        patch.setattr(loop, "start_step", break_off)
        with pytest.raises(RuntimeError, match="lost"):
            run_tiny(folder, recipe, runtime=RUNTIME)


def test_a_run_that_lost_its_disk_continues_from_memory_and_frees_it_at_the_end(tmp_path, monkeypatch, memory):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    recipe = tiny_recipe()
    whole = run_tiny(tmp_path / "whole", recipe)
    run_until_step_4(tmp_path / "run", recipe, monkeypatch)
    assert [info.step for info in list_checkpoints(copies_folder(tmp_path / "run"))] == [4]
    assert copies_folder(tmp_path / "run").stat().st_mode & 0o777 == 0o700
    shutil.rmtree(tmp_path / "run")
    resumed = run_tiny(tmp_path / "run", recipe, runtime=dataclasses.replace(RUNTIME, resume=True))
    assert resumed["losses"] == whole["losses"][4:]
    assert all(torch.equal(whole["weights"][name], resumed["weights"][name]) for name in whole["weights"])
    assert not list(memory.iterdir())


def test_copies_of_a_deleted_run_or_of_another_job_are_not_used(tmp_path, monkeypatch, memory):
    run_until_step_4(tmp_path / "run", tiny_recipe(), monkeypatch)
    remove_outdated_copies(tmp_path / "run", resume=True, has_run=True)
    assert list(memory.iterdir())
    shutil.rmtree(tmp_path / "run")
    remove_outdated_copies(tmp_path / "run", resume=True, has_run=False)
    assert not list(memory.iterdir())
    own = copies_folder(tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    assert copies_folder(tmp_path / "run") != own
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "megabatch-12")  # local workers: another id after a restart
    assert copies_folder(tmp_path / "run") == own


def newest_of_two_hosts(folder):
    rank = dist.get_rank()
    state = {"step": rank, **STATE}
    if rank == 1:
        write_checkpoint(folder / "host1", state, recipe={}, step=8, epoch=1.0, top1=None)
    if rank == 2:
        write_checkpoint(folder / "host2", state, recipe={}, step=6, epoch=1.0, top1=None)
    info, found = agree_on_checkpoint([folder / "nothing", folder / f"host{rank}"], here())
    return info.step, found["step"], found["module"]["weight"]


def test_all_workers_receive_the_newest_state_that_any_host_holds(tmp_path):
    for step, rank, weight in run_threads(3, newest_of_two_hosts, tmp_path):
        assert (step, rank) == (8, 1)
        assert torch.equal(weight, STATE["module"]["weight"])


def test_only_the_newest_copy_is_kept_and_states_that_were_given_up_are_removed(tmp_path):
    copies = MemoryCopies(tmp_path / "run", {}, class_names=("a",))
    for step in (2, 4):
        copies.write(STATE, step=step, epoch=0.0, top1=None)
    copies.wait()
    assert [info.step for info in list_checkpoints(copies.folder)] == [4]
    copies.clear()
    assert not list_checkpoints(copies.folder)


def test_the_run_keeps_its_measured_choices_when_its_folder_is_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    run_until_step_4(tmp_path / "run", tiny_recipe(), monkeypatch)
    chosen = json.loads((tmp_path / "run" / CHOICES_FILE).read_text())
    copied = copies_folder(tmp_path / "run") / CHOICES_FILE
    assert json.loads(copied.read_text()) == chosen
    other = chosen | {"channels_last": not chosen["channels_last"], "fusion": "plain"}  # would not be chosen again
    copied.write_text(json.dumps(other))
    shutil.rmtree(tmp_path / "run")
    run_tiny(tmp_path / "run", tiny_recipe(), runtime=dataclasses.replace(RUNTIME, resume=True))
    assert json.loads((tmp_path / "run" / CHOICES_FILE).read_text()) == other


def choices_of_two_hosts(folder):
    rank = dist.get_rank()
    run = folder / f"host{rank}"
    if rank == 1:
        copies_folder(run).mkdir()
        known = dataclasses.replace(RUNTIME, channels_last=False, fusion="plain")
        keep_choices(known, copies_folder(run), precision="fp32", world=here())
    return with_earlier_choices(RUNTIME, run, world=World(rank, 2, 0, 1))


def test_a_new_first_host_takes_the_choices_from_the_memory_of_another(tmp_path):
    found = run_threads(2, choices_of_two_hosts, tmp_path)
    assert [(runtime.channels_last, runtime.fusion) for runtime in found] == [(False, "plain")] * 2


def test_too_little_memory_is_refused_with_the_size_needed(tmp_path, monkeypatch):
    copies = MemoryCopies(tmp_path / "run", {}, class_names=("a",))
    monkeypatch.setattr(memory_copies.shutil, "disk_usage", lambda _: SimpleNamespace(free=6 << 10))
    state = {"module": {"weight": torch.zeros(1024)}, "optimizer": [torch.zeros(512)]}  # 6 KiB, needed twice
    with pytest.raises(SettingsError, match=r"need 0 MiB of .*memory-copy-every-steps 0 works"):
        copies.write(state, step=2, epoch=0.0, top1=None)
    monkeypatch.setattr(memory_copies.shutil, "disk_usage", lambda _: SimpleNamespace(free=12 << 10))
    copies.write(state, step=2, epoch=0.0, top1=None)
    copies.wait()


def test_a_folder_of_another_user_and_a_system_without_memory_are_refused(tmp_path, monkeypatch, memory):
    copies_folder(tmp_path / "run").mkdir()
    monkeypatch.setattr("os.getuid", lambda: memory.stat().st_uid + 1)
    with pytest.raises(SettingsError, match="belongs to another user"):
        MemoryCopies(tmp_path / "run", {}, class_names=("a",))
    monkeypatch.setattr(memory_copies, "MEMORY", tmp_path / "missing")
    with pytest.raises(SettingsError, match="which Linux has"):
        MemoryCopies(tmp_path / "run", {}, class_names=("a",))
