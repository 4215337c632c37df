"""What a message says of texts and code that are not ours: cut, masked, and with the place in the user's file."""

from __future__ import annotations

import inspect
import json
import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from glm_training.rewards.types import RewardError, RewardSampleError, ScoringStopped
from glm_training.utils.redaction import MASK, redact
from glm_training.utils.signals import Aborted

SHOWN = 300
"""Characters of a foreign text that a message quotes."""

_LOOKED_AT = 1 << 14
_FRAMES = 4
_PACKAGE = Path(__file__).parents[1]
_STANDARD = Path(sysconfig.get_paths()["stdlib"])
_LIBRARIES = frozenset(("site-packages", "dist-packages"))


def shown(text: str, limit: int = SHOWN, secrets: tuple[str, ...] = ()) -> str:
    """`text` for a message: one line, `secrets` and what looks like one masked, at most `limit` characters of it.

    Masked before it is cut: half of a secret is one too. `secrets` are also looked for as JSON and URLs write them.
    """
    for secret in secrets:
        for form in {secret, json.dumps(secret)[1:-1], quote(secret, safe="")}:
            text = text.replace(form, MASK)
    looked_at = " ".join(redact(text[:_LOOKED_AT]).split())
    kept = "".join(character for character in looked_at if character.isprintable())
    if len(kept) <= limit and len(text) <= _LOOKED_AT:
        return kept
    return f"{kept[:limit]}... ({len(text)} characters)"


def named(error: BaseException, secrets: tuple[str, ...] = ()) -> str:
    """Class and text of an error, as `shown` shows a text."""
    try:
        text = shown(str(error), secrets=secrets)
    except Exception:  # the class of the error is foreign too: its text may be what fails
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def users_code(what: str, raises: type[RewardError] = RewardError) -> Iterator[None]:
    """Around a call of the user's code: whatever it raises becomes `raises`, which says `what` raised it and where.

    A RewardError of the user's own that says something passes through, and so do a stop and a full device, which has
    remedies of its own.
    """
    with _settings_kept():
        try:
            yield
        except (ScoringStopped, torch.OutOfMemoryError, KeyboardInterrupt, Aborted, GeneratorExit):
            raise
        # whatever the user's code may meet; an exit of its own would end the run as if it were done
        except BaseException as error:
            if isinstance(error, RewardError) and named(error) != type(error).__name__:
                raise
            kind = RewardSampleError if isinstance(error, RewardSampleError) else raises
            raise kind(f"{what} raised {named(error)}{place_of(error)}") from error


@contextmanager
def _settings_kept() -> Iterator[None]:
    """What foreign code changes in the process as a whole is set back: the current directory, where the paths of the
    run start, and torch's default type and recording of gradients."""
    here = None
    with suppress(OSError):  # it may have been removed
        here = os.getcwd()
    dtype, records = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        if here is not None:
            with suppress(OSError):
                os.chdir(here)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(records)


def defined_at(function: Any) -> str:
    """` (file:line)` where a function or method of the user's begins; empty where that is not known."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return "" if code is None else f" ({code.co_filename}:{code.co_firstlineno})"


def place_of(error: BaseException) -> str:
    """Where in the user's code `error` was raised: ` (file:line, in function: the line)` for each call of theirs, the
    outermost first; empty where none is theirs."""
    calls = _users_calls(error)
    if isinstance(error, SyntaxError) and error.filename is not None:
        calls.append((error.filename, error.lineno, None, error.text))
    lines = [
        f"{name}:{number}" + (f", in {function}" if function else "") + (f": {shown(line, 120)}" if line else "")
        for name, number, function, line in calls[-_FRAMES:]
    ]
    if len(lines) < 2:
        return f" ({lines[0]})" if lines else ""
    return "\n" + "\n".join(f"  {line}" for line in lines)


def _users_calls(error: BaseException) -> list[tuple[str, int | None, str | None, str | None]]:
    """The calls outside this package and Python's own that lie beside the first of them, or below: the libraries that
    the user's code calls are left out."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _may_be_users(frame.filename)]
    if not frames:
        return []
    first = Path(frames[0].filename)
    home = first if first.parent.name in _LIBRARIES else first.parent  # a single file among the installed packages
    return [
        (frame.filename, frame.lineno, frame.name, frame.line)
        for frame in frames
        if _lies_in(Path(frame.filename), home)
    ]


def _may_be_users(filename: str) -> bool:
    path = Path(filename)
    if not path.is_file() or path.is_relative_to(_PACKAGE):
        return False
    return not path.is_relative_to(_STANDARD) or not _LIBRARIES.isdisjoint(path.parts)


def _lies_in(path: Path, home: Path) -> bool:
    """Whether `path` is `home` or below it, though not in a virtual environment that lies there."""
    return path.is_relative_to(home) and _LIBRARIES.isdisjoint(path.relative_to(home).parts)
