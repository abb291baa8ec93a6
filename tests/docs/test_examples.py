"""Every file of examples/ runs, and the lines that the documentation shows are lines of these files."""

import contextlib
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from limits import HANG_S
from public_models import importable
from tiny_run import tiny_recipe
from torch.optim import SGD

from megabatch import create_model
from megabatch.recipe import fields_as_json
from megabatch.train.checkpoint import write_checkpoint

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
ARGUMENTS = {"load_checkpoint.py": ["run", "my_photos"], "train_loader.py": ["my_photos"]}
NEEDED = {"accelerate_lars.py": ["accelerate"], "lightning_lars.py": ["lightning"], "timm_net.py": ["timm"]}
ON_FOUR_RANKS = {"shampoo.py", "torus_ddp.py"}
SHOWN = re.compile(r"\(\S*examples/(?P<file>\w+\.py)\)(?:(?!```).)*?```python\n(?P<code>.*?)^```$", re.M | re.S)


@pytest.fixture(autouse=True)
def beside_photographs(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tests" / "data" / "photos", tmp_path / "my_photos")
    monkeypatch.chdir(tmp_path)


def write_run():
    """A run folder with one checkpoint of an untrained model for three-channel images."""
    recipe = tiny_recipe(image_channels=3, pixel_mean=(0.5, 0.5, 0.5), pixel_std=(0.5, 0.5, 0.5))
    pixels = int(recipe.resolution[0][1])
    model = create_model(recipe.model, num_classes=recipe.num_classes, width=recipe.width, image_size=pixels)
    state = {"module": model.state_dict(), "optimizer": SGD(model.parameters()).state_dict(), "average": None}
    Path("run").mkdir()
    Path("run/recipe.json").write_text(json.dumps(fields_as_json(recipe)))
    write_checkpoint(Path("run/checkpoints"), state, recipe=fields_as_json(recipe), step=5, epoch=1.0, top1=0.5)


@pytest.mark.parametrize("name", sorted({path.name for path in EXAMPLES.glob("*.py")} - ON_FOUR_RANKS))
@pytest.mark.filterwarnings("ignore:The `srun` command is available")  # Lightning, on a machine with Slurm
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # in Lightning
def test_an_example_runs(name, monkeypatch, capsys):
    if name == "load_checkpoint.py":
        write_run()
    for library in NEEDED.get(name, []):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS.get(name, [])])
    with importable() if "timm" in NEEDED.get(name, []) else contextlib.nullcontext():
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", sorted(ON_FOUR_RANKS))
def test_an_example_runs_on_four_ranks(name):
    command = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, str(EXAMPLES / name)], env=environment, capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_example_has_fewer_than_forty_lines():
    assert all(len(path.read_text().splitlines()) < 40 for path in EXAMPLES.glob("*.py"))


def shown_blocks():
    """(page, example, code) of each block of Python under a link to an example."""
    for page in (ROOT / "README.md", ROOT / "docs" / "in_your_own_script.md"):
        for match in SHOWN.finditer(page.read_text(encoding="utf-8")):
            yield pytest.param(match["file"], match["code"], id=f"{page.stem}-{match['file']}")


@pytest.mark.parametrize(("name", "code"), list(shown_blocks()))
def test_the_documentation_shows_lines_of_the_example(name, code):
    lines = {line.strip() for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()}
    for line in textwrap.dedent(code).splitlines():
        assert line.strip() in lines, f"{line!r} is not in examples/{name}"


def test_every_example_is_shown_and_every_shown_block_is_of_an_example():
    page = (ROOT / "docs" / "in_your_own_script.md").read_text(encoding="utf-8")
    shown = [match["file"] for match in SHOWN.finditer(page)]
    assert sorted(shown) == sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert len(shown) == page.count("```python")
