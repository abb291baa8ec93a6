"""You et al. 2017, arXiv:1709.05011: LARS brings AlexNet and ResNet-50 to batch 32,768."""

from megabatch.recipe import Recipe


def you2017_alexnet_32k() -> Recipe:
    """AlexNet with batch norm in 11 minutes at batch 32,768 (You et al. 2017, arXiv:1709.05011).

    Command: megabatch train you2017_alexnet_32k --data PATH
    Published: top-1 0.586, 100 epochs, 11 minutes on 1,024 CPU nodes
    Measured: not measured

    Sources:
        read: time (abstract); rate 32 rising from 1 over 400 of 4,000 steps, quadratic decay over all 4,000 (warm-up
            included), momentum 0.9, weight decay 5e-4, trust coefficient 0.001, batch norm momentum 0.9 (Caffe's
            convention, 0.1 here) and eps 1e-4 (the partners' public Caffe solvers at this batch).
        recalled, with confidence: the accuracy.
        derived: 4,000 steps are 102 epochs of this batch, reported as 100; batch norm covers 512 images, the share of
            one worker in the partners' solver for 64 nodes.
        chosen: crops of 60 to 77 % of the area without change of aspect replace a random crop of 227 out of 256 pixels;
            only weights are decayed, which later work found better.
        departs: batch norm over 512 images, while one of the 1,024 nodes of the published 11 minutes has 32; training
            at 224 pixels, while AlexNet takes 227.
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

    `--set total_epochs=64 --set published_top1=0.749` is the second published run.

    Sources:
        read: times and accuracies (abstracts), LARS with linear scaling, warm-up and quadratic decay, momentum 0.9,
            trust coefficient 0.001, momentum with the rate inside the buffer (the LARS paper's algorithm).
        recalled, with confidence: weight decay 1e-4.
        read elsewhere, because the paper's rate and warm-up at this batch were not found: rate 32 and 14 epochs of
            warm-up, with which the PyTorch code of NUS-HPC, the first author's group, reports 0.7675 in 90 epochs.
        derived: 16 images per batch-norm statistic, the share of one of 2,048 workers.
        chosen: zero-gamma off, as in Caffe models of that time; no label smoothing; decay measured from the first step,
            as in Caffe, so that the rate falls from 32 to 22.8 when warm-up ends at epoch 14.
        departs: the 0.7675 belongs to another schedule and loss. The NUS-HPC code decays from the end of warm-up,
            smooths labels by 0.1 with s / (K - 1) on each wrong class, and clamps the trust ratio to [0, 50] and the
            gradient norm to at most 10.
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
