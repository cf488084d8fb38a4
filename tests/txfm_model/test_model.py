"""The network: what goes in, what comes out, and what does not change it."""

import pytest
import torch
import torch.nn.functional as F

from txfm_data.vocabulary import Vocabulary
from txfm_model.config import ModelConfig
from txfm_model.encoder import Block
from txfm_model.model import TxFM


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


def test_attention_equals_the_plain_formula(tiny_config):
    torch.manual_seed(0)
    block = Block(tiny_config)
    attention = block.attention
    x_BTD = torch.randn(2, 5, 16)
    q, k, v = F.linear(x_BTD, attention.qkv.weight, attention.qkv.bias).split(16, dim=-1)
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        weight = torch.softmax(q[..., head] @ k[..., head].transpose(1, 2) / 8**0.5, dim=-1)
        heads.append(weight @ v[..., head])
    expected = attention.out(torch.cat(heads, dim=-1)) * block.attention_scale.gamma
    torch.testing.assert_close(attention(x_BTD, None, 5, block.attention_scale), expected, rtol=1e-5, atol=1e-6)


def test_an_empty_vocabulary_is_refused(tiny_config):
    with pytest.raises(ValueError, match="no genes"):
        TxFM(tiny_config, Vocabulary((), ()))


@pytest.mark.parametrize("activation", ["rect_tanh", "relu", "clamped_relu", "softmax"])
@pytest.mark.parametrize("count_head", ["none", "nb", "zinb"])
def test_what_is_predicted(vocabulary, make_batch, activation, count_head):
    batch, panels_NG = make_batch(0)
    model = TxFM(ModelConfig(width=16, blocks=2, heads=4, activation=activation, count_head=count_head), vocabulary)
    measured_BG = panels_NG[batch.panel_id]
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model(batch.gene_ids, batch.values, measured_BG=measured_BG)
    log1p_BG, log_dispersion_G, zero_logits_BG = prediction
    assert (log1p_BG.shape, log1p_BG.dtype) == ((6, 40), torch.float32)
    assert (log1p_BG >= 0).all()
    if activation == "softmax":
        torch.testing.assert_close(log1p_BG.expm1().sum(1), torch.full((6,), 1e5))
        assert not log1p_BG[~measured_BG].any()
    assert (log_dispersion_G is None) == (count_head == "none")
    assert (zero_logits_BG is None) == (count_head != "zinb")
    if zero_logits_BG is not None:
        assert (zero_logits_BG.shape, zero_logits_BG.dtype) == ((6, 40), torch.float32)
    if log_dispersion_G is not None:
        assert torch.equal(log_dispersion_G, model.head.log_dispersion)
        # The memory of a parameter may be gone after the forward pass of sharded training.
        assert log_dispersion_G.data_ptr() != model.head.log_dispersion.data_ptr()


def test_decoding_an_embedding_is_the_forward_pass(tiny_model, make_batch):
    batch, _ = make_batch(0)
    cls_BD = tiny_model.encode(batch.gene_ids, batch.values)
    with torch.autocast("cpu", torch.bfloat16):
        decoded = tiny_model.decode(cls_BD)
    assert torch.equal(decoded.log1p_BG, tiny_model(batch.gene_ids, batch.values).log1p_BG)


@pytest.mark.parametrize("tokens", ["concat_project", "concat"])
def test_the_state_after_each_layer(vocabulary, make_batch, tokens):
    batch, _ = make_batch(0)
    config = ModelConfig(width=16, blocks=3, heads=2, layerscale_init=0.5, decoder_blocks=2, tokens=tokens)
    model = TxFM(config, vocabulary).eval()
    shown = batch.gene_ids, batch.values, batch.n_unmasked
    x_BTD = torch.cat([model.encoder.cls.expand(6, 1, -1), model.tokens(*shown[:2])], dim=1)
    expected = [x_BTD[:, 0]]
    for block in model.encoder.blocks:
        x_BTD = block(x_BTD, None, x_BTD.shape[1])
        expected.append(x_BTD[:, 0])
    cls_BD = model.encoder.norm(expected[-1])
    x_BD = cls_BD if model.decoder.bridge is None else model.decoder.bridge(cls_BD)
    for decoder_block in model.decoder.blocks:
        x_BD = decoder_block(x_BD)
        expected.append(x_BD)
    for layer, state_BD in enumerate(expected):
        found = model.encode(*shown, layer=layer)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, state_BD)
    for layer in (None, "final"):
        torch.testing.assert_close(model.encode(*shown, layer=layer), cls_BD)
    assert torch.equal(model.head(x_BD, cls_BD).log1p_BG, model.decode(cls_BD).log1p_BG)


@pytest.mark.parametrize("layer", [-1, 8, "last", 1.0])
def test_a_layer_that_is_not_there_is_refused(tiny_model, layer):
    with pytest.raises(ValueError, match=r"take 0 \(the CLS parameter\) to 3 for its encoder, 4 to 7 for its decoder"):
        tiny_model.encode(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2), layer=layer)
