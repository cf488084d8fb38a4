"""Makes the command line of a verb from its options dataclass: flags, `--config`, `--print_config`, `--help`.

`tools.typed` reads it with jsonargparse, and `tools.fallback` with argparse where that is missing (a bare GPU
image). A test holds the two equal.
"""

import dataclasses
import importlib.util
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from tools.leaves import Leaf, options_leaves, without_none
from txfm_data.config_tree import did_you_mean, from_tree

Options = TypeVar("Options")
CONFIG_HELP = "YAML file of options; may be given again, the last wins. The command line overrides files."
JSON_HELP = "`--json` prints one JSON object with the result on stdout and nothing else there."
OWN_FLAGS = ("--help", "--config", "--print_config", "--json")


class UsageError(Exception):
    """The command line or a configuration file does not fit the options; exit code 2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parsed(Generic[Options]):
    """What a command line said."""

    options: Options
    as_json: bool


def parse_options(
    options_type: type[Options],
    argv: Sequence[str],
    *,
    prog: str,
    positionals: Sequence[str] = (),
    description: str = "",
    use_jsonargparse: bool | None = None,
) -> Parsed[Options]:
    """Parse a command line into an instance of a frozen dataclass.

    `--config FILE.yaml` may be given more than once, the later over the earlier; the command line overrides
    files wherever it stands. Unknown flags and keys are refused with the near ones.

    Parameters
    ----------
    options_type
        The dataclass.
    argv
        Arguments after the verb.
    prog
        Name in the usage line.
    positionals
        Fields given by position; the last may be a tuple, which takes all that is left.
    description
        Paragraph above the options in `--help`.
    use_jsonargparse
        Which parser; None takes jsonargparse if it is installed.

    Raises
    ------
    UsageError
        For whatever does not fit, `__post_init__` included.
    SystemExit
        With code 0 after `--help` and `--print_config` have printed.
    """
    as_json, arguments = _without_json(argv)
    arguments = _configs_first(arguments)
    wants_help = "--help" in arguments or "-h" in arguments
    leaves = list(options_leaves(options_type, with_help=wants_help))
    _refuse_unknown_flags(arguments, leaves, positionals)
    config = read_configs(arguments, options_type)
    if use_jsonargparse is None:
        use_jsonargparse = importlib.util.find_spec("jsonargparse") is not None
    if use_jsonargparse:
        from tools.typed import parse_tree
    else:
        from tools.fallback import parse_tree
    tree = parse_tree(leaves, arguments, prog=prog, positionals=positionals, description=description, config=config)
    _refuse_missing(tree, leaves, positionals)
    try:
        return Parsed(options=from_tree(options_type, tree), as_json=as_json)
    except (ValueError, TypeError) as err:
        raise UsageError(str(err)) from err


def read_configs(arguments: Sequence[str], options_type: type) -> dict[str, Any]:
    """Return the files given as `--config=FILE` as one tree, the later over the earlier."""
    tree: dict[str, Any] = {}
    for path in [word.partition("=")[2] for word in arguments if word.startswith("--config=")]:
        loaded = read_yaml(path)
        _refuse_unknown_keys(loaded, options_type, path)
        merge(tree, loaded)
    return tree


def merge(tree: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Lay one nested dict over another, in place."""
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            merge(tree[key], value)
        else:
            tree[key] = dict(value) if isinstance(value, Mapping) else value


def read_yaml(path: str) -> dict[str, Any]:
    """Return a configuration file as a dict."""
    from txfm_data import yaml_file

    try:
        tree = yaml_file.read_yaml(Path(path))
    except OSError as err:
        raise UsageError(f"--config: {path}: {err.strerror}") from err
    except ValueError as err:
        raise UsageError(f"--config: {err}") from err
    if not isinstance(tree, dict):
        raise UsageError(f"--config: {path}: expected keys and values, got {type(tree).__name__}")
    return tree


def read_word(text: str, hint: Any) -> Any:
    """Return what one word of a command line means for a field of type `hint`; text where text is allowed."""
    import yaml

    from txfm_data.yaml_file import Loader

    plain = without_none(hint)
    is_optional = plain is not hint
    if is_optional and text == "null":
        return None
    if plain is str:
        return text
    choices = typing.get_args(plain) if typing.get_origin(plain) is typing.Literal else ()
    if text in choices:
        return text
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError:
        return text


def _without_json(argv: Sequence[str]) -> tuple[bool, list[str]]:
    end = argv.index("--") if "--" in argv else len(argv)
    return "--json" in argv[:end], [arg for i, arg in enumerate(argv) if i >= end or arg != "--json"]


def _configs_first(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with every `--config FILE` as one word at the front, where the rest overrides it."""
    configs, others = [], []
    words = iter(arguments)
    for word in words:
        if word == "--":
            others += [word, *words]
        elif word == "--config":
            path = next(words, None)
            if path is None:
                raise UsageError("--config: expected one file")
            configs.append(f"--config={path}")
        else:
            (configs if word.startswith("--config=") else others).append(word)
    return configs + others


def _refuse_unknown_flags(arguments: Sequence[str], leaves: list[Leaf], positionals: Sequence[str]) -> None:
    known = [flag for leaf in leaves if leaf.key not in positionals for flag in leaf.flags]
    for argument in arguments:
        if argument == "--":
            return
        name = argument.split("=")[0]
        if name.startswith("--") and name not in known and name not in OWN_FLAGS:
            raise UsageError(f"unknown option {name}; {did_you_mean(name, [*known, *OWN_FLAGS])}")


def _refuse_unknown_keys(tree: Any, node: type, path: str, where: str = "") -> None:
    hints = typing.get_type_hints(node)
    for key, value in tree.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise UsageError(f"{path}: unknown key {name}; {did_you_mean(str(key), hints)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise UsageError(f"{path}: {name} is a section, expected keys and values, got {value!r}")
            _refuse_unknown_keys(value, typing.cast("type", hints[key]), path, name)


def _refuse_missing(tree: Mapping[str, Any], leaves: list[Leaf], positionals: Sequence[str]) -> None:
    missing = []
    for leaf in leaves:
        node: Any = tree
        for name in leaf.path:
            node = node.get(name) if isinstance(node, Mapping) else None
        if leaf.is_required and (node is None or (leaf.is_many and node == [])):
            missing.append(leaf.key.upper() if leaf.key in positionals else leaf.flag)
    missing.sort(key=lambda name: name.startswith("--"))
    if missing:
        raise UsageError(f"missing: {', '.join(missing)}")
