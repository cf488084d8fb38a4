"""The filter language of the Census and of SOMA: which samples (or genes) to take, checked before anything is read.

``cell_type in ['T cell', 'B cell'] and raw_sum >= 500 and not (sex == 'unknown')``. A value that does not occur gives
zero rows and no error in the libraries; `check` makes it an error that lists the near ones.
"""

import ast
import difflib
import io
import math
import tokenize
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Value = str | int | float | bool

MULTIVALUE_SEPARATOR = " || "
"""Between the terms of one cell that has several, as the Census joins diseases since schema 2.4.0."""

MULTIVALUED = "disease"
"""The column of obs whose entries may join several terms."""

_OPERATORS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
}  # fmt: skip
_MIRRORED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
_NEGATED = {"==": "!=", "!=": "==", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}
_COMPUTE = {
    "==": "equal", "!=": "not_equal", "<": "less", "<=": "less_equal", ">": "greater", ">=": "greater_equal",
}  # fmt: skip
_SYNTAX = "write for example: cell_type in ['T cell', 'B cell'] and raw_sum >= 500"
_REMEDIES = {
    "=": "'=' assigns and is not a comparison; write '=='",
    "&&": "write 'and'", "||": "write 'or'", "AND": "write 'and'", "OR": "write 'or'", "NOT": "write 'not'",
    "IN": "write 'in'", "<>": "write '!='", "!": "write 'not', or '!=' to compare",
}  # fmt: skip
_INT64 = 2**63
_NEAR = 5
_SHORT_LIST = 100


@dataclass(frozen=True)
class Compare:
    """``column op value``; op is one of ``== != < <= > >=``."""

    column: str
    op: str
    value: Value


@dataclass(frozen=True)
class Member:
    """``column in [values]``, or ``not in``."""

    column: str
    values: tuple[Value, ...]
    negated: bool = False


@dataclass(frozen=True)
class Both:
    """All parts hold (`is_and`), or at least one does."""

    is_and: bool
    parts: "tuple[Node, ...]"


Node = Compare | Member | Both


@dataclass(frozen=True)
class Filter:
    """A parsed filter. A null, in whatever comparison, does not pass, as in SOMA."""

    node: Node

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns it names, once each, in order of first use."""
        return tuple(dict.fromkeys(leaf.column for leaf in _leaves(self.node)))

    @property
    def literals(self) -> dict[str, list[Value]]:
        """Per column, the values it is compared with by ``==``, ``!=``, ``in`` or ``not in``, once each."""
        found: dict[str, list[Value]] = {}
        for leaf in _leaves(self.node):
            if isinstance(leaf, Member):
                found.setdefault(leaf.column, []).extend(leaf.values)
            elif leaf.op in ("==", "!="):
                found.setdefault(leaf.column, []).append(leaf.value)
        return {column: list(dict.fromkeys(values)) for column, values in found.items()}

    def mask(self, table: pa.Table) -> np.ndarray:
        """Which rows of a table pass: (rows,) bool. Dictionary columns are read by their values.

        Raises
        ------
        ValueError
            If the table lacks a column, or a value does not fit the type of its column.
        """
        return _mask(self.node, table)

    def to_soma(self) -> str:
        """Text of the same filter that SOMA's ``value_filter`` reads, and `parse` too."""
        return _text(self.node)

    def both(self, other: "Filter") -> "Filter":
        """Rows that pass this filter and the other."""
        return Filter(Both(True, (self.node, other.node)))


def is_in(column: str, values: Collection[Value]) -> Filter:
    """Filter of the rows whose `column` is one of `values`."""
    if not values:
        raise ValueError(f"filter on {column!r}: no values to choose from; name at least one")
    return Filter(Member(column, tuple(values)))


def equals(column: str, value: Value) -> Filter:
    """Filter of the rows whose `column` is `value`."""
    return Filter(Compare(column, "==", value))


# --- parsing ---------------------------------------------------------------------------------------------------------


def parse(text: str, where: str = "--obs-filter") -> Filter:
    """Read a filter; nothing of it is ever evaluated.

    where : what the user calls the filter, for errors.

    Raises
    ------
    ValueError
        On anything that is no filter: says at which character, what is wrong there and what to write.
    """
    line = text.replace("\n", " ").replace("\r", " ").strip()
    if not line:
        raise ValueError(f"{where}: the filter is empty; leave it out to take everything, or {_SYNTAX}")
    problem = _Problem(where, line)
    if "\0" in line:
        raise problem.at(line.index("\0"), "a NUL character", "write text")
    problem.scan()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an unknown escape such as '\\d' is only a warning to Python
            tree = ast.parse(line, mode="eval")
        return Filter(_node(tree.body, problem, negate=False))
    except SyntaxError as error:
        remedy = "write a backslash twice" if "escape" in error.msg else _SYNTAX
        raise problem.at((error.offset or 1) - 1, "this is no filter", remedy) from error
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"{where}: the filter is nested too deep; use 'in [...]' for lists of values") from error


