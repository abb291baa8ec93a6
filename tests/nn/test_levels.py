"""Levels of a model's parameters, and a backbone that is frozen by them."""

import pytest
import torch
from torch import nn

from megabatch import convert, create_model, param_groups, set_fusion
from megabatch.nn.levels import freeze_backbone, in_head, levels
from megabatch.optim.groups import split_by_level


def test_levels_of_a_resnet_are_stem_blocks_and_head():
    found = levels(create_model("resnet18", num_classes=3))
    assert found["conv1.weight"] == found["bn1.bias"] == 0
    assert found["layer1.0.conv1.weight"] == found["layer1.0.bn2.bias"] == 1
    assert found["layer4.1.conv2.weight"] == 8
    assert in_head(found) == {"fc.weight", "fc.bias"}
    assert found["fc.weight"] == 9


def test_a_numbered_head_is_the_head():
    found = levels(create_model("alexnet", num_classes=3))
    assert in_head(found) == {name for name in found if name.rpartition(".")[0] == list(found)[-1].rpartition(".")[0]}
    assert len(in_head(found)) == 2


def test_parameters_between_blocks_have_the_level_of_the_block_before_them():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(2, 2)
            self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
            self.norm = nn.LayerNorm(2)
            self.head = nn.Linear(2, 2)

    assert [levels(Net())[f"{name}.weight"] for name in ("stem", "blocks.0", "blocks.1", "norm", "head")] == [
        0,
        1,
        2,
        2,
        3,
    ]


def test_rates_fall_by_a_factor_per_level_from_the_head():
    model = create_model("resnet8", num_classes=3)
    found = levels(model)
    groups = split_by_level(param_groups(model, weight_decay=1e-4), found, 0.5)
    factors = {name: group["lr_factor"] for group in groups for name in group["param_names"]}
    assert factors.keys() == found.keys()
    assert factors["fc.weight"] == factors["fc.bias"] == 1
    assert factors["layer3.0.conv1.weight"] == 0.5
    assert factors["conv1.weight"] == 0.5**4
    decays = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert decays["conv1.weight"] == 1e-4
    assert decays["bn1.weight"] == 0


@pytest.mark.parametrize("fusion", ["plain", "auto"])
@pytest.mark.parametrize("name", ["resnet8", "resnet50"])
def test_training_a_frozen_backbone_changes_only_the_head(name, fusion):
    torch.manual_seed(0)
    model = convert(create_model(name, num_classes=3, image_size=32), span=4)
    freeze_backbone(model)
    set_fusion(model, fusion)
    model.train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    images = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=0.0), lr=0.1)
    logits = model(images)
    assert torch.allclose(logits, model.eval()(images), atol=1e-5)  # norms used their averages in training too
    logits.square().sum().backward()
    optimizer.step()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {"fc.weight", "fc.bias"}
