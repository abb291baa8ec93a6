"""A trained model in Python: `python load_checkpoint.py RUN_FOLDER [FOLDER_OF_IMAGES]`."""

import sys
from pathlib import Path

import torch

from megabatch import EvalLoader, create_model, open_folder
from megabatch.train.checkpoint import open_checkpoint

info, state = open_checkpoint(Path(sys.argv[1]))  # the best checkpoint of the run; verifies its checksum
recipe = info.recipe
model = create_model(
    recipe["model"],
    num_classes=recipe["num_classes"],
    in_channels=recipe["image_channels"],
    blur_pool=recipe["blur_pool"],
    width=recipe["width"],
    image_size=int(max(pixels for _, pixels in recipe["resolution"])),
)
weights = state["module"] | (state["average"] or {}).get("tensors", {})  # averaged weights where the recipe has them
model.load_state_dict({name: weights[name] for name in state["module"]})
model.eval()
print(f"{recipe['model']} of step {info.step:,}, top-1 {info.top1:.4f}")

if len(sys.argv) > 2:  # classify photographs as `megabatch evaluate` does
    _, images = open_folder(sys.argv[2])
    pixels = {key: recipe[key] for key in ("pixel_mean", "pixel_std")}
    loader = EvalLoader(images, resolution=recipe["eval_resolution"], crop_ratio=recipe["eval_crop_ratio"], **pixels)
    with torch.inference_mode():
        for batch in loader.batches(0, len(images), 8):
            print(model(batch.images).softmax(1).max(1).indices.tolist())
    loader.close()
