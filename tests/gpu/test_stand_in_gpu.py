"""The stand-in for a GPU refuses what a GPU refuses or gets wrong, and replays what a graph replays."""

import pytest
import torch
from stand_in_gpu import CUDA, RefusedError, StandInGpu


@pytest.fixture
def gpu():
    with StandInGpu() as gpu:
        yield gpu


def capture(work, **options):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        result = work()
    return graph, result


def test_tensors_of_two_devices_do_not_mix(gpu):
    here, there = torch.ones(3), torch.ones(3, device=CUDA)
    assert there.is_cuda
    assert there.device == CUDA
    with pytest.raises(RefusedError, match="both devices"):
        _ = here + there
    assert (there * torch.tensor(2.0)).tolist() == [2.0] * 3  # a number of the host is a number


def test_a_graph_reads_its_inputs_anew_and_recording_it_changes_nothing(gpu):
    weight, total, x = (torch.full((2,), value, device=CUDA) for value in (1.0, 0.0, 3.0))
    weight.requires_grad_()

    def step():
        (weight * x).sum().backward()
        total.add_(weight.grad)
        weight.grad = None
        return total * 2

    graph, doubled = capture(step)
    assert total.tolist() == [0.0, 0.0]
    graph.replay()
    x.fill_(4.0)
    graph.replay()
    assert total.tolist() == [7.0, 7.0]
    assert doubled.tolist() == [14.0, 14.0]


@pytest.mark.parametrize(
    "work",
    [
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x[[0, 1]],
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.ones(3)),
        lambda _: torch.tensor([1.0], device=CUDA),
        lambda _: torch.ones(3).to(CUDA, non_blocking=True),
        lambda _: torch.empty(3, pin_memory=True),
        lambda _: torch.cuda.synchronize(),
        lambda _: torch.cuda.Event().synchronize(),
    ],
    ids=["float", "tolist", "mask", "list", "cpu", "copy", "tensor", "to", "pinned", "synchronize", "event"],
)
def test_what_cuda_forbids_in_a_capture_is_refused(gpu, work):
    x = torch.ones(3, device=CUDA)
    with pytest.raises(RefusedError, match="captured"):
        capture(lambda: work(x))


def test_a_copy_from_pinned_memory_is_read_when_it_is_replayed(gpu):
    host, x = torch.zeros(3, pin_memory=True), torch.ones(3, device=CUDA)
    graph, _ = capture(lambda: x.copy_(host, non_blocking=True))
    host.fill_(5.0)
    graph.replay()
    assert x.tolist() == [5.0] * 3


@pytest.mark.parametrize("joins", [True, False])
def test_a_stream_that_waits_for_a_capture_is_part_of_it_and_must_join_it_again(gpu, joins):
    side, x = torch.cuda.Stream(), torch.ones(3, device=CUDA)

    def work():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.mul_(2)
        if joins:
            torch.cuda.current_stream().wait_stream(side)

    if not joins:
        with pytest.raises(RefusedError, match="have joined it"):
            capture(work)
        return
    graph, _ = capture(work)
    assert x.tolist() == [1.0] * 3
    graph.replay()
    assert x.tolist() == [2.0] * 3


def test_what_another_stream_may_not_have_written_is_not_read(gpu):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x = torch.ones(3, device=CUDA)
    with pytest.raises(RefusedError, match="may not have written"):
        x.sum()
    torch.cuda.current_stream().wait_stream(side)
    x.sum()
    with torch.cuda.stream(side), pytest.raises(RefusedError, match="may not have read"):
        x.zero_()


def test_what_the_host_copied_late_is_not_read_early(gpu):
    x, host = torch.ones(3, device=CUDA), torch.zeros(3, pin_memory=True)
    host.copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    with pytest.raises(RefusedError, match="may not have copied"):
        host.tolist()
    event.synchronize()
    assert host.tolist() == [1.0] * 3


@pytest.mark.parametrize("recorded", [False, True])
def test_memory_that_another_stream_still_uses_is_not_given_out(recorded):
    gpu, side = StandInGpu(), None
    with gpu:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            x = torch.ones(3, device=CUDA)
        torch.cuda.current_stream().wait_stream(side)
        x.sum()
        if recorded:
            x.record_stream(torch.cuda.current_stream())
        del x
        with torch.cuda.stream(side):
            torch.zeros(3, device=CUDA)
        assert len(gpu.faults) == (0 if recorded else 1)
        gpu.faults.clear()


def test_a_pool_whose_graphs_are_gone_takes_no_graph(gpu):
    pool, x = torch.cuda.graph_pool_handle(), torch.ones(3, device=CUDA)
    first = capture(lambda: x + 1, pool=pool)
    second = capture(lambda: x + 2, pool=pool)
    del first, second
    with pytest.raises(RuntimeError, match="INTERNAL ASSERT"):
        capture(lambda: x + 3, pool=pool)


def test_a_launch_must_have_its_tensors_on_the_gpu():
    triton = pytest.importorskip("triton")
    seen = []
    with StandInGpu(launch=lambda kernel, args, options: seen.append((kernel, len(args), options["grid"]))):
        kernel = triton.jit(_kernel)
        kernel[(2,)](torch.ones(3, device=CUDA), 7)
        assert seen == [("_kernel", 2, (2,))]
        with pytest.raises(RefusedError, match="tensor of the host"):
            kernel[(2,)](torch.ones(3), 7)


def _kernel(x, size):
    pass
