"""How fast one GPU trains ResNet-50 here beside torch.compile of torchvision's, and where the time goes: two calls.

    python benchmarks/gpu.py --call 1 --output DIR [--limit 320] [--quick] [--device cuda|cpu] [--job NAME ...]
    python benchmarks/gpu.py --call 2 --output DIR

Call one: ceilings, tests on the GPU, and steps of the peer and of ours. Call two: profile, optimizers, JPEGs, single
kernels by shape. If ours is below 1.10 x the peer in call one, call two is the profile and the Gram products only.
Without `--call` both run. Needs torch and Triton, for the peer torchvision, no data.

This process imports no torch. Each job is a process of its own, with a limit; what dies, hangs or loses the GPU costs
no other. Results are JSON lines in DIR/JOB.jsonl, written at once; output of a job is in DIR/JOB.log. After `--limit`
seconds all is killed, the table is printed, also to DIR/table-CALL.txt, and the exit code is 0. Both calls need the
same DIR; DIR/cache holds compiled kernels. With `--quick` sizes are tiny, to see that all runs.

Times are medians with quartiles, on a GPU of replays of CUDA graphs. `of copy` is bytes that must be moved per time, as
a share of what a plain copy of 1 GiB reaches.
"""

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from gpu_report import is_behind, table
from gpu_schedule import Job, Result, Schedule, read_lines

LIMIT_S = 320.0
HERE = Path(__file__).parent


def peer(count: int) -> Job:
    """Compiles beside others, is measured alone."""
    return Job(f"peer-{count}", ("gpu_steps.peer", str(count)), 130, beside=True, waits=True)


def ours(dtype: str, count: int) -> Job:
    """All ways of our step."""
    return Job(f"ours-{dtype}-{count}", ("gpu_steps.ours", dtype, str(count)), 45)


CALLS: dict[int, tuple[Job, ...]] = {
    1: (
        Job("ceilings", ("gpu_kernels.ceilings",), 40),
        peer(1024),
        peer(32),
        peer(256),
        Job("compile-float16", ("gpu_steps.compile_kernels", "float16"), 130, beside=True, needs=("triton",)),
        Job("compile-bfloat16", ("gpu_steps.compile_kernels", "bfloat16"), 130, beside=True, needs=("triton",)),
        Job(
            "tests", ("gpu_checks.tests",), 130, beside=True, needs=("pytest", "hypothesis", "xdist", "pytest_timeout")
        ),
        ours("float16", 32),
        ours("float16", 1024),
        ours("float16", 256),
        ours("bfloat16", 32),
        ours("bfloat16", 1024),
        Job("product", ("gpu_steps.product",), 60),
    ),
    2: (
        Job("profile", ("gpu_steps.profile",), 60, always=True),
        Job("gram", ("gpu_kernels.gram_products",), 40, always=True),
        Job("optimizers", ("gpu_kernels.optimizers",), 30),
        Job("jpeg", ("gpu_checks.jpeg",), 90, needs=("simplejpeg",)),
        Job("stem", ("gpu_kernels.stem",), 40),
        Job("norms", ("gpu_kernels.batch_norm",), 40),
        Job("sanitizer", ("gpu_checks.sanitizer",), 90, needs=("compute-sanitizer",)),
    ),
}


def main() -> None:
    """Runs the calls asked for; prints a table after each, whatever became of its jobs."""
    options = _options()
    options.output.mkdir(parents=True, exist_ok=True)
    _set_environment(options.output)
    for call in (options.call,) if options.call else tuple(CALLS):
        jobs = _jobs(call, options)
        for job in jobs:
            (options.output / f"{job.name}.jsonl").unlink(missing_ok=True)
            (options.output / f"{job.name}.log").unlink(missing_ok=True)
        present = [job for job in jobs if not (lacks := missing(job)) or _skip(options.output, job, lacks)]
        Schedule(options.output, lambda job: command(job, options), options.limit).run(present)
        text = table(_results(options.output, jobs))
        (options.output / f"table-{call}.txt").write_text(text + "\n")
        print(text, flush=True)


def command(job: Job, options: argparse.Namespace) -> list[str]:
    """Words that start the job's process."""
    flags = ["--quick"] if options.quick else []
    flags += ["--warm"] if job.waits else []
    given = ["--name", job.name, "--output", str(options.output), "--device", options.device]
    return [sys.executable, str(HERE / "gpu_job.py"), *given, *flags, *job.words]


def missing(job: Job) -> list[str]:
    """The modules and programs that the job needs and that are not here."""
    return [name for name in job.needs if not importlib.util.find_spec(name) and not shutil.which(name)]


def _jobs(call: int, options: argparse.Namespace) -> list[Job]:
    jobs = [job for job in CALLS[call] if not options.job or job.name in options.job]
    if call == 1 or options.quick or not is_behind(_results(options.output, CALLS[1])):
        return jobs
    return [job for job in jobs if job.always]


def _skip(folder: Path, job: Job, lacks: list[str]) -> bool:
    with (folder / f"{job.name}.jsonl").open("a") as file:
        file.write(f'{{"case": "whole job", "skipped": "needs {", ".join(lacks)}"}}\n')
    return False


def _results(folder: Path, jobs: Sequence[Job]) -> list[Result]:
    return [result for job in jobs for result in read_lines(folder / f"{job.name}.jsonl")]


def _set_environment(output: Path) -> None:
    """For the jobs: the package from this checkout, caches that both calls share, few compiling threads each."""
    paths = [str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ.setdefault("TRITON_CACHE_DIR", str(output.resolve() / "cache" / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(output.resolve() / "cache" / "inductor"))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [job.name for jobs in CALLS.values() for job in jobs]
    parser.add_argument("--output", type=Path, required=True, help="folder of results; the same for both calls")
    parser.add_argument("--call", type=int, choices=tuple(CALLS), help="default: both, one after the other")
    parser.add_argument("--job", action="append", choices=names, help="only this; may be given several times")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether everything runs, not how fast")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of one call (default 320)")
    options = parser.parse_args()
    if options.device == "cpu" and not options.quick:
        parser.error("a CPU runs with --quick alone: the sizes are those of a GPU")
    return options


if __name__ == "__main__":
    main()
