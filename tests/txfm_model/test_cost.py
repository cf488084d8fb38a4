"""Work, parameters and memory counted from the configuration are those of the model that runs; and the dry run of a run."""

from dataclasses import replace

import pytest
import torch

from shards.manifest import open_corpus
from txfm_data.vocabulary import Vocabulary
from txfm_model import cost
from txfm_model.bench.counted import count_flops
from txfm_model.config import LoopConfig, LossConfig, MaskConfig, ModelConfig, TrainConfig
from txfm_model.cost import dry_run, memory_estimate, parameter_count, skipped_flops, train_flops
from txfm_model.model import TxFM
from txfm_model.plain import PlainTxFM

BASE = ModelConfig(width=24, blocks=3, heads=3)
B, K = 4, 20
CONFIGS = {
    "each token projected": (BASE, 300),
    "the codebook projected": (BASE, 50),
    "no projection": (replace(BASE, tokens="concat"), 50),
    "one block, linear decoder": (replace(BASE, blocks=1, decoder_blocks=0), 50),
    "wide MLP, deep decoder": (replace(BASE, mlp_ratio=6, decoder_blocks=8), 50),
    "zero inflation": (replace(BASE, count_head="zinb"), 300),
}


def make_model(config: ModelConfig, n_genes: int) -> TxFM:
    genes = tuple(f"gene{i}" for i in range(n_genes))
    return TxFM(config, Vocabulary(genes, ("",) * n_genes)).train()


def backward(model: torch.nn.Module, n_genes: int, *, n_samples: int = B, n_shown: int = K, bf16: bool = False) -> None:
    ids_BK = torch.arange(n_samples * n_shown).reshape(n_samples, n_shown) % n_genes
    values_BK = torch.linspace(0, 3, n_samples * n_shown).reshape(n_samples, n_shown)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        prediction = model(ids_BK, values_BK)
    total = prediction.log1p_BG.sum()
    if prediction.zero_logits_BG is not None:
        total = total + prediction.zero_logits_BG.sum()
    total.backward()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("config", "n_genes"), CONFIGS.values(), ids=CONFIGS)
def test_flops_are_those_that_torch_counts(config, n_genes, bf16):
    model = make_model(config, n_genes)
    counted = train_flops(config, n_genes, K, B)
    assert count_flops(lambda: backward(model, n_genes, bf16=bf16)) == pytest.approx(counted.executed * B, rel=1e-12)
    plain = train_flops(config, n_genes, K, B, form="plain")
    found = count_flops(lambda: backward(PlainTxFM.of(model), n_genes, bf16=bf16))
    assert found == pytest.approx(plain.executed * B, rel=1e-12)
    assert counted.total < plain.total


def test_flops_of_activation_checkpointing():
    config = replace(BASE, stochastic_depth=0.0)
    model = make_model(config, 50)
    model.set_activation_checkpointing(True)
    counted = train_flops(config, 50, K, B, activation_checkpointing=True)
    assert count_flops(lambda: backward(model, 50)) == pytest.approx(counted.executed * B, rel=1e-12)
    assert counted.total == train_flops(config, 50, K, B).total


def test_flops_of_branches_that_are_left_out():
    """Attention and MLP of block i for a share of samples, by hand; and what is left is what torch counts without them."""
    config = replace(BASE, blocks=2, stochastic_depth=0.5)  # rates 0 and 0.5
    counted = train_flops(config, 50, K, B)
    last = counted.forward["last_block"] + counted.backward["last_block"]
    assert skipped_flops(config, counted) == pytest.approx(0.5 * last)
    three = replace(config, blocks=3)  # 0, 0.25, 0.5
    counted = train_flops(three, 50, K, B, form="plain")
    blocks = 3 * sum(counted.forward[part] for part in ("qkv", "attention", "out", "mlp"))
    assert skipped_flops(three, counted) == pytest.approx(0.25 * blocks)


def test_flops_by_hand():
    # A block on T tokens of width D: 2 T D (3 D + D + 8 D) in its layers and 4 T^2 D in attention.
    T, D = K + 1, 24
    found = train_flops(BASE, 50, K, B, form="plain")
    blocks = sum(found.forward[part] for part in ("qkv", "attention", "out", "mlp"))
    assert blocks == 3 * (24 * T * D * D + 4 * T * T * D)
    assert found.forward["head"] == 2 * D * 50
    assert found.backward == {part: 2 * flops for part, flops in found.forward.items()}


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [((384, 12, 6), 56_742_333), ((768, 12, 12), 158_561_853), ((1024, 24, 16), 402_688_317)],
)
def test_parameters_of_the_presets(shape, parameters):
    width, blocks, heads = shape
    assert parameter_count(ModelConfig(width=width, blocks=blocks, heads=heads), 44_349) == parameters


def test_parameters_are_counted_without_weights():
    for config, n_genes in CONFIGS.values():
        assert parameter_count(config, n_genes) == make_model(config, n_genes).n_parameters


def kept_bytes(model: TxFM, n_genes: int, **how) -> int:
    """Bytes that autograd keeps for the backward pass, without parameters."""
    seen: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backward(model, n_genes, **how)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(tensor.untyped_storage().nbytes() for at, tensor in seen.items() if at not in own)


