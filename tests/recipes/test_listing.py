"""`megabatch recipes` and the generated docs/recipes.md."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANG_S
from typer.testing import CliRunner

from megabatch import recipes
from megabatch.cli.main import app
from megabatch.cli.recipes import curve, schedule
from megabatch.cli.recipes import recipes as show
from megabatch.errors import RecipeError, UserError
from megabatch.recipe import Recipe
from megabatch.recipes.markdown import as_markdown
from megabatch.train.schedule import count_steps

ROOT = Path(__file__).parents[2]


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["recipes", *words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_the_list_has_a_row_for_every_recipe_with_its_published_accuracy() -> None:
    lines = {line.split()[0]: line for line in run().splitlines() if line.strip()}
    assert set(recipes.names()) <= set(lines)
    assert lines["akiba2017_32k"].split()[-5:] == ["resnet50", "32,768", "90", "0.7490", "-"]
    assert "34,816..69,632" in lines["mikami2018_34k_68k"]


def test_the_list_does_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['megabatch', 'recipes']\n"
        "from megabatch.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANG_S)
    assert "akiba2017_32k" in result.stdout
    assert result.stdout.splitlines()[-1] == "False"


def test_one_recipe_is_shown_with_its_docstring_fields_and_schedule() -> None:
    text = run("goyal2017_8k")
    assert recipes.docstring("goyal2017_8k").splitlines()[0] in text
    assert {field.name for field in dataclasses.fields(Recipe)} <= set(re.findall(r"\w+", text))
    rows = [line.split() for line in text.splitlines() if line.split()[1:2] in (["156"], ["157"], ["end"])]
    by_epoch = {row[0]: row for row in rows}
    assert by_epoch["0"][2] == "0.1"
    assert by_epoch["30"][2] == "0.32"
    assert by_epoch["90"][1:3] == ["end", "0.0032"]


def test_overrides_change_the_fields_and_the_schedule_shown() -> None:
    text = run("fashion_mnist", "--set", "total_epochs=3", "--set", "peak_lr=2")
    last = text.rstrip().splitlines()[-1].split()
    assert last[:2] == ["3", "end"]
    assert ["peak_lr", "2"] in [line.split() for line in text.splitlines()]


@pytest.mark.parametrize("name", ["fashion_mnist", "mikami2018_34k_68k", "mlperf_65536"])
def test_updates_by_epoch_add_up_to_the_steps_of_the_run(name: str) -> None:
    recipe = recipes.get(name)
    rows = list(schedule(recipe))
    assert sum(row["updates"] for row in rows) == count_steps(recipe)
    assert [row["epoch"] for row in rows] == [*range(len(rows) - 1), recipe.total_epochs]


def test_the_plotted_curve_spans_the_run() -> None:
    points = curve(recipes.get("akiba2017_32k"), num_points=91)
    assert len(points) == 91
    assert points[0]["epoch"] == 0
    assert points[-1]["epoch"] == pytest.approx(90, abs=1e-5)


@pytest.mark.parametrize(("suffix", "magic"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_the_schedule_is_plotted_to_a_file(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / "new" / f"schedule.{suffix}"
    assert str(path) in run("akiba2017_32k", "--plot", str(path)).replace("\n", "")
    assert path.read_bytes().startswith(magic)


def test_each_value_that_changes_has_a_panel(tmp_path: Path) -> None:
    run("mikami2018_34k_68k", "--plot", str(tmp_path / "a.svg"))
    assert (tmp_path / "a.svg").read_text().count('id="axes_') == 2  # rate and batch
    run("akiba2017_32k", "--plot", str(tmp_path / "b.svg"))
    assert (tmp_path / "b.svg").read_text().count('id="axes_') == 2  # rate and share of SGD
    run("goyal2017_8k", "--plot", str(tmp_path / "c.svg"))
    assert (tmp_path / "c.svg").read_text().count('id="axes_') == 1


def test_a_bad_plot_file_name_is_rejected_before_any_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="needed a file name that ends in"):
        show("fashion_mnist", plot=tmp_path / "schedule.gif")
    assert capsys.readouterr().out == ""


def test_invalid_arguments_raise_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"schedule\.svg works"):
        run("fashion_mnist", "--plot", str(tmp_path / "schedule.gif"))
    with pytest.raises(RecipeError, match="did you mean cifar10"):
        run("cifar")
    with pytest.raises(RecipeError, match="peak_lr"):
        run("cifar10", "--set", "peak_lr=abc")
    result = CliRunner().invoke(app, ["recipes", "--plot", str(tmp_path / "a.svg")])
    assert result.exit_code == 2
    assert "NAME" in result.output


def test_the_committed_page_is_current() -> None:
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == as_markdown()


def test_the_command_line_prints_the_page() -> None:
    assert run("--markdown") == as_markdown()


def test_the_page_has_a_section_for_every_recipe() -> None:
    page = as_markdown()
    for name in recipes.names():
        assert f"\n## {name}\n" in page
        assert f"[`{name}`](#{name})" in page
