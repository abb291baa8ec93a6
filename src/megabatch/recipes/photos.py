"""ResNet-50 for a folder of photographs, one subfolder per class."""

from megabatch.recipe import Recipe


def photos() -> Recipe:
    """ResNet-50 on your own photographs at batch 64 (this project).

    Command: megabatch train photos --data PATH
    Published: nothing; the accuracy depends on your images
    Measured: not measured

    PATH holds `train/CLASS/*.jpg` and `val/CLASS/*.jpg`. The weights are initialised at random, so plan for thousands
    of images per class; the batch is small because training on a small data set needs many updates. For a hundred
    thousand images or more, use `mlperf_4096` or `fast_32`.

    Sources:
        read: rate 0.1 per 256 images, Nesterov momentum 0.9, weight decay 1e-4, five epochs of warm-up, zero-gamma
            (Goyal et al. 2017, arXiv:1706.02677).
        derived: peak rate 0.025 at batch 64.
        chosen: batch, spans of 32, cosine decay, label smoothing 0.1, training at 128 pixels and then, for the last
            fifth, at 160; evaluation at 160. These resolutions suit the speed of a CPU; on a GPU, prefer
            `--set resolution=224` and `--set eval_resolution=224`.
    """
    return Recipe(
        name="photos",
        model="resnet50",
        dataset="folder",
        num_train_images=5_000,
        num_classes=10,
        resolution=((0.0, 128.0), (32.0, 160.0)),
        eval_resolution=160,
        min_crop_area=0.25,
        global_batch_size=64,
        total_epochs=40,
        bn_span=32,
        label_smoothing=0.1,
        optimizer="sgd",
        peak_lr=0.1,
        lr_scaling="linear",
        nesterov=True,
        weight_decay=1e-4,
        warmup_epochs=5,
        decay="cosine",
    )
