"""Checks of an installation, on files of a made system."""

from pathlib import Path

import pytest
import torch
from command_line import megabatch

from megabatch.kernels.cpu import library
from megabatch.observe.installation import Finding, check_installation


def found(root: Path) -> dict[str, Finding]:
    return {finding.part: finding for finding in check_installation(root)}


def test_the_command_lists_every_part() -> None:
    done = megabatch("doctor")
    assert done.returncode == 0
    parts = ("torch", "exchange", "JPEG decoder", "CPU kernels", "instruction set", "open files", "cores", "interfaces")
    assert all(f"\n{part} " in f"\n{done.stdout}" for part in parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a GPU")
def test_a_driver_whose_gpus_torch_does_not_find_has_advice(tmp_path: Path) -> None:
    assert found(tmp_path)["torch"].advice == ""
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").touch()
    assert found(tmp_path)["torch"].advice


def test_several_memory_nodes_and_a_slow_clock_have_advice(tmp_path: Path) -> None:
    for node in ("node0", "node1"):
        (tmp_path / "sys/devices/system/node" / node).mkdir(parents=True)
    clocks = tmp_path / "sys/devices/system/clocksource/clocksource0"
    clocks.mkdir(parents=True)
    (clocks / "current_clocksource").write_text("hpet\n")
    parts = found(tmp_path)
    assert parts["memory nodes"].state == "2 NUMA nodes"
    assert "--workers" in parts["memory nodes"].advice
    assert (parts["clock"].state, bool(parts["clock"].advice)) == ("hpet", True)
    (clocks / "current_clocksource").write_text("tsc\n")
    assert found(tmp_path)["clock"].advice == ""


def test_more_threads_than_cores_have_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4000")
    assert "OMP_NUM_THREADS" in found(tmp_path)["cores"].advice


def test_a_missing_library_names_the_command_that_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "function", lambda _: None)
    assert "python -m megabatch.kernels.cpu.library" in found(tmp_path)["CPU kernels"].advice
