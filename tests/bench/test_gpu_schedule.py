"""`benchmarks/gpu.py` prints its table and leaves nothing running, whatever becomes of its jobs."""

import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
JOB = """
import json, os, subprocess, sys, time
from pathlib import Path
name, folder = sys.argv[1], Path(sys.argv[2])
def add(case, **facts):
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps({"case": case, **facts}) + "\\n")
def wait():
    (folder / f"{name}.ready").touch()
    while not (folder / f"{name}.go").exists():
        time.sleep(0.01)
"""
GOOD = "wait(); add('all', way='done')"
HANG = """
wait(); add('first', way='done'); add('second', begun=True)
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
(folder / 'pids').write_text(f'{os.getpid()} {child.pid}')
time.sleep(600)
"""


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("gpu")
    for name in ("gpu", "gpu_schedule", "gpu_report"):
        sys.modules.pop(name, None)


def run(gpu, monkeypatch, capsys, folder, jobs, *options):
    """Results of call one with these jobs, by name; and the table."""
    monkeypatch.setattr(gpu, "CALLS", {1: tuple(jobs)})
    monkeypatch.setattr(
        gpu, "command", lambda job, _: [sys.executable, "-c", JOB + job.words[0], job.name, str(folder)]
    )
    monkeypatch.setattr(gpu, "_set_environment", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--call", "1", "--output", str(folder), *options])
    gpu.main()  # returns: exit code 0
    printed = capsys.readouterr().out
    assert (folder / "table-1.txt").read_text() == printed
    results = {job.name: gpu.read_lines(folder / f"{job.name}.jsonl") for job in jobs}
    return {name: [r for r in found if not r.get("begun")] for name, found in results.items()}, printed


def test_a_job_that_hangs_dies_or_prints_garbage_costs_no_other(gpu, monkeypatch, capsys, tmp_path):
    garbage = "wait(); open(folder / f'{name}.jsonl', 'ab').write(b'\\xff no {json\\n[1]\\n'); add('all', way='done')"
    jobs = [
        gpu.Job("hangs", (HANG,), 1.0),
        gpu.Job("dies", ("wait(); add('here', begun=True); print('out of luck', flush=True); os.abort()",), 60.0),
        gpu.Job("garbage", (garbage,), 60.0),
        gpu.Job("absent", (GOOD,), 60.0, needs=("no_such_module",)),
        gpu.Job("good", (GOOD,), 60.0),
    ]
    found, printed = run(gpu, monkeypatch, capsys, tmp_path, jobs)
    assert found["hangs"][0]["way"] == "done"
    assert found["hangs"][1]["case"] == "second"
    assert "no result for 1 s" in found["hangs"][1]["error"]
    assert found["dies"][0] == {"job": "dies", "case": "here", "error": "the process ended with code -6: out of luck"}
    assert ["error" in result for result in found["garbage"]] == [True, True, False]
    assert found["absent"] == [{"job": "absent", "case": "whole job", "skipped": "needs no_such_module"}]
    assert found["good"] == [{"job": "good", "case": "all", "way": "done"}]
    assert all(text in printed for text in ("no result for 1 s", "out of luck", "no {json", "needs no_such_module"))
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        wait_until_gone(pid)


def test_a_job_that_dies_runs_again_behind_the_case_that_it_died_in(gpu, monkeypatch, capsys, tmp_path):
    code = """
wait()
begun = [line for line in (folder / f'{name}.jsonl').open()] if (folder / f'{name}.jsonl').exists() else []
for case in ('first', 'second', 'third'):
    if not any(f'"{case}"' in line for line in begun):
        add(case, begun=True)
        if case == 'second':
            os._exit(3)
        add(case, way='done')
"""
    found, _ = run(gpu, monkeypatch, capsys, tmp_path, [gpu.Job("job", (code,), 60.0)])
    assert [(result["case"], "error" in result) for result in found["job"]] == [
        ("first", False),
        ("second", True),
        ("third", False),
    ]


def test_when_the_time_is_over_the_table_is_printed_and_nothing_runs(gpu, monkeypatch, capsys, tmp_path):
    jobs = [gpu.Job("good", (GOOD,), 60.0), gpu.Job("hangs", (HANG,), 600.0), gpu.Job("late", (GOOD,), 60.0)]
    found, printed = run(gpu, monkeypatch, capsys, tmp_path, jobs, "--limit", "3")
    assert found["good"][0]["way"] == "done"
    assert "the time was over" in found["hangs"][-1]["error"]
    assert found["late"][0]["skipped"] == "the time was over"
    assert printed.count("the time was over") == 2
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        wait_until_gone(pid)


def test_a_signal_ends_all_jobs_and_the_table_is_printed(gpu, monkeypatch, capsys, tmp_path):
    def send():
        while not (tmp_path / "pids").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    found, _ = run(gpu, monkeypatch, capsys, tmp_path, [gpu.Job("hangs", (HANG,), 600.0)])
    assert "told to end" in found["hangs"][-1]["error"]


def test_jobs_that_warm_up_beside_others_are_measured_after_all_of_them(gpu, monkeypatch, capsys, tmp_path):
    slow = "time.sleep(0.5); add('all', end=time.time())"
    warm = "wait(); add('all', begin=time.time()); time.sleep(0.2); add('end', end=time.time())"
    jobs = [gpu.Job(name, (warm,), 60.0, beside=True, waits=True) for name in ("a", "b")]
    found, _ = run(gpu, monkeypatch, capsys, tmp_path, [*jobs, gpu.Job("c", (slow,), 60.0, beside=True)])
    assert found["c"][0]["end"] <= found["a"][0]["begin"]
    assert found["a"][1]["end"] <= found["b"][0]["begin"]


def step(job, batch, rate):
    return {"job": job, "case": job, "batch": batch, "images_per_s": rate}


def test_call_two_is_short_if_ours_is_below_1_10_of_the_peer_at_the_largest_batch(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--call", "2", "--output", str(tmp_path)])
    options = gpu._options()

    def names(*results):
        for result in results:
            (tmp_path / f"{result['job']}.jsonl").write_text(json.dumps(result) + "\n")
        return [job.name for job in gpu._jobs(2, options)]

    everything = [job.name for job in gpu.CALLS[2]]
    assert names() == everything
    assert names(step("peer-1024", 1024, 100.0)) == everything
    assert names(step("ours-float16-1024", 1024, 109.0)) == ["profile", "gram"]
    assert names(step("ours-float16-32", 32, 1000.0), step("peer-32", 32, 10.0)) == ["profile", "gram"]
    assert names(step("ours-bfloat16-1024", 1024, 110.1)) == everything


def test_full_sizes_on_a_cpu_are_refused(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path), "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 2
    assert "--quick alone" in capsys.readouterr().err


@pytest.mark.slow
def test_all_jobs_run_at_tiny_sizes_on_a_cpu(gpu, monkeypatch, capsys, tmp_path):
    options = ["--quick", "--device", "cpu", "--limit", "900"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path), *options])
    monkeypatch.setattr(gpu, "_set_environment", lambda _: None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu.main()
    results = [r for jobs in gpu.CALLS.values() for r in gpu._results(tmp_path, jobs)]
    assert {r["job"] for r in results} == {job.name for jobs in gpu.CALLS.values() for job in jobs}
    assert [r for r in results if "error" in r] == []
    lacks = {job.name for jobs in gpu.CALLS.values() for job in jobs if gpu.missing(job)}
    assert {r["job"] for r in results if "skipped" in r} == lacks
    assert "x peer" in capsys.readouterr().out


def wait_until_gone(pid):
    end = time.monotonic() + 60
    while is_running(pid):
        assert time.monotonic() < end, f"process {pid} still runs"
        time.sleep(0.05)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
