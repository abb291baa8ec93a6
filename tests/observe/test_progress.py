"""The progress display, on a terminal and in a log file."""

import io
import re

import pytest

from megabatch.observe.progress import Progress, duration


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    """A stream that reports to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_at_most_one_line_per_ten_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(100, 10, stream=stream, clock=clock) as progress:
        for step in range(1, 101):
            progress.step(step, step / 10, loss=1.0, images_per_s=5000)
            clock.now_s += 1.0
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert [line.split("  ")[1] for line in lines] == [f"step {step}/100" for step in range(1, 101, 10)]
    assert "\x1b" not in stream.getvalue()


def test_every_evaluation_is_printed() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(10, 2, stream=stream, clock=clock) as progress:
        progress.evaluation(1.0, 0.8123, 0.99, "on the published curve (0.810 at epoch 1)")
        progress.evaluation(2.0, 0.9)
    assert stream.getvalue().splitlines() == [
        "evaluation  epoch 1.00  top1 0.8123  top5 0.9900  on the published curve (0.810 at epoch 1)",
        "evaluation  epoch 2.00  top1 0.9000",
    ]


def test_time_left_is_estimated_from_epochs() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(1000, 10, stream=stream, clock=clock) as progress:
        progress.step(1, 1.0, 2.3, 100)  # the estimate excludes the first update
        clock.now_s += 30
        progress.step(2, 4.0, 2.3, 100)  # three epochs in 30 s: six more take 60 s
    assert "left" not in stream.getvalue().splitlines()[0]
    assert stream.getvalue().splitlines()[1].endswith("1 min 00 s left")


def test_steps_show_the_last_accuracy() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(10, 2, stream=stream, clock=clock) as progress:
        progress.evaluation(1.0, 0.8123)
        progress.step(6, 1.2, 0.5, 1234.5)
    assert "1,234 images/s  loss 0.500  top1 0.8123" in stream.getvalue()


def test_quiet_prints_only_notes_and_disabled_prints_nothing() -> None:
    output = {}
    for name, options in {"quiet": {"quiet": True}, "worker": {"enabled": False}}.items():
        stream = io.StringIO()
        with Progress(10, 2, stream=stream, **options) as progress:
            progress.step(1, 0.1, 2.3, 100)
            progress.evaluation(1.0, 0.8)
            progress.note("warning: [bold]")
        output[name] = stream.getvalue()
    assert output == {"quiet": "warning: [bold]\n", "worker": ""}


def test_a_terminal_of_80_columns_fits_all_values_and_keeps_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(100, 10, stream=stream, clock=Clock()) as progress:
        for step in range(1, 51):
            progress.step(step, step / 10, 1.5, 5000)
        progress.evaluation(5.0, 0.75, remark="x [not markup] y")
    time_left = re.search(r"\d+ s left", stream.getvalue())
    assert time_left is not None
    text = stream.getvalue()
    assert "epoch 5.00/10  step 50/100  5,000 images/s  loss 1.500" in text
    assert " 50%" in text
    assert "…" not in text
    assert "x [not markup] y" in text
    assert text.count("evaluation") == 1


def test_a_new_number_of_total_steps_is_shown() -> None:
    stream = io.StringIO()
    with Progress(100, 10, stream=stream) as progress:
        progress.step(1, 0.1, 2.0, 10, total_steps=70)
    assert "step 1/70" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_durations_have_readable_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_a_terminal_would_interpret_is_escaped() -> None:
    stream = io.StringIO()
    with Progress(10, 1.0, stream=stream) as progress:
        progress.note("warning: a\nb\x1b[2J\udce9.jpg was replaced")
    assert stream.getvalue() == "warning: a\\nb\\x1b[2J\\udce9.jpg was replaced\n"
