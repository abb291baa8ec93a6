"""A step that reads 16-bit copies of the weights is, bit for bit, the step in which autocast casts them."""

import contextlib
import dataclasses
from collections import Counter

import pytest
import torch
from ranks import run_processes
from slow import slow_except
from tiny_run import run_tiny, tiny_recipe
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megabatch.app.state import build_state
from megabatch.comm.launch import World
from megabatch.data.loading.batch import Batch
from megabatch.nn.batch_norm.evaluation_statistics import collect_statistics
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.fused.fuse import set_fusion
from megabatch.nn.resnet import Bottleneck, ResNet
from megabatch.observe.events import read_events
from megabatch.optim.sgd import SGD
from megabatch.runtime import Runtime
from megabatch.train.gradients import Objective, accumulate_gradients
from megabatch.train.precision import Precision, WideLinear, widen_logits
from megabatch.train.weight_copies import WeightCopies

CPU = torch.device("cpu")
EVERY_OPTIMIZER = [
    {"optimizer": "lars"},
    {"optimizer": "sgd", "peak_lr": 0.1},
    {"optimizer": "lamb", "peak_lr": 0.01},
    {"optimizer": "rmsprop_warmup", "peak_lr": 0.1, "warmup": "none"},
    {"optimizer": "muon", "peak_lr": 0.05},
    {"optimizer": "shampoo", "peak_lr": 0.1},
]


