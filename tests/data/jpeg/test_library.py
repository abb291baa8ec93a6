"""The compiled JPEG decoder on damaged files, under sanitizers, and when it cannot be built or loaded."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from limits import HANG_S
from mutations import record
from photographs import JPEG_LAYOUTS, encode, photograph

from megabatch import native
from megabatch.data.jpeg import library
from megabatch.data.jpeg.decode import decode, decode_crop
from megabatch.errors import SettingsError


def test_damaged_files_either_decode_or_raise_data_error(library_folder):
    """1,500 damaged files, in a subprocess so that a crash fails this test only."""
    script = """
import random, sys
from pathlib import Path
import numpy as np
from megabatch.data.jpeg import library
from megabatch.data.jpeg.decode import decode_crop
from megabatch.errors import DataError
library.library_folder = Path(sys.argv[1])
assert library.is_available()
rng = random.Random(5)
seeds = [path.read_bytes() for path in sorted(Path(sys.argv[2]).iterdir())]
rejected = 0
for _ in range(1500):
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 6)):
        data[rng.randrange(min(len(data), rng.choice([700, 10**6])))] = rng.choice([0, 255, rng.randrange(256)])
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)):]
    box = rng.choice([(0, 0, 96, 80), (0, 0, 8, 8), (40, 33, 24, 15)])
    try:
        pixels = decode_crop(bytes(data), box=box, size=rng.choice([7, 32, 100]), max_pixels=10**6)
        assert pixels.dtype == np.uint8
    except DataError:
        rejected += 1
assert 100 < rejected < 1500, rejected
"""
    folder = library_folder / "seeds"
    folder.mkdir()
    for index, (mode, subsampling) in enumerate(JPEG_LAYOUTS):
        for progressive in (False, True):
            data = encode(photograph(96, 80), mode=mode, subsampling=subsampling, progressive=progressive)
            (folder / f"{index}-{progressive}.jpg").write_bytes(data)
    command = [sys.executable, "-W", "ignore", "-c", script, str(library_folder), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_no_input_makes_the_c_code_access_memory_out_of_bounds(tmp_path):
    """The C sources under two sanitizers, on damaged files: 6,000, or 100,000 in make fuzz."""
    count = os.environ.get("MEGABATCH_FUZZ_JPEGS", "6000")
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    program = tmp_path / "fuzz"
    sources = [str(path) for path in sorted(library.SOURCES.glob("*.c"))]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DJC_NO_CLONES", "-O1", "-w"]
    command = [compiler, *checks, *sources, str(Path(__file__).with_name("fuzz_crop.c")), "-o", str(program), "-lm"]
    if subprocess.run(command, capture_output=True, check=False, timeout=HANG_S).returncode != 0:
        pytest.skip("the compiler has no sanitizers")
    rng = random.Random(3)
    files = []
    for index, (mode, subsampling) in enumerate(JPEG_LAYOUTS):
        options = rng.choice([{}, {"restart_marker_blocks": 2}, {"optimize": True}])
        path = tmp_path / f"{index}.jpg"
        path.write_bytes(encode(photograph(96, 128), mode=mode, subsampling=subsampling, **options))
        files.append(str(path))
    done = subprocess.run([str(program), count, *files], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    decoded, rejected = map(int, done.stdout.split())
    assert decoded > 200
    assert rejected > 200
    record({"name": "JPEGs under sanitizers", "count": int(count), "accepted": decoded, "refused": rejected})


def test_a_sliver_of_a_pixel_at_the_edge_is_a_box_and_one_beyond_it_is_not(compiled):
    data = encode(photograph(16, 16), quality=95)
    out = np.empty((4, 4, 3), dtype=np.uint8)
    assert library.crop(data, (3.0, 15.9, 1e-9, 0.1), channels=3, max_pixels=10**6, out=out)
    assert np.abs(out - decode(data)[3, 15].astype(int)).max() <= 2
    assert not library.crop(data, (16.0, 0.0, 1e-7, 4.0), channels=3, max_pixels=10**6, out=out)


def test_the_error_for_a_missing_compiler_says_that_it_is_optional(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SettingsError, match=r"no C compiler.*optional"):
        library.build(tmp_path)
    with pytest.raises(SystemExit, match=r"^megabatch: no C compiler"):
        native.report_build(library.build)


def test_a_library_that_cannot_be_loaded_counts_as_missing(monkeypatch, tmp_path):
    (tmp_path / native.file_name(library.NAME)).write_bytes(b"not a library")
    monkeypatch.setattr(library, "library_folder", tmp_path)
    library._function.cache_clear()
    assert not library.is_available()
    assert decode_crop(encode(photograph(20, 20)), box=(0, 0, 20, 20), size=10).shape == (10, 10, 3)
    library._function.cache_clear()
