"""Every row of MLPerf Training's reference-convergence table for ResNet-50 with LARS, from 1,632 to 67,840.

The table (mlcommons/logging, training_4.0.0, rcps_resnet.json) gives for each batch the rate, warm-up, momentum, weight
decay, decay steps and batch-norm span, and the epochs at which each of 10 to 28 runs first reached top-1 0.759. All
rows share the rest: trust coefficient 0.001, eps 0, quadratic decay to 1e-4, label smoothing 0.1, neither LARS nor
weight decay on batch norm and biases, evaluation every 4 epochs.

The table's decay steps mean different things in different rows: some count from the end of warm-up, some from the
first step. Each recipe says which reading it takes. In every case that reading puts the end of the decay at or after
the slowest listed run and the mean at 94 to 97 % of it; the other would end it before the target was ever reached, or
leave the rate far too high there.
"""

from typing import Literal

from megabatch.recipe import Recipe


def mlperf_1632() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 1,632 (MLPerf Training v1.0, NVIDIA).

    Command: megabatch train mlperf_1632 --data PATH
    Published: top-1 0.759 after 35 epochs on average (33 to 37 in 17 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation, no zero-gamma and crops of 5 to 100 % of the
            area (the submitter's public MXNet code and launch script).
        derived: 27,476 decay steps, counted after warm-up, are 35 epochs, so that the run ends at 37. Counted from
            the first step they would end at 35, before the slowest listed run.
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
        submitter="nvidia",
    )


def mlperf_3264() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 3,264 (MLPerf Training v1.0, NVIDIA).

    Command: megabatch train mlperf_3264 --data PATH
    Published: top-1 0.759 after 35.2 epochs on average (34 to 37 in 15 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation, no zero-gamma and crops of 5 to 100 % of the
            area (the submitter's public MXNet code and launch script).
        derived: 14,523 decay steps, counted from the first step, are 37 epochs, warm-up included. The submitter's
            published settings say 37 epochs too.
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
        submitter="nvidia",
    )


def mlperf_4096() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 4,096 (MLPerf Training v1.0, Google).

    Command: megabatch train mlperf_4096 --data PATH
    Published: top-1 0.759 after 40 epochs on average (39 to 42 in 10 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation and zero-gamma (the submitter's public code).
        derived: 13,137 decay steps, counted from the first step, are 42 epochs, warm-up included. The least certain
            row: counted after warm-up it would end at 47, with 3 % of the peak rate left at epoch 40.
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
        submitter="google",
    )


def mlperf_8192() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 8,192 (MLPerf Training v1.0, Google).

    Command: megabatch train mlperf_8192 --data PATH
    Published: top-1 0.759 after 42 epochs on average (41 to 44 in 10 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation and zero-gamma (the submitter's public code).
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
        submitter="google",
    )


def mlperf_13056() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 13,056 (MLPerf Training v1.0, NVIDIA).

    Command: megabatch train mlperf_13056 --data PATH
    Published: top-1 0.759 after 45.4 epochs on average (44 to 46 in 10 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation, no zero-gamma and crops of 5 to 100 % of the
            area (the submitter's public MXNet code and launch script).
        derived: 4,710 decay steps, counted from the first step, are 48 epochs, warm-up included.
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
        submitter="nvidia",
    )


def mlperf_32768() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 32,768 (MLPerf Training v1.0, Google).

    Command: megabatch train mlperf_32768 --data PATH
    Published: top-1 0.759 after 56 epochs on average (55 to 57 in 10 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation and zero-gamma (the submitter's public code).
        derived: 2,267 decay steps, counted from the first step, are 58 epochs, warm-up included. The same rate and
            warm-up are published elsewhere for 58 epochs, converging in 56.
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
        submitter="google",
    )


def mlperf_49152() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 49,152 (MLPerf Training v1.1, NVIDIA).

    Command: megabatch train mlperf_49152 --data PATH
    Published: top-1 0.759 after 68 epochs on average (67 to 69 in 10 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation, no zero-gamma and crops of 5 to 100 % of the
            area (the submitter's public MXNet code and launch script).
        derived: 1,846 decay steps, counted from the first step at 26 steps per epoch, are 71 epochs, warm-up
            included.
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
        submitter="nvidia",
    )


def mlperf_58880() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 58,880 (MLPerf Training v1.1, NVIDIA).

    Command: megabatch train mlperf_58880 --data PATH
    Published: top-1 0.759 after 79.9 epochs on average (78 to 81 in 10 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation, no zero-gamma and crops of 5 to 100 % of the
            area (the submitter's public MXNet code and launch script).
        derived: 1,785 decay steps, counted from the first step at 21 steps per epoch, are 85 epochs, warm-up
            included.
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
        submitter="nvidia",
    )


def mlperf_65536() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 65,536 (MLPerf Training v1.0, Google).

    Command: megabatch train mlperf_65536 --data PATH
    Published: top-1 0.759 after 84.5 epochs on average (83 to 86 in 10 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation and zero-gamma (the submitter's public code).
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
        submitter="google",
    )


def mlperf_67840() -> Recipe:
    """ResNet-50 to 75.9 % with LARS at batch 67,840 (MLPerf Training v2.0, NVIDIA).

    Command: megabatch train mlperf_67840 --data PATH
    Published: top-1 0.759 after 85.9 epochs on average (85 to 87 in 28 runs)
    Measured: not measured

    Sources:
        read: all numbers of the row; momentum form, initialisation, no zero-gamma and crops of 5 to 100 % of the
            area (the submitter's public MXNet code and launch script).
        derived: 1,133 decay steps, counted after warm-up, are 60 epochs, so that the run ends at 91.
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
        submitter="nvidia",
    )


def _row(
    *,
    batch: int,
    peak_lr: float,
    warmup_epochs: float,
    momentum: float,
    weight_decay: float,
    decay_epochs: float,
    bn_span: int,
    mean_epochs: float,
    submitter: Literal["nvidia", "google"],
) -> Recipe:
    """A row of the table with what all rows share; evaluated so that `mean_epochs`, rounded, is among the epochs."""
    return Recipe(
        name=f"mlperf_{batch}",
        model="resnet50",
        initialization="he_fan_in" if submitter == "nvidia" else "lecun_truncated",
        zero_gamma=submitter == "google",
        dataset="imagenet",
        num_train_images=1_281_167,
        num_classes=1000,
        min_crop_area=0.05 if submitter == "nvidia" else 0.08,
        global_batch_size=batch,
        total_epochs=warmup_epochs + decay_epochs,
        bn_span=bn_span,
        label_smoothing=0.1,
        optimizer="lars",
        peak_lr=peak_lr,
        momentum=momentum,
        momentum_form="inside_corrected" if submitter == "nvidia" else "inside",
        weight_decay=weight_decay,
        warmup_epochs=warmup_epochs,
        poly_power=2,
        end_lr=1e-4,
        eval_every_epochs=4,
        eval_offset_epochs=round(mean_epochs) % 4,
        target_top1=0.759,
        published_top1=0.759,
        published_curve=((mean_epochs, 0.759),),
    )
