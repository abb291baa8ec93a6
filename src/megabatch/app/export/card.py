"""A model card in Markdown: what the model is, how it was trained and evaluated, and how its files are used."""

import json
from pathlib import Path

from torch.nn import BatchNorm2d

from megabatch.app.export.formats import FORMATS
from megabatch.app.export.trained import Trained
from megabatch.files import printable
from megabatch.recipe import Recipe
from megabatch.user_code import is_function

_READ = """\
```python
import numpy
from PIL import Image

def read(path):  # uint8 [1, {channels}, {side}, {side}]
    photo = Image.open(path).convert("{mode}")
    length = max(1, round({ratio} * min(photo.size)))
    left, top = (photo.width - length) // 2, (photo.height - length) // 2
    crop = photo.crop((left, top, left + length, top + length))
    pixels = numpy.asarray(crop.resize(({side}, {side}), Image.Resampling.BILINEAR))
    return numpy.atleast_3d(pixels).transpose(2, 0, 1)[None]
```"""
"""The preprocessing as a function of numpy and Pillow, for programs without megabatch."""

_USE = {
    "model.safetensors": """\
```python
import safetensors.torch
{create}
network.load_state_dict(safetensors.torch.load_file("model.safetensors"))  # its input is normalised, see above
```""",
    "torchvision.pth": """\
```python
network = torchvision.models.{model}({torchvision})
network.load_state_dict(torch.load("torchvision.pth", weights_only=True)["model"])  # its input is normalised
```""",
    "model.onnx": """\
```python
import json
import onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
(logits,) = session.run(None, {{"images": read("photo.jpg")}})  # several images: uint8 [n, {channels}, {side}, {side}]
print(names[logits[0].argmax()])
```""",
    "model.pt2": """\
```python
import json
import torch
names = {{"class_names.json": ""}}
program = torch.export.load("model.pt2", extra_files=names).module()
logits = program(torch.from_numpy(read("photo.jpg").copy()))  # several images: uint8 [n, {channels}, {side}, {side}]
print(json.loads(names["class_names.json"])[logits[0].argmax()])
```""",
}


def model_card(model: Trained, folder: Path) -> str:
    """The card of the files in `folder`."""
    recipe, info = model.recipe, model.info
    top1 = "not evaluated" if info.top1 is None else f"{info.top1:.4f}"
    parameters = sum(weight.numel() for weight in model.pixel_model.network.parameters())
    files = [form.file for form in FORMATS.values() if (folder / form.file).is_file()]
    steps = json.dumps(model.preprocessing, indent=1)
    sections = [
        "---\nlibrary_name: megabatch\npipeline_tag: image-classification\n---",
        f"# {recipe.name}: {recipe.model}, {info.num_classes} classes",
        f"{recipe.model} with {parameters:,} parameters, trained by megabatch. Input: images of "
        f"{recipe.eval_resolution} x {recipe.eval_resolution} pixels, {recipe.image_channels} channel(s). "
        "Output: one logit per class; their softmax are the probabilities.",
        f"## Evaluation\n\nTop-1 on the evaluation set: {top1} (step {info.step:,}, epoch {info.epoch:.2f})"
        f"{', of the mean of the logits of an image and its mirror image' if recipe.eval_flip else ''}. It says "
        "nothing about images unlike those of that set.",
        f"## Training\n\n{_training(recipe)}",
        f"## Preprocessing\n\n```json\n{steps}\n```\n\nCrop and resize, with numpy and Pillow; `model.onnx` and "
        f"`model.pt2` divide and normalise the pixels themselves:\n\n{_reading(recipe)}",
        "## Use\n\n" + "\n\n".join(f"{name}:\n\n{_use(name, model)}" for name in files),
        "## Classes\n\n" + "\n".join(f"{index}. {printable(name)}" for index, name in enumerate(info.names())),
        "## Licence and intended use\n\nTo be stated by those who publish the model. The licence of the training "
        "images matters too.",
    ]
    return "\n\n".join(sections) + "\n"


def _training(recipe: Recipe) -> str:
    data = "a folder of images" if recipe.dataset == "folder" else recipe.dataset
    return (
        f"{recipe.num_train_images:,} images of {data}, {recipe.total_epochs:g} epochs at global batch "
        f"{recipe.global_batch_size:,}, {recipe.optimizer}, peak learning rate {recipe.peak_lr:g} "
        f"({recipe.lr_scaling} scaling), weight decay {recipe.weight_decay:g}, label smoothing "
        f"{recipe.label_smoothing:g}, augmentation {recipe.augmentation}, seed {recipe.seed}. Every field is in the "
        "metadata `recipe` of each file."
    )


def _use(file: str, model: Trained) -> str:
    recipe = model.recipe
    return _USE[file].format(
        create=_creation(recipe),
        model=recipe.model,
        torchvision=f"num_classes={recipe.num_classes}" + (f", norm_layer={_norm(recipe)}" if _norm(recipe) else ""),
        channels=recipe.image_channels,
        side=recipe.eval_resolution,
    )


def _reading(recipe: Recipe) -> str:
    return _READ.format(
        channels=recipe.image_channels,
        side=recipe.eval_resolution,
        mode="RGB" if recipe.image_channels == 3 else "L",
        ratio=recipe.eval_crop_ratio,
    )


def _norm(recipe: Recipe) -> str:
    """Python code of the model's norm; empty for torch's default."""
    default = recipe.bn_eps == BatchNorm2d(1).eps
    return "" if default else f"functools.partial(torch.nn.BatchNorm2d, eps={recipe.bn_eps})"


def _creation(recipe: Recipe) -> str:
    """Python code that makes the untrained network."""
    sizes = f"num_classes={recipe.num_classes}, in_channels={recipe.image_channels}"
    if is_function(recipe.model):
        file, function = recipe.model.rsplit(".py:", 1)
        return f"from {file} import {function}  # {file}.py is not part of this export\nnetwork = {function}({sizes})"
    create = f'"{recipe.model}", {sizes}'
    create += f", norm={_norm(recipe)}" if _norm(recipe) else ""
    create += f", width={recipe.width}" if recipe.model == "resnet8" else ""
    create += ", blur_pool=True" if recipe.blur_pool else ""
    create += f", image_size={int(max(value for _, value in recipe.resolution))}"
    create += f', stem="{recipe.stem}"' if recipe.stem != "auto" else ""
    return f"network = megabatch.create_model({create})"
