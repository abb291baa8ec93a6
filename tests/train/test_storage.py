"""Storage faults during a run: the newest intact checkpoint survives, and the line says what to do."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from limits import HANG_S
from tiny_run import run_tiny, tiny_recipe

import megabatch.train.checkpoint as module
from megabatch.errors import CheckpointError, SettingsError
from megabatch.observe.events import read_events
from megabatch.observe.run_folder import claimed
from megabatch.runtime import Runtime
from megabatch.train.checkpoint import CheckpointWriter, newest_intact

RUNTIME = Runtime(precision="fp32", micro_batch_size=8, checkpoint_every="1steps")


def write(writer, step):
    writer.write({"w": torch.full((1000,), float(step))}, step=step, epoch=0.0, top1=None)
    writer.wait()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("written", [0, 1000])
def test_a_write_that_fails_leaves_the_checkpoint_before_it_and_no_part(number, written, tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, {}, keep=1)
    write(writer, 1)

    def failing(_, file):
        file.write(b"x" * written)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module.torch, "save", failing)
    with pytest.raises(CheckpointError, match=rf"{os.strerror(number)}.*earlier ones are kept.*--resume"):
        write(writer, 2)
    assert newest_intact(tmp_path)[0].step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001.json", "step-00000001.pt"]


@pytest.mark.parametrize("cut", ["after .pt", "before .pt"])
def test_a_process_killed_while_it_writes_leaves_the_checkpoint_before_it(cut, tmp_path):
    writer = CheckpointWriter(tmp_path, {}, keep=1)
    write(writer, 1)
    torn = tmp_path / ("step-00000002.pt" if cut == "after .pt" else ".step-00000002.pt.1-1.part")
    torn.write_bytes(b"half")
    assert newest_intact(tmp_path)[0].step == 1
    write(writer, 2)
    assert newest_intact(tmp_path)[0].step == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_a_clock_that_jumps_changes_neither_steps_nor_their_durations(tmp_path, monkeypatch):
    """The clock goes back a year between every two calls; the run is also resumed with an earlier clock."""
    now = [time.time()]

    def jumping():
        now[0] -= 365 * 86400
        return now[0]

    monkeypatch.setattr(time, "time", jumping)
    run_tiny(tmp_path, tiny_recipe(), runtime=RUNTIME, max_steps=3)
    run_tiny(tmp_path, tiny_recipe(), runtime=dataclasses.replace(RUNTIME, resume=True), max_steps=2)
    steps = [event for event in read_events(tmp_path / "events.jsonl") if event["event"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3, 4, 5]
    assert all(event["images_per_s"] > 0 for event in steps)
    assert newest_intact(tmp_path / "checkpoints")[0].step == 5


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from megabatch.observe.run_folder import claimed\n"
        "with claimed(Path(sys.argv[1]), resume=True):\n    print('claimed', flush=True)\n    time.sleep(900)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout.readline() == "claimed\n"
            refused = pytest.raises(SettingsError, match=r"another process is writing to .*; another --output starts")
            with refused, claimed(tmp_path, resume=True):
                pass
        finally:
            first.send_signal(signal.SIGKILL)
            first.wait(HANG_S)
    with claimed(tmp_path, resume=True) as events:
        assert events.name == "events.jsonl"
