"""Cost of observation: bytes and opening time of a long run's report, and time of a step with and without its events.

    python benchmarks/observation.py page --output FOLDER [--steps 100000] [--repeats 5]
    GOMP_SPINCOUNT=3000 python benchmarks/observation.py step [--repeats 9]

`page` makes up a run of ResNet-50's layers with every field that training writes, writes its report, and opens it in
headless Chromium: milliseconds from the start of the navigation to the load event, with all charts drawn and the page
laid out. `step` times ten updates of the demo on random images, interleaved: with clocks, one observation and the event
log, and with none of them; GOMP_SPINCOUNT as the command line sets it. Both print one JSON line per measurement.
"""

import argparse
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megabatch import recipes
from megabatch.bench.synthetic_step import measured_batch_size, run_step, synthetic_step
from megabatch.bench.timing import compare, record, table
from megabatch.comm.launch import World
from megabatch.observe.environment import describe
from megabatch.observe.events import SCHEMA, EventLog
from megabatch.observe.report import write_report
from megabatch.recipe import fields_as_json
from megabatch.runtime import Runtime
from megabatch.train.loop import step_event
from megabatch.train.measuring.observation import EVERY_STEPS, MOST_OBSERVATIONS, observation_event
from megabatch.train.state import Run

NUM_LAYERS, NUM_CLASSES, NUM_EPOCHS = 54, 10, 90
UPDATES = EVERY_STEPS
"""Updates of a repeat: one of them is observed."""
WATCH = """<script>addEventListener("load", () => {
document.documentElement.dataset.opened = document.body.offsetHeight && performance.now() })</script>"""


