from collections.abc import Callable

import pytest
from small_data_sets import CIFAR, FASHION, small

from megabatch.data.fetching import catalog
from megabatch.data.fetching.catalog import CIFAR10, FASHION_MNIST, KnownDataSet


@pytest.fixture
def replace_known(monkeypatch: pytest.MonkeyPatch) -> Callable[[KnownDataSet], None]:
    """Function that replaces a catalog entry. Before it is called, both entries are small sets without sources."""

    def replace(known: KnownDataSet) -> None:
        monkeypatch.setattr(catalog, "KNOWN", {**catalog.KNOWN, known.name: known})

    replace(small(FASHION_MNIST, FASHION))
    replace(small(CIFAR10, CIFAR))
    return replace
