"""How much memory there is, under whichever limit, and that freed memory stays where it is."""

import subprocess
import sys

import pytest

from megabatch import host_memory
from megabatch.host_memory import available_bytes

GIB = 2**30

FAULTS = """
import resource, sys, torch
from megabatch.host_memory import keep_freed_memory
said = keep_freed_memory() if sys.argv[1] == "keep" else None
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.zeros(2**24)
before = faults()
for _ in range(10):
    torch.zeros(2**24)  # 64 MiB: beyond every threshold of glibc's
print(faults() - before)
"""


def fake_system(folder, monkeypatch, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(host_memory, "_PROC", folder / "proc")
    monkeypatch.setattr(host_memory, "_CGROUPS", folder / "cgroup")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:    2048 kB\n"}, 2048 * 1024),
        ({"proc/meminfo": "MemTotal: 99 kB\n"}, None),
        ({}, None),
        (  # version 2: the tighter of the group and its parent
            {
                "proc/meminfo": f"MemAvailable: {64 * 2**20} kB\n",
                "proc/self/cgroup": "0::/job/step\n",
                "cgroup/job/step/memory.max": "max\n",
                "cgroup/job/step/memory.current": f"{GIB}\n",
                "cgroup/job/memory.max": f"{4 * GIB}\n",
                "cgroup/job/memory.current": f"{GIB}\n",
            },
            3 * GIB,
        ),
        (  # version 1
            {
                "proc/meminfo": f"MemAvailable: {64 * 2**20} kB\n",
                "proc/self/cgroup": "5:cpu:/x\n4:hugetlb,memory:/box\n",
                "cgroup/memory/box/memory.limit_in_bytes": f"{2 * GIB}\n",
                "cgroup/memory/box/memory.usage_in_bytes": f"{3 * GIB}\n",
            },
            0,
        ),
    ],
    ids=["machine", "old kernel", "no proc", "cgroup 2", "cgroup 1, beyond its limit"],
)
def test_the_tightest_limit_counts(tmp_path, monkeypatch, files, expected):
    fake_system(tmp_path, monkeypatch, files)
    assert available_bytes() == expected


@pytest.mark.slow
@pytest.mark.skipif(host_memory._glibc() is None, reason="not glibc")
def test_memory_that_is_kept_is_not_faulted_in_again():
    counts = {}
    for mode in ("return", "keep"):
        done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
        counts[mode] = int(done.stdout)
    assert counts["keep"] * 10 < counts["return"]
