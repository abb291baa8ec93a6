"""Autotuning with a timer that returns given times."""

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from limits import HANG_S

from megabatch.app.measured import tuning
from megabatch.app.measured.tuning import Table

LIKE = torch.zeros(1)
FILE = f"{tuning.device_name(torch.device('cpu'))}.json"


class Clock:
    """Timer that looks a candidate's time up by its name, and counts its calls."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.calls = 0

    def __call__(self, work: Callable[[], object]) -> float:
        self.calls += 1
        return self.seconds[str(work())]


def candidates(*names: str) -> dict[str, Callable[[], str]]:
    return {name: lambda name=name: name for name in names}


def test_the_fastest_candidate_is_used_and_measured_once() -> None:
    clock = Clock(plain=2.0, wide=1.0, tall=3.0)
    table = Table(timer=clock)
    for _ in range(3):
        assert table.choose("product", (4, 8), LIKE, candidates("plain", "wide", "tall")) == "wide"
    assert clock.calls == 3


def test_each_task_size_and_dtype_is_measured_separately() -> None:
    clock = Clock(plain=1.0, wide=2.0)
    table = Table(timer=clock)
    cases = [("a", (1,), LIKE), ("b", (1,), LIKE), ("a", (2,), LIKE), ("a", (1,), LIKE.half())]
    for task, sizes, like in cases:
        assert table.choose(task, sizes, like, candidates("plain", "wide")) == "plain"
    assert clock.calls == 2 * len(cases)


def test_without_a_timer_the_plain_candidate_is_used() -> None:
    assert Table().choose("a", (1,), LIKE, candidates("plain", "wide")) == "plain"


def test_a_candidate_that_fails_is_not_used() -> None:
    def fails() -> str:
        raise RuntimeError("out of shared memory")

    table = Table(timer=Clock(plain=2.0))
    assert table.choose("a", (1,), LIKE, {"plain": lambda: "plain", "broken": fails}) == "plain"


def test_a_failure_of_every_candidate_is_not_kept_as_a_choice(tmp_path: Path) -> None:
    failing = Table(tmp_path, timer=lambda _: float("inf"))
    assert failing.choose("product", (1,), LIKE, candidates("plain", "wide")) == "plain"
    assert not (tmp_path / FILE).exists()
    failing.timer = Clock(plain=2.0, wide=1.0)
    assert failing.choose("product", (1,), LIKE, candidates("plain", "wide")) == "wide"


def test_choices_persist_in_the_file_until_they_are_cleared(tmp_path: Path) -> None:
    Table(tmp_path, timer=Clock(plain=2.0, wide=1.0)).choose("a", (1,), LIKE, candidates("plain", "wide"))
    later = Table(tmp_path, timer=Clock(plain=1.0, wide=2.0))
    assert later.choose("a", (1,), LIKE, candidates("plain", "wide")) == "wide"
    later.clear()
    assert later.choose("a", (1,), LIKE, candidates("plain", "wide")) == "plain"


def test_a_recorded_candidate_that_no_longer_exists_is_measured_again(tmp_path: Path) -> None:
    Table(tmp_path, timer=Clock(plain=2.0, wide=1.0)).choose("a", (1,), LIKE, candidates("plain", "wide"))
    assert (
        Table(tmp_path, timer=Clock(plain=2.0, tall=1.0)).choose("a", (1,), LIKE, candidates("plain", "tall")) == "tall"
    )


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 3}', "\x00", '{"a torch.float32 1": ["wide"]}'])
def test_a_corrupt_file_is_ignored_and_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    assert (
        Table(tmp_path, timer=Clock(plain=2.0, wide=1.0)).choose("a", (1,), LIKE, candidates("plain", "wide")) == "wide"
    )
    assert json.loads((tmp_path / FILE).read_text()) == {"a torch.float32 1": "wide"}


def test_choices_work_in_memory_if_the_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    clock = Clock(plain=2.0, wide=1.0)
    table = Table(tmp_path / "file" / "below", timer=clock)
    assert [table.choose("a", (1,), LIKE, candidates("plain", "wide")) for _ in range(2)] == ["wide", "wide"]
    assert clock.calls == 2


def test_two_processes_that_measure_at_once_both_use_what_was_written_first(tmp_path: Path) -> None:
    slow, quick = Table(tmp_path, timer=Clock(plain=2.0, wide=1.0)), Table(tmp_path, timer=Clock(plain=1.0, wide=2.0))
    slow.choose("other", (1,), LIKE, candidates("plain", "wide"))  # both read the file before it has the choice
    quick.choose("other", (1,), LIKE, candidates("plain", "wide"))
    assert quick.choose("a", (1,), LIKE, candidates("plain", "wide")) == "plain"
    assert slow.choose("a", (1,), LIKE, candidates("plain", "wide")) == "plain"


def _choose_many(folder: str, first: int) -> None:
    table = Table(Path(folder), timer=Clock(plain=2.0, wide=1.0))
    for number in range(first, first + 20):
        table.choose("a", (number,), LIKE, candidates("plain", "wide"))


def test_concurrent_writes_lose_no_choice(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_choose_many, args=(str(tmp_path), 20 * n)) for n in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(HANG_S)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert len(json.loads((tmp_path / FILE).read_text())) == 60


def test_the_default_table_is_in_the_users_cache_folder_and_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    mine = Table()
    tuning.use_table(mine)
    try:
        assert tuning.table() is mine
    finally:
        tuning.use_table(None)
    assert tuning.table().folder == Path.home() / ".cache" / "megabatch" / "kernels"
