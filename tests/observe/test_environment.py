"""The description of the environment, safe to publish."""

import json
import platform
import socket
import subprocess
import sys
from pathlib import Path

import torch
from limits import HANG_S

import megabatch
from megabatch.cores import usable_cores
from megabatch.observe.environment import describe, git_commit


def test_versions_and_hardware_are_described() -> None:
    found = describe()
    assert found["python"] == platform.python_version()
    assert torch.__version__.startswith(found["torch"])  # a CUDA build adds a suffix that the package version may lack
    assert found["megabatch"] == megabatch.__version__
    assert found["cores"] == usable_cores() >= 1
    assert len(found["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert json.loads(json.dumps(found)) == found


def test_the_description_has_no_path_and_no_host_name() -> None:
    text = json.dumps(describe())
    assert str(Path(__file__).parents[2]) not in text
    assert str(Path.home()) + "/" not in text
    assert socket.gethostname() not in text


def test_the_commit_is_none_outside_a_checkout_and_inside_that_of_another_project(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert git_commit(tmp_path) is None


def test_the_commit_is_marked_when_files_differ(tmp_path: Path) -> None:
    package = tmp_path / "src" / "megabatch"
    package.mkdir(parents=True)
    (package / "a.py").write_text("1\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    clean = git_commit(package)
    assert clean is not None
    assert len(clean) == 12
    (package / "a.py").write_text("2\n")
    assert git_commit(package) == f"{clean}-dirty"


def test_describing_does_not_import_torch() -> None:
    code = "import sys; from megabatch.observe.environment import describe; describe(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANG_S)
    assert result.stdout.strip() == "False"
