"""The images that a model is most surely wrong about: the right ones, on any number of workers, as small pictures."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import encode, photograph
from PIL import Image
from ranks import run_threads
from tiny_run import here, run_tiny, tiny_data, tiny_recipe
from torch import nn

from megabatch.app.mistakes import THUMBNAIL_SIDE, write_mistakes
from megabatch.data.loading.batch import Batch
from megabatch.data.sources.folder import FolderSource
from megabatch.train.evaluate import MOST_MISTAKES, Mistake, evaluate
from megabatch.train.precision import Precision

LOGITS = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(50) % 3


class Numbers:
    """A set whose images are the logits themselves."""

    num_samples = len(LABELS)

    def batches(self, first, last, batch_size):
        for start in range(first, last, batch_size):
            part = slice(start, min(start + batch_size, last))
            yield Batch(LOGITS[part], LABELS[part], part.stop - part.start)


def found_mistakes() -> list[Mistake]:
    mistakes: list[Mistake] = []
    precision = Precision("fp32", torch.device("cpu"))
    evaluate(nn.Identity(), Numbers(), world=here(), precision=precision, block_size=8, mistakes=mistakes)
    return mistakes


def test_the_wrong_predictions_of_the_highest_probability_are_found():
    probability, predicted = LOGITS.double().softmax(1).max(1)
    wrong = [index for index in range(50) if predicted[index] != LABELS[index]]
    surest = sorted(wrong, key=lambda index: -probability[index])[:MOST_MISTAKES]
    found = found_mistakes()
    assert [mistake.index for mistake in found] == surest
    for mistake in found:
        assert (mistake.label, mistake.predicted) == (LABELS[mistake.index], predicted[mistake.index])
        assert mistake.probability == pytest.approx(float(probability[mistake.index]))


def test_three_workers_find_the_same():
    assert run_threads(3, found_mistakes) == [found_mistakes()] * 3


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2])))


def test_small_images_are_kept_without_loss(tmp_path: Path):
    source = tiny_data(tiny_recipe()).evaluation
    write_mistakes(tmp_path / "mistakes.json", source, [Mistake(5, 0, 2, 0.75)], {"step": 3})
    written = json.loads((tmp_path / "mistakes.json").read_text())
    (image,) = written.pop("images")
    assert written == {"step": 3}
    assert (image["name"], image["label"], image["predicted"], image["probability"]) == ("image 5", "a", "c", 0.75)
    np.testing.assert_array_equal(np.asarray(picture(image["thumbnail"])), source.images[5, 0].numpy())


def test_photographs_are_small_and_unreadable_ones_left_out(tmp_path: Path):
    for name, data in (("a/1.jpg", encode(photograph(300, 400))), ("b/2.jpg", b"no picture")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(data)
    mistakes = [Mistake(0, 0, 1, 0.9), Mistake(1, 1, 0, 0.8)]
    write_mistakes(tmp_path / "mistakes.json", FolderSource(tmp_path), mistakes, {})
    (image,) = json.loads((tmp_path / "mistakes.json").read_text())["images"]
    assert image["name"] == "a/1.jpg"
    assert picture(image["thumbnail"]).size == (THUMBNAIL_SIDE, 72)
    assert len(image["thumbnail"]) < 8_000


def test_a_run_keeps_those_of_its_last_evaluation(tmp_path: Path):
    run_tiny(tmp_path, tiny_recipe(), max_steps=1)
    written = json.loads((tmp_path / "mistakes.json").read_text())
    assert written["step"] == 1
    assert 0 < len(written["images"]) <= MOST_MISTAKES
    assert all(image["label"] != image["predicted"] for image in written["images"])
