"""Train TxFM on a shard corpus."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a file from a checkout, also by accelerate launch
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.runner import Terminal, run_verb

if TYPE_CHECKING:
    from txfm_model.config import TrainConfig


def run(options: "TrainConfig", terminal: Terminal) -> Mapping[str, object]:
    """Train; the result is that of `txfm_model.trainer.train`."""
    from txfm_model.trainer import train

    return train(options, progress=terminal.progress("training", "steps"))


def summary(result: dict[str, Any]) -> str:
    """Say what was reached and where it lies."""
    lines = [
        f"trained {result['parameters']:,} parameters for {result['steps']:,} steps of "
        f"{result['samples'] // result['steps']:,} samples in {result['seconds']:,.0f} s, "
        f"{result['samples_per_s']:,.0f} samples/s",
        f"processes {result['processes']}, device {result['device']}, precision {result['precision']}",
        f"train loss {result['train_loss']:.6g}, {result['train_excess']:.4g} above its floor",
    ]
    if result["val_loss"] is None:
        lines.append("no validation: the shards hold no validation sample")
    else:
        lines.append(
            f"validation loss {result['val_loss']:.6g}, {result['val_excess']:.4g} above its floor "
            f"(panel-mean predictor: {result['panel_mean_val_excess']:.4g})"
        )
    lines += [f"metrics {result['metrics']}", f"checkpoint {result['checkpoint']}"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Train TxFM on a shard corpus."""
    from txfm_model.config import TrainConfig  # brings torch
    from txfm_model.preemption import EXIT_PREEMPTED, Preempted

    return run_verb("train", TrainConfig, run, summary, argv, exit_codes={Preempted: EXIT_PREEMPTED})


if __name__ == "__main__":
    sys.exit(main())
