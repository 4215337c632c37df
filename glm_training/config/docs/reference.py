"""The schema as a table, as JSON schema and as a list of keys; a configuration as YAML and as differences."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel

from glm_training.config.docs.describe import Key, plain, section_type, walk
from glm_training.config.scalars import StrictDumper
from glm_training.config.schema import Config
from glm_training.config.sections.reward_options import REMOTE_DRIFT_FREE
from glm_training.utils.redaction import redact_values, same_but_for_secrets
from glm_training.utils.words import counted

DRIFT_FREE = (
    "output_dir",
    "model.device_map",
    "model.local_files_only",
    "data.num_workers",
    "data.pin_memory",
    "training.gradient_checkpointing",
    "training.offload_between_phases",
    "training.compile",
    "rollout.cuda_graph",
    "rollout.micro_batch_size",
    "rollout.vae_batch_size",
    "reward.grpo.gate",
    "reward.grpo.gate_interval",
    "reward.grpo.gate_tolerance",
    "reward.monitors",
    "dpo.vae_batch_size",
    "dpo.cache",
    "dpo.cache_dir",
    "distributed",
    "cache",
    "checkpoint",
    "logging",
    "evaluation",
    "resume",
)
"""Keys and sections that cannot change what is trained: a run may resume with others without asking."""

TABLE_START = "<!-- generated from the schema: start -->"
TABLE_END = "<!-- generated from the schema: end -->"


def keys() -> Iterator[Key]:
    """Every leaf of the schema with its description, default and allowed values."""
    return walk(Config)


def iter_keys() -> Iterator[str]:
    """The dotted path of every leaf, such as `reward.grpo.num_samples`."""
    return (key.path for key in keys())


def json_schema() -> dict[str, Any]:
    """The schema of the YAML file, for editors."""
    return Config.model_json_schema()


def resolved_yaml(config: Config) -> str:
    """Every key with its value, loadable again to an equal configuration but for secrets, which are masked; then, as
    comments, what the keys come to."""
    tree = redact_values(config.model_dump(mode="json"))
    text = yaml.dump(tree, Dumper=StrictDumper, sort_keys=False, allow_unicode=True, width=120)
    return text + "".join(f"# {line}\n" for line in ("What this comes to:", *_derived(config)))


def _derived(config: Config) -> Iterator[str]:
    if config.uses_reward():
        group = config.group()
        yield f"images per prompt: {counted(group.plans, 'plan')} x {counted(group.renders, 'render')}"
        yield f"rollout: {plain(asdict(config.rollout_sampling()))}"
    for part in config.parts():
        yield f"{part} optimizer: {plain(asdict(config.optimizer_for(part)))}"
        if config.uses_reward():
            yield f"{part} policy: {plain(asdict(config.policy_for(part)))}"
        yield f"{part} lora: {plain(asdict(config.lora_for(part)))}"


def config_diff(before: Config, after: Config, accept: Sequence[str] = ()) -> list[str]:
    """What differs in what is trained, one `key: old -> new` each; empty if the run may resume.

    Left out are the keys and sections in `accept` and in `DRIFT_FREE`.
    """
    old, new = compared(before), compared(after)
    free = (*DRIFT_FREE, *accept)
    changes = []
    for path in iter_keys():
        values = _at(old, path), _at(new, path)
        if not same_but_for_secrets(*values) and not any(path == item or path.startswith(f"{item}.") for item in free):
            changes.append(f"{path}: {values[0]!r} -> {values[1]!r}")
    return changes


def leaves(config: Config) -> Iterator[tuple[str, Any]]:
    """The dotted path and the value of every leaf, as JSON has them."""
    tree = config.model_dump(mode="json")
    return ((path, _at(tree, path)) for path in iter_keys())


def compared(config: Config) -> dict[str, Any]:
    """The values of a configuration, secrets masked; of remote rewards those that their scores may depend on."""
    free = {"reward": {"options": {"remote": {"__all__": set(REMOTE_DRIFT_FREE)}}}}
    return cast(dict[str, Any], redact_values(config.model_dump(mode="json", exclude=free)))


def docs_table() -> str:
    """Every key in Markdown: one heading and one table per section."""
    top = [Key(name, field) for name, field in Config.model_fields.items() if section_type(field) is None]
    blocks = [_table("Top level", None, top)]
    for name, field in Config.model_fields.items():
        section = section_type(field)
        if section is not None:
            blocks.append(_table(f"`{name}`", section, list(walk(section, f"{name}."))))
    return "\n\n".join(blocks) + "\n"


def update_docs(path: Path) -> bool:
    """Write `docs_table` between the two marker lines of a Markdown file; whether that changed the file."""
    text = path.read_text(encoding="utf-8")
    head, _, rest = text.partition(TABLE_START)
    _, end, tail = rest.partition(TABLE_END)
    if not end:
        raise ValueError(f"{path} lacks the lines {TABLE_START} and {TABLE_END}")
    updated = f"{head}{TABLE_START}\n\n{docs_table()}\n{TABLE_END}{tail}"
    path.write_text(updated, encoding="utf-8")
    return updated != text


def _table(title: str, section: type[BaseModel] | None, rows: list[Key]) -> str:
    lines = [f"### {title}", ""]
    if section is not None:
        lines += [inspect.cleandoc(section.__doc__ or ""), ""]
    lines += ["| Key | Default | Allowed | Meaning |", "| --- | --- | --- | --- |"]
    for key in rows:
        cells = (f"`{key.path}`", key.default, key.allowed, key.description)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _at(tree: Any, path: str) -> Any:
    for name in path.split("."):
        tree = tree[name]
    return tree