def write_long_run(folder: Path, num_steps: int) -> Path:
    """Writes a run folder of `num_steps` updates with the fields of a run of two workers; returns it."""
    folder.mkdir(parents=True)
    recipe, draw = recipes.get("mlperf_4096"), random.Random(0)
    (folder / "recipe.json").write_text(json.dumps(fields_as_json(recipe)), encoding="utf-8")
    every, evaluated = max(1, num_steps // MOST_OBSERVATIONS), max(1, num_steps // NUM_EPOCHS)
    names = [f"class {number}" for number in range(NUM_CLASSES)]
    with EventLog(folder / "events.jsonl") as log:
        log.write("run_start", schema=SCHEMA, recipe=recipe.name, workers=2, class_names=names, **describe())
        for step in range(1, num_steps + 1):
            where = {"step": step, "epoch": NUM_EPOCHS * step / num_steps}
            log.write("step", **where, **_step(step / num_steps, draw))
            if step % every == 0:
                log.write("observation", **where, **_observation(draw))
            if step % evaluated == 0:
                log.write("evaluation", **where, **_evaluation(step / num_steps, draw))
        log.write("run_end", top1=0.76, images_per_s=9000.0, train_s=0.4 * num_steps, num_replaced_samples=0)
    return folder


def _step(share: float, draw: random.Random) -> dict[str, Any]:
    names = {"input": 0.001, "forward": 0.1, "backward": 0.2, "exchange": 0.02, "update": 0.01}
    phases = {name: round(mean * draw.uniform(0.9, 1.2), 6) for name, mean in names.items()}
    seconds = sum(phases.values()) + 0.002
    ranks = {"median": seconds, "max": seconds * draw.uniform(1.0, 1.1), "slowest": draw.randrange(2)}
    return {
        "loss": 7 * math.exp(-3 * share) + draw.gauss(0, 0.1),
        "train_top1": 0.75 * share + draw.gauss(0, 0.02),
        "lr": 10 * (1 - share) ** 2,
        "momentum": 0.9,
        "global_batch_size": 4096,
        "resolution": 224,
        "images_per_s": 4096 / seconds,
        "step_s": seconds,
        "phases_s": phases,
        "exposed_ms": 1e3 * phases["exchange"],
        "num_buckets": 5,
        "bytes_on_wire": 102_228_128,
        "ranks_input_s": ranks,
        "ranks_compute_s": ranks,
    }


def _observation(draw: random.Random) -> dict[str, Any]:
    layers = {
        f"layer{number // 14 + 1}.{number % 14}.conv.weight": {
            "weight_norm": draw.uniform(1, 20),
            "grad_norm": draw.uniform(0.001, 1),
            "trust_ratio": 10 ** draw.uniform(-4, -1),
        }
        for number in range(NUM_LAYERS)
    }
    spans = [["step", ("input", "forward", "backward")[n % 3], 5.0 * n, 5.0] for n in range(60)]
    return {"grad_norm": draw.uniform(0.1, 2), "layers": layers, "spans": spans, "peak_host_bytes": 2**33}


def _evaluation(share: float, draw: random.Random) -> dict[str, Any]:
    matrix = [[draw.randrange(5000) for _ in range(NUM_CLASSES)] for _ in range(NUM_CLASSES)]
    top1 = 0.76 * share
    return {"top1": top1, "top5": min(1.0, 1.2 * top1), "loss": 2.0, "num_samples": 50_000, "confusion": matrix}


def measure_page(folder: Path, num_steps: int, repeats: int) -> dict[str, Any]:
    """Bytes of events and page, seconds of writing the page, and milliseconds until a browser shows it."""
    run = write_long_run(folder / f"run-{num_steps}", num_steps)
    start = time.perf_counter()
    page = write_report([run], run / "report.html")
    wrote_s = time.perf_counter() - start
    return {
        "benchmark": "observation page",
        "num_steps": num_steps,
        "events_bytes": (run / "events.jsonl").stat().st_size,
        "page_bytes": page.stat().st_size,
        "write_report_s": wrote_s,
        "opened_ms": sorted(_open(page) for _ in range(repeats)),
        "environment": describe(),
    }


def _open(page: Path) -> float:
    """Milliseconds until a fresh headless Chromium has drawn the page."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("chromium or google-chrome is needed; `apt-get install chromium` works")
    text = page.read_text(encoding="utf-8").replace("</body>", f"{WATCH}</body>")
    with tempfile.TemporaryDirectory() as profile:
        copy = Path(profile) / "page.html"
        copy.write_text(text, encoding="utf-8")
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={profile}",
            "--window-size=1240,900",
        ]
        command = [browser, *options, "--dump-dom", copy.as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'data-opened="([^"]*)"', shown)
    if found is None:
        raise SystemExit(f"{page} was not drawn")
    return float(found[1])


class NoClock:
    """Takes the place of `StepClock` in steps that are not observed."""

    start = own_s = 0.0

    def __init__(self, _: object) -> None:
        pass

    def mark(self, phase: str) -> None:
        """Does nothing."""

    def seconds(self) -> dict[str, float]:
        """No seconds of any phase."""
        return {}


def measure_step(repeats: int) -> list[dict[str, Any]]:
    """Ten updates of the demo with observation and without, interleaved."""
    recipe = recipes.get("fashion_mnist")
    batch = measured_batch_size(recipe, None, images_at_224=32)
    with (
        synthetic_step(recipe, Runtime(), world=World(), global_batch_size=batch) as ready,
        tempfile.TemporaryDirectory() as folder,
        EventLog(Path(folder) / "events.jsonl") as log,
    ):
        works = {"without": lambda: _bare(ready.run), "with": lambda: _observed(ready.run, log)}
        timings = compare(works, warmup=1, repeats=repeats)
    parameters = {"recipe": recipe.name, "batch": batch, "updates": UPDATES}
    return [
        record("observation step", case, timing, parameters=parameters, baseline=("without", timings["without"]))
        for case, timing in timings.items()
    ]


def _bare(run: Run) -> None:
    run.observe_every_steps = 10**9
    with patch("megabatch.train.step.StepClock", NoClock):
        for _ in range(UPDATES):
            run_step(run)


def _observed(run: Run, log: EventLog) -> None:
    run.observe_every_steps = EVERY_STEPS
    for _ in range(UPDATES):
        step = run_step(run)
        log.write(**step_event(run, step, 1.0))
        if event := observation_event(run, step):
            log.write(**event)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["page", "step"])
    parser.add_argument("--output", type=Path, help="folder of the made-up run; default: a temporary one")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    if chosen.what == "step":
        found = measure_step(chosen.repeats)
        print(*map(json.dumps, found), table(found), sep="\n")
        return
    with tempfile.TemporaryDirectory() as temporary:
        page = measure_page(chosen.output or Path(temporary), chosen.steps, chosen.repeats)
    print(json.dumps(page))
    print(f"{page['page_bytes'] / 1e6:.2f} MB; opened in {statistics.median(page['opened_ms']):,.0f} ms (median)")


if __name__ == "__main__":
    main()
