"""The exchange for CUDA graphs gives the gradients of DistributedDataParallel, in buckets that never change."""

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_threads
from torch import nn

from megabatch.comm.exchange.capturable import cut_buckets
from megabatch.comm.exchange.state import ExchangeState
from megabatch.comm.exchange.wrap import wrap, wrap_capturable


def small_net():
    """A net with equal weights on every rank; ranks are threads, which share torch's global generator."""
    convolutions = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    net, generator = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * 16, 5)), torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return net


def gradients_of(make, algorithm, wire):
    """Of two steps of two micro-batches each, with the places of the gradients."""
    module, generator, found = small_net(), torch.Generator().manual_seed(dist.get_rank()), []
    model = make(module, algorithm=algorithm, wire=wire, bucket_mib=0.002)
    for _ in range(2):
        module.zero_grad(set_to_none=True)
        first, second = torch.randn(2, 4, 3, 8, 8, generator=generator)
        with model.no_sync():
            model(first).square().mean().backward()
        model(second).square().mean().backward()
        found.append([(p.grad.clone(), p.grad.data_ptr(), p.grad.stride() == p.stride()) for p in module.parameters()])
    model.exchange_state.close()
    return found


@pytest.mark.parametrize(("algorithm", "wire"), [("flat", "fp32"), ("torus", "fp32"), ("split_torus", "fp16")])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_gradients_are_those_of_ddp_and_stay_in_their_place(num_ranks, algorithm, wire):
    ours = run_threads(num_ranks, gradients_of, wrap_capturable, algorithm, wire)
    ddp = run_threads(num_ranks, gradients_of, wrap, algorithm, wire)
    tolerance = 1e-6 if wire == "fp32" or num_ranks == 1 else 1e-2
    for one, other in zip(ours, ddp, strict=True):
        for step, expected in zip(one, other, strict=True):
            for (gradient, _, has_strides), (reference, *_) in zip(step, expected, strict=True):
                assert has_strides
                assert (gradient - reference).norm() <= tolerance * reference.norm()
        assert [place for _, place, _ in one[0]] == [place for _, place, _ in one[1]]
    for other in ours[1:]:
        assert all(torch.equal(a[0], b[0]) for a, b in zip(other[1], ours[0][1], strict=True))


def order_of_buckets():
    """Indices and bytes of what is sent, where backward computes gradients in another order than that of buckets."""
    sent, exchange = [], ExchangeState.exchange
    last, first = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    module = nn.ModuleDict({"last": last, "first": first})  # in backward the first parameter is ready first
    module.forward = lambda x: last(first(x))
    model = wrap_capturable(module, bucket_mib=1e-6)
    model.exchange_state.exchange = lambda buffer, *args, index, **options: (
        sent.append((index, buffer.nbytes)) or exchange(model.exchange_state, buffer, *args, index=index, **options)
    )
    model(torch.ones(2, 4)).sum().backward()
    model.exchange_state.close()
    return sent


def test_buckets_are_sent_in_their_order_whichever_is_ready_first():
    assert run_threads(2, order_of_buckets) == [[(0, 64), (1, 64)]] * 2


def backward_of_a_part():
    module = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    module.forward = module["used"].forward
    model = wrap_capturable(module)
    model(torch.ones(1, 2)).sum().backward()


def test_a_parameter_without_a_gradient_is_an_error():
    with pytest.raises(RankError, match="2 parameters received no gradient, needed: all; capture=off works"):
        run_threads(1, backward_of_a_part)


def test_buckets_close_once_they_have_reached_their_size():
    parameters = [nn.Parameter(torch.zeros(256, 1024 * size)) for size in (4, 1, 1, 2, 1)]  # MiB
    parameters.insert(2, nn.Parameter(torch.zeros(1), requires_grad=False))
    groups = cut_buckets(parameters, [1.0, 2.5])
    assert [[p.numel() >> 18 for p in group] for group in groups] == [[1], [2, 1], [1, 4]]
