"""NVIDIA's rows of MLPerf's table (see `row.py`), with the common settings of its MXNet code and launch script.

Momentum has the rate inside the buffer and is corrected when the rate changes; weights are initialised by fan-in; gamma
of the last batch norm of a block starts at 1; crops cover 5 to 100 % of the area. NVIDIA's kernel decays the bias of
the fully connected layer; these recipes decay no bias.
"""

import functools

from megabatch.recipe import Recipe
from megabatch.recipes.mlperf.row import row

_row = functools.partial(
    row,
    initialization="he_fan_in",
    zero_gamma=False,
    min_crop_area=0.05,
    momentum_form="inside_corrected",
)


def mlperf_1632() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 1,632 (MLPerf Training v1.0, NVIDIA).

    Command: megabatch train mlperf_1632 --data PATH
    Published: top-1 0.759 after 35 epochs on average (33 to 37 in 17 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation, zero-gamma and crops in NVIDIA's public MXNet code.
        derived: 27,476 decay steps, counted after warm-up, are 35 epochs, so that the run ends at 37. Counted from
            the first step, the decay would end at 35, before the slowest listed run.
        departs: the bias of the fully connected layer, which NVIDIA's kernel decays, is not decayed.
    """
    return _row(
        batch=1_632,
        peak_lr=7.4,
        warmup_epochs=2,
        momentum=0.9,
        weight_decay=5e-5,
        decay_epochs=35,
        bn_span=204,
        mean_epochs=35.0,
    )


def mlperf_3264() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 3,264 (MLPerf Training v1.0, NVIDIA).

    Command: megabatch train mlperf_3264 --data PATH
    Published: top-1 0.759 after 35.2 epochs on average (34 to 37 in 15 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation, zero-gamma and crops in NVIDIA's public MXNet code.
        derived: 14,523 decay steps, counted from the first step, are 37 epochs, warm-up included. The submitter's
            published settings say 37 epochs too.
        departs: the bias of the fully connected layer, which NVIDIA's kernel decays, is not decayed.
    """
    return _row(
        batch=3_264,
        peak_lr=10.5,
        warmup_epochs=2,
        momentum=0.9,
        weight_decay=5e-5,
        decay_epochs=35,
        bn_span=204,
        mean_epochs=35.2,
    )


def mlperf_13056() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 13,056 (MLPerf Training v1.0, NVIDIA).

    Command: megabatch train mlperf_13056 --data PATH
    Published: top-1 0.759 after 45.4 epochs on average (44 to 46 in 10 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation, zero-gamma and crops in NVIDIA's public MXNet code.
        derived: 4,710 decay steps, counted from the first step, are 48 epochs, warm-up included.
        departs: the bias of the fully connected layer, which NVIDIA's kernel decays, is not decayed.
    """
    return _row(
        batch=13_056,
        peak_lr=12.8,
        warmup_epochs=9,
        momentum=0.9,
        weight_decay=2.5e-5,
        decay_epochs=39,
        bn_span=204,
        mean_epochs=45.4,
    )


def mlperf_49152() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 49,152 (MLPerf Training v1.1, NVIDIA).

    Command: megabatch train mlperf_49152 --data PATH
    Published: top-1 0.759 after 68 epochs on average (67 to 69 in 10 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation, zero-gamma and crops in NVIDIA's public MXNet code.
        derived: 1,846 decay steps, counted from the first step at 26 steps per epoch, are 71 epochs, warm-up
            included.
        departs: the bias of the fully connected layer, which NVIDIA's kernel decays, is not decayed.
    """
    return _row(
        batch=49_152,
        peak_lr=19.405,
        warmup_epochs=24,
        momentum=0.951807,
        weight_decay=1e-4,
        decay_epochs=47,
        bn_span=256,
        mean_epochs=68.0,
    )


def mlperf_58880() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 58,880 (MLPerf Training v1.1, NVIDIA).

    Command: megabatch train mlperf_58880 --data PATH
    Published: top-1 0.759 after 79.9 epochs on average (78 to 81 in 10 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation, zero-gamma and crops in NVIDIA's public MXNet code.
        derived: 1,785 decay steps, counted from the first step at 21 steps per epoch, are 85 epochs, warm-up
            included.
        departs: the bias of the fully connected layer, which NVIDIA's kernel decays, is not decayed.
    """
    return _row(
        batch=58_880,
        peak_lr=23.246,
        warmup_epochs=29,
        momentum=0.951807,
        weight_decay=1e-4,
        decay_epochs=56,
        bn_span=230,
        mean_epochs=79.9,
    )


def mlperf_67840() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 67,840 (MLPerf Training v2.0, NVIDIA).

    Command: megabatch train mlperf_67840 --data PATH
    Published: top-1 0.759 after 85.9 epochs on average (85 to 87 in 28 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation, zero-gamma and crops in NVIDIA's public MXNet code.
        derived: 1,133 decay steps, counted after warm-up, are 60 epochs, so that the run ends at 91.
        departs: the bias of the fully connected layer, which NVIDIA's kernel decays, is not decayed.
    """
    return _row(
        batch=67_840,
        peak_lr=24.699,
        warmup_epochs=31,
        momentum=0.951807,
        weight_decay=1e-4,
        decay_epochs=60,
        bn_span=424,
        mean_epochs=85.9,
    )
