"""Mikami et al. 2018, arXiv:1811.05233: batch-size control and the 2-D torus all-reduce."""

from megabatch.recipe import ByEpoch, Recipe

EPOCHS = 90


def mikami2018_34k_68k() -> Recipe:
    """ResNet-50 in 224 seconds with the batch growing from 34,816 to 69,632 (Mikami et al. 2018, arXiv:1811.05233v1).

    Command: megabatch train mikami2018_34k_68k --data PATH
    Published: top-1 0.7503, 90 epochs, 224 s on 2,176 V100
    Measured: not measured

    Sources:
        read: batch from 34K to 68K, growing by a schedule fixed beforehand; five epochs of warm-up; LARS; time and
            accuracy (abstract and public tables).
        read in the authors' framework: momentum with the rate inside the buffer; trust ratio 1 for zero weights.
        recalled: trust coefficient 0.01 and eps 1e-6 (the framework's defaults, read in its code, are 0.001 and 1e-6).
        recalled, weakly: the switch at epoch 30; the rate c (1 - epoch / 90)^2 with c = 29 before epoch 30 and 50
            after it. Treat these as a hint.
        derived: 34,816 = 2,176 x 16 and 69,632 = 2,176 x 32.
        chosen, because the paper's value is absent or unconfirmed: weight decay 5e-5, momentum 0.9 throughout,
            initialisation, augmentation.
        departs: batch norm covers 32 images throughout; on the paper's 2,176 GPUs it covered 16 before epoch 30. The
            momentum buffer is corrected when the rate changes (`inside_corrected`).
    """
    return Recipe(
        name="mikami2018_34k_68k",
        model="resnet50",
        dataset="imagenet",
        num_train_images=1_281_167,
        num_classes=1000,
        global_batch_size=34_816,
        batch_sizes=((0.0, 34_816.0), (30.0, 69_632.0)),
        batch_size_rule="fixed",
        total_epochs=EPOCHS,
        bn_span=32,
        optimizer="lars",
        peak_lr=29.0,
        momentum_form="inside_corrected",
        weight_decay=5e-5,
        trust_coefficient=0.01,
        trust_eps=1e-6,
        warmup_epochs=5,
        decay="piecewise",
        lr_factors=_quadratic_then_higher(switch_epoch=30, raised=50 / 29),
        published_top1=0.7503,
    )


def mikami2018_54k() -> Recipe:
    """ResNet-50 in 122 seconds at batch 55,296 (Mikami et al. 2018, arXiv:1811.05233v2).

    Command: megabatch train mikami2018_54k --data PATH
    Published: top-1 0.7529, 90 epochs, 122 s on 3,456 V100
    Measured: not measured

    Sources:
        read: batch, 16 images per GPU, label smoothing, time and accuracy (abstract and public tables).
        recalled: trust coefficient 0.01, eps 1e-6, label smoothing 0.1.
        recalled, weakly: five epochs of warm-up, then a quadratic fall over 90 epochs, as in the first version.
        derived from weakly recalled rates: peak rate 41.4, on the line through 29 at 34,816 and 50 at 69,632.
        chosen, because the paper's value is absent or unconfirmed: weight decay 5e-5, momentum 0.9, initialisation,
            augmentation.
    """
    return Recipe(
        name="mikami2018_54k",
        model="resnet50",
        dataset="imagenet",
        num_train_images=1_281_167,
        num_classes=1000,
        global_batch_size=55_296,
        total_epochs=EPOCHS,
        bn_span=16,
        label_smoothing=0.1,
        optimizer="lars",
        peak_lr=41.4,
        momentum_form="inside_corrected",
        weight_decay=5e-5,
        trust_coefficient=0.01,
        trust_eps=1e-6,
        warmup_epochs=5,
        decay="poly",
        poly_power=2,
        decay_counts_warmup=True,
        published_top1=0.7529,
    )


def _quadratic_then_higher(*, switch_epoch: int, raised: float) -> ByEpoch:
    """Returns (1 - epoch / 90)^2, times `raised` from `switch_epoch` on, as pairs to interpolate linearly."""
    quadratic = [(float(epoch), (1 - epoch / EPOCHS) ** 2) for epoch in range(EPOCHS + 1)]
    before = [point for point in quadratic if point[0] < switch_epoch]
    last_moment = (switch_epoch - 1e-6, (1 - switch_epoch / EPOCHS) ** 2)
    after = [(epoch, raised * factor) for epoch, factor in quadratic if epoch >= switch_epoch]
    return (*before, last_moment, *after)
