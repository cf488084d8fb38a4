"""Embed the samples of a file, a store or a shard corpus with a trained model."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file from a checkout, also by accelerate launch
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.runner import Terminal, run_verb
from tools.sample_options import SampleOptions, encode_options, open_model


@dataclass(frozen=True, kw_only=True)
class Options(SampleOptions):
    """Embed raw counts: an h5ad file goes to a copy of itself with the embedding in obsm, all else to a file of obs and obsm."""

    embed_key: str = "X_txfm"
    """Name of the embedding in obsm."""
    layer: str = "final"
    """Layer of the model: final, or a number; 0 is the CLS parameter, then encoder blocks, then decoder blocks."""


def run(options: Options, terminal: Terminal) -> dict[str, Any]:
    """Embed the samples and write the result, whole or not at all."""
    from txfm_model.embed import embed_file

    encoding = encode_options(options, options.layer)
    model, files = open_model(options, terminal, "embedding")
    return embed_file(model, options.input, options.out, embed_key=options.embed_key, options=encoding, files=files)


def summary(result: dict[str, Any]) -> str:
    """Where the embedding is, and how many genes matched."""
    return (
        f"{result['n_obs']:,} samples x {result['width']} in obsm[{result['obsm']!r}], matched {result['genes_matched']:,} of "
        f"{result['genes_in_file']:,} genes\nfile: {result['out']}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Embed samples."""
    return run_verb("embed", Options, run, summary, argv, positionals=("input",))


if __name__ == "__main__":
    sys.exit(main())
