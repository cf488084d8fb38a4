"""Training of the fast model beside the plain one, as ratios in one run at the size of the goals (slow).

`pytest tests/bench/test_bench_train.py -m slow -s` prints them; the bounds are the goals that `txfm bench train` judges.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards.bench.corpus import DropletConfig, write_corpus
from shards.manifest import Corpus
from txfm_model.bench.machine import has_avx512_bf16
from txfm_model.bench.train import PRESETS, BenchConfig, bench_train

ROOT = Path(__file__).parents[2]
LEAST_FLOAT32, LEAST_BF16 = 1.12, 1.5


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    preset = PRESETS["cpu"]
    droplets = DropletConfig(samples=2_048, genes=20_000, lanes=8)
    folder = write_corpus(tmp_path_factory.mktemp("bench") / "shards", droplets)
    config = BenchConfig(model=preset.model, batch=8, n_unmasked=preset.n_unmasked, steps=2, rounds=5)
    result = bench_train(Corpus(folder), config)
    for row in result["rows"]:
        print(
            f"\n{row['label']:<20}{row['samples_per_s']:>8.2f} samples/s, matmul share {row['matmul_share']:.2f}",
            end="",
        )
    print()
    return {goal["name"]: goal["value"] for goal in result["goals"]}


@pytest.mark.slow
def test_the_fast_model_trains_faster_in_float32(found):
    assert found["fast_to_plain"] >= LEAST_FLOAT32


@pytest.mark.slow
@pytest.mark.skipif(not has_avx512_bf16(), reason="the CPU does not multiply bf16 itself")
def test_bf16_trains_faster_than_the_plain_float32(found):
    assert found["bf16_to_plain"] >= LEAST_BF16


@pytest.mark.slow
def test_the_fast_model_takes_less_memory(found):
    assert found["memory_float32"] < 1
    assert found["memory_bf16"] < 1


@pytest.mark.slow
def test_the_stream_keeps_up(found):
    assert found["data_wait"] <= 2


@pytest.mark.slow
def test_from_the_command_to_the_first_step_of_a_thousand_shards(tmp_path):
    """Imports, opening the corpus, the model of width 384 and its first step; the goal is 20 s."""
    config = DropletConfig(samples=32 * 1_008, block_rows=32, pool=1_024, shard_bytes=1)
    folder = write_corpus(tmp_path / "corpus", config)
    assert len(Corpus(folder).shards("train")) == 1_008
    shape = [
        "--model.width=384",
        "--model.blocks=6",
        "--model.heads=6",
        "--mask.n_unmasked=1024",
        "--loop.global_batch=16",
    ]
    command = [
        sys.executable,
        "tools/train.py",
        *shape,
        f"--shards={folder}",
        f"--out={tmp_path / 'run'}",
        "--loop.steps=1000",
    ]
    since = time.perf_counter()
    process = subprocess.Popen([*command, "--loop.log_every=1"], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        while not list(tmp_path.glob("run/metrics.jsonl")) or not (tmp_path / "run" / "metrics.jsonl").read_text():
            assert process.poll() is None
            time.sleep(0.02)
        seconds = time.perf_counter() - since
    finally:
        process.kill()
        process.wait()
    print(f"\nfirst step of 1,008 shards after {seconds:.1f} s")
    assert seconds < 20
