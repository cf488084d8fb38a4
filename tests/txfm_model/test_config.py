"""The configuration refuses what it does not know; presets state only what differs."""

from pathlib import Path

import pytest
import yaml

from txfm_model.config import (
    LoopConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    config_from_dict,
    config_to_dict,
)

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("txfm_*.yaml"))
NEEDED = {"shards": "a", "out": "b"}


def test_a_tree_comes_back_as_it_went():
    config = TrainConfig(shards="s", out="o", model=ModelConfig(width=64), loop=LoopConfig(epochs=2.5))
    assert config_from_dict(TrainConfig, config_to_dict(config)) == config


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"modle": {}}, "modle.*model"),
        ({"model": {"widht": 3}}, "model.widht.*width"),
        ({"model": {"width": 10, "heads": 3}}, "model.heads must be a divisor of model.width 10, got 3"),
        ({"model": {"tokens": "sum"}}, "model.tokens"),
        ({"loop": {"steps": 3, "epochs": 2.0}}, "both given; set one to null"),
        ({"loop": {}}, "loop.steps or loop.epochs"),
        ({"loop": {"steps": 0}}, "loop.steps must be at least 1, got 0"),
        ({"loop": {"steps": 1, "seed": -1}}, "loop.seed"),
        ({"optim": {"lr": 0.0}}, "optim.lr must be above 0"),
        ({"optim": {"lr": float("nan")}}, "optim.lr"),
        ({"mask": {"n_unmasked": 0}}, "mask.n_unmasked"),
        ({"mask": {"temperature": float("nan")}}, "mask.temperature must be a number between -4 and 4, got nan"),
        ({"mask": {"temperature": float("inf")}}, "mask.temperature"),
        ({"mask": {"temperature": 4.5}}, "mask.temperature must be a number between -4 and 4, got 4.5"),
        ({"mask": {"temperature": -5}}, "mask.temperature"),
        ({"mask": {"temperature": "hot"}}, "mask.temperature"),
        ({"model": {"stochastic_depth": 1.0}}, "model.stochastic_depth"),
        ({"model": {"target_sum": float("inf")}}, "model.target_sum"),
        ({"model": {"width": "wide"}}, "model.width"),
        ({"model": {"width": 64.5}}, "model.width"),
    ],
)
def test_refusals(tree, words):
    with pytest.raises((ValueError, TypeError), match=words):
        config_from_dict(TrainConfig, NEEDED | {"loop": {"steps": 1}} | tree)


def hundred(epoch: int) -> int:
    return 100


def test_steps_and_epochs():
    assert LoopConfig(steps=7).total_steps(hundred, is_weighted=False) == 7
    assert LoopConfig(epochs=2.5).total_steps(hundred, is_weighted=False) == 250
    assert LoopConfig(epochs=0.001).total_steps(hundred, is_weighted=False) == 1
    with pytest.raises(ValueError, match="loop.steps or loop.epochs"):
        LoopConfig().total_steps(hundred, is_weighted=False)


def test_steps_where_epochs_differ_in_length():
    assert LoopConfig(epochs=2.5).total_steps(lambda epoch: 10 + epoch, is_weighted=True) == 10 + 11 + 6
    assert LoopConfig(epochs=2.5).total_steps(lambda epoch: 10, is_weighted=False) == 25
    assert LoopConfig(steps=7).total_steps(lambda epoch: 10 + epoch, is_weighted=True) == 7


def test_masks_are_uniform_unless_a_temperature_is_given():
    assert MaskConfig().temperature == 0.0
    for temperature in (-4, -1.0, -0.5, 0, 0.5, 1.0, 4):
        tree = NEEDED | {"loop": {"steps": 1}, "mask": {"temperature": temperature}}
        assert config_from_dict(TrainConfig, tree).mask.temperature == temperature


def leaves(tree, prefix=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_presets_are_valid_and_state_only_what_differs(path):
    tree = yaml.safe_load(path.read_text())
    config_from_dict(TrainConfig, NEEDED | tree)
    defaults = {"model": ModelConfig(), "loop": LoopConfig(), "optim": OptimConfig()}
    defaults["mask"] = TrainConfig(shards="s", out="o", loop=LoopConfig(steps=1)).mask
    for (section, name), value in leaves(tree):
        assert getattr(defaults[section], name) != value, f"{section}.{name} states its default"


def test_the_presets_are_those_of_the_paper():
    trees = {path.stem: config_from_dict(TrainConfig, NEEDED | yaml.safe_load(path.read_text())) for path in CONFIGS}
    assert set(trees) == {"txfm_tiny", "txfm_s", "txfm_b", "txfm_l", "txfm_b_atlas"}
    table = {
        name: (c.model.width, c.model.blocks, c.model.heads, c.model.stochastic_depth, c.mask.n_unmasked)
        for name, c in trees.items()
    }
    assert table["txfm_s"] == (384, 12, 6, 0.1, 1024)
    assert table["txfm_b"] == table["txfm_b_atlas"] == (768, 12, 12, 0.1, 2048)
    assert table["txfm_l"] == (1024, 24, 16, 0.3, 2048)
    lengths = {name: (c.loop.global_batch, c.loop.epochs) for name, c in trees.items()}
    assert lengths["txfm_b"] == lengths["txfm_s"] == lengths["txfm_l"] == (1536, 200)
    assert lengths["txfm_b_atlas"] == (6144, 50)
    assert all((c.optim.lr, c.optim.warmup_fraction) == (1e-3, 0.1) for c in trees.values())
