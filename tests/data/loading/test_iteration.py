"""`TrainLoader` as a DataLoader's replacement: iteration, length, position, ranks."""

import pytest
import torch

from megabatch import ArraySource, TrainLoader
from megabatch.errors import UserError

N = 23
SOURCE = ArraySource(torch.zeros(N, 1, 4, 4, dtype=torch.uint8), torch.arange(N), tuple(map(str, range(N))))


def loader(**changes):
    values = {"local_batch_size": 4, "resolution": 4, "seed": 1, "pixel_mean": (0.5,), "pixel_std": (0.5,)}
    return TrainLoader(SOURCE, **values | {"image_channels": 1} | changes)


def labels(batches):
    return [label for batch in batches for label in batch.labels.tolist()]


def test_iterations_follow_on_and_no_sample_is_dropped():
    ours = loader()
    assert len(ours) == 5
    seen = [label for _ in range(23) for label in labels(ours)]
    assert len(seen) == 23 * 20
    for epoch in range(20):
        assert sorted(seen[epoch * N : (epoch + 1) * N]) == list(range(N))


def test_a_position_resumes_within_an_epoch():
    whole = loader()
    expected = [labels([batch]) for batch in whole]
    first, second = loader(), loader()
    taken = []
    for batch in first:
        taken.append(labels([batch]))
        if len(taken) == 2:
            break
    assert first.state_dict() == {"samples_seen": 8}
    second.load_state_dict(first.state_dict())
    assert taken + [labels([batch]) for batch in second][:3] == expected


def test_ranks_share_each_global_batch_and_another_number_of_ranks_resumes():
    alone = loader(local_batch_size=8)
    together = [loader(rank=rank, world_size=2) for rank in range(2)]
    pairs = zip(*together, strict=True)
    assert [labels(pair) for pair in pairs] == [labels([batch]) for batch in alone]
    assert together[0].state_dict() == together[1].state_dict() == alone.state_dict()
    assert len(alone) == len(together[0]) == 2


def test_a_data_set_smaller_than_the_batch_is_one_batch_long():
    assert len(loader(local_batch_size=50)) == 1
    assert next(iter(loader(local_batch_size=50))).count == 50


@pytest.mark.parametrize("left_out", ["local_batch_size", "resolution"])
def test_iteration_without_its_arguments_names_them(left_out):
    with pytest.raises(UserError, match="need local_batch_size and resolution"):
        iter(loader(**{left_out: None})).__next__()
    with pytest.raises(UserError, match="need local_batch_size and resolution"):
        len(loader(**{left_out: None}))


@pytest.mark.parametrize(
    ("changes", "said"), [({"rank": 2, "world_size": 2}, "0 to 1"), ({"world_size": 0}, "world_size")]
)
def test_a_rank_outside_of_the_world_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        loader(**changes)
