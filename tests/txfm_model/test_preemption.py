"""A signal stops a run at the end of a step, on all processes at the same one, and never in the middle of a save."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from txfm_model.preemption import EXIT_PREEMPTED, STOP_SIGNALS, Preempted, StopSignals

ROOT = Path(__file__).parents[2]

TWO_PROCESSES = """
import json, os, signal, sys
import torch.distributed as dist
from txfm_model.preemption import Preempted, StopSignals

rank, told, at = int(os.environ["RANK"]), int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo")
answers, outcome = [], "ended"
try:
    with StopSignals() as signals:
        for step in range(1, 9):
            if rank == told and step == at:
                os.kill(os.getpid(), signal.SIGUSR1 if at % 2 else signal.SIGTERM)
            answers.append(signals.agree(step + (rank if at > 100 else 0)))
            if answers[-1]:
                os.kill(os.getpid(), signal.SIGTERM)  # again, while the checkpoint is written
                raise Preempted(step, None)
except Preempted as stop:
    outcome = f"stopped {stop.step}"
except RuntimeError as error:
    outcome = str(error)
handlers = [signal.getsignal(number) is signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGUSR1)]
print(json.dumps([answers, outcome, handlers]))
dist.destroy_process_group()
"""


def on_two_processes(told: int, at: int) -> list[tuple[list[bool], str]]:
    """Answers of `agree` and the outcome on each process, when process `told` gets a signal before step `at`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(told), str(at)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = []
    try:
        for process in processes:
            stdout, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
            answers, outcome, handlers = json.loads(stdout.splitlines()[-1])
            assert handlers == [True, True]
            results.append((answers, outcome))
    finally:
        for process in processes:
            process.kill()
    return results


def test_a_signal_to_one_process_alone_stops_both_at_the_same_step():
    first, second = on_two_processes(told=1, at=3)
    assert first == second == ([False, False, False, True], "stopped 4")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "at", "stopped"), [(0, 1, "stopped 2"), (1, 7, "stopped 8"), (0, 8, "ended"), (0, 99, "ended")]
)
def test_a_signal_at_any_step(told, at, stopped):
    first, second = on_two_processes(told, at)
    assert first == second
    assert first[1] == stopped


@pytest.mark.slow
def test_processes_at_different_steps_are_called_out():
    for _, outcome in on_two_processes(told=0, at=101):
        assert "processes are at different steps, 1 and 2" in outcome


@pytest.fixture(params=STOP_SIGNALS, ids=lambda number: number.name)
def number(request):
    return request.param


def test_one_process_learns_of_a_signal_at_once_and_outlives_any_number(number):
    before = {other: signal.getsignal(other) for other in STOP_SIGNALS}
    with StopSignals() as signals:
        assert not signals.agree(1)
        for _ in range(3):
            signal.raise_signal(number)
        assert signals.agree(2)
        assert signals.agree(3)
    assert {other: signal.getsignal(other) for other in STOP_SIGNALS} == before


def test_handlers_come_back_after_an_error_too(number):
    heard = []
    before = signal.signal(number, lambda *_: heard.append(number))
    try:
        with pytest.raises(KeyError), StopSignals():
            signal.raise_signal(number)
            raise KeyError
        assert heard == []
        signal.raise_signal(number)
        assert heard == [number]
    finally:
        signal.signal(number, before)


def test_outside_the_main_thread_signals_are_left_alone():
    answers = []

    def use():
        with StopSignals() as signals:
            answers.append((signals.agree(1), [signal.getsignal(number) for number in STOP_SIGNALS]))

    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert answers == [(False, before)]


def test_what_a_stopped_run_says():
    stop = Preempted(7, Path("out/checkpoints/step-00000007"))
    assert (stop.step, stop.checkpoint) == (7, Path("out/checkpoints/step-00000007"))
    assert "after step 7" in str(stop) and "--resume auto" in str(stop)
    assert "no checkpoint" in str(Preempted(0, None))
    again = pickle.loads(pickle.dumps(stop))  # as launchers send errors between processes
    assert str(again) == str(stop)
    assert EXIT_PREEMPTED == os.EX_TEMPFAIL == 75
