"""What a run costs, from its configuration alone: work, memory, parameters; and `dry_run`, which asks the corpus too.

Counted are the multiplications and additions of matrix products (2 each pair), the convention of torch's `FlopCounterMode`,
with which a test compares. Norms, activations, loss and optimizer are not: a few per cent of the time, less of the work.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from txfm_data.vocabulary import Vocabulary
from txfm_model.config import LoopConfig, ModelConfig, TrainConfig
from txfm_model.launch import choose_precision
from txfm_model.stochastic_depth import stochastic_depth_rates

if TYPE_CHECKING:
    from shards.manifest import Corpus

Form = Literal["fast", "plain"]
ASSUMED_SHARE = 0.4
"""Share of the device's matmul rate that `dry_run` expects of training; docs/results/training_cost.md has measured ones."""
_FLOAT, _HALF = 4, 2  # bytes
_PREDICTIONS = (
    6  # (B, G) float32 arrays that are there at once: logits, what the activation and the loss keep, gradients
)


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of a training step, per sample, by part of the network.

    forward, backward : of tokens, qkv, attention, out and mlp of all blocks that all tokens pass, last_block (where CLS alone is
    computed), decoder, head.
    recomputed : of attention scores, which flash attention computes again in the backward pass, and of blocks under activation
    checkpointing. No part of `total`: it is work that the mathematics does not ask for.
    """

    forward: dict[str, float]
    backward: dict[str, float]
    recomputed: float

    @property
    def total(self) -> float:
        """Forward and backward."""
        return sum(self.forward.values()) + sum(self.backward.values())

    @property
    def executed(self) -> float:
        """What the device does, recomputation included."""
        return self.total + self.recomputed


def train_flops(
    config: ModelConfig,
    n_genes: int,
    n_shown: int,
    batch: int,
    *,
    form: Form = "fast",
    activation_checkpointing: bool = False,
) -> Flops:
    """FLOPs per sample of one training step.

    Parameters
    ----------
    config
        The network.
    n_genes
        Genes of the vocabulary.
    n_shown
        Genes shown of each sample.
    batch
        Samples that pass the network at once (of one process and one part of an accumulated step): the fast form projects
        the codebook once for all of them.
    form
        fast: the model that is trained. plain: all tokens pass all blocks, the codebook is gathered and then projected.
    activation_checkpointing
        Blocks are computed again in the backward pass.
    """
    D, T, hidden = config.width, n_shown + 1, config.mlp_ratio * config.width
    whole = config.blocks if form == "plain" else config.blocks - 1
    scores = 2.0 * T * T * D
    forward = {
        "tokens": _token_flops(config, n_genes, n_shown, batch, form),
        "qkv": whole * 2.0 * T * D * 3 * D,
        "attention": whole * 2 * scores,
        "out": whole * 2.0 * T * D * D,
        "mlp": whole * 4.0 * T * D * hidden,
        "last_block": 0.0,
        "decoder": 2.0 * D * D * (2 * config.decoder_blocks + (config.tokens == "concat")),
        "head": 2.0 * D * n_genes * (2 if config.count_head == "zinb" else 1),
    }
    again = whole * scores
    if form == "fast":
        forward["last_block"] = 4.0 * T * D * D + 4.0 * T * D + 4.0 * D * D + 4.0 * D * hidden
        again += 2.0 * T * D
    if activation_checkpointing:
        again += sum(forward[part] for part in ("qkv", "attention", "out", "mlp", "last_block"))
        if form == "fast":
            # Nothing asks for the output of a block's last layer again, where all samples have the branch.
            again -= 2.0 * D * hidden * (whole * T + 1)
    # Each product has two factors, and both have a gradient: shown values alone have none, and they are no factor.
    return Flops(forward=forward, backward={part: 2 * flops for part, flops in forward.items()}, recomputed=again)


def skipped_flops(config: ModelConfig, flops: Flops) -> float:
    """FLOPs of a sample's branches that stochastic depth leaves out, on average over samples; part of `flops.total`."""
    rates = stochastic_depth_rates(config.blocks, config.stochastic_depth)
    work = {part: flops.forward[part] + flops.backward[part] for part in flops.forward}
    of_all = rates[:-1] if work["last_block"] else rates
    mean = sum(of_all) / max(len(of_all), 1)
    return mean * sum(work[part] for part in ("qkv", "attention", "out", "mlp")) + rates[-1] * work["last_block"]


