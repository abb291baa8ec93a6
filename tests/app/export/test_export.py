"""Exported files give the checkpoint's logits, and hold what their use needs."""

import dataclasses
import functools
import importlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import encode, photograph
from tiny_run import tiny_recipe

import megabatch
from megabatch.app.export import formats
from megabatch.app.export.card import model_card
from megabatch.app.export.formats import FORMATS, export
from megabatch.app.export.trained import plain_network, trained_model
from megabatch.app.load import load_for_evaluation
from megabatch.comm.launch import World
from megabatch.data.augment.crops import center_boxes
from megabatch.data.jpeg.decode import decode_crop
from megabatch.data.jpeg.gpu import has_torchvision
from megabatch.errors import MegabatchError, SettingsError
from megabatch.recipe import fields_as_json
from megabatch.runtime import Runtime
from megabatch.train.checkpoint import CheckpointInfo

NAMES = ("a", "b", "c", "d")
COLOUR = {"image_channels": 3, "pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (0.2, 0.25, 0.3)}
RESNET18 = tiny_recipe(model="resnet18", stem="large", resolution=((0.0, 32.0),), eval_resolution=32, **COLOUR)


def checkpoint(recipe):
    """An untrained checkpoint whose batch norms have statistics of their own."""
    torch.manual_seed(0)
    network = plain_network(recipe).train()
    network(torch.randn(8, recipe.image_channels, recipe.eval_resolution, recipe.eval_resolution))
    info = CheckpointInfo(Path("step.pt"), 7, 0.5, 0.25, "", 0, fields_as_json(recipe), NAMES)
    return info, {"module": network.state_dict(), "average": None}


def expected_logits(recipe, images):
    """Logits of the model that evaluation uses, on pixels normalised as its loader does."""
    _, state = checkpoint(recipe)
    mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.pixel_mean, recipe.pixel_std))
    model = load_for_evaluation(recipe, Runtime(), state, world=World()).eval()
    return model((images.float() / 255 - mean) / std).detach()


def onnx_logits(path, images):
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    facts = session.get_modelmeta().custom_metadata_map
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), facts


def torch_export_logits(path, images):
    files = dict.fromkeys(["class_names.json", "preprocessing.json", "recipe.json"], "")
    logits = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=files).module()(images)
    return logits, {name.removesuffix(".json"): text for name, text in files.items()}


@pytest.mark.parametrize(
    "recipe",
    [tiny_recipe(bn_eps=1e-3), pytest.param(RESNET18, marks=pytest.mark.slow)],
    ids=lambda recipe: recipe.model,
)
@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_a_graph_file_takes_bytes_of_any_batch_and_holds_names_and_preprocessing(tmp_path, form, recipe):
    if form == "onnx":
        pytest.importorskip("onnxscript")
    path = tmp_path / FORMATS[form].file
    assert export(trained_model(*checkpoint(recipe)), path, form) <= 1e-4
    side = recipe.eval_resolution
    images = torch.randint(0, 256, (5, recipe.image_channels, side, side), dtype=torch.uint8)
    logits, facts = (onnx_logits if form == "onnx" else torch_export_logits)(path, images)
    torch.testing.assert_close(logits, expected_logits(recipe, images), atol=1e-4, rtol=0)
    assert json.loads(facts["class_names"]) == list(NAMES)
    assert json.loads(facts["preprocessing"])["mean"] == list(recipe.pixel_mean)
    assert json.loads(facts["recipe"])["model"] == recipe.model


def test_safetensors_hold_weights_under_the_networks_names_and_the_facts(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    path, model = tmp_path / "model.safetensors", trained_model(*checkpoint(tiny_recipe()))
    assert export(model, path, "safetensors") == 0
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == set(model.pixel_model.network.state_dict())
        assert json.loads(file.metadata()["class_names"]) == list(NAMES)
        assert json.loads(file.metadata()["result"])["top1"] == 0.25


def test_torchvision_loads_the_file_into_its_own_resnet(tmp_path):
    path = tmp_path / "torchvision.pth"
    export(trained_model(*checkpoint(RESNET18)), path, "torchvision")
    content = torch.load(path, weights_only=True)
    assert content["class_names"] == list(NAMES)
    if not has_torchvision():
        pytest.skip("no torchvision built for this torch")
    network = importlib.import_module("torchvision").models.resnet18(num_classes=4)
    network.load_state_dict(content["model"])
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(COLOUR[name])[:, None, None] for name in ("pixel_mean", "pixel_std"))
    found = network.eval()((images.float() / 255 - mean) / std)
    torch.testing.assert_close(found, expected_logits(RESNET18, images), atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{"stem": "small"}, {"blur_pool": True}, {"model": "resnet8", "stem": "auto"}])