@dataclass(frozen=True)
class _Problem:
    """Makes errors that point at a place of the filter."""

    where: str
    line: str

    def at(self, position: int, problem: str, remedy: str) -> ValueError:
        """Error about the character at `position`, counted from 0."""
        position = min(max(position, 0), len(self.line))
        near = self.line[position : position + 20] or "the end"
        return ValueError(f"{self.where}: {self.line!r}, character {position + 1} ({near!r}): {problem}; {remedy}")

    def node(self, node: ast.AST, problem: str, remedy: str) -> ValueError:
        """Error about a node; its offset counts bytes of UTF-8."""
        offset = getattr(node, "col_offset", 0)
        return self.at(len(self.line.encode()[:offset].decode(errors="ignore")), problem, remedy)

    def scan(self) -> None:
        """Find what Python's grammar has another meaning for, or explains badly."""
        tokens: list[tokenize.TokenInfo] = []
        try:
            tokens.extend(tokenize.generate_tokens(io.StringIO(self.line).readline))
        except (tokenize.TokenError, SyntaxError):  # an open bracket or string: ast.parse says where
            return
        for token, after in zip(tokens, [*tokens[1:], None], strict=True):
            word = token.string
            if after is not None and after.start == token.end and word + after.string in ("&&", "||", "<>"):
                word += after.string
            if token.type == tokenize.COMMENT:
                raise self.at(token.start[1], "a filter has no comments", "put text in quotes")
            if token.type in (tokenize.OP, tokenize.NAME, tokenize.ERRORTOKEN) and word in _REMEDIES:
                raise self.at(token.start[1], f"{word!r} is not part of the language", _REMEDIES[word])
            if token.type == tokenize.ERRORTOKEN and word in "“”‘’„":
                raise self.at(token.start[1], "a typographic quote", "use straight quotes: 'B cell'")


def _node(node: ast.expr, problem: _Problem, *, negate: bool) -> Node:
    """One expression as ours; ``not`` is carried down to the comparisons, so that nulls never pass."""
    match node:
        case ast.BoolOp():
            parts = tuple(_node(value, problem, negate=negate) for value in node.values)
            return Both(isinstance(node.op, ast.And) != negate, parts)
        case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
            pair = tuple(_node(value, problem, negate=negate) for value in (node.left, node.right))
            return Both(isinstance(node.op, ast.BitAnd) != negate, pair)
        case ast.UnaryOp(op=ast.Not()):
            return _node(node.operand, problem, negate=not negate)
        case ast.Compare():
            return _comparison(node, problem, negate)
        case ast.Name(id=name):
            raise problem.node(node, f"{name!r} is not compared with anything", f"write {name} == True, or {_SYNTAX}")
    raise problem.node(node, "only comparisons joined by 'and', 'or', 'not' are understood", _SYNTAX)


def _comparison(node: ast.Compare, problem: _Problem, negate: bool) -> Node:
    operands = [node.left, *node.comparators]
    parts: list[Node] = []
    for left, op, right in zip(operands[:-1], node.ops, operands[1:], strict=True):
        if isinstance(op, ast.In | ast.NotIn):
            values = _values(right, problem)
            parts.append(Member(_column(left, problem), values, isinstance(op, ast.NotIn) != negate))
            continue
        if type(op) not in _OPERATORS:
            raise problem.node(left, "'is' is not part of the language", "write == or !=")
        symbol = _OPERATORS[type(op)]
        if _is_column(left):
            column, value = _column(left, problem), _value(right, problem)
        else:
            column, value, symbol = _column(right, problem), _value(left, problem), _MIRRORED[symbol]
        if isinstance(value, str | bool) and symbol not in ("==", "!="):
            raise problem.node(left, f"{symbol!r} compares numbers, found {value!r}", "write ==, != or in [...]")
        parts.append(Compare(column, _NEGATED[symbol] if negate else symbol, value))
    return parts[0] if len(parts) == 1 else Both(not negate, tuple(parts))


def _is_column(node: ast.expr) -> bool:
    return isinstance(node, ast.Name | ast.Call | ast.Attribute)


