import subprocess
import sys

import pytest

import megabatch.data


@pytest.mark.parametrize("name", megabatch.data.__all__)
def test_every_public_name_can_be_imported_and_says_what_it_is(name):
    assert getattr(megabatch.data, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Loader'"):
        megabatch.data.Loader  # noqa: B018


def test_listing_known_data_sets_imports_no_torch():
    code = "import sys, megabatch.data.known, megabatch.data.split; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
