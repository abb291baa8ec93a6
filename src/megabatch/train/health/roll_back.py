"""Goes back to an earlier checkpoint, with lower learning rates, after a step that was not finite."""

from pathlib import Path

from megabatch.comm.launch import on_rank0
from megabatch.errors import DivergedError
from megabatch.train.checkpoint import agree_on_checkpoint
from megabatch.train.state import Run

MOST_ROLLBACKS = 5
"""Most times that a run goes back: by then rates have fallen by the recipe's factor to the fifth power."""


def roll_back(run: Run, reason: DivergedError) -> None:
    """Restores the state of `rollback_checkpoints` checkpoints ago and multiplies all later rates by a factor.

    A collective. The lower rate is part of the state, so later checkpoints keep it.

    Raises:
        DivergedError: there is no checkpoint, or the run went back `MOST_ROLLBACKS` times.
    """
    state, recipe = run.state, run.recipe
    if run.num_rollbacks >= MOST_ROLLBACKS:
        raise DivergedError(f"{reason}; the run went back {MOST_ROLLBACKS} times") from reason
    failed, factor = state.step, state.lr_factor * recipe.rollback_lr_factor
    folder = on_rank0(lambda: _finished_folder(run), run.world)
    found = agree_on_checkpoint(
        [folder],
        run.world,
        back=recipe.rollback_checkpoints - 1,
        on_damaged=lambda text: run.log({"event": "warning", "text": text}),
    )
    if found is None:
        raise DivergedError(
            f"{reason}; there is no checkpoint to go back to, --checkpoint-every 100steps writes one every 100 updates"
        ) from reason
    if run.memory_copies is not None:
        run.memory_copies.clear()
    state.load_state_dict(found[1])
    state.lr_factor = factor
    run.num_rollbacks += 1
    text = f"{reason}; back from step {failed} to step {state.step}, with rates times {factor:g}"
    run.log({"event": "rollback", "step": state.step, "from_step": failed, "lr_factor": factor})
    run.log({"event": "warning", "text": text})


def _finished_folder(run: Run) -> Path:
    assert run.checkpoints is not None
    run.checkpoints.wait()
    return run.checkpoints.folder