def _token_flops(config: ModelConfig, n_genes: int, n_shown: int, batch: int, form: Form) -> float:
    D = config.width
    if config.tokens == "concat":
        return 0.0
    if form == "plain":
        return 2.0 * n_shown * (D + 1) * D
    return 2.0 * min(n_genes / batch, n_shown) * D * D  # the table of all genes, or each token


def parameter_count(config: ModelConfig, n_genes: int) -> int:
    """Trained parameters of a model, counted without a weight."""
    from txfm_model.model import TxFM

    vocabulary = Vocabulary(tuple(f"gene{i}" for i in range(n_genes)), ("",) * n_genes)
    with torch.device("meta"):
        return TxFM(config, vocabulary).n_parameters


def memory_estimate(
    config: TrainConfig,
    n_genes: int,
    n_shown: int,
    *,
    processes: int = 1,
    precision: Literal["bf16", "no"] = "no",
    n_nonzero: float | None = None,
    parameters: int | None = None,
) -> dict[str, int]:
    """Bytes that one process needs at the height of a step, by part; `total` is their sum.

    Parameters
    ----------
    config
        The run; its batch, parts and activation checkpointing matter.
    n_genes, n_shown
        Genes of the vocabulary, and shown of each sample.
    processes
        That share a global batch.
    precision
        As `txfm_model.launch.choose_precision` gives it.
    n_nonzero
        Genes above zero in a sample, on average; a tenth of the vocabulary where it is not known.
    parameters
        Of the model, if they are known.

    Returns
    -------
    dict
        weights, gradients, optimizer (two moments), buckets (DDP's copy of the gradients), activations (kept for the backward
        pass, and what it holds itself), predictions, batch (three of them: in use and ahead), total.
    """
    model, is_bf16 = config.model, precision == "bf16"
    n_parameters = parameter_count(model, n_genes) if parameters is None else parameters
    batch = _part_of_step(config.loop, processes)
    nonzero = 0.1 * n_genes if n_nonzero is None else n_nonzero
    parts = {
        "weights": _FLOAT * n_parameters,
        "gradients": _FLOAT * n_parameters,
        "optimizer": 2 * _FLOAT * n_parameters,
        "buckets": _FLOAT * n_parameters if processes > 1 else 0,
        "activations": _activation_bytes(model, n_genes, n_shown, batch, is_bf16, config.loop.activation_checkpointing),
        "predictions": _PREDICTIONS * _FLOAT * batch * n_genes * (2 if model.count_head == "zinb" else 1),
        "batch": round(3 * batch * (12 * n_shown + 12 * nonzero + 64)),
    }
    return parts | {"total": sum(parts.values())}


def _activation_bytes(
    config: ModelConfig, n_genes: int, n_shown: int, batch: int, is_bf16: bool, is_checkpointed: bool
) -> int:
    """What the encoder keeps of a forward pass, and the height of the backward pass through one block."""
    D, T, r = config.width, n_shown + 1, config.mlp_ratio
    item = _HALF if is_bf16 else _FLOAT
    state = _FLOAT * D  # the residual stream stays float32
    # Both norms keep their input; inputs of products (norms' results, q, k, v, attended, MLP) are in `item`.
    block = 2 * state + item * D * (2 + 3 + 1 + 2 * r) + 4 * config.heads + 16
    in_work = 2 * state + item * D * 2 * r  # gradients that are under way in one block
    whole = config.blocks - 1
    kept = state * config.blocks + block if is_checkpointed else whole * block
    last = state + item * D * 3  # of the last block: norm and k, v of all tokens
    tokens = 2 * state  # gathered, and with CLS in front
    # Autocast keeps its copies for the forward pass; else there are those of the weights that LayerScale scaled.
    weights = (12 if is_bf16 else 1 + r) * D * D * item * config.blocks
    table = 2 * _FLOAT * n_genes * D if config.tokens == "concat_project" else 0  # projected codebook and its gradient
    return batch * T * (kept + last + tokens + in_work) + weights + table


