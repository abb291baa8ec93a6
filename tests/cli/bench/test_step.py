"""`megabatch bench step`: measured variants, their options and the ranking."""

import json

import pytest
import torch
from command_line import error_line, megabatch, megabatch_process

from megabatch import recipes
from megabatch.bench.synthetic_step import measured_batch_size
from megabatch.bench.timing import Timing
from megabatch.cli.bench.step import Measured, Variant, table, variants_to_measure
from megabatch.runtime import Runtime

QUICK = ["--set", "width=8", "--set", "bn_span=4", "--set", "resolution=0:8", "--batch", "16", "--seconds", "0.1"]


@pytest.mark.slow
def test_every_variant_is_measured_and_the_options_of_the_fastest_are_printed(tmp_path):
    done = megabatch_process(
        "bench", "step", "fashion_mnist", *QUICK, "--output", tmp_path / "step.json", "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["images"] == 16
    assert "torch" in str(written["environment"])
    names = [variant["variant"] for variant in written["variants"]]
    micro_batches = ["bf16 in micro-batches of 8", "bf16 in micro-batches of 4"]
    unfused = ["fp32 with torch kernels", "bf16 with torch kernels", "fp32 in NCHW"]
    assert names == ["fp32", "bf16", *unfused, *micro_batches]
    assert [variant["micro_batch_size"] for variant in written["variants"]][-2:] == [8, 4]
    for variant in written["variants"]:
        assert len(variant["seconds"]) >= 3
        assert variant["variant"] in done.stdout
        assert f"warming up: {variant['variant']}" in done.stderr
    assert done.stdout.splitlines()[-1].startswith("fastest: ")
    assert "megabatch train fashion_mnist --precision" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments", [["no_such"], ["fashion_mnist", "--device", "tpu"], ["fashion_mnist", "--device", "cuda"]]
)
def test_invalid_input_prints_one_line_and_exits_with_code_2(arguments, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert error_line(megabatch("bench", "step", *arguments))


def test_a_batch_that_is_no_multiple_of_the_span_is_refused_with_one_that_is():
    assert "--batch 512 works" in error_line(megabatch("bench", "step", "fashion_mnist", "--batch", 500))
    assert "--batch 128 works" in error_line(megabatch("bench", "step", "fashion_mnist", "--batch", 3))
    recipe = recipes.get("fashion_mnist")
    assert measured_batch_size(recipe, 256, images_at_224=1) == 256
    assert measured_batch_size(recipe, None, images_at_224=1) == 128


def test_the_printed_options_select_the_runtime_settings():
    recipe = recipes.get("fashion_mnist")
    variants = [v for device in ("cuda", "cpu") for v in variants_to_measure(recipe, 512, device=device, compiled=True)]
    for variant in variants:
        runtime = Runtime()
        words = dict(
            pair.split(" ", 1) if " " in pair else (pair, True)
            for pair in variant.options.removeprefix("--").split(" --")
        )
        for key in ("precision", "capture", "fusion"):
            assert str(getattr(variant.runtime, key)) == words.get(key, getattr(runtime, key))
        assert variant.runtime.compile is bool(words.get("compile", False))
        assert variant.runtime.channels_last is not bool(words.get("no-channels-last", False))
        assert str(variant.runtime.micro_batch_size or "") == words.get("micro-batch-size", "")


def test_micro_batches_hold_whole_spans():
    recipe = recipes.get("fashion_mnist")
    sizes = [w.runtime.micro_batch_size for w in variants_to_measure(recipe, 1024, device="cpu", compiled=False)]
    assert [size for size in sizes if size] == [512, 256, 128]


def test_a_variant_that_fails_comes_last_with_its_error():
    good = Measured(Variant("slow", Runtime(), "--precision fp32"), 8, Timing((0.2, 0.2, 0.2)))
    better = Measured(Variant("quick", Runtime(), "--precision bf16"), 8, Timing((0.1, 0.1, 0.1)))
    broken = Measured(Variant("compiled", Runtime(), "--compile"), error="no compiler")
    lines = table([broken, good, better], 16, "photos").splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["quick", "slow", "compiled"]
    assert "no compiler" in lines[3]
    assert lines[4] == "fastest: quick; megabatch train photos --precision bf16"
