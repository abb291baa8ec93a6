"""torchrun with the exit code of its workers: `python -m megabatch.comm.torchrun ARGUMENTS OF TORCHRUN`.

torchrun exits with 1 whatever its workers exit with. A scheduler must tell a run that stopped with a checkpoint
(`STOPPED`) from one that failed.
"""

import sys
from collections.abc import Sequence

from megabatch.comm.local_workers import common_code
from megabatch.errors import STOPPED


def run_torchrun(arguments: Sequence[str]) -> int:
    """Runs torchrun in this process; returns the common exit code of this node's workers, `STOPPED` after a signal."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(list(arguments))
    except ChildFailedError as failure:
        return common_code(worker.exitcode for worker in failure.failures.values())
    except SignalException:
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(run_torchrun(sys.argv[1:]))
