"""The scripts of the documentation run as they stand there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "in_your_own_script.md"
BLOCK = re.compile(r"```python(?P<how>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S)


def blocks() -> list[tuple[str, str, str]]:
    """(title of the section, "torchrun" or nothing, code) of each script."""
    sections = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
    return [
        (section.splitlines()[0], match["how"].strip(), match["code"])
        for section in sections
        for match in BLOCK.finditer(section)
    ]


def cases(wanted: str) -> list:
    return [pytest.param(code, id=title) for title, how, code in blocks() if how == wanted]


@pytest.fixture(autouse=True)
def beside_photographs(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tests" / "data" / "photos", tmp_path / "my_photos")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("code", cases(""))
def test_a_script_of_the_page_runs(code):
    exec(compile(code, PAGE.name, "exec"), {"__name__": "__main__"})  # noqa: S102


@pytest.mark.multiprocess
@pytest.mark.parametrize("code", cases("torchrun"))
def test_a_script_of_the_page_runs_on_four_ranks(code):
    Path("script.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, "script.py"], env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_block_of_code_on_the_page_is_one_of_these():
    assert len(cases("")) + len(cases("torchrun")) == PAGE.read_text(encoding="utf-8").count("```python")
