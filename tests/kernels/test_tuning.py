"""The choice between ways of computing the same, with a timer that says what the test wants."""

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megabatch.kernels import tuning
from megabatch.kernels.tuning import Table

LIKE = torch.zeros(1)
FILE = f"{tuning.device_name(torch.device('cpu'))}.json"


class Clock:
    """Times a way by its name, and counts how often it was asked."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.calls = 0

    def __call__(self, work: Callable[[], object]) -> float:
        self.calls += 1
        return self.seconds[str(work())]


def ways(*names: str) -> dict[str, Callable[[], str]]:
    return {name: lambda name=name: name for name in names}


def test_the_fastest_way_is_taken_and_measured_once() -> None:
    clock = Clock(plain=2.0, wide=1.0, tall=3.0)
    table = Table(timer=clock)
    for _ in range(3):
        assert table.take("product", (4, 8), LIKE, ways("plain", "wide", "tall")) == "wide"
    assert clock.calls == 3


def test_other_tasks_sizes_and_types_are_measured_for_themselves() -> None:
    clock = Clock(plain=1.0, wide=2.0)
    table = Table(timer=clock)
    cases = [("a", (1,), LIKE), ("b", (1,), LIKE), ("a", (2,), LIKE), ("a", (1,), LIKE.half())]
    for task, sizes, like in cases:
        assert table.choose(task, sizes, like, ways("plain", "wide")) == "plain"
    assert clock.calls == 2 * len(cases)


def test_without_a_timer_a_cpu_takes_the_plain_way() -> None:
    assert Table().choose("a", (1,), LIKE, ways("plain", "wide")) == "plain"


def test_a_way_that_fails_is_not_taken() -> None:
    def fails() -> str:
        raise RuntimeError("out of shared memory")

    table = Table(timer=Clock(plain=2.0))
    assert table.take("a", (1,), LIKE, {"plain": lambda: "plain", "broken": fails}) == "plain"


def test_if_every_way_fails_the_plain_ways_error_is_seen() -> None:
    def fails() -> str:
        raise ValueError("no such shape")

    with pytest.raises(ValueError, match="no such shape"):
        Table(timer=Clock()).take("a", (1,), LIKE, {"plain": fails, "other": fails})


def test_fixed_ways_are_taken_unmeasured_where_they_exist() -> None:
    clock = Clock(plain=1.0, wide=2.0)
    table = Table(timer=clock, fixed={"a": "wide"})
    assert table.choose("a", (1,), LIKE, ways("plain", "wide")) == "wide"
    assert clock.calls == 0
    assert table.choose("a", (1,), LIKE, ways("plain")) == "plain"


def test_choices_outlive_the_process_until_they_are_cleared(tmp_path: Path) -> None:
    Table(tmp_path, timer=Clock(plain=2.0, wide=1.0)).choose("a", (1,), LIKE, ways("plain", "wide"))
    later = Table(tmp_path, timer=Clock(plain=1.0, wide=2.0))
    assert later.choose("a", (1,), LIKE, ways("plain", "wide")) == "wide"
    later.clear()
    assert later.choose("a", (1,), LIKE, ways("plain", "wide")) == "plain"


def test_a_choice_that_no_longer_exists_is_made_anew(tmp_path: Path) -> None:
    Table(tmp_path, timer=Clock(plain=2.0, wide=1.0)).choose("a", (1,), LIKE, ways("plain", "wide"))
    assert Table(tmp_path, timer=Clock(plain=2.0, tall=1.0)).choose("a", (1,), LIKE, ways("plain", "tall")) == "tall"


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 3}', "\x00", '{"a torch.float32 1": ["wide"]}'])
def test_a_file_that_makes_no_sense_is_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    assert Table(tmp_path, timer=Clock(plain=2.0, wide=1.0)).choose("a", (1,), LIKE, ways("plain", "wide")) == "wide"
    assert json.loads((tmp_path / FILE).read_text()) == {"a torch.float32 1": "wide"}


def test_a_folder_that_cannot_be_made_costs_only_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    clock = Clock(plain=2.0, wide=1.0)
    table = Table(tmp_path / "file" / "below", timer=clock)
    assert [table.choose("a", (1,), LIKE, ways("plain", "wide")) for _ in range(2)] == ["wide", "wide"]
    assert clock.calls == 2


def test_of_two_processes_that_measure_at_once_both_take_what_was_written_first(tmp_path: Path) -> None:
    slow, quick = Table(tmp_path, timer=Clock(plain=2.0, wide=1.0)), Table(tmp_path, timer=Clock(plain=1.0, wide=2.0))
    slow.choose("other", (1,), LIKE, ways("plain", "wide"))  # both have read the file before the choice is in it
    quick.choose("other", (1,), LIKE, ways("plain", "wide"))
    assert quick.choose("a", (1,), LIKE, ways("plain", "wide")) == "plain"
    assert slow.choose("a", (1,), LIKE, ways("plain", "wide")) == "plain"


def _choose_many(folder: str, first: int) -> None:
    table = Table(Path(folder), timer=Clock(plain=2.0, wide=1.0))
    for number in range(first, first + 20):
        table.choose("a", (number,), LIKE, ways("plain", "wide"))


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_choose_many, args=(str(tmp_path), 20 * n)) for n in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert len(json.loads((tmp_path / FILE).read_text())) == 60


def test_kernels_ask_the_table_that_is_set_and_else_one_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    mine = Table()
    tuning.use_table(mine)
    try:
        assert tuning.table() is mine
    finally:
        tuning.use_table(None)
    assert tuning.table().folder == Path.home() / ".cache" / "megabatch" / "kernels"
