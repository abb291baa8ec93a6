"""Statistics kept in one launch, against the sentences of their docstrings."""

import pytest
import torch
from torch import Tensor

from megabatch.kernels.statistics import collect_spans, move_averages

pytestmark = pytest.mark.usefixtures("interpreter")

CASES = [(1, 8), (3, 20), (2, 300)]
BACKENDS = ["triton", "reference"]


def draw(spans: int, channels: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean, var = torch.randn(2, spans, channels, generator=generator)
    return mean, var.abs()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("spans", "channels"), CASES)
def test_spans_add_up_and_the_first_of_the_step_is_kept(spans: int, channels: int, backend: str) -> None:
    first, total = torch.zeros(2, 2 * channels + 1).unbind()
    forwards = [draw(spans, channels, seed) for seed in range(3)]
    for mean, var in forwards:
        collect_spans(mean, var, first, total, backend=backend)
    rows = torch.cat([torch.cat(pair, dim=1) for pair in forwards]).double()
    torch.testing.assert_close(first, torch.cat([rows[0], torch.ones(1)]).float())
    torch.testing.assert_close(total[:-1], rows.sum(0).float())
    assert total[-1] == 3 * spans


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("spans", "channels"), CASES)
def test_averages_move_by_momentum_towards_the_mean_over_spans(spans: int, channels: int, backend: str) -> None:
    running_mean, running_var = draw(1, channels, 9)
    expected = torch.stack([running_mean[0], running_var[0]]).double()
    averages, count = [running_mean[0].clone(), running_var[0].clone()], torch.tensor(4)
    for seed in range(2):
        mean, var = draw(spans, channels, seed)
        move_averages(mean, var, *averages, count, momentum=0.3, backend=backend)
        expected = 0.7 * expected + 0.3 * torch.stack([mean.double().mean(0), var.double().mean(0)])
    torch.testing.assert_close(torch.stack(averages).double(), expected, rtol=1e-5, atol=1e-6)
    assert count == 6
