"""`megabatch bench input`: how fast each stage of the input is, which one holds training up, what would help."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megabatch.bench.input_stages import InputReport, Stage
    from megabatch.data.sources.protocol import EncodedSource


def bench_input(
    data: Annotated[Path, typer.Option(help="Folder of images, tar shards or parquet files.")],
    resolution: Annotated[int, typer.Option(help="Side of the crops, in pixels.", min=1)] = 224,
    images: Annotated[int, typer.Option(help="Images to measure with.", min=1)] = 256,
    seconds: Annotated[float, typer.Option(help="Seconds for each stage.", min=0.01)] = 2.0,
    threads: Annotated[int | None, typer.Option(help="Decoding threads; default one for each core.", min=1)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers there.")] = None,
) -> None:
    """Times each stage of the input. Reading to copying on one core, and the loader as a whole; names the slowest."""
    from megabatch.bench.input_stages import measure_input

    report = measure_input(
        open_training_part(data),
        resolution=resolution,
        num_images=images,
        seconds=seconds,
        threads=threads,
        on_progress=lambda stage: typer.echo(f"timing: {stage}", err=True),
    )
    _show(report)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")


def open_training_part(path: Path) -> "EncodedSource":
    """The training samples of a data set with parts, or all of one without."""
    from megabatch.data.packing.input import open_parts

    return open_parts(path)[0].source


def _show(report: "InputReport") -> None:
    typer.echo(
        f"images of {report.image_bytes / 1024:.0f} KiB and {report.image_pixels / 1e6:.2f} megapixels on average"
    )
    typer.echo(f"{'stage':22}{'images/core-s':>14}{'us an image':>13}")
    for stage in report.stages:
        typer.echo(_line(stage))
    typer.echo("not run in training, for comparison:")
    for stage in report.compared:
        typer.echo(_line(stage))
    typer.echo(f"decoder: {_decoder(report.compiled_share)}")
    typer.echo(f"loader: {report.loader_images_per_s:,.0f} images/s with {report.num_threads} threads")
    typer.echo(f"bottleneck: {report.bottleneck}")
    for line in report.advice:
        typer.echo(f"would help: {line}")


def _decoder(compiled_share: float | None) -> str:
    from megabatch.bench.input_stages import HOW_TO_COMPILE

    if compiled_share is None:
        return f"libjpeg-turbo's library; {HOW_TO_COMPILE}"
    if compiled_share == 1:
        return "compiled"
    return f"compiled, for {compiled_share:.0%} of the images; the library for those that are no baseline JPEGs"


def _line(stage: "Stage") -> str:
    return f"{stage.name:22}{stage.images_per_core_s:14,.0f}{stage.cpu_s * 1e6:13.1f}"
