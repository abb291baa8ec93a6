"""A trained model in Python: `python load_checkpoint.py RUN_FOLDER [FOLDER_OF_IMAGES]`."""

import json
import sys
from pathlib import Path

import torch

from megabatch import EvalLoader, load_model, open_folder

model = load_model(sys.argv[1])  # the best checkpoint of the run, with averaged weights where the recipe has them
print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")

if len(sys.argv) > 2:  # classify photographs as `megabatch evaluate` does
    recipe = json.loads((Path(sys.argv[1]) / "recipe.json").read_text())
    _, images = open_folder(sys.argv[2])
    pixels = {key: recipe[key] for key in ("pixel_mean", "pixel_std")}
    loader = EvalLoader(images, resolution=recipe["eval_resolution"], crop_ratio=recipe["eval_crop_ratio"], **pixels)
    with torch.inference_mode():
        for batch in loader.batches(0, len(images), 8):
            print([model.class_names[number] for number in model(batch.images).argmax(1).tolist()])
    loader.close()
