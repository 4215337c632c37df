"""The list of prompts beside the pictures of a step: a line each, whatever white space a prompt holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

PROMPTS = "prompts.txt"


def write_prompts(folder: Path, prompts: Sequence[str]) -> None:
    """Writes `prompts.txt`. A prompt of several lines, or one that begins with a quotation mark, stands there as JSON
    writes it."""
    lines = [
        json.dumps(prompt, ensure_ascii=False) if len(prompt.splitlines()) != 1 or prompt[0] == '"' else prompt
        for prompt in prompts
    ]
    (folder / PROMPTS).write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8"))


def read_prompts(folder: Path) -> list[str]:
    """The prompts as they were. Raises OSError."""
    text = (folder / PROMPTS).read_bytes().decode("utf-8", "replace")
    return [_read(line) for line in text.removesuffix("\n").split("\n")] if text else []


def _read(line: str) -> str:
    """Older runs wrote every prompt as it is, those in quotation marks too."""
    try:
        prompt = json.loads(line) if line.startswith('"') else line
    except ValueError:
        return line
    return prompt if isinstance(prompt, str) else line
