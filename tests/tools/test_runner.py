"""What every verb promises: where it writes, how it fails, which exit code it gives."""

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools.runner import Terminal, run_kinds, run_verb, to_jsonable
from tools.terminal import duration
from txfm_data.address import redact

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Does something.

    And more.
    """

    out: Path
    """Where to write."""
    n: int = 3
    """How many."""


def verb(run: Callable[[Options, Terminal], dict[str, Any]], *argv: str) -> int:
    return run_verb("try", Options, run, lambda result: f"done {result['n']}", argv, positionals=("out",))


def give(options: Options, terminal: Terminal) -> dict[str, Any]:
    return {"out": options.out, "n": np.int64(options.n), "loss": float("nan")}


def test_a_summary_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(give, "a/b") == 0
    assert capsys.readouterr() == ("done 3\n", "")


def test_json_is_one_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    def noisy(options: Options, terminal: Terminal) -> dict[str, Any]:
        print("a library prints")
        logging.getLogger("txfm_data.x").info("ours logs")
        logging.getLogger("theirs").info("not shown")
        logging.getLogger("theirs").warning("theirs warns")
        terminal.say("begun on s3://user:secret@bucket/x?token=secret")
        terminal.progress("reading", "samples")(3, 3)
        return give(options, terminal)

    assert verb(noisy, "a/b", "--json", "--n", "4") == 0
    stdout, stderr = capsys.readouterr()
    assert json.loads(stdout) == {"out": "a/b", "n": 4, "loss": None}
    assert "a library prints\nINFO txfm_data.x: ours logs\nWARNING theirs: theirs warns\n" in stderr
    assert "txfm try: begun on s3://***@bucket/x?***\ntxfm try: reading 3/3 samples (100%)" in stderr
    assert "secret" not in stderr
    assert "not shown" not in stderr


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("x.h5ad: no counts;\n  give --values"), "txfm try: error: x.h5ad: no counts; give --values\n"),
        (TypeError("n must be an int"), "txfm try: error: n must be an int\n"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), "txfm try: error: a/b: No such file or directory\n"),
        (OSError("cannot read https://me:pw@host/x.h5ad?sig=pw#pw, gone"), "cannot read https://***@host/x.h5ad?***"),
        (ValueError(), "txfm try: error: ValueError\n"),
    ],
)
def test_an_expected_error_is_one_line_and_code_1(
    capsys: pytest.CaptureFixture[str], error: Exception, expected: str
) -> None:
    def fail(options: Options, terminal: Terminal) -> dict[str, Any]:
        raise error

    assert verb(fail, "out", "--json") == 1
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert expected in stderr
    assert "pw" not in stderr
    assert stderr.count("\n") == 1


def test_a_traceback_when_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: Options, terminal: Terminal) -> dict[str, Any]:
        raise ValueError("no")

    monkeypatch.setenv("TXFM_TRACEBACK", "1")
    assert verb(fail, "out") == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_bug_is_not_hidden() -> None:
    def fail(options: Options, terminal: Terminal) -> dict[str, Any]:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        verb(fail, "out")


def test_a_result_that_json_cannot_hold_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(lambda options, terminal: {"n": object()}, "out", "--json") == 1
    assert "a result cannot hold the object" in capsys.readouterr().err


def test_wrong_use_is_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(give, "out", "--m", "3") == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("txfm try: error: unknown option --m; did you mean --n")
    assert stderr.endswith("Run `txfm try --help` for the options.\n")
    assert verb(give) == 2
    assert "missing: OUT" in capsys.readouterr().err


def test_help_is_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(give, "--help") == 0
    stdout, stderr = capsys.readouterr()
    assert stdout.startswith("usage: txfm try OUT [options]\n\nDoes something.\n")
    assert stderr == ""


def test_ctrl_c_is_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(options: Options, terminal: Terminal) -> dict[str, Any]:
        signal.raise_signal(signal.SIGINT)
        return {}

    assert verb(interrupted, "out") == 130
    assert capsys.readouterr() == ("", "txfm try: interrupted; nothing was left half-written\n")


def test_sigterm_cleans_up_and_is_code_143(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def terminated(options: Options, terminal: Terminal) -> dict[str, Any]:
        part = options.out.with_suffix(".part")
        part.touch()
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            part.unlink()
            raise
        return {}

    assert verb(terminated, str(tmp_path / "x")) == 143
    assert capsys.readouterr().err == "txfm try: terminated; nothing was left half-written\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_swallowed_ctrl_c_is_raised_at_the_next_progress(capsys: pytest.CaptureFixture[str]) -> None:
    """As h5py swallows it: what its callbacks raise is printed and forgotten."""

    def run(options: Options, terminal: Terminal) -> dict[str, Any]:
        progress = terminal.progress("working")
        progress(1, 3)
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        progress(2, 3)
        raise AssertionError("not reached")

    assert verb(run, "out") == 130
    assert capsys.readouterr().err.endswith("txfm try: interrupted; nothing was left half-written\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_only_the_first_process_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(options: Options, terminal: Terminal) -> dict[str, Any]:
        terminal.say("hello")
        terminal.progress("reading", "samples")(1, 1)
        return {"n": 1}

    monkeypatch.setenv("RANK", "1")
    assert verb(run, "out", "--json") == 0
    assert capsys.readouterr() == ("", "")


def test_logging_is_left_as_it_was() -> None:
    root = logging.getLogger()
    before = (list(root.handlers), logging.getLogger("txfm_data").level)
    assert verb(give, "out") == 0
    assert (list(root.handlers), logging.getLogger("txfm_data").level) == before


def test_a_reader_that_leaves_makes_no_traceback() -> None:
    script = "\n".join(
        [
            "import os, sys",
            "from dataclasses import dataclass",
            "from tools.runner import run_verb",
            "@dataclass(frozen=True, kw_only=True)",
            "class Options:",
            "    n: int = 1",
            "def run(options, terminal):",
            "    return {}",
            "sys.exit(run_verb('x', Options, run, lambda result: 'y' * 100_000, []))",
        ]
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def main_one(argv: Any = None) -> int:
    """Do the one kind.

    More.
    """
    print(f"one {list(argv)}")
    return 7


def test_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {"one": main_one}
    assert run_kinds("verb", kinds, ["one", "--help"], "Do many things.\n\nMore.") == 7
    assert capsys.readouterr().out == "one ['--help']\n"
    assert run_kinds("verb", kinds, ["--help"], "Do many things.\n\nMore.") == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: txfm verb KIND [options]\n\nDo many things.\n\nkinds:\n")
    assert "  one             Do the one kind.\n" in text
    assert run_kinds("verb", kinds, ["on"], "") == 2
    assert capsys.readouterr() == ("", "txfm verb: error: no kind 'on'; did you mean one?\n")
    assert run_kinds("verb", kinds, [], "") == 2
    assert "kinds:" in capsys.readouterr().err


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_are_few_and_end_with_the_last() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Terminal("shard", stream=stream, clock=clock).progress("packing", "samples")
    for done in range(0, 1001, 10):
        clock.now = done / 50
        progress(done, 1000)
    assert stream.getvalue().splitlines() == [
        "txfm shard: packing 250/1,000 samples (25%), 50 samples/s, 0:15 left",
        "txfm shard: packing 500/1,000 samples (50%), 50 samples/s, 0:10 left",
        "txfm shard: packing 750/1,000 samples (75%), 50 samples/s, 0:05 left",
        "txfm shard: packing 1,000/1,000 samples (100%), 50 samples/s, 0:20 in all",
    ]


def test_plain_lines_of_a_resumed_task_and_of_one_call() -> None:
    stream, clock = io.StringIO(), Clock()
    terminal = Terminal("train", stream=stream, clock=clock)
    progress = terminal.progress("training", "steps")
    clock.now = 100.0
    progress(9000, 10_000)
    clock.now = 200.0
    progress(9100, 10_000)
    progress = terminal.progress("reading", "samples")
    clock.now = 202.0
    progress(8, 8)
    progress = terminal.progress("scanning", "samples")
    clock.now = 210.0
    progress(5, 0)
    assert stream.getvalue().splitlines() == [
        "txfm train: training 9,000/10,000 steps (90%), 90 steps/s, 0:11 left",
        "txfm train: training 9,100/10,000 steps (91%), 1 steps/s, 15:00 left",
        "txfm train: reading 8/8 samples (100%), 4 samples/s, 0:02 in all",
        "txfm train: scanning 5 samples, 0.62 samples/s, 0:08 in all",
    ]


class Tty(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal() -> None:
    stream = Tty()
    terminal = Terminal("shard", stream=stream)
    progress = terminal.progress("packing", "samples")
    for done in (0, 50, 100):
        progress(done, 100)
        time.sleep(0.01)
    terminal.progress("reading", "samples")(1, 4)
    terminal.close()
    assert "packing: 100%" in stream.getvalue()
    assert "100/100" in stream.getvalue()
    assert "reading:" in stream.getvalue()


def test_durations() -> None:
    assert [duration(s) for s in (-1, 0.4, 61, 3600, 90061)] == ["0:00", "0:00", "1:01", "1:00:00", "25:01:01"]


def test_redaction_keeps_what_is_no_secret() -> None:
    text = "s3://k:s@b/x, 'https://h/p?a=b' and https://h/p#f in /home/me@x/y.h5ad? (me@mail.org)"
    assert redact(text) == "s3://***@b/x, 'https://h/p?***' and https://h/p?*** in /home/me@x/y.h5ad? (me@mail.org)"


def test_what_json_can_hold() -> None:
    value = {
        1: (np.float32("inf"), np.bool_(True), np.array([[1, 2]]), np.float64(0.5)),
        "a": {Path("b"), Path("a")},
        "c": Options(out=Path("x")),
        "d": [None, "t", True, 2, -float("inf")],
    }
    assert to_jsonable(value) == {
        "1": [None, True, [[1, 2]], 0.5],
        "a": ["a", "b"],
        "c": {"out": "x", "n": 3},
        "d": [None, "t", True, 2, None],
    }
    assert json.dumps(to_jsonable(value), allow_nan=False)
