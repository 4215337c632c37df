"""YAML read strictly: the line of every key, no key twice, and `1e-5` is a number."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from glm_training.config.docs.describe import KeyPath
from glm_training.config.errors import Problem

Tree = dict[str, Any]

FLOAT = re.compile(
    r"""^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |[0-9][0-9_]*[eE][-+]?[0-9]+
        |\.(?:inf|Inf|INF))$
        |^\.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)
"""YAML 1.2's notation; PyYAML's own wants a point in the mantissa and a sign in the exponent."""


class StrictLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 floats. Nothing but plain data is ever constructed."""


StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


@dataclass
class Source:
    """The data of a file, or of several laid over one another, before any check, with where each key came from."""

    file: str
    tree: Tree = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    """Line, counted from 1, of each key of the file."""
    files: dict[KeyPath, str] = field(default_factory=dict)
    """For keys that another file laid over `file` set: that file."""
    origins: dict[KeyPath, str] = field(default_factory=dict)
    """For keys that something other than the file set: what did."""
    problems: list[Problem] = field(default_factory=list)

    def locate(self, path: KeyPath) -> tuple[str, int | None]:
        """File and line of a key, or of the nearest section around it that is there."""
        for length in range(len(path), 0, -1):
            prefix = path[:length]
            if prefix in self.origins:
                return self.origins[prefix], None
            if prefix in self.lines:
                return self.files.get(prefix, self.file), self.lines[prefix]
        return self.file, None

    def forget(self, path: KeyPath) -> None:
        """Drop what is known of where `path`, and all below it, came from."""
        for places in (self.lines, self.origins, self.files):
            for known in [known for known in places if known[: len(path)] == path]:
                del places[known]

    def add(self, path: KeyPath, message: str, suggestion: str | None = None) -> None:
        """Note a problem with the key at `path`."""
        file, line = self.locate(path)
        self.problems.append(Problem(file, line, ".".join(path), message, suggestion))


def parse_yaml(text: str) -> Any:
    """One YAML value, as in an override. Raises `yaml.YAMLError`."""
    return yaml.load(text, Loader=StrictLoader)


def read_source(path: Path) -> Source:
    """Read a YAML file. What is wrong with it as YAML is in the result's `problems`."""
    source = Source(str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        source.add((), "there is no such file.", f"The current directory is `{Path.cwd()}`.")
        return source
    except (OSError, UnicodeDecodeError) as error:
        source.add((), f"cannot be read: {error}.")
        return source
    tree: Any = None
    loader = StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is not None:
            _Walk(source).visit(node, ())
            tree = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = None if error.problem_mark is None else error.problem_mark.line + 1
        source.problems.append(Problem(source.file, line, "", f"not valid YAML: {error.problem or error.context}."))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        source.problems.append(Problem(source.file, None, "", f"not valid YAML: {error}."))
    finally:
        loader.dispose()
    if isinstance(tree, dict):
        source.tree = tree
    elif tree is not None:
        source.add((), "the file must hold `key: value` lines at its top level.")
    return source


class _Walk:
    """Notes lines and repeated keys in the tree of nodes, before values are built and repetitions vanish."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.around: list[yaml.Node] = []

    def visit(self, node: yaml.Node, path: KeyPath) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        if node in self.around:
            raise ConstructorError(problem=f"`{'.'.join(path)}` contains itself", problem_mark=node.start_mark)
        self.around.append(node)
        first_lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                self.visit(value, path)
                continue
            if isinstance(key, yaml.ScalarNode):
                key.tag = "tag:yaml.org,2002:str"  # `on` and `1` are names here, not true and a number
            name = str(key.value)
            if name in first_lines:
                self.source.problems.append(
                    Problem(
                        self.source.file,
                        line,
                        ".".join((*path, name)),
                        f"the key is there twice; the first is in line {first_lines[name]}.",
                        "Remove one.",
                    )
                )
            first_lines.setdefault(name, line)
            self.source.lines[(*path, name)] = line
            self.visit(value, (*path, name))
        self.around.pop()