@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_those_that_autograd_keeps(bf16):
    config, n_genes, shape = replace(BASE, width=48, stochastic_depth=0.0), 64, {"n_samples": 8, "n_shown": 127}
    model = make_model(config, n_genes)
    train = TrainConfig(shards="-", out="-", model=config, loop=LoopConfig(steps=1, global_batch=8))
    estimate = memory_estimate(train, n_genes, 127, precision="bf16" if bf16 else "no")["activations"]
    kept = kept_bytes(model, n_genes, bf16=bf16, **shape)
    # The estimate is of the height of the step: some of the backward pass lies on top of what is kept.
    assert kept <= estimate <= 1.35 * kept


def test_memory_by_part():
    config = TrainConfig(shards="-", out="-", model=BASE, loop=LoopConfig(steps=1, global_batch=64))
    whole = memory_estimate(config, 300, K)
    n = parameter_count(BASE, 300)
    assert (whole["weights"], whole["gradients"], whole["optimizer"], whole["buckets"]) == (4 * n, 4 * n, 8 * n, 0)
    assert whole["total"] == sum(size for part, size in whole.items() if part != "total")
    parts = memory_estimate(replace(config, loop=replace(config.loop, accumulation=4)), 300, K)
    assert parts["predictions"] * 4 == whole["predictions"]
    assert parts["activations"] < whole["activations"] / 2
    two = memory_estimate(config, 300, K, processes=2)
    assert two["buckets"] == two["gradients"]
    assert two["predictions"] * 2 == whole["predictions"]
    again = memory_estimate(replace(config, loop=replace(config.loop, activation_checkpointing=True)), 300, K)
    assert again["activations"] < whole["activations"]


def make_config(shards, out, **changes) -> TrainConfig:
    loop = LoopConfig(**{"steps": 12, "global_batch": 16, "seed": 3} | changes.pop("loop", {}))
    return TrainConfig(
        shards=str(shards), out=str(out), model=BASE, mask=MaskConfig(n_unmasked=16), loop=loop, **changes
    )


@pytest.fixture(autouse=True)
def known_rate(monkeypatch):
    monkeypatch.setattr("txfm_model.bench.matmul.matmul_rate", lambda device, precision: 1e9)


def test_a_dry_run_counts_and_writes_nothing(tiny_shards, tmp_path):
    corpus = open_corpus(tiny_shards)
    found = dry_run(make_config(tiny_shards, tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []
    G = len(corpus.vocabulary)
    assert (found["steps"], found["samples"], found["tokens"], found["genes"]) == (12, 192, 192 * 17, G)
    assert (found["train_samples"], found["val_samples"]) == (corpus.n_samples("train"), corpus.n_samples("val"))
    assert found["epochs"] == 12 / found["batches_per_epoch"]
    assert found["parameters"] == parameter_count(BASE, G)
    flops = train_flops(BASE, G, 16, 16)
    assert found["flops_per_sample"] == flops.total == sum(found["flops_by_part"].values())
    assert found["flops"] == flops.total * 192
    assert found["matmul_flops_per_s"] == 1e9
    assert found["estimated_hours"] == pytest.approx(flops.executed * 192 / (1e9 * cost.ASSUMED_SHARE) / 3600)
    assert found["memory_bytes_per_process"]["total"] > 16 * found["parameters"]


def test_a_dry_run_of_epochs_and_several_processes(tiny_shards, tmp_path, monkeypatch):
    config = make_config(tiny_shards, tmp_path, loop={"steps": None, "epochs": 3, "accumulation": 2})
    one, two = dry_run(config), dry_run(config, processes=2)
    assert one["steps"] == 3 * one["batches_per_epoch"]
    assert (one["samples_at_once"], two["samples_at_once"]) == (8, 4)
    assert two["steps"] == one["steps"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert dry_run(config)["processes"] == 2


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({"loop": {"global_batch": 16, "accumulation": 3}}, 1, "cannot be cut into 3 equal part.*15 or 18"),
        ({"loop": {"global_batch": 1}}, 1, "lanes"),
        ({}, 3, "cannot be cut|cannot share"),
        ({}, 0, "processes must be at least 1"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(tiny_shards, tmp_path, changes, processes, message):
    with pytest.raises(ValueError, match=message):
        dry_run(make_config(tiny_shards, tmp_path, **changes), processes=processes)


def test_a_dry_run_of_another_target_sum_or_no_corpus(tiny_shards, tmp_path):
    config = make_config(tiny_shards, tmp_path)
    with pytest.raises(ValueError, match=r"model\.target_sum is 10000; make them equal"):
        dry_run(replace(config, model=replace(BASE, target_sum=1e4)))
    with pytest.raises(FileNotFoundError):
        dry_run(replace(config, shards=str(tmp_path / "none")))


def test_notes_say_what_the_run_would_not_refuse(tiny_shards, tmp_path, monkeypatch):
    config = make_config(tiny_shards, tmp_path, loss=LossConfig(kind="zinb"))
    assert dry_run(config)["notes"] == []
    shown = dry_run(replace(config, mask=MaskConfig(n_unmasked=1_000)))
    assert "the smallest panel has" in shown["notes"][0]
    assert shown["genes_shown"] < 1_000
    monkeypatch.setattr(cost, "_free_memory", lambda: 1_000)
    assert "loop.accumulation" in dry_run(config)["notes"][-1]
