"""The optimizers and schedules in scripts that use nothing else of this package."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

PLAIN_SCRIPT = """
import torch
from megabatch import LARS, learning_rate, param_groups
torch.manual_seed(0)
inputs = torch.randn(512, 16)
labels = (inputs[:, :4].sum(dim=1) > 0).long()
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
optimizer = LARS(param_groups(model, weight_decay=1e-4), lr=0.0, trust_coefficient=0.02)
for epoch in range(30):
    rate = learning_rate(epoch, peak_lr=5.0, total_epochs=30, warmup="linear", warmup_epochs=5, decay="poly")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()
accuracy = (model(inputs).argmax(dim=1) == labels).float().mean().item()
"""


def test_lars_trains_in_a_plain_script_of_twenty_lines() -> None:
    assert len(PLAIN_SCRIPT.strip().splitlines()) <= 20
    names: dict[str, float] = {}
    exec(PLAIN_SCRIPT, names)  # noqa: S102
    assert names["accuracy"] > 0.95


def test_lars_trains_under_torchs_own_schedulers() -> None:
    """A LambdaLR multiplies the rate of the group; no code of this package is called for it."""
    from megabatch import LARS

    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    labels = (inputs[:, 0] > 0).long()
    model = nn.Linear(8, 2)
    optimizer = LARS(model.parameters(), lr=2.0, trust_coefficient=0.02, momentum_form="inside_corrected")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 5))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_lars_trains_in_a_lightning_module() -> None:
    lightning = pytest.importorskip("lightning")
    from megabatch import LARS, learning_rate, param_groups

    class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
            self.losses: list[float] = []

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
            inputs, labels = batch
            loss = nn.functional.cross_entropy(self.net(inputs), labels)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = LARS(param_groups(self, weight_decay=1e-4), lr=1.0, momentum=0.5, trust_coefficient=0.02)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer,
                lambda step: learning_rate(
                    step / 2, peak_lr=4.0, total_epochs=25, warmup="linear", warmup_epochs=3, decay="poly"
                ),
            )
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    data = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())
    loader = torch.utils.data.DataLoader(data, batch_size=128)
    module = Classifier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own advice about workers and log intervals
        trainer = lightning.Trainer(
            max_epochs=25,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)
    assert len(module.losses) == 50
    assert module.losses[-1] < 0.2 * module.losses[0]
