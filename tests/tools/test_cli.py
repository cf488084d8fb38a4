"""The `txfm` command itself: its list of verbs, its speed, and that it is found from a checkout too."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import cli

ROOT = Path(__file__).resolve().parents[2]


def run(*argv: str, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert cli.main([flag]) == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == ""
    for verb, line in cli.VERBS.items():
        assert f"  {verb:<11} {line}\n" in stdout
    assert max(map(len, stdout.splitlines())) <= 110


def test_nothing_asked_for_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith("usage: txfm VERB")


def test_an_unknown_verb_is_refused_with_the_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulat", "x"]) == 2
    assert capsys.readouterr() == ("", "txfm: error: no verb 'simulat'; did you mean simulate or impute?\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("txfm ")


def test_every_verb_has_its_import() -> None:
    tree = ast.parse((ROOT / "tools" / "cli.py").read_text())
    cases = [
        case.pattern.value.value
        for match in ast.walk(tree)
        if isinstance(match, ast.Match)
        for case in match.cases
        if isinstance(case.pattern, ast.MatchValue) and isinstance(case.pattern.value, ast.Constant)
    ]
    assert cases == list(cli.VERBS)
    with pytest.raises(ValueError, match="has no import"):
        cli._main_of("nothing")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_each_verb_answers_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: txfm {verb} ")


@pytest.mark.parametrize("verb", ["cli", "simulate"])
def test_a_verb_runs_as_a_file_of_a_checkout(verb: str, tmp_path: Path) -> None:
    done = run("-E", str(ROOT / "tools" / f"{verb}.py"), "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: txfm ")


def test_help_imports_next_to_nothing() -> None:
    script = "import sys; from tools.cli import main; main(['--help']); print(*sorted(sys.modules))"
    modules = set(run("-c", script).stdout.splitlines()[-1].split())
    heavy = {"numpy", "torch", "pyarrow", "yaml", "jsonargparse", "txfm_data", "tools.runner"}
    assert modules & heavy == set()


def test_help_answers_within_twice_an_import_of_numpy() -> None:
    def seconds(*argv: str) -> float:
        start = time.perf_counter()
        assert run(*argv).returncode == 0
        return time.perf_counter() - start

    # Other work on the machine slows a run, nothing speeds it up: so the fastest of three stands for each.
    help_s = min(seconds("-m", "tools.cli", "--help") for _ in range(3))
    numpy_s = min(seconds("-c", "import numpy") for _ in range(3))
    assert help_s <= 2 * numpy_s + 0.5
