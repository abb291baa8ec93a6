"""Runs the stages of an all-reduce algorithm one after another, without the threads of `ExchangeState`."""

import torch
from torch import Tensor

from megabatch.comm.exchange.algorithms import padded_numel, routes
from megabatch.comm.exchange.grid import Grid
from megabatch.comm.exchange.pipeline import run_here
from megabatch.comm.exchange.stages import Job


def sum_by_stages(value: Tensor, algorithm: str, grid: Grid) -> Tensor:
    """The sum of the ranks' `value` [n], in its own type."""
    buffer = torch.zeros(padded_numel(value.numel(), algorithm, grid), dtype=value.dtype)
    buffer[: value.numel()] = value
    made = routes(algorithm, grid)
    for number, (route, region) in enumerate(zip(made, buffer.chunk(len(made)), strict=True)):
        scratch: dict[int, Tensor] = {}
        run_here(route, Job(region, lambda slot, like, s=scratch: s.setdefault(slot, torch.empty_like(like)), number))
    return buffer[: value.numel()]
