"""The trainer's way on a GPU, walked on a stand-in: nothing mixes devices, waits in a step, or breaks a capture."""

import contextlib
import copy
import dataclasses
import random
import threading
from unittest import mock

import numpy as np
import pytest
import torch
from limits import HANG_S
from photographs import encode, photograph
from slow import slow_except
from stand_in_gpu import CUDA, RefusedError, StandInGpu
from tiny_run import tiny_data, tiny_recipe

from megabatch import recipes
from megabatch.app import model as model_wiring
from megabatch.app.measured import tuning
from megabatch.app.run import open_run
from megabatch.bench.synthetic_step import synthetic_step
from megabatch.comm.launch import World
from megabatch.data.jpeg.decode import decode
from megabatch.data.jpeg.gpu import GpuDecoder
from megabatch.data.loading.batch import Batch, Staging
from megabatch.data.loading.eval_loader import EvalLoader
from megabatch.data.loading.train_loader import TrainLoader
from megabatch.data.sources.folder import FolderSource
from megabatch.kernels.bottleneck import products
from megabatch.nn.batch_norm.evaluation_statistics import finish_step
from megabatch.nn.fused import gram
from megabatch.nn.resnet import BlurConv2d, Bottleneck, ResNet
from megabatch.observe.events import read_events
from megabatch.recipe_validation import validate
from megabatch.runtime import Runtime
from megabatch.train import step as train_step
from megabatch.train.cuda_graph import CapturedStep
from megabatch.train.loop import train

pytest.importorskip("triton")
ON_GPU = World(device=CUDA)
EVERY_OPTIMIZER = pytest.mark.parametrize(
    "optimizer", slow_except(["lars", "sgd", "lamb", "rmsprop_warmup", "muon"], "lars")
)


@pytest.fixture(autouse=True)
def own_choices():
    """Kernels are chosen at random, and nothing is kept."""
    tuning.use_table(tuning.Table())
    yield
    tuning.use_table(None)


@pytest.fixture
def without_triton(monkeypatch):
    """Every value is computed: by torch's own operations."""
    for name in ("kernels.dispatch", "optim.engine.fused", "nn.fused.norm_act"):
        monkeypatch.setattr(f"megabatch.{name}.has_triton", lambda: False)


def legal(kernel, args, options):
    """Refuses a launch that no GPU of compute capability 9.0 takes."""
    grid = options["grid"]
    assert 1 <= len(grid) <= 3, kernel
    assert all(0 < size < limit for size, limit in zip(grid, (2**31, 2**16, 2**16), strict=False)), (kernel, grid)
    for name, value in options.items():
        if name.startswith("block") or name in {"chunk", "num_warps", "norm_block"}:
            assert value & (value - 1) == 0, (kernel, name, value)
    for value in (*args, *options.values()):
        if hasattr(value, "block_shape"):
            assert value.base.data_ptr() % 16 == 0, kernel
            assert all(stride * value.base.element_size() % 16 == 0 for stride in value.strides[:-1]), kernel
            assert max(value.block_shape) <= 256, kernel
        if isinstance(value, torch.Tensor):
            assert value.is_contiguous(), (kernel, value.shape, value.stride())


@contextlib.contextmanager
def a_gpu():
    """Whatever is measured takes a time drawn anew, so that each kernel is taken somewhere."""
    with StandInGpu(launch=legal, elapsed_ms=random.Random(0).random) as gpu:
        yield gpu


