"""LARS and TrainLoader in Lightning: `python lightning_lars.py`."""

import lightning
import torch
from torch.nn.functional import cross_entropy

from megabatch import LARS, ArraySource, TrainLoader, create_model, param_groups


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = create_model("resnet8", num_classes=2, in_channels=1, width=8)

    def training_step(self, batch, _):
        return cross_entropy(self.model(batch.images), batch.labels)

    def configure_optimizers(self):
        return LARS(param_groups(self.model, weight_decay=1e-4), lr=1.0)


labels = torch.arange(64) % 2
source = ArraySource((200 * labels).view(-1, 1, 1, 1).expand(-1, 1, 16, 16).to(torch.uint8), labels, ("dark", "light"))
pixels = {"pixel_mean": (0.5,), "pixel_std": (0.25,), "image_channels": 1}
loader = TrainLoader(
    source, local_batch_size=16, resolution=16, seed=0, **pixels
)  # rank=, world_size= with devices > 1
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", devices=1, **quiet)
trainer.fit(Classifier(), loader)
print(f"{trainer.global_step} steps")
