"""Fine-tuning of given weights on a folder of photographs."""

from megabatch.recipe import Recipe


def finetune() -> Recipe:
    """ResNet-50 from weights that you give, on your own photographs at batch 64 (this project).

    Command: megabatch train finetune --init-from WEIGHTS --data PATH
    Published: nothing; the accuracy depends on your images
    Measured: not measured

    WEIGHTS is a run folder, a checkpoint, or a .safetensors or .pth file of timm or torchvision; `--model timm:NAME`
    trains another model. The last layer is new where the classes differ. Lower layers move slower, by `layer_decay`;
    `--set freeze=backbone` trains only the last layer, which suits some tens of images per class. docs/models.md
    has results of a small net.

    Sources:
        read: layer-wise decay of the rate (Clark et al. 2020, arXiv:2003.10555).
        chosen: batch, spans of 32, rate 0.02 with Nesterov momentum, 20 epochs with 1 of warm-up, cosine decay, label
            smoothing 0.1, crops of at least a quarter of the image, averages of batch norm over 50 updates
            (`stats_momentum` 0.02), which start from those of the given weights.
    """
    return Recipe(
        name="finetune",
        model="resnet50",
        zero_gamma=False,
        dataset="folder",
        num_train_images=5_000,
        num_classes=10,
        min_crop_area=0.25,
        global_batch_size=64,
        total_epochs=20,
        bn_span=32,
        stats_momentum=0.02,
        layer_decay=0.8,
        label_smoothing=0.1,
        optimizer="sgd",
        peak_lr=0.02,
        nesterov=True,
        weight_decay=1e-4,
        warmup_epochs=1,
        decay="cosine",
    )
