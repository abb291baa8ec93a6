"""The report page: complete, self-contained, robust to unfinished runs, and safe with hostile names."""

import dataclasses
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_folders import evaluation_event, make_run, step_event

from megabatch import recipes
from megabatch.errors import UserError
from megabatch.observe.curve import published_at
from megabatch.observe.panels import median_phases
from megabatch.observe.report import write_report
from megabatch.observe.run_folder import Span, load_runs

VOID = {"meta", "br", "hr", "img", "input", "link"}
LOADING = {"src", "href", "xlink:href", "data", "action", "poster", "srcset", "formaction", "background"}


class Page(HTMLParser):
    """Parses a page: text by element, attributes, and elements closed in the wrong order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[tuple[str, str]] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append((self.open[-1] if self.open else "", data.strip()))

    def data(self) -> dict[str, Any]:
        (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', self.source, re.DOTALL)
        return json.loads(found)

    def charts(self) -> dict[str, Any]:
        return {chart["title"]: chart for chart in self.data()["charts"]}

    def headings(self) -> list[str]:
        return [text for tag, text in self.text if tag == "b"]


def test_a_finished_run_shows_curves_recipe_and_environment(tmp_path: Path) -> None:
    end = {"event": "run_end", "top1": 0.9151, "images_per_s": 4321.0, "train_s": 100}
    events = [*map(step_event, range(1, 31)), evaluation_event(30, 0.9151), end]
    run = make_run(tmp_path / "run", events, start={"cpu": "A processor", "torch": "2.13.0"})
    written = write_report([run], tmp_path / "new" / "report.html")
    page = Page(written)
    assert written == tmp_path / "new" / "report.html"
    assert page.wrong == []
    assert page.open == []
    assert {"Top-1 accuracy", "Loss", "Learning rate", "Throughput"} <= set(page.charts())
    assert not {"Momentum", "Global batch size"} & set(page.charts())  # they are constant
    shown = [text for _, text in page.text]
    for text in ("91.51 %", "4,321", "1 min 40 s", "A processor", "peak_lr", "trust_coefficient"):
        assert text in shown


def test_the_page_loads_no_other_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [*map(step_event, range(1, 31)), evaluation_event(30, 0.9)])
    page = Page(write_report([run], tmp_path / "report.html"))
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", page.source)
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert not [value for _, name, value in page.attributes if name in LOADING]
    (policy,) = [value for tag, name, value in page.attributes if tag == "meta" and value.startswith("default-src")]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "$\\frac{1}{$"])
def test_hostile_names_and_warnings_are_escaped(tmp_path: Path, hostile: str) -> None:
    recipe = dataclasses.replace(recipes.get("fashion_mnist"), name=hostile, dataset=hostile)
    observed = {"event": "observation", "step": 2, "spans": [[hostile, hostile, 0, 5]], "layers": {hostile: {}}}
    matrix = evaluation_event(2, 0.5, confusion=[[1, 2], [0, 1]])
    events = [step_event(1), step_event(2), observed, matrix, {"event": "warning", "text": hostile}]
    start = {"cpu": hostile, hostile: 1, "command": hostile, "class_names": [hostile, "b"]}
    run = make_run(tmp_path / "run", events, recipe=recipe, start=start)
    page = Page(write_report([run], tmp_path / "report.html"))
    assert page.tags.count("script") == 2  # the data and the code
    assert "img" not in page.tags
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert page.wrong == []
    assert any(hostile in text for tag, text in page.text if tag == "h1")
    assert page.data()["heat"][0]["rows"][0]["name"] == hostile


def test_names_in_any_bytes_leave_a_page_in_utf8(tmp_path: Path) -> None:
    events = [{"event": "warning", "text": "\udce9t\ud800\x1b\n.jpg was replaced"}]
    run = make_run(tmp_path / os.fsdecode(b"run-\xe9"), events, start={"data": "folder \udce9"})
    page = write_report([run, make_run(tmp_path / "other", [])], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "\\udce9t\\ud800\\x1b\\n.jpg was replaced" in page
    assert "run-\\udce9" in page


def test_control_characters_of_names_are_escapes_in_the_page(tmp_path: Path) -> None:
    hostile = "\x1b[2J\x00\u202ecat"
    recipe = dataclasses.replace(recipes.get("fashion_mnist"), name=hostile, dataset=hostile)
    observed = {"event": "observation", "step": 1, "epoch": 0.1, "spans": [[hostile, hostile, 0.0, 5.0]]}
    run = make_run(tmp_path / "run", [step_event(1), observed], recipe=recipe, start={"cpu": hostile})
    page = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "\\x1b[2J\\x00\\u202ecat" in page
    assert page.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "events",
    [
        [],
        [step_event(1)],
        [step_event(1, loss=None), step_event(2, loss=None, lr=None, images_per_s=None)],
        [step_event(1), evaluation_event(1, None)],
        [evaluation_event(1, 0.5)],
        [{"event": "step"}, {"event": "evaluation"}, {"event": "run_end"}],
        [step_event(1), {"event": "run_end", "top1": None, "images_per_s": None, "train_s": None}],
    ],
)
def test_a_run_with_few_or_empty_events_has_a_page(tmp_path: Path, events: list[dict[str, object]]) -> None:
    run = make_run(tmp_path / "run", events)
    page = Page(write_report([run], tmp_path / "report.html"))
    assert page.wrong == []
    assert any("fashion_mnist" in text for _, text in page.text)
    assert "NaN" not in re.sub(r"<script>.*?</script>", "", page.source, flags=re.DOTALL)


def test_a_folder_without_a_recipe_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [step_event(1), step_event(2)])
    (run / "recipe.json").unlink()
    page = Page(write_report([run], tmp_path / "report.html"))
    assert "Recipe" not in [text for tag, text in page.text if tag == "h2"]


def test_a_folder_without_a_run_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no run"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_several_runs_have_distinct_labels_and_marked_differences(tmp_path: Path) -> None:
    second = dataclasses.replace(recipes.get("fashion_mnist"), peak_lr=3.0)
    events = [*map(step_event, range(1, 11)), evaluation_event(10, 0.9)]
    runs = [make_run(tmp_path / "a", events), make_run(tmp_path / "b", events, recipe=second)]
    page = Page(write_report(runs, tmp_path / "report.html"))
    assert {"fashion_mnist (a)", "fashion_mnist (b)"} <= {text for _, text in page.text}
    differing = re.findall(r'<tr class="[^"]*differs"><th scope="row">([a-z0-9_ ]+)</th>', page.source)
    assert set(differing) == {"peak_lr"}
    assert page.source.index("Results and differences") < page.source.index("<h2>Curves")
    assert [one["run"] for one in page.charts()["Learning rate"]["series"]] == [0, 1]


def test_a_folder_name_that_contains_the_recipe_name_is_the_label(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"fashion_mnist-{index}", [step_event(1)]) for index in (1, 2)]
    assert [run.label for run in load_runs(folders)] == ["fashion_mnist-1", "fashion_mnist-2"]
    assert load_runs(folders[:1])[0].label == "fashion_mnist"


def test_the_published_curve_is_drawn_with_the_runs_curve(tmp_path: Path) -> None:
    events = [step_event(860, epoch=86.0), evaluation_event(860, 0.74, epoch=86.0)]
    recipe = recipes.get("yamazaki2019_81k")
    page = Page(write_report([make_run(tmp_path / "run", events, recipe=recipe)], tmp_path / "report.html"))
    assert "below the published curve (0.751 at epoch 86)" in [text for _, text in page.text]
    published = page.charts()["Top-1 accuracy"]["series"][-1]
    assert list(zip(published["x"]["epoch"], published["y"], strict=True)) == [tuple(p) for p in recipe.published_curve]


def test_the_timeline_shows_the_middle_observed_update_with_a_lane_per_bucket(tmp_path: Path) -> None:
    def observation(step: int) -> dict[str, Any]:
        spans = [["step", "forward", 0.0, 10.0], ["bucket 3", "exchange", 10.0, 10.0 * step]]
        return {"event": "observation", "step": step, "epoch": 0.1 * step, "spans": spans}

    run = make_run(tmp_path / "run", [step_event(3), *map(observation, (1, 2, 3))])
    (loaded,) = load_runs([run])
    assert loaded.timeline == [Span("step", "forward", 0.0, 10.0), Span("bucket 3", "exchange", 10.0, 20.0)]
    page = Page(write_report([run], tmp_path / "report.html"))
    assert {"step", "bucket 3"} <= {text for tag, text in page.text if tag == "span"}
    assert {"left: 33.333%; width: 66.667%; background: var(--series-3)"} <= {value for _, _, value in page.attributes}


def test_the_time_of_an_update_is_the_median_of_each_phase(tmp_path: Path) -> None:
    phases = {"input": 0.1, "forward": 0.2, "backward": 0.4, "exchange": 0.0, "update": 0.1}
    events = [step_event(1, step_s=50.0, phases_s={"input": 49.0})]  # the first update compiles
    events += [step_event(step, step_s=1.0, phases_s=phases) for step in (2, 3)]
    (run,) = load_runs([make_run(tmp_path / "run", events)])
    assert median_phases(run) == pytest.approx(phases | {"other": 0.2})
    page = Page(write_report([tmp_path / "run"], tmp_path / "report.html"))
    assert "input 100 ms (10%), forward 200 ms (20%), backward 400 ms (40%)" in page.source


def test_the_confusion_matrix_names_the_most_frequent_confusion(tmp_path: Path) -> None:
    events = [step_event(1), evaluation_event(1, 0.5, confusion=[[5, 1, 0], [0, 2, 7], [0, 0, 9]])]
    run = make_run(tmp_path / "run", events, start={"class_names": ["cat", "dog", "fox"]})
    text = " ".join(text for _, text in Page(write_report([run], tmp_path / "report.html")).text)
    assert "Most frequent: dog taken for fox (7); cat taken for dog (1)." in text


def test_the_smaller_last_update_is_not_drawn_as_a_change_of_the_batch(tmp_path: Path) -> None:
    events = [step_event(1), step_event(2), step_event(3, global_batch_size=7)]
    page = Page(write_report([make_run(tmp_path / "run", events)], tmp_path / "report.html"))
    assert "Global batch size" not in page.charts()


def test_evaluations_are_listed_with_a_comparison_to_the_published_curve(tmp_path: Path) -> None:
    events = [evaluation_event(10, 0.70, epoch=70.0), evaluation_event(20, 0.60, epoch=82.0)]
    run = make_run(tmp_path / "run", events, recipe=recipes.get("yamazaki2019_81k"))
    page = Page(write_report([run], tmp_path / "report.html"))
    cells = [text for tag, text in page.text if tag == "td"]
    assert cells[:3] == ["70", "10", "0.7000"]
    assert any(text.startswith("on the published curve (0.699 at epoch 70), +0.") for text in cells)
    points = 100 * (0.60 - published_at(recipes.get("yamazaki2019_81k").published_curve, 82.0))
    assert f"below the published curve (0.749 at epoch 82), {points:.2f} points" in cells


def test_steps_that_a_resumed_run_repeated_are_drawn_once(tmp_path: Path) -> None:
    first = [step_event(step, global_batch_size=1000 + step) for step in range(1, 8)]
    again = [step_event(step, global_batch_size=2000) for step in range(5, 11)]
    (run,) = load_runs([make_run(tmp_path / "run", [*first, *again])])
    assert [event["step"] for event in run.steps] == list(range(1, 11))
    assert run.column("global_batch_size") == [1001, 1002, 1003, 1004] + [2000] * 6


PICTURE = {"name": "a.jpg", "label": "cat", "predicted": "dog", "probability": 0.987}


def test_pictures_that_the_model_is_surely_wrong_about_are_shown_if_they_are_pictures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [step_event(1), evaluation_event(1, 0.5)])
    sound = "data:image/png;base64,iVBORw0KGgo="
    hostile = [
        'x" onerror="alert(1)',
        "data:image/svg+xml;base64,AAAA",
        "https://example.com/a.png",
        sound + "A" * 64_000,
    ]
    images = [PICTURE | {"thumbnail": text} for text in [sound, *hostile]]
    (run / "mistakes.json").write_text(json.dumps({"step": 1, "images": [*images, {}, "text"]}))
    page = Page(write_report([run], tmp_path / "report.html"))
    assert [value for tag, name, value in page.attributes if tag == "img" and name == "src"] == [sound]
    assert ("b", "dog") in page.text
    assert any("98.7 %" in text for _, text in page.text)
    assert page.wrong == []
    (run / "mistakes.json").write_text("{")
    with pytest.raises(UserError, match="without it the report shows the rest"):
        write_report([run], tmp_path / "report.html")
