"""The runtime's choice of fused kernels reaches every part of the model, and no weight."""

import functools

import pytest
import torch
from slow import slow_except
from tiny_run import run_tiny, tiny_recipe

from megabatch import recipes
from megabatch.app import model as model_wiring
from megabatch.app import resolve as runtime
from megabatch.app.measured.layout import measured_layout
from megabatch.app.model import build_model, image_format
from megabatch.comm.launch import World
from megabatch.nn.fused import norm_act
from megabatch.nn.fused.fuse import Fused, set_fusion
from megabatch.runtime import Runtime
from megabatch.train.precision import Precision


@pytest.mark.parametrize("choice", ["auto", "plain"])
@pytest.mark.parametrize("model", slow_except(["resnet8", "resnet50", "alexnet_bn"], "resnet50"))
def test_the_choice_reaches_every_part_that_can_be_fused(model, choice):
    recipe = tiny_recipe(model=model, resolution=((0.0, 32.0),))
    module = build_model(recipe, Runtime(fusion=choice), world=World(), micro_batch_size=8)
    backends = {part.backend for part in module.modules() if isinstance(part, Fused)}
    assert backends == ({"auto"} if choice == "auto" else set())


@pytest.mark.parametrize(
    ("model", "device", "precision", "options", "expected"),
    [
        ("resnet18", "cuda", "bf16", {}, (torch.bfloat16, 4)),
        ("resnet18", "cuda", "bf16", {"fusion": "plain"}, (torch.bfloat16, None)),
        ("resnet18", "cuda", "bf16", {"channels_last": False}, (torch.bfloat16, None)),
        ("resnet18", "cuda", "fp32", {}, (torch.float32, None)),
        ("resnet18", "cpu", "bf16", {}, (torch.float32, None)),
        ("resnet8", "cuda", "bf16", {}, (torch.bfloat16, None)),
    ],
)
def test_on_a_gpu_the_loader_makes_what_the_first_convolution_reads(model, device, precision, options, expected):
    recipe, where = tiny_recipe(model=model, resolution=((0.0, 32.0),)), Runtime(**options)
    module = build_model(recipe, where, world=World(), micro_batch_size=8)
    made = image_format(where, module, Precision(precision, torch.device(device)), torch.device(device))
    assert made == expected


@pytest.mark.parametrize("eval_stats", slow_except(["running", "last_batch", "precise"], "running"))
def test_a_run_by_the_fused_equations_trains_the_same_weights_and_statistics(eval_stats, tmp_path, monkeypatch):
    """The equations of the kernels in torch's operations, in micro-batches of two spans, against torch's own layers."""
    recipe = tiny_recipe(eval_stats=eval_stats)
    where = Runtime(precision="fp32", micro_batch_size=16)
    plain = run_tiny(tmp_path / "plain", recipe, runtime=where)
    calls = []
    monkeypatch.setattr(model_wiring, "set_fusion", functools.partial(_force, set_fusion))
    monkeypatch.setattr(norm_act, "fused_bn_act", functools.partial(_counted, norm_act.fused_bn_act, calls))
    fused = run_tiny(tmp_path / "fused", recipe, runtime=where)
    assert len(calls) >= 9 * 10  # norms of the net x steps
    torch.testing.assert_close(fused["losses"], plain["losses"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused["weights"], plain["weights"], rtol=1e-3, atol=1e-5)


def _counted(function, calls, *arguments, **options):
    calls.append(function)
    return function(*arguments, **options)


def _force(set_fusion, model, fusion):
    assert fusion == "auto"
    set_fusion(model, "reference")


@pytest.mark.parametrize(
    ("values", "has_norms", "has_convolutions", "words"),
    [
        ({}, True, True, "fused batch norm and convolutions"),
        ({"precision": "fp32"}, True, True, "fused batch norm and convolutions"),
        ({}, True, False, "fused batch norm"),
        ({}, False, False, "torch kernels in channels_last (compiling ours needs a C compiler, on Linux)"),
        ({"fusion": "plain"}, True, True, "torch kernels in channels_last"),
        ({"channels_last": False}, True, True, "torch kernels in NCHW"),
        ({"compile": True}, True, True, "torch.compile kernels in channels_last"),
    ],
)
def test_a_run_names_its_kernel_implementation(monkeypatch, values, has_norms, has_convolutions, words):
    monkeypatch.setattr(runtime.cpu_batch_norm, "is_available", lambda: has_norms)
    monkeypatch.setattr(runtime.cpu_conv, "is_available", lambda _: has_convolutions)
    precision = Precision(values.get("precision", "bf16"), torch.device("cpu"))
    assert runtime.describe_kernels(Runtime(**values), precision, torch.device("cpu")) == words


@pytest.mark.parametrize(
    ("device", "wanted", "expected"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_cudnn_measures_its_algorithms_while_a_run_is_open_and_the_site_lets_it(monkeypatch, device, wanted, expected):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with runtime.cudnn_measures(Runtime(cudnn_benchmark=wanted), torch.device(device)):
        assert torch.backends.cudnn.benchmark == expected
    assert not torch.backends.cudnn.benchmark


def test_an_apple_gpu_trains_one_worker_by_torchs_kernels_in_nchw_and_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    recipe, apple = recipes.get("fashion_mnist"), World(device=torch.device("mps"))
    assert runtime.default_workers(recipe, Runtime()) == 1
    precision = runtime.choose_precision(Runtime(), apple.device)
    assert precision.name == "fp32"
    chosen = measured_layout(recipe, Runtime(), precision, world=apple, warn=pytest.fail)
    assert runtime.describe_kernels(chosen, precision, apple.device) == "torch kernels in NCHW"
    assert runtime.choose_micro_batch(recipe, chosen, world_size=1, device=apple.device) == 1024
