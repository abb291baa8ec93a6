"""You et al. 2017, arXiv:1709.05011: LARS brings AlexNet and ResNet-50 to batch 32,768."""

from megabatch.recipe import Recipe


def you2017_alexnet_32k() -> Recipe:
    """AlexNet with batch norm in 11 minutes at batch 32,768 (You et al. 2017, arXiv:1709.05011).

    Command: megabatch train you2017_alexnet_32k --data PATH
    Published: top-1 0.586, 100 epochs, 11 minutes on 1,024 CPU nodes
    Measured: not measured

    Sources:
        read: time (abstract); rate 32 rising from 1 over 400 of 4,000 steps, quadratic decay over all 4,000 (warm-up
            not taken off), momentum 0.9, weight decay 5e-4, trust coefficient 0.001, batch norm momentum 0.9 (Caffe's,
            0.1 here) and eps 1e-4 (the partners' public Caffe solvers at this batch).
        recalled, with confidence: the accuracy; weight decay.
        derived: 4,000 steps are 102 epochs of this batch and were called 100; batch norm covered 512 images, one of
            64 nodes' share.
        chosen: crops of 60 to 77 % of the area without change of aspect stand for a random 227 out of 256 pixels;
            weights only are decayed, which later work found better.
    """
    return Recipe(
        name="you2017_alexnet_32k",
        model="alexnet_bn",
        initialization="alexnet",
        dataset="imagenet",
        num_train_images=1_281_167,
        num_classes=1000,
        min_crop_area=0.6,
        max_crop_area=0.77,
        min_crop_aspect=1.0,
        max_crop_aspect=1.0,
        global_batch_size=32_768,
        total_epochs=100,
        bn_span=512,
        bn_eps=1e-4,
        optimizer="lars",
        peak_lr=32.0,
        momentum_form="inside",
        weight_decay=5e-4,
        warmup_epochs=10,
        warmup_start_lr=1.0,
        poly_power=2,
        decay_counts_warmup=True,
        published_top1=0.586,
    )


def you2017_resnet50_32k() -> Recipe:
    """ResNet-50 in 20 minutes at batch 32,768 (You et al. 2017, arXiv:1709.05011).

    Command: megabatch train you2017_resnet50_32k --data PATH
    Published: top-1 0.754, 90 epochs, 20 minutes on 2,048 KNL; 0.749 after 64 epochs in 14 minutes
    Measured: not measured

    `--set total_epochs=64` is the second published run.

    Sources:
        read: times and accuracies (abstracts), LARS with linear scaling, warm-up and quadratic decay, momentum 0.9,
            trust coefficient 0.001, momentum with the rate inside the buffer (the LARS paper's algorithm).
        recalled, with confidence: weight decay 1e-4.
        read elsewhere: the paper's rate and warm-up at this batch were not found. 32 and 14 epochs are those with
            which the same group's PyTorch code reaches 0.7675 in 90 epochs.
        derived: 16 images per batch-norm statistic, one of 2,048 workers' share.
        chosen: zero-gamma off, as in the Caffe nets of that time; decay measured from the first step, as Caffe does.
    """
    return Recipe(
        name="you2017_resnet50_32k",
        model="resnet50",
        zero_gamma=False,
        dataset="imagenet",
        num_train_images=1_281_167,
        num_classes=1000,
        global_batch_size=32_768,
        total_epochs=90,
        bn_span=16,
        optimizer="lars",
        peak_lr=32.0,
        momentum_form="inside",
        weight_decay=1e-4,
        warmup_epochs=14,
        poly_power=2,
        decay_counts_warmup=True,
        published_top1=0.754,
    )
