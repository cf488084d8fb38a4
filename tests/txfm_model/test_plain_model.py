"""The fast model against the straightforward one: the same loss and gradients, each with the work that it saves."""

import dataclasses

import numpy as np
import pytest
import torch

from txfm_model.config import LossConfig, ModelConfig, OptimConfig
from txfm_model.encoder import Block
from txfm_model.losses import Loss, measured_mask
from txfm_model.model import TxFM
from txfm_model.optimizer import make_optimizer
from txfm_model.plain import PlainTxFM, plain_loss, plain_name
from txfm_model.prediction import Prediction
from txfm_model.stochastic_depth import branch_scales
from txfm_model.tokens import GeneTokens

ACTIVATIONS = ("rect_tanh", "relu", "clamped_relu", "softmax")
KINDS = ("poisson", "mse", "smooth_l1", "nb", "zinb")


def random_case(seed: int, vocabulary, make_batch):
    """A configuration, a model of it away from its start, a loss and a batch; 20 seeds meet every loss and activation."""
    rng = np.random.default_rng(seed)
    loss = LossConfig(kind=KINDS[seed % 5], reduction=str(rng.choice(["mean", "sum"])))
    activation = ACTIVATIONS[seed % 4]
    heads = int(rng.choice([1, 2, 4]))
    config = ModelConfig(
        width=heads * int(rng.choice([6, 8, 16])), heads=heads, blocks=int(rng.integers(1, 5)),
        mlp_ratio=int(rng.choice([1, 2, 4])), tokens=str(rng.choice(["concat", "concat_project"])),
        decoder_blocks=int(rng.choice([0, 1, 4])), layerscale_init=0.5, stochastic_depth=float(rng.choice([0.0, 0.5])),
        preprocessing=str(rng.choice(["library_log1p", "log1p"])), activation=activation,
        tanh_scale=float(rng.uniform(3, 12)) if activation == "rect_tanh" and seed % 8 else None,
        # Few genes that share 1e5 counts have more each than the target: losses of 1e5, whose gradients all but cancel.
        target_sum=5e3 if activation == "softmax" else 1e5, count_head=loss.count_head, codebook_std=0.5,
    )  # fmt: skip
    model = TxFM(config, vocabulary).train()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.head.bias += torch.rand(len(vocabulary), generator=generator) * 6 - 1
    batch, panels_NG = make_batch(
        seed, n=int(rng.integers(1, 9)), n_panels=int(rng.integers(1, 4)), n_unmasked=int(rng.choice([3, 12, 30]))
    )
    return model, Loss.of_parts(loss, config), batch, panels_NG


def forward(model, batch, panels_NG, branch_scale_RB=None):
    return model(
        batch.gene_ids,
        batch.values,
        batch.n_unmasked if batch.is_padded else None,
        measured_BG=measured_mask(batch.panel_id, panels_NG),
        branch_scale_RB=branch_scale_RB,
    )


def gradients(model, loss) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_loss_and_every_gradient_are_those_of_the_plain_model(seed, vocabulary, make_batch):
    model, loss, batch, panels_NG = random_case(seed, vocabulary, make_batch)
    scale_RB = branch_scales(model.encoder.rates, seed, 3, batch.sample_id.numpy())
    plain = PlainTxFM.of(model)
    got = loss(forward(model, batch, panels_NG, scale_RB), batch, panels_NG)
    want = plain_loss(loss, forward(plain, batch, panels_NG, torch.from_numpy(scale_RB)), batch, panels_NG)
    for ours, theirs in ((got.mean_B, want.mean_B), (got.sum_B, want.sum_B), (got.floor_B, want.floor_B)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    of_model, of_plain = gradients(model, got.loss), gradients(plain, want.loss)
    assert {plain_name(name) for name in of_model} == set(of_plain)
    for name, gradient in of_model.items():
        expected = of_plain[plain_name(name)]
        worst = (gradient - expected).abs().max().item()
        assert worst <= 1e-5 * expected.abs().max().item(), name


@pytest.mark.parametrize("is_padded", [False, True])
def test_branches_that_samples_are_without_are_not_computed(tiny_model, make_batch, monkeypatch, is_padded):
    """In block 0 all samples have both branches, in block 1 some, in block 2 none: that is computed, for its gradient of 0."""
    batch, panels_NG = make_batch(5)
    batch = dataclasses.replace(batch, is_padded=is_padded)
    scale_RB = np.ones((6, 6), np.float32)
    scale_RB[2:4] = np.where(np.arange(6) % 3, 1.25, 0)
    scale_RB[4:] = 0
    loss = Loss.of_parts(LossConfig(), tiny_model.config)
    expected = gradients(
        tiny_model, loss(forward(tiny_model, batch, panels_NG, torch.from_numpy(scale_RB)), batch, panels_NG).loss
    )
    attention = calls_of(monkeypatch, torch.nn.functional, "scaled_dot_product_attention")
    hidden = []
    for block in tiny_model.encoder.blocks:
        block.mlp[0].register_forward_hook(lambda _module, _inputs, output: hidden.append(len(output)))
    found = gradients(tiny_model, loss(forward(tiny_model, batch, panels_NG, scale_RB), batch, panels_NG).loss)
    assert [len(q) for (q, _, _), _ in attention] == hidden == [6, 4, 6]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name)
    assert not found["encoder.blocks.2.mlp.0.weight"].any()
    assert found["encoder.blocks.1.mlp.0.weight"].any()


