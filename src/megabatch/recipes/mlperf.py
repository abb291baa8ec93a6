"""What is common to the rows of MLPerf Training's reference-convergence table for ResNet-50 with LARS.

The table (mlcommons/logging, training_4.0.0, rcps_resnet.json) gives for each batch the rate, warm-up, momentum, weight
decay, decay steps and batch-norm span, and the epochs at which each of 10 to 28 runs first reached top-1 0.759. All
rows share the rest: trust coefficient 0.001, eps 0, quadratic decay to 1e-4, label smoothing 0.1, neither LARS nor
weight decay on batch norm and biases, evaluation every 4 epochs. Every row is here, from batch 1,632 to 67,840: those
of each submitter in a file of their own.

The table's decay steps mean different things in different rows: some count from the end of warm-up, some from the
first step. Each recipe says which reading it takes. In every case that reading puts the end of the decay at or after
the slowest listed run and the mean at 94 to 97 % of it; the other would end it before the target was ever reached, or
leave the rate far too high there.
"""

from megabatch.recipe import Initialization, MomentumForm, Recipe


def row(
    *,
    batch: int,
    peak_lr: float,
    warmup_epochs: float,
    momentum: float,
    weight_decay: float,
    decay_epochs: float,
    bn_span: int,
    mean_epochs: float,
    initialization: Initialization,
    zero_gamma: bool,
    momentum_form: MomentumForm,
    min_crop_area: float = 0.08,
) -> Recipe:
    """A row of the table with what all rows share; evaluated so that `mean_epochs`, rounded, is among the epochs."""
    return Recipe(
        name=f"mlperf_{batch}",
        model="resnet50",
        initialization=initialization,
        zero_gamma=zero_gamma,
        dataset="imagenet",
        num_train_images=1_281_167,
        num_classes=1000,
        min_crop_area=min_crop_area,
        global_batch_size=batch,
        total_epochs=warmup_epochs + decay_epochs,
        bn_span=bn_span,
        label_smoothing=0.1,
        optimizer="lars",
        peak_lr=peak_lr,
        momentum=momentum,
        momentum_form=momentum_form,
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
