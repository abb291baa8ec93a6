"""`megabatch predict RUN IMAGES...`: the most likely classes of images, as CSV or JSON lines."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from megabatch.cli.completion import complete_from
from megabatch.cli.options import require_choice, runtime_options
from megabatch.errors import SettingsError
from megabatch.files import printable
from megabatch.runtime import Runtime

if TYPE_CHECKING:
    from megabatch.app.predict import Prediction

Format = Literal["csv", "jsonl"]


@runtime_options("precision", "device", "decode_threads")
def predict(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder (its best checkpoint), or a step-*.pt file.")
    ],
    images: Annotated[list[Path], typer.Argument(help="Images, folders of images at any depth, or tars of images.")],
    runtime: Runtime,
    output_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="csv: a line per image and class; jsonl: a JSON object per image.",
            autocompletion=complete_from(get_args(Format)),
        ),
    ] = "csv",
    top: Annotated[int, typer.Option(help="Number of most likely classes per image.", min=1)] = 1,
    upright: Annotated[
        bool, typer.Option("--upright", help="Apply the EXIF rotation of photos, for a model that was trained so.")
    ] = False,
) -> None:
    """Predicts the classes of images. Preprocesses them as `megabatch evaluate` does.

    An unreadable image is reported, and the others are predicted; the exit code is then 1.
    """
    from megabatch.app.predict import predict as predict_images
    from megabatch.comm.launch import join
    from megabatch.comm.launcher_environment import started_by_launcher
    from megabatch.data.checking.repair import upright as upright_file
    from megabatch.data.sources.images import UnlabelledImages
    from megabatch.train.checkpoint import open_checkpoint

    chosen = require_choice("--format", output_format, get_args(Format))
    if started_by_launcher():
        raise SettingsError("predict runs in one process, without a launcher; a call per part of the images works")
    source = UnlabelledImages(images, change=upright_file if upright else None)
    info, state = open_checkpoint(checkpoint)
    num_bad = 0
    with join(device=runtime.device) as world:
        write = _csv_writer() if chosen == "csv" else _write_json
        for prediction in predict_images(info, state, source, runtime, world=world, num_classes=top):
            write(prediction)
            if prediction.error:
                num_bad += 1
                typer.echo(printable(f"{prediction.image} cannot be read: {prediction.error}"), err=True)
    if num_bad:
        typer.echo(f"{num_bad:,} of {len(source):,} images cannot be read", err=True)
        raise typer.Exit(1)


def _csv_writer() -> Callable[["Prediction"], None]:
    """A line per image and class; none for an unreadable image. A terminal gets control characters as escapes."""
    table = csv.writer(sys.stdout, lineterminator="\n")
    heading = ["image", "rank", "class", "probability"]
    shown = printable if sys.stdout.isatty() else str

    def write(prediction: "Prediction") -> None:
        if heading:  # not before the first prediction: no image may be readable
            table.writerow(heading)
            heading.clear()
        for rank, (name, probability) in enumerate(prediction.classes, 1):
            table.writerow((shown(prediction.image), rank, shown(name), f"{probability:.6f}"))

    return write


def _write_json(prediction: "Prediction") -> None:
    classes = [{"class": name, "probability": round(probability, 6)} for name, probability in prediction.classes]
    found = {"error": prediction.error} if prediction.error else {"classes": classes}
    sys.stdout.write(json.dumps({"image": prediction.image} | found) + "\n")
