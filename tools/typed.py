"""The command line of a verb, read by jsonargparse. See `tools.options`."""

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jsonargparse

from tools.leaves import Leaf, leaf_help, usage_line, without_none
from tools.options import CONFIG_HELP, JSON_HELP, UsageError
from txfm_data.config_tree import type_name


def parse_tree(
    leaves: Sequence[Leaf],
    arguments: Sequence[str],
    *,
    prog: str,
    positionals: Sequence[str],
    description: str,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the tree of values that a command line and its configuration files state, defaults filled in."""
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage=usage_line(prog, leaves, positionals),
        description=description,
        epilog=JSON_HELP,
        formatter_class=argparse.HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help=CONFIG_HELP)
    groups: dict[str, Any] = {"": parser}
    for leaf in leaves:
        if leaf.section not in groups:
            groups[leaf.section] = parser.add_argument_group(leaf.section)
        if leaf.key not in positionals:
            _add_flag(groups[leaf.section], leaf)
    by_key = {leaf.key: leaf for leaf in leaves}
    for name in positionals:
        _add_positional(parser, by_key[name], config)
    try:
        tree: dict[str, Any] = parser.parse_args(list(arguments)).as_dict()
    except jsonargparse.ArgumentError as err:
        raise UsageError(_worded(str(err), by_key)) from err
    tree.pop("config", None)
    return tree


def _add_flag(group: Any, leaf: Leaf) -> None:
    shared = {"help": leaf_help(leaf), "default": leaf.default}
    if leaf.is_switch:
        yes_no = jsonargparse.ActionYesNo(yes_prefix="", no_prefix="no-")
        group.add_argument(leaf.flag, action=yes_no, **shared)
    elif leaf.is_many:
        group.add_argument(leaf.flag, type=leaf.value_hint, nargs="+", metavar=leaf.metavar, **shared)
    else:
        group.add_argument(leaf.flag, type=_none_until_given(leaf), metavar=leaf.metavar, **shared)


def _add_positional(parser: Any, leaf: Leaf, config: Mapping[str, Any]) -> None:
    # argparse sets a positional that is not given to its default, over the file's value: hence this default.
    default = config.get(leaf.key, leaf.default)
    nargs, hint = ("*", leaf.value_hint) if leaf.is_many else ("?", _none_until_given(leaf))
    parser.add_argument(
        leaf.key, metavar=leaf.key.upper(), type=hint, nargs=nargs, default=default, help=leaf_help(leaf)
    )


def _none_until_given(leaf: Leaf) -> Any:
    """Return the type of a value; one that is required may be null in a file as long as the line gives it."""
    hint = leaf.value_hint
    return hint | None if leaf.is_required and without_none(hint) is hint else hint


def _worded(message: str, by_key: Mapping[str, Leaf]) -> str:
    """Return jsonargparse's message in one line; in our words if it is about the type of a known value."""
    key = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if key and value and key[1] in by_key:
        leaf = by_key[key[1]]
        return f"{leaf.flag}: expected {type_name(leaf.hint)}, got {value[1].strip()!r}"
    return " ".join(message.split())
