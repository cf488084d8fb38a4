"""AdamW's groups and the schedule."""

import warnings

import pytest
import torch

from txfm_model.config import OptimConfig
from txfm_model.optimizer import learning_rate, make_optimizer, set_learning_rate, weight_decay

# step of a run of 1,000 steps, learning rate
ONE_CYCLE = [
    (0, 4e-5),
    (1, 4.024165966e-5),
    (50, 5.276156626e-4),
    (98, 9.997583403e-4),
    (99, 1e-3),
    (100, 9.999969538e-4),
    (500, 5.851064092e-4),
    (998, 7.046158920e-9),
    (999, 4e-9),
]


@pytest.mark.parametrize(("step", "lr"), ONE_CYCLE)
def test_one_cycle_numbers(step, lr):
    assert learning_rate(step, 1000, OptimConfig()) == pytest.approx(lr, rel=1e-9)


@pytest.mark.parametrize("total", [11, 25, 600, 1001])
def test_the_schedule_is_that_of_torch(total):
    config = OptimConfig(lr=3e-4, warmup_fraction=0.3, div_factor=10, final_div_factor=100)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with warnings.catch_warnings(action="ignore"):  # it wants optimizer.step() called in between
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=3e-4,
            total_steps=total,
            pct_start=0.3,
            anneal_strategy="cos",
            cycle_momentum=False,
            div_factor=10,
            final_div_factor=100,
        )
        for step in range(total):
            assert learning_rate(step, total, config) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
            if step + 1 < total:
                schedule.step()


@pytest.mark.parametrize("total", [1, 2, 10])
def test_runs_of_a_few_steps_have_a_rate(total):
    rates = [learning_rate(step, total, OptimConfig()) for step in range(total)]
    assert rates[0] == pytest.approx(1e-3)  # no room for a warm-up
    assert all(0 < rate <= 1e-3 for rate in rates)


@pytest.mark.parametrize(
    ("steps", "expected"), [(186_600, 0.0053590568), (186_800, 0.0053533191), (463_850, 0.0021558694)]
)
def test_weight_decay_makes_the_time_scale_the_run(steps, expected):
    assert weight_decay(OptimConfig(), steps) == pytest.approx(expected, rel=1e-7)
    assert weight_decay(OptimConfig(weight_decay=0.1), steps) == 0.1


def test_matrices_decay_and_vectors_do_not(tiny_model):
    optimizer = make_optimizer(tiny_model, OptimConfig(), 1000)
    decayed, plain = optimizer.param_groups
    names = {id(parameter): name for name, parameter in tiny_model.named_parameters()}
    in_first = {names[id(p)] for p in decayed["params"]}
    in_second = {names[id(p)] for p in plain["params"]}
    assert decayed["weight_decay"] == pytest.approx(1.0)
    assert plain["weight_decay"] == 0
    assert {"tokens.codebook", "head.weight", "encoder.blocks.0.attention.qkv.weight"} <= in_first
    assert {"encoder.cls", "head.bias", "encoder.norm.weight", "encoder.blocks.0.mlp_scale.gamma"} <= in_second
    assert in_first | in_second == set(names.values())
    assert not in_first & in_second
    assert decayed["betas"] == (0.9, 0.999)
    assert decayed["eps"] == 1e-6
    assert decayed["fused"]
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
