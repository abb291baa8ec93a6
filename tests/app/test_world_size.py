"""World size does not reach the weights: ranks x micro-batches x spans, however a batch is cut, train the same."""

import copy

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_threads
from torch import nn

from megabatch.data.loading.order import stream_samples
from megabatch.data.loading.split import micro_batches
from megabatch.nn.batch_norm.evaluation_statistics import collect_statistics, finish_step
from megabatch.nn.batch_norm.groups import span_groups
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.loss import cross_entropy_sum
from megabatch.optim.groups import param_groups
from megabatch.optim.lars import LARS

NUM_SAMPLES, STEPS = 37, 10


def images_and_labels():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(NUM_SAMPLES, 2, 7, 7, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 3, (NUM_SAMPLES,), generator=generator)


def small_net(span, group=None, group_size=1):
    torch.manual_seed(0)

    def norm(channels):
        return SpanBatchNorm2d(channels, span=span, process_group=group, group_size=group_size)

    layers = [nn.Conv2d(2, 4, 3, bias=False), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), norm(4)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 3)).double()
    collect_statistics(model, True)
    return model


def train_ten_steps(batch, span, micro_batch, total, initial):
    """What one rank does, with the trainer's own pieces: split, summed loss, one exchange, statistics, update."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    group_size, mine = max(1, span // micro_batch), None
    if group_size > 1:
        for ranks in span_groups(world_size, group_size):
            group = dist.new_group(ranks)
            mine = group if rank in ranks else mine
    model = small_net(span, mine, group_size)
    model.load_state_dict(initial)
    optimizer = LARS(param_groups(model, weight_decay=1e-3), 0.5, trust_coefficient=0.1)
    images, labels = images_and_labels()
    first = 0
    while first < total:
        count = min(batch, total - first)
        optimizer.zero_grad()
        cut = micro_batches(first, count, rank=rank, world_size=world_size, micro_batch_size=micro_batch, bn_span=span)
        for positions in cut:
            _, indices = stream_samples(positions.start, len(positions), num_samples=NUM_SAMPLES, seed=3)
            loss = cross_entropy_sum(model(images[indices]), labels[indices], label_smoothing=0.1)
            (loss / count).backward()
        for parameter in model.parameters():
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            if world_size > 1:
                dist.all_reduce(gradient)
            parameter.grad = gradient
        finish_step(model, eval_stats="running_all_reduced")
        optimizer.step()
        first += count
    return copy.deepcopy(model.state_dict())


@st.composite
def cuts(draw):
    """A global batch in spans, and a valid way to divide it among ranks and micro-batches."""
    span = draw(st.sampled_from([2, 4, 6]))
    if draw(st.booleans()):
        group_size = draw(st.sampled_from([g for g in (2, 3) if span % g == 0]))
        num_groups = draw(st.integers(1, 3))
        world_size, micro_batch = group_size * num_groups, span // group_size
        spans = draw(st.integers(num_groups, num_groups + 3))
    else:
        world_size = draw(st.integers(1, 6))
        micro_batch = span * draw(st.integers(1, 3))
        spans = draw(st.integers(world_size, world_size + 4))
    short = draw(st.integers(0, span * spans - 1))  # the last batch may be a short one
    return span, spans * span, world_size, micro_batch, short


@settings(max_examples=15, deadline=None)
@given(cuts())
def test_any_cut_of_the_batch_gives_the_weights_of_one_worker(cut):
    span, batch, world_size, micro_batch, short = cut
    total = batch * (STEPS - 1) + (batch - short)
    initial = small_net(span).state_dict()
    alone = train_ten_steps(batch, span, span, total, initial)
    together = run_threads(world_size, train_ten_steps, batch, span, micro_batch, total, initial)
    for state in together:
        for name, value in alone.items():
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-12, msg=f"{name} of cut {cut}")
            assert torch.equal(state[name], together[0][name]), f"ranks differ in {name}"


def test_another_span_trains_other_weights():
    """The equality above would be empty if spans did not matter."""
    results = []
    for span in (2, 4):
        initial = small_net(2).state_dict()
        results.append(train_ten_steps(8, span, span, 80, initial)["0.weight"])
    assert not torch.allclose(results[0], results[1], rtol=1e-6)


@pytest.mark.parametrize("world_size", [2, 3])
def test_running_statistics_are_the_same_on_all_ranks(world_size):
    initial = small_net(4).state_dict()
    states = run_threads(world_size, train_ten_steps, 12, 4, 4, 120, initial)
    assert all(torch.equal(s["1.running_var"], states[0]["1.running_var"]) for s in states)
