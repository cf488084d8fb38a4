"""What happened since the last line of metrics, kept on the device until the line is written."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from txfm_model.losses import LossParts, Target, measured_mask

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrainWindow:
    """Losses, gradient norms and live genes of some steps; the device is not waited for before `summary`."""

    def __init__(self, n_genes: int, device: torch.device) -> None:
        self._losses: list[Tensor] = []
        self._sample_ids: list[Tensor] = []
        self._measured_G = torch.zeros(n_genes, dtype=torch.bool, device=device)
        self._alive_G = torch.zeros(n_genes, dtype=torch.bool, device=device)
        self._sample_losses: list[Tensor] = []

    @torch.no_grad()
    def add(
        self,
        batch: Target,
        sample_id_B: Tensor,
        parts: LossParts,
        predicted_BG: Tensor,
        panels_NG: Tensor,
        gradient_norm: Tensor,
    ) -> None:
        """Record one step of this process."""
        per_step = [parts.loss, parts.excess_B.mean(), parts.sum_B.mean(), gradient_norm.float()]
        self._losses.append(torch.stack([value.detach() for value in per_step]))
        self._sample_ids.append(sample_id_B)
        self._sample_losses.append(parts.mean_B.detach())
        measured_BG = measured_mask(batch.panel_id, panels_NG)
        self._measured_G |= measured_BG.any(0)
        self._alive_G |= ((predicted_BG > 0) & measured_BG).any(0)  # above 0 exactly where the logit is

    def summary(self, accelerator: "Accelerator", last_step: int) -> dict[str, float]:
        """Means over steps and processes.

        Raises
        ------
        ValueError
            On every process alike, if a loss or gradient was not finite; names the step and the samples.
        """
        steps_S4 = accelerator.reduce(torch.stack(self._losses), "mean")
        finite_S = torch.isfinite(steps_S4).all(1)
        if not finite_S.all():
            at = int(finite_S.logical_not().nonzero()[0, 0])
            self._fail(accelerator, at, last_step - len(self._losses) + 1 + at)
        live_2G = accelerator.reduce(torch.stack([self._measured_G, self._alive_G]).int(), "sum") > 0
        n_measured, n_alive = live_2G.sum(1).tolist()
        loss, excess, total, gradient_norm = steps_S4.mean(0).tolist()
        return {
            "loss": loss,
            "excess": excess,
            "loss_sum": total,
            "grad_norm": gradient_norm,
            "dead_gene_fraction": 1 - n_alive / n_measured if n_measured else 0.0,
        }

    def _fail(self, accelerator: "Accelerator", at: int, step: int) -> None:
        bad_B = ~torch.isfinite(self._sample_losses[at])
        ids = accelerator.gather(torch.where(bad_B, self._sample_ids[at], -1))
        named = sorted(int(i) for i in ids.tolist() if i >= 0)
        if named:
            some = ", ".join(map(str, named[:10])) + (f" and {len(named) - 10} more" if len(named) > 10 else "")
            raise ValueError(
                f"step {step}: the loss is not finite for sample ids {some}; no checkpoint was written. "
                f"Check these samples with `txfm verify`, or lower optim.lr"
            )
        shown = sorted(int(i) for i in accelerator.gather(self._sample_ids[at]).tolist())[:10]
        raise ValueError(
            f"step {step}: the gradient is not finite although the loss of every sample is "
            f"(sample ids {shown}, ...); no checkpoint was written. Lower optim.lr, or set loop.precision no"
        )
