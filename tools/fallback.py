"""The command line of a verb read by argparse, where jsonargparse is not installed. See `tools.options`."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from tools.leaves import Leaf, leaf_help, usage_line
from tools.options import CONFIG_HELP, JSON_HELP, UsageError, read_word
from txfm_data.config_tree import checked


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
    parser = _Parser(
        prog=prog,
        usage=usage_line(prog, leaves, positionals),
        description=description,
        epilog=JSON_HELP,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", help=CONFIG_HELP)
    parser.add_argument("--print_config", action="store_true", help="Print the options as YAML and exit.")
    groups: dict[str, Any] = {"": parser}
    for leaf in leaves:
        if leaf.section not in groups:
            groups[leaf.section] = parser.add_argument_group(leaf.section)
        if leaf.key not in positionals:
            _add_flag(groups[leaf.section], leaf)
    by_key = {leaf.key: leaf for leaf in leaves}
    for name in positionals:
        nargs = "*" if by_key[name].is_many else "?"
        parser.add_argument(
            name, metavar=name.upper(), nargs=nargs, default=argparse.SUPPRESS, help=leaf_help(by_key[name])
        )
    given = {**dict(_flat(config)), **vars(parser.parse_args(list(arguments)))}
    tree: dict[str, Any] = {}
    for leaf in leaves:
        node = tree
        for name in leaf.path[:-1]:
            node = node.setdefault(name, {})
        node[leaf.path[-1]] = _value(leaf, given)
    if given["print_config"]:
        parser.exit(message=yaml.safe_dump(tree, sort_keys=False))
    return tree


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose refusals are exceptions and whose text goes to stdout."""

    def error(self, message: str) -> Any:
        raise UsageError(message)

    def exit(self, status: int = 0, message: str | None = None) -> Any:
        if message:
            print(message, end="")
        raise SystemExit(status)


def _flat(tree: Mapping[str, Any], where: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in tree.items():
        items += _flat(value, f"{where}{key}.") if isinstance(value, Mapping) else [(f"{where}{key}", value)]
    return items


def _add_flag(group: Any, leaf: Leaf) -> None:
    shared = {"dest": leaf.key, "default": argparse.SUPPRESS, "help": leaf_help(leaf)}
    if leaf.is_switch:
        group.add_argument(leaf.flag, action=argparse.BooleanOptionalAction, **shared)
    else:
        nargs = "+" if leaf.is_many else None
        group.add_argument(leaf.flag, nargs=nargs, metavar=leaf.metavar, **shared)


def _value(leaf: Leaf, given: Mapping[str, Any]) -> Any:
    """Return the value of a leaf as YAML would hold it: read from words if typed, as it is if from a file."""
    value = given.get(leaf.key, leaf.default)
    if isinstance(value, str) and not isinstance(leaf.default, str) and leaf.key in given:
        value = read_word(value, leaf.hint)
    elif isinstance(value, list):
        value = [read_word(item, leaf.value_hint) if isinstance(item, str) else item for item in value]
    if value is None and leaf.is_required:
        return None
    try:
        checked(value, leaf.hint, leaf.flag)
    except TypeError as err:
        raise UsageError(str(err)) from err
    return value
