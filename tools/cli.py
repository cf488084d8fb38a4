"""The `txfm` command: finds the verb and hands it the rest of the line. Imports nothing until then."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

# In the order of the road; each line is the first of the docstring of tools/VERB.py.
VERBS = {
    "ingest": "Ingest count matrices into a store.",
    "store": "Convert a store to the other backend, append one to another, or tidy its fragments.",
    "curate": "Curate a store by a recipe of rules into a selection, with an audit of what each rule did.",
    "corpus": "Plan and build a corpus that a file describes: sources, curation, shards, and what was expected.",
    "shard": "Build shuffled training shards from a store.",
    "train": "Train TxFM on a shard corpus.",
    "embed": "Embed the samples of a file, a store or a shard corpus with a trained model.",
    "genes": "Write the two gene matrices of a model, with Ensembl ids and symbols, as parquet.",
    "impute": "Predict the expression of chosen genes, measured or not, with a trained model.",
    "evaluate": "Score a model: relationship recall of its gene representations.",
    "info": "Say what a store, a selection, a shard folder or a checkpoint holds.",
    "verify": "Check every checksum and sum of a store, a selection, a shard folder or a checkpoint.",
    "bench": "Measure the stream of training batches, or training itself, each beside a plain one.",
    "simulate": "Simulate a small multi-dataset corpus with known gene programs.",
    "quickstart": "Run the whole road, from counts to an evaluation, on simulated data or on your own h5ad files.",
}

USAGE = "usage: txfm VERB [options]"
EPILOG = """\
Run `txfm VERB --help` for the options of a verb. Every verb takes --json (one JSON object on stdout), and
--config FILE.yaml, --print_config for its options as a file. Progress and logs go to stderr."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `txfm` command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(_help(), file=sys.stderr)
        return 2
    verb, rest = arguments[0], arguments[1:]
    if verb in ("-h", "--help"):
        print(_help())
        return 0
    if verb == "--version":
        print(f"txfm {_version()}")
        return 0
    if verb not in VERBS:
        from txfm_data.config_tree import did_you_mean

        print(f"txfm: error: no verb {verb!r}; {did_you_mean(verb, VERBS)}", file=sys.stderr)
        return 2
    try:
        return _main_of(verb)(rest)
    except KeyboardInterrupt:  # while the verb was being imported; run_verb handles the rest
        print(f"txfm {verb}: interrupted before it began", file=sys.stderr)
        return 130


def _main_of(verb: str) -> Callable[[Sequence[str] | None], int]:
    """Return the `main` of a verb, importing that verb alone."""
    match verb:
        case "ingest":
            from tools.ingest import main as verb_main
        case "store":
            from tools.store import main as verb_main
        case "curate":
            from tools.curate import main as verb_main
        case "corpus":
            from tools.corpus import main as verb_main
        case "shard":
            from tools.shard import main as verb_main
        case "train":
            from tools.train import main as verb_main
        case "embed":
            from tools.embed import main as verb_main
        case "genes":
            from tools.genes import main as verb_main
        case "impute":
            from tools.impute import main as verb_main
        case "evaluate":
            from tools.evaluate import main as verb_main
        case "info":
            from tools.info import main as verb_main
        case "verify":
            from tools.verify import main as verb_main
        case "bench":
            from tools.bench import main as verb_main
        case "simulate":
            from tools.simulate import main as verb_main
        case "quickstart":
            from tools.quickstart import main as verb_main
        case _:
            raise ValueError(f"{verb!r} is in VERBS but has no import in tools/cli.py")
    return verb_main


def _help() -> str:
    lines = [f"  {verb:<11} {line}" for verb, line in VERBS.items()]
    about = "TxFM: train and use a masked autoencoder of RNA-seq counts."
    return "\n".join([USAGE, "", about, "", "verbs:", *lines, "", EPILOG])


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("txfm")
    except PackageNotFoundError:
        return "(from a checkout, not installed)"


if __name__ == "__main__":
    sys.exit(main())
