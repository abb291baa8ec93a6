"""A real accuracy in minutes on two CPU cores: what `make demo` trains."""

from megabatch.recipe import Recipe


def fashion_mnist() -> Recipe:
    """Eight-layer residual net on Fashion-MNIST at batch 1,024 with LARS (this project).

    Command: megabatch train fashion_mnist
    Published: nothing
    Measured: not measured

    Sources:
        read: 60,000 training and 10,000 test images of 28 x 28 grey pixels in 10 classes; mean and deviation are
            those of the training pixels.
        derived: peak rate 5.66 = 4 sqrt(1024 / 512), the square-root rule of the LARS authors' group.
        chosen: batch, spans of 128 (eight per batch), warm-up, epochs, label smoothing, decay and augmentation.
    """
    return Recipe(
        name="fashion_mnist",
        model="resnet8",
        dataset="fashion_mnist",
        num_train_images=60_000,
        num_classes=10,
        image_channels=1,
        pixel_mean=(0.2860,),
        pixel_std=(0.3530,),
        resolution=((0.0, 28.0),),
        eval_resolution=28,
        eval_crop_ratio=1.0,
        augmentation="pad_crop",
        crop_padding=2,
        global_batch_size=1024,
        total_epochs=12,
        bn_span=128,
        label_smoothing=0.1,
        optimizer="lars",
        peak_lr=5.66,
        weight_decay=1e-4,
        warmup_epochs=1,
    )
