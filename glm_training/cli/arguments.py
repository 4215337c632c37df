"""Arguments that need more than a type: numbers with a range, and words that are configuration files."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from glm_training.utils.redaction import redact
from glm_training.utils.writable import is_too_long

_UNKNOWN = "unrecognized arguments: "
"""How argparse begins."""
_WRONG_COMMAND = re.compile(r"argument COMMAND: invalid choice: '([^']*)'")


class Parser(argparse.ArgumentParser):
    """Tells errors in two lines, with the nearest option in the place of all that there are, and repeats no secret of
    the command line in them; so do the parsers of its commands."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix(_UNKNOWN).split() if message.startswith(_UNKNOWN) else []
        if "required" in message and (unknown := self._misspelt()):  # argparse would tell only what they leave missing
            message = f"{_UNKNOWN}{' '.join(unknown)}; {message}"
        options = [get_close_matches(word.partition("=")[0], self._option_string_actions, 1) for word in unknown]
        near = "".join(f". Did you mean {option[0]}?" for option in options[:1] if option)
        if unknown and any(action.dest == "overrides" for action in self._actions):
            near = near or _as_key(unknown[0])
        wrong = _WRONG_COMMAND.match(message)
        if wrong is not None:
            close = get_close_matches(wrong[1], re.findall(r"'(\w+)'", message[wrong.end() :]), 1)
            near = f". Did you mean {close[0]}?" if close else ""
        self.exit(2, f"{self.prog}: error: {redact(message)}{near}\n{self.prog} --help lists what there is\n")

    def _misspelt(self) -> list[str]:
        """Options of the command line that there are none of; argparse takes those that are cut short."""
        names = (word.partition("=")[0] for word in self._given if word.startswith("--") and word != "--")
        return [name for name in names if not any(option.startswith(name) for option in self._option_string_actions)]


def _as_key(option: str) -> str:
    """What to write for a key of the configuration that was written as an option."""
    from glm_training.config import iter_keys

    name = option.partition("=")[0].lstrip("-").replace("-", "_")
    keys = list(iter_keys())
    leaves = [key for key in keys if key == name or key.endswith(f".{name}")]
    example = " or ".join(f"{leaf}=VALUE" for leaf in leaves[:3]) or "training.max_steps=100"
    return f". A key of the configuration has no dashes before it: {example}"


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A type for argparse: a whole number in [`low`, `high`]."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: a whole number from {low} to {high}")
        return value

    return read


def number(low: float, high: float) -> Callable[[str], float]:
    """A type for argparse: a number in [`low`, `high`]."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: a number from {low:g} to {high:g}")
        return value

    return read


def text(given: str) -> str:
    """A type for argparse: a text that is not blank."""
    if not given.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return given


def place(given: str) -> str:
    """A type for argparse: a path, or a name that stands in the place of one."""
    if is_too_long(text(given)):
        raise argparse.ArgumentTypeError("no file system takes a name of over 255 bytes, or a path of over 4095")
    return given


def resuming(words: Sequence[str]) -> list[str]:
    """The words of a command line with `--resume key=value` as `--resume latest key=value`, and a YAML file behind it
    likewise: neither is a checkpoint, and each counts where it stands among the others."""
    found: list[str] = []
    for word in words:
        option, _, value = word.partition("=")
        if _is_resume(option) and _is_no_checkpoint(value):
            found += [option, "latest", value]
        else:
            found += ["latest", word] if found and _is_resume(found[-1]) and _is_no_checkpoint(word) else [word]
    return found


def _is_resume(word: str) -> bool:
    return len(word) > len("--") and "--resume".startswith(word)  # argparse takes an option's beginning for it


def _is_no_checkpoint(word: str) -> bool:
    return _is_yaml(word) if "=" not in word else not (word.startswith("-") or Path(word).exists())


def gather_files(parser: argparse.ArgumentParser, arguments: argparse.Namespace, words: Sequence[str]) -> None:
    """Moves words that are YAML files from the overrides to the files of the configuration, in the order in which they
    stand in `words`, the command line; without any file the parser ends the program."""
    files = [word for word in arguments.overrides if _is_file(word)]

    def stands(file: str) -> int:
        return next(at for at, word in enumerate(words) if file in (word, word.partition("=")[2]))

    arguments.config = sorted([*(arguments.config or []), *files], key=stands)
    arguments.overrides = [word for word in arguments.overrides if word not in files]
    if not arguments.config:
        lost = next((word for word in arguments.overrides if "=" not in word), None)
        if lost is not None and Path(lost).is_dir():
            parser.error(
                f"`{lost}` is a folder, no YAML file; one of pictures is named in it: `data: {{images: {lost}}}`"
            )
        found = "" if lost is None else f"`{lost}` is no file; "
        parser.error(f"no configuration: {found}name its YAML file, as in `--config configs/quickstart.yaml`")


def _is_file(word: str) -> bool:
    """Overrides have an equals sign; a path with one is told by its suffix, if it is there."""
    return (_is_yaml(word) or Path(word).is_file()) if "=" not in word else (_is_yaml(word) and Path(word).is_file())


def _is_yaml(word: str) -> bool:
    return word.lower().endswith((".yaml", ".yml"))
