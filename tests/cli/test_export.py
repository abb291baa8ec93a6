"""`megabatch export`: files and card of a run folder."""

from command_line import error_line, megabatch
from tiny_run import run_tiny, tiny_recipe


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
