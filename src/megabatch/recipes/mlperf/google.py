"""Google's rows of MLPerf's table (see `row.py`), with the common settings of its public code.

Momentum has the rate inside the buffer; weights come from a truncated normal distribution; gamma of the last batch norm
of a block starts at 0.
"""

import functools

from megabatch.recipe import Recipe
from megabatch.recipes.mlperf.row import row

_row = functools.partial(row, initialization="lecun_truncated", zero_gamma=True, momentum_form="inside")


def mlperf_4096() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 4,096 (MLPerf Training v1.0, Google).

    Command: megabatch train mlperf_4096 --data PATH
    Published: top-1 0.759 after 40 epochs on average (39 to 42 in 10 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation and zero-gamma in Google's public code.
        derived: 13,137 decay steps, counted from the first step, are 42 epochs, warm-up included. This is the least
            certain row: counted after warm-up, the decay would end at epoch 47, with 3 % of the peak rate at epoch 40.
    """
    return _row(
        batch=4_096,
        peak_lr=10.0,
        warmup_epochs=5,
        momentum=0.9,
        weight_decay=2e-4,
        decay_epochs=37,
        bn_span=64,
        mean_epochs=40.0,
    )


def mlperf_8192() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 8,192 (MLPerf Training v1.0, Google).

    Command: megabatch train mlperf_8192 --data PATH
    Published: top-1 0.759 after 42 epochs on average (41 to 44 in 10 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation and zero-gamma in Google's public code.
        derived: 6,095 decay steps, counted after warm-up, are 39 epochs, so that the run ends at 44.
    """
    return _row(
        batch=8_192,
        peak_lr=17.0,
        warmup_epochs=5,
        momentum=0.9,
        weight_decay=2e-4,
        decay_epochs=39,
        bn_span=64,
        mean_epochs=42.0,
    )


def mlperf_32768() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 32,768 (MLPerf Training v1.0, Google).

    Command: megabatch train mlperf_32768 --data PATH
    Published: top-1 0.759 after 56 epochs on average (55 to 57 in 10 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation and zero-gamma in Google's public code.
        derived: 2,267 decay steps, counted from the first step, are 58 epochs, warm-up included. The same rate and
            warm-up are published elsewhere with 58 epochs and convergence in 56.
    """
    return _row(
        batch=32_768,
        peak_lr=21.2,
        warmup_epochs=16,
        momentum=0.94,
        weight_decay=2.5e-5,
        decay_epochs=42,
        bn_span=128,
        mean_epochs=56.0,
    )


def mlperf_65536() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 65,536 (MLPerf Training v1.0, Google).

    Command: megabatch train mlperf_65536 --data PATH
    Published: top-1 0.759 after 84.5 epochs on average (83 to 86 in 10 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation and zero-gamma in Google's public code.
        derived: 1,133 decay steps, counted after warm-up, are 58 epochs, so that the run ends at 89.
    """
    return _row(
        batch=65_536,
        peak_lr=24.699,
        warmup_epochs=31,
        momentum=0.951807,
        weight_decay=1e-4,
        decay_epochs=58,
        bn_span=128,
        mean_epochs=84.5,
    )
