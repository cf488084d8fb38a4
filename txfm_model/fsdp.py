"""Weights and optimizer of a model that FSDP2 has cut into shards: gathered to be saved, cut again to go on.

FSDP2 leaves the model what it was but for its parameters, which become DTensors: each process holds a part of the rows.
Forward and backward passes put them together where they are needed; what looks at them outside needs the functions here.
A function that gathers must be called by all processes. No file is read or written, so nothing is unpickled.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from txfm_model.optimizer_state import KINDS, MOMENTS, STEP, check_optimizer_tensors, stateful_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator

    from txfm_model.model import TxFM

logger = logging.getLogger(__name__)


def check_fsdp(accelerator: "Accelerator", environ: Mapping[str, str]) -> None:
    """Say it where the launcher asks for FSDP and Accelerate does something else.

    Parameters
    ----------
    accelerator
        As made on the launcher's processes.
    environ
        Environment, in which the launcher says what was asked for.

    Raises
    ------
    ValueError
        If it is FSDP1, or with Accelerate's own activation checkpointing, which renames parameters.
    """
    from accelerate import DistributedType

    if accelerator.distributed_type is DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError("FSDP version 1 was asked for, training knows version 2; launch with --fsdp_version 2")
        if accelerator.state.fsdp_plugin.activation_checkpointing:
            raise ValueError("leave fsdp_activation_checkpointing off; loop.activation_checkpointing does the same")
    elif environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        logger.warning(
            "FSDP was asked for; on this device Accelerate trains without it (%s, %d process(es)), and every process holds "
            "the whole model",
            accelerator.distributed_type.value,
            accelerator.num_processes,
        )


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter is a DTensor, of which this process may hold only a part."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def full_copy(model: "TxFM") -> "TxFM | None":
    """Gather a model to be saved, on the CPU of the main process; None on the others. All processes call it."""
    tensors = {name: _gather(tensor) for name, tensor in model.state_dict().items()}
    return _plain(model, tensors) if torch.distributed.get_rank() == 0 else None


def whole_model(model: "TxFM") -> "TxFM":
    """Gather a model on every process, on its device and in its mode; one that is not sharded is itself returned.

    For validation: processes may have different numbers of batches, and a forward pass of a sharded model in which one of
    them does not take part would stop all. All processes call it.
    """
    if not is_sharded(model):
        return model
    return _plain(model, {name: _whole(tensor) for name, tensor in model.state_dict().items()})


def full_optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Gather the state of AdamW, as `optimizer_state.optimizer_tensors` names it. All processes call it.

    On the CPU of the main process; the others return nothing.
    """
    tensors = {}
    for name, parameter in module.named_parameters():
        state = optimizer.state.get(parameter, {})
        for kind in KINDS if state else ():
            tensors[f"{kind}/{name}"] = _gather(torch.as_tensor(state[kind]))
    return tensors if torch.distributed.get_rank() == 0 else {}


@torch.no_grad()
def load_full_optimizer_tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put whole state of AdamW into the optimizer of a sharded model; what it held before is gone.

    Call it after Accelerate prepared both: it is then that the optimizer gets its sharded parameters. Every process has all
    tensors and keeps its part; nothing is sent.

    Raises
    ------
    ValueError
        If a name, shape or dtype is not the model's; the optimizer is unchanged then.
    """
    parameters = dict(module.named_parameters())
    check_optimizer_tensors(module, tensors)
    optimizer.state.clear()
    for name in stateful_parameters(tensors):
        parameter = parameters[name]
        # A count of steps is the same for all parts; fused AdamW wants it on the parameter's device
        step = tensors[f"{STEP}/{name}"].clone().to(parameter.device)
        moments = {kind: _cut(tensors[f"{kind}/{name}"], parameter) for kind in MOMENTS}
        optimizer.state[parameter] = {STEP: step, **moments}


@torch.no_grad()
def load_full_state_dict(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put whole weights into a sharded model; every process has all of them and keeps its part, nothing is sent.

    Raises
    ------
    ValueError
        If names or shapes differ; the model is unchanged then.
    """
    weights = module.state_dict()
    for name in sorted(weights.keys() | tensors.keys()):
        expected, found = (tuple(side[name].shape) if name in side else "missing" for side in (weights, tensors))
        if expected != found:
            raise ValueError(f"{name} is {found}, the model asks for {expected}; the weights are of another model")
    for name, tensor in weights.items():
        tensor.copy_(_cut(tensors[name], tensor))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of all gradients together, a plain 0-d tensor; sharded ones count whole. All processes call it."""
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return _whole(norm)


def _whole(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach()


def _gather(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU of the main process; on the others one without content, so that none keeps a copy."""
    whole = _whole(tensor)
    return whole.cpu().contiguous() if torch.distributed.get_rank() == 0 else whole.new_empty(0)


def _cut(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, placed as `like` is."""
    tensor = tensor.to(like.device, like.dtype)
    if not isinstance(like, DTensor):
        return tensor.clone()
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def _plain(model: "TxFM", tensors: dict[str, Tensor]) -> "TxFM":
    from txfm_model.model import TxFM

    with torch.device("meta"):
        plain = TxFM(model.config, model.vocabulary)
    plain.load_state_dict(tensors, assign=True)
    plain.statistics, plain.provenance = model.statistics, model.provenance
    return plain.train(model.training)
