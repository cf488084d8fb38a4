"""The model card of a checkpoint: what it is, what it was trained on, what is known about it."""

import json
from typing import Any

from txfm_data.vocabulary import Vocabulary
from txfm_model.config import ModelConfig, config_to_dict

_HEADER = """---
library_name: txfm
tags:
- rna-seq
- single-cell
- masked-autoencoder
---
"""


def model_card(config: ModelConfig, vocabulary: Vocabulary, n_parameters: int, provenance: dict[str, Any]) -> str:
    """Markdown of the card, from the model and its provenance alone."""
    results = provenance.get("results", {})
    lines = [
        _HEADER,
        "# TxFM checkpoint",
        "",
        "A masked autoencoder of RNA-seq counts. It embeds a sample (one cell or one bulk profile) from the",
        "counts of its measured genes, and holds two vectors for each gene of its vocabulary.",
        "",
        f"- {n_parameters:,} parameters: {config.blocks} blocks of width {config.width}, {config.heads} heads"
        f", {config.decoder_blocks} decoder blocks, tokens `{config.tokens}`.",
        f"- {len(vocabulary):,} genes; fingerprint of the vocabulary `{vocabulary.fingerprint}`.",
        f"- Input: ln(1 + {config.target_sum:,.0f} count / library size), "
        "library size over all genes profiled in the sample.",
        f"- Gene head started at `{config.head_init}`"
        + (" (a deviation from the paper, which does not state one)." if config.head_init == "corpus_mean" else "."),
        "",
        "```python",
        "from txfm_model import TxFM",
        "",
        'model = TxFM.from_pretrained("path/of/this/folder")',
        "```",
        "",
        "## Training",
        "",
    ]
    lines += _training(provenance) or ["This model was saved without a record of training."]
    lines += ["", "## What was measured", ""]
    lines += _results(results) or ["Nothing was measured when this card was written."]
    lines += [
        "",
        "A lower validation loss does not show that an embedding is useful for a task. This card holds no",
        "downstream evaluation; evaluate the model on your own task before relying on it.",
        "",
        "## Configuration",
        "",
        "```json",
        json.dumps(provenance.get("training") or {"model": config_to_dict(config)}, indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)


def _training(provenance: dict[str, Any]) -> list[str]:
    if "corpus_fingerprint" not in provenance:
        return []
    results = provenance.get("results", {})
    lines = [f"- Corpus fingerprint `{provenance['corpus_fingerprint']}`."]
    if "steps" in results:
        lines.append(
            f"- {results['steps']:,} steps, {results['samples']:,} samples drawn, "
            f"{results['processes']} process(es), precision {results['precision']}."
        )
    lines.append(f"- Commit {provenance.get('commit') or 'unknown'}.")
    versions = provenance.get("versions", {})
    lines.append(f"- Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.")
    return lines


def _results(results: dict[str, Any]) -> list[str]:
    rows = [
        ("Train loss, mean of the last log window", results.get("train_loss")),
        ("Validation loss", results.get("val_loss")),
        ("Validation loss above the floor of its targets", results.get("val_excess")),
        ("The same for the panel-mean predictor", results.get("panel_mean_val_excess")),
    ]
    known = [f"| {name} | {value:.6g} |" for name, value in rows if value is not None]
    return ["| | |", "|---|---|", *known] if known else []
