"""Goyal et al. 2017, arXiv:1706.02677: linear scaling and gradual warm-up."""

from megabatch.recipe import Recipe


def goyal2017_8k() -> Recipe:
    """ResNet-50 in one hour at batch 8,192 with SGD (Goyal et al. 2017, arXiv:1706.02677).

    Command: megabatch train goyal2017_8k --data PATH
    Published: top-1 0.7626 (error 23.74 % +- 0.09), 90 epochs, one hour on 256 P100
    Measured: not measured

    Sources:
        read: 0.1 per 256 images scaled linearly, gradual warm-up over 5 epochs from 0.1, factors of ten at epochs 30,
            60 and 80, Nesterov momentum 0.9, weight decay 1e-4, batch norm over one GPU's 32 images, zero-gamma in
            each block's last batch norm, area and aspect augmentation, the error above.
        recalled, with confidence: no weight decay on batch norm.
        derived: peak rate 3.2 at batch 8,192.
        departs: weight decay excludes biases as well as batch norm; momentum keeps the rate outside the buffer, the
            form that needs no correction when the rate changes (section 3).
    """
    return Recipe(
        name="goyal2017_8k",
        model="resnet50",
        dataset="imagenet",
        num_train_images=1_281_167,
        num_classes=1000,
        global_batch_size=8192,
        total_epochs=90,
        bn_span=32,
        optimizer="sgd",
        peak_lr=0.1,
        lr_scaling="linear",
        nesterov=True,
        weight_decay=1e-4,
        warmup_epochs=5,
        warmup_start_lr=0.1,
        decay="step",
        lr_factors=((0.0, 1.0), (30.0, 0.1), (60.0, 0.01), (80.0, 0.001)),
        published_top1=0.7626,
    )
