"""Processes, threads and precision are what was asked for, or it is said."""

import logging

import pytest
import torch

from txfm_model import launch
from txfm_model.config import LoopConfig
from txfm_model.launch import choose_cpu_threads, choose_precision, expected_processes, start_accelerator

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize(
    ("asked", "environ", "expected"),
    [
        (None, {}, None),
        (None, LAUNCHED, None),
        (4, {}, 4),
        (4, {"WORLD_SIZE": "2"}, 4),
        (None, {"WORLD_SIZE": "2"}, 2),
        (None, {"OMPI_COMM_WORLD_SIZE": "3"}, 3),
        # what `accelerate launch --cpu --num_processes 2` leaves: one process, an address that nobody answers
        (None, LAUNCHED | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, 2),
        (None, {"MASTER_ADDR": "127.0.0.1"}, None),
    ],
)
def test_expected_processes(asked, environ, expected):
    assert expected_processes(LoopConfig(num_processes_expected=asked), environ) == expected


def test_fewer_processes_than_expected_give_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        accelerator = start_accelerator(LoopConfig(num_processes_expected=3))
    assert accelerator.num_processes == 1
    assert "runs in 1 process(es), not in the 3 that were asked for" in caplog.text
    assert "accelerate launch --multi_gpu --num_processes 2" in caplog.text
    caplog.clear()
    start_accelerator(LoopConfig(num_processes_expected=1))
    assert not caplog.text


def test_cpu_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(launch.sys, "platform", "other")
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 8)
    loop = LoopConfig()
    assert choose_cpu_threads(loop, 1, "cpu", {}) is None
    assert choose_cpu_threads(loop, 1, "cpu", LAUNCHED) == 8
    assert choose_cpu_threads(loop, 2, "cpu", {}) == 4
    assert choose_cpu_threads(loop, 4, "cpu", {"LOCAL_WORLD_SIZE": "2"}) == 4  # two machines
    assert choose_cpu_threads(loop, 16, "cpu", {}) == 1
    assert choose_cpu_threads(loop, 2, "cuda", {}) is None
    assert choose_cpu_threads(LoopConfig(cpu_threads=3), 2, "cpu", {}) == 3


def test_precision():
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu, {}) == "no"
    assert choose_precision("auto", cpu, {"ACCELERATE_MIXED_PRECISION": "bf16"}) == "bf16"
    assert choose_precision("no", cpu, {"ACCELERATE_MIXED_PRECISION": "bf16"}) == "no"
    assert choose_precision("bf16", cpu, {}) == "bf16"
    with pytest.raises(ValueError, match="mixed precision 'fp16'"):
        choose_precision("auto", cpu, {"ACCELERATE_MIXED_PRECISION": "fp16"})
