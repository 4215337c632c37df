"""What must not leave this machine with an export: secrets, absolute paths, names of its users and hosts."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from glm_training.export.source import ExportError
from glm_training.utils.redaction import MASK, MIN_SECRET_LENGTH, is_secret_key, redact, redact_values

HIDDEN_SECTIONS = ("logging", "resume", "cache", "distributed")
"""Sections of a configuration that say where a run was and who watched it, and nothing of the model."""

_PATH = re.compile(r"(?<![\w.:/~-])(?:~[\w.-]*|[A-Za-z]:)?[\\/](?:[^\s\\/\"'<>|:,;)\]}]+[\\/])*[^\s\\/\"'<>|:,;)\]}]*")
_WHOLE_PATH = re.compile(r"(?:[\\/]|~[\w.-]*[\\/]|[A-Za-z]:[\\/])[^\n:]+")
_ADDRESS = re.compile(r"\b([a-z][a-z0-9+.-]*://)([^\s/\"'<>]*)([^\s\"'<>]*)", re.IGNORECASE)
_KNOWN_HOSTS = re.compile(r"(?:[\w-]+\.)*(?:huggingface\.co|github\.com|arxiv\.org|w3\.org)")
_READ_FROM = ("_name_or_path", "base_model_name_or_path", "name_or_path")
"""Keys under which libraries write where a model was read from."""
_TEXTS = (".md", ".json", ".yaml", ".txt", ".jinja")
_VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
_OF_PLACE = ("USER", "LOGNAME", "USERNAME", "HOSTNAME", "COMPUTERNAME", "SLURM_JOB_ACCOUNT")
_SHORTEST = 3
"""Shorter names of users and hosts would mask ordinary words."""


def scrubbed(value: Any) -> Any:
    """A copy of settings with secrets masked, addresses without their host, and paths and names of this machine's users
    and hosts taken out; of an absolute path its last part stays."""
    if isinstance(value, Mapping):
        return {_scrubbed_key(key): scrubbed(item) for key, item in redact_values(value).items()}
    if isinstance(value, list | tuple):
        return [scrubbed(item) for item in value]
    return scrubbed_text(value) if isinstance(value, str) else value


def _scrubbed_key(key: Any) -> Any:
    """A metric of one's own is called by its file, `/home/me/mine.py:Class`."""
    return scrubbed_text(key) if isinstance(key, str) and re.search(r"[\\/]", key) else key


def scrubbed_text(text: str) -> str:
    """`text` without what `scrubbed` takes out."""
    text = _ADDRESS.sub(_without_host, redact(text))
    if _WHOLE_PATH.fullmatch(text):  # which may have spaces in it
        text = _last_part(text)
    text = _PATH.sub(lambda found: _last_part(found[0]) if len(found[0]) > 1 else found[0], text)
    for name in names_of_this_place():
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", MASK, text)
    return text


def _last_part(path: str) -> str:
    """`.../name`; a home folder has no name that may be told."""
    above, _, name = re.sub(r"[\\/]+", "/", path).rstrip("/").rpartition("/")
    return "..." if above.lower().endswith(("/home", "/users")) or path.startswith("~") and not above else f".../{name}"


def _without_host(found: re.Match[str]) -> str:
    known = _KNOWN_HOSTS.fullmatch(found[2].lower()) is not None
    return found[0] if known else f"{found[1]}{MASK}"


def names_of_this_place() -> list[str]:
    """Names of the user and the host, the longest first; `root` is everyone's."""
    try:
        names = {getpass.getuser()}
    except (KeyError, OSError):  # a user without an entry, as in containers
        names = set()
    names |= {socket.gethostname(), Path.home().name, *(os.environ.get(name, "") for name in _OF_PLACE)}
    return sorted((each for each in names if len(each) >= _SHORTEST and each != "root"), key=len, reverse=True)


def scrub_files(folder: Path) -> None:
    """Takes out of JSON files where libraries read their models from: local folders, not hub ids."""
    for path in folder.rglob("*.json"):
        if path.name in _VOCABULARY:
            continue
        tree = json.loads(path.read_text(encoding="utf-8"))
        if changed := _forget(tree):
            path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _forget(tree: Any) -> Any:
    """`tree` without local places under the keys that tell them; None where there is none."""
    found = False

    def walk(value: Any) -> Any:
        nonlocal found
        if isinstance(value, list):
            return [walk(item) for item in value]
        if not isinstance(value, dict):
            return value
        kept = {}
        for key, item in value.items():
            if key in _READ_FROM and isinstance(item, str) and (os.path.isabs(item) or os.path.exists(item)):
                found = True
            else:
                kept[key] = walk(item)
        return kept

    walked = walk(tree)
    return walked if found else None


def require_clean(folder: Path, places: list[Path]) -> None:
    """Raises ExportError, naming every file, where a text or the header of a file of weights tells a secret of the
    environment, the home folder, or one of the `places` that the export was made from."""
    told = {str(path) for path in (Path.home(), *places) if len(path.parts) > 1}
    problems = []
    for name, text in _texts(folder):
        found = [place for place in sorted(told) if re.search(rf"{re.escape(place)}(?![\w.-])", text)]
        if found:
            problems.append(f"{name} tells the place {found[0]}")
        elif _secret_in(name, text):
            problems.append(f"{name} holds a secret")
    if problems:
        raise ExportError(
            "the export would tell what should stay here:\n" + "\n".join(f"  {each}" for each in problems)
        )


def _secret_in(name: str, text: str) -> bool:
    """Whether a secret of the environment stands in a text, or in one of ours what looks like any. Libraries write of
    tokens as models have them."""
    secrets = [value for key, value in os.environ.items() if is_secret_key(key) and len(value) >= MIN_SECRET_LENGTH]
    return any(value in text for value in secrets) or (name.endswith(".md") and redact(text) != text)


def _texts(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                yield name, json.dumps(file.metadata() or {})
        elif path.suffix in _TEXTS and path.name not in _VOCABULARY:
            yield name, path.read_text(encoding="utf-8")