def run_on(world, folder, recipe, runtime, **options):
    """Losses, weights, and of each step what the main thread waited for."""
    gpu = None
    found = {"losses": [], "waits": [], "graphs": []}
    with contextlib.ExitStack() as stack:
        if world is ON_GPU:
            gpu = stack.enter_context(a_gpu())
        run = stack.enter_context(
            open_run(
                recipe, runtime, tiny_data(recipe), world=world, folder=folder, stop_requested=lambda: False, **options
            )
        )
        inner, apply = run.log, train_step.apply_settings

        def log(event):
            inner(event)
            if event["event"] == "step":
                found["losses"].append(event["loss"])

        def begin(groups, settings):
            if gpu is not None:
                found["waits"].append([what for in_main, what in gpu.waited if in_main])
                gpu.waited.clear()
            found["graphs"].append(run.captured.num_graphs if run.captured else 0)
            apply(groups, settings)

        run.log = log
        stack.enter_context(mock.patch.object(train_step, "apply_settings", begin))
        evaluation = train(run)
        found["graphs_left"] = run.captured.num_graphs if run.captured else 0
        found["top1"] = evaluation.top1 if evaluation else None
        found["weights"] = {name: tensor.cpu() for name, tensor in run.state.module.state_dict().items()}
    return found


def recipe_of(optimizer, **changes):
    rate = {"lars": 1.0, "sgd": 0.05, "lamb": 0.01, "rmsprop_warmup": 0.05, "muon": 0.05}[optimizer]
    return tiny_recipe(optimizer=optimizer, peak_lr=rate, warmup="none", **changes)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("capture", slow_except(["on", "off"], "on"))
def test_a_gpu_trains_what_a_cpu_trains(tmp_path, without_triton, optimizer, capture):
    recipe = recipe_of(optimizer, ema_half_life_epochs=1.0, flip=True, cutout_size=3, mixup_alpha=0.4)
    runtime = Runtime(precision="fp32", micro_batch_size=24, channels_last=True)
    cpu = run_on(World(), tmp_path / "cpu", recipe, runtime)
    gpu = run_on(ON_GPU, tmp_path / "gpu", recipe, dataclasses.replace(runtime, capture=capture))
    assert max(gpu["graphs"]) == (capture == "on")
    assert gpu["losses"] == pytest.approx(cpu["losses"], rel=1e-4)
    assert gpu["top1"] == pytest.approx(cpu["top1"], abs=0.02)
    for name, tensor in cpu["weights"].items():
        torch.testing.assert_close(gpu["weights"][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("optimizer", "precision", "capture"),
    [
        ("lars", "bf16", "on"),
        ("lars", "fp16", "on"),
        pytest.param("lars", "bf16", "off", marks=pytest.mark.slow),
        pytest.param("sgd", "bf16", "on", marks=pytest.mark.slow),
        pytest.param("lamb", "bf16", "off", marks=pytest.mark.slow),
        pytest.param("rmsprop_warmup", "bf16", "on", marks=pytest.mark.slow),
        pytest.param("muon", "bf16", "on", marks=pytest.mark.slow),
    ],
)
def test_no_step_waits_but_for_the_loss_of_the_step_before(tmp_path, optimizer, precision, capture):
    recipe = recipe_of(optimizer, total_epochs=1.6, eval_every_epochs=9.0)
    runtime = Runtime(precision=precision, micro_batch_size=24, capture=capture, fusion="auto")
    found = run_on(ON_GPU, tmp_path, recipe, runtime)
    assert max(found["graphs"]) == (capture == "on")
    quiet = [waits for waits, before in zip(found["waits"][2:], found["graphs"][1:], strict=False) if before == 1]
    quiet = quiet if capture == "on" else found["waits"][2:]
    assert len(quiet) >= 2
    for waits in quiet:
        assert set(waits) <= {"an event"}


def test_graphs_are_given_up_before_the_last_short_batch_and_recorded_anew_at_another_resolution(tmp_path):
    recipe = tiny_recipe(
        num_train_images=250, total_epochs=2.0, resolution=((0.0, 12.0), (1.0, 16.0)), resolution_ramp="steps"
    )
    found = run_on(ON_GPU, tmp_path, recipe, Runtime(precision="bf16", capture="on", micro_batch_size=24))
    assert len(found["losses"]) == 11
    # Three ordinary steps and three from a graph; the same and one at 16 px; a batch of 20 images at the end.
    assert found["graphs"] == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1]
    assert found["graphs_left"] == 0


