"""Seeded mutations of bytes, JSON values and texts, and a loop that runs them: only our own errors may come out."""

import json
import os
import random
import resource
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megabatch.errors import MegabatchError

HANG_S = 60
"""Longest time of one case; the slowest takes some 100 ms on an idle machine."""
MOST_MEMORY_BYTES = 2 << 30
"""Most resident memory that all cases of a test may add."""

NUMBERS = ["0", "-1", "1", "1e308", "-1e308", "1e-308", "nan", "inf", "9" * 30, "9" * 5000, "0x10", "1_000", "٣", "1.5"]
TEXTS = [
    "",
    " ",
    "none",
    "true",
    "\0",
    "\x1b[2J",
    "\udce9",
    "\u202ex",
    "<script>",
    "../../x",
    "a" * 10_000,
    "=",
    ":",
    ",",
    "0:1",
]
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        2**31,
        2**63,
        10**400,
        0.5,
        -1.5,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "x",
        "\0",
        "\u202e",
    ),
    *([], [[]], {}, {"a": 1}, [0, [1, [2]]], [[0, 1], [0, 1]], ["x"] * 3, "a" * 10_000),
]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """`data` with up to five changes: bytes set or flipped, chunks cut, doubled or moved; sometimes truncated."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        if not changed:
            break
        first = rng.choice([len(changed), 64, 700])  # most of a file's structure is at its beginning
        at = rng.randrange(min(len(changed), first))
        length = rng.choice([1, 2, 4, 8, 64, 1000])
        kind = rng.randrange(8)
        if kind < 3:
            changed[at] = rng.choice([0, 255, 127, 128, rng.randrange(256), changed[at] ^ 1 << rng.randrange(8)])
        elif kind == 3:
            changed[at : at + length] = rng.randbytes(length)
        elif kind == 4:
            del changed[at : at + length]
        elif kind == 5:
            changed[at:at] = changed[at : at + length]
        elif kind == 6:
            changed[at : at + 4] = rng.choice(
                [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"]
            )
        else:
            del changed[rng.randrange(len(changed)) :]
    return bytes(changed)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value in which one entry, at any depth, is replaced, removed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        copied, key = dict(value), rng.choice(list(value))
        kind = rng.randrange(8)
        if kind == 0:
            del copied[key]
        elif kind == 1:
            copied[rng.choice(TEXTS)] = rng.choice(VALUES)
        else:
            copied[key] = mutate_json(copied[key], rng)
        return copied
    if isinstance(value, list) and value and rng.random() < 0.8:
        copied, at = list(value), rng.randrange(len(value))
        copied[at : at + 1] = rng.choice([[], [mutate_json(copied[at], rng)], [copied[at]] * 2])
        return copied
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice([value + 1, value * 2, value // 2, -value])
    return rng.choice(VALUES)


def mutate_json_text(text: str, rng: random.Random) -> bytes:
    """A JSON text with one to three changed entries; every fourth time with changed bytes, or nested without end."""
    kind = rng.randrange(8)
    if kind == 0:
        return mutate_bytes(text.encode(), rng)
    if kind == 1:
        opening = rng.choice(["[", '{"a":'])
        return text[: rng.randrange(len(text))].encode() + (opening * 100_000).encode()
    value = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        value = mutate_json(value, rng)
    return json.dumps(value).encode()


def run_cases(name: str, count: int, case: Callable[[random.Random], bool]) -> Counter[str]:
    """Runs `case` with seeds 0 .. count - 1; it returns True if the input was accepted.

    Our own errors count as refusals. Any other error, a case of more than `HANG_S`, and more memory than
    `MOST_MEMORY_BYTES` fail the test with the seed. With MEGABATCH_FUZZ_RECORD the result is appended to that file.
    """
    outcomes: Counter[str] = Counter()
    before = _peak_bytes()
    old = signal.signal(signal.SIGALRM, _hang)
    try:
        for seed in range(count):
            signal.alarm(HANG_S)
            try:
                outcomes["accepted" if case(random.Random(seed)) else "refused"] += 1
            except MegabatchError:
                outcomes["refused"] += 1
            except Exception as error:
                raise AssertionError(f"{name}: seed {seed} raised {type(error).__name__}: {error}") from error
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, old)
    added = _peak_bytes() - before
    assert added < MOST_MEMORY_BYTES, f"{name}: {added:,} bytes of memory"
    record({"name": name, "count": count, **outcomes, "added_bytes": added})
    return outcomes


def _hang(*_: object) -> None:
    raise TimeoutError(f"a case took more than {HANG_S} s")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def record(facts: dict[str, Any]) -> None:
    """Appends one line to the file that MEGABATCH_FUZZ_RECORD names, if it does."""
    if path := os.environ.get("MEGABATCH_FUZZ_RECORD"):
        with Path(path).open("a") as file:
            file.write(json.dumps(facts) + "\n")
