"""Saves that die: every file-system operation of a commit is a place to be killed at."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from glm_training.checkpoint import disk

SYNCS = {"sync_file": lambda handle: handle.flush(), "sync_folder": lambda path: None}  # seconds a test does not need
OPERATIONS = [name for name, value in vars(disk).items() if inspect.isfunction(value) and name != "free_bytes"]


class Killed(BaseException):
    """Stands for kill -9: not an Exception, so that no handler may take it for an error of the disk."""


@dataclass
class FaultyDisk:
    """Counts operations and dies at number ``die_at``: before it, after it, or half-way through a write.

    Once dead every further operation dies too, as a killed process does not clean up.
    """

    monkeypatch: pytest.MonkeyPatch
    die_at: int = -1
    moment: str = "before"
    error: BaseException | None = None
    calls: list[str] = field(default_factory=list)
    arguments: list[tuple] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in OPERATIONS:
            self.monkeypatch.setattr(disk, name, self._wrap(name, SYNCS.get(name, getattr(disk, name))))

    @property
    def dead(self) -> bool:
        return 0 <= self.die_at < len(self.calls)

    def arm(self, die_at: int, moment: str) -> None:
        self.die_at, self.moment, self.calls = die_at, moment, []
        self.arguments = []

    def disarm(self) -> None:
        self.arm(-1, "before")

    def _wrap(self, name: str, operation: Callable) -> Callable:
        def operate(*arguments):
            if self.error is None and self.dead:
                raise Killed
            self.calls.append(name)
            self.arguments.append(arguments)
            if not (self.die_at == len(self.calls) - 1):
                return operation(*arguments)
            if self.moment == "after":
                operation(*arguments)
            elif self.moment == "half" and name == "write":
                handle, data = arguments
                operation(handle, data[: len(data) // 2])
            elif self.moment == "half" and name == "remove_tree":
                next(path for path in Path(arguments[0]).rglob("*") if path.is_file()).unlink()
            raise self.error or Killed

        return operate


@pytest.fixture
def faulty_disk(monkeypatch):
    return FaultyDisk(monkeypatch)
