"""Checkpoints: whole or not there, copies not views, the newest intact one taken, the best one kept."""

import errno
import hashlib
import json
import os
import zipfile

import pytest
import torch

from megabatch.errors import CheckpointError
from megabatch.files import sha256_of
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
    digest = hashlib.sha256((tmp_path / "x.pt").read_bytes()).hexdigest()
    facts = {"format": 1, "step": 1, "epoch": 0.0, "top1": None, "sha256": digest, "recipe": {}}
    facts["num_bytes"] = (tmp_path / "x.pt").stat().st_size
    (tmp_path / "x.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="could not be read"):
        open_checkpoint(tmp_path / "x.pt")


NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("content", [NESTED, f'{{"format": {NESTED}}}', '{"format": 1}', "[1]", "1e999", "\0", ""])
def test_a_json_of_any_content_is_named_and_skipped(content, tmp_path):
    write(tmp_path, 1)
    (tmp_path / "step-00000005.json").write_text(content)
    said = []
    assert newest_intact(tmp_path, on_damaged=said.append)[0].step == 1
    assert said[0].startswith("step-00000005.json cannot be read: ")


@pytest.mark.parametrize(
    "facts", [{"step": "1e999"}, {"epoch": float("nan")}, {"top1": "x"}, {"recipe": [1]}, {"step": 4}]
)
def test_a_json_with_impossible_facts_is_named_and_skipped(facts, tmp_path):
    write(tmp_path, 1)
    path = write(tmp_path, 5).path.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    said = []
    assert newest_intact(tmp_path, on_damaged=said.append)[0].step == 1
    assert "step-00000005.json" in said[0]


def test_a_pipe_in_place_of_a_json_does_not_block(tmp_path):
    write(tmp_path, 1)
    os.mkfifo(tmp_path / "step-00000005.json")
    assert newest_intact(tmp_path)[0].step == 1


@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_a_folder_in_place_of_a_checkpoint_is_skipped(suffix, tmp_path):
    write(tmp_path, 1)
    path = write(tmp_path, 5).path.with_suffix(suffix)
    path.unlink()
    path.mkdir()
    said = []
    assert newest_intact(tmp_path, on_damaged=said.append)[0].step == 1
    assert path.name in said[0]


@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_a_folder_where_a_checkpoint_is_to_be_written_is_moved_aside(suffix, tmp_path):
    in_the_way = (tmp_path / "step-00000005").with_suffix(suffix)
    in_the_way.mkdir()
    (in_the_way / "notes").write_text("keep")
    said = []
    writer = CheckpointWriter(tmp_path, {}, keep=1, on_remark=said.append)
    writer.write({"w": torch.zeros(1)}, step=5, epoch=0.0, top1=None)
    writer.wait()
    assert newest_intact(tmp_path)[0].step == 5
    assert (tmp_path / f"{in_the_way.name}.folder" / "notes").read_text() == "keep"
    assert in_the_way.name in said[0]


def test_an_old_checkpoint_that_is_a_folder_does_not_end_the_run(tmp_path):
    path = write(tmp_path, 1).path
    path.unlink()
    path.mkdir()
    said = []
    writer = CheckpointWriter(tmp_path, {}, keep=1, on_remark=said.append)
    writer.write({"w": torch.zeros(1)}, step=5, epoch=0.0, top1=None)
    writer.wait()
    assert [info.step for info in list_checkpoints(tmp_path)] == [5]
    assert "could not be removed" in said[0]


def test_damaged_checkpoints_of_later_steps_do_not_displace_what_was_just_written(tmp_path):
    """After a resume from step 1 the damaged ones of steps 8 and 9 are still there."""
    write(tmp_path, 1)
    for step in (8, 9):
        write(tmp_path, step).path.write_bytes(b"damaged")
    writer = CheckpointWriter(tmp_path, {}, keep=1)
    writer.write({"w": torch.zeros(1)}, step=5, epoch=0.0, top1=None)
    writer.wait()
    assert [info.step for info in list_checkpoints(tmp_path)] == [5]
    assert newest_intact(tmp_path)[0].step == 5


def test_a_run_folder_that_vanished_is_not_created_again(tmp_path):
    writer = CheckpointWriter(tmp_path / "mount" / "run" / "checkpoints", {}, keep=1)
    writer.write({"w": torch.zeros(1)}, step=5, epoch=0.0, top1=None)
    with pytest.raises(CheckpointError, match="No such file"):
        writer.wait()
    assert list(tmp_path.iterdir()) == []


def with_new_checksum(path):
    """Makes the JSON beside `path` describe its present bytes, as an attacker does."""
    data, description = path.read_bytes(), path.with_suffix(".json")
    facts = {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)}
    description.write_text(json.dumps(json.loads(description.read_text()) | facts))


def compressed(path):
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def test_a_decompression_bomb_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, {"w": torch.zeros(1 << 20)}, recipe={}, step=1, epoch=0.0, top1=None).path
    compressed(path)
    assert path.stat().st_size < 100_000
    with_new_checksum(path)
    with pytest.raises(CheckpointError, match="compressed"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(1).expand(1 << 40), "larger than the file"),
        (torch.zeros(3, device="meta"), "without data"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.float16, "dtype"),
    ],
)
def test_what_is_no_dense_tensor_within_the_file_is_refused(value, said, tmp_path):
    path = write(tmp_path, 1).path
    torch.save({"w": value}, path)
    with_new_checksum(path)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(path)


def test_nested_references_that_multiply_are_examined_once(tmp_path):
    nested = [0]
    for _ in range(60):
        nested = [nested, nested]
    path = write(tmp_path, 1).path
    torch.save({"w": nested}, path)
    with_new_checksum(path)
    assert len(open_checkpoint(path)[1]["w"]) == 2


def test_a_disk_that_fails_to_read_is_named_and_the_checkpoint_before_is_taken(tmp_path, monkeypatch):
    import megabatch.train.checkpoint as module

    def failing(path):
        if "5" in path.name:
            raise OSError(errno.EIO, "Input/output error")
        return sha256_of(path)

    for step in (1, 5):
        write(tmp_path, step)
    monkeypatch.setattr(module, "sha256_of", failing)
    said = []
    assert newest_intact(tmp_path, on_damaged=said.append)[0].step == 1
    assert "Input/output error" in said[0]


def test_copy_to_cpu_shares_no_memory():
    tensor = torch.zeros(3)
    copied = copy_to_cpu({"a": [tensor, (tensor,)], "b": 3})
    tensor.fill_(1)
    assert float(copied["a"][0].sum() + copied["a"][1][0].sum()) == 0.0
    assert copied["b"] == 3