@pytest.mark.slow
def test_a_run_goes_on_on_a_gpu_from_a_cpus_checkpoint_and_the_other_way_round(tmp_path, without_triton):
    recipe = recipe_of("lamb", ema_half_life_epochs=1.0)
    whole = run_on(World(), tmp_path / "whole", recipe, Runtime(precision="fp32", micro_batch_size=24))
    for first, second in ((World(), ON_GPU), (ON_GPU, World())):
        folder = tmp_path / first.device.type
        runtime = Runtime(precision="fp32", micro_batch_size=24, checkpoint_every="1steps")
        run_on(first, folder, recipe, runtime, max_steps=5)
        resumed = run_on(second, folder, recipe, dataclasses.replace(runtime, resume=True))
        assert resumed["losses"] == pytest.approx(whole["losses"][5:], rel=1e-4)


@pytest.mark.slow
def test_a_capture_that_fails_costs_the_run_nothing(tmp_path, monkeypatch):
    finish = finish_step

    def refused(module, **options):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("operation not permitted when stream is capturing")
        finish(module, **options)

    monkeypatch.setattr(train_step, "finish_step", refused)
    found = run_on(ON_GPU, tmp_path, tiny_recipe(), Runtime(precision="bf16", micro_batch_size=24))
    assert max(found["graphs"]) == 0
    assert len(found["losses"]) == 10
    warnings = [event["text"] for event in read_events(tmp_path / "events.jsonl") if event["event"] == "warning"]
    assert [text for text in warnings if "not captured" in text]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "capture", "micro"), [("bf16", "on", None), ("fp16", "off", 4)])
def test_fused_bottlenecks_launch_what_a_gpu_takes(monkeypatch, precision, capture, micro):
    monkeypatch.setattr(model_wiring, "create_model", small_bottlenecks)
    monkeypatch.setattr(tuning, "REPEATS", 1)
    monkeypatch.setattr(gram, "ROWS_PER_CHANNEL", 0)
    # Launches on a stand-in compute nothing, so there is nothing to compare.
    monkeypatch.setattr(products, "checked", lambda _name, _sizes, _like, kernel, _plain: kernel())
    recipe = validate(
        dataclasses.replace(
            recipes.get("goyal2017_8k"), bn_span=2, resolution=((0.0, 32.0),), eval_resolution=32, num_classes=8
        )
    )
    with a_gpu() as gpu:
        launched = []
        gpu.launch = lambda kernel, args, options: launched.append(kernel) or legal(kernel, args, options)
        runtime = Runtime(precision=precision, fusion="auto", capture=capture, micro_batch_size=micro)
        with synthetic_step(recipe, runtime, world=ON_GPU, global_batch_size=4) as step:
            for _ in range(5 if capture == "on" else 2):
                launched.clear()
                gpu.waited.clear()
                step.run_step()
            assert step.run.captured is None or step.run.captured.num_graphs == 1
        assert ("product_kernel" in launched) is (capture == "off")
        assert {what for _, what in gpu.waited} <= {"an event", "a value"}


def test_a_step_with_blurred_convolutions_is_captured_and_never_waits(without_triton):
    torch.manual_seed(0)
    cpu = BlurConv2d(4, 6, 3, 2, padding=1, bias=False)
    images = torch.randn(2, 4, 8, 8)
    expected = torch.autograd.grad(cpu(images).square().sum(), cpu.weight)[0]
    with StandInGpu() as gpu:
        conv, on_gpu = copy.deepcopy(cpu).to(CUDA), images.to(CUDA)
        step = CapturedStep(lambda x: torch.autograd.grad(conv(x).square().sum(), conv.weight)[0], warmup=1)
        step(on_gpu)
        gpu.waited.clear()
        step(on_gpu)
        assert {what for _, what in gpu.waited} <= {"the device"}  # once, as the capture begins
        gpu.waited.clear()
        found = step(on_gpu)
        assert (gpu.waited, step.num_graphs) == ([], 1)
        torch.testing.assert_close(found.cpu(), expected)