def calls_of(monkeypatch, module, name: str) -> list[tuple]:
    """Record what a function of a module is called with, positional and by name, and call it."""
    calls, function = [], getattr(module, name)

    def recorded(*args, **kwargs):
        calls.append((args, kwargs))
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, recorded)
    return calls


@pytest.mark.parametrize("is_padded", [False, True])
def test_attention_gets_a_mask_only_where_a_sample_is_padded(tiny_model, make_batch, monkeypatch, is_padded):
    batch, _ = make_batch(0)
    calls = calls_of(monkeypatch, torch.nn.functional, "scaled_dot_product_attention")
    tiny_model.encode(batch.gene_ids, batch.values, torch.full((6,), 5) if is_padded else None)
    assert [kwargs["attn_mask"] is not None for _, kwargs in calls] == [is_padded] * 3


def test_the_last_block_asks_for_cls_alone(tiny_model, make_batch, monkeypatch):
    batch, _ = make_batch(0)
    attention = calls_of(monkeypatch, torch.nn.functional, "scaled_dot_product_attention")
    hidden = []
    for block in tiny_model.encoder.blocks:
        block.mlp[0].register_forward_hook(lambda _module, _inputs, output: hidden.append(output.shape[1]))
    tiny_model.encode(batch.gene_ids, batch.values)
    assert [(q.shape[2], k.shape[2], v.shape[2]) for (q, k, v), _ in attention] == [(9, 9, 9), (9, 9, 9), (1, 9, 9)]
    assert hidden == [9, 9, 1]


