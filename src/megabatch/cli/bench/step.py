"""`megabatch bench step`: times a recipe's training step with each set of runtime options on this machine."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megabatch import recipes
from megabatch.cli.completion import complete_from, complete_recipe
from megabatch.cli.options import DEVICES, Settings, parse_settings, require_choice
from megabatch.errors import SettingsError
from megabatch.files import write_text
from megabatch.recipe import Recipe, override
from megabatch.runtime import Runtime

if TYPE_CHECKING:
    from megabatch.bench.synthetic_step import SyntheticStep
    from megabatch.bench.timing import Timing
    from megabatch.comm.launch import World


@dataclass(frozen=True)
class Variant:
    """A set of runtime options, with the options of `megabatch train` that select it."""

    name: str
    runtime: Runtime
    options: str


@dataclass(frozen=True)
class Measured:
    """Time of a variant's step, or the `error` with which it failed."""

    variant: Variant
    micro_batch_size: int = 0
    timing: "Timing | None" = None
    error: str | None = None

    @property
    def median_s(self) -> float:
        """Median seconds of a step; infinite if the variant failed."""
        return self.timing.median_s if self.timing else float("inf")


def bench_step(
    recipe: Annotated[
        str, typer.Argument(help="Name of a recipe; `megabatch recipes` lists them.", autocompletion=complete_recipe)
    ] = "fashion_mnist",
    batch: Annotated[
        int | None,
        typer.Option(
            help="Images per step, a multiple of bn_span; default: a batch that runs in a few seconds.", min=1
        ),
    ] = None,
    settings: Settings = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or mps.", autocompletion=complete_from(DEVICES))
    ] = "auto",
    seconds: Annotated[float, typer.Option(help="Seconds of measurement, after warm-up.", min=0.1)] = 30.0,
    compile_model: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile", help="Also measure torch.compile; compiling takes a minute or more per variant."
        ),
    ] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the measurements to.")] = None,
) -> None:
    """Times a recipe's training step. On random images: precisions, micro-batches and optionally torch.compile."""
    from megabatch.bench.synthetic_step import measured_batch_size
    from megabatch.comm.launch import join

    chosen = override(recipes.get(recipe), parse_settings(settings or []))
    with join(device=require_choice("--device", device, DEVICES)) as world:
        images = measured_batch_size(chosen, batch, images_at_224=256 if world.device.type == "cuda" else 32)
        variants = variants_to_measure(chosen, images, device=world.device.type, compiled=compile_model)
        typer.echo(f"{chosen.name}: {chosen.model}, a step of {images} images, on {world.device.type}")
        measured = measure(chosen, images, variants, world, seconds=seconds)
    typer.echo(table(measured, images, chosen.name))
    if output is not None:
        write_text(output, json.dumps(as_json(measured, chosen, images), indent=1) + "\n")


def variants_to_measure(recipe: Recipe, images: int, *, device: str, compiled: bool) -> list[Variant]:
    """Returns each precision with default options; in 16 bit also without graph capture, unfused and in micro-batches.

    On a CPU also float32 unfused and in the other memory layout: processors without 16-bit arithmetic train in float32.
    With `compiled`, each precision is measured with torch.compile too.
    """
    precisions = ["fp32", "bf16", "fp16"] if device == "cuda" else ["fp32", "bf16"]
    variants = [_variant(f"{name}", precision=name) for name in precisions]
    if device == "cuda":
        variants += [_variant(f"{name} without graph", precision=name, capture="off") for name in precisions[1:]]
    unfused = precisions[1:] if device == "cuda" else precisions
    variants += [_variant(f"{name} with torch kernels", precision=name, fusion="plain") for name in unfused]
    if device == "cpu":
        variants.append(_variant("fp32 in NCHW", precision="fp32", channels_last=False))
    size = images // 2
    while size >= recipe.bn_span and size >= images // 8:
        if size % recipe.bn_span == 0:
            variants.append(_variant(f"bf16 in micro-batches of {size}", precision="bf16", micro_batch_size=size))
        size //= 2
    if compiled:
        variants += [_variant(f"{name} compiled", precision=name, compile=True) for name in precisions]
    return variants


