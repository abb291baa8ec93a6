"""Classes of a data set and of a checkpoint are matched by name, when a model is evaluated and when a run resumes."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny_run import run_tiny, tiny_data, tiny_recipe

from megabatch.app.classes import match_evaluation_data, match_training_data
from megabatch.app.data import Data
from megabatch.app.load import load_model
from megabatch.data.sources.arrays import ArraySource
from megabatch.data.sources.folder import FolderSource
from megabatch.data.sources.protocol import ReadsAhead
from megabatch.errors import DataError
from megabatch.observe.events import read_events
from megabatch.runtime import Runtime
from megabatch.train.checkpoint import CheckpointInfo, open_checkpoint

FP32 = Runtime(precision="fp32", micro_batch_size=8)
RESUME = dataclasses.replace(FP32, resume=True)


def checkpoint(names, num_classes=None):
    count = num_classes or len(names)
    return CheckpointInfo(None, 1, 1.0, None, "", 0, {"num_classes": count}, names)


def source(names, labels=None):
    """One black image per class, or per label."""
    labels = torch.arange(len(names)) if labels is None else torch.tensor(labels)
    return ArraySource(torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), labels, names)


def test_equal_classes_leave_a_source_as_it_is():
    data = source(("cat", "dog"))
    assert match_evaluation_data(data, checkpoint(("cat", "dog"))) == (data, [])


def test_classes_in_another_order_get_the_models_numbers():
    data, remarks = match_evaluation_data(
        source(("dog", "owl", "cat"), [0, 0, 1, 2]), checkpoint(("cat", "dog", "owl"))
    )
    assert data.labels.tolist() == [1, 1, 2, 0]
    assert data.class_names == ("cat", "dog", "owl")
    assert remarks == []


def test_a_source_of_files_is_renumbered_and_shares_what_it_has_open(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(name.encode())
    files = FolderSource(tmp_path)
    renumbered, _ = match_evaluation_data(files, checkpoint(("b", "a")))
    assert (files.labels.tolist(), files.class_names) == ([0, 1], ("a", "b"))
    assert (renumbered.labels.tolist(), renumbered.class_names) == ([1, 0], ("b", "a"))
    assert [renumbered.read(index) for index in range(2)] == [b"a", b"b"]
    assert renumbered.labels.dtype == np.int64


def test_a_renumbered_source_still_reads_ahead():
    class Shards:
        shard_sizes = (1, 1)
        class_names = ("a", "b")
        labels = np.array([0, 1])

        def will_read(self, indices):
            """Prefetches nothing."""

    renumbered, _ = match_evaluation_data(Shards(), checkpoint(("b", "a")))
    assert isinstance(renumbered, ReadsAhead)
    assert renumbered.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("names", "labels"),
    [(("dog",), [0]), (("cat", "dog", "owl"), [1, 1])],
    ids=["no folder for them", "folders without images"],
)
def test_evaluation_data_may_lack_classes_of_the_model_and_a_remark_names_them(names, labels):
    data, remarks = match_evaluation_data(source(names, labels), checkpoint(("cat", "dog", "owl")))
    assert set(data.labels.tolist()) == {1}
    assert remarks == ["the data has images of 1 of the model's 3 classes; no cat, owl"]


def test_unknown_classes_are_refused_with_the_first_names_of_both_sides():
    model = checkpoint(tuple("abcdef"))
    with pytest.raises(DataError, match=r"know: v, w, x and 2 more; its classes are a, b, c and 3 more; .* works"):
        match_evaluation_data(source(("a", "v", "w", "x", "y", "z")), model)


@pytest.mark.parametrize(
    ("of_data", "of_model", "numbers"),
    [
        (("0", "1", "2"), ("cat", "dog", "owl"), [0, 1, 2]),
        (("2", "0", "1"), ("cat", "dog", "owl"), [2, 0, 1]),
        (("cat", "dog", "owl"), ("0", "1", "2"), [0, 1, 2]),
        (("cat", "dog", "owl"), ("1", "2", "0"), [2, 0, 1]),
    ],
)
def test_numbers_on_one_side_are_matched_by_number_and_said(of_data, of_model, numbers):
    data, remarks = match_evaluation_data(source(of_data), checkpoint(of_model))
    assert data.labels.tolist() == numbers
    assert data.class_names == of_model
    assert len(remarks) == 1
    assert "no class names" in remarks[0]


def test_numbers_on_both_sides_are_names():
    by_bytes = tuple(sorted(map(str, range(11))))  # 0, 1, 10, 2, ...
    data, remarks = match_evaluation_data(source(tuple(map(str, range(11)))), checkpoint(by_bytes))
    assert [by_bytes[label] for label in data.labels] == [str(number) for number in range(11)]
    assert remarks == []
    with pytest.raises(DataError, match="know: 2;"):
        match_evaluation_data(source(("0", "1", "2")), checkpoint(("0", "1")))


@pytest.mark.parametrize(("of_data", "of_model"), [(("0", "1"), ("a", "b", "c")), (("a", "b"), ("0", "1", "2"))])
def test_another_number_of_classes_without_names_is_refused(of_data, of_model):
    with pytest.raises(DataError, match="2 classes, the checkpoint 3"):
        match_evaluation_data(source(of_data), checkpoint(of_model))


def test_of_a_checkpoint_without_names_the_number_is_compared():
    _, remarks = match_evaluation_data(source(("a", "b")), checkpoint(None, 2))
    assert remarks == ["the checkpoint stores no class names: only their number, 2, was compared"]
    with pytest.raises(DataError, match="3 classes, the checkpoint 2"):
        match_evaluation_data(source(("a", "b", "c")), checkpoint(None, 2))


def test_training_data_needs_every_class_and_its_evaluation_part_may_lack_one():
    model = checkpoint(("cat", "dog", "owl"))
    data, _ = match_training_data(Data(source(("owl", "dog", "cat")), source(("owl", "cat")), "made"), model)
    assert data.train.labels.tolist() == [2, 1, 0]
    assert data.evaluation.labels.tolist() == [2, 0]
    with pytest.raises(DataError, match=r"lacks classes of the checkpoint: cat, owl; .* works"):
        match_training_data(Data(source(("dog",)), source(("dog",)), "made"), model)


def renamed(data, names):
    parts = {part: dataclasses.replace(getattr(data, part), class_names=names) for part in ("train", "evaluation")}
    return dataclasses.replace(data, **parts)


def reversed_classes(data):
    """The same images with the classes in reverse order."""
    parts = {}
    for part in ("train", "evaluation"):
        one = getattr(data, part)
        parts[part] = ArraySource(one.images, len(one.class_names) - 1 - one.labels, one.class_names[::-1])
    return dataclasses.replace(data, **parts)


def test_a_run_resumes_bitwise_on_data_whose_classes_have_another_order(tmp_path):
    recipe = tiny_recipe()
    data = tiny_data(recipe)
    whole = run_tiny(tmp_path / "whole", recipe, data=data)
    run_tiny(tmp_path / "cut", recipe, data=data, stop_at=4)
    resumed = run_tiny(tmp_path / "cut", recipe, data=reversed_classes(data), runtime=RESUME)
    assert resumed["losses"] == whole["losses"][4:]
    assert resumed["correct"] == whole["correct"]
    assert open_checkpoint(tmp_path / "cut")[0].class_names == ("a", "b", "c", "d")


def test_a_run_does_not_resume_on_data_with_a_renamed_class(tmp_path):
    recipe = tiny_recipe()
    run_tiny(tmp_path, recipe, max_steps=2)
    with pytest.raises(DataError, match=r"know: z; its classes are a, b, c and 1 more; .* another --output"):
        run_tiny(tmp_path, recipe, data=renamed(tiny_data(recipe), ("a", "b", "c", "z")), runtime=RESUME)


def test_a_run_without_stored_names_resumes_with_a_warning_and_stores_them_from_then_on(tmp_path):
    recipe = tiny_recipe()
    run_tiny(tmp_path, recipe, max_steps=2)
    for path in (tmp_path / "checkpoints").glob("*.json"):
        facts = json.loads(path.read_text())
        assert facts.pop("class_names") == ["a", "b", "c", "d"]
        path.write_text(json.dumps(facts))
    assert load_model(tmp_path).class_names == ("0", "1", "2", "3")
    run_tiny(tmp_path, recipe, runtime=RESUME)
    warnings = [event["text"] for event in read_events(tmp_path / "events.jsonl") if event["event"] == "warning"]
    assert "the checkpoint stores no class names: only their number, 4, was compared" in warnings
    assert load_model(tmp_path).class_names == ("a", "b", "c", "d")
