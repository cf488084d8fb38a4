"""The model card of a checkpoint: what it is, what it was trained on, what is known about it, what it is not for."""

import json
import math
import re
from typing import Any

from huggingface_hub import ModelCardData

from txfm_data.vocabulary import Vocabulary
from txfm_model.config import ModelConfig, config_to_dict

TAGS = ("biology", "transcriptomics", "rna-seq", "single-cell", "masked-autoencoder")
_SHOWN_OF_HISTORY = 20
_ACTIVATIONS = {
    "relu": "max(0, z), without an upper bound",
    "clamped_relu": "max(0, z), at most ln(1 + target sum)",
    "softmax": "ln(1 + target sum x softmax over the measured genes)",
}
_LOSSES = {
    "poisson": "Poisson: exp(p) - exp(x) p of prediction p and target x, both log1p values",
    "mse": "mean squared error of log1p values",
    "smooth_l1": "smooth L1 (beta 1) of log1p values",
    "nb": "negative binomial likelihood of the raw counts, one dispersion for each gene",
    "zinb": "zero-inflated negative binomial likelihood of the raw counts",
}
_LIMITS = """\
## Intended use

For research on gene expression: an embedding of a sample for search, clustering, transfer of labels or as the input of a
further model; the vectors of genes for relations between them; predicted expression as a hypothesis.

- Input is raw counts of human genes with Ensembl ids, of one cell or one bulk profile, not normalised and not
  log-transformed. Genes outside the vocabulary are not read. What was not measured is unknown, not zero.
- Predictions are not measurements. They are what the training data make likely, drawn towards its mean; do not test
  hypotheses on them as if they were counts.
- This is not a clinical device. It was not evaluated for diagnosis, prognosis or treatment, and must not be used for them.
- Tissues, assays, diseases and populations that the training corpus has little of are embedded worse, and nothing in the
  output says so. Batch effects are not removed.

## Licence

The licence of the weights is as their author states it{stated}.
The data that they were trained on have terms of their own, which may bind users of the weights."""


def model_card(config: ModelConfig, vocabulary: Vocabulary, n_parameters: int, provenance: dict[str, Any]) -> str:
    """Markdown of the card with its metadata, from the model and its provenance alone."""
    results = provenance.get("results", {})
    stated = provenance.get("license")
    return "\n".join(
        [
            _metadata(stated),
            "# TxFM checkpoint",
            "",
            "A masked autoencoder of RNA-seq counts. It embeds a sample (one cell or one bulk profile) from the",
            "counts of its measured genes, and holds two vectors for each gene of its vocabulary.",
            "",
            "## How to load it",
            "",
            "```python",
            "from txfm_model import TxFM",
            "",
            'model = TxFM.from_pretrained("path/of/this/folder")  # or "organisation/name", revision="a commit"',
            "embedding = model.embed(adata)  # AnnData with raw counts: (n_obs, " + f"{config.width}) float32",
            "```",
            "",
            "## Model",
            "",
            *_architecture(config, vocabulary, n_parameters),
            "",
            "## Training",
            "",
            *(_training(provenance) or ["This model was saved without a record of training."]),
            "",
            "## What was measured",
            "",
            *(_results(results) or ["Nothing was measured when this card was written."]),
            "",
            "A lower validation loss does not show that an embedding is useful for a task. This card holds no",
            "downstream evaluation; evaluate the model on your own task before relying on it.",
            "",
            _LIMITS.format(
                stated=f": `{_inline(stated)}`" if stated else "; this card was written without a statement"
            ),
            "",
            "## Configuration",
            "",
            "```json",
            json.dumps(provenance.get("training") or {"model": config_to_dict(config)}, indent=2),
            "```",
            "",
        ]
    )


