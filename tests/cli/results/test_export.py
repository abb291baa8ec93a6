"""`megabatch export`: files and card of a run folder."""

from command_line import error_line, megabatch
from tiny_run import run_tiny, tiny_recipe

from megabatch.runtime import Runtime

NET = """
from torch import nn

def make(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, num_classes),
    )
"""


def test_a_run_is_exported_beside_its_card_and_errors_say_what_works(tmp_path):
    run_tiny(tmp_path, tiny_recipe(total_epochs=1.0, warmup_epochs=0.5))
    done = megabatch("export", tmp_path, "--format", "torch-export")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["README.md", "model.pt2"]
    assert "model.pt2:" in (tmp_path / "export" / "README.md").read_text()
    assert "needed one of safetensors, torchvision, onnx, torch-export" in error_line(
        megabatch("export", tmp_path, "--format", "pickle")
    )
    assert "--format safetensors works" in error_line(megabatch("export", tmp_path, "--format", "torchvision"))


def test_a_model_of_a_users_file_is_exported_only_where_the_file_is_named(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    code = f"{tmp_path / 'net.py'}:make"
    recipe = tiny_recipe(model="net.py:make", total_epochs=1.0, warmup_epochs=0.5)
    run_tiny(tmp_path / "run", recipe, runtime=Runtime(precision="fp32", micro_batch_size=8, model=code))
    refused = error_line(megabatch("export", tmp_path / "run", "--format", "safetensors"))
    assert "runs a file only if you name it; --model PATH/net.py:make works" in refused
    assert not (tmp_path / "run" / "export").exists()
    done = megabatch("export", tmp_path / "run", "--format", "safetensors", "--model", code)
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "from net import make  # net.py is not part of this export" in card
    assert "network = make(num_classes=4, in_channels=1)" in card
    graph = megabatch("export", tmp_path / "run", "--format", "torch-export", "--model", code)
    assert graph.returncode == 0, graph.stderr
