"""Captured steps and fitted micro-batches on a GPU; skipped without one."""

import functools

import pytest
import torch
from tiny_run import tiny_data, tiny_recipe

from megabatch.app.measured import micro_batch
from megabatch.app.measured.micro_batch import fit_micro_batch
from megabatch.app.model import build_model
from megabatch.app.run import open_run
from megabatch.comm.launch import World
from megabatch.nn.loss import cross_entropy_sum
from megabatch.nn.small import resnet8
from megabatch.optim.groups import param_groups
from megabatch.optim.lars import LARS
from megabatch.optim.sgd import SGD
from megabatch.runtime import Runtime
from megabatch.train.cuda_graph import CapturedStep, Readback
from megabatch.train.loop import train
from megabatch.train.precision import Precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def steps(optimizer_class, *, captured):
    """Losses and weights of eight steps, the rate changing at each, the batch at the fifth."""
    torch.manual_seed(0)
    model = resnet8(num_classes=5, width=8).cuda().to(memory_format=torch.channels_last)
    lr = torch.tensor(0.1, device="cuda")
    optimizer = optimizer_class(param_groups(model, weight_decay=1e-4), lr, capturable=True)

    def step(images, labels):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model(images)
        loss = cross_entropy_sum(logits, labels) / len(labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    call = CapturedStep(step, warmup=2) if captured else step
    generator = torch.Generator("cuda").manual_seed(1)
    losses = []
    for number in range(12):
        count = 16 if number < 6 else 8
        images = torch.randn(count, 1, 12, 12, device="cuda", generator=generator)
        lr.fill_(0.1 / (1 + number))
        losses.append(call(images.expand(-1, 3, -1, -1).contiguous(), torch.arange(count, device="cuda") % 5).clone())
    return torch.stack(losses).tolist(), torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("optimizer_class", [SGD, LARS])
def test_replayed_steps_equal_steps_as_written(optimizer_class):
    plain_losses, plain_weights = steps(optimizer_class, captured=False)
    losses, weights = steps(optimizer_class, captured=True)
    assert losses == pytest.approx(plain_losses, rel=1e-2)
    torch.testing.assert_close(weights, plain_weights, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_captured_run_trains_what_an_uncaptured_one_trains(tmp_path, precision):
    recipe, losses, graphs = tiny_recipe(total_epochs=3.0), {}, {}
    for capture in ("off", "on"):
        losses[capture] = []
        runtime = Runtime(precision=precision, micro_batch_size=24, capture=capture)
        with open_run(
            recipe,
            runtime,
            tiny_data(recipe),
            world=World(device=torch.device("cuda", 0)),
            folder=tmp_path / capture,
            stop_requested=lambda: False,
            quiet=True,
        ) as run:
            inner = run.log
            run.log = functools.partial(_note, inner, losses[capture])
            train(run)
            graphs[capture] = run.captured.num_graphs if run.captured else 0
    assert graphs == {"off": 0, "on": 1}
    assert losses["on"] == pytest.approx(losses["off"], rel=2e-2)


def _note(inner, losses, event):
    inner(event)
    if event["event"] == "step":
        losses.append(event["loss"])


def test_values_are_read_as_they_were_when_asked_for():
    values = torch.tensor([1.0, 2.0], device="cuda")
    readback = Readback(values)
    values.fill_(9.0)
    assert readback.is_late
    assert readback.read() == [1.0, 2.0]


def test_nothing_waits_for_the_device_in_a_captured_step():
    x = torch.ones(4, device="cuda")
    step = CapturedStep(lambda t: t * 2, warmup=1)
    for _ in range(3):
        step(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.tolist() == [2.0] * 4


def test_a_trial_finds_a_micro_batch_within_the_memory_and_gives_the_memory_back():
    recipe = tiny_recipe(global_batch_size=960, num_train_images=960)
    precision = Precision("bf16", torch.device("cuda", 0))
    world = World(device=torch.device("cuda", 0))
    module = build_model(recipe, Runtime(), world=world, micro_batch_size=recipe.bn_span)
    before = torch.cuda.memory_allocated()
    drawn = torch.cuda.get_rng_state()
    found = fit_micro_batch(recipe, Runtime(), recipe.bn_span, module, precision, world=world)
    assert found.size == 960
    assert "by trial" in found.reason
    torch._C._cuda_clearCublasWorkspaces()  # of the first matrix product, kept for all that come
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(torch.cuda.get_rng_state(), drawn)


def test_a_size_that_overflows_is_no_error(monkeypatch):
    recipe = tiny_recipe(global_batch_size=960, num_train_images=960)
    world = World(device=torch.device("cuda", 0))
    module = build_model(recipe, Runtime(), world=world, micro_batch_size=recipe.bn_span)

    def overflow(module, precision, sample, size):
        if size > 100:
            raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(micro_batch, "_forward_and_backward", overflow)
    precision = Precision("bf16", torch.device("cuda", 0))
    assert fit_micro_batch(recipe, Runtime(), recipe.bn_span, module, precision, world=world).size == 64
