"""Lines of metrics: what a resumed run keeps, and that a disk that refuses them does not end a run."""

import json
import logging

import pytest

from txfm_model import metrics
from txfm_model.metrics import METRICS, MetricsWriter


@pytest.fixture(autouse=True)
def without_tensorboard(monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)


def steps_in(folder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / METRICS).read_text().splitlines()]


def test_a_resumed_run_keeps_what_it_goes_on_from(tmp_path):
    for after_step, expected in ((None, [1, 2, 3]), (2, [1, 2, 3]), (0, [3])):
        with MetricsWriter(tmp_path, after_step) as writer:
            for step in (3,) if after_step is not None else (1, 2, 3):
                writer.write("train", step, 0.5, {"loss": 1.0, "nothing": None})
        assert steps_in(tmp_path) == expected


def test_values_by_name(tmp_path, monkeypatch):
    monkeypatch.undo()  # with TensorBoard
    with MetricsWriter(tmp_path) as writer:
        writer.write("val", 3, 0.5, {"excess_by_dataset": {"blood": 1.5, "lung": None}})
    assert json.loads((tmp_path / METRICS).read_text())["excess_by_dataset"] == {"blood": 1.5, "lung": None}
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


class FullDisk:
    """A text file in front of a disk that is full for a while: what it cannot write it holds."""

    def __init__(self, file) -> None:
        self.file, self.is_full = file, True

    def write(self, text: str) -> int:
        return self.file.write(text)

    def flush(self) -> None:
        if self.is_full:
            raise OSError(28, "No space left on device")
        self.file.flush()

    def close(self) -> None:
        self.flush()
        self.file.close()


def test_a_full_disk_delays_lines_and_ends_nothing(tmp_path, caplog):
    with caplog.at_level(logging.ERROR), MetricsWriter(tmp_path) as writer:
        writer._file = full = FullDisk(writer._file)
        writer.write("train", 1, 0.5, {"loss": 1.0})
        assert "step 1 was not written" in caplog.text and "No space left" in caplog.text
        full.is_full = False
        writer.write("train", 2, 0.5, {"loss": 1.0})
        assert steps_in(tmp_path) == [1, 2]
    caplog.clear()
    with caplog.at_level(logging.ERROR), MetricsWriter(tmp_path) as writer:
        writer._file = full = FullDisk(writer._file)
        writer.write("train", 1, 0.5, {"loss": 1.0})
    assert "last lines were not written" in caplog.text
    full.file.close()


def test_the_systems_own_full_disk_gives_the_error_that_is_caught(tmp_path, caplog):
    with caplog.at_level(logging.ERROR), MetricsWriter(tmp_path) as writer:
        writer._file.close()
        writer._file = open("/dev/full", "a")
        for step in (1, 2):
            writer.write("train", step, 0.5, {"loss": 1.0})
    assert [record.args[1] for record in caplog.records[:2]] == [1, 2]
    assert "last lines were not written" in caplog.text


def test_tensorboard_that_cannot_write_is_left_out(tmp_path, caplog):
    class Events:
        def add_scalar(self, name, value, step):
            raise OSError(28, "No space left on device")

    with caplog.at_level(logging.ERROR), MetricsWriter(tmp_path) as writer:
        writer._events = Events()
        for step in (1, 2):
            writer.write("val", step, 0.5, {"loss": 1.0})
    assert caplog.text.count("TensorBoard gets nothing more") == 1
    assert steps_in(tmp_path) == [1, 2]


def test_what_is_no_number_is_still_an_error(tmp_path):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="JSON"):
        writer.write("train", 1, 0.5, {"loss": float("nan")})
