"""Common settings of the rows of MLPerf Training's reference-convergence table for ResNet-50 with LARS.

The table (mlcommons/logging, training_4.0.0, rcps_resnet.json) gives for each batch size the rate, warm-up, momentum,
weight decay, decay steps and batch-norm span, and the epochs at which each of 10 to 28 runs first reached top-1 0.759.
All rows share the rest: trust coefficient 0.001, eps 0, quadratic decay to 1e-4, label smoothing 0.1, no LARS scaling
of batch norm and biases, evaluation every 4 epochs. Here no row decays batch norm or biases; NVIDIA's kernel does decay
the bias of the fully connected layer. Every row from batch 1,632 to 67,840 is a recipe, in one module per submitter.

The table's decay steps count from the end of warm-up in some rows and from the first step in others. Each recipe states
its interpretation. In every row the chosen one puts the end of the decay at or after the slowest listed run, with the
mean at 94 to 97 % of it; the other would end the decay before any run reached the target, or leave the rate far too
high at that point.
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
    """Returns the recipe of one row; its evaluation epochs include `mean_epochs`, rounded."""
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
