"""The `train` verb as a person meets it: exit codes, one clear line for a mistake, stop and resume, local workers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from command_line import error_line, megabatch, megabatch_process
from limits import HANG_S
from plain_photos import write_plain_photos
from ranks import free_port

import megabatch.cli.train as train_verb
from megabatch import recipes
from megabatch.app.load import load_model
from megabatch.cli.train import Request, _restarted, _run_folder
from megabatch.errors import STOPPED
from megabatch.observe.events import read_events
from megabatch.observe.run_folder import claimed
from megabatch.runtime import Runtime

SMALL = ["--set", "model=resnet8", "--set", "resolution=0:16", "--set", "eval_resolution=16", "--set", "bn_span=4"]
QUICK = [*SMALL, "--set", "global_batch_size=16", "--set", "total_epochs=2", "--precision", "fp32"]


@pytest.fixture
def photos(tmp_path):
    """Two classes of plain colours, twelve training and four test photographs each."""
    return write_plain_photos(tmp_path / "photos", train=12)


def refused(folder, *arguments):
    """The one line of a `train` that must fail and write nothing."""
    output = folder / "run"
    said = error_line(megabatch("train", *arguments, "--output", output))
    assert not output.exists()
    return said


def test_a_run_on_photographs_with_two_workers_ends_with_its_accuracy(photos, tmp_path):
    done = megabatch_process("train", "photos", "--data", photos, "--workers", 2, "--output", tmp_path / "run", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "top1 0." in done.stdout.splitlines()[-1] or "top1 1." in done.stdout.splitlines()[-1]
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3]
    (warning,) = [event["text"] for event in events if event["event"] == "warning"]
    assert "--set eval_stats=precise" in warning
    assert done.stdout.count(warning) == 1
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["num_classes"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fashion_mnist", "--set", "peak_lr=abc"], "needed a number"),
        (["fashion_mnst"], "did you mean fashion_mnist"),
        (["fashion_mnist", "--set", "global_batch_size=1001"], "global_batch_size="),
        (["fashion_mnist", "--set", "nonsense"], "KEY=VALUE"),
        (["fashion_mnist", "--workers", "0"], "--workers auto works"),
        (["fashion_mnist", "--precision", "fp8"], "needed one of auto, fp32"),
        (["fashion_mnist", "--resume"], "no run to resume"),
        (["fashion_mnist", "--loss-scale", "large"], "--loss-scale dynamic works"),
        (["fashion_mnist", "--precision", "fp16", "--loss-scale", "1000"], "power of two"),
        (["fashion_mnist", "--device", "cpu", "--capture", "on"], "capture=auto works"),
        (["photos", "--data", "no-such-folder"], "there is no no-such-folder"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(tmp_path, arguments, said):
    assert said in refused(tmp_path, *arguments)


def test_a_mistake_ends_a_process_with_one_clear_line_and_exit_code_2(tmp_path):
    assert "needed a number" in error_line(megabatch_process("train", "fashion_mnist", "--set", "peak_lr=abc"))


def test_a_gpu_that_is_not_there_is_said_once_whatever_the_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused(tmp_path, "fashion_mnist", "--device", "cuda", "--workers", "2")
    assert "torch finds no GPU; --device cpu works" in said


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "val").mkdir()
    assert "empty" in refused(tmp_path, "photos", "--data", tmp_path / "empty")


def test_an_empty_class_is_refused_by_name(photos, tmp_path):
    (photos / "train" / "green").mkdir()
    assert "green" in refused(tmp_path, "photos", "--data", photos, *QUICK)


def test_a_truncated_photograph_is_refused_by_name(photos, tmp_path):
    victim = photos / "train" / "red" / "003.jpg"
    victim.write_bytes(victim.read_bytes()[:200])
    assert "003.jpg" in refused(tmp_path, "photos", "--data", photos, *QUICK)


def test_more_workers_than_spans_are_refused_with_a_number_that_works(photos, tmp_path):
    assert "4 workers have work" in refused(tmp_path, "photos", "--data", photos, *QUICK, "--workers", "5")


SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize("environment", [{}, SRUN], ids=["shell", "srun"])
@pytest.mark.parametrize("spelled", ["absolute", "run", "./elsewhere/../run", "link"])
def test_a_folder_that_holds_a_run_is_not_overwritten_however_it_is_spelled(
    photos, tmp_path, monkeypatch, spelled, environment
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "run" / "events.jsonl").write_text('{"event": "step"}\n')
    output = tmp_path / "run" if spelled == "absolute" else spelled
    said = error_line(megabatch("train", "photos", "--data", photos, "--output", output, *QUICK))
    assert "already holds a run; --resume continues it" in said
    assert (tmp_path / "run" / "events.jsonl").read_text() == '{"event": "step"}\n'


def test_a_launched_worker_refuses_a_folder_that_holds_a_run_and_resumes_or_starts_one(photos, tmp_path):
    launched = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    in_grey = ["train", "fashion_mnist", "--data", photos, "--output", tmp_path / "run"]
    assert "is in colour" in error_line(megabatch_process(*in_grey, env=os.environ | launched))
    assert not (tmp_path / "run").exists()
    arguments = ["train", "photos", "--data", photos, "--output", tmp_path / "run", *QUICK]
    first = megabatch_process(*arguments, "--resume", "--steps", 1, env=os.environ | launched)
    assert first.returncode == 0, first.stderr
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    assert "already holds a run; --resume continues it" in error_line(
        megabatch_process(*arguments, env=os.environ | launched)
    )
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before
    again = megabatch_process(*arguments, "--resume", env=os.environ | launched)
    assert again.returncode == 0, again.stderr
    steps = [event["step"] for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "step"]
    assert steps == [1, 2, 3]


def test_runs_started_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_verb, "datetime", Mock(now=lambda: datetime(2026, 11, 27, 12, 0, 0)))
    recipe = recipes.get("fashion_mnist")
    request = Request(steps=None, dry_run=None, file=None, quiet=False, may_drop_colour=False)
    with _run_folder(recipe, Runtime(), request) as first, _run_folder(recipe, Runtime(), request) as second:
        (first / "events.jsonl").write_text("{}\n")
        assert (first, second) == (Path("runs/fashion_mnist-20261127-120000"), Path(f"{first}-2"))
    assert first.exists()
    assert not second.exists(), "nothing was written to it"


def test_a_folder_that_another_process_writes_to_is_refused(photos, tmp_path):
    with claimed(tmp_path / "run", resume=False):
        done = megabatch("train", "photos", "--data", photos, "--output", tmp_path / "run", "--workers", 1, *QUICK)
    assert "another process is writing to" in error_line(done)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_an_interface_of_another_machine_is_one_line_for_two_workers(photos, tmp_path):
    arguments = ["train", "photos", "--data", photos, "--workers", 2, "--output", tmp_path / "run", *QUICK]
    done = megabatch_process(*arguments, env=os.environ | {"GLOO_SOCKET_IFNAME": "ib77"})
    assert error_line(done).startswith("megabatch: GLOO_SOCKET_IFNAME=ib77 is no network interface of ")
    assert not (tmp_path / "run").exists()


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + HANG_S
    while time.monotonic() < deadline:
        if (folder / "events.jsonl").exists():
            steps = [e["step"] for e in read_events(folder / "events.jsonl") if e["event"] == "step"]
            if steps and steps[-1] >= step:
                return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached in {HANG_S:g} s")


@contextmanager
def started(*arguments):
    """A `train` in a process group of its own, which is gone when the block ends, whatever happened in it."""
    command = [sys.executable, "-m", "megabatch", "train", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


LONG = [*SMALL, "--set", "global_batch_size=16", "--set", "total_epochs=4000", "--set", "eval_every_epochs=100000"]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("workers", "number"), [(1, signal.SIGINT), (2, signal.SIGINT), (2, signal.SIGHUP)])
def test_a_signal_ends_all_workers_with_a_last_checkpoint_and_resume_goes_on(photos, tmp_path, workers, number):
    output = tmp_path / "run"
    arguments = ["photos", "--data", photos, "--workers", workers, "--precision", "fp32", "--output", output, *LONG]
    with started(*arguments) as process:
        wait_for_step(output, 5)
        os.killpg(process.pid, number)
        os.killpg(process.pid, number)  # a second one within 2 s changes nothing
        out, err = process.communicate(timeout=HANG_S)
        assert process.returncode == STOPPED, err
        assert "Traceback" not in err
        assert err.count(f"{number.name}: stops with a checkpoint within 30 s") == 1
        assert "--resume continues" in out
        assert group_is_gone(process.pid)
    written = [e["step"] for e in read_events(output / "events.jsonl") if e["event"] == "checkpoint"]
    last = [e["step"] for e in read_events(output / "events.jsonl") if e["event"] == "step"][-1]
    assert written[-1] == last
    done = megabatch_process("train", *arguments, "--resume", "--steps", 3)
    assert done.returncode == 0, done.stderr
    steps = [e["step"] for e in read_events(output / "events.jsonl") if e["event"] == "step"]
    assert steps[-3:] == [last + 1, last + 2, last + 3]


STOPPING = """
import os, signal, time
from megabatch.cli.train import _stop_on_signal
with _stop_on_signal({grace_s}, is_first=True) as stop_requested:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested()
        time.sleep(2.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(900)
    finally:
        print("cleaned up", flush=True)
"""


@pytest.mark.parametrize(("grace_s", "out"), [(60, "cleaned up\n"), (0.5, "")], ids=["second signal", "grace is over"])
def test_a_stop_ends_at_a_second_signal_and_when_the_grace_time_is_over(grace_s, out):
    command = [sys.executable, "-c", STOPPING.format(grace_s=grace_s)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert (done.returncode, done.stdout) == (STOPPED, out)
    said = f"megabatch: SIGTERM: stops with a checkpoint within {grace_s:g} s (--grace-s); "
    assert done.stderr == said + "a second signal ends it at once\n"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_under_nohup_outlives_its_terminal_and_reader(photos, tmp_path):
    arguments = ["photos", "--data", photos, "--workers", 2, "--output", tmp_path / "run", *LONG]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does; processes started here inherit it
    try:
        with started(*arguments) as process:
            wait_for_step(tmp_path / "run", 2)
            process.stdout.close()
            os.killpg(process.pid, signal.SIGHUP)
            wait_for_step(tmp_path / "run", 50)
            os.killpg(process.pid, signal.SIGTERM)
            assert process.wait(timeout=HANG_S) == STOPPED
            assert process.stderr.read().startswith("megabatch: SIGTERM: stops with a checkpoint")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert list((tmp_path / "run" / "checkpoints").glob("*.pt"))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_workers_stop_with_a_checkpoint_when_their_parent_is_killed(photos, tmp_path):
    arguments = ["photos", "--data", photos, "--workers", 2, "--output", tmp_path / "run", *LONG]
    with started(*arguments) as process:
        wait_for_step(tmp_path / "run", 2)
        process.kill()
        process.communicate(timeout=HANG_S)  # the workers hold the pipes
    assert list((tmp_path / "run" / "checkpoints").glob("*.pt"))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_worker_ends_the_run_and_resume_goes_on_from_the_checkpoint(photos, tmp_path):
    output = tmp_path / "run"
    arguments = ["photos", "--data", photos, "--workers", 2, "--precision", "fp32", "--output", output, *LONG]
    with started(*arguments, "--checkpoint-every", "2steps", "--max-restarts", 0) as process:
        wait_for_step(output, 6)
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
        process.communicate(timeout=HANG_S)
        assert process.returncode == 1
        assert group_is_gone(process.pid)
    done = megabatch_process("train", *arguments, "--resume", "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_that_ended_is_complete_and_is_not_gone_on_with_by_another_recipe(photos, tmp_path):
    arguments = ["photos", "--data", photos, "--workers", 2, "--output", tmp_path / "run", *QUICK]
    assert megabatch_process("train", *arguments).returncode == 0
    again = megabatch_process("train", *arguments, "--resume")
    assert again.returncode == 0, again.stderr
    assert "already complete at step 3" in again.stdout.splitlines()[-1]
    assert "peak_lr was" in error_line(megabatch_process("train", *arguments, "--resume", "--set", "peak_lr=3"))


def test_evaluate_counts_what_train_counted(photos, tmp_path, monkeypatch):
    output = tmp_path / "run"
    trained = megabatch("train", "photos", "--data", photos, "--workers", 1, "--output", output, *QUICK)
    top1 = trained.stdout.splitlines()[-1].split("top1 ")[1].split()[0]
    counted = megabatch("evaluate", output, "--data", photos, "--workers", 1, "--precision", "fp32")
    assert counted.returncode == 0, counted.stderr
    assert f"top1 {top1}" in counted.stdout
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = error_line(megabatch("evaluate", output, "--device", "cuda", "--workers", 2))
    assert "--device cpu works" in said


def test_evaluate_matches_classes_by_name(photos, tmp_path):
    output = tmp_path / "run"
    megabatch("train", "photos", "--data", photos, "--workers", 1, "--output", output, *QUICK)
    shutil.rmtree(photos / "val" / "blue")
    for has_train in (True, False):  # evaluation needs val/ only
        counted = megabatch("evaluate", output, "--data", photos, "--workers", 1, "--precision", "fp32")
        assert counted.stderr == "the data has images of 1 of the model's 2 classes; no blue\n"
        if has_train:
            shutil.rmtree(photos / "train")
    correct = int(counted.stdout.split("(")[1].split()[0])
    (photos / "val" / "red").rename(photos / "val" / "blue")
    as_blue = megabatch("evaluate", output, "--data", photos, "--workers", 1, "--precision", "fp32")
    assert int(as_blue.stdout.split("(")[1].split()[0]) == 4 - correct
    (photos / "val" / "blue").rename(photos / "val" / "green")
    said = error_line(megabatch("evaluate", output, "--data", photos, "--workers", 1))
    assert "does not know: green; its classes are blue, red;" in said


def test_photographs_are_trained_in_grey_only_where_the_user_says_so(photos, tmp_path):
    arguments = ["fashion_mnist", "--data", photos, "--workers", 1, "--set", "global_batch_size=128", "--steps", 1]
    said = refused(tmp_path, *arguments)
    assert "is in colour; recipe photos works" in said
    trained = megabatch("train", *arguments, "--set", "image_channels=1", "--output", tmp_path / "grey")
    assert trained.returncode == 0, trained.stderr
    assert "warning: a global batch of 128 images is larger than the data set of 24" in trained.stdout


@pytest.mark.parametrize(("stem", "size", "stride"), [("auto", 3, 1), ("large", 7, 2)])
def test_the_stem_is_said_and_kept_by_a_loaded_model(photos, tmp_path, stem, size, stride):
    settings = [*QUICK, "--set", f"stem={stem}"]
    settings[settings.index("model=resnet8")] = "model=resnet18"
    output = tmp_path / "run"
    trained = megabatch(
        "train", "photos", "--data", photos, "--workers", 1, "--output", output, *settings, "--steps", 1
    )
    assert f"photos: resnet18 with a {size}x{size} stem of stride {stride}, " in trained.stdout
    assert load_model(output).conv1.kernel_size == (size, size)


def test_resume_refuses_a_class_that_was_added_and_a_new_run_trains_it(photos, tmp_path):
    arguments = ["train", "photos", "--data", photos, "--workers", 1, *QUICK, "--output"]
    assert megabatch(*arguments, tmp_path / "run", "--steps", 1).returncode == 0
    for part in ("train", "val"):
        shutil.copytree(photos / part / "red", photos / part / "green")
    said = error_line(megabatch(*arguments, tmp_path / "run", "--resume"))
    assert "does not know: green; its classes are blue, red;" in said
    assert megabatch(*arguments, tmp_path / "other", "--steps", 1).returncode == 0


@pytest.mark.slow
@pytest.mark.multiprocess
def test_evaluate_counts_the_same_with_two_workers(photos, tmp_path):
    output = tmp_path / "run"
    trained = megabatch("train", "photos", "--data", photos, "--workers", 1, "--output", output, *QUICK)
    top1 = trained.stdout.splitlines()[-1].split("top1 ")[1].split()[0]
    counted = megabatch_process("evaluate", output, "--data", photos, "--workers", 2, "--precision", "fp32")
    assert counted.returncode == 0, counted.stderr
    assert f"top1 {top1}" in counted.stdout


def test_evaluate_refuses_what_is_no_checkpoint(tmp_path):
    done = megabatch("evaluate", tmp_path)
    assert done.returncode == 2
    assert "no checkpoint" in done.stderr


def test_the_command_is_installed():
    assert shutil.which("megabatch", path=str(Path(sys.executable).parent))
    assert "megabatch" in megabatch_process("--version").stdout


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dry_run_needs_no_data_and_keeps_nothing(tmp_path, workers):
    sizes = ["model=resnet8", "resolution=16", "eval_resolution=16", "bn_span=4", "global_batch_size=16"]
    settings = [word for size in sizes for word in ("--set", size)]
    options = ["--dry-run", 4, "--workers", workers, "--precision", "fp32"]
    done = megabatch_process("train", "goyal2017_8k", *options, *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "images from made photographs, most of 500 x 375 pixels" in done.stdout
    measured, whole = done.stdout.splitlines()[-2:]
    assert measured.startswith("dry run: 2 steps of 16 images, median ")
    assert whole.startswith("a whole run of 90 epochs: ")
    assert not list(tmp_path.iterdir())


def test_restarted_workers_make_only_the_steps_that_are_left(tmp_path):
    given = ["train", "photos", "--steps", "120", "--workers=2"]
    assert _restarted(given, folder=tmp_path, last_step=None) == [*given, "--resume"]
    (tmp_path / "checkpoints").mkdir()
    for step, left in ((None, "120"), (20, "100"), (100, "20"), (120, "1")):
        if step:
            (tmp_path / "checkpoints" / f"step-{step:08d}.json").touch()
        found = _restarted(given, folder=tmp_path, last_step=120)
        assert found == ["train", "photos", "--workers=2", "--steps", left, "--resume"]
