"""Where what can be fetched or measured again is kept."""

from megabatch.comm.autotune.choose import tuning_file
from megabatch.files import cache_folder
from megabatch.kernels.tuning import table, use_table


def test_the_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "megabatch"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "megabatch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "megabatch"


def test_tables_of_measurements_are_kept_there_too(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning_file() == tmp_path / "megabatch" / "allreduce.json"
    use_table(None)
    assert table().folder == tmp_path / "megabatch" / "kernels"
    use_table(None)
