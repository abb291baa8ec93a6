"""Output that any text fits in and whose reader may leave."""

import os
import pty
import subprocess
import sys

import pytest
from command_line import megabatch_process
from limits import HANG_S

PRINT = "from megabatch.cli.output import open_output; import sys; open_output(); "


def python(code: str, **options) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", PRINT + code], timeout=HANG_S, check=False, **options)


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_characters_that_the_encoding_lacks_are_escaped(flags):
    code = PRINT + r"print('日本 \udce9', flush=True); print('日本 \udce9', file=sys.stderr)"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, env=environment, check=True)
    assert done.stdout == done.stderr == rb"\u65e5\u672c \udce9" + b"\n"


def test_undecodable_bytes_of_a_name_are_escaped_in_utf8_too():
    done = python(r"print('é\udce9')", capture_output=True, env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert done.stdout.decode() == "é\\udce9\n"


def test_a_pipe_that_is_closed_does_not_end_the_process():
    read, write = os.pipe()
    os.close(read)
    code = "[print('line', flush=True) for _ in range(3)]; print('went on', file=sys.stderr)"
    done = python(code, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"went on\n")


def test_a_terminal_that_is_closed_does_not_end_the_process():
    controller, terminal = pty.openpty()
    code = PRINT + "input(); [print('line', flush=True) for _ in range(3)]; sys.exit(7)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        os.close(controller)
        process.communicate(b"\n", timeout=HANG_S)
    assert process.returncode == 7


def test_closed_descriptors_are_no_error():
    code = "import os; os.close(1); os.close(2)\nimport sys; sys.stdout = sys.stderr = None\n" + PRINT
    code += "print('nothing', file=sys.stderr); print('nothing', flush=True)"
    assert subprocess.run([sys.executable, "-c", code], timeout=HANG_S, check=False).returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_output_to_a_full_disk_is_one_line_and_exit_code_2():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "megabatch", "recipes"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("megabatch: no space left on device; free some space")
    assert len(done.stderr.splitlines()) == 1


def test_a_file_in_the_current_folder_shadows_no_module(tmp_path):
    for name in ("random", "typing", "re", "enum", "rich", "dataclasses"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    assert "fashion_mnist" in megabatch_process("recipes", cwd=tmp_path).stdout
