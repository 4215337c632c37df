"""What is wrong with a configuration, all of it at once."""

from __future__ import annotations

from dataclasses import dataclass

from glm_training.utils.redaction import redact
from glm_training.utils.words import counted


@dataclass(frozen=True)
class Issue:
    """Keys that do not go together. The first of `paths` is the one an error points at."""

    paths: tuple[str, ...]
    message: str
    suggestion: str | None = None
    rests_on: tuple[str, ...] = ()
    """Other keys that it follows from: where one of them is faulty by itself, there is nothing to say yet."""


@dataclass(frozen=True)
class Problem:
    """One thing to fix: where it stands, what is wrong with it, what to write instead. Its text has secrets masked."""

    file: str
    """The YAML file, or what else set the key, such as ``override `seed=x` ``."""
    line: int | None
    """Counted from 1; None where there is no line, as in an override or for a key that is absent."""
    path: str
    """The key, as in `training.batch_size`; empty where the whole file is meant."""
    message: str
    suggestion: str | None = None

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        head = f"{where}: {self.path}" if self.path else where
        said = self.message + (f" {self.suggestion}" if self.suggestion else "")
        if said[:1].isalpha():  # words of ours, no value: a key that is named like a secret masks none of them
            return f"{redact(head)}: {redact(said)}"
        return redact(f"{head}: {said}")


class ConfigError(Exception):
    """A configuration that cannot be used; `problems` lists every reason."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__(problems)

    def __str__(self) -> str:
        count = len(self.problems)
        head = f"{counted(count, 'problem')} in the configuration"
        return "\n".join([f"{head}:", *(f"  {problem}" for problem in self.problems)])
