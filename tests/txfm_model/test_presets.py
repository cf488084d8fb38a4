"""The shipped configurations are the models of the paper, to the last parameter."""

from pathlib import Path

import pytest
import torch
import yaml

from txfm_data.vocabulary import Vocabulary
from txfm_model.config import MaskConfig, ModelConfig, config_from_dict
from txfm_model.model import TxFM

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GENES, ATLAS_GENES = 44_349, 61_888


def preset(name: str, **changes) -> ModelConfig:
    model = yaml.safe_load((CONFIGS / f"txfm_{name}.yaml").read_text())["model"]
    return config_from_dict(ModelConfig, model | changes, "model")


def model_of(config: ModelConfig, n_genes: int = GENES) -> TxFM:
    with torch.device("meta"):
        return TxFM(config, Vocabulary(tuple(f"ENSG{i:011d}" for i in range(n_genes)), ("",) * n_genes))


@pytest.mark.parametrize(
    ("name", "tokens", "n_genes", "expected"),
    [
        ("s", "concat_project", GENES, 56_742_333),
        ("b", "concat_project", GENES, 158_561_853),
        ("l", "concat_project", GENES, 402_688_317),
        ("b_atlas", "concat_project", ATLAS_GENES, 185_519_296),
        ("s", "concat", GENES, 56_697_600),
        ("b", "concat", GENES, 158_516_736),
        ("l", "concat", GENES, 402_642_944),
        ("b_atlas", "concat", ATLAS_GENES, 185_456_640),
    ],
)
def test_number_of_parameters(name, tokens, n_genes, expected):
    assert model_of(preset(name, tokens=tokens), n_genes).n_parameters == expected


def test_six_blocks_are_not_the_small_model():
    assert model_of(preset("s", blocks=6)).n_parameters == 46_090_941
    assert model_of(preset("s", blocks=6, tokens="concat")).n_parameters == 46_046_208


def test_parameters_of_count_heads():
    plain = model_of(preset("b")).n_parameters
    assert model_of(preset("b", count_head="nb")).n_parameters - plain == GENES
    zinb = model_of(preset("b", count_head="zinb"))
    assert sum(p.numel() for p in zinb.head.zero_inflation.parameters()) == 34_104_381
    assert zinb.n_parameters - plain == GENES + 34_104_381


def test_each_part_of_the_base_model():
    model = model_of(preset("b"))

    def count(part) -> int:
        return sum(parameter.numel() for parameter in part.parameters())

    assert model.tokens.codebook.numel() == 34_060_032
    assert model.encoder.cls.numel() == 768
    assert count(model.tokens.projection) == 591_360
    block = model.encoder.blocks[0]
    parts = [count(p) for p in (block.attention.qkv, block.attention.out, block.mlp[0], block.mlp[2])]
    assert parts == [1_771_776, 590_592, 2_362_368, 2_360_064]
    assert count(block.attention_norm) + count(block.mlp_norm) == 3_072
    assert count(block.attention_scale) + count(block.mlp_scale) == 1_536
    assert [count(b) for b in model.encoder.blocks] == [7_089_408] * 12
    assert count(model.encoder.norm) == 1_536
    assert [count(b) for b in model.decoder.blocks] == [1_182_720] * 4
    assert (model.head.weight.numel(), model.head.bias.numel()) == (34_060_032, 44_349)


@pytest.mark.parametrize("decoder_blocks", [0, 1, 8])
def test_depths_of_the_decoder(decoder_blocks):
    four = model_of(preset("b")).n_parameters
    assert model_of(preset("b", decoder_blocks=decoder_blocks)).n_parameters - four == (decoder_blocks - 4) * 1_182_720


def test_every_head_is_64_wide_in_the_paper_and_here():
    for name in ("s", "b", "l", "b_atlas", "tiny"):
        config = preset(name)
        assert config.width / config.heads == 64
        assert config.tokens == "concat_project"
        assert config.decoder_blocks == 4


@pytest.mark.parametrize(("panel", "hidden"), [(8_248, 0.751697), (36_695, 0.944189)])
def test_share_of_genes_that_the_base_model_does_not_see(panel, hidden):
    mask = yaml.safe_load((CONFIGS / "txfm_b.yaml").read_text()).get("mask", {})
    assert 1 - config_from_dict(MaskConfig, mask, "mask").n_unmasked / panel == pytest.approx(hidden, abs=5e-7)
