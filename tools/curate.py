"""Curate a store by a recipe of rules into a selection, with an audit of what each rule did."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.runner import Terminal, run_verb
from tools.sizes import parse_size


@dataclass(frozen=True, kw_only=True)
class Options:
    """Apply the rules of a recipe to a store, in their order; what is left becomes a selection for `txfm shard --selection`.

    Beside the selection lie its audit (audit.json, audit.txt, audit.png), and tables and figures of phenoprint rules. The store
    is not changed.
    """

    recipe: Path
    """YAML file with the rules (docs/howto/curate.md lists them)."""
    store: str
    """Folder or address of the store."""
    out: Path
    """Folder of the selection; must not exist, or be empty."""
    model: str | None = None
    """Checkpoint that embeds cells for phenoprint rules which name none: a folder, or a model on the Hugging Face hub."""
    device: str | None = None
    """Where that model computes, such as cpu or cuda. Default: cuda if there is one."""
    workers: int = 0
    """Processes on this machine that read counts; 0 works in this process, without Dask."""
    dask_scheduler: str | None = None
    """Address of a Dask scheduler (tcp://host:8786) whose workers see the same files, in place of --workers."""
    memory_budget: str = "2GiB"
    """Memory for all of it, such as 2GiB."""
    scratch: Path | None = None
    """Folder for embeddings while they are needed: 4 bytes a value. Default: beside --out."""
    dry_run: bool = False
    """Check the recipe against the store and say what it would read; no counts are read, nothing is written."""


def run(options: Options, terminal: Terminal) -> dict[str, Any]:
    """Curate."""
    from txfm_data.curate.recipe import read_recipe, with_model
    from txfm_data.curate.run import CurateOptions, curate
    from txfm_data.parallel import Workers

    rules = with_model(read_recipe(options.recipe), options.model)
    curating = CurateOptions(
        workers=Workers(n=options.workers, scheduler=options.dask_scheduler, memory=parse_size(options.memory_budget)),
        embed=embedder(options.device), scratch=options.scratch, progress=terminal.progress, say=terminal.say,
    )  # fmt: skip
    return curate(options.store, rules, options.out, curating, dry_run=options.dry_run)


def embedder(device: str | None) -> Any:
    """Embeds samples of a store with a checkpoint; torch is imported when a rule asks for it."""

    def embed(*arguments: Any, **options: Any) -> None:
        from txfm_model.embedding.rows import embed_rows

        embed_rows(*arguments, **options, device=device)

    return embed


def summary(result: dict[str, Any]) -> str:
    """What each rule left, warnings, and where it is; of a dry run, what it would read."""
    if result.get("dry_run"):
        return "\n".join(_dry_lines(result))
    lines = [
        f"{step['number']}. {step['rule']}: {step['samples_in']:,} -> {step['samples_out']:,} samples, vocabulary of "
        f"{step['genes_union_out']:,} genes"
        for step in result["steps"]
    ]
    lines += [
        f"  {d['name']}: {d['samples']:,} samples ({d['samples_val']:,} held out), {d['genes']:,} genes"
        for d in result["datasets"]
    ]
    lines += [f"WARNING: {text}" for text in result["warnings"]]
    lines.append(f"{result['n_samples']:,} samples ({result['n_val']:,} held out), {result['n_genes']:,} genes")
    lines.append(f"selection: {result['out']} (audit.txt there has the numbers of each rule)")
    return "\n".join(lines)


def _dry_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['store']}: {result['n_samples']:,} samples of {len(result['datasets'])} datasets"]
    for step in result["steps"]:
        names = step["datasets"]
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "no dataset"
        lines.append(f"{step['number']}. {step['rule']}: {shown} ({step['samples']:,} samples before the first rule)")
    lines.append(
        f"within {result['memory_bytes'] / 2**20:,.0f} MiB; writes up to {result['bytes_of_selection'] / 1e6:,.1f} MB"
    )
    if any(step["rule"] == "phenoprints" for step in result["steps"]):
        lines.append("phenoprints: scratch of 4 bytes for each value of the embedding (cells x width)")
    lines.append("dry run, nothing written")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Curate a store."""
    return run_verb("curate", Options, run, summary, argv, positionals=("recipe",))


if __name__ == "__main__":
    sys.exit(main())
