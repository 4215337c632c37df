"""What was found, for people and for machines."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

WIDTH = 80
_MARK = {"ok": "ok", "note": "note", "failed": "FAIL", "skipped": "skip"}
_INDENT = 6

Status = Literal["ok", "note", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """name: what was looked at. status: `note` is worth knowing and no fault; `skipped` could not be looked at.
    command: the words of the shell's line that mends it, each quoted already. facts: the same for machines.

    Raises ValueError for a failure without a command.
    """

    name: str
    status: Status
    message: str
    command: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status == "failed" and not self.command:
            raise ValueError(f"{self.name} fails, and nothing is said of how to mend it")

    def as_dict(self) -> dict[str, Any]:
        """With the command as one line, None without one."""
        return {
            "name": self.name,
            "status": self.status,
            "message": self.message,
            "command": " ".join(self.command) or None,
            "facts": dict(self.facts),
        }

    def lines(self) -> list[str]:
        """At most 80 columns, but for words that are longer; a command that is cut goes on after a backslash."""
        begin, rest = f"{_MARK[self.status]:<{_INDENT}}", " " * _INDENT
        told = [
            line
            for number, part in enumerate(f"{self.name}: {self.message}".splitlines())
            for line in textwrap.wrap(
                part,
                WIDTH,
                initial_indent=begin if number == 0 else rest,
                subsequent_indent=rest,
                break_long_words=False,
                break_on_hyphens=False,
            )
        ]
        return [*told, *_command_lines(self.command)]


def ok(name: str, message: str, **facts: Any) -> Finding:
    """Nothing to mend."""
    return Finding(name, "ok", message, facts=facts)


def note(name: str, message: str, command: Sequence[str] = (), **facts: Any) -> Finding:
    """Worth knowing; `command` is there for who minds."""
    return Finding(name, "note", message, tuple(command), facts)


def failed(name: str, message: str, command: Sequence[str], **facts: Any) -> Finding:
    """A run would not start, or not end; `command` mends that."""
    return Finding(name, "failed", message, tuple(command), facts)


def _command_lines(words: Sequence[str]) -> list[str]:
    lines: list[str] = []
    current = " " * _INDENT + "$"
    for number, word in enumerate(words):
        closing = 0 if number == len(words) - 1 else 2  # room for the backslash
        if len(current) + 1 + len(word) + closing > WIDTH and current.strip() != "$":
            lines.append(f"{current} \\")
            current = " " * (_INDENT + 3) + word
        else:
            current = f"{current} {word}"
    return [*lines, current] if words else []
