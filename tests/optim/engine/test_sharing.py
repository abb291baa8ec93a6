"""Blocks, units and shares of matrices."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_processes

from megabatch.optim.engine import sharing
from megabatch.optim.engine.sharing import Unit, make_plan
from megabatch.optim.muon import NewtonSchulzFlops

SHAPES = ((16, 3, 3, 3), (300, 20), (20, 300), (20, 300), (64, 64, 1, 1), (7, 1), (1, 9))


@pytest.mark.parametrize("block_size", [None, 1, 8, 100])
@pytest.mark.parametrize("short_side_first", [False, True])
def test_the_blocks_cover_every_element_once_whatever_the_sizes(block_size, short_side_first):
    plan = make_plan(SHAPES, NewtonSchulzFlops(5), 1, block_size=block_size, short_side_first=short_side_first)
    tensors = [torch.zeros(shape) for shape in SHAPES]
    for block in plan.blocks:
        matrix = block.of(tensors[block.tensor])
        matrix += 1  # a view of a contiguous tensor
        assert matrix.shape == block.shape
        assert max(matrix.shape) <= (block_size or 300)
        assert matrix.shape[0] <= matrix.shape[1] or not short_side_first
    assert all((tensor == 1).all() for tensor in tensors)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 50])
def test_the_units_do_not_depend_on_the_workers_and_each_has_one_owner(num_workers):
    alone = make_plan(SHAPES, NewtonSchulzFlops(5), 1)
    plan = make_plan(SHAPES, NewtonSchulzFlops(5), num_workers)
    units = [unit for share in plan.shares for unit in share]
    assert sorted(units, key=lambda u: u.members) == sorted(alone.shares[0], key=lambda u: u.members)
    assert sorted(m for unit in units for m in unit.members) == list(range(len(plan.blocks)))


def test_equal_matrices_share_a_unit_unless_it_would_be_a_large_part_of_the_work():
    small, large = (4, 8), (64, 128)
    plan = make_plan((*[small] * 10, *[large] * 3, (8, 4)), NewtonSchulzFlops(5), 1, short_side_first=True)
    assert sorted(len(unit.members) for unit in plan.shares[0]) == [1, 1, 1, 11]


def test_no_worker_has_more_than_the_average_and_one_unit():
    plan = make_plan(tuple((n, 3 * n) for n in range(5, 60)), NewtonSchulzFlops(5), 6)
    costs = [sum(unit.flops for unit in share) for share in plan.shares]
    largest = max(unit.flops for share in plan.shares for unit in share)
    assert max(costs) <= sum(costs) / 6 + largest


def test_blocks_without_a_gradient_are_left_out_and_the_others_keep_their_owner():
    plan = make_plan(SHAPES, NewtonSchulzFlops(5), 2, block_size=8)
    owners = {m: rank for rank, share in enumerate(plan.shares) for unit in share for m in unit.members}
    left = plan.without({1, 4})
    found = {m: rank for rank, share in enumerate(left.shares) for unit in share for m in unit.members}
    assert found == {m: rank for m, rank in owners.items() if plan.blocks[m].tensor not in {1, 4}}


def results_of_all(part_elements: int) -> dict[int, torch.Tensor]:
    """What each worker holds after a step of 21 matrices in which a part ends after `part_elements`."""
    sharing.PART_ELEMENTS = part_elements
    plan = make_plan(tuple((n, n + 1) for n in range(1, 22)), NewtonSchulzFlops(5), dist.get_world_size())

    def compute(unit: Unit) -> torch.Tensor:
        return torch.stack([torch.full(unit.shape, float(m)) for m in unit.members]).to(torch.bfloat16)

    device = torch.device("cpu")
    return sharing.compute_shares(plan, compute, dist.group.WORLD, dtype=torch.bfloat16, device=device)


@pytest.mark.multiprocess
@pytest.mark.parametrize("part_elements", [1, 200, 2**20])
def test_every_worker_receives_every_result_in_parts_of_any_size(part_elements):
    for found in run_processes(3, results_of_all, part_elements):
        assert sorted(found) == list(range(21))
        for position, matrix in found.items():
            assert matrix.shape == (position + 1, position + 2)
            assert (matrix == position).all()