class Net(nn.Module):
    """Every kind of layer that is copied, with a weight that two of them share, and two kinds that are not."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.last = nn.Linear(6, 5)

    def forward(self, x):
        x = functional.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.last(self.second(functional.relu(self.first(x))))


def net(seed=0):
    torch.manual_seed(seed)
    model = Net()
    widen_logits(model)
    return model.to(memory_format=torch.channels_last)


def batches(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(8, 3, 6, 6, generator=generator) for _ in range(number)]
    return [Batch(x, torch.randint(5, (8,), generator=generator), 8) for x in images]


def gradients(model, copies, name="bf16", *, micro_batches=1):
    """Of a step, as its optimizer would see them."""
    model.zero_grad()
    objective = Objective(8 * micro_batches, 0.1, Precision(name, CPU), copies)
    accumulate_gradients(model, iter(batches(micro_batches)), micro_batches, objective, world_size=1)
    return [p.grad for p in model.parameters()]


def both_ways(folder, recipe, runtime, **options):
    """A run whose forwards read copies, and one in which autocast casts."""
    runs = {}
    for kept in (True, False):
        own = dataclasses.replace(runtime, weight_copies=kept)
        runs[kept] = run_tiny(folder / str(kept), recipe, runtime=own, **options)
    return runs[True], runs[False]


def assert_same_run(one, other):
    assert one["losses"] == other["losses"]
    for name, tensor in other["weights"].items():
        assert torch.equal(one["weights"][name], tensor), name


# ---- whole runs


@pytest.mark.parametrize("changes", EVERY_OPTIMIZER, ids=lambda changes: changes["optimizer"])
@pytest.mark.parametrize("micro_batch_size", slow_except([48, 16], 48))
def test_a_run_with_copies_is_bitwise_the_run_with_casts(tmp_path, changes, micro_batch_size):
    recipe = tiny_recipe(total_epochs=1.0, **changes)
    assert_same_run(*both_ways(tmp_path, recipe, Runtime(precision="bf16", micro_batch_size=micro_batch_size)))


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size", [48, 16])
def test_in_fp16_too_with_the_same_steps_left_out(tmp_path, monkeypatch, micro_batch_size):
    def too_large_at_first(runtime, device):
        return Precision("fp16", device, init_scale=2.0**24)

    monkeypatch.setattr("megabatch.app.measured.precision.choose_precision", too_large_at_first)
    recipe = tiny_recipe(total_epochs=4.0)
    assert_same_run(*both_ways(tmp_path, recipe, Runtime(precision="fp16", micro_batch_size=micro_batch_size)))
    steps = [
        [(e["loss_scale"], e["skipped_steps"]) for e in read_events(tmp_path / f"{kept}/events.jsonl") if "lr" in e]
        for kept in (True, False)
    ]
    assert steps[0] == steps[1]
    assert 1 <= steps[0][-1][1] < len(steps[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"ema_half_life_epochs": 0.2, "eval_every_epochs": 0.5},
        pytest.param({"max_global_batch_size": 96}, marks=pytest.mark.slow),
    ],
    ids=["average of weights", "growth by noise scale"],
)
def test_copies_follow_what_swaps_weights_and_serve_what_measures_gradients(tmp_path, changes):
    recipe = tiny_recipe(**changes)
    assert_same_run(*both_ways(tmp_path, recipe, Runtime(precision="bf16", micro_batch_size=8)))


def test_a_resumed_run_goes_on_from_the_weights_of_its_checkpoint(tmp_path):
    recipe = tiny_recipe()
    runtime = Runtime(precision="bf16", micro_batch_size=48)
    whole = run_tiny(tmp_path / "whole", recipe, runtime=runtime)
    run_tiny(tmp_path / "cut", recipe, runtime=runtime, stop_at=4)
    saved = torch.load(sorted((tmp_path / "cut/checkpoints").glob("*.pt"))[-1], weights_only=True)
    assert not any(t.dtype == torch.bfloat16 for t in saved["module"].values())
    assert set(saved) == set(torch.load(next((tmp_path / "whole/checkpoints").glob("*.pt")), weights_only=True))
    resumed = run_tiny(tmp_path / "cut", recipe, runtime=dataclasses.replace(runtime, resume=True))
    assert resumed["losses"] == whole["losses"][-len(resumed["losses"]) :]
    assert all(torch.equal(resumed["weights"][name], tensor) for name, tensor in whole["weights"].items())


def two_runs(folder, recipe, runtime):
    return both_ways(folder, recipe, runtime)


@pytest.mark.multiprocess
@pytest.mark.parametrize("micro_batch_size", slow_except([24, 8], 8))
def test_two_workers_exchange_the_same_gradients(tmp_path, micro_batch_size):
    recipe = tiny_recipe(total_epochs=1.0)
    runtime = Runtime(precision="bf16", micro_batch_size=micro_batch_size, bucket_mib=0.01)
    for one, other in run_processes(2, two_runs, tmp_path, recipe, runtime):
        assert_same_run(one, other)


@pytest.mark.parametrize(
    ("runtime", "dtype"),
    [
        (Runtime(precision="bf16"), torch.bfloat16),
        (Runtime(precision="fp16"), torch.float16),
        (Runtime(precision="fp32"), None),
        (Runtime(precision="bf16", weight_copies=False), None),
        (Runtime(precision="bf16", compile=True), None),
    ],
    ids=["bf16", "fp16", "fp32", "off", "compiled"],
)
def test_what_is_copied_and_that_the_optimizer_writes_it(runtime, dtype):
    recipe = tiny_recipe()
    state = build_state(recipe, runtime, Precision(runtime.precision, CPU), world=World(), micro_batch_size=8)
    copies = state.copies.tensors
    assert {tensor.dtype for tensor in copies.values()} == ({dtype} if dtype else set())
    wanted = [p for p in state.module.parameters() if p.ndim == 4] if dtype else []
    assert {id(p) for p in copies} == {id(p) for p in wanted}
    assert {id(p) for p in state.optimizer.copies} == {id(p) for p in wanted}


# ---- one step


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradients_are_those_of_casts_and_no_wider_than_they_must_be(name, micro_batches):
    model, dtype = net(), Precision(name, CPU).dtype
    expected = gradients(model, WeightCopies(), name, micro_batches=micro_batches)
    found = gradients(model, WeightCopies(model, dtype), name, micro_batches=micro_batches)
    narrow = torch.bfloat16 if name == "bf16" and micro_batches == 1 else torch.float32
    for (parameter, _), one, other in zip(model.named_parameters(), found, expected, strict=True):
        copied = not parameter.startswith(("norm", "last"))
        assert one.dtype == (narrow if copied else torch.float32), parameter
        assert one.stride() == other.stride(), parameter
        assert torch.equal(one.float(), other), parameter


def test_a_linked_gradient_reaches_the_weight_as_soon_as_its_layer_is_done():
    """As DistributedDataParallel needs it, in each backward of several, though the cast is older than every forward."""
    model, done, hidden = net(), [], []
    copies = WeightCopies(model)
    model.first.weight.register_post_accumulate_grad_hook(lambda _: done.append("weight"))
    model.norm.register_forward_hook(lambda _, __, y: hidden.append(y))
    for number in range(2):
        with torch.autocast("cpu", torch.bfloat16), copies.read(linked=True):
            loss = model(batches(1)[0].images).square().sum()
        hidden[number].register_hook(lambda _: done.append("layer before"))
        loss.backward()
    assert done == ["weight", "layer before"] * 2
    assert model.first.weight.grad.dtype == torch.float32


class Casts(TorchDispatchMode):
    """Counts casts between 32 and 16 bit of tensors as large as some weight."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.counts = set(shapes), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].shape in self.shapes:
            self.counts[str(result.dtype).removeprefix("torch.")] += 1
        return result


@pytest.mark.parametrize(("kept", "expected"), [(False, {"bfloat16": 5, "float32": 5}), (True, {})])
def test_no_weight_and_no_gradient_is_cast_in_a_step(kept, expected):
    model = net()
    copies = WeightCopies(model) if kept else WeightCopies()
    shapes = [p.shape for layer in (model.conv, model.first, model.second) for p in layer.parameters()]
    with Casts(shapes) as casts:
        gradients(model, copies)
    assert casts.counts == expected  # two weights and three biases


