"""Ying et al. 2018, arXiv:1811.06992: distributed batch norm, input pipeline and 2-D gradient summation."""

from megabatch.recipe import Recipe


def ying2018_32k() -> Recipe:
    """ResNet-50 in 2.2 minutes at batch 32,768 (Ying et al. 2018, arXiv:1811.06992).

    Command: megabatch train ying2018_32k --data PATH
    Published: top-1 0.763, 2.2 minutes on a pod of 1,024 TPU v3 chips
    Measured: not measured

    Sources:
        read: batch, time and accuracy (abstract); rate 34, warm-up of 12 epochs, quadratic decay over the steps that
            follow, momentum 0.9, weight decay 1e-4, label smoothing 0.1, trust coefficient 0.001, eps 0, no LARS
            scaling of batch norm and biases, no decay of batch norm, zero-gamma, truncated-normal initialisation,
            crops of 8 to 100 % of the area, batch norm momentum 0.9 (TensorFlow's convention, 0.1 here), 3,558 steps
            (the authors' public code of December 2018).
        read in the team's MLPerf v0.6 logs, in place of the paper: batch norm over 128 images, eight cores of 16.
        derived: 91 epochs = 3,558 x 32,768 / 1,281,167; momentum with the rate outside the buffer, as in the
            TensorFlow optimizer that this code calls.
        departs: the rate decays to 0; the code of December 2018 leaves TensorFlow's default of 0.0001. No bias is
            decayed; that code decays the bias of the fully connected layer. With decay b, the trust ratio divides by
            |g| + b |w|; that code adds the decay to the loss and divides by |g + b w| + b |w|.
    """
    return Recipe(
        name="ying2018_32k",
        model="resnet50",
        initialization="lecun_truncated",
        dataset="imagenet",
        num_train_images=1_281_167,
        num_classes=1000,
        global_batch_size=32_768,
        total_epochs=91,
        bn_span=128,
        label_smoothing=0.1,
        optimizer="lars",
        peak_lr=34.0,
        momentum_form="outside",
        weight_decay=1e-4,
        warmup_epochs=12,
        poly_power=2,
        published_top1=0.763,
    )


def ying2018_65k() -> Recipe:
    """ResNet-50 in 1.8 minutes at batch 65,536 (Ying et al. 2018, arXiv:1811.06992).

    Command: megabatch train ying2018_65k --data PATH
    Published: top-1 0.752, 1.8 minutes on a pod of 1,024 TPU v3 chips
    Measured: not measured

    Sources:
        read: time and accuracy (a public talk on the paper); rate 35 and warm-up of 34 epochs (the authors' public
            code of December 2018); all else as `ying2018_32k`.
        read in the team's later MLPerf runs, in place of the paper: batch norm over 128 images.
        chosen: 91 epochs, as at 32,768; the number for this batch was not found.
        departs: as `ying2018_32k`, in the end of the decay, the decayed bias and the trust ratio.
    """
    return Recipe(
        name="ying2018_65k",
        model="resnet50",
        initialization="lecun_truncated",
        dataset="imagenet",
        num_train_images=1_281_167,
        num_classes=1000,
        global_batch_size=65_536,
        total_epochs=91,
        bn_span=128,
        label_smoothing=0.1,
        optimizer="lars",
        peak_lr=35.0,
        momentum_form="outside",
        weight_decay=1e-4,
        warmup_epochs=34,
        poly_power=2,
        published_top1=0.752,
    )
