"""Two processes that hold half of the model each give what one process gives, in weights, optimizer and after a resume.

Accelerate shards with FSDP2 only on accelerators. Here its own preparation runs on two CPU processes over gloo: the state
that its launcher would have set on GPUs is set by hand (`sharding_accelerator`), the rest is Accelerate's and torch's code.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from txfm_data.vocabulary import Vocabulary
from txfm_model import fsdp, run
from txfm_model.config import ModelConfig, OptimConfig, TrainConfig, config_from_dict
from txfm_model.initialise import initialise
from txfm_model.model import TxFM
from txfm_model.optimizer import make_optimizer
from txfm_model.optimizer_state import optimizer_tensors, restore_optimizer
from txfm_model.trainer import train

ROOT = Path(__file__).parents[2]
N_GENES, STEPS, BATCH, SHOWN, CLIP = 41, 4, 8, 12, 0.5  # an odd number of genes: the two parts differ in size
CONFIG = ModelConfig(
    width=16, blocks=3, heads=2, decoder_blocks=1, stochastic_depth=0, codebook_std=0.5, layerscale_init=0.1
)


def new_model() -> TxFM:
    vocabulary = Vocabulary(tuple(f"ENSG{i:011d}" for i in range(N_GENES)), tuple(f"g{i}" for i in range(N_GENES)))
    model = TxFM(CONFIG, vocabulary)
    initialise(model, seed=3)
    with torch.no_grad():
        model.head.bias.fill_(2.0)
    return model.train()


def batch_of(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Genes shown (B, K), their values (B, K) and targets (B, G) of a global batch."""
    generator = torch.Generator().manual_seed(step)
    gene_ids_BK = torch.stack([torch.randperm(N_GENES, generator=generator)[:SHOWN] for _ in range(BATCH)])
    targets_BG = 5 * torch.rand(BATCH, N_GENES, generator=generator)
    return gene_ids_BK, targets_BG.gather(1, gene_ids_BK), targets_BG


def run_step(wrapped: nn.Module, optimizer: torch.optim.Optimizer, step: int, part: slice) -> dict[str, float]:
    """One clipped step on part of the batch, as the trainer makes it; FSDP2 averages the gradients over processes."""
    gene_ids_BK, values_BK, targets_BG = (tensor[part] for tensor in batch_of(step))
    predicted_BG = wrapped(gene_ids_BK, values_BK).log1p_BG
    loss = ((predicted_BG - targets_BG) ** 2).mean()
    loss.backward()
    norm = fsdp.gradient_norm(wrapped.parameters())
    nn.utils.clip_grads_with_norm_(wrapped.parameters(), CLIP, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss.item(), "norm": norm.item()}


def new_optimizer(model: TxFM) -> torch.optim.Optimizer:
    return make_optimizer(model, OptimConfig(lr=3e-3, weight_decay=0.1), STEPS)


def sharding_accelerator(*, broadcast_start: bool) -> Accelerator:
    """Accelerate on CPU processes, in the state that ``--use_fsdp --fsdp_version 2`` gives it on GPUs."""
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=broadcast_start,
    )
    return accelerator


