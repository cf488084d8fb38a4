"""The network: its size, and that the ways it saves work do not change its results."""

import pytest
import torch
import torch.nn.functional as F

from txfm_data.vocabulary import Vocabulary
from txfm_model.config import ModelConfig
from txfm_model.encoder import Block
from txfm_model.model import TxFM
from txfm_model.stochastic_depth import stochastic_depth_rates
from txfm_model.tokens import GeneTokens


@pytest.fixture(scope="module")
def paper_vocabulary() -> Vocabulary:
    return Vocabulary(tuple(f"ENSG{i:011d}" for i in range(44_349)), ("",) * 44_349)


@pytest.mark.parametrize(
    ("tokens", "width", "blocks", "heads", "expected"),
    [
        ("concat_project", 384, 12, 6, 56_742_333),
        ("concat_project", 768, 12, 12, 158_561_853),
        ("concat_project", 1024, 24, 16, 402_688_317),
        ("concat", 384, 12, 6, 56_697_600),
        ("concat", 768, 12, 12, 158_516_736),
        ("concat", 1024, 24, 16, 402_642_944),
    ],
)
def test_number_of_parameters(paper_vocabulary, tokens, width, blocks, heads, expected):
    config = ModelConfig(width=width, blocks=blocks, heads=heads, tokens=tokens)
    with torch.device("meta"):
        assert TxFM(config, paper_vocabulary).n_parameters == expected


@pytest.mark.parametrize("tokens", ["concat_project", "concat"])
@pytest.mark.parametrize("decoder_blocks", [0, 4])
def test_shapes_and_range(vocabulary, make_batch, tokens, decoder_blocks):
    config = ModelConfig(width=16, blocks=2, heads=4, tokens=tokens, decoder_blocks=decoder_blocks)
    batch, _ = make_batch(0)
    model = TxFM(config, vocabulary)
    predicted_BG = model(batch.gene_ids, batch.values, batch.n_unmasked).log1p_BG
    assert predicted_BG.shape == (6, 40)
    assert predicted_BG.dtype == torch.float32
    assert (predicted_BG >= 0).all()
    assert model.encode(batch.gene_ids, batch.values, batch.n_unmasked).shape == (6, 16)


def test_evaluation_is_deterministic_and_training_is_not(vocabulary, make_batch):
    batch, _ = make_batch(0)
    model = TxFM(ModelConfig(width=16, blocks=3, heads=2, layerscale_init=1.0, stochastic_depth=0.5), vocabulary)
    model.eval()
    first, again = (model(batch.gene_ids, batch.values).log1p_BG for _ in range(2))
    assert torch.equal(first, again)
    model.train()
    torch.manual_seed(0)
    first, again = (model(batch.gene_ids, batch.values).log1p_BG for _ in range(2))
    assert not torch.equal(first, again)


def test_padding_changes_nothing(tiny_model, make_batch):
    batch, _ = make_batch(0)
    ids, values = batch.gene_ids[:, :5], batch.values[:, :5]
    plain = tiny_model.encode(ids, values)
    padded_ids, padded_values = F.pad(ids, (0, 3)), F.pad(values, (0, 3))
    n_unmasked = torch.full((6,), 5, dtype=torch.int32)
    torch.testing.assert_close(tiny_model.encode(padded_ids, padded_values, n_unmasked), plain, rtol=1e-5, atol=1e-6)
    garbage_values = padded_values.clone()
    garbage_values[:, 5:] = 1e3
    torch.testing.assert_close(tiny_model.encode(padded_ids, garbage_values, n_unmasked), plain, rtol=1e-5, atol=1e-6)


def test_a_padded_sample_leaves_the_others_alone(tiny_model, make_batch):
    batch, _ = make_batch(0)
    n_unmasked = torch.full((6,), 8, dtype=torch.int32)
    n_unmasked[2] = 3
    mixed = tiny_model.encode(batch.gene_ids, batch.values, n_unmasked)
    plain = tiny_model.encode(batch.gene_ids, batch.values)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(mixed[others], plain[others], rtol=1e-5, atol=1e-6)
    short = tiny_model.encode(batch.gene_ids[2:3, :3], batch.values[2:3, :3])
    torch.testing.assert_close(mixed[2:3], short, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(mixed[2], plain[2], atol=1e-4)


def test_a_sample_with_nothing_shown_is_its_cls(tiny_model):
    ids, values = torch.zeros(2, 4, dtype=torch.int64), torch.rand(2, 4)
    out = tiny_model.encode(ids, values, torch.tensor([0, 0]))
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[0], out[1])


def test_genes_are_a_set(tiny_model, make_batch):
    batch, _ = make_batch(3)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    plain = tiny_model.encode(batch.gene_ids, batch.values)
    torch.testing.assert_close(tiny_model.encode(batch.gene_ids[:, order], batch.values[:, order]), plain)


@pytest.mark.parametrize("padded", [False, True])
def test_the_last_block_for_cls_alone_equals_the_whole_block(tiny_config, padded):
    torch.manual_seed(0)
    block = Block(tiny_config)
    x_BTD = torch.randn(3, 9, 16)
    visible = (torch.arange(9) < 6).expand(3, 1, 1, 9) if padded else None
    torch.testing.assert_close(block(x_BTD, visible, 1), block(x_BTD, visible, 9)[:, :1])


def test_attention_equals_the_plain_formula(tiny_config):
    torch.manual_seed(0)
    attention = Block(tiny_config).attention
    x_BTD = torch.randn(2, 5, 16)
    q, k, v = F.linear(x_BTD, attention.qkv.weight, attention.qkv.bias).split(16, dim=-1)
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        weight = torch.softmax(q[..., head] @ k[..., head].transpose(1, 2) / 8**0.5, dim=-1)
        heads.append(weight @ v[..., head])
    expected = attention.out(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(x_BTD, None, 5), expected, rtol=1e-5, atol=1e-6)


def test_projecting_the_codebook_before_the_lookup_equals_projecting_each_token(tiny_config, make_batch):
    torch.manual_seed(0)
    tokens = GeneTokens(40, tiny_config)
    torch.nn.init.normal_(tokens.codebook)
    batch, _ = make_batch(0)  # 48 tokens, 40 genes: the table is projected first
    ids, values = batch.gene_ids, batch.values
    rows = torch.cat([tokens.codebook[ids], values[..., None]], dim=-1)
    torch.testing.assert_close(tokens(ids, values), tokens.projection(rows), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens(ids[:2], values[:2]), tokens.projection(rows)[:2], rtol=1e-5, atol=1e-5)


def test_stochastic_depth_rates():
    assert stochastic_depth_rates(12, 0.1)[:3] == pytest.approx([0, 0.009091, 0.018182], abs=1e-6)
    assert stochastic_depth_rates(12, 0.1)[11] == pytest.approx(0.1)
    large = stochastic_depth_rates(24, 0.3)
    assert [large[i] for i in (0, 1, 12, 23)] == pytest.approx([0, 0.013043, 0.156522, 0.3], abs=1e-6)
    assert stochastic_depth_rates(1, 0.3) == [0.0]


def test_bf16_autocast_gives_float32_close_to_float32(tiny_model, make_batch):
    batch, _ = make_batch(0)
    plain = tiny_model(batch.gene_ids, batch.values).log1p_BG
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tiny_model(batch.gene_ids, batch.values).log1p_BG
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, plain, rtol=0.02, atol=0.02)


def test_an_empty_vocabulary_is_refused(tiny_config):
    with pytest.raises(ValueError, match="no genes"):
        TxFM(tiny_config, Vocabulary((), ()))
