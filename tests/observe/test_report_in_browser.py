"""The page in headless Chromium: charts are drawn, and its controls change them."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from limits import HANG_S
from run_folders import evaluation_event, make_run, step_event

from megabatch.observe.report import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")

DRIVE = """
const found = {errors: window.failures, drawn: drawn.length};
const plot = () => drawn[0].plot;
found.epochs = plot().data[0].slice(-1)[0];
const select = document.getElementById("x-axis");
select.value = "step";
select.dispatchEvent(new Event("change"));
found.steps = plot().data[0].slice(-1)[0];
const series = plot().series.length;
const slider = document.getElementById("smoothing");
slider.value = "0.9";
slider.dispatchEvent(new Event("input"));
found.smoothed = [series, plot().series.length];
setTimeout(() => {  // uPlot lays out after the script that made it
  const over = plot().over, box = over.getBoundingClientRect();
  const mouse = (type, share) => (type === "mouseup" ? document : over).dispatchEvent(
    new MouseEvent(type, {clientX: box.left + share * box.width, clientY: box.top + 20, movementX: 5, bubbles: true}));
  mouse("mousemove", 0.5);
  found.hover = plot().data[0][plot().cursor.idx];
  mouse("mousedown", 0.2); mouse("mousemove", 0.6); mouse("mouseup", 0.6);
}, 50);
setTimeout(() => {
  const {min, max} = plot().scales.x;
  found.zoomed = [Math.round(min), Math.round(max)];
  const check = [...document.querySelectorAll(".log input")].find((one) => !one.disabled);
  check.checked = true;
  check.dispatchEvent(new Event("change"));
}, 100);
setTimeout(() => {
  found.logarithmic = drawn.filter((one) => one.plot.scales.y.distr === 3).length;
  found.heat = document.querySelectorAll(".heat i").length;
  found.wide = document.documentElement.scrollWidth > innerWidth;
  document.documentElement.dataset.found = JSON.stringify(found);
}, 150);
"""


def driven(page: Path, width: int) -> dict[str, object]:
    """Returns what `DRIVE` found in a window of `width` pixels."""
    text = page.read_text(encoding="utf-8")
    watch = "window.failures = []; addEventListener('error', (event) => failures.push(event.message))"
    text = text.replace("<head>", f"<head><script>{watch}</script>")
    page.write_text(text.replace("</body>", f"<script>{DRIVE}</script></body>"), encoding="utf-8")
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    options = ["--virtual-time-budget=5000", f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", page.as_uri()]
    shown = subprocess.run([*command, *options], capture_output=True, text=True, timeout=HANG_S, check=True).stdout
    (found,) = re.findall(r'data-found="([^"]*)"', shown)
    return json.loads(found.replace("&quot;", '"'))


@pytest.mark.parametrize("width", [1240, 500])
def test_charts_are_drawn_and_the_controls_change_them(tmp_path: Path, width: int) -> None:
    layers = {"conv1.weight": {"weight_norm": 1.0, "grad_norm": 0.1, "trust_ratio": 0.5}}
    observed = {"event": "observation", "step": 20, "epoch": 2.0, "grad_norm": 1.0, "layers": layers, "spans": []}
    events = [step_event(step, train_top1=0.5) for step in range(1, 41)] + [evaluation_event(40, 0.9), observed]
    runs = [make_run(tmp_path / name, events) for name in ("a", "b", "c")]
    found = driven(write_report(runs, tmp_path / "report.html"), width)
    assert found.pop("drawn") >= 5
    assert 19 <= found.pop("hover") <= 22  # the middle of updates 1 to 40
    low, high = found.pop("zoomed")
    assert 8 <= low <= 10
    assert 23 <= high <= 26
    without, with_smoothing = found.pop("smoothed")
    assert with_smoothing == without + len(runs)  # the raw values stay behind their mean
    assert found == {"errors": [], "epochs": 4.0, "steps": 40, "logarithmic": 1, "heat": 3, "wide": False}
