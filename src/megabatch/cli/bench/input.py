"""`megabatch bench input`: throughput of each stage of the input pipeline, the bottleneck, and how to speed it up."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megabatch.files import write_text

if TYPE_CHECKING:
    from megabatch.bench.input_stages import InputReport, Stage
    from megabatch.data.sources.protocol import EncodedSource


def bench_input(
    data: Annotated[Path, typer.Option(help="Folder of images, tar shards or parquet files.")],
    resolution: Annotated[int, typer.Option(help="Side of the crops, in pixels.", min=1)] = 224,
    images: Annotated[int, typer.Option(help="Number of images to measure with.", min=1)] = 256,
    seconds: Annotated[float, typer.Option(help="Seconds to measure each stage for.", min=0.01)] = 2.0,
    threads: Annotated[
        int | None, typer.Option(help="Number of decoding threads; default one per core.", min=1)
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file, as JSON.")] = None,
) -> None:
    """Times each stage of the input pipeline. Each runs on one core, then the whole loader; prints the bottleneck."""
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
        write_text(json_file, json.dumps(asdict(report), indent=1) + "\n")


def open_training_part(path: Path) -> "EncodedSource":
    """Training samples of a data set; all samples if it is not split into train and val."""
    from megabatch.data.packing.input import open_parts

    return open_parts(path)[0].source


def _show(report: "InputReport") -> None:
    typer.echo(
        f"images of {report.image_bytes / 1024:.0f} KiB and {report.image_pixels / 1e6:.2f} megapixels on average"
    )
    typer.echo(f"{'stage':22}{'images/core-s':>14}{'us/image':>13}")
    for stage in report.stages:
        typer.echo(_line(stage))
    typer.echo("for comparison, not part of training:")
    for stage in report.compared:
        typer.echo(_line(stage))
    typer.echo(f"decoder: {_decoder(report.compiled_share)}")
    typer.echo(f"loader: {report.loader_images_per_s:,.0f} images/s with {report.num_threads} threads")
    typer.echo(f"bottleneck: {report.bottleneck}")
    for line in report.advice:
        typer.echo(f"to speed it up: {line}")


def _decoder(compiled_share: float | None) -> str:
    from megabatch.bench.input_stages import HOW_TO_COMPILE

    if compiled_share is None:
        return f"libjpeg-turbo; {HOW_TO_COMPILE}"
    if compiled_share == 1:
        return "compiled"
    return f"compiled for {compiled_share:.0%} of the images; libjpeg-turbo or Pillow for others (not baseline JPEG)"


def _line(stage: "Stage") -> str:
    return f"{stage.name:22}{stage.images_per_core_s:14,.0f}{stage.cpu_s * 1e6:13.1f}"
