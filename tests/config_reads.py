"""Which keys of the configuration a run reads: the proof that none is accepted and ignored.

    tracker = ReadTracker()
    with tracker:
        main(["train", "--config", ..., "model.component=ar"])
    with tracker:
        main(["train", "--config", ..., "model.component=dit"])
    assert tracker.unread() == []

Reads add up over any number of `with` blocks. A read is the access of a leaf as an attribute, `config.seed` or
`options.engine` of a section reached from a Config, in this process. Not counted: what the config package does for
itself (checking, printing, comparing), and `model_dump`, `repr` and `==`, which take all keys alike. Methods of Config
such as `optimizer_for` count for the keys they look at when a run calls them.
"""

from __future__ import annotations

import sys
from types import FrameType, TracebackType
from typing import Any

from glm_training.config import Config, iter_keys
from glm_training.config.sections.base import Section

OWN_MODULES = tuple(f"glm_training.config.{room}" for room in ("checks.", "docs.", "loading.", "sections.defaults"))


class ReadTracker:
    """Collects the dotted paths of all leaves read while its `with` block runs."""

    def __init__(self) -> None:
        self.reads: set[str] = set()
        self._prefixes: dict[int, str] = {}
        self._alive: list[Section] = []  # keeps the ids above from being given to another section

    def unread(self) -> list[str]:
        """The leaves of the schema that no block has read, in the schema's order."""
        return [key for key in iter_keys() if key not in self.reads]

    def __enter__(self) -> ReadTracker:
        def access(section: Section, name: str) -> Any:
            value = object.__getattribute__(section, name)
            if name in type(section).model_fields:
                self._note(section, name, value)
            return value

        if "__getattribute__" in vars(Section):
            raise RuntimeError("another ReadTracker is active")
        Section.__getattribute__ = access  # type: ignore[method-assign, assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del Section.__getattribute__

    def _note(self, section: Section, name: str, value: Any) -> None:
        prefix = "" if isinstance(section, Config) else self._prefixes.get(id(section))
        if prefix is None:
            return
        if isinstance(value, Section):
            if id(value) not in self._prefixes:
                self._alive.append(value)
            self._prefixes[id(value)] = f"{prefix}{name}."
        elif not _by_config_itself(sys._getframe(2)):
            self.reads.add(prefix + name)


def _by_config_itself(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(OWN_MODULES):
            return True
        frame = frame.f_back
    return False