@pytest.mark.parametrize("padded", [False, True])
def test_the_last_block_for_cls_alone_equals_the_whole_block(tiny_config, padded):
    generator = torch.Generator().manual_seed(0)
    block = Block(tiny_config)
    x_BTD = torch.randn(3, 9, 16, generator=generator, requires_grad=True)
    visible = (torch.arange(9) < 6).expand(3, 1, 1, 9) if padded else None
    alone, whole = block(x_BTD, visible, 1), block(x_BTD, visible, 9)[:, :1]
    torch.testing.assert_close(alone, whole)
    weight = torch.randn(3, 1, 16, generator=generator)
    parameters = [x_BTD, *block.parameters()]
    for got, want in zip(
        torch.autograd.grad((alone * weight).sum(), parameters),
        torch.autograd.grad((whole * weight).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_projecting_the_codebook_before_the_lookup_equals_projecting_each_token(tiny_config, make_batch, monkeypatch):
    tokens = GeneTokens(40, tiny_config)
    torch.nn.init.normal_(tokens.codebook, generator=torch.Generator().manual_seed(0))
    batch, _ = make_batch(0)  # 48 tokens, 40 genes
    calls = calls_of(monkeypatch, torch.nn.functional, "linear")
    for n_samples, rows_projected in ((6, (40, 16)), (2, (2, 8, 16))):
        ids, values = batch.gene_ids[:n_samples], batch.values[:n_samples]
        rows = torch.cat([tokens.codebook[ids], values[..., None]], dim=-1)
        expected = tokens.projection(rows)
        calls.clear()
        got = tokens(ids, values)
        assert [args[0].shape for args, _ in calls] == [rows_projected]  # whichever are fewer
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
        of_got = torch.autograd.grad((got * weight).sum(), list(tokens.parameters()))
        of_expected = torch.autograd.grad((expected * weight).sum(), list(tokens.parameters()))
        for ours, theirs in zip(of_got, of_expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


class CountDense(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the tensors of at least `size` entries that are made."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made = size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.size and not out._is_view():
            self.made += 1
        return out


def test_no_dense_target_is_made(make_batch):
    """Of (B, G) the Poisson loss makes the mask, its negation, the blanked prediction and e^x̂ - x̂; no target."""
    batch, panels_NG = make_batch(0)
    log1p_BG = torch.rand(6, 40)
    counted = []
    for function in (Loss(), lambda *arguments: plain_loss(Loss(), *arguments)):
        with CountDense(6 * 40) as count:
            function(Prediction(log1p_BG), batch, panels_NG)
        counted.append(count.made)
    sparse, dense = counted
    assert sparse == 5
    assert dense > sparse


def test_bf16_autocast_is_near_float32(vocabulary, make_batch):
    """Loss within 1 %, each gradient within 5 % of its norm: bf16 has 8 bits."""
    for seed in (0, 1, 4):
        model, loss, batch, panels_NG = random_case(seed, vocabulary, make_batch)
        model.eval()
        found = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                prediction = forward(model, batch, panels_NG)
            assert prediction.log1p_BG.dtype == torch.float32
            parts = loss(prediction, batch, panels_NG)
            found.append((parts, gradients(model, parts.loss)))
        (exact, of_exact), (rounded, of_rounded) = found
        torch.testing.assert_close(rounded.excess_B, exact.excess_B, rtol=0.01, atol=0.01)
        largest = max(gradient.norm() for gradient in of_exact.values())
        for name, gradient in of_exact.items():
            assert (of_rounded[name] - gradient).norm() <= 0.05 * gradient.norm() + 1e-3 * largest, name


@pytest.mark.parametrize("seed", [0, 3, 4])
@pytest.mark.parametrize("given", [True, False])
def test_activation_checkpointing_changes_no_bit(seed, given, vocabulary, make_batch):
    """Whether the branches that are dropped are given or drawn."""
    model, loss, batch, panels_NG = random_case(seed, vocabulary, make_batch)
    model.encoder.rates = [0.5] * len(model.encoder.rates)
    scale_RB = torch.from_numpy(branch_scales(model.encoder.rates, 0, 0, batch.sample_id.numpy())) if given else None
    found = []
    for on in (False, True):
        model.set_activation_checkpointing(on)
        hooks = []
        handle = model.encoder.blocks[0].register_forward_pre_hook(lambda *_, hooks=hooks: hooks.append(1))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            parts = loss(forward(model, batch, panels_NG, scale_RB), batch, panels_NG)
            found.append((parts.mean_B, gradients(model, parts.loss)))
        handle.remove()
        assert len(hooks) == 1 + on  # computed again for the gradient
    (plain_B, of_plain), (again_B, of_again) = found
    assert torch.equal(plain_B, again_B)
    assert all(torch.equal(of_plain[name], of_again[name]) for name in of_plain)


def test_the_fused_optimizer_steps_as_the_plain_one(vocabulary, make_batch):
    model, loss, batch, panels_NG = random_case(0, vocabulary, make_batch)
    parts = loss(
        forward(model, batch, panels_NG, torch.ones(2 * len(model.encoder.rates), len(batch))), batch, panels_NG
    )
    parts.loss.backward()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    stepped = []
    for fused in (True, False):
        model.load_state_dict(before)
        optimizer = make_optimizer(model, OptimConfig(), 100)
        assert optimizer.param_groups[0]["fused"]
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = fused, False
        for _ in range(3):
            optimizer.step()
        stepped.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    for name, parameter in stepped[0].items():
        assert not torch.equal(parameter, before[name])
        torch.testing.assert_close(parameter, stepped[1][name], rtol=1e-6, atol=1e-7)


def test_attention_is_float32_on_a_cpu_also_under_autocast(tiny_model, make_batch, monkeypatch):
    """Torch's bf16 attention is the slower of the two there."""
    batch, _ = make_batch(0)
    calls = calls_of(monkeypatch, torch.nn.functional, "scaled_dot_product_attention")
    with torch.autocast("cpu", torch.bfloat16):
        tiny_model.encode(batch.gene_ids, batch.values)
    assert {tensor.dtype for args, _ in calls for tensor in args} == {torch.float32}


def test_the_model_compiles_whole(vocabulary, make_batch):
    """As one graph, which the backend `eager` then runs as it is."""
    model, _, batch, panels_NG = random_case(3, vocabulary, make_batch)
    scale_RB = torch.ones(2 * len(model.encoder.rates), len(batch))
    try:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        got, want = (forward(each, batch, panels_NG, scale_RB) for each in (compiled, model))
    finally:
        torch._dynamo.reset()
    assert torch.equal(got.log1p_BG, want.log1p_BG)
    assert torch.equal(got.log_dispersion_G, want.log_dispersion_G)
