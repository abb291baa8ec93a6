"""Bad samples are made known to every worker, once each, and their number is logged where it has changed."""

from types import SimpleNamespace

import torch.distributed as dist
from ranks import run_threads
from tiny_run import here

from megabatch.train.health.bad_samples import BadSamples, ReplacesBadSamples


class Loader:
    """Names what it is told of, as one over files does."""

    def __init__(self):
        self.bad_samples, self.num_replaced, self.named = {}, 0, []

    def meets(self, index):
        self.learn_bad_samples({index: "cut off"})
        self.num_replaced += 1

    def learn_bad_samples(self, reasons):
        self.named += [index for index in sorted(reasons) if index not in self.bad_samples]
        self.bad_samples = {**reasons, **self.bad_samples}


def a_run(loader):
    events = []
    run = SimpleNamespace(loader=loader, world=here(), state=SimpleNamespace(step=7), log=events.append)
    return BadSamples(run), events


def three_workers_meet():
    loader, rank = Loader(), dist.get_rank()
    assert isinstance(loader, ReplacesBadSamples)
    damage, events = a_run(loader)
    damage.synchronize()
    loader.meets(10 + rank)
    loader.meets(99)
    damage.synchronize()
    damage.synchronize()
    loader.meets(10)  # of an epoch in which it came to this worker
    damage.synchronize()
    return loader.named, events


def test_every_worker_knows_what_any_has_met_and_none_is_named_twice():
    for rank, (named, events) in enumerate(run_threads(3, three_workers_meet)):
        assert sorted(named) == [10, 11, 12, 99]
        assert named[:2] == [10 + rank, 99]
        assert [event["num_bad_samples"] for event in events] == [4, 4]
        assert [event["num_replaced_samples"] for event in events] == [6, 9]
        assert {event["step"] for event in events} == {7}


def test_a_run_without_damage_and_one_on_arrays_log_nothing():
    for loader in (Loader(), SimpleNamespace(batches=None)):
        damage, events = a_run(loader)
        damage.synchronize()
        assert events == []
