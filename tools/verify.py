"""Check every checksum and sum of a store, a selection, a shard folder or a checkpoint."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.paths import kind_of
from tools.runner import Terminal, run_verb


@dataclass(frozen=True, kw_only=True)
class Options:
    """Read a store, a selection, a shard folder or a checkpoint whole and compare it with what was recorded when it was written."""

    path: str
    """The folder."""


def run(options: Options, terminal: Terminal) -> dict[str, Any]:
    """Verify the folder; the first thing that is wrong is the error."""
    kind = kind_of(options.path)
    progress = terminal.progress(f"verifying {kind}")
    if kind == "shards":
        from shards.manifest import Corpus
        from shards.verify import verify as verify_shards

        return verify_shards(Corpus(options.path), progress=progress)
    if kind == "checkpoint":
        from txfm_model.checkpoint import verify_checkpoint

        return {"kind": kind, "path": options.path, **verify_checkpoint(options.path)}
    if kind == "selection":
        from txfm_data.selection import inspect_selection

        found = inspect_selection(options.path)
        return {"kind": kind, "path": options.path, "samples": found["n_samples"], "datasets": len(found["datasets"])}
    from txfm_data.store.verify import verify as verify_store

    result = verify_store(options.path, progress=progress)
    if result["unfinished"]:
        terminal.say("an append was killed before its end; the next ingest removes what it left")
    return result


def summary(result: dict[str, Any]) -> str:
    """Say that all is well, and how much was read."""
    numbers = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in result.items() if type(value) is int)
    lines = [f"sound: {result['kind']} {result['path']}" + (f" ({numbers})" if numbers else "")]
    if result["kind"] == "shards":
        ratio = f"{result['compression']:.2f}"
        lines.append(
            f"  {result['bytes_per_sample']:,.1f} bytes a sample; 6 bytes a non-zero would be {ratio} times that"
        )
        for d in result["datasets"]:
            lines.append(f"  {d['name']}: {d['n_train']:,} train + {d['n_val']:,} validation samples")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Verify a folder."""
    return run_verb("verify", Options, run, summary, argv, positionals=("path",))


if __name__ == "__main__":
    sys.exit(main())