def small_bottlenecks(*_, num_classes, norm, **__):
    return ResNet(Bottleneck, (2, 1, 1, 1), num_classes=num_classes, norm=norm)


def write_photographs(folder):
    for index in range(12):
        path = folder / f"class-{index % 3}" / f"{index:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(photograph(60 + index, 80 - index, index), quality=95))
    return FolderSource(folder)


@pytest.mark.parametrize("on_gpu", [False, True], ids=["decoded by threads", "decoded on the GPU"])
@pytest.mark.parametrize("augmentation", ["random_resized_crop", "pad_crop"])
def test_batches_that_are_made_beside_a_step_are_in_order(tmp_path, without_triton, on_gpu, augmentation):
    source = write_photographs(tmp_path)
    color = {"pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (0.2, 0.25, 0.3), "channels_last": True}
    more = {
        "augmentation": augmentation,
        "color_jitter": 0.2,
        "cutout_size": 5,
        "mixup_alpha": 0.4,
        "cutmix_alpha": 1.0,
    }
    requests = [(range(first, first + 5), 24) for first in range(0, 40, 5)]
    cpu = TrainLoader(source, seed=0, **more, **color)
    expected = [batch.images for batch in cpu.batches(requests)]
    evaluated = [batch.images for batch in EvalLoader(source, resolution=24, **color).batches(0, 12, 5)]

    def by_gpu(files):
        images = [np.ascontiguousarray(decode(file.numpy().tobytes()).transpose(2, 0, 1)) for file in files]
        return [torch.from_numpy(image).to(CUDA) for image in images]

    with StandInGpu():
        decoder = GpuDecoder(CUDA, decode=by_gpu) if on_gpu else None
        loader = TrainLoader(source, seed=0, device=CUDA, gpu_decoder=decoder, **more, **color)
        found = [(2 * batch.images).cpu() / 2 for batch in loader.batches(requests)]
        loader.close()
        evaluation = EvalLoader(source, resolution=24, device=CUDA, gpu_decoder=decoder, **color)
        found += [batch.images.cpu() for batch in evaluation.batches(0, 12, 5)]
        evaluation.close()
    for one, other in zip(found, expected + evaluated, strict=True):
        assert (one - other).abs().mean() < 4 / 255 / 0.2


def test_a_batch_is_not_used_before_it_is_ready():
    with StandInGpu():
        batch = Staging(CUDA, num_buffers=1).run(lambda: Batch(*torch.ones(2, 3, device=CUDA).unbind(), 3))
        with pytest.raises(RefusedError, match="may not have written"):
            batch.images.sum()
        batch.wait_on_current_stream().images.sum()


def test_a_file_that_is_refused_while_a_graph_is_captured_does_not_break_the_capture():
    """What was begun of it may still be written, and to know the end the whole device must be waited for."""

    def refuses(_):
        raise RuntimeError("bad JPEG")

    found, during = [], []
    with StandInGpu() as gpu:
        decoder = GpuDecoder(CUDA, decode=refuses)
        thread = threading.Thread(
            target=gpu.in_thread, args=(lambda: found.append(decoder.decode([torch.zeros(1, dtype=torch.uint8)])),)
        )

        def step(x):
            if torch.cuda.is_current_stream_capturing():
                thread.start()
                thread.join(0.2)
                during.extend(found)
            return x + 1

        captured = CapturedStep(step, warmup=0)
        assert captured(torch.ones(2, device=CUDA)).tolist() == [2.0, 2.0]
        thread.join(HANG_S)
    assert (during, found) == ([], [[None]])
