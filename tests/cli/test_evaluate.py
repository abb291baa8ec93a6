"""`megabatch evaluate` on a checkpoint."""

from tiny_run import run_tiny, tiny_data, tiny_recipe
from typer.testing import CliRunner

from megabatch.cli.main import app


def test_evaluation_configures_the_allocator_as_training_does(tmp_path, monkeypatch):
    recipe, num_workers = tiny_recipe(), []
    trained = run_tiny(tmp_path, recipe)
    monkeypatch.setattr("megabatch.app.resolve.keep_freed_memory", num_workers.append)
    monkeypatch.setattr("megabatch.app.data.open_evaluation_data", lambda *_: tiny_data(recipe))
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--device", "cpu", "--precision", "fp32"])
    assert num_workers == [1]
    assert f"({trained['correct']} of 100)" in result.output