def test_a_model_that_torchvision_lacks_is_refused_and_leaves_no_file(tmp_path, changes):
    model = trained_model(*checkpoint(dataclasses.replace(RESNET18, **changes)))
    with pytest.raises(SettingsError, match="safetensors works"):
        export(model, tmp_path / "torchvision.pth", "torchvision")
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_other_logits_is_not_kept(tmp_path, monkeypatch):
    wrong = dataclasses.replace(FORMATS["torch-export"], read=lambda model, _: lambda x: model.pixel_model(x) + 1e-3)
    monkeypatch.setitem(formats.FORMATS, "torch-export", wrong)
    with pytest.raises(MegabatchError, match=r"differ by 0\.001"):
        export(trained_model(*checkpoint(tiny_recipe())), tmp_path / "model.pt2", "torch-export")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", [tiny_recipe(), tiny_recipe(**COLOUR)], ids=["grey", "colour"])
@pytest.mark.parametrize("output_format", ["torch-export", pytest.param("onnx", marks=pytest.mark.slow)])
def test_the_cards_program_reads_a_photo_as_evaluation_does_and_prints_its_class(
    tmp_path, monkeypatch, capsys, output_format, recipe
):
    if output_format == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    model, file = trained_model(*checkpoint(recipe)), FORMATS[output_format].file
    export(model, tmp_path / file, output_format)
    photo = encode(photograph(70, 90, seed=3), "PNG")
    (tmp_path / "photo.jpg").write_bytes(photo)
    monkeypatch.chdir(tmp_path)
    used: dict = {}
    for code in re.findall(r"```python\n(.*?)```", model_card(model, tmp_path), re.DOTALL):
        exec(code, used)  # noqa: S102
    (box,) = center_boxes(np.array([70]), np.array([90]), crop_ratio=recipe.eval_crop_ratio).tolist()
    crop = decode_crop(photo, box=tuple(box), size=recipe.eval_resolution, channels=recipe.image_channels)
    read = used["read"]("photo.jpg")
    assert read.shape == (1, recipe.image_channels, recipe.eval_resolution, recipe.eval_resolution)
    assert np.abs(read[0].astype(int) - crop.transpose(2, 0, 1)).max() <= 1
    logits = model.pixel_model(torch.from_numpy(read.copy()))
    assert torch.allclose(torch.as_tensor(used["logits"]), logits, atol=1e-4)
    assert capsys.readouterr().out.splitlines()[-1] == NAMES[logits.argmax()]


@pytest.mark.parametrize("recipe", [tiny_recipe(bn_eps=1e-3), RESNET18], ids=lambda recipe: recipe.model)
def test_the_cards_code_creates_the_network_of_the_file(tmp_path, recipe):
    (tmp_path / "model.safetensors").touch()
    model = trained_model(*checkpoint(recipe))
    card = model_card(model, tmp_path)
    code = re.search(r"^network = (megabatch\.create_model\(.*\))$", card, re.MULTILINE)[1]
    network = eval(code, {"megabatch": megabatch, "functools": functools, "torch": torch}).eval()  # noqa: S307
    network.load_state_dict(model.pixel_model.network.state_dict())
    images = torch.randn(2, recipe.image_channels, recipe.eval_resolution, recipe.eval_resolution)
    assert torch.equal(network(images), model.pixel_model.network(images))
    assert "Top-1 on the evaluation set: 0.2500 (step 7, epoch 0.50)" in card
    assert "0. a\n1. b" in card
    assert "model.onnx:\n" not in card
