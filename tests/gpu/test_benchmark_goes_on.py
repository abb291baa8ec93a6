"""`benchmarks/gpu.py` keeps the time and the results, whatever becomes of the process that works."""

import importlib.util
import json
import sys
import threading
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WORKER = """
import argparse, json, os, time
from pathlib import Path
parser = argparse.ArgumentParser()
for name in ("output", "device", "limit"):
    parser.add_argument(f"--{name}")
parser.add_argument("--quick", action="store_true")
parser.add_argument("sections", nargs="+")
options = parser.parse_args()
path = Path(options.output) / "gpu.json"
for section in options.sections:
    path.with_name("running.part").write_text(section)
    path.with_name("running.part").replace(path.with_name("running"))
    if section == "loss":
        FATE
    path.write_text(json.dumps([*json.loads(path.read_text()), {"section": section, "case": "all", "way": "done"}]))
"""


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)
    spec.loader.exec_module(module)
    return module


def benchmark(gpu, monkeypatch, capsys, folder, fate, *options):
    """Sections with their outcomes, when the section `loss` meets its fate; and what was printed."""
    worker = folder / "worker.py"
    worker.write_text(WORKER.replace("FATE", fate))
    monkeypatch.setattr(gpu, "WORKER", worker)
    sections = [word for name in ("optimizers", "loss", "stem") for word in ("--section", name)]
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--output", str(folder / "out"), "--device", "cuda", *sections, *options]
    )
    gpu.main()
    results = json.loads((folder / "out" / "gpu.json").read_text())
    printed = capsys.readouterr().out
    assert (folder / "out" / "gpu.txt").read_text() == printed
    return {result["section"]: result.get("error", result.get("way")) for result in results}, printed


@pytest.mark.parametrize("fate", ["os.abort()", "os._exit(3)", "raise SystemExit(1)"])
def test_a_process_that_dies_costs_its_section_alone(gpu, monkeypatch, capsys, tmp_path, fate):
    found, printed = benchmark(gpu, monkeypatch, capsys, tmp_path, fate)
    assert found.pop("loss").startswith("the process ended with code")
    assert set(found.values()) == {"done"}
    assert list(found) == ["environment", "optimizers", "stem"]
    assert "the process ended" in printed


def test_a_section_that_hangs_is_given_up_and_the_next_one_runs(gpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(gpu.SECTIONS, "loss", (1.0, ""))
    found, _ = benchmark(gpu, monkeypatch, capsys, tmp_path, "time.sleep(100)")
    assert "given up" in found["loss"]
    assert found["stem"] == "done"


@pytest.mark.slow
def test_when_the_time_is_over_the_table_is_printed_all_the_same(gpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "GRACE_S", 0.0)
    found, printed = benchmark(gpu, monkeypatch, capsys, tmp_path, "time.sleep(100)", "--limit", "20")
    assert found == {"environment": "done", "optimizers": "done", "loss": "the time was over"}
    assert "the time was over" in printed


def test_the_process_that_works_knows_every_section(gpu):
    worker = (BENCHMARKS / "gpu_worker.py").read_text()
    listed = worker[worker.index("SECTIONS") : worker.index("def main")]
    assert [name for name in gpu.SECTIONS if f'"{name}":' not in listed] == []


def test_all_of_it_ends_within_nine_minutes(gpu):
    assert gpu.LIMIT_S + gpu.GRACE_S < 9 * 60


def test_who_watches_never_reads_half_a_file(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    put = importlib.import_module("gpu_session").put
    path, done, read = tmp_path / "running", threading.Event(), set()
    put(path, "step")

    def watch():
        while not done.is_set():
            read.add(path.read_text())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(3000):
        put(path, ("profile", "step")[number % 2])
    done.set()
    watcher.join()
    assert read <= {"profile", "step"}
