"""From a YAML file and overrides to a `Config`, or to the list of everything that is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from glm_training.config.checks.cross_field import cross_field_issues
from glm_training.config.docs.describe import KeyPath, split_path
from glm_training.config.errors import ConfigError, Issue, Problem
from glm_training.config.loading.explain import faults
from glm_training.config.loading.overrides import apply_override, lay_over, set_key
from glm_training.config.loading.yaml_source import Source, Tree, read_source
from glm_training.config.schema import Config

_COMPONENTS = {"both": "--train_both"} | {
    part: f"train_{part}.py, which trains the {half} half alone (train.py trains what the file says)"
    for part, half in (("ar", "AR"), ("dit", "DiT"))
}
"""What of the command line says `model.component`."""


def load_config(
    path: str | Path | Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    mode: str | None = None,
    component: str | None = None,
) -> Config:
    """Read a configuration from a file, or from several of which the later ones win key by key.

    `overrides` are `key.path=value` strings, the later ones winning; `mode` and `component` set `training.mode` and
    `model.component` over everything else. Relative paths in the result start at the current directory.
    Raises `ConfigError` with every problem found.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(file) for file in path]
    source = read_source(paths[0])
    unreadable = bool(source.problems) and not source.tree
    for file in paths[1:]:
        top = read_source(file)
        unreadable |= bool(top.problems) and not top.tree
        lay_over(source, top, Config)
    for text in overrides:
        apply_override(source, text, Config)
    if mode is not None:
        set_key(source, ("training", "mode"), mode, f"--mode {mode}")
    if component is not None:
        set_key(source, ("model", "component"), component, _COMPONENTS.get(component, f"component {component}"))
    if source.tree.get("output_dir") is None:
        source.tree["output_dir"] = "runs/" + "-".join(file.stem for file in paths)
    config = None if unreadable else _validate(source)
    if config is None or source.problems:
        raise ConfigError(sorted(source.problems, key=lambda problem: (problem.line is None, problem.line or 0)))
    return config


def config_from_yaml(text: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration that `resolved_yaml` wrote, with overrides. Raises `ConfigError`, as for a version that knew
    other keys."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)


def changed(config: Config, overrides: Sequence[str]) -> Config:
    """`config` as it is under further overrides: what it says itself stays, and what nothing said has its default of
    then. Raises `ConfigError` where they do not go with it."""
    return config_from_yaml(json.dumps(config.model_dump(mode="json", exclude_unset=True)), overrides)


def _validate(source: Source) -> Config | None:
    """Validate, and go on without each faulty entry until nothing is faulty, to find what else is wrong."""
    tree, faulty = deepcopy(source.tree), set[KeyPath]()
    while True:
        try:
            config = Config.model_validate(tree)
        except ValidationError as error:
            details = error.errors(include_url=False)
        else:
            issues = cross_field_issues(config)
            for issue in issues:
                _report(issue, source, faulty)
            return None if issues else config
        found = [fault for fault in faults(details, tree, Config) if fault.path not in faulty]
        if not found:
            return None
        for fault in found:
            source.add(fault.path, fault.message, fault.suggestion)
            faulty.add(fault.path)
            _remove(tree, fault.path)


def _report(issue: Issue, source: Source, faulty: set[KeyPath]) -> None:
    """Note an issue between keys, unless one of them was faulty by itself and is only missing here."""
    paths = [split_path(path, Config) for path in issue.paths]
    rests_on = [split_path(path, Config) for path in issue.rests_on]
    if any(path[: len(bad)] == bad or bad[: len(path)] == path for path in paths + rests_on for bad in faulty):
        return
    given = [path for path in paths if path in source.lines or path in source.origins]
    file, line = source.locate((given or paths)[0])
    source.problems.append(Problem(file, line, issue.paths[0], issue.message, issue.suggestion))


def _remove(tree: Tree, path: KeyPath) -> None:
    for name in path[:-1]:
        below = tree.get(name)
        if not isinstance(below, dict):
            return
        tree = below
    for key in [key for key in tree if str(key) == path[-1]]:
        del tree[key]
