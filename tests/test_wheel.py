"""The wheel alone, in an environment outside the checkout: it holds the compiled libraries, and every verb works."""

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from check_wheels import missing_libraries
from limits import HANG_S
from typer.core import TyperGroup
from typer.main import get_command

from megabatch.cli.main import app

ROOT = Path(__file__).parents[1]
SOURCES = ("src", "pyproject.toml", "setup.py", "README.md", "LICENSE")
TINY = "--workers 1 --device cpu --set model=resnet8 --set width=1 --set resolution=32 --set eval_resolution=32"

COMMANDS = {  # verb and arguments: exit code, and words that are printed
    "train photos --data photos --output other --steps 1 " + TINY: (0, "top1 "),
    "evaluate run --data photos --details": (0, " of 12)"),
    "predict run photos/val": (0, "photos/val/hat/001.jpg,1,"),
    "export run --format torch-export": (0, "model.pt2"),
    "recipes": (0, "photos"),
    "recipes photos --format toml": (0, "peak_lr = "),
    "plan mlperf_32768": (0, "NVIDIA DGX H100"),
    "report run": (0, "report.html"),
    "watch run": (0, "top1"),
    "doctor": (0, "CPU kernels      compiled"),
    "doctor run": (0, "bottleneck"),
    "mllog run --organization one --platform two": (2, "works"),  # for runs of ImageNet
    "data check photos": (0, "36 images, 0 bad"),
    "data pack photos shards": (0, "24 train, 12 val images"),
    "data fetch imagenet": (2, "image-net.org"),
    "bench step --seconds 0.1 --batch 128 --device cpu": (0, "images/s"),
    "bench input --data photos --images 8 --seconds 0.01 --resolution 32": (0, "bottleneck"),
    "bench allreduce --mib 0.1 --repeats 1 --algorithms flat --device cpu": (0, "flat"),
    "launch slurm --nodes 2 -- photos --data photos --output run": (0, "#SBATCH --nodes=2"),
    "launch kubernetes --image one --volume set:/data --volume runs:/runs -- photos --data /data --output /runs/a": (
        0,
        "TrainJob",
    ),
}
if find_spec("ray") is None:
    COMMANDS["launch ray -- photos --data photos --output other"] = (2, "pip install")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
ENVIRONMENT["MEGABATCH_MEASURE"] = "0"


class Installed(NamedTuple):
    """The folder in which commands run, and the environment's executables."""

    folder: Path
    bin: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        program = str(self.bin / command[0])
        return subprocess.run(
            [program, *command[1:]],
            cwd=self.folder,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    """Builds the wheel from a copy of the sources, installs it, and trains a tiny run beside a copy of the photographs.

    The packages that megabatch needs are those of this environment; megabatch itself is the wheel's.
    """
    build, folder = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("empty")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, build / name, **({"ignore": shutil.ignore_patterns("*.so")} if name == "src" else {}))
    build_wheel = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build_wheel, "--wheel-dir", build / "dist", build], env=ENVIRONMENT, check=True)
    (wheel,) = (build / "dist").glob("megabatch-*.whl")
    assert missing_libraries(wheel) == []
    venv.create(build / "env", with_pip=True)
    python = build / "env" / "bin" / "python"
    install = [python, "-m", "pip", "--quiet", "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, env=ENVIRONMENT, check=True)
    (packages,) = (build / "env" / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    shutil.copytree(ROOT / "tests" / "data" / "photos", folder / "photos")
    made = Installed(folder, python.parent)
    found = made.run("python", "-c", "import megabatch; print(megabatch.__file__)").stdout
    assert Path(found).is_relative_to(packages)
    train = f"train photos --data photos --output run --steps 6 {TINY}"
    done = made.run("megabatch", *train.split())
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_verb_of_the_wheel_works_in_an_empty_folder(installed, command):
    code, words = COMMANDS[command]
    done = installed.run("megabatch", *command.split())
    assert done.returncode == code, done.stderr[-2000:]
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def verbs(group: TyperGroup, before: str = "") -> Iterator[str]:
    """The verbs of the command line, as `data check`."""
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from verbs(command, f"{before}{name} ")
        else:
            yield before + name


def test_every_verb_of_the_command_line_is_run():
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    tried = {verb for verb in verbs(group) if any(f"{command} ".startswith(f"{verb} ") for command in COMMANDS)}
    assert set(verbs(group)) - tried == ({"launch ray"} if find_spec("ray") else set())
