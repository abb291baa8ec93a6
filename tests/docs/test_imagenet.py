"""The page on ImageNet: its commands parse, its recipes fit the GPUs it names, and the archives unpack."""

import io
import re
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from megabatch import recipes
from megabatch.app.resolve import check
from megabatch.data.sources.dataset import open_train_and_evaluation
from megabatch.runtime import Runtime

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "imagenet.md").read_text()
ROWS = re.findall(r"^\| ([\d,]+) \| `(\w+)` \| ([\d,]+) \| (0\.\d+) \|$", PAGE, flags=re.M)
WNIDS = ("n00000003", "n00000001", "n00000002")  # in the order of their numbers, which is not that of their names


def number(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.mark.parametrize(("gpus", "name", "images", "top1"), ROWS)
def test_a_recipe_fits_its_number_of_gpus_and_has_the_accuracy_that_the_page_names(gpus, name, images, top1):
    recipe = recipes.get(name)
    assert recipe.global_batch_size == number(gpus) * number(images)
    assert f"{recipe.published_top1:.4f}" == top1
    runtime = Runtime(capture="off", precision="bf16")
    assert check(recipe, runtime, world_size=number(gpus), device=torch.device("cuda")) <= number(images)
    assert re.search(rf"train {name} --data", PAGE)


def test_the_page_has_four_sizes_of_machine():
    assert [number(row[0]) for row in ROWS] == [1, 8, 64, 2048]


def jpeg(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, 50, 90)).save(file, "JPEG")
    return file.getvalue()


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_the_archives_of_ilsvrc_2012_become_a_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inner = {}
    for index, wnid in enumerate(WNIDS):
        photos = {f"{wnid}_{i}.JPEG": jpeg(20 * index + i) for i in range(4)}
        inner[f"{wnid}.tar"] = write_tar(tmp_path / "inner.tar", photos).read_bytes()
    train = write_tar(tmp_path / "train.tar", inner)
    truth = (1, 3, 2, 3)
    val = write_tar(tmp_path / "val.tar", {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(i) for i in range(len(truth))})
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O")]
    table = np.array([(index + 1, wnid) for index, wnid in enumerate(WNIDS)], dtype=fields)
    savemat(tmp_path / "meta.mat", {"synsets": table})
    kit = {
        "kit/data/meta.mat": (tmp_path / "meta.mat").read_bytes(),
        "kit/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{label}\n" for label in truth).encode(),
    }
    devkit = write_tar(tmp_path / "devkit.tar.gz", kit, "w:gz")
    monkeypatch.setattr(sys, "argv", ["script", str(train), str(val), str(devkit), "imagenet"])
    runpy.run_path(str(ROOT / "examples" / "imagenet" / "unpack_archives.py"), run_name="__main__")
    found = open_train_and_evaluation(tmp_path / "imagenet")
    train_part, val_part = found.parts.values()
    assert train_part.class_names == val_part.class_names == tuple(sorted(WNIDS))
    assert len(train_part) == 12
    labels = {Path(val_part.name(i)).name: val_part.class_names[val_part.labels[i]] for i in range(len(val_part))}
    assert labels == {f"ILSVRC2012_val_{i + 1:08d}.JPEG": WNIDS[label - 1] for i, label in enumerate(truth)}
