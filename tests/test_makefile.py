"""`make` sets up once, completes what was interrupted, and refuses an old Python. pip and venv are stood in for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tools import cli

ROOT = Path(__file__).resolve().parents[1]
RAN = "ran pytest --numprocesses 2 --dist loadfile --max-worker-restart 0"
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

PYTHON = """#!/bin/sh
# Stands in for Python: a venv is two files, an install a line in a log.
case "$*" in
  "-c "*) [ -z "$OLD" ] ;;
  "--version") echo Python 3.9.2 ;;
  "-m venv --clear .venv")
    mkdir -p .venv/bin
    cp "$0" .venv/bin/python
    printf '#!/bin/sh\\necho ran pytest "$@" >> log\\n' > .venv/bin/pytest
    printf '#!/bin/sh\\nfor word; do echo "word $word"; done >> log\\n' > .venv/bin/txfm
    chmod +x .venv/bin/* ;;
  "-m pip --version") ;;
  "-m pip install"*"--constraint constraints.txt --editable .[dask,dev,eval]")
    echo install >> log
    [ -z "$BROKEN" ] ;;
  *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def make(checkout: Path, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    outer = (
        "MAKE",
        "MFLAGS",
        "ARGS",
        "DATA",
        "ANNOTATIONS",
        "PYTHON",
    )  # make hands these to what it runs, these tests too
    clean = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    return subprocess.run(
        ["make", "PYTHON=./python", *words],
        cwd=checkout,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def log(checkout: Path) -> list[str]:
    return (checkout / "log").read_text().splitlines()


def test_the_second_time_nothing_is_installed(checkout: Path) -> None:
    for _ in range(2):
        done = make(checkout, "test")
        assert done.returncode == 0, done.stderr
    assert log(checkout) == ["install", RAN, RAN]


def test_changed_requirements_are_installed(checkout: Path) -> None:
    make(checkout, "test")
    later = (checkout / ".venv" / ".installed").stat().st_mtime + 5
    os.utime(checkout / "constraints.txt", (later, later))
    make(checkout, "test")
    assert log(checkout).count("install") == 2


def test_an_install_that_fails_is_tried_again(checkout: Path) -> None:
    assert make(checkout, "test", BROKEN="1").returncode != 0
    assert not (checkout / ".venv" / ".installed").exists()
    assert make(checkout, "test").returncode == 0
    assert log(checkout) == ["install", "install", RAN]


def test_an_old_python_is_refused(checkout: Path) -> None:
    done = make(checkout, "test", OLD="1")
    assert done.returncode != 0
    assert "error: TxFM needs Python 3.11 or newer; ./python is Python 3.9.2." in done.stderr
    assert not (checkout / ".venv").exists()


def test_quickstart_passes_files_and_options_that_exist(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(checkout, "quickstart")
    make(checkout, "quickstart", "DATA=a.h5ad b.h5ad", "ANNOTATIONS=pairs", "ARGS=--steps 3")
    expected = "quickstart --data a.h5ad b.h5ad --annotations pairs --steps 3".split()
    assert log(checkout) == ["install", "word quickstart", *[f"word {word}" for word in expected]]
    assert cli.main(["quickstart", "--help"]) == 0
    text = capsys.readouterr().out
    assert [word for word in expected if word.startswith("--") and word not in text] == []
