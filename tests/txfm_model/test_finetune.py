"""A model starts from another's weights: shared genes keep their rows by id, all else is as `initialise` gave it."""

import dataclasses
import logging

import pytest
import torch

from txfm_data.vocabulary import Vocabulary
from txfm_model.config import ModelConfig
from txfm_model.finetune import GENE_PARAMETERS, InitCounts, start_from
from txfm_model.initialise import initialise
from txfm_model.model import TxFM

CONFIG = ModelConfig(width=16, blocks=2, heads=2, decoder_blocks=1)


def gene_ids(numbers) -> Vocabulary:
    ids = tuple(f"ENSG{number:011d}" for number in numbers)
    return Vocabulary(ids, ("",) * len(ids))


def make(numbers, seed=0, **changes) -> TxFM:
    model = TxFM(dataclasses.replace(CONFIG, **changes), gene_ids(numbers))
    initialise(model, seed=seed)
    with torch.no_grad():  # no two values of a parameter are equal, biases included
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(seed + 1)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return model


def clone(model: TxFM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("tokens", ["concat_project", "concat"])
@pytest.mark.parametrize("count_head", ["none", "nb", "zinb"])
def test_every_parameter_with_a_row_for_each_gene_is_known(count_head, tokens):
    small, large = (make(range(n), count_head=count_head, tokens=tokens).state_dict() for n in (7, 11))
    assert small.keys() == large.keys()
    with_rows = {name for name in small if small[name].shape != large[name].shape}
    assert with_rows == small.keys() & set(GENE_PARAMETERS)
    assert all(small[name].shape[1:] == large[name].shape[1:] and len(small[name]) == 7 for name in with_rows)
    if count_head == "zinb":
        assert with_rows == set(GENE_PARAMETERS)


@pytest.mark.parametrize("count_head", ["none", "nb", "zinb"])
def test_genes_keep_their_rows_by_id(count_head):
    source = make(range(0, 30), seed=1, count_head=count_head)
    numbers = [45, 29, 3, 31, 12, 40]  # another order, and new ones between
    model = make(numbers, seed=2, count_head=count_head)
    fresh, theirs = clone(model), clone(source)
    assert start_from(model, source) == InitCounts(shared=3, new=3, left_out=27)
    assert {name: torch.equal(tensor, theirs[name]) for name, tensor in source.state_dict().items()} == dict.fromkeys(
        theirs, True
    )
    for name, tensor in model.state_dict().items():
        if name not in GENE_PARAMETERS:
            assert torch.equal(tensor, theirs[name]), name
            continue
        for row, number in enumerate(numbers):
            expected = theirs[name][number] if number < 30 else fresh[name][row]
            assert torch.equal(tensor[row], expected), (name, number)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_same_genes_give_the_same_model(make_batch):
    source, model = make(range(40), seed=1).eval(), make(range(40), seed=2).eval()
    assert start_from(model, source) == (40, 0, 0)
    batch, _ = make_batch(0)
    ours, theirs = (m(batch.gene_ids, batch.values).log1p_BG for m in (model, source))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("ours", "theirs"), [("nb", "none"), ("zinb", "nb"), ("none", "zinb"), ("zinb", "none")])
def test_another_count_head_starts_fresh_and_says_so(ours, theirs, caplog):
    model, source = make(range(5, 12), seed=2, count_head=ours), make(range(9), seed=1, count_head=theirs)
    fresh = clone(model)
    with caplog.at_level(logging.INFO, "txfm_model.finetune"):
        start_from(model, source)
    only_ours = model.state_dict().keys() - source.state_dict().keys()
    only_theirs = source.state_dict().keys() - model.state_dict().keys()
    assert only_ours or only_theirs
    for name in only_ours:
        assert torch.equal(model.state_dict()[name], fresh[name])
        assert any(name in line and "starts fresh" in line for line in caplog.messages)
    for name in only_theirs:
        assert any(name in line and "left out" in line for line in caplog.messages)
    assert "4 genes shared, 3 new, 5 left out" in caplog.text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 32, "different shape"),
        ("blocks", 3, "different shape"),
        ("heads", 4, "different shape"),
        ("mlp_ratio", 2, "different shape"),
        ("tokens", "concat", "different shape"),
        ("decoder_blocks", 0, "different shape"),
        ("preprocessing", "log1p", "other units"),
        ("target_sum", 1e4, "other units"),
    ],
)
def test_models_that_do_not_fit_are_refused_with_both_values_and_nothing_is_changed(field, value, message):
    model, source = make(range(9), **{field: value}), make(range(9), seed=1)
    fresh = clone(model)
    with pytest.raises(ValueError, match=message) as error:
        start_from(model, source)
    assert f"model.{field} is {value!r}" in str(error.value)
    assert repr(getattr(CONFIG, field)) in str(error.value)
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in model.state_dict().items())


def test_another_activation_is_taken_with_a_warning(caplog):
    start_from(make(range(9), activation="relu"), make(range(9), seed=1))
    assert "model.activation is 'relu', in the checkpoint to start from 'rect_tanh'" in caplog.text


def test_models_without_a_common_gene_are_refused():
    with pytest.raises(ValueError, match="share no gene"):
        start_from(make(range(9)), make(range(20, 25)))


def test_other_settings_of_training_may_differ():
    changes = {"layerscale_init": 0.5, "stochastic_depth": 0.3, "codebook_std": 0.5, "head_init": "zero"}
    assert start_from(make(range(9), **changes), make(range(9), seed=1)).shared == 9


def test_it_leaves_the_random_state_alone():
    model, source = make(range(9)), make(range(9), seed=1)
    before = torch.get_rng_state()
    start_from(model, source)
    assert torch.equal(torch.get_rng_state(), before)
