"""What accelerate's launcher does with signals, as docs/howto/train.md says it: facts about torch, which may change with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.txfm_model.test_two_processes import TWO_CPU_PROCESSES, free_port

pytestmark = pytest.mark.slow
HANDED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
SCRIPT = """
import os, signal, sys, time

seconds = float(sys.argv[2])
name = os.path.join(sys.argv[1], os.environ["RANK"])
got = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: got.append(number))
with open(name + ".pid", "w") as file:
    file.write(str(os.getpid()))
while not got:
    time.sleep(0.05)
with open(name + ".got", "w") as file:
    file.write(str(got[0]))
time.sleep(seconds)
open(name + ".saved", "w").close()
sys.exit(75)
"""


def wait_for(folder: Path, pattern: str, n: int = 2) -> list[str]:
    """Texts of the `n` files that the processes write; they may take long to start on a busy machine."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        found = [path.read_text() for path in sorted(folder.glob(pattern))]
        if len(found) == n and (all(found) or pattern == "*.saved"):
            return found
        time.sleep(0.05)
    raise AssertionError(f"no {pattern} of {n} processes in {list(folder.iterdir())}")


def launch(folder: Path, number: signal.Signals, seconds: float, **variables: str) -> int:
    """Start two processes that take `seconds` to stop, signal their launcher, and return its exit code."""
    script = folder / "worker.py"
    script.write_text(SCRIPT)
    command = [
        sys.executable, *TWO_CPU_PROCESSES, "--main_process_port", free_port(), str(script), str(folder), str(seconds),
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")}
    environment |= {"ACCELERATE_USE_CPU": "true"} | variables
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as launcher:
        wait_for(folder, "*.pid")
        launcher.send_signal(number)
        return launcher.wait(120)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_handed_on_and_the_exit_code_is_one(tmp_path, number):
    variables = {"PET_SIGNALS_TO_HANDLE": HANDED_ON} if number == signal.SIGUSR1 else {}
    assert launch(tmp_path, number, 0.5, **variables) == 1
    assert wait_for(tmp_path, "*.got") == [str(int(number))] * 2
    assert wait_for(tmp_path, "*.saved")


@pytest.mark.parametrize("variables", [{}, {"TORCHELASTIC_SIGNALS_TO_HANDLE": HANDED_ON}])
def test_sigusr1_that_is_not_asked_for_ends_the_launcher_alone(tmp_path, variables):
    assert launch(tmp_path, signal.SIGUSR1, 0, **variables) == -signal.SIGUSR1
    assert not list(tmp_path.glob("*.got"))
    for pid in wait_for(tmp_path, "*.pid"):
        os.kill(int(pid), signal.SIGTERM)  # they are still there
    wait_for(tmp_path, "*.saved")


def test_processes_that_take_too_long_are_killed(tmp_path):
    assert launch(tmp_path, signal.SIGTERM, 60, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1") == 1
    assert wait_for(tmp_path, "*.got")
    assert not list(tmp_path.glob("*.saved"))