def _column(node: ast.expr, problem: _Problem) -> str:
    """Name of a column: a bare name, or ``attr('orig.ident')``."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Call(func=ast.Name(id="attr"), args=[ast.Constant(value=str(name))], keywords=[]):
            return name
        case ast.Attribute():
            name = ast.unparse(node)
            raise problem.node(node, "a column whose name has a dot must be wrapped", f"write attr({name!r})")
        case ast.Call():
            raise problem.node(node, "functions are not part of the language, but for attr('column')", _SYNTAX)
    raise problem.node(node, "expected the name of a column", _SYNTAX)


def _values(node: ast.expr, problem: _Problem) -> tuple[Value, ...]:
    if not isinstance(node, ast.List | ast.Tuple | ast.Set):
        raise problem.node(node, "'in' needs a list of values", "write in ['T cell', 'B cell']")
    if not node.elts:
        raise problem.node(node, "the list is empty", "name at least one value: in ['T cell']")
    return tuple(dict.fromkeys(_value(item, problem) for item in node.elts))


def _value(node: ast.expr, problem: _Problem) -> Value:
    match node:
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=ast.Constant(value=int() | float() as number)):
            value: object = number if isinstance(node.op, ast.UAdd) else -number
        case ast.Constant(value=value):
            pass
        case ast.Name(id=name) if name.lower() in ("true", "false"):
            raise problem.node(node, f"{name!r} is no value", f"write {name.capitalize()}")
        case ast.Name(id=name):
            raise problem.node(node, f"{name!r} is no value", f"put text in quotes: '{name}'")
        case _:
            raise problem.node(node, "expected a value: text in quotes, a number, True or False", _SYNTAX)
    if isinstance(value, float) and not math.isfinite(value) or isinstance(value, int) and abs(value) >= _INT64:
        raise problem.node(node, "the number is too large", "64-bit numbers can be compared")
    if isinstance(value, str | int | float):
        return value
    raise problem.node(node, f"{value!r} is no value", "write text in quotes, a number, True or False")


# --- using -----------------------------------------------------------------------------------------------------------


def _leaves(node: Node) -> Iterator[Compare | Member]:
    if isinstance(node, Both):
        for part in node.parts:
            yield from _leaves(part)
    else:
        yield node


def _literals(leaf: Compare | Member) -> tuple[Value, ...]:
    return leaf.values if isinstance(leaf, Member) else (leaf.value,)


def _text(node: Node) -> str:
    """SOMA's text. In lists it refuses negative numbers, booleans and small integer types: those become comparisons.

    Not so a long list of numbers, since SOMA takes seconds over thousands of comparisons.
    """
    if isinstance(node, Both):
        return (" and " if node.is_and else " or ").join(f"({_text(part)})" for part in node.parts)
    name = node.column if node.column.isidentifier() else f"attr({node.column!r})"
    if isinstance(node, Compare):
        return f"{name} {node.op} {node.value!r}"
    is_long = len(node.values) > _SHORT_LIST and all(type(v) is int and v >= 0 for v in node.values)
    if is_long or all(isinstance(value, str) for value in node.values):
        return f"{name} {'not in' if node.negated else 'in'} {list(node.values)!r}"
    single = [f"{name} {'!=' if node.negated else '=='} {value!r}" for value in node.values]
    if len(single) == 1:
        return single[0]
    return (" and " if node.negated else " or ").join(f"({text})" for text in single)


def _mask(node: Node, table: pa.Table) -> np.ndarray:
    if isinstance(node, Both):
        join = np.logical_and if node.is_and else np.logical_or
        return np.asarray(join.reduce([_mask(part, table) for part in node.parts]), bool)
    if node.column not in table.column_names:
        raise ValueError(f"filter: there is no column {node.column!r}; {_nearest(node.column, table.column_names)}")
    column = table[node.column]
    masks = [np.empty(0, bool)]
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        if not pa.types.is_dictionary(chunk.type):
            masks.append(_hits(chunk, node))
            continue
        # One more entry, which nothing equals, stands for null.
        hits = np.append(_hits(chunk.dictionary, node), False)
        masks.append(hits[chunk.indices.fill_null(len(hits) - 1).to_numpy(zero_copy_only=False)])
    return np.concatenate(masks)


def _hits(values: pa.Array, leaf: Compare | Member) -> np.ndarray:
    if isinstance(leaf, Compare):
        found = pc.call_function(_COMPUTE[leaf.op], [values, _scalar(leaf.value, values.type, leaf.column)])
    else:
        wanted = [_scalar(value, values.type, leaf.column) for value in leaf.values]
        found = pc.is_in(values, pa.array([w.as_py() for w in wanted], wanted[0].type))
        found = pc.and_(pc.invert(found) if leaf.negated else found, pc.is_valid(values))
    return np.asarray(found.fill_null(False).to_numpy(zero_copy_only=False), bool)


def _scalar(value: Value, kind: pa.DataType, column: str) -> pa.Scalar:
    """A literal in the type of its column, as SOMA casts it."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if is_text != isinstance(value, str):
        wanted = "text, so put the value in quotes" if is_text else f"of type {kind}, so write it without quotes"
        raise ValueError(f"filter: {column} is compared with {value!r}, but the column is {wanted}")
    if pa.types.is_boolean(kind) and value not in (0, 1):
        raise ValueError(f"filter: {column} is compared with {value!r}, but the column holds True and False")
    if pa.types.is_boolean(kind):
        return pa.scalar(bool(value), kind)
    if pa.types.is_integer(kind):
        # SOMA would cut the fraction off, and n < 1.5 would lose the rows with 1
        if value != int(value):
            raise ValueError(f"filter: {column} is compared with {value!r}, but the column holds whole numbers")
        return _integer(int(value), kind, column)
    try:
        return pa.scalar(float(value) if pa.types.is_floating(kind) else value, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"filter: {column} is compared with {value!r}, which does not fit type {kind}") from error


