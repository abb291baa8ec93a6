"""Mutated events and recipes of run folders: a report, or UserError."""

import json

import pytest
from mutations import TEXTS, mutate_json, mutate_json_text, run_cases
from run_folders import evaluation_event, make_run, step_event
from slow import slow_except

from megabatch.observe.report import write_report


@pytest.mark.parametrize("count", slow_except([10, 300], 10))
def test_mutated_run_folders(count, tmp_path):
    spans = [["step", "forward", 0.0, 10.0], ["bucket 0", "exchange", 10.0, 5.0]]
    events = [step_event(step, phases_s={"input": 0.1, "forward": 0.2}) for step in range(1, 5)]
    events += [{"event": "observation", "step": step, "epoch": step / 10, "spans": spans} for step in (1, 2)]
    events += [evaluation_event(4, 0.9), {"event": "warning", "text": "x"}, {"event": "run_end", "train_s": 3.0}]
    run = make_run(tmp_path / "run", events, start={"cpu": "A"})
    good = {path: path.read_text() for path in run.iterdir()}

    def case(rng):
        for path, text in good.items():
            path.write_text(text)
        path = rng.choice(list(good))
        if path.suffix == ".json":
            path.write_bytes(mutate_json_text(good[path], rng))
        else:
            lines = good[path].splitlines()
            at = rng.randrange(len(lines))
            lines[at] = rng.choice(
                [json.dumps(mutate_json(json.loads(lines[at]), rng)), lines[at][:-1], rng.choice(TEXTS), "[" * 10**5]
            )
            path.write_bytes("\n".join([*lines, ""]).encode("utf-8", "surrogateescape"))
        page = write_report([run], tmp_path / "report.html").read_text()
        assert not {char for char in page if not char.isprintable() and char != "\n"}
        return True

    outcomes = run_cases("run folders", count, case)
    assert min(outcomes["accepted"], outcomes["refused"]) > 0
