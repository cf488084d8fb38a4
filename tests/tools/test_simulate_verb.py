"""`txfm simulate`: result on stdout, refusals, and Ctrl-C."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import simulate

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--cells",
    "400",
    "--bulk-samples",
    "40",
    "--genes",
    "400",
    "--programs",
    "24",
    "--perturbations",
    "6",
]


def test_table_says_that_the_corpus_is_simulated(tmp_path, capsys):
    assert simulate.main([str(tmp_path / "sim"), "--seed", "2", *SMALL]) == 0
    shown = capsys.readouterr()
    assert "Simulated corpus (no real data)" in shown.out
    assert "sim_lung" in shown.out
    assert "hold out of training" in shown.out
    assert "440/440 samples" in shown.err
    assert json.loads((tmp_path / "sim" / "truth.json").read_text())["config"]["seed"] == 2


def test_json_is_one_object(tmp_path, capsys):
    assert simulate.main(["--json", str(tmp_path / "sim"), *SMALL]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [d["n_obs"] for d in result["datasets"]] == [120, 80, 80, 120, 40]
    assert all(Path(d["path"]).is_file() for d in result["datasets"])
    assert all(Path(p).is_file() for p in result["relationships"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "OUT"),
        (["{out}", "--genes", "10"], 2, "genes must be between"),
        (["{out}", "--cell", "10"], 2, "--cells"),
        (["{full}"], 1, "is not empty"),
    ],
)
def test_refusals(tmp_path, capsys, arguments, code, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    filled = [a.format(out=tmp_path / "out", full=tmp_path / "full") for a in arguments]
    assert simulate.main(filled) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_ctrl_c_leaves_nothing(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "tools" / "simulate.py"),
        str(tmp_path / "sim"),
        "--cells",
        "2000000",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not list(tmp_path.rglob("sim_blood.h5ad")) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
