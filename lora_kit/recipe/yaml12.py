"""YAML with the numbers and booleans of YAML 1.2's core schema (https://yaml.org/spec/1.2.2/, section 10.3.2).

PyYAML alone reads 1.1: there `1e-4` is text, `no` is False, `010` is 8, and the last of two equal keys wins in
silence. Here `1e-4` is a number, `no` is text, `0o10` is 8, and a key given twice is an error.
"""

from __future__ import annotations

import re
from typing import Any, TypeAlias, cast

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from lora_kit.errors import RecipeError

Tree: TypeAlias = "dict[str, Tree] | list[Tree] | str | int | float | bool | None"

MAX_NODES = 100_000
"""Values a document may hold once its aliases are written out: a few hundred bytes can stand for billions."""

_CORE_SCHEMA = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), [*"~nN", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]),
    ("int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), [*"-+0123456789"]),
    (
        "float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        [*"-+.0123456789"],
    ),
)
_OLD_BREAKS = re.compile("[\x85\u2028\u2029]")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema's scalars, and mappings whose keys are distinct text."""


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.2, or an older reader, would take for something else."""

    def ignore_aliases(self, data: object) -> bool:
        """Write every value out: a recipe with `&id001` in it is hard to read."""
        return True


def parse(text: str, name: str) -> Tree:
    """The one document in `text`; None when there is nothing in it.

    Raises RecipeError with `name`, line, column and the line itself.
    """
    loader = None
    try:
        loader = _Loader(text)
        value: Any = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_marked(error, text, name)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found = f"the character U+{ord(text[error.position]):04X} is not allowed in YAML. Remove or escape it."
        raise RecipeError(f"{name}, line {line}: {found}") from error
    except RecursionError as error:
        raise RecipeError(f"{name}: nested too deeply to be a recipe.") from error
    finally:
        if loader is not None:
            loader.dispose()
    return _Expansion(name).copy(value)


def dump(tree: Tree) -> str:
    """YAML text that `parse` reads back as `tree`."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Expansion:
    """Copies a parsed tree so that no two places share a container, within MAX_NODES."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes = 0
        self.open: set[int] = set()

    def copy(self, value: object) -> Tree:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise RecipeError(f"{self.name}: more than {MAX_NODES} values once its aliases (`*name`) are written out.")
        if value is None or isinstance(value, str | int | float):
            return value
        if not isinstance(value, dict | list):
            raise RecipeError(f"{self.name}: a {type(value).__name__} cannot stand in a recipe; write it as text.")
        container = cast("dict[str, object] | list[object]", value)
        if id(container) in self.open:
            raise RecipeError(f"{self.name}: an alias (`*name`) stands inside the value it refers to.")
        self.open.add(id(container))
        copied = self._copy_items(container)
        self.open.remove(id(container))
        return copied

    def _copy_items(self, value: dict[str, object] | list[object]) -> Tree:
        if isinstance(value, list):
            return [self.copy(item) for item in value]
        return {key: self.copy(item) for key, item in value.items()}


def _marked(error: yaml.MarkedYAMLError, text: str, name: str) -> str:
    mark = error.problem_mark or error.context_mark
    said = ": ".join(part for part in (error.context, error.problem) if part) or "not valid YAML"
    if mark is None:
        return f"{name}: {said}."
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    start = max(0, mark.column - 80)  # a window, so that a line of thousands of characters stays readable
    where = f"{name}, line {mark.line + 1}, column {mark.column + 1}: {said}."
    return f"{where}\n    {line[start : start + 100]}\n    {' ' * (mark.column - start)}^"


def _construct_mapping(loader: _Loader, node: Node) -> Any:
    """A dict, filled after it is yielded so that aliases to it can be made; keys checked on the way."""
    if not isinstance(node, MappingNode):
        raise yaml.constructor.ConstructorError(None, None, "a mapping is needed here", node.start_mark)
    result: dict[str, Any] = {}
    yield result
    first_lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key = _key(key_node)
        if key in first_lines:
            said = f"the key `{key}` is given twice (first on line {first_lines[key]}); keep one"
            raise yaml.constructor.ConstructorError(None, None, said, key_node.start_mark)
        first_lines[key] = key_node.start_mark.line + 1
        result[key] = loader.construct_object(value_node)


def _key(node: Node) -> str:
    if isinstance(node, ScalarNode) and node.tag == "tag:yaml.org,2002:str":
        return node.value
    shown = f"`{node.value}`" if isinstance(node, ScalarNode) else "a list or mapping"
    said = f"a key must be text, got {shown}; put it in quotes if it is meant as a name"
    raise yaml.constructor.ConstructorError(None, None, said, node.start_mark)


def _construct_int(loader: _Loader, node: Node) -> int:
    text = _scalar_text(node, "int")
    if text.startswith(("0o", "0x")):
        return int(text, 0)
    return int(text)


def _construct_float(loader: _Loader, node: Node) -> float:
    return float(_scalar_text(node, "float").lower().replace(".inf", "inf").replace(".nan", "nan"))


def _construct_bool(loader: _Loader, node: Node) -> bool:
    return _scalar_text(node, "bool").lower() == "true"


def _scalar_text(node: Node, kind: str) -> str:
    """The scalar's text, checked again: an explicit tag (`!!int x`) brings any text here."""
    pattern = next(pattern for name, pattern, _ in _CORE_SCHEMA if name == kind)
    text = str(node.value)
    if not isinstance(node, ScalarNode) or not pattern.match(text):
        raise yaml.constructor.ConstructorError(None, None, f"not of type {kind}: {text!r}", node.start_mark)
    if kind == "int" and len(text) > 100:
        raise yaml.constructor.ConstructorError(None, None, "a number of over 100 digits", node.start_mark)
    return text


def _represent_text(dumper: _Dumper, text: str) -> ScalarNode:
    """Text with one of 1.1's line breaks in escapes: PyYAML reads them, written as they are, as a newline."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if _OLD_BREAKS.search(text) else None)


def _install() -> None:
    """Give the two classes their scalars; both start without PyYAML's own, which are YAML 1.1's."""
    _Loader.yaml_implicit_resolvers = {}
    _Dumper.yaml_implicit_resolvers = {}
    for name, pattern, first in _CORE_SCHEMA:
        _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", pattern, first)
        _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{name}", pattern, first)
    # After the core schema's, so that text such as `no` or `2020-01-01` is quoted for older readers too.
    for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items():
        for tag, pattern in resolvers:
            _Dumper.add_implicit_resolver(tag, pattern, [first])
    _Dumper.add_representer(str, _represent_text)
    _Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
    _Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
    _Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
    _Loader.add_constructor("tag:yaml.org,2002:bool", _construct_bool)


_install()
