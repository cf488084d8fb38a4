"""The training loop, on the processes that `accelerate launch` started.

The loader is not prepared by Accelerate: the stream already gives each rank its part. Each step depends on
(corpus, configuration, step) alone: rate, samples, masks and stochastic depth are functions of it.
"""

import itertools
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from txfm_data.panels import Panels
from txfm_data.progress import Progress, ignore
from txfm_model.config import LoopConfig, TrainConfig
from txfm_model.initialise import initialise
from txfm_model.launch import Precision, autocast, choose_precision, start_accelerator
from txfm_model.losses import poisson_loss
from txfm_model.metrics import METRICS, MetricsWriter
from txfm_model.model import TxFM
from txfm_model.optimizer import learning_rate, make_optimizer, set_learning_rate
from txfm_model.provenance import describe_origin
from txfm_model.validation import PanelMeanPredictor, means_over_processes, model_totals
from txfm_model.window import TrainWindow

if TYPE_CHECKING:
    from accelerate import Accelerator

    from shards.manifest import Corpus
    from shards.stream import MaskedBatch, MaskedStream

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Everything a step needs; made once."""

    config: TrainConfig
    corpus: "Corpus"
    accelerator: "Accelerator"
    stream: "MaskedStream"
    model: TxFM
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    panels_NG: Tensor
    precision: Precision
    total_steps: int
    panel_mean: tuple[float | None, float | None]


def train(config: TrainConfig, *, progress: Progress = ignore) -> dict[str, Any]:
    """Train a model on a shard corpus; metrics and, at the end, the checkpoint go to `config.out`.

    Parameters
    ----------
    config
        The run.
    progress
        Called as progress(steps done, steps in all) on the main process.

    Returns
    -------
    dict
        Plain values: steps, samples, seconds, losses, paths, processes. The same on every process.

    Raises
    ------
    FileExistsError
        If `config.out` already holds a checkpoint.
    ValueError
        If corpus and configuration do not fit, or a loss is not finite; no checkpoint is written then.
    """
    from txfm_model.checkpoint import save_checkpoint

    out = _free_folder(config.out)
    run = _prepare(config)
    main = run.accelerator.is_main_process
    if main:
        with MetricsWriter(out) as writer:
            results = _loop(run, writer, progress)
    else:
        results = _loop(run, None, ignore)
    results["checkpoint"] = str(out / "checkpoint")
    results["metrics"] = str(out / METRICS)
    if main:
        run.model.statistics = run.corpus.statistics
        run.model.provenance = describe_origin(config, run.corpus.fingerprint) | {"results": _lasting(results)}
        save_checkpoint(run.model, out / "checkpoint")
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return results


def _free_folder(out: str) -> Path:
    """Folder of the run, refused where a run has already left its checkpoint."""
    if "://" in out:
        raise ValueError(f"out: {out} is a URL; a run is written to a local folder, copy it from there afterwards")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"out: {folder} is a file; give a folder")
    for taken in (folder / "checkpoint", folder / "config.json"):
        if taken.exists():
            raise FileExistsError(f"out: {folder} already holds a checkpoint ({taken}); choose another folder")
    return folder


def _prepare(config: TrainConfig) -> _Run:
    from shards.manifest import open_corpus
    from shards.stream import MaskedStream

    corpus = open_corpus(config.shards)
    if corpus.target_sum != config.model.target_sum:
        raise ValueError(
            f"{config.shards}: counts are scaled to {corpus.target_sum:g}, model.target_sum is "
            f"{config.model.target_sum:g}; make them equal"
        )
    accelerator = start_accelerator(config.loop)
    precision = choose_precision(config.loop.precision, accelerator.device, os.environ)
    stream = MaskedStream(
        corpus,
        seed=config.loop.seed,
        global_batch=config.loop.global_batch,
        n_unmasked=config.mask.n_unmasked,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        temperature=config.mask.temperature,
        pin_memory=accelerator.device.type == "cuda",
    )
    with torch.device("meta"):
        model = TxFM(config.model, corpus.vocabulary)
    model.to_empty(device="cpu")
    initialise(model, seed=config.loop.seed, statistics=corpus.statistics)
    model.to(accelerator.device).train()
    total_steps = _total_steps(config.loop, stream)
    wrapped, optimizer = accelerator.prepare(model, make_optimizer(model, config.optim, total_steps))
    predictor = PanelMeanPredictor(corpus.panels, len(corpus.vocabulary))
    return _Run(
        config=config,
        corpus=corpus,
        accelerator=accelerator,
        stream=stream,
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        panels_NG=panel_table(corpus.panels, len(corpus.vocabulary)).to(accelerator.device),
        precision=precision,
        total_steps=total_steps,
        panel_mean=means_over_processes(
            predictor.totals(_validation_batches(config, corpus, accelerator)), accelerator
        ),
    )


def panel_table(panels: Panels, n_genes: int) -> Tensor:
    """Which genes each panel measures, (N, G) bool on the CPU."""
    table_NG = np.zeros((len(panels), n_genes), dtype=bool)
    for panel_id in range(len(panels)):
        table_NG[panel_id, panels.genes(panel_id)] = True
    return torch.from_numpy(table_NG)


def _validation_batches(config: TrainConfig, corpus: "Corpus", accelerator: "Accelerator") -> Iterator["MaskedBatch"]:
    from shards.stream import validation_batches

    return validation_batches(
        corpus,
        seed=config.loop.seed,
        batch_size=max(1, config.loop.global_batch // accelerator.num_processes),
        n_unmasked=config.mask.n_unmasked,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        temperature=config.mask.temperature,
        pin_memory=accelerator.device.type == "cuda",
    )


def _loop(run: _Run, writer: MetricsWriter | None, progress: Progress) -> dict[str, Any]:
    """Run every step; returns the results that do not depend on paths."""
    loop, device = run.config.loop, run.accelerator.device
    window = TrainWindow(len(run.corpus.vocabulary), device)
    train_line: dict[str, float] = {}
    val_line: dict[str, float | None] = {}
    started = window_started = time.perf_counter()
    window_wait, window_steps, training_s = run.stream.wait_s, 0, 0.0
    for step, epoch, batch in _steps(run.stream, run.total_steps):
        lr = learning_rate(step - 1, run.total_steps, run.config.optim)
        _train_step(run, batch.to(device), step, lr, window)
        window_steps += 1
        if step % loop.log_every == 0 or step == run.total_steps:
            train_line = window.summary(run.accelerator, step) | {"lr": lr}
            elapsed = max(time.perf_counter() - window_started, 1e-9)
            train_line["samples_per_s"] = window_steps * loop.global_batch / elapsed
            train_line["data_wait_fraction"] = min(1.0, (run.stream.wait_s - window_wait) / elapsed)
            training_s += elapsed
            if writer is not None:
                writer.write("train", step, epoch, dict(train_line))
            window = TrainWindow(len(run.corpus.vocabulary), device)
            window_started, window_wait, window_steps = time.perf_counter(), run.stream.wait_s, 0
        if step % loop.validate_every == 0 or step == run.total_steps:
            before = time.perf_counter()
            val_line = _validate(run)
            if writer is not None:
                writer.write("val", step, epoch, val_line)
            window_started += time.perf_counter() - before
        progress(step, run.total_steps)
    samples = run.total_steps * loop.global_batch
    return {
        "steps": run.total_steps,
        "samples": samples,
        "seconds": time.perf_counter() - started,
        "samples_per_s": samples / training_s,
        "parameters": run.model.n_parameters,
        "train_loss": train_line["loss"],
        "train_excess": train_line["excess"],
        "val_loss": val_line["loss"],
        "val_excess": val_line["excess"],
        "panel_mean_val_loss": val_line["panel_mean_loss"],
        "panel_mean_val_excess": val_line["panel_mean_excess"],
        "val_samples": run.corpus.n_samples("val"),
        "processes": run.accelerator.num_processes,
        "precision": run.precision,
        "device": device.type,
        "cpu_threads": torch.get_num_threads(),
    }


def _total_steps(loop: LoopConfig, stream: "MaskedStream") -> int:
    """Optimizer steps of the run; where datasets have weights, each epoch has a length of its own."""
    if loop.epochs is None or not stream.corpus.is_weighted:
        return loop.total_steps(stream.batches_in_epoch(0))
    whole = int(loop.epochs)
    batches = float(sum(map(stream.batches_in_epoch, range(whole))))
    if loop.epochs > whole:
        batches += (loop.epochs - whole) * stream.batches_in_epoch(whole)
    return max(1, round(batches))


def _steps(stream: "MaskedStream", total_steps: int) -> Iterator[tuple[int, float, "MaskedBatch"]]:
    """Step (1 is the first), epochs done after it, and this rank's batch, over as many epochs as it takes."""
    step = 0
    for epoch in itertools.count():
        n_batches = stream.batches_in_epoch(epoch)
        batches = stream.epoch(epoch)
        for batch in itertools.islice(batches, total_steps - step):
            step += 1
            yield step, epoch + (batch.number + 1) / n_batches, batch
        batches.close()
        if step == total_steps:
            return


