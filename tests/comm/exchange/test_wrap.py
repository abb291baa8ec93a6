"""Bucket plans as DDP applies them, and the set-up by `wrap`."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_processes, run_threads
from torch import nn

from megabatch.comm.exchange.buckets import bucket_caps_mib, cubic_groups
from megabatch.comm.exchange.grid import make_grid
from megabatch.comm.exchange.timeline import Timeline
from megabatch.comm.exchange.wrap import _ddp_options, wrap
from megabatch.errors import SettingsError


def test_the_161_tensors_of_resnet50_form_the_groups_of_the_paper():
    groups = cubic_groups(161)
    assert groups == [3, 21, 57, 80]
    assert [sum(groups[: k + 1]) for k in range(4)] == [3, 24, 81, 161]


@given(st.integers(0, 2000))
def test_the_groups_hold_every_tensor_once(num_tensors):
    groups = cubic_groups(num_tensors)
    assert sum(groups) == num_tensors
    assert all(group > 0 for group in groups)


def test_the_size_plan_starts_with_a_small_bucket():
    assert bucket_caps_mib([], bucket_mib=25.0) == [1.0, 25.0]
    assert bucket_caps_mib([], bucket_mib=0.5) == [0.5, 0.5]


@pytest.mark.parametrize(("options", "message"), [({"plan": "square"}, "'cubic'"), ({"bucket_mib": 0.0}, "positive")])
def test_an_impossible_plan_is_refused(options, message):
    with pytest.raises(SettingsError, match=message):
        bucket_caps_mib([], **options)


def test_cubic_groups_are_refused_by_a_torch_with_one_size_for_all_buckets(monkeypatch):
    def older(self, module, bucket_cap_mb=None, broadcast_buffers=True):
        """The options of torch 2.11 that matter here."""

    monkeypatch.setattr("megabatch.comm.exchange.wrap.DistributedDataParallel", type("Older", (), {"__init__": older}))
    assert _ddp_options([1.0, 25.0], "size") == {"broadcast_buffers": False, "bucket_cap_mb": 25.0}
    with pytest.raises(SettingsError, match=r"'cubic' needs torch 2\.13 or newer"):
        _ddp_options([1.0, 25.0], "cubic")


def deep_net():
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(15)])


def buckets_of_a_step(options):
    timeline = Timeline()
    model = wrap(deep_net(), algorithm="torus", shape=(1, 2), timeline=timeline, **options)
    for _ in range(2):  # DDP rebuilds its buckets after the first backward
        model(torch.ones(1, 8)).sum().backward()
        step = timeline.finish_step()
    return step


@pytest.mark.multiprocess
def test_ddp_uses_the_cubic_groups_and_the_timeline_records_them():
    for step in run_processes(2, buckets_of_a_step, {"bucket_plan": "cubic"}):
        pair = 8 * 8 + 8  # a layer's weight and bias; groups of 3, 21, 6 of the 30 tensors, weights before biases
        sizes = [bucket["numel"] for bucket in step["buckets"]]
        assert sum(sizes) == 15 * pair
        assert len(sizes) == step["num_buckets"] == 3
        assert step["bytes_on_wire"] == pytest.approx(4 * 15 * pair, rel=0.01)
        for bucket in step["buckets"]:
            assert bucket["ready_ms"] <= bucket["sent_ms"] <= bucket["done_ms"]
        assert step["exposed_ms"] == pytest.approx(
            max(b["done_ms"] for b in step["buckets"]) - max(b["ready_ms"] for b in step["buckets"])
        )


def accumulate(options):
    """Two micro-batches of which only the second is exchanged, twice."""
    model = wrap(nn.Linear(3, 1, bias=False), shape=(2, 1), **options)
    nn.init.ones_(model.module.weight)
    for _ in range(2):
        model.zero_grad()
        with model.no_sync():
            model(torch.full((1, 3), 1.0 + dist.get_rank())).sum().backward()
        model(torch.full((1, 3), 10.0 + dist.get_rank())).sum().backward()
    return model.module.weight.grad


@pytest.mark.parametrize("algorithm", ["flat", "torus"])
@pytest.mark.parametrize("average", [True, False])
def test_accumulated_micro_batches_are_exchanged_once(algorithm, average):
    for gradient in run_threads(2, accumulate, {"algorithm": algorithm, "average": average}):
        assert torch.equal(gradient, torch.full((1, 3), 12.0 if average else 24.0))


def check_model():
    model = wrap(nn.BatchNorm1d(3), shape=(1, 2))
    model.module.running_mean.fill_(dist.get_rank())
    model(torch.randn(4, 3, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    model.eval()
    model(torch.zeros(1, 3))
    views = all(p.grad._base is not None for p in model.parameters())
    return model.module.running_mean.mean().item(), views


def test_buffers_are_not_broadcast_and_gradients_are_views_of_buckets():
    (first, views), (second, _) = run_threads(2, check_model)
    assert second - first == pytest.approx(0.9)
    assert views


def unknown_algorithm():
    with pytest.raises(SettingsError, match="'torus' works"):
        wrap(nn.Linear(1, 1), algorithm="ring")


def test_an_unknown_algorithm_is_refused():
    run_threads(1, unknown_algorithm)


def wrap_with_a_grid():
    grid = make_grid(shape=(1, 2))
    with pytest.raises(SettingsError, match=r"shape \(2, 1\) was given with a grid of shape \(1, 2\)"):
        wrap(nn.Linear(1, 1), grid=grid, shape=(2, 1))
    return wrap(nn.Linear(1, 1), algorithm="auto", grid=grid).exchange_state.grid is grid


def test_a_given_grid_is_the_one_in_use_and_another_shape_beside_it_is_refused():
    assert run_threads(2, wrap_with_a_grid) == [True, True]