def measure(
    recipe: Recipe, images: int, variants: Sequence[Variant], world: "World", *, seconds: float
) -> list[Measured]:
    """Returns the measured time of each variant's step.

    On a CPU the variants are interleaved, so that a disturbance affects all of them. On a GPU they run one after
    another, because each may need all of the memory.
    """
    groups = [list(variants)] if world.device.type == "cpu" else [[variant] for variant in variants]
    share = seconds / len(variants)
    return [row for group in groups for row in _measure_group(recipe, images, group, world, share * len(group))]


def table(measured: Sequence[Measured], images: int, recipe: str) -> str:
    """Returns a table of the variants, fastest first, followed by the command for the fastest."""
    ranked = sorted(measured, key=lambda row: row.median_s)
    lines = [f"{'variant':34} {'images/s':>10} {'median ms':>10}  {'quartiles':>19} {'micro-batch':>11}"]
    for row in ranked:
        if row.timing is None:
            lines.append(f"{row.variant.name:34} failed: {row.error}"[:160])
            continue
        first, third = row.timing.quartiles_s
        spread = f"{1e3 * first:.1f} .. {1e3 * third:.1f}"
        lines.append(
            f"{row.variant.name:34} {images / row.median_s:10,.0f} {1e3 * row.median_s:10.1f}  {spread:>19} "
            f"{row.micro_batch_size:>11}"
        )
    if ranked[0].timing:
        lines.append(f"fastest: {ranked[0].variant.name}; megabatch train {recipe} {ranked[0].variant.options}")
    return "\n".join(lines)


def as_json(measured: Sequence[Measured], recipe: Recipe, images: int) -> dict[str, Any]:
    """Returns all measurements with a description of the machine and the versions."""
    from megabatch.observe.environment import describe

    rows = [
        {"variant": row.variant.name, "options": row.variant.options, "micro_batch_size": row.micro_batch_size}
        | {"error": row.error, "seconds": row.timing.seconds if row.timing else ()}
        for row in measured
    ]
    return {"recipe": recipe.name, "model": recipe.model, "images": images, "variants": rows, "environment": describe()}


def _variant(name: str, **changes: Any) -> Variant:
    flags = {"compile": "--compile", "channels_last": "--no-channels-last"}
    options = [flags.get(key) or f"--{key.replace('_', '-')} {value}" for key, value in changes.items()]
    return Variant(name, Runtime(**changes), " ".join(options))


def _measure_group(
    recipe: Recipe, images: int, variants: Sequence[Variant], world: "World", seconds: float
) -> Iterator[Measured]:
    from megabatch.bench.timing import compare

    with contextlib.ExitStack() as stack:
        ready: dict[str, SyntheticStep] = {}
        errors: dict[str, str] = {}
        for variant in variants:
            typer.echo(f"warming up: {variant.name}", err=True)
            try:
                ready[variant.name] = stack.enter_context(_warm_step(recipe, images, variant, world))
            except (RuntimeError, SettingsError) as error:  # no compiler, or out of memory
                errors[variant.name] = " ".join(str(error).split())[:300]
        timings = compare({name: step.run_step for name, step in ready.items()}, warmup=0, repeats=3, seconds=seconds)
    for variant in variants:
        if variant.name in ready:
            yield Measured(variant, ready[variant.name].micro_batch_size, timings[variant.name])
        else:
            yield Measured(variant, error=errors[variant.name])


@contextlib.contextmanager
def _warm_step(recipe: Recipe, images: int, variant: Variant, world: "World") -> "Iterator[SyntheticStep]":
    from megabatch.bench.synthetic_step import synthetic_step

    with synthetic_step(recipe, variant.runtime, world=world, global_batch_size=images) as step:
        for _ in range(2 if world.device.type == "cpu" else 5):  # compiled at the second, captured at the fourth
            step.run_step()
        yield step