def test_fused_blocks_compute_the_same_from_copies():
    torch.manual_seed(0)
    model = ResNet(Bottleneck, (2, 1, 1, 1), num_classes=5, norm=lambda c: SpanBatchNorm2d(c, span=4), small_stem=True)
    collect_statistics(model, True)
    widen_logits(model)
    set_fusion(model, "reference")
    expected = gradients(model, WeightCopies())
    copies = WeightCopies(model)
    for one, other in zip(gradients(model, copies), expected, strict=True):
        assert torch.equal(one.float(), other)
    assert len(copies.tensors) == 1 + 5 * 3 + 4


# ---- the copies themselves


def test_what_a_forward_reads_are_16_bit_copies_laid_out_as_the_weights():
    model = net()
    copies = WeightCopies(model)
    seen = []
    model.register_forward_pre_hook(lambda net, _: seen.extend(net.named_parameters()))
    with torch.autocast("cpu", torch.bfloat16), copies.read():
        model(batches(1)[0].images)
    for name, read in seen:
        weight = model.get_parameter(name)
        wide = name.startswith(("norm", "last"))
        assert read.dtype == (torch.float32 if wide else torch.bfloat16), name
        assert (read is weight) == wide
        assert read.stride() == weight.stride()
        assert torch.equal(read, weight.to(read.dtype))


def test_module_and_state_dict_are_as_before_whatever_becomes_of_the_forward():
    model = net()
    tree = [(name, type(part)) for name, part in model.named_modules()]
    before = [(name, id(p)) for name, p in model.named_parameters()]
    keys = list(model.state_dict())
    copies = WeightCopies(model)
    with pytest.raises(RuntimeError), copies.read():
        model(torch.zeros(1, 7, 6, 6))
    assert [(name, id(p)) for name, p in model.named_parameters()] == before
    assert [(name, type(part)) for name, part in model.named_modules()] == tree
    assert list(model.state_dict()) == keys
    assert isinstance(model.last, WideLinear)


def test_weights_changed_from_outside_are_seen_and_copies_stay_where_they_are():
    model, other = net(), net(seed=1)
    copies = WeightCopies(model)
    addresses = [tensor.data_ptr() for tensor in copies.tensors.values()]
    model.load_state_dict(other.state_dict())
    copies.refresh()
    for weight, copy in copies.tensors.items():
        assert torch.equal(copy, weight.detach().bfloat16())
    assert addresses == [tensor.data_ptr() for tensor in copies.tensors.values()]
    for found, expected in zip(gradients(model, copies), gradients(model, WeightCopies()), strict=True):
        assert torch.equal(found.float(), expected)


def test_copies_that_an_optimizer_wrote_are_not_written_again():
    model = net()
    copies = WeightCopies(model)
    optimizer = SGD(model.parameters(), lr=0.1, copies=copies.tensors)
    gradients(model, copies)
    optimizer.step()
    copies.written_by(optimizer)
    for weight, copy in copies.tensors.items():
        assert torch.equal(copy, weight.detach().bfloat16())
        copy.fill_(7.0)
    copies.refresh()
    assert all(bool((copy == 7.0).all()) for copy in copies.tensors.values())


def test_an_optimizer_that_knows_nothing_of_copies_trains_the_same():
    weights = []
    for kept in (True, False):
        model = net()
        copies = WeightCopies(model) if kept else WeightCopies()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            copies.refresh()
            gradients(model, copies, micro_batches=2)
            optimizer.step()
            copies.written_by(optimizer)
        weights.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


class Tape(TorchDispatchMode):
    """What a CUDA graph keeps of a step: operations and the tensors they wrote to, and not a line of Python."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, tree_leaves(result)))
        return result

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, kept in self.operations:
            for old, new in zip(kept, tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


@pytest.mark.parametrize("widen", [False, True])
def test_replays_of_a_recorded_step_read_and_write_the_copies_and_see_weights_changed_in_between(widen):
    results = []
    for recorded in (True, False):
        model, other, tape = net(), net(seed=1), Tape()
        copies = WeightCopies(model) if recorded else WeightCopies()
        lr = torch.tensor(0.1)
        optimizer = SGD(model.parameters(), lr, momentum=0.5, capturable=True, copies=copies.tensors)
        (batch,) = batches(1)

        def step(model=model, copies=copies, optimizer=optimizer, batch=batch):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16), copies.read():
                loss = functional.cross_entropy(model(batch.images), batch.labels)
            loss.backward()
            copies.return_gradients(widen=widen)
            optimizer.step()
            copies.written_by(optimizer)

        step()
        with tape if recorded else contextlib.nullcontext():
            step()
        for number in range(4):
            lr.fill_(0.1 / (1 + number))
            if number == 2:
                model.load_state_dict(other.state_dict())
            copies.refresh()
            tape.replay() if recorded else step()
        results.append(list(model.state_dict().values()))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
