"""Orthogonalisation of matrices by an odd quintic iteration, without a singular value decomposition."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

Quintic = tuple[float, float, float]

JORDAN: Quintic = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan et al. 2024 for every step: five steps take singular values above 0.01 into [0.68, 1.14]."""

MARGIN = 1.01
"""`minimax_coefficients` allows singular values this much above the interval, for rounding in bfloat16."""


def orthogonalize(matrices: Tensor, coefficients: Sequence[Quintic], dtype: torch.dtype) -> Tensor:
    """Nearly U V^T of each matrix U S V^T (b, m, n), m <= n, in `dtype`; a zero matrix stays zero.

        X = M / |M|;   for (a, b, c) in coefficients:   A = X X^T,   X = a X + (b A + c A^2) X

    |M| is the Frobenius norm, in the matrices' dtype. Each step maps a singular value s to a s + b s^3 + c s^5 (Jordan
    et al. 2024, "Muon: an optimizer for hidden layers in neural networks"). Costs 4 m^2 n + 2 m^3 flops per step.
    """
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    x: Tensor = (matrices / norms.clamp(min=torch.finfo(norms.dtype).tiny)).to(dtype)
    for a, b, c in coefficients:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


@functools.cache
def minimax_coefficients(steps: int, smallest: float = 1e-3) -> tuple[Quintic, ...]:
    """Coefficients for `orthogonalize` that bring singular values in [smallest, 1] as close to 1 as possible.

    Each step has the polynomial p of least max |1 - p(s)| over the interval that contains the singular values so far;
    greedily composed, these are optimal (Amsel et al. 2025, arXiv:2505.16932). p oscillates equally: with error E it is
    1 - E at both the lower end and its minimum, and 1 + E at its maximum and the upper end, so the next interval is
    [1 - E, 1 + E]. All steps but the last leave `MARGIN` for rounding.
    """
    low, high = smallest, 1.0
    found = []
    for step in range(steps):
        a, b, c, error = _equioscillating(low, high)
        margin = MARGIN if step < steps - 1 else 1.0
        found.append((a / margin, b / margin**3, c / margin**5))
        low, high = 1 - error, 1 + error
    return tuple(found)


def _equioscillating(low: float, high: float) -> tuple[float, float, float, float]:
    """a, b, c of the minimax polynomial on [low, high], and its error (Remez 1934)."""
    if high - low < 1e-4 * high:  # the system below is nearly singular; this is its limit
        middle = (low + high) / 2
        return 1.875 / middle, -1.25 / middle**3, 0.375 / middle**5, ((high - low) / high) ** 3
    top, bottom = (3 * low + high) / 4, (low + 3 * high) / 4
    for _ in range(50):
        rows = [[s, s**3, s**5, sign] for s, sign in ((low, 1.0), (top, -1.0), (bottom, 1.0), (high, -1.0))]
        system = torch.tensor(rows, dtype=torch.float64)
        a, b, c, error = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        root = (9 * b * b - 20 * a * c) ** 0.5
        before, (top, bottom) = (top, bottom), (((-3 * b + sign * root) / (10 * c)) ** 0.5 for sign in (-1, 1))
        if abs(top - before[0]) + abs(bottom - before[1]) < 1e-12:
            break
    return a, b, c, error
