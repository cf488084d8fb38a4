"""What AdamW has learned of the gradients, as named tensors that a safetensors file can hold; no pickle."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"
KINDS = (STEP, *MOMENTS)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of AdamW by parameter name: "step/NAME" () float32, "exp_avg/NAME" and "exp_avg_sq/NAME".

    On the CPU, moments in the shape and dtype of the parameter. A parameter that never had a gradient has no state
    and is not named. Tensors that are on the CPU already share memory with the optimizer: write them before its next step.

    Raises
    ------
    ValueError
        If the optimizer holds a parameter that is not the model's, or more than AdamW keeps.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        name = names.get(id(parameter))
        if name is None:
            raise ValueError(
                f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not among the model's; "
                f"give the model that the optimizer was made for"
            )
        if not state:
            continue
        if sorted(state) != sorted(KINDS):
            raise ValueError(
                f"optimizer state of {name} has {', '.join(sorted(map(str, state)))}, expected {', '.join(KINDS)}: only "
                f"AdamW without amsgrad can be saved"
            )
        tensors[f"{STEP}/{name}"] = torch.as_tensor(state[STEP], dtype=torch.float32).detach().cpu().reshape(())
        for kind in MOMENTS:
            tensors[f"{kind}/{name}"] = state[kind].detach().cpu().contiguous()
    return tensors


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put state that `optimizer_tensors` gave into an optimizer of the same parameters, on their devices.

    What the optimizer held before is gone. Learning rate, betas, eps and weight decay stay as they are: they follow from
    the configuration.

    Raises
    ------
    ValueError
        If a name, shape or dtype is not the model's; the optimizer is unchanged then.
    """
    check_optimizer_tensors(model, tensors)
    parameters = dict(model.named_parameters())
    handled = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for name in stateful_parameters(tensors):
        if id(parameters[name]) not in handled:
            raise ValueError(f"saved optimizer state is of {name}, which this optimizer does not train")
    optimizer.state.clear()
    for name in stateful_parameters(tensors):
        parameter = parameters[name]
        group = handled[id(parameter)]
        # Fused and capturable AdamW count steps on the parameter's device, the others on the CPU
        on_device = group.get("fused") or group.get("capturable")
        step = tensors[f"{STEP}/{name}"].clone().to(parameter.device if on_device else "cpu")
        moments = {kind: torch.empty_like(parameter).copy_(tensors[f"{kind}/{name}"]) for kind in MOMENTS}
        optimizer.state[parameter] = {STEP: step, **{kind: moment.detach() for kind, moment in moments.items()}}


def stateful_parameters(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the parameters that optimizer tensors are of, in alphabetical order."""
    return sorted({name.partition("/")[2] for name in tensors})


def check_optimizer_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Check that every tensor is of a parameter of the model, and of each parameter all tensors are there or none.

    Raises
    ------
    ValueError
        Naming the first tensor that does not fit.
    """
    parameters = dict(model.named_parameters())
    for name in sorted(tensors):
        kind, _, parameter = name.partition("/")
        if kind not in KINDS or parameter not in parameters:
            raise ValueError(f"optimizer tensor {name} is of no parameter of the model; it is of another model")
    for parameter in stateful_parameters(tensors):
        weights = parameters[parameter]
        for kind in KINDS:
            name = f"{kind}/{parameter}"
            expected = ((), torch.float32) if kind == STEP else (tuple(weights.shape), weights.dtype)
            found = (tuple(tensors[name].shape), tensors[name].dtype) if name in tensors else "missing"
            if found != expected:
                raise ValueError(
                    f"optimizer tensor {name} is {found}, the model asks for {expected}; it is of another model"
                )
        steps = float(tensors[f"{STEP}/{parameter}"])
        if not (steps >= 1 and steps.is_integer()):
            raise ValueError(f"optimizer tensor {STEP}/{parameter} is {steps}, expected a number of steps, 1 or more")
