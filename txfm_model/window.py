"""What happened since the last line of metrics, kept on the device until the line is written."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

    from txfm_model.losses import LossParts

COLUMNS = ("loss", "excess", "loss_sum", "grad_norm")


class NonFiniteError(ValueError):
    """A loss or a gradient was not finite; the run stops on every process alike."""


class TrainWindow:
    """Losses, gradient norms and live genes of some steps; the device is not waited for before `summary` or `state`.

    n_genes : of the vocabulary.  device : of the model.
    earlier : the `state` of a run that goes on in this window.
    """

    def __init__(self, n_genes: int, device: torch.device, earlier: dict[str, Tensor] | None = None) -> None:
        earlier = earlier or {}
        self._earlier_S4 = earlier.get("losses", torch.empty(0, len(COLUMNS))).to(device)
        self._measured_G = earlier.get("measured", torch.zeros(n_genes, dtype=torch.bool)).bool().to(device)
        self._alive_G = earlier.get("alive", torch.zeros(n_genes, dtype=torch.bool)).bool().to(device)
        self._losses: list[Tensor] = []
        self._sample_ids: list[Tensor] = []
        self._sample_losses: list[Tensor] = []
        self._parts: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, sample_id_B: Tensor, measured_BG: Tensor, predicted_BG: Tensor, loss: "LossParts") -> None:
        """Record one part of a step of this process."""
        self._parts.append((sample_id_B, torch.stack([loss.loss_B, loss.excess_B, loss.sum_B]).detach()))
        self._measured_G |= measured_BG.any(0)
        self._alive_G |= ((predicted_BG > 0) & measured_BG).any(
            0
        )  # with a rectified activation, where the logit is above 0

    @torch.no_grad()
    def end_step(self, gradient_norm: Tensor) -> None:
        """Record the end of a step, with the norm of its gradient."""
        ids, losses = zip(*self._parts, strict=True)
        self._parts = []
        losses_3B = torch.cat(losses, dim=1)
        self._losses.append(torch.cat([losses_3B.mean(1), gradient_norm.float().reshape(1)]))
        self._sample_ids.append(torch.cat(ids))
        self._sample_losses.append(losses_3B[0])

    def summary(self, accelerator: "Accelerator", last_step: int) -> dict[str, float]:
        """Means over steps and processes.

        Raises
        ------
        NonFiniteError
            On every process alike, if a loss or gradient was not finite; names the step and the samples.
        """
        state = self.state(accelerator, last_step)
        n_measured, n_alive = int(state["measured"].sum()), int(state["alive"].sum())
        means = dict(zip(COLUMNS, state["losses"].mean(0).tolist(), strict=True))
        return means | {"dead_gene_fraction": 1 - n_alive / n_measured if n_measured else 0.0}

    def state(self, accelerator: "Accelerator", last_step: int) -> dict[str, Tensor]:
        """The window over all processes, as tensors to go on from; raises as `summary` does."""
        steps_S4 = self._earlier_S4
        if self._losses:
            steps_S4 = torch.cat([steps_S4, accelerator.reduce(torch.stack(self._losses), "mean")])
        finite_S = torch.isfinite(steps_S4).all(1)
        if not finite_S.all():
            at = int(finite_S.logical_not().nonzero()[0, 0])
            self._fail(accelerator, at - len(self._earlier_S4), last_step - len(steps_S4) + 1 + at)
        live_2G = accelerator.reduce(torch.stack([self._measured_G, self._alive_G]).int(), "sum") > 0
        return {"losses": steps_S4, "measured": live_2G[0].to(torch.uint8), "alive": live_2G[1].to(torch.uint8)}

    def _fail(self, accelerator: "Accelerator", at: int, step: int) -> None:
        bad_B = ~torch.isfinite(self._sample_losses[at])
        ids = accelerator.gather(torch.where(bad_B, self._sample_ids[at], -1))
        named = sorted(int(i) for i in ids.tolist() if i >= 0)
        if named:
            some = ", ".join(map(str, named[:10])) + (f" and {len(named) - 10} more" if len(named) > 10 else "")
            raise NonFiniteError(
                f"step {step}: the loss is not finite for sample ids {some}; training stopped. "
                f"Check these samples with `txfm verify`, or lower optim.lr"
            )
        shown = sorted(int(i) for i in accelerator.gather(self._sample_ids[at]).tolist())[:10]
        raise NonFiniteError(
            f"step {step}: the gradient is not finite although the loss of every sample is "
            f"(sample ids {shown}, ...); training stopped. Lower optim.lr, set optim.clip_norm, or set loop.precision no"
        )
