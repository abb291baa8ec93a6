"""Settings for every test, made before torch is imported."""

import os
import signal

from hypothesis import HealthCheck, settings

# Threads that wait for one another spin for milliseconds otherwise, and keep an awaited one off a busy core: a test of
# one second took a hundred on a machine that others used. The command line sets the same.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# `pytest -n auto` starts a process for each core, which then has no core for a second thread.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A suite in the background, or under nohup, ignores these, and so would the processes that it starts.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# What is fastest here decides how sums are rounded; tests that measure say so.
os.environ.setdefault("MEGABATCH_MEASURE", "0")

# No limit on time, since shared machines pause. In CI examples are the same each time; elsewhere each run draws others.
settings.register_profile(
    "megabatch", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("megabatch")

if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":  # torch.compile writes wrong code if it finds more (torch 2.13)
    import torch._inductor.config

    torch._inductor.config.cpp.simdlen = 256

pytest_plugins = ["interpreted"]
