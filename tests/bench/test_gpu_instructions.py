"""Counting machine instructions in a disassembly: loops by their trips, waits for a barrier once."""

import importlib
from pathlib import Path

import pytest

pytest.importorskip("triton")
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
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("gpu_instructions")


def test_instructions_of_loops_count_once_per_trip(counting):
    code = counting.instructions(SASS)
    assert [c.operation.split(".")[0] for c in code][:3] == ["MOV", "LDG", "HGMMA"]
    # Outside: MOV, the two that wait for a barrier, EXIT. The outer loop holds two more, the inner one two.
    assert counting.weighted(code, (1, 1)) == 8
    assert counting.weighted(code, (10, 1)) == 4 + 10 * (2 + 2)
    assert counting.weighted(code, (10, 4)) == 4 + 10 * (2 + 4 * 2)