def _metadata(stated: object) -> str:
    """The YAML block at the top, which the Hub reads; the licence stands in it only where the author states one."""
    data = ModelCardData(
        library_name="txfm",
        pipeline_tag="feature-extraction",
        tags=list(TAGS),
        license=_inline(stated) if stated else None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _architecture(config: ModelConfig, vocabulary: Vocabulary, n_parameters: int) -> list[str]:
    top = math.log1p(config.target_sum)
    scale = 4 * math.e if config.tanh_scale is None else config.tanh_scale
    tanh = f"ln(1 + target sum) x max(0, tanh(z / {scale:.6g}))"
    values = {
        "library_log1p": f"ln(1 + {config.target_sum:,.0f} count / library size), library size over all genes profiled "
        "in the sample",
        "log1p": "ln(1 + count), not scaled by library size",
    }
    head = {
        "none": "none",
        "nb": "a dispersion for each gene",
        "zinb": "a dispersion for each gene, zero-inflation logits",
    }
    start = f"`{config.head_init}`"
    if config.head_init == "corpus_mean":
        start += " (a deviation from the paper, which does not state one)"
    rows = [
        ("Parameters", f"{n_parameters:,}"),
        (
            "Encoder",
            f"{config.blocks} pre-norm blocks of width {config.width}, {config.heads} heads, MLP ratio {config.mlp_ratio}, "
            f"LayerScale from {config.layerscale_init:g}, stochastic depth up to {config.stochastic_depth:g}",
        ),
        ("Tokens", f"`{config.tokens}`, and a CLS token, whose state is the embedding"),
        ("Decoder", f"{config.decoder_blocks} residual MLP blocks, then one linear head over all genes"),
        ("Activation", f"`{config.activation}`: {_ACTIVATIONS.get(config.activation, tanh)}"),
        ("Count parameters", head[config.count_head]),
        ("Genes", f"{len(vocabulary):,}; fingerprint of the vocabulary `{vocabulary.fingerprint}`"),
        ("Input", values[config.preprocessing]),
        ("Output", f"log1p value of every gene, in [0, {top:.4g}]" if config.activation != "relu" else "log1p value"),
        ("Start of the gene head", start),
    ]
    return _table(rows)


def _training(provenance: dict[str, Any]) -> list[str]:
    if "corpus_fingerprint" not in provenance:
        return []
    results, training = provenance.get("results", {}), provenance.get("training") or {}
    rows = [("Corpus", f"fingerprint `{_inline(provenance['corpus_fingerprint'])}`")]
    if "steps" in results:
        length = [f"{results['steps']:,} steps"]
        length += [f"{results['samples']:,} samples drawn"] if "samples" in results else []
        length += [f"{_inline(results['processes'])} process(es)"] if "processes" in results else []
        length += [f"precision {_inline(results['precision'])}"] if "precision" in results else []
        rows.append(("Length", ", ".join(length)))
    elif "step" in provenance:
        rows.append(
            ("Length", f"step {_inline(provenance['step'])} of a run that was not finished when this was written")
        )
    rows += _recipe(training)
    rows += _start(provenance)
    rows.append(("Commit", _inline(provenance.get("commit") or "unknown")))
    versions = provenance.get("versions", {})
    rows.append(("Versions", _inline(", ".join(f"{name} {version}" for name, version in versions.items()))))
    return [*_table(rows), *_history(provenance.get("history", []))]


def _recipe(training: dict[str, Any]) -> list[tuple[str, str]]:
    """Loss, masks, batch and optimizer, from the configuration of the run as far as it says them; older ones lack parts."""
    loss, mask, loop, optim = (training.get(part) or {} for part in ("loss", "mask", "loop", "optim"))
    rows = []
    if loss.get("kind") in _LOSSES:
        rows.append(
            ("Loss", f"{_LOSSES[loss['kind']]}; {_inline(loss.get('reduction'))} over the measured genes of a sample")
        )
    if "n_unmasked" in mask:
        temperature = mask.get("temperature", 0)
        drawn = "uniformly" if temperature == 0 else f"with temperature {_inline(temperature)}"
        shown = _inline(mask["n_unmasked"])
        rows.append(("Masks", f"{shown} measured genes shown, drawn {drawn}; the loss is over all measured genes"))
    if "global_batch" in loop:
        rows.append(("Batch", f"{_inline(loop['global_batch'])} samples a step, over all processes"))
    if "lr" in optim:
        settings = {
            "highest learning rate": optim["lr"],
            "warm-up over a share of the steps": optim.get("warmup_fraction"),
            "betas": f"{optim.get('beta1')} and {optim.get('beta2')}",
            "eps": optim.get("eps"),
            "weight decay": "1 / (rate x steps)" if optim.get("weight_decay") is None else optim["weight_decay"],
            "gradients clipped to norm": optim.get("clip_norm"),
        }
        said = ", ".join(f"{name} {_inline(value)}" for name, value in settings.items() if value is not None)
        rows.append(("Optimizer", f"AdamW, one cosine cycle; {said}"))
    return rows


def _start(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run started from, if not from random weights."""
    init = provenance.get("init")
    if not init:
        return []
    counts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in init.items() if key != "checkpoint")
    return [("Started from", _inline(f"{init.get('checkpoint', 'another checkpoint')} ({counts})"))]


def _history(history: list[dict[str, Any]]) -> list[str]:
    """In which parts the run was made, the last ones if they are many."""
    if len(history) < 2:
        return []
    shown = history[-_SHOWN_OF_HISTORY:]
    which = f", the last {len(shown)} of them" if len(shown) < len(history) else ""
    columns = {
        "From step": "from_step",
        "Processes": "processes",
        "Accumulation": "accumulation",
        "Precision": "precision",
        "Device": "device",
    }
    rows = [" | ".join(_inline(part.get(key, "unknown")) for key in columns.values()) for part in shown]
    return [
        "",
        f"The run was stopped and gone on with: it was made in {len(history)} parts{which}.",
        "",
        f"| {' | '.join(columns)} |",
        "|---:|---:|---:|---|---|",
        *(f"| {row} |" for row in rows),
    ]


def _results(results: dict[str, Any]) -> list[str]:
    rows = [
        ("Train loss, mean of the last log window", results.get("train_loss")),
        ("Validation loss", results.get("val_loss")),
        ("Validation loss above the floor of its targets", results.get("val_excess")),
        ("The same for the panel-mean predictor", results.get("panel_mean_val_excess")),
    ]
    known = [(name, f"{value:.6g}") for name, value in rows if value is not None]
    return _table(known) if known else []


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _inline(value: object) -> str:
    """Text from a configuration, on one line and without what would end a cell, a code span or begin a tag."""
    return re.sub(r"[|`<>\s]+", " ", str(value)).strip()
