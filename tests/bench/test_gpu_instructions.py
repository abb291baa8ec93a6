"""Machine instructions: loops count by their trips, waits for a barrier once; the stem's kernels are few enough."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANG_S

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STEM = """
import sys, torch
from gpu_instructions import CEILING, compiled
from megabatch.kernels.norm.stem import fused_bn_relu_pool

def step():
    x = torch.empty(256, 64, 112, 112, dtype=getattr(torch, sys.argv[1])).contiguous(memory_format=torch.channels_last)
    y, _, _ = fused_bn_relu_pool(x.requires_grad_(), torch.ones(64), torch.ones(64), span=256, backend="triton")
    return lambda: y.backward(torch.empty_like(y))

found = {launch.name: launch.num_instructions() / launch.num_bytes() * 1e3 for launch in compiled(step)}
assert {"pool_kernel", "pool_gradient_sums_kernel", "pool_input_gradient_kernel"} <= found.keys(), found
assert all(number < CEILING for number in found.values()), found
assert found["pool_input_gradient_kernel"] < 130, found
"""
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                   /* 0x00000a0000017a02 */
        /*0010*/                   LDG.E.128 R4, [R2.64] ;                  /* 0x0000000602047981 */
        /*0020*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8] ;     /* 0x0 */
        /*0030*/              @P1  BRA 0x20 ;                               /* 0x0 */
        /*0040*/              @!P0 BRA 0x10 ;                               /* 0x0 */
        /*0050*/                   SYNCS.PHASECHK.TRANS64 P0, [UR4] ;       /* 0x0 */
        /*0060*/              @!P0 BRA 0x50 ;                               /* 0x0 */
        /*0070*/                   EXIT ;                                   /* 0x0 */
        /*0080*/                   SYNCS.PHASECHK.TRANS64 P0, [UR4] ;       /* 0x0 */
        /*0090*/                   BRA 0x10;                                /* 0x0 */
        /*00a0*/                   BRA 0xa0;                                /* 0x0 */
        /*00b0*/                   NOP;                                     /* 0x0 */
"""


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_instructions")


def test_instructions_of_loops_count_once_per_trip(counting):
    code = counting.instructions(SASS)
    assert [c.operation.split(".")[0] for c in code][:3] == ["MOV", "LDG", "HGMMA"]
    # Outside: MOV, the two that wait for a barrier, EXIT. The outer loop holds two more, the inner one two.
    assert counting.weighted(code, (1, 1)) == 8
    assert counting.weighted(code, (10, 1)) == 4 + 10 * (2 + 2)
    assert counting.weighted(code, (10, 4)) == 4 + 10 * (2 + 4 * 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_stems_kernels_can_reach_the_copy_rate_of_an_h200(dtype):
    paths = [str(BENCHMARKS), str(BENCHMARKS.parent / "src")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-c", STEM, dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr
