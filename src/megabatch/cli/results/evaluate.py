"""`megabatch evaluate CHECKPOINT`: exact top-1 and top-5 with any number of workers."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from megabatch.cli.options import find_device, runtime_options
from megabatch.cli.output import make_console
from megabatch.cli.results.confusion import print_details, print_mistakes, write_matrix
from megabatch.files import printable
from megabatch.runtime import Runtime


@runtime_options(
    "data",
    "precision",
    "device",
    "cache",
    "train_split",
    "val_split",
    "val_fraction",
    workers="Local workers; auto: one.",
    model="FILE.py:FUNCTION that made the model; needed only for such a model, as it runs the file.",
)
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A step-*.pt file, or a run folder (uses its best checkpoint).")],
    runtime: Runtime,
    details: Annotated[
        bool, typer.Option("--details", help="Also print top-1 by class and the confusion matrix.")
    ] = False,
    confusion: Annotated[Path | None, typer.Option(help="Write the confusion matrix to this CSV file.")] = None,
) -> None:
    """Evaluates a checkpoint. Counts top-1 and top-5 over the whole evaluation set, every sample once.

    The data's classes are matched with the checkpoint's by name; the data may lack some. A folder needs only val/.
    Where there is none, the images that the run held out by --val-fraction are evaluated.
    """
    from megabatch.comm.launcher_environment import started_by_launcher
    from megabatch.comm.local_workers import run_local_workers
    from megabatch.train.checkpoint import open_checkpoint

    if not started_by_launcher(runtime.workers):
        open_checkpoint(checkpoint)  # fail here, once, rather than in every worker
        find_device(runtime.device)
        if (runtime.workers or 1) > 1:
            if code := run_local_workers(runtime.workers or 1, sys.argv[1:]):
                raise typer.Exit(code)
            return
    _evaluate(checkpoint, runtime, details=details, confusion=confusion)


def _evaluate(checkpoint: Path, runtime: Runtime, *, details: bool, confusion: Path | None) -> None:
    import torch

    from megabatch.app.classes import match_evaluation_data
    from megabatch.app.data import build_eval_loader, open_evaluation_data
    from megabatch.app.load import load_for_evaluation
    from megabatch.app.resolve import choose_memory, choose_precision
    from megabatch.comm.launch import join
    from megabatch.data.sources.labels import ClassNote
    from megabatch.observe.run_folder import held_out_fraction
    from megabatch.recipe import from_json
    from megabatch.train.checkpoint import open_checkpoint
    from megabatch.train.evaluate import Mistake, eval_block_size
    from megabatch.train.evaluate import evaluate as evaluate_model

    with join(device=runtime.device) as world, contextlib.ExitStack() as stack:
        choose_memory(runtime, world)
        info, state = open_checkpoint(checkpoint)
        recipe = from_json(info.recipe)
        held_out = held_out_fraction(info.path.parent.parent)
        data = stack.enter_context(contextlib.closing(open_evaluation_data(recipe, runtime, held_out=held_out)))
        source, remarks = match_evaluation_data(data.evaluation, info)
        loader = build_eval_loader(recipe, runtime, source, world=world)
        stack.callback(loader.close)
        names = info.names()
        counts = torch.zeros(len(names), len(names), dtype=torch.int64, device=world.device)
        mistakes: list[Mistake] = []
        result = evaluate_model(
            load_for_evaluation(recipe, runtime, state, world=world),
            loader,
            world=world,
            precision=choose_precision(runtime, world.device),
            block_size=eval_block_size(recipe),
            flip=recipe.eval_flip,
            confusion=counts if details or confusion else None,
            mistakes=mistakes if details else None,
        )
        if world.is_first:
            notes = [note for note in data.notes if not isinstance(note, ClassNote)]
            for remark in [*notes, *remarks]:
                typer.echo(printable(remark), err=True)
            typer.echo(
                f"step {info.step:,}  epoch {info.epoch:.2f}  loss {result.loss:.4f}  top5 {result.top5:.4f}  "
                f"top1 {result.top1:.4f} ({result.correct1:,} of {result.num_samples:,})"
            )
            if details:
                print_details(make_console(), counts.tolist(), names)
                print_mistakes(make_console(), mistakes, source)
            if confusion:
                write_matrix(confusion, counts.tolist(), names)
