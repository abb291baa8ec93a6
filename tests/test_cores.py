"""The number of threads that a user asks for."""

import pytest

from megabatch.cores import requested_threads
from megabatch.errors import SettingsError


@pytest.mark.parametrize(
    ("text", "threads"), [("3", 3), (" 2,4", 2), ("0", None), ("00", None), ("", None), ("abc", None), ("-3", None)]
)
def test_the_first_level_of_the_variable_counts_if_it_is_a_number(text, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert requested_threads() == threads


@pytest.mark.parametrize("text", ["4097", "9" * 5000])
def test_more_threads_than_a_process_can_start_are_refused(text, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(SettingsError, match="at most 4,096; OMP_NUM_THREADS=1 works"):
        requested_threads()
