"""AdamW goes on bit for bit from its tensors, by parameter name, and takes nothing that is not its own."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from txfm_model.config import OptimConfig
from txfm_model.initialise import initialise
from txfm_model.model import TxFM
from txfm_model.optimizer import learning_rate, make_optimizer, set_learning_rate
from txfm_model.optimizer_state import check_optimizer_tensors, optimizer_tensors, restore_optimizer

CONFIG = OptimConfig(lr=1e-2)
STEPS = 10


def make(tiny_config, vocabulary, seed: int = 0) -> tuple[TxFM, torch.optim.AdamW]:
    model = TxFM(tiny_config, vocabulary).eval()
    initialise(model, seed=seed)
    return model, make_optimizer(model, CONFIG, STEPS)


def steps(model, optimizer, make_batch, numbers) -> list[float]:
    losses = []
    for number in numbers:
        batch, _ = make_batch(number)
        set_learning_rate(optimizer, learning_rate(number, STEPS, CONFIG))
        loss = (model(batch.gene_ids, batch.values).log1p_BG - 3).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def test_five_steps_saved_and_five_more_are_ten_steps(tiny_config, vocabulary, make_batch, tmp_path):
    whole, whole_optimizer = make(tiny_config, vocabulary)
    losses = steps(whole, whole_optimizer, make_batch, range(STEPS))
    first, first_optimizer = make(tiny_config, vocabulary)
    assert steps(first, first_optimizer, make_batch, range(5)) == losses[:5]
    save_file(optimizer_tensors(first, first_optimizer), tmp_path / "optimizer")
    save_file(first.state_dict(), tmp_path / "model")

    second, second_optimizer = make(tiny_config, vocabulary, seed=7)
    steps(second, second_optimizer, make_batch, range(3))  # what it learned must be gone
    second.load_state_dict(load_file(tmp_path / "model"))
    restore_optimizer(second, second_optimizer, load_file(tmp_path / "optimizer"))
    assert steps(second, second_optimizer, make_batch, range(5, STEPS)) == losses[5:]
    for (name, a), b in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    ours, theirs = optimizer_tensors(whole, whole_optimizer), optimizer_tensors(second, second_optimizer)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_saved(tiny_config, vocabulary, make_batch):
    model, optimizer = make(tiny_config, vocabulary)
    assert optimizer_tensors(model, optimizer) == {}
    steps(model, optimizer, make_batch, range(2))
    tensors = optimizer_tensors(model, optimizer)
    names = [name for name, _ in model.named_parameters()]
    assert tensors.keys() == {f"{kind}/{name}" for kind in ("step", "exp_avg", "exp_avg_sq") for name in names}
    assert all(tensors[f"step/{name}"].item() == 2 and tensors[f"step/{name}"].shape == () for name in names)
    assert all(tensors[f"exp_avg/{name}"].shape == p.shape for name, p in model.named_parameters())
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.parametrize("fused", [True, False])
def test_a_parameter_without_gradients_has_no_state_and_none_after(fused):
    def build():
        torch.manual_seed(0)
        model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2), "frozen": nn.Linear(3, 2)})
        model["frozen"].requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, torch.optim.AdamW(trained, fused=fused)

    with torch.random.fork_rng():
        model, optimizer = build()
        again, again_optimizer = build()
    for _ in range(2):
        model["used"](torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
    tensors = copy.deepcopy(optimizer_tensors(model, optimizer))
    assert {name.partition("/")[2] for name in tensors} == {"used.weight", "used.bias"}
    again["unused"](torch.ones(1, 3)).sum().backward()
    again_optimizer.step()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    restore_optimizer(again, again_optimizer, tensors)
    assert len(again_optimizer.state) == 2
    for pair in ((model, optimizer), (again, again_optimizer)):
        pair[1].zero_grad(set_to_none=True)
        for name in ("used", "unused"):  # one goes on, the other begins
            pair[0][name](torch.ones(4, 3)).square().sum().backward()
        pair[1].step()
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_restored_tensors_are_copies(tiny_config, vocabulary, make_batch):
    model, optimizer = make(tiny_config, vocabulary)
    steps(model, optimizer, make_batch, range(2))
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    restore_optimizer(model, optimizer, tensors)
    steps(model, optimizer, make_batch, range(2))
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("exp_avg_sq/head.bias"), "exp_avg_sq/head.bias is missing"),
        (lambda t: t.pop("step/head.bias"), "step/head.bias is missing"),
        (lambda t: t.update({"exp_avg/head.bias": torch.zeros(3)}), r"head.bias is \(\(3,\)"),
        (lambda t: t.update({"exp_avg/head.bias": torch.zeros(40).double()}), "float64"),
        (lambda t: t.update({"exp_avg/other": torch.zeros(3)}), "exp_avg/other is of no parameter"),
        (lambda t: t.update({"max_exp_avg_sq/head.bias": torch.zeros(40)}), "is of no parameter"),
        (lambda t: t.update({"head.bias": torch.zeros(40)}), "is of no parameter"),
        (lambda t: t.update({"step/head.bias": torch.tensor(0.5)}), "expected a number of steps"),
        (lambda t: t.update({"step/head.bias": torch.tensor(torch.nan)}), "expected a number of steps"),
        (lambda t: t.update({"step/head.bias": torch.tensor(0.0)}), "expected a number of steps"),
    ],
)
def test_tensors_of_another_optimizer_are_refused_and_nothing_is_changed(
    tiny_config, vocabulary, make_batch, change, message
):
    model, optimizer = make(tiny_config, vocabulary)
    steps(model, optimizer, make_batch, range(2))
    before = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    tensors = dict(before)
    change(tensors)
    for call in (
        lambda: check_optimizer_tensors(model, tensors),
        lambda: restore_optimizer(model, optimizer, tensors),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    after = optimizer_tensors(model, optimizer)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_optimizers_that_cannot_be_saved_or_restored(tiny_config, vocabulary, make_batch):
    model, optimizer = make(tiny_config, vocabulary)
    steps(model, optimizer, make_batch, range(1))
    tensors = optimizer_tensors(model, optimizer)
    with pytest.raises(ValueError, match="not among the model's"):
        optimizer_tensors(TxFM(tiny_config, vocabulary), optimizer)
    with pytest.raises(ValueError, match="does not train"):
        restore_optimizer(model, torch.optim.AdamW([model.head.bias]), tensors)
    for other in (
        torch.optim.SGD(model.parameters(), momentum=0.9),
        torch.optim.AdamW(model.parameters(), amsgrad=True),
    ):
        model.zero_grad()
        model(*(getattr(make_batch(0)[0], name) for name in ("gene_ids", "values"))).log1p_BG.sum().backward()
        other.step()
        with pytest.raises(ValueError, match="only AdamW without amsgrad"):
            optimizer_tensors(model, other)
