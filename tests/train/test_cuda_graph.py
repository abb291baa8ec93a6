"""When a step is recorded, replayed and recorded anew; on a CPU, with a stand-in for the graph."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megabatch.train.cuda_graph import CapturedStep


class StandIn:
    """Records as a CUDA graph does: the work's tensors, not its values; recording changes no value."""

    def __init__(self, state=()):
        self.state, self.log = list(state), []

    def run(self, work):
        self.log.append("run")
        return work()

    def record(self, work):
        self.log.append("record")
        before = [tensor.clone() for tensor in self.state]
        result = work()
        for tensor, value in zip(self.state, before, strict=True):
            tensor.copy_(value)
        own = result.clone()

        def replay():
            self.log.append("replay")
            own.copy_(work())

        return own, replay


def counting_step(state):
    def step(x, scale=1):
        state.add_(1)
        return x.sum() * scale + state

    return step


def test_a_step_runs_three_times_as_it_is_and_is_replayed_from_then_on():
    state = torch.zeros(())
    recorder = StandIn([state])
    step = CapturedStep(counting_step(state), recorder=recorder)
    results = [float(step(torch.full((2,), float(n)))) for n in range(6)]
    assert results == [2 * n + n + 1 for n in range(6)]
    assert recorder.log == ["run"] * 3 + ["record"] + ["replay"] * 3


def test_inputs_are_copied_to_the_graphs_own_tensors():
    seen = []

    def step(x):
        seen.append(x.data_ptr())
        return 2 * x

    captured = CapturedStep(step, warmup=1, recorder=StandIn())
    mine = [torch.tensor([float(n)]) for n in range(4)]
    results = [captured(x).clone() for x in mine]
    assert [float(r) for r in results] == [0.0, 2.0, 4.0, 6.0]
    assert seen[0] == mine[0].data_ptr()
    assert len(set(seen[1:])) == 1
    assert seen[1] not in [x.data_ptr() for x in mine]


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(3)},
        {"x": torch.zeros(2, dtype=torch.float64)},
        {"x": torch.zeros(2), "scale": 2},
        {"x": torch.zeros(4)[::2]},
    ],
    ids=["shape", "dtype", "constant", "layout"],
)
def test_a_call_of_another_kind_is_recorded_by_itself(other):
    recorder = StandIn()
    step = CapturedStep(lambda x, scale=1: x * scale, warmup=1, recorder=recorder)
    for _ in range(3):
        step(torch.zeros(2))
        step(other["x"], **{key: value for key, value in other.items() if key != "x"})
    assert step.num_graphs == 2
    assert recorder.log.count("record") == 2


def test_what_comes_once_is_never_recorded():
    recorder = StandIn()
    step = CapturedStep(lambda x: x + 1, warmup=3, recorder=recorder)
    for size in range(1, 9):
        step(torch.zeros(size))
    assert recorder.log == ["run"] * 8
    assert step.num_graphs == 0


def test_the_graph_not_used_for_longest_goes_first():
    step = CapturedStep(lambda x: x + 1, warmup=0, max_graphs=2, recorder=(recorder := StandIn()))
    for size in (1, 2, 1, 3, 1, 2):
        step(torch.zeros(size))
        assert step.num_graphs <= 2
    # 1 stayed, as it was used; 2 went for 3, and had to be recorded again
    assert recorder.log.count("record") == 4


@settings(max_examples=40)
@given(st.lists(st.integers(1, 4), max_size=40), st.integers(0, 3), st.integers(1, 3))
def test_captured_or_not_any_sequence_of_calls_computes_the_same(sizes, warmup, max_graphs):
    one, two = torch.zeros(()), torch.zeros(())
    plain = counting_step(one)
    captured = CapturedStep(counting_step(two), warmup=warmup, max_graphs=max_graphs, recorder=StandIn([two]))
    for number, size in enumerate(sizes):
        x = torch.full((size,), float(number))
        assert float(captured(x, scale=size)) == float(plain(x, scale=size))


class Refusing(StandIn):
    def record(self, _):
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_recording_that_fails_is_told_once_and_the_step_goes_on():
    told = []
    step = CapturedStep(lambda x: x + 1, warmup=1, recorder=Refusing(), on_failure=told.append)
    assert [float(step(torch.tensor(float(n)))) for n in range(5)] == [1, 2, 3, 4, 5]
    assert len(told) == 1


def test_a_recording_that_fails_is_raised_where_nobody_is_told():
    step = CapturedStep(lambda x: x + 1, warmup=0, recorder=Refusing())
    with pytest.raises(RuntimeError, match="capturing"):
        step(torch.zeros(1))


def test_an_ordinary_call_finds_no_graph_that_holds_memory():
    """A graph keeps what a step allocates, so a run's last short batch would need twice the memory."""
    found = []

    class Looking(StandIn):
        def run(self, work):
            found.append(step.num_graphs)
            return super().run(work)

    step = CapturedStep(lambda x: x + 1, warmup=1, recorder=(recorder := Looking()))
    for size in (1, 1, 2, 2, 1, 2, 3):
        step(torch.zeros(size))
    assert found == [0, 0, 0]
    # The graph that was given up for another kind's first call is recorded again beside the other's.
    assert recorder.log == ["run", "record", "replay"] * 2 + ["record", "replay", "replay", "run"]