def _integer(value: int, kind: pa.DataType, column: str) -> pa.Scalar:
    try:
        return pa.scalar(value, kind)
    except (OverflowError, pa.ArrowInvalid) as error:
        raise ValueError(f"filter: {column} is compared with {value}, which does not fit type {kind}") from error


def _fold(text: object) -> str:
    return str(text).casefold().replace("_", " ").strip()


def nearest(wanted: object, known: Collection[object], n: int = _NEAR) -> list[str]:
    """The up to `n` entries of `known` most like `wanted`, capitals and underscores apart."""
    folded: dict[str, str] = {}
    for entry in known:
        folded.setdefault(_fold(entry), str(entry))
    word = _fold(wanted)
    found = difflib.get_close_matches(word, list(folded), n, 0.6)
    found += [key for key in folded if word and word in key and key not in found][: n - len(found)]
    return [folded[key] for key in found]


def _nearest(wanted: object, known: Collection[object]) -> str:
    near = nearest(wanted, known)
    if near:
        return f"near it: {near} (of {len(known)})"
    some = sorted(map(str, known))[:_NEAR]
    return f"nothing is near it; there are {len(known)}, such as {some}"


def check(
    filter_: Filter,
    schema: pa.Schema | Collection[str],
    values_of: Callable[[str], Collection[Value] | None],
    where: str = "--obs-filter",
) -> None:
    """Refuse a filter that could only give nothing, or not what was meant.

    schema : columns there are; with a `pyarrow.Schema` the types of the values are checked too.
    values_of : all values of a column, or None where there are too many to list.

    Raises
    ------
    ValueError
        On an unknown column, a value of another type, or a value that does not occur; lists the near ones.
    """
    names = schema.names if isinstance(schema, pa.Schema) else list(schema)
    for column in filter_.columns:
        if column not in names:
            raise ValueError(f"{where}: there is no column {column!r}; {_nearest(column, names)}")
    if isinstance(schema, pa.Schema):
        for leaf in _leaves(filter_.node):
            for value in _literals(leaf):
                _scalar(value, schema.field(leaf.column).type, leaf.column)
    for column, literals in filter_.literals.items():
        known = values_of(column)
        missing = [] if known is None else sorted(set(literals) - set(known), key=str)
        if known is not None and missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            told = "; ".join(f"{value!r} ({_nearest(value, known)})" for value in missing[:3])
            raise ValueError(f"{where}: {column} has no value {told}{more}")


def expand_multivalued(filter_: Filter, column: str, values: Collection[str]) -> Filter:
    """Let a term also find the entries that join it with others by `MULTIVALUE_SEPARATOR`.

    ``disease == 'A'`` becomes ``disease in ['A', 'A || B', …]`` with every entry of `values` that has the term as
    one of its parts; ``!=`` and ``not in`` exclude the same entries.
    """
    entries: dict[str, list[str]] = {}
    for value in sorted(set(values)):
        for part in {value, *value.split(MULTIVALUE_SEPARATOR)}:
            entries.setdefault(part, []).append(value)
    return Filter(_expand(filter_.node, column, entries))


def _expand(node: Node, column: str, entries: Mapping[str, Sequence[Value]]) -> Node:
    if isinstance(node, Both):
        return Both(node.is_and, tuple(_expand(part, column, entries) for part in node.parts))
    if node.column != column or (isinstance(node, Compare) and node.op not in ("==", "!=")):
        return node
    literals = _literals(node)
    found: dict[Value, None] = {}
    for value in literals:
        found |= dict.fromkeys(entries.get(str(value), [value]))
    if set(found) == set(literals):
        return node
    negated = node.negated if isinstance(node, Member) else node.op == "!="
    return Member(column, tuple(found), negated)
