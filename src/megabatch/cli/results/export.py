"""`megabatch export RUN --format ...`: a trained model as a file for other programs, and its model card."""

from pathlib import Path
from typing import Annotated, get_args

import typer

from megabatch.cli.completion import complete_from
from megabatch.cli.options import require_choice

FORMATS = ("safetensors", "torchvision", "onnx", "torch-export")


def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder (its best checkpoint), or a step-*.pt file.")
    ],
    output_format: Annotated[
        str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.", autocompletion=complete_from(FORMATS))
    ],
    output: Annotated[Path | None, typer.Option(help="Folder of the file; default RUN/export.")] = None,
    model: Annotated[
        str | None, typer.Option(help="FILE.py:FUNCTION that made the model; runs the file. Only for such a model.")
    ] = None,
) -> None:
    """Exports a trained model. Writes it in the format of other programs, with a model card.

    The file holds class names, preprocessing and recipe; its logits are compared with the model's before it is kept.
    """
    from megabatch.app.export.card import model_card
    from megabatch.app.export.formats import FORMATS as FORMS
    from megabatch.app.export.formats import Format
    from megabatch.app.export.formats import export as write
    from megabatch.app.export.trained import trained_model
    from megabatch.files import write_text
    from megabatch.train.checkpoint import open_checkpoint

    chosen: Format = require_choice("--format", output_format, get_args(Format))
    info, state = open_checkpoint(checkpoint)
    run = checkpoint if checkpoint.is_dir() else info.path.parent.parent
    folder = output or run / "export"
    trained, path = trained_model(info, state, model), folder / FORMS[chosen].file
    folder.mkdir(parents=True, exist_ok=True)
    difference = write(trained, path, chosen)
    write_text(folder / "README.md", model_card(trained, folder))
    typer.echo(
        f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB; logits differ by {difference:.1g} from the checkpoint's) "
        f"and {folder / 'README.md'}"
    )
