"""Cutting lists of tensors into blocks loses and repeats nothing."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megabatch.optim import multi_tensor
from megabatch.optim.multi_tensor import blocks, laid_out_alike


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_tensor, "BLOCK_ELEMENTS", 64)


@given(sizes=st.lists(st.integers(0, 300), min_size=0, max_size=12))
def test_blocks_cover_every_element_once_and_stay_within_the_limit(sizes: list[int]) -> None:
    counts = [torch.zeros(size) for size in sizes]
    owners = [torch.full((size,), index) for index, size in enumerate(sizes)]
    for indices, (pieces, labels) in blocks(counts, owners):
        assert sum(piece.numel() for piece in pieces) <= 64
        for index, piece, label in zip(indices, pieces, labels, strict=True):
            assert bool((label == index).all())
            piece.add_(1)
    assert all(bool((count == 1).all()) for count in counts)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pieces_of_a_large_tensor_are_views_in_either_memory_format(memory_format: torch.memory_format) -> None:
    tensor = torch.zeros(4, 8, 3, 3).to(memory_format=memory_format)
    for _, (pieces,) in blocks([tensor]):
        pieces[0] += 1
    assert bool((tensor == 1).all())


def test_large_tensors_of_different_layouts_are_not_cut() -> None:
    """Their flat pieces would pair elements of different positions."""
    weight = torch.zeros(4, 8, 3, 3).to(memory_format=torch.channels_last)
    gradient = torch.arange(4 * 8 * 9.0).view(4, 8, 3, 3)
    for _, (w, g) in blocks([weight], [gradient]):
        torch._foreach_add_(w, g)
    assert torch.equal(weight, gradient)


@pytest.mark.parametrize(
    ("tensors", "alike"),
    [
        ((torch.zeros(3, 4), torch.zeros(3, 4)), True),
        ((torch.zeros(3, 4), torch.zeros(4, 3).t()), False),
        ((torch.zeros(3, 4, 1, 1), torch.zeros(3, 4, 1, 1).as_strided((3, 4, 1, 1), (4, 1, 4, 4))), True),
        ((torch.zeros(4, 3).t(), torch.zeros(4, 3).t()), False),  # dense, but not in an order that we cut
        ((torch.zeros(3, 8)[:, ::2],), False),  # gaps
    ],
)
def test_layouts_are_told_apart(tensors: tuple[torch.Tensor, ...], alike: bool) -> None:
    assert laid_out_alike(tensors) is alike


class Recorder(multi_tensor.MultiTensorOptimizer):
    """Keeps the sizes of the tensors that each update is given."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self.sizes: list[list[int]] = []
        super().__init__(params, {"capturable": False})

    def check(self, group: multi_tensor.Group) -> None:
        pass

    def update(self, group: multi_tensor.Group, tensors: multi_tensor.TensorLists) -> None:
        del group
        self.sizes.append([w.numel() for w in tensors.weights])


@given(sizes=st.lists(st.integers(1, 150), min_size=1, max_size=12))
def test_on_a_cpu_an_update_gets_whole_tensors_in_order_that_fit_in_cache_together(sizes: list[int]) -> None:
    tensors = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for tensor in tensors:
        tensor.grad = torch.zeros_like(tensor)
    optimizer = Recorder(tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multi_tensor, "PART_ELEMENTS", 100)
        optimizer.step()
    assert [size for part in optimizer.sizes for size in part] == sizes
    assert all(sum(part) <= 100 or len(part) == 1 for part in optimizer.sizes)
    assert all(sum(a) + b[0] > 100 for a, b in itertools.pairwise(optimizer.sizes))
