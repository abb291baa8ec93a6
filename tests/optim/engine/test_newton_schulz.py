"""Orthogonalisation against singular value decompositions, and the minimax coefficients against their definition."""

import pytest
import torch

from megabatch.optim.engine.newton_schulz import JORDAN, minimax_coefficients, orthogonalize

COEFFICIENTS = {"jordan": (JORDAN,) * 5, "minimax": minimax_coefficients(5), "minimax 6": minimax_coefficients(6)}
RANGES = {"jordan": (0.68, 1.14), "minimax": (0.86, 1.12), "minimax 6": (0.99, 1.01)}


def matrices(m: int, n: int, smallest: float, number: int = 3) -> torch.Tensor:
    """Random matrices whose singular values, relative to the norm, are between `smallest` and 1 / sqrt(2)."""
    generator = torch.Generator().manual_seed(m * n)
    u, _, vt = torch.linalg.svd(
        torch.randn(number, m, n, generator=generator, dtype=torch.float64), full_matrices=False
    )
    values = torch.cat([torch.ones(1, dtype=torch.float64), torch.logspace(-2, 0, m - 1, dtype=torch.float64) * 0.9])
    values = values.clamp(min=2 * smallest * values.norm())
    return 7.0 * (u * values) @ vt


@pytest.mark.parametrize("kind", COEFFICIENTS)
@pytest.mark.parametrize(("dtype", "margin"), [(torch.float64, 0.0), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_singular_values_come_close_to_one_and_singular_vectors_stay(kind, dtype, margin):
    given = matrices(6, 20, smallest=0.01)
    found = orthogonalize(given.to(torch.float32 if dtype != torch.float64 else dtype), COEFFICIENTS[kind], dtype)
    assert found.dtype == dtype
    values = torch.linalg.svdvals(found.double())
    low, high = RANGES[kind]
    assert low - margin <= values.min()
    assert values.max() <= high + margin
    if dtype == torch.float64:
        u, _, vt = torch.linalg.svd(given, full_matrices=False)
        rotated = u.mT @ found @ vt.mT
        assert torch.allclose(rotated, torch.diag_embed(rotated.diagonal(dim1=1, dim2=2)), atol=1e-8)


def test_the_iteration_is_the_polynomial_of_the_singular_values():
    given = matrices(4, 4, smallest=0.1)
    coefficients = ((2.0, -1.5, 0.5), (1.7, -1.0, 0.25))
    expected = torch.linalg.svdvals(given) / given.flatten(1).norm(dim=1, keepdim=True)
    for a, b, c in coefficients:
        expected = a * expected + b * expected**3 + c * expected**5
    found = torch.linalg.svdvals(orthogonalize(given, coefficients, torch.float64))
    torch.testing.assert_close(found, expected.sort(descending=True).values, rtol=1e-9, atol=1e-12)


def test_zeros_stay_zeros_and_tiny_matrices_are_orthogonalised():
    tiny = matrices(3, 5, smallest=0.1).float() * 1e-20
    assert torch.linalg.svdvals(orthogonalize(tiny, COEFFICIENTS["minimax 6"], torch.float32)).min() > 0.98
    assert not orthogonalize(torch.zeros(2, 3, 5), COEFFICIENTS["jordan"], torch.bfloat16).any()


@pytest.mark.parametrize("steps", [1, 3, 5, 9])
def test_minimax_coefficients_beat_every_nearby_polynomial(steps):
    """The last step's error over the interval that the steps before leave; any change of a coefficient enlarges it."""
    low, high = _interval_before_the_last(steps)
    s = torch.linspace(low, high, 20001, dtype=torch.float64)

    def error(a, b, c):
        return float((1 - (a * s + b * s**3 + c * s**5)).abs().max())

    a, b, c = minimax_coefficients(steps)[-1]
    best = error(a, b, c)
    for change in (-1e-3, 1e-3):
        assert error(a + change, b, c) > best
        assert error(a, b + change, c) > best
        assert error(a, b, c + change) > best


def _interval_before_the_last(steps: int) -> tuple[float, float]:
    """Interval after exact steps, whose coefficients carry no margin."""
    low, high = 1e-3, 1.0
    for number in range(1, steps):
        a, b, c = minimax_coefficients(number)[-1]
        s = torch.linspace(low, high, 20001, dtype=torch.float64)
        error = float((1 - (a * s + b * s**3 + c * s**5)).abs().max())
        low, high = 1 - error, 1 + error
    return low, high