def dry_run(config: TrainConfig, *, processes: int | None = None) -> dict[str, Any]:
    """Count what a run would do, and estimate how long it would take. Nothing is trained and nothing written.

    Parameters
    ----------
    config
        The run.
    processes
        That would share it; None takes WORLD_SIZE of the launcher, or 1.

    Returns
    -------
    dict
        Plain values: steps, epochs, samples, tokens, parameters, FLOPs, memory of each process, the device with its measured
        matmul rate, hours (an estimate), notes.

    Raises
    ------
    FileNotFoundError
        If there is no corpus.
    ValueError
        If corpus, batch, parts and processes do not fit; as the run itself would.
    """
    from shards.manifest import open_corpus
    from shards.stream import MaskedStream
    from txfm_model.bench.matmul import matmul_rate
    from txfm_model.run import check_corpus, check_layout

    n_processes = int(os.environ.get("WORLD_SIZE", "1")) if processes is None else processes
    corpus = open_corpus(config.shards)
    check_corpus(config, corpus)
    check_layout(config, n_processes)
    stream = MaskedStream(
        corpus,
        seed=config.loop.seed,
        global_batch=config.loop.global_batch,
        n_unmasked=config.mask.n_unmasked,
        world_size=n_processes,
    )
    steps = config.loop.total_steps(stream.batches_in_epoch, is_weighted=corpus.is_weighted)
    batches = stream.batches_in_epoch(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(config.loop.precision, device, os.environ)
    n_genes, n_train = len(corpus.vocabulary), corpus.n_samples("train")
    n_shown = min(config.mask.n_unmasked, max(len(corpus.panels.genes(i)) for i in range(len(corpus.panels))))
    parameters = parameter_count(config.model, n_genes)
    batch = _part_of_step(config.loop, n_processes)
    checkpointing = config.loop.activation_checkpointing
    flops = train_flops(config.model, n_genes, n_shown, batch, activation_checkpointing=checkpointing)
    nonzero = float(corpus.statistics.n_nonzero.sum()) / max(1, n_train)
    memory = memory_estimate(
        config, n_genes, n_shown, processes=n_processes, precision=precision, n_nonzero=nonzero, parameters=parameters
    )
    rate = matmul_rate(device, precision)
    samples = steps * config.loop.global_batch
    devices = n_processes if device.type == "cuda" else 1  # CPU processes share the machine that was measured
    return {
        "steps": steps, "epochs": steps / batches, "samples": samples, "tokens": samples * (n_shown + 1),
        "genes": n_genes, "genes_shown": n_shown, "train_samples": n_train, "val_samples": corpus.n_samples("val"),
        "batches_per_epoch": batches, "global_batch": config.loop.global_batch, "processes": n_processes,
        "samples_at_once": batch, "parameters": parameters, "flops_per_sample": flops.total,
        "flops_by_part": {part: flops.forward[part] + flops.backward[part] for part in flops.forward},
        "flops_recomputed_per_sample": flops.recomputed, "flops": flops.total * samples, "memory_bytes_per_process": memory,
        "device": device.type, "precision": precision, "matmul_flops_per_s": rate, "assumed_share": ASSUMED_SHARE,
        "estimated_hours": flops.executed * samples / (rate * ASSUMED_SHARE * devices) / 3600,
        "notes": _notes(config, corpus, memory["total"], device),
    }  # fmt: skip


def _part_of_step(loop: LoopConfig, processes: int) -> int:
    """Samples that pass the network at once."""
    return max(1, loop.global_batch // (processes * loop.accumulation))


def _notes(config: TrainConfig, corpus: "Corpus", memory: int, device: torch.device) -> list[str]:
    """What the run would not refuse, but whoever starts it may want to know."""
    notes = []
    smallest = min(len(corpus.panels.genes(i)) for i in range(len(corpus.panels)))
    if smallest < config.mask.n_unmasked:
        notes.append(
            f"the smallest panel has {smallest:,} genes, fewer than mask.n_unmasked {config.mask.n_unmasked:,}: its samples are "
            "shown whole, and attention needs a mask"
        )
    if corpus.n_samples("val") == 0:
        notes.append("the corpus holds no validation sample: there will be no validation loss")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    if free is not None and memory > free:
        notes.append(
            f"a process needs about {memory / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: more loop.accumulation, or "
            "loop.activation_checkpointing"
        )
    return notes


def _free_memory() -> int | None:
    names = os.sysconf_names if hasattr(os, "sysconf") else {}
    if "SC_AVPHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
