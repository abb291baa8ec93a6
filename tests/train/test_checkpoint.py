"""Checkpoints: whole or not there, copies not views, the newest intact one taken, the best one kept."""

import json

import pytest
import torch

from megabatch.errors import CheckpointError
from megabatch.train.checkpoint import (
    CheckpointWriter,
    copy_to_cpu,
    list_checkpoints,
    newest_intact,
    open_checkpoint,
    write_checkpoint,
)


def write(folder, step, top1=None, value=1.0):
    return write_checkpoint(
        folder,
        {"w": torch.full((3,), value), "step": step},
        recipe={"name": "x"},
        step=step,
        epoch=step / 10,
        top1=top1,
    )


def test_what_is_written_is_read_back(tmp_path):
    write(tmp_path, 7, top1=0.5, value=2.5)
    info, state = open_checkpoint(tmp_path / "step-00000007.pt")
    assert (info.step, info.top1, info.recipe) == (7, 0.5, {"name": "x"})
    assert torch.equal(state["w"], torch.full((3,), 2.5))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    path = tmp_path / "step-00000002.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    said = []
    info, _ = newest_intact(tmp_path, on_damaged=said.append)
    assert info.step == 1
    assert "step-00000002.pt is damaged" in said[0]


def test_a_truncated_checkpoint_is_refused(tmp_path):
    write(tmp_path, 1)
    path = tmp_path / "step-00000001.pt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(path)


def test_a_checkpoint_without_its_json_does_not_exist(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "step-00000002.json").unlink()
    assert [info.step for info in list_checkpoints(tmp_path)] == [1]
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        open_checkpoint(tmp_path / "step-00000002.pt")


def test_a_torn_json_is_named_and_skipped(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "step-00000005.json").write_text('{"format": 1, "st')
    said = []
    assert [info.step for info in list_checkpoints(tmp_path, on_damaged=said.append)] == [1]
    assert "step-00000005.json" in said[0]


def test_another_format_is_refused(tmp_path):
    info = write(tmp_path, 1)
    facts = json.loads(info.path.with_suffix(".json").read_text()) | {"format": 99}
    info.path.with_suffix(".json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="format 99"):
        open_checkpoint(info.path)


def test_an_empty_folder_holds_no_checkpoint(tmp_path):
    assert newest_intact(tmp_path) is None
    with pytest.raises(CheckpointError, match="no checkpoint"):
        open_checkpoint(tmp_path)


def test_the_newest_and_the_best_are_kept(tmp_path):
    writer = CheckpointWriter(tmp_path, {"name": "x"}, keep=2)
    for step, top1 in enumerate([0.1, 0.9, 0.3, 0.4, 0.5], start=1):
        writer.write({"w": torch.zeros(1)}, step=step, epoch=0.0, top1=top1)
    writer.wait()
    assert [info.step for info in list_checkpoints(tmp_path)] == [2, 4, 5]
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [f"step-{n:08d}.pt" for n in (2, 4, 5)]
    assert open_checkpoint(tmp_path)[0].step == 2


def test_updates_after_write_do_not_leak_into_the_file(tmp_path, monkeypatch):
    import megabatch.train.checkpoint as module

    weights = torch.zeros(1000)
    original, updated = module.write_checkpoint, []

    def late(folder, state, **facts):
        weights.add_(1.0)  # the training step that follows the call, before a byte is written
        updated.append(True)
        return original(folder, state, **facts)

    monkeypatch.setattr(module, "write_checkpoint", late)
    writer = CheckpointWriter(tmp_path, {}, keep=1)
    writer.write({"model": {"w": weights}, "list": [weights]}, step=1, epoch=0.0, top1=None)
    writer.wait()
    _, state = open_checkpoint(tmp_path)
    assert updated
    assert float(weights.sum()) == 1000.0
    assert float(state["model"]["w"].sum()) == 0.0
    assert float(state["list"][0].sum()) == 0.0


def test_a_write_that_fails_is_said(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    writer = CheckpointWriter(blocked, {}, keep=1)
    writer.write({"w": torch.zeros(1)}, step=1, epoch=0.0, top1=None)
    with pytest.raises(CheckpointError, match="could not be written"):
        writer.wait()


def test_a_file_with_code_in_it_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"w": Evil()}, tmp_path / "x.pt")
    import hashlib

    digest = hashlib.sha256((tmp_path / "x.pt").read_bytes()).hexdigest()
    facts = {"format": 1, "step": 1, "epoch": 0.0, "top1": None, "sha256": digest, "recipe": {}}
    facts["num_bytes"] = (tmp_path / "x.pt").stat().st_size
    (tmp_path / "x.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="could not be read"):
        open_checkpoint(tmp_path / "x.pt")


def test_copy_to_cpu_shares_no_memory():
    tensor = torch.zeros(3)
    copied = copy_to_cpu({"a": [tensor, (tensor,)], "b": 3})
    tensor.fill_(1)
    assert float(copied["a"][0].sum() + copied["a"][1][0].sum()) == 0.0
    assert copied["b"] == 3
