"""What `txfm bench train` is made of: variants that compute the same, rows that train, goals, memory in a process of its own."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shards.bench.corpus import DropletConfig, write_corpus
from shards.manifest import Corpus
from txfm_data.config_tree import from_tree
from txfm_model.bench.fresh import Request, train_afresh
from txfm_model.bench.goals import Measured, Setting, goals, paired
from txfm_model.bench.machine import describe_machine
from txfm_model.bench.matmul import matmul_rate
from txfm_model.bench.rows import ROWS, Feed, Row, Trainee
from txfm_model.bench.train import PRESETS, BenchConfig, bench_train
from txfm_model.bench.variants import SAVINGS, VARIANTS
from txfm_model.config import LoopConfig, MaskConfig, ModelConfig, TrainConfig, config_to_dict
from txfm_model.cost import memory_estimate
from txfm_model.plain import plain_name

CONFIG = ModelConfig(width=24, blocks=3, heads=3, layerscale_init=0.5, stochastic_depth=0.3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    droplets = DropletConfig(samples=64, genes=300, block_rows=8, lanes=8, pool=64)
    return write_corpus(tmp_path_factory.mktemp("bench") / "shards", droplets)


@pytest.fixture(scope="module")
def feed(folder):
    found = Feed(Corpus(folder), batch=8, n_unmasked=40, seed=0, device=CPU)
    yield found
    found.close()


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_have_the_loss_and_the_gradients_of_the_model(feed, variant):
    batch = feed.next()
    fast = Trainee(Row(variant="fast"), CONFIG, feed, seed=1)
    other = Trainee(Row(variant=variant), CONFIG, feed, seed=1)
    assert other.backward(batch) == pytest.approx(float(fast.backward(batch)), rel=1e-5)
    gradients = dict(other.module.named_parameters())
    for name, parameter in fast.module.named_parameters():
        own = {"plain": plain_name(name)}.get(variant, name)
        wrapped = own.replace("tokens.", "tokens.tokens.", 1) if variant == "gathered" else own
        wrapped = wrapped.replace("encoder.", "encoder.encoder.", 1) if variant == "last_block" else wrapped
        torch.testing.assert_close(gradients[wrapped].grad, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["plain_float32", "fast_float32", "fast_bf16", "unfused_float32"])
def test_rows_train(feed, name):
    trainee = Trainee(ROWS[name], replace(CONFIG, head_init="zero"), feed, seed=0)
    batch = feed.next()
    losses = [float(trainee.step(batch)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert all(parameter.grad is None for parameter in trainee.module.parameters())


def test_rows_have_names_of_their_own():
    assert len(ROWS) == 4 * len(VARIANTS)
    assert ROWS["fast_bf16_compiled"] == Row(variant="fast", precision="bf16", is_compiled=True)
    assert len({row.label for row in ROWS.values()}) == len(ROWS)


def test_the_feed_goes_on_with_the_next_epoch(folder):
    found = Feed(Corpus(folder), batch=32, n_unmasked=40, seed=0, device=CPU)
    assert [(batch.epoch, batch.number) for batch in (found.next() for _ in range(4))] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert found.wait_s > 0
    found.close()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_matmul_rate_is_measured(precision):
    assert 1e8 < matmul_rate(CPU, precision, seconds=0.01) < 1e15


def test_the_presets_are_those_of_the_configurations():
    yaml = pytest.importorskip("yaml")
    for name, preset in PRESETS.items():
        path = Path(__file__).resolve().parents[2] / "configs" / f"txfm_{name}.yaml"
        if name != "cpu":
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
            assert from_tree(ModelConfig, tree["model"]) == preset.model
            assert from_tree(MaskConfig, tree.get("mask", {})).n_unmasked == preset.n_unmasked


def test_all_is_measured_in_one_run(folder):
    config = BenchConfig(
        model=CONFIG, batch=8, n_unmasked=40, steps=1, rounds=2, precisions=("no",), without=SAVINGS, measures_memory=False,
        threads=1,
    )  # fmt: skip
    before = torch.get_num_threads()
    found = bench_train(Corpus(folder), config)
    assert torch.get_num_threads() == before
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [f"{name}_float32" for name in VARIANTS]
    for row in rows.values():
        # Torch counts what is executed, and what is counted from the configuration is the same.
        assert row["flops_per_sample_by_torch"] == pytest.approx(row["flops_executed_per_sample"], rel=1e-12)
        assert len(row["rounds"]) == 2
        assert row["tokens_per_s"] == 41 * row["samples_per_s"]
        assert row["matmul_share"] == pytest.approx(row["flops_per_s"] / found["matmul"]["no"])
        assert 0 <= row["data_wait_share"] <= 1
        assert row["peak_bytes"] is None and row["why"] == ""
    savings = {saving["name"]: saving for saving in found["savings"]}
    assert set(savings) == set(rows) - {"plain_float32", "fast_float32"}
    assert savings["last_block_float32"]["work"] > 1.2
    assert savings["unfused_float32"]["work"] == 1


def test_a_row_that_does_not_run_says_why(folder, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory\nand more")

    monkeypatch.setattr("txfm_model.plain.PlainTxFM.of", full)
    config = BenchConfig(
        model=CONFIG, batch=8, n_unmasked=40, steps=1, rounds=1, precisions=("no",), measures_memory=False, threads=1
    )
    found = bench_train(Corpus(folder), config)
    plain, fast = found["rows"]
    assert (plain["samples_per_s"], plain["why"]) == (None, "out of memory")
    assert fast["samples_per_s"] > 0
    assert found["goals"][0]["why"] == "out of memory"


def test_savings_that_there_are_not():
    with pytest.raises(ValueError, match="last_block, gathered"):
        BenchConfig(model=CONFIG, batch=8, n_unmasked=40, without=("nothing",))


def make_request(folder: Path, **changes) -> Request:
    model = config_to_dict(ModelConfig(width=128, blocks=6, heads=2))
    plain = {"shards": str(folder), "model": model, "row": "fast_float32", "batch": 32, "n_unmasked": 255, "seed": 0}
    return Request(**plain | {"device": "cpu", "threads": 1} | changes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_in_a_process_of_its_own_is_as_estimated(folder):
    found = train_afresh(make_request(folder)).peak_bytes
    loop = LoopConfig(steps=1, global_batch=32)
    config = TrainConfig(shards="-", out="-", model=ModelConfig(width=128, blocks=6, heads=2), loop=loop)
    estimate = memory_estimate(config, 300, 255)["total"]
    print(f"\npeak {found / 1e6:,.0f} MB, estimated {estimate / 1e6:,.0f} MB")
    assert estimate / 1.4 < found < 1.4 * estimate


def test_a_process_that_fails_says_why(folder):
    with pytest.raises(ValueError, match="nothing: its steps in a process of their own failed: KeyError: 'nothing'"):
        train_afresh(make_request(folder, row="nothing"))


def measured(*rates: float, peak: int | None = 100, share: float = 0.5, wait: float = 0.0) -> Measured:
    return Measured(samples_per_s=rates, matmul_share=share, wait_share=wait, peak_bytes=peak)


ON_CPU = Setting(is_goal_model=True, is_base_model=False, has_bf16=True, gpu="")


def verdicts(rows, missing=None, setting=ON_CPU):
    return {goal.name: goal for goal in goals(rows, missing or {}, setting)}


def test_goals_on_a_cpu():
    rows = {
        "plain_float32": measured(1.0, 2.0, 4.0), "fast_float32": measured(1.2, 2.2, 5.2, peak=80),
        "plain_bf16": measured(1, 1, 1), "fast_bf16": measured(1.4, 3.2, 6.4, wait=0.03),
    }  # fmt: skip
    found = verdicts(rows)
    assert found["fast_to_plain"].value == pytest.approx(1.2) and found["fast_to_plain"].is_met
    assert found["bf16_to_plain"].value == pytest.approx(1.6) and found["bf16_to_plain"].is_met
    assert found["memory_float32"].value == 0.8 and found["memory_float32"].is_met
    assert found["memory_bf16"].is_met is False
    assert found["data_wait"].value == 3 and found["data_wait"].is_met is False
    assert found["gpu_rate"].value is None and found["gpu_rate"].why == "no H100 or H200"


def test_goals_that_are_not_for_this_machine_or_model():
    rows = {"plain_float32": measured(1), "fast_float32": measured(1), "fast_bf16": measured(1)}
    for setting in (replace(ON_CPU, is_goal_model=False), replace(ON_CPU, has_bf16=False)):
        found = verdicts(rows, setting=setting)["bf16_to_plain"]
        assert found.value == 1 and found.is_met is None and "for a CPU" in found.why
    assert verdicts(rows, setting=replace(ON_CPU, has_bf16=False))["fast_to_plain"].is_met is False
    lacking = verdicts({"fast_float32": measured(1, peak=None)}, {"plain_float32": "out of memory"})
    assert lacking["fast_to_plain"].why == lacking["memory_float32"].why == "out of memory"
    assert lacking["bf16_to_plain"].why == "it was not run"


def test_goals_on_a_gpu():
    gpu = Setting(is_goal_model=False, is_base_model=True, has_bf16=True, gpu="NVIDIA H200")
    rows = {"fast_bf16": measured(250, share=0.44), "fast_bf16_compiled": measured(300, share=0.5)}
    found = verdicts(rows, setting=gpu)
    assert (found["gpu_rate"].value, found["gpu_rate"].is_met) == (300, True)
    assert (found["gpu_share"].value, found["gpu_share"].is_met) == (50, True)
    other = verdicts(rows, setting=replace(gpu, gpu="NVIDIA A100"))
    assert other["gpu_rate"].value == 300 and other["gpu_rate"].is_met is None
    small = verdicts(rows, setting=replace(gpu, is_base_model=False))
    assert small["gpu_rate"].value is None and small["gpu_rate"].why == "for TxFM-B, K 2,048"
    full = verdicts({}, {"fast_bf16": "out of memory"}, gpu)
    assert full["gpu_share"].why == "out of memory"


def test_ratios_are_of_the_same_round():
    assert paired((2, 20, 3), (1, 10, 3)) == 2


def test_a_machine_is_described():
    found = describe_machine(CPU)
    assert found["gpu"] == "" and found["torch"] == torch.__version__ and found["cores"] >= 1
