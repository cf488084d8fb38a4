"""Everything a training run needs, made once: processes, stream, model, optimizer, and what it goes on from."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from txfm_data.panels import Panels
from txfm_model.config import TrainConfig
from txfm_model.finetune import start_from
from txfm_model.initialise import initialise
from txfm_model.launch import Precision, choose_precision, start_accelerator
from txfm_model.losses import Loss
from txfm_model.model import TxFM
from txfm_model.optimizer import make_optimizer
from txfm_model.optimizer_state import restore_optimizer
from txfm_model.provenance import without_secrets
from txfm_model.run_state import (
    CHECKPOINTS,
    RunState,
    check_same_run,
    checkpoint_name,
    find_resume,
    load_run_state,
    remove_leftovers,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate import Accelerator

    from shards.manifest import Corpus
    from shards.stream import MaskedBatch, MaskedStream

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a step needs.

    wrapped : the model as Accelerate prepared it (DDP on several processes); forward passes that train go through it.
    panels_NG : (N, G) bool, which genes each panel measures.
    is_sharded : whether FSDP has cut the parameters into parts; what looks at them outside of a step gathers them first.
    resumed : where the run goes on from, if it does.
    init : of a run that started from another checkpoint: its address and how many genes it shares.
    """

    config: TrainConfig
    corpus: "Corpus"
    accelerator: "Accelerator"
    stream: "MaskedStream"
    model: TxFM
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    panels_NG: Tensor
    precision: Precision
    total_steps: int
    is_sharded: bool
    resumed: RunState | None
    init: dict[str, Any] | None

    def validation_batches(self) -> "Iterator[MaskedBatch]":
        """This process's part of the val split; masks never change."""
        from shards.stream import validation_batches

        loop, processes = self.config.loop, self.accelerator.num_processes
        return validation_batches(
            self.corpus,
            seed=loop.seed,
            batch_size=max(1, loop.global_batch // processes // loop.accumulation),
            rank=self.accelerator.process_index,
            world_size=processes,
            **_shown(self.config, self.accelerator),
        )


def prepare_run(config: TrainConfig) -> Run:
    """Join the processes and make everything ready for the first step.

    Raises
    ------
    ValueError
        If corpus, configuration, checkpoint and number of processes do not fit.
    """
    from shards.manifest import open_corpus

    corpus = open_corpus(config.shards)
    check_corpus(config, corpus)
    accelerator = start_accelerator(config.loop)
    check_layout(config, accelerator.num_processes)
    if _is_fsdp(accelerator) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        from txfm_model.fsdp import check_fsdp

        check_fsdp(accelerator, os.environ)
    stream = _open_stream(config, corpus, accelerator)
    total_steps = config.loop.total_steps(stream.batches_in_epoch, is_weighted=corpus.is_weighted)
    resumed, optimizer_state = None, {}
    folder = _agree_on_resume(config, accelerator)
    if folder is not None:
        loaded = load_run_state(folder)
        _check_resumed(config, corpus, stream, loaded.state)
        resumed, optimizer_state, model = loaded.state, loaded.optimizer, loaded.model
        init = resumed.progress.get("init")
        logger.info("going on after step %d of %d, from %s", resumed.step, total_steps, folder)
    else:
        model, init = _new_model(config, corpus)
    model.set_activation_checkpointing(config.loop.activation_checkpointing)
    model.to(accelerator.device).train()
    if config.loop.compile:
        model.compile()
    wrapped, optimizer = _prepare(accelerator, model, make_optimizer(model, config.optim, total_steps), optimizer_state)
    return Run(
        config=config,
        corpus=corpus,
        accelerator=accelerator,
        stream=stream,
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        loss=Loss.of(config),
        panels_NG=panel_table(corpus.panels, len(corpus.vocabulary)).to(accelerator.device),
        precision=choose_precision(config.loop.precision, accelerator.device, os.environ),
        total_steps=total_steps,
        is_sharded=_is_fsdp(accelerator),
        resumed=resumed,
        init=init,
    )


def _is_fsdp(accelerator: "Accelerator") -> bool:
    from accelerate import DistributedType

    return bool(accelerator.distributed_type == DistributedType.FSDP)


def _prepare(
    accelerator: "Accelerator", model: TxFM, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Hand model and optimizer to Accelerate, and give the optimizer what it goes on with."""
    if not _is_fsdp(accelerator):
        if state:
            restore_optimizer(model, optimizer, state)
        return accelerator.prepare(model, optimizer)
    from txfm_model.fsdp import load_full_optimizer_tensors

    wrapped, prepared = accelerator.prepare(model, optimizer)
    if state:
        load_full_optimizer_tensors(wrapped, prepared, state)
    return wrapped, prepared


def check_corpus(config: TrainConfig, corpus: "Corpus") -> None:
    """Refuse a corpus whose values are not what the configuration takes them for."""
    if corpus.target_sum != config.model.target_sum:
        raise ValueError(
            f"{config.shards}: counts are scaled to {corpus.target_sum:g}, model.target_sum is "
            f"{config.model.target_sum:g}; make them equal"
        )
    if config.loss.needs_counts and corpus.manifest.has_fractions:
        raise ValueError(
            f"{config.shards}: loss.kind {config.loss.kind} is a likelihood of whole counts, and this corpus has fractions "
            f"(txfm info names the datasets); use poisson, mse or smooth_l1, or build shards without them"
        )


def check_layout(config: TrainConfig, processes: int) -> None:
    """Refuse a global batch that processes and parts cannot share evenly; the error names batches that would do."""
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    loop = config.loop
    parts = processes * loop.accumulation
    below = loop.global_batch // parts * parts
    if loop.global_batch != below:
        near = " or ".join(str(batch) for batch in (below, below + parts) if batch)
        raise ValueError(
            f"loop.global_batch {loop.global_batch} cannot be cut into {loop.accumulation} equal part(s) on each of {processes} "
            f"process(es); take {near}, or another loop.accumulation"
        )


def panel_table(panels: Panels, n_genes: int) -> Tensor:
    """Which genes each panel measures, (N, G) bool on the CPU."""
    table_NG = np.zeros((len(panels), n_genes), dtype=bool)
    for panel_id in range(len(panels)):
        table_NG[panel_id, panels.genes(panel_id)] = True
    return torch.from_numpy(table_NG)


def _shown(config: TrainConfig, accelerator: "Accelerator") -> dict[str, Any]:
    """What a stream gives of each sample."""
    return {
        "n_unmasked": config.mask.n_unmasked,
        "temperature": config.mask.temperature,
        "scale_library": config.model.preprocessing == "library_log1p",
        "raw_counts": config.loss.needs_counts,
        "pin_memory": accelerator.device.type == "cuda",
    }


def _open_stream(config: TrainConfig, corpus: "Corpus", accelerator: "Accelerator") -> "MaskedStream":
    from shards.stream import MaskedStream

    return MaskedStream(
        corpus,
        seed=config.loop.seed,
        global_batch=config.loop.global_batch,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        **_shown(config, accelerator),
    )


def _new_model(config: TrainConfig, corpus: "Corpus") -> tuple[TxFM, dict[str, Any] | None]:
    """A model at its start: random, or from the checkpoint `init` as far as that has weights for it."""
    with torch.device("meta"):
        model = TxFM(config.model, corpus.vocabulary)
    model.to_empty(device="cpu")
    is_scaled = config.model.preprocessing == "library_log1p"
    initialise(model, seed=config.loop.seed, statistics=corpus.statistics if is_scaled else None)
    if config.init is None:
        return model, None
    counts = start_from(model, TxFM.from_pretrained(config.init))
    logger.info(
        "from %s: %d genes keep their rows, %d are new, %d of its own are left out",
        without_secrets(config.init),
        counts.shared,
        counts.new,
        counts.left_out,
    )
    return model, {
        "checkpoint": without_secrets(config.init),
        "shared_genes": counts.shared,
        "new_genes": counts.new,
        "left_out_genes": counts.left_out,
    }


def _agree_on_resume(config: TrainConfig, accelerator: "Accelerator") -> Path | None:
    """The checkpoint to go on from, as the main process chooses it; the same on every process."""
    if accelerator.is_main_process:
        remove_leftovers(Path(config.out))
    if config.resume is None:
        return None
    if config.resume != "auto":
        return find_resume(Path(config.out), config.resume)
    found = find_resume(Path(config.out), "auto") if accelerator.is_main_process else None
    step = 0 if found is None else int(found.name.removeprefix("step-"))
    chosen = int(accelerator.reduce(torch.tensor(step, device=accelerator.device), "sum"))
    if chosen == 0:
        return None
    folder = Path(config.out) / CHECKPOINTS / checkpoint_name(chosen)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: the main process goes on from this checkpoint, and process {accelerator.process_index} does not see it; "
            f"`out` must be a folder that all machines share"
        )
    return folder


def _check_resumed(config: TrainConfig, corpus: "Corpus", stream: "MaskedStream", state: RunState) -> None:
    check_same_run(state.training, config)
    if state.corpus_fingerprint != corpus.fingerprint:
        raise ValueError(
            f"{config.shards}: its fingerprint is {corpus.fingerprint}, the run was started on {state.corpus_fingerprint}; resume "
            f"with the same shards, or start a new run with init"
        )
    stream.position(state.stream)
