"""Which samples a run trains and is evaluated on: parts by name, a held-out fraction, a user's function."""

import numpy as np
import pytest
import torch
from command_line import megabatch
from photographs import TEST_PHOTOS
from tiny_run import tiny_recipe

from megabatch import recipes
from megabatch.app.data import open_data, open_evaluation_data
from megabatch.errors import DataError, SettingsError
from megabatch.runtime import Runtime

PHOTOS = recipes.get("photos")
CODE = """
import numpy as np

class Squares:
    classes = ["dark", "light"]

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return np.full((16, 16), 40 + 150 * (index % 2), dtype=np.uint8), index % 2

def squares(part):
    return Squares({"train": 32, "val": 8}[part])

def train_only(part):
    return Squares(32) if part == "train" else None
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path / "mine.py"


def test_a_folder_without_val_is_divided_alike_in_every_run():
    one, other = (open_data(PHOTOS, Runtime(data=TEST_PHOTOS / "train", val_fraction=0.25)) for _ in range(2))
    names = [[part.name(i) for i in range(len(part))] for part in (one.train, one.evaluation)]
    assert not set(names[0]) & set(names[1])
    assert len(names[0]) + len(names[1]) == 24
    assert np.array_equal(one.evaluation.labels, other.evaluation.labels)
    assert "training images are held out for evaluation" in one.notes[-1]
    again = open_evaluation_data(PHOTOS, Runtime(data=TEST_PHOTOS / "train", val_fraction=0.25))
    assert [again.evaluation.name(i) for i in range(len(again.evaluation))] == names[1]


def test_parts_can_be_exchanged_by_name():
    usual = open_data(PHOTOS, Runtime(data=TEST_PHOTOS))
    swapped = open_data(PHOTOS, Runtime(data=TEST_PHOTOS, train_split="val", val_split="train"))
    assert len(swapped.train) == len(usual.evaluation)
    assert len(swapped.evaluation) == len(usual.train)


def test_a_fraction_of_a_known_data_set_is_held_out(monkeypatch):
    from megabatch.app import data as module
    from megabatch.data.sources.arrays import ArraySource

    source = ArraySource(torch.zeros(40, 1, 4, 4, dtype=torch.uint8), torch.arange(40) % 4, tuple("abcd"))
    monkeypatch.setattr(module.fetch, "fetch", lambda *_, **__: type("F", (), {"source": "made"}))
    monkeypatch.setattr(module.fetch, "load", lambda *_, **__: (source, source))
    data = open_data(tiny_recipe(), Runtime(val_fraction=0.1))
    assert (len(data.train), len(data.evaluation)) == (36, 4)


def test_a_users_data_trains_from_the_command_line(code, tmp_path):
    small = ["--set", "resolution=16", "--set", "eval_resolution=16", "--set", "global_batch_size=8", "--set"]
    arguments = [*small, "bn_span=4", "--workers", 1, "--steps", 2, "--precision", "fp32"]
    for function in ("squares", "train_only"):
        extra = ["--val-fraction", 0.25] if function == "train_only" else []
        where = ["--data", f"{code}:{function}", *extra, "--output", tmp_path / function]
        done = megabatch("train", "fashion_mnist", *where, *arguments)
        assert done.returncode == 0, done.stderr
        assert f"from function mine.py:{function}" in done.stdout
    said = megabatch("evaluate", tmp_path / "squares", "--data", f"{code}:squares")
    assert "of 8)" in said.stdout


def test_what_no_part_can_be_made_of_is_refused(code):
    with pytest.raises(DataError, match=r"--val-fraction 0.1 holds out a tenth"):
        open_data(tiny_recipe(), Runtime(data=f"{code}:train_only"))
    with pytest.raises(DataError, match=r"no images for 'val'.*or --val-fraction 0.1"):
        open_data(PHOTOS, Runtime(data=TEST_PHOTOS / "train"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": "s3://bucket/set", "val_fraction": 0.1}, "need local data"),
        ({"train_split": "val"}, "--data PATH works"),
        ({"data": TEST_PHOTOS, "val_split": "val", "val_fraction": 0.1}, "exclude each other"),
        ({"data": TEST_PHOTOS, "val_split": "train"}, "are both train"),
    ],
)
def test_contradicting_options_are_refused(options, said):
    with pytest.raises(SettingsError, match=said):
        open_data(tiny_recipe(), Runtime(**options))


def test_a_fraction_out_of_range_is_refused():
    done = megabatch("train", "fashion_mnist", "--val-fraction", 2)
    assert done.returncode == 2
    assert "less than or equal to 0.9" in done.stderr