def _train_step(run: _Run, batch: "MaskedBatch", step: int, lr: float, window: TrainWindow) -> None:
    """One optimizer step on this rank's part of the global batch; DDP averages the gradients over ranks."""
    torch.manual_seed(_step_seed(run.config.loop.seed, step, run.accelerator.process_index))
    set_learning_rate(run.optimizer, lr)
    with autocast(run.accelerator.device, run.precision):
        predicted_BG = run.wrapped(batch.gene_ids, batch.values, batch.n_unmasked if batch.is_padded else None)
    parts = poisson_loss(predicted_BG, batch, run.panels_NG)
    run.accelerator.backward(parts.loss)
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    gradient_norm = nn.utils.get_total_norm(gradients)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    window.add(batch, batch.sample_id, parts, predicted_BG, run.panels_NG, gradient_norm)


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of the draws inside one step of one rank (stochastic depth)."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _validate(run: _Run) -> dict[str, float | None]:
    batches = _validation_batches(run.config, run.corpus, run.accelerator)
    totals = model_totals(run.model, batches, run.panels_NG, run.precision)
    loss, excess = means_over_processes(totals, run.accelerator)
    panel_mean_loss, panel_mean_excess = run.panel_mean
    return {
        "loss": loss,
        "excess": excess,
        "panel_mean_loss": panel_mean_loss,
        "panel_mean_excess": panel_mean_excess,
    }


def _lasting(results: dict[str, Any]) -> dict[str, Any]:
    """Results that belong into a checkpoint: without the paths of this machine."""
    return {key: value for key, value in results.items() if key not in ("checkpoint", "metrics")}
