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
    """Say what was reached and where it lies; of a dry run, what it would take."""
    if "flops" in result:
        return summarize_dry_run(result)
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
        mean = result["panel_mean_val_excess"]  # None where that predictor has no loss of this kind
        beside = "" if mean is None else f" (panel-mean predictor: {mean:.4g})"
        lines.append(f"validation loss {result['val_loss']:.6g}, {result['val_excess']:.4g} above its floor{beside}")
    if result["init"] is not None:
        init = result["init"]
        lines.append(
            f"started from {init['checkpoint']}: {init['shared_genes']:,} genes kept their rows, {init['new_genes']:,} were new, "
            f"{init['left_out_genes']:,} of its own were left out"
        )
    if result.get("already_finished"):
        lines.append("this run was finished before; nothing was done")
    elif result["resumed_from_step"]:
        lines.append(f"went on after step {result['resumed_from_step']:,}")
    lines += [f"metrics {result['metrics']}", f"checkpoint {result['checkpoint']}"]
    return "\n".join(lines)


def summarize_dry_run(result: dict[str, Any]) -> str:
    """Say what a run would take."""
    memory = result["memory_bytes_per_process"]
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items() if name != "total" and size)
    lines = [
        f"dry run: nothing was trained or written; {result['parameters']:,} parameters, {result['genes']:,} genes",
        f"{result['steps']:,} steps of {result['global_batch']:,} samples, {result['epochs']:.2f} epochs of "
        f"{result['batches_per_epoch']:,} steps; {result['samples']:,} samples, {result['tokens']:,} tokens",
        f"{result['processes']} process(es), {result['samples_at_once']:,} samples at once, {result['genes_shown']:,} genes shown",
        f"{result['flops_per_sample'] / 1e9:,.1f} GFLOP a sample forward and backward, {result['flops']:.3g} FLOP in all",
        f"memory of a process about {memory['total'] / 1e9:.2f} GB ({parts} GB)",
        f"estimate: {result['estimated_hours']:,.2f} hours, at {result['assumed_share']:.0%} of the "
        f"{result['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s that a matrix product reaches on this {result['device']} in precision "
        f"{result['precision']}",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in result["notes"])])


def main(argv: Sequence[str] | None = None) -> int:
    """Train TxFM on a shard corpus."""
    from txfm_model.config import TrainConfig  # brings torch
    from txfm_model.preemption import EXIT_PREEMPTED, Preempted

    return run_verb("train", TrainConfig, run, summary, argv, exit_codes={Preempted: EXIT_PREEMPTED})


if __name__ == "__main__":
    sys.exit(main())
