"""YAML files that people write: no code, no key twice, and 1e-3 is a number."""

import re
from pathlib import Path
from typing import Any

import yaml

_DIGITS, _EXPONENT = r"\d[\d_]*", r"[eE][-+]?\d+"
_FLOAT = re.compile(rf"^[-+]?((({_DIGITS})?\.{_DIGITS}|{_DIGITS}\.)({_EXPONENT})?|{_DIGITS}{_EXPONENT})$")


class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """PyYAML's safe loader with the floats of YAML 1.2; a key that stands twice is refused, where PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build one mapping."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} stands twice in one mapping", key_node.start_mark
                )
            seen.add(key_node.value)
        return dict(super().construct_mapping(node, deep=deep))


Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read_yaml(path: Path) -> Any:
    """What a YAML file says.

    Raises
    ------
    ValueError
        If it is not YAML, has a key twice, or is nested too deep.
    OSError
        If it cannot be read.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    except RecursionError as error:
        raise ValueError(f"{path}: not YAML that can be read (nested too deep)") from error