def worker(out: Path) -> None:
    """What each of the two processes does; the main one leaves its results in `out`."""
    torch.set_num_threads(1)
    accelerator = sharding_accelerator(broadcast_start=True)
    fsdp.check_fsdp(accelerator, os.environ)
    rank = accelerator.process_index
    part = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    model = new_model()
    model, optimizer = accelerator.prepare(model, new_optimizer(model))
    assert fsdp.is_sharded(model)
    local = sum(parameter.to_local().numel() for parameter in model.parameters())
    lines = []
    for step in range(STEPS):
        if step == 2:
            saved = gather(model, optimizer)
        lines.append(run_step(model, optimizer, step, part))
    straight = gather(model, optimizer)

    # Validation: every process has a whole model of its own, and may use it as often as it likes
    whole = fsdp.whole_model(model)
    for _ in range(rank + 1):
        gene_ids_BK, values_BK, _ = batch_of(99)
        predicted_BG = whole(gene_ids_BK, values_BK).log1p_BG

    # Resume: from what step 2 left, into a model and an optimizer that are new, blocks computed twice
    tensors, state = [whole_from(out, kind, saved, i) for i, kind in enumerate(("weights", "optimizer"))]
    again = new_model()
    again.set_activation_checkpointing(True)
    again, optimizer = accelerator.prepare(again, new_optimizer(again))
    fsdp.load_full_state_dict(again, tensors)
    fsdp.load_full_optimizer_tensors(again, optimizer, state)
    resumed_lines = [run_step(again, optimizer, step, part) for step in range(2, STEPS)]
    resumed = gather(again, optimizer)
    if accelerator.is_main_process:
        for name, (weights, moments) in (("straight", straight), ("resumed", resumed)):
            save_file(weights, out / f"{name}_weights.safetensors")
            save_file(moments, out / f"{name}_optimizer.safetensors")
        save_file({"predicted_BG": predicted_BG.detach()}, out / "predicted.safetensors")
        document = {"lines": lines, "resumed_lines": resumed_lines, "local": local}
        (out / "results.json").write_text(json.dumps(document))
    else:
        assert saved == ({}, {})  # one process holds the copy, not each of them
    accelerator.end_training()


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and optimizer as a checkpoint gets them: whole on the main process, nothing elsewhere."""
    copy = fsdp.full_copy(model)
    moments = {name: tensor.clone() for name, tensor in fsdp.full_optimizer_tensors(model, optimizer).items()}
    return {} if copy is None else {n: t.clone() for n, t in copy.state_dict().items()}, moments


def whole_from(out: Path, kind: str, saved: tuple[dict[str, Tensor], dict[str, Tensor]], i: int) -> dict[str, Tensor]:
    """Hand tensors of the main process to all by a file, as a checkpoint does."""
    path = out / f"saved_{kind}.safetensors"
    if saved[i]:
        save_file(saved[i], path)
    torch.distributed.barrier()
    return load_file(path)


def train_worker(arguments: list[str]) -> int:
    """Run `txfm train` in one of the two processes, on an Accelerate that shards."""
    from tools.train import main

    run.start_accelerator = lambda loop: sharding_accelerator(broadcast_start=True)
    torch.set_num_threads(1)
    return main(arguments)


def launch(*arguments: str) -> None:
    """Run this file in two processes."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(Path(__file__)), *arguments,
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what two processes left."""
    out = tmp_path_factory.mktemp("fsdp")
    launch("steps", str(out))
    return out


@pytest.fixture(scope="module")
def one() -> tuple[TxFM, torch.optim.Optimizer, list[dict[str, float]]]:
    """The same steps on whole batches in this process."""
    model = new_model()
    optimizer = new_optimizer(model)
    return model, optimizer, [run_step(model, optimizer, step, slice(None)) for step in range(STEPS)]


def test_a_step_is_that_of_one_process(two, one):
    model, optimizer, lines = one
    results = json.loads((two / "results.json").read_text())
    assert 0 < results["local"] < model.n_parameters
    for alone, together in zip(lines, results["lines"], strict=True):
        assert together["norm"] == pytest.approx(alone["norm"], rel=1e-5)
        assert alone["norm"] > CLIP  # so that clipping was needed
    weights = load_file(two / "straight_weights.safetensors")
    assert weights.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    moments, expected = load_file(two / "straight_optimizer.safetensors"), optimizer_tensors(model, optimizer)
    assert moments.keys() == expected.keys()
    for name, tensor in expected.items():
        assert moments[name].dtype == tensor.dtype
        torch.testing.assert_close(moments[name], tensor, rtol=1e-4, atol=1e-7, msg=name)


def test_a_resumed_run_is_the_uninterrupted_one(two):
    results = json.loads((two / "results.json").read_text())
    assert results["resumed_lines"] == results["lines"][2:]
    for kind in ("weights", "optimizer"):
        straight, resumed = (load_file(two / f"{name}_{kind}.safetensors") for name in ("straight", "resumed"))
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


def test_one_process_goes_on_from_what_two_left(two, one):
    model = new_model()
    model.load_state_dict(load_file(two / "saved_weights.safetensors"))
    optimizer = new_optimizer(model)
    restore_optimizer(model, optimizer, load_file(two / "saved_optimizer.safetensors"))
    lines = [run_step(model, optimizer, step, slice(None)) for step in range(2, STEPS)]
    for ours, alone in zip(lines, one[2][2:], strict=True):
        assert ours == pytest.approx(alone, rel=1e-5)


def test_each_process_validates_with_a_whole_model(two, one):
    gene_ids_BK, values_BK, _ = batch_of(99)
    model = new_model()
    model.load_state_dict(load_file(two / "straight_weights.safetensors"))
    predicted_BG = load_file(two / "predicted.safetensors")["predicted_BG"]
    assert torch.equal(predicted_BG, model(gene_ids_BK, values_BK).log1p_BG)


def test_a_model_that_is_not_sharded_is_left_as_it_is(one):
    model, optimizer, _ = one
    assert not fsdp.is_sharded(model)
    assert fsdp.whole_model(model) is model
    copy = new_model()
    fsdp.load_full_state_dict(copy, model.state_dict())
    other = new_optimizer(copy)
    fsdp.load_full_optimizer_tensors(copy, other, optimizer_tensors(model, optimizer))
    found = optimizer_tensors(copy, other)
    assert all(torch.equal(found[name], tensor) for name, tensor in optimizer_tensors(model, optimizer).items())


def test_weights_of_another_model_are_refused():
    model = new_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = before | {"head.bias": torch.ones(3)}
    with pytest.raises(ValueError, match=r"head.bias is \(3,\), the model asks for \(41,\)"):
        fsdp.load_full_state_dict(model, wrong)
    del wrong["head.bias"]
    with pytest.raises(ValueError, match="head.bias is missing"):
        fsdp.load_full_state_dict(model, wrong)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_fsdp_that_does_not_come_about_is_called_out(caplog):
    plain = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, num_processes=2)
    asked = {"ACCELERATE_USE_FSDP": "true"}
    with caplog.at_level(logging.WARNING):
        fsdp.check_fsdp(plain, {})
        assert not caplog.text
        fsdp.check_fsdp(plain, asked)
    assert "every process holds the whole model" in caplog.text


@pytest.mark.parametrize(("version", "recompute", "message"), [(1, False, "--fsdp_version 2"), (2, True, "leave")])
def test_what_training_cannot_do_with_fsdp_is_refused(version, recompute, message):
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(activation_checkpointing=recompute))
    sharding = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=version == 2, state=state)
    with pytest.raises(ValueError, match=message):
        fsdp.check_fsdp(sharding, {})


@pytest.mark.slow
def test_the_trainer_shards_and_goes_on_from_its_checkpoints_in_any_layout(tiny_shards, tmp_path):
    options = {
        "model": {"width": 16, "blocks": 2, "decoder_blocks": 1, "layerscale_init": 0.1},
        "mask": {"n_unmasked": 20},
        "optim": {"clip_norm": 0.5},
        "loop": {
            "steps": 4,
            "global_batch": 8,
            "accumulation": 2,
            "log_every": 1,
            "validate_every": 2,
            "checkpoint_every": 2,
        },
    }
    flags = [f"--{part}.{key}={value}" for part, values in options.items() for key, value in values.items()]
    sharded, resumed, alone = (tmp_path / name for name in ("sharded", "resumed", "alone"))
    launch("train", f"--shards={tiny_shards}", f"--out={sharded}", *flags)
    expected = load_file(sharded / "checkpoint" / "model.safetensors")

    checkpoint = sharded / "checkpoints" / "step-00000002"
    launch("train", f"--shards={tiny_shards}", f"--out={resumed}", *flags, f"--resume={checkpoint}")
    again = load_file(resumed / "checkpoint" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())

    for out, resume in ((alone, None), (tmp_path / "goes_on", str(checkpoint))):
        config = config_from_dict(
            TrainConfig, {"shards": str(tiny_shards), "out": str(out), "resume": resume, **options}
        )
        assert train(config)["processes"] == 1
        for name, tensor in load_file(out / "checkpoint" / "model.safetensors").items():
            torch.testing.assert_close(expected[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (sharded, alone)]
    for together, single in zip(*(map(json.loads, side) for side in lines), strict=True):
        assert together["loss"] == pytest.approx(single["loss"], rel=1e-5)
        if single["split"] == "train":
            assert together["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(("name", "is_fsdp"), [("ddp", False), ("fsdp2", True)])
def test_the_launcher_takes_our_configuration_files(name, is_fsdp):
    arguments = [
        "--config_file",
        str(ROOT / "configs" / "accelerate" / f"{name}.yaml"),
        "--num_processes=2",
        "train.py",
    ]
    asked, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert (asked.use_fsdp, asked.multi_gpu, asked.num_processes) == (is_fsdp, not is_fsdp, 2)
    environment = prepare_multi_gpu_env(asked)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if is_fsdp:
        with patch_environment(**{key: value for key, value in environment.items() if key.startswith("FSDP_")}):
            plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward is True
        assert not plugin.activation_checkpointing
        block = {type(module).__name__ for module in new_model().encoder.blocks}
        assert set(plugin.transformer_cls_names_to_wrap) == block


if __name__ == "__main__":
    if sys.argv[1] == "train":
        sys.exit(train_worker(sys.argv[2:]))
    worker(Path(sys.argv[2]))
