"""High accuracy per hour: few epochs, small images first, antialiased downsampling (after FFCV's recipes)."""

from megabatch.recipe import Recipe


def fast_16() -> Recipe:
    """ResNet-50 in 16 epochs with progressive resizing (after FFCV, 2022).

    Command: megabatch train fast_16 --data PATH
    Published: top-1 0.738 with a flipped second view at evaluation, 14.9 minutes on 8 A100
    Measured: not measured

    Sources:
        read (libffcv/ffcv-imagenet, its ResNet-50 configurations and training script): batch 8 x 512, rate rising
            linearly from 0.00017 to 1.7 at epoch 2 and falling linearly to 0, momentum 0.9, weight decay 1e-4
            but not on batch norm, label smoothing 0.1, 160 pixels until epoch 11, a ramp to 192 at epoch 13,
            evaluation at 256, blur-pool, batch norm over one GPU's 512 images, accuracy and time.
        departs: biases are not decayed either; resolution changes within an epoch, not only at its start.
    """
    return _fast("fast_16", epochs=16, ramp=(11.0, 13.0), published_top1=0.738)


def fast_32() -> Recipe:
    """ResNet-50 in 32 epochs with progressive resizing (after FFCV, 2022).

    Command: megabatch train fast_32 --data PATH
    Published: top-1 0.766 with a flipped second view at evaluation, 28.7 minutes on 8 A100
    Measured: not measured

    Sources:
        read (libffcv/ffcv-imagenet, its ResNet-50 configurations): as `fast_16`, with the ramp from epoch 23 to 27.
        departs: as `fast_16`.
    """
    return _fast("fast_32", epochs=32, ramp=(23.0, 27.0), published_top1=0.766)


def fast_88() -> Recipe:
    """ResNet-50 in 88 epochs with progressive resizing (after FFCV, 2022).

    Command: megabatch train fast_88 --data PATH
    Published: top-1 0.784 with a flipped second view at evaluation, 77.2 minutes on 8 A100
    Measured: not measured

    Sources:
        read (libffcv/ffcv-imagenet, its ResNet-50 configurations): as `fast_16`, with the ramp from epoch 65 to 76.
        departs: as `fast_16`.
    """
    return _fast("fast_88", epochs=88, ramp=(65.0, 76.0), published_top1=0.784)


def _fast(name: str, *, epochs: int, ramp: tuple[float, float], published_top1: float) -> Recipe:
    ramp_start, ramp_end = ramp
    return Recipe(
        name=name,
        model="resnet50",
        zero_gamma=False,
        blur_pool=True,
        dataset="imagenet",
        num_train_images=1_281_167,
        num_classes=1000,
        resolution=((0.0, 160.0), (ramp_start, 160.0), (ramp_end, 192.0)),
        resolution_ramp=True,
        eval_resolution=256,
        eval_flip=True,
        global_batch_size=4096,
        total_epochs=epochs,
        bn_span=512,
        label_smoothing=0.1,
        optimizer="sgd",
        peak_lr=1.7,
        weight_decay=1e-4,
        warmup_epochs=2,
        warmup_start_lr=1.7e-4,
        poly_power=1,
        published_top1=published_top1,
    )
