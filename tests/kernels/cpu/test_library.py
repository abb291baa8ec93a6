"""The C sources of the CPU kernels build, and do not access memory outside their buffers."""

import shutil
import subprocess
from pathlib import Path

import pytest
from limits import HANG_S

from megabatch import native
from megabatch.errors import SettingsError
from megabatch.kernels.cpu import batch_norm as cpu_batch_norm
from megabatch.kernels.cpu import library as cpu_native

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")


@pytest.mark.slow
@needs_gcc
def test_the_library_builds_and_was_built_by_the_installation(tmp_path):
    assert native.open_function(cpu_native.build(tmp_path), "megabatch_norm_backward") is not None
    assert cpu_batch_norm.is_available(), "there is a compiler, so the installation should have built it"


def test_a_missing_compiler_raises_an_error_that_calls_it_optional(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SettingsError, match=r"no C compiler.*optional"):
        cpu_native.build(tmp_path)


@needs_gcc
def test_a_library_that_lacks_a_function_counts_as_missing(tmp_path):
    source = tmp_path / "old.c"
    source.write_text("int something(void) { return 1; }\n")
    library = native.build_library("old", [source], tmp_path, flags=["-fvisibility=default"])
    assert native.open_function(library, "something")() == 1
    assert native.open_function(library, "megabatch_norm_forward") is None


@pytest.mark.slow
@needs_gcc
def test_kernels_stay_within_their_buffers_and_write_every_value(tmp_path):
    """Random shapes, spans, strides and threads under the address and undefined-behaviour sanitizers."""
    sources = [*cpu_native.SOURCES.glob("*.c"), Path(__file__).with_name("fuzz_cpu_kernels.c")]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DNO_CLONES", "-O1", "-fopenmp", "-w"]
    program = tmp_path / "fuzz"
    command = ["gcc", *checks, *map(str, sources), "-o", str(program), "-lm"]
    if subprocess.run(command, capture_output=True, check=False, timeout=HANG_S).returncode != 0:
        pytest.skip("the compiler has no sanitizers or no OpenMP")
    done = subprocess.run([str(program), "300"], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) in {0, 100, 200, 300}  # of three kinds of convolutions, those that run here
