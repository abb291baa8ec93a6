"""Akiba, Suzuki, Fukuda 2017, arXiv:1711.04325: RMSprop warm-up, slow start, batch norm without moving averages."""

from megabatch.recipe import Recipe


def akiba2017_32k() -> Recipe:
    """ResNet-50 in 15 minutes at batch 32,768 (Akiba, Suzuki, Fukuda 2017, arXiv:1711.04325).

    Command: megabatch train akiba2017_32k --data PATH
    Published: top-1 0.749, 90 epochs, 15 minutes on 1,024 P100
    Measured: not measured

    Sources:
        read: batch, epochs, time and accuracy (abstract and later tables); the blended update, the transition around
            epoch 10 over a period of 5 epochs, the slow-start table 0.5 / 0.075 / 0.01 / 0.001 from epochs 0 / 40 /
            70 / 85, 0.1 per 256 images, evaluation with the last batch's statistics averaged over the workers (notes
            on the paper and public re-implementations).
        read in three re-implementations, which may be copies of one another: momentum 0.9, decay of squares 0.99,
            eps 1e-8, RMSprop rate 3e-4.
        recalled, with confidence: 32 images per batch-norm statistic; weight decay 1e-4, zero-gamma and augmentation
            as Goyal et al. 2017.
        derived: rate 12.8 at this batch, which the slow start halves; the transition ends at epoch 12.5.
        departs: the middle branch of the transition, as public notes quote it, overshoots to 1.5; here it is the
            continuous 1/2 + (epoch - 10) / 5. Evaluation runs every epoch, as in the paper, whose time includes it.
    """
    return Recipe(
        name="akiba2017_32k",
        model="resnet50",
        dataset="imagenet",
        num_train_images=1_281_167,
        num_classes=1000,
        global_batch_size=32_768,
        total_epochs=90,
        bn_span=32,
        eval_stats="last_batch",
        optimizer="rmsprop_warmup",
        peak_lr=0.1,
        lr_scaling="linear",
        weight_decay=1e-4,
        rmsprop_lr=3e-4,
        rmsprop_center_epoch=10.0,
        rmsprop_period_epochs=5.0,
        warmup="none",
        decay="slow_start",
        published_top1=0.749,
    )
