from collections.abc import Callable

import pytest
from small_data_sets import CIFAR, FASHION, small

from megabatch.data.fetching import catalog as catalogue
from megabatch.data.fetching.catalog import CIFAR10, FASHION_MNIST, KnownDataSet


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[KnownDataSet], None]:
    """Put this version of a data set in place of the genuine one; both are small ones without sources at first."""

    def replace(known: KnownDataSet) -> None:
        monkeypatch.setattr(catalogue, "KNOWN", {**catalogue.KNOWN, known.name: known})

    replace(small(FASHION_MNIST, FASHION))
    replace(small(CIFAR10, CIFAR))
    return replace
