"""Lists passed to an update: every tensor once, in parts that fit in cache, as flat views where layouts agree."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megabatch.optim.engine import base, fused, multi_tensor
from megabatch.optim.kernels.lars import LarsGroup, lars_step


class Recorder(base.MultiTensorOptimizer):
    """Optimizer that records the lists passed to `update`."""

    state_names = ("momentum_buffer",)
    kernel = fused.Kernel(LarsGroup, lars_step)

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self.sizes: list[list[int]] = []
        self.lists: list[multi_tensor.TensorLists] = []
        super().__init__(params, {"capturable": False, "fused": False, "foreach": None})

    def check(self, group: base.Group) -> None:
        pass

    def update(self, group: base.Group, tensors: multi_tensor.TensorLists) -> None:
        del group
        self.sizes.append([w.numel() for w in tensors.weights])
        self.lists.append(tensors)


@given(sizes=st.lists(st.integers(1, 150), min_size=1, max_size=12))
def test_on_a_cpu_each_update_gets_consecutive_whole_tensors_that_fit_in_cache(sizes: list[int]) -> None:
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


def strided(*shape: int, strides: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).as_strided(shape, strides)


@pytest.mark.parametrize(
    ("weight", "gradient", "flat"),
    [
        (torch.zeros(3, 4), strided(3, 4, strides=(4, 1)), True),
        (torch.zeros(3, 4), strided(3, 4, strides=(1, 3)), False),
        (
            strided(3, 4, strides=(1, 3)),
            strided(3, 4, strides=(1, 3)),
            False,
        ),  # dense, but in neither of the two common layouts
        (torch.zeros(3, 8)[:, ::2], torch.zeros(3, 4), False),  # gaps
        (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5), True),
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.zeros(2, 3, 4, 5), False),
        (torch.zeros(3, 4, 1, 1), strided(3, 4, 1, 1, strides=(4, 1, 4, 4)), True),  # 1 x 1 filters have two layouts
        (torch.zeros(()), torch.zeros(()), True),
    ],
)
def test_tensors_become_flat_views_only_where_their_memory_layouts_agree(
    weight: torch.Tensor, gradient: torch.Tensor, flat: bool
) -> None:
    parameter = torch.nn.Parameter(weight)
    parameter.grad = gradient
    optimizer = Recorder([parameter])
    optimizer.step()
    lists = optimizer.lists[0]
    seen = (*lists.weights, *lists.gradients, *lists.states["momentum_buffer"])
    assert all((t.ndim == 1) is flat for t in seen)
    with torch.no_grad():
        lists.weights[0].copy_(lists.gradients[0])
    assert torch.equal(parameter, gradient)


def test_channels_last_tensors_become_flat_views_in_memory_order() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    parameter.grad = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    optimizer = Recorder([parameter])
    optimizer.step()
    lists = optimizer.lists[0]
    assert lists.weights[0].shape == (120,)
    with torch.no_grad():
        lists.weights[0].copy_(lists.gradients[0])
    assert torch.equal(parameter, parameter.grad)
