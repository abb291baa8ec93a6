"""Options are generated from `Runtime`, each field once."""

import dataclasses
from pathlib import Path

import pytest
import typer
import typer.main
from command_line import error_line, megabatch
from typer.testing import CliRunner

from megabatch.app.load import load_model
from megabatch.cli.main import app
from megabatch.cli.options import runtime_options
from megabatch.errors import CheckpointError, SettingsError, UserError
from megabatch.observe.report import write_report
from megabatch.runtime import Runtime


def runtime_of(*arguments: str, names: tuple[str, ...] = ()) -> Runtime:
    """The Runtime that a command receives."""
    received = []

    @runtime_options(*names)
    def command(runtime: Runtime) -> None:
        received.append(runtime)

    probe = typer.Typer()
    probe.command()(command)
    result = CliRunner().invoke(probe, [*arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return received[0]


def test_train_has_an_option_for_every_field():
    command = typer.main.get_command(app).commands["train"]
    assert {field.name for field in dataclasses.fields(Runtime)} <= {parameter.name for parameter in command.params}


def test_without_arguments_every_field_has_its_default():
    assert runtime_of() == Runtime()


def test_each_kind_of_field_is_parsed():
    given = ["--workers", "3", "--loss-scale", "1024", "--no-channels-last", "--precision", "bf16", "--threads", "2"]
    given += ["--data", "photos", "--output", "runs/a", "--bucket-mib", "4.5", "--decode-threads", "1"]
    assert runtime_of(*given) == Runtime(
        workers=3,
        loss_scale=1024.0,
        channels_last=False,
        precision="bf16",
        threads=2,
        data=Path("photos"),
        output=Path("runs/a"),
        bucket_mib=4.5,
        decode_threads=1,
    )


def test_the_word_for_no_value_is_none_and_a_url_stays_text():
    found = runtime_of("--workers", "auto", "--loss-scale", "dynamic", "--data", "s3://bucket/set")
    assert (found.workers, found.loss_scale, found.data) == (None, None, "s3://bucket/set")


def test_a_command_may_offer_some_fields_only():
    assert runtime_of("--device", "cpu", names=("device",)) == Runtime(device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "1.5"], "needed a whole number of at least 1, or auto"),
        (["--workers", "-2"], "--workers auto works"),
        (["--loss-scale", "nan"], "--loss-scale dynamic works"),
        (["--wire", "fp8"], "needed one of fp32, fp16, bf16; --wire fp32 works"),
    ],
)
def test_an_impossible_value_is_refused_with_one_that_works(arguments, message):
    with pytest.raises(SettingsError, match=message):
        runtime_of(*arguments)


def test_a_tilde_behind_an_equals_sign_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = megabatch("train", "photos", "--data=~/no-such-folder")
    assert f"{tmp_path}/no-such-folder" in error_line(done)
    assert "KEY=VALUE" in error_line(megabatch("train", "photos", "--set=~x"))


def test_a_tilde_in_quotes_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments in (["report"], ["evaluate"], ["train", "photos", "--data"], ["data", "check"]):
        assert f"{tmp_path}/no-such-folder" in error_line(megabatch(*arguments, "~/no-such-folder"))


def test_a_tilde_is_the_home_folder_in_python(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    runtime = Runtime(data="~/photos", output=Path("~/runs"), cache=Path("~/cache"))
    assert runtime == Runtime(data=tmp_path / "photos", output=tmp_path / "runs", cache=tmp_path / "cache")
    assert Runtime(data="s3://bucket/~user").data == "s3://bucket/~user"
    with pytest.raises(CheckpointError, match=f"{tmp_path}/run"):
        load_model("~/run")
    with pytest.raises(UserError, match=f"{tmp_path}/run"):
        write_report([Path("~/run")], Path("~/report.html"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "photos", "--data", ""], "after --data is empty"),
        (["train", "photos", "--data="], "--data is empty"),
        (["train", "photos", "--output", "", "--quiet"], "after --output is empty"),
        (["data", "check", ""], "after check is empty"),
        (["evaluate", ""], "after evaluate is empty"),
    ],
)
def test_an_empty_path_is_refused_as_it_would_be_the_current_folder(arguments, said):
    assert said in error_line(megabatch(*arguments))
