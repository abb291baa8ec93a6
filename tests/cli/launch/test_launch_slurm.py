"""`megabatch launch slurm`: a batch file that a shell reads as intended."""

import shlex

from command_line import error_line, megabatch


def requests(text):
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return dict(line.partition("=")[::2] for line in lines)


def test_the_file_asks_for_nodes_and_a_worker_per_gpu_and_keeps_arguments_as_they_are():
    size = ["--nodes", 4, "--gpus-per-node", 8, "--cpus-per-worker", 12, "--time", "1-00:00", "--partition", "a100"]
    train = ["mlperf_32768", "--data", "/shared/my photos; rm x", "--output", "/shared/run", "--set", "seed=1"]
    done = megabatch("launch", "slurm", *size, "--", *train)
    assert done.returncode == 0, done.stderr
    asked = requests(done.stdout)
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("4", "8", "8")
    assert (asked["cpus-per-task"], asked["time"], asked["partition"]) == ("12", "1-00:00", "a100")
    assert "requeue" in asked
    assert "account" not in asked
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command[command.index("megabatch") :][:5] == ["megabatch", "train", "mlperf_32768", "--resume", "auto"]
    assert command[-6:] == train[1:]


def test_mistakes_are_refused():
    run = ["--", "photos", "--data", "x", "--output", "y"]
    assert "--output /shared/runs/NAME works" in error_line(megabatch("launch", "slurm", "--", "photos"))
    assert "did you mean photos" in error_line(megabatch("launch", "slurm", "--", "photo", "--output", "y"))
    assert "--partition gpu works" in error_line(megabatch("launch", "slurm", "--partition", "a\n#b", *run))
    wrong = ["--gpus-per-node", 4, "--workers-per-node", 2]
    assert "--workers-per-node 4 works" in error_line(megabatch("launch", "slurm", *wrong, *run))
