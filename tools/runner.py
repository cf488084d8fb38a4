"""Runs one verb: options in, progress on stderr, result on stdout, and an exit code that can be trusted.

Exit codes: 0 all was done, 1 refused or failed (one line says why), 2 wrong use, 130 Ctrl-C, 143 terminated; 75 a training run
was told to stop and has left a checkpoint to go on from.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from tools.options import UsageError, parse_options
from tools.terminal import Terminal
from txfm_data.address import redact
from txfm_data.config_tree import did_you_mean

__all__ = ["Terminal", "run_kinds", "run_verb", "to_jsonable"]

Options = TypeVar("Options")
OUR_PACKAGES = ("txfm_data", "shards", "txfm_model", "txfm_eval", "tools")
TRACEBACK_VARIABLE = "TXFM_TRACEBACK"


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived; a KeyboardInterrupt so that whatever cleans up after Ctrl-C cleans up here too."""


def run_verb(
    name: str,
    options_type: type[Options],
    run: Callable[[Options, Terminal], Mapping[str, object]],
    summary: Callable[[dict[str, Any]], str],
    argv: Sequence[str] | None = None,
    positionals: Sequence[str] = (),
    exit_codes: Mapping[type[Exception], int] | None = None,
) -> int:
    """Parse the command line of one verb, run it, print its result and return the exit code.

    Parameters
    ----------
    name
        The verb as typed, with its kind if it has one: `simulate`, `ingest h5ad`.
    options_type
        Frozen dataclass of the options; the text under each field is its help.
    run
        Does the work. What it and its libraries print goes to stderr.
    summary
        Makes of the result what a person reads on stdout; `--json` prints the result itself instead.
    argv
        Arguments after the verb; those of the process if None.
    positionals
        Fields that are given by position instead of by flag, in order.
    exit_codes
        Exceptions of `run` that have an exit code of their own; any other is 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        about = _about(options_type, run)
        parsed = parse_options(options_type, arguments, prog=f"txfm {name}", positionals=positionals, description=about)
    except UsageError as err:
        _print_error(f"txfm {name}: error: {err}\nRun `txfm {name} --help` for the options.")
        return 2
    except SystemExit as err:  # --help and --print_config have printed what was asked for
        return err.code if isinstance(err.code, int) else 0 if err.code is None else 1
    is_main = os.environ.get("RANK", "0") == "0"
    terminal = Terminal(name, is_quiet=not is_main)
    try:
        with _logs_to_stderr(), _signals_raise(terminal), contextlib.redirect_stdout(sys.stderr):
            try:
                result = dict(run(parsed.options, terminal))
            finally:
                terminal.close()
        if is_main:
            _print_result(result, summary, as_json=parsed.as_json)
    except KeyboardInterrupt as err:
        word, code = ("terminated", 143) if isinstance(err, Terminated) else ("interrupted", 130)
        _print_error(f"txfm {name}: {word}; nothing was left half-written")
        return code
    except BrokenPipeError:  # the reader of stdout or stderr left (`txfm info X | head -1`)
        sys.stdout = open(os.devnull, "w")
        return 1
    except tuple(exit_codes or ()) as err:
        _print_error(f"txfm {name}: {_message(err)}")
        return next(code for kind, code in (exit_codes or {}).items() if isinstance(err, kind))
    except (ValueError, TypeError, OSError) as err:
        if os.environ.get(TRACEBACK_VARIABLE):
            _print_error(traceback.format_exc().rstrip())
        _print_error(f"txfm {name}: error: {_message(err)}")
        return 1
    return 0


def run_kinds(
    name: str,
    kinds: Mapping[str, Callable[[Sequence[str] | None], int]],
    argv: Sequence[str] | None = None,
    doc: str | None = None,
) -> int:
    """Run one kind of a verb that has several (`txfm ingest h5ad`); a kind's docstring is its help line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    kind = arguments[0] if arguments else ""
    if kind in kinds:
        return kinds[kind](arguments[1:])
    lines = [f"usage: txfm {name} KIND [options]", "", (doc or "").strip().split("\n\n")[0], "", "kinds:"]
    lines += [f"  {key:<15} {_first_line(main.__doc__)}" for key, main in kinds.items()]
    lines += ["", f"Run `txfm {name} KIND --help` for the options of a kind."]
    if kind in ("-h", "--help"):
        print("\n".join(lines))
        return 0
    if not kind:
        _print_error("\n".join(lines))
    else:
        _print_error(f"txfm {name}: error: no kind {redact(kind)!r}; {did_you_mean(kind, kinds)}")
    return 2


def to_jsonable(value: object) -> Any:
    """Return `value` as JSON can hold it: NaN and infinity as null, paths as text, NumPy as numbers."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return str(Path(value))
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_jsonable(item) for item in value]
    if isinstance(value, set | frozenset):
        return [to_jsonable(item) for item in sorted(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    import numpy as np

    if isinstance(value, np.generic):
        return to_jsonable(value.item())
    if isinstance(value, np.ndarray):
        return to_jsonable(value.tolist())
    raise TypeError(f"a result cannot hold the {type(value).__name__} {value!r}; give numbers, text, lists or dicts")


def _print_result(result: dict[str, Any], summary: Callable[[dict[str, Any]], str], *, as_json: bool) -> None:
    text = json.dumps(to_jsonable(result), allow_nan=False) if as_json else summary(result)
    print(text, flush=True)


def _print_error(text: str) -> None:
    print(redact(text), file=sys.stderr, flush=True)


def _message(err: BaseException) -> str:
    """Return one line for an error: a system error as "path: reason", any other as it words itself."""
    if isinstance(err, OSError) and err.strerror and err.filename is not None:
        return f"{os.fsdecode(err.filename)}: {err.strerror}"
    return " ".join(str(err).split()) or type(err).__name__


def _about(options_type: type, run: Callable[..., object]) -> str:
    """Return the paragraph above the options: the dataclass's own docstring, or that of the verb's module."""
    own = options_type.__doc__ or ""
    written = "" if own.startswith(f"{options_type.__name__}(") else own
    text = written or sys.modules[run.__module__].__doc__ or ""
    return " ".join(text.strip().split("\n\n")[0].split())


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().split("\n")[0]


@contextlib.contextmanager
def _logs_to_stderr() -> Iterator[None]:
    """Show what libraries log: ours from INFO, others from WARNING."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    root, levels = logging.getLogger(), {}
    root.addHandler(handler)
    for package in OUR_PACKAGES:
        logger = logging.getLogger(package)
        levels[package] = logger.level
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        for package, level in levels.items():
            logging.getLogger(package).setLevel(level)


@contextlib.contextmanager
def _signals_raise(terminal: Terminal) -> Iterator[None]:
    """Make Ctrl-C, SIGTERM and SIGHUP exceptions, so that half-written files are removed; handlers of others stay.

    An exception raised while a library runs a callback of its own (h5py has many) can be swallowed there: the terminal
    remembers it and raises it again at the next progress call.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    ours = {
        number: kind
        for number, default, kind in (
            (signal.SIGINT, signal.default_int_handler, KeyboardInterrupt),
            (signal.SIGTERM, signal.SIG_DFL, Terminated),
            (
                signal.SIGHUP,
                signal.SIG_DFL,
                Terminated,
            ),  # the terminal was closed; nohup has it ignored, and so it stays
        )
        if is_main_thread and signal.getsignal(number) is default
    }

    def stop(signum: int, frame: FrameType | None) -> None:
        terminal.stopped_by = ours[signal.Signals(signum)]
        raise terminal.stopped_by

    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
