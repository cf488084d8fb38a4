"""FLOPs as torch counts them while it runs: the check on `txfm_model.cost`, which counts from the configuration."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_flops(run: Callable[[], object]) -> float:
    """Run something and count its matrix products, flash attention on the CPU included, which torch leaves out.

    Of flash attention's backward pass, the scores that it computes again are counted: five products for the forward two.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mapping: dict[Any, Any] = {flash: _attention, backward: _attention_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return float(counter.get_total_flops())


def _attention(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Scores, and their product with the values. Arguments are shapes (B, H, Q or T, C)."""
    B, H, Q, C = q_shape
    return int(2 * B * H * Q * k_shape[-2] * (C + v_shape[-1]))


def _attention_backward(
    grad_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Scores again, then gradients of weights, values, queries and keys."""
    B, H, Q, C = q_shape
    return int(2 * B * H * Q * k_shape[-2] * (3 * C + 2 * v_shape[-1]))
