"""The values of an options dataclass one by one, each with the text under its field. See `tools.options`."""

import ast
import contextlib
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Union

from txfm_data.config_tree import is_required, type_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One value of the options tree."""

    path: tuple[str, ...]
    hint: Any
    """type, as annotated"""
    default: Any
    """default as YAML holds it; None where there is none"""
    is_required: bool
    help: str
    section: str
    """heading in `--help`: the docstring of the section's dataclass"""

    @property
    def key(self) -> str:
        """Dotted name, as in a configuration file."""
        return ".".join(self.path)

    @property
    def flag(self) -> str:
        """As typed: kebab case, or dotted as in the file when it lies in a section."""
        return "--" + (self.key if len(self.path) > 1 else self.path[0].replace("_", "-"))

    @property
    def flags(self) -> tuple[str, ...]:
        """All spellings: a yes/no value outside sections has two."""
        return (self.flag, "--no-" + self.flag[2:]) if self.is_switch else (self.flag,)

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value."""
        return self.hint is bool and len(self.path) == 1

    @property
    def is_many(self) -> bool:
        """Whether several values follow the flag."""
        return typing.get_origin(without_none(self.hint)) is tuple

    @property
    def metavar(self) -> str:
        """Placeholder of the value: the choices if there are few, else its name."""
        plain = without_none(self.hint)
        return type_name(plain) if typing.get_origin(plain) is typing.Literal else self.path[-1].upper()

    @property
    def value_hint(self) -> Any:
        """Type of one value as a parser reads it: that of an item of a list, and text for a path."""
        if self.is_many:
            return _text_for_path(typing.get_args(without_none(self.hint))[0])
        return _text_for_path(self.hint)


def options_leaves(options_type: type, *, with_help: bool = True) -> Iterator[Leaf]:
    """Yield every value of a tree of dataclasses, in the order of its fields."""
    yield from _leaves(options_type, (), None, "", with_help)


def without_none(hint: Any) -> Any:
    """Return X for the type `X | None`, and any other type as it is."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        rest = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return rest[0] if len(rest) == 1 else hint
    return hint


def leaf_help(leaf: Leaf) -> str:
    """Return the text of one option, safe for argparse's formatting."""
    default = "null" if leaf.default is None else str(leaf.default)
    status = "required" if leaf.is_required else f"default: {default}"
    return f"{leaf.help} ({type_name(leaf.hint)}; {status})".strip().replace("%", "%%")


def usage_line(prog: str, leaves: Sequence[Leaf], positionals: Sequence[str]) -> str:
    """Return the line that shows what must be given."""
    by_key = {leaf.key: leaf for leaf in leaves}
    words = [prog]
    for name in positionals:
        word = name.upper() + (" ..." if by_key[name].is_many else "")
        words.append(word if by_key[name].is_required else f"[{word}]")
    for leaf in leaves:
        if leaf.is_required and leaf.key not in positionals:
            words.append(f"{leaf.flag} {leaf.metavar}")
    return " ".join([*words, "[options]"]).replace("%", "%%")


def _leaves(node: type, path: tuple[str, ...], defaults: Any, section: str, with_help: bool) -> Iterator[Leaf]:
    hints = typing.get_type_hints(node)
    docs = field_docs(node) if with_help else {}
    for field in dataclasses.fields(node):
        hint, here = hints[field.name], (*path, field.name)
        if not field.init:
            continue
        if defaults is not None:
            default = getattr(defaults, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = None if field.default is dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _leaves(hint, here, default, _section(hint, here) if with_help else "", with_help)
            continue
        yield Leaf(
            path=here,
            hint=hint,
            default=_as_yaml(default),
            is_required=defaults is None and is_required(field),
            help=docs.get(field.name, ""),
            section=section,
        )


def field_docs(node: type) -> dict[str, str]:
    """Return the string under each field of a dataclass, bases included, read from its source."""
    docs: dict[str, str] = {}
    for base in reversed(node.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        with contextlib.suppress(OSError):  # no source: a class typed at a prompt
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            docs.update(_docs_in(typing.cast("ast.ClassDef", body).body))
    return docs


def _docs_in(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for field, below in zip(body, body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                yield name, " ".join(doc.split())


def _section(node: type, path: tuple[str, ...]) -> str:
    doc = node.__doc__ or ""
    about = "" if doc.startswith(f"{node.__name__}(") else doc.strip().split("\n")[0]
    return f"{'.'.join(path)}: {about}" if about else ".".join(path)


def _as_yaml(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_as_yaml(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _text_for_path(hint: Any) -> Any:
    if hint is Path:
        return str
    if without_none(hint) is Path:
        return str | None
    return hint
