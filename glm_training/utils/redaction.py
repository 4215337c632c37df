"""Keeping secrets out of messages, files and trackers: one function for texts, and one for settings."""

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import TracebackType
from typing import Any
from urllib.parse import quote, quote_plus

MASK = "***"
MIN_SECRET_LENGTH = 6  # a shorter value of an environment variable would mask ordinary words

# `token` only as a whole last word: tokens, token_count and tokenizer are everyday words here. `pwd` only after another
# word: DB_PWD is a password, PWD and OLDPWD are where a shell is, which stands in every path of a message.
_WORDS = r"secret|password|passwd|passphrase|(?<=[_.-])pwd|api[ _-]?key|access[_-]?key|private[_-]?key|credential"
_WORDS += r"|(?:account|auth|signing)[_-]?key"
# Bounded: a text of a megabyte is masked in seconds, whatever it repeats.
_PART = r"[\w.-]{0,64}"
_SECRET_KEY = (
    rf"{_PART}(?:{_WORDS}){_PART}|(?:{_PART}(?:[_.-]|access|refresh|auth|bearer))?token|authorization|(?:set-)?cookie"
)
_KEY = re.compile(rf"(?:{_SECRET_KEY})", re.IGNORECASE)
_ASSIGNMENT = re.compile(
    rf"""(?P<key>(?<![\w.-])["']?(?P<name>{_SECRET_KEY})["']?\s*(?P<sign>[:=]|%3D|%3A)\s*)
        (?P<value>(?:(?:Bearer|Basic|Token|Digest)\s+)?(?:"[^"\n]*"|'[^'\n]*'|[^\s,;}}\]"'`&]+))""",
    re.IGNORECASE | re.VERBOSE,
)
# An option of a command line, whose value is the next word.
_OPTION = re.compile(rf"(?P<start>(?<![\w-])--?(?:{_SECRET_KEY})\s+)(?P<value>[^\s\"'`-][^\s\"'`]*)", re.IGNORECASE)
_EMPTY = {"null", "none", "~", "true", "false", '""', "''", "bearer", "basic"}

# The login ends at the last @ before the path.
_URL_LOGIN = re.compile(r"""(?P<start>\b[a-z][a-z0-9+.-]{0,20}://)[^\s/?#"'<>`]+@""", re.IGNORECASE)
# An address inside another's query, where :// and @ are written so.
_QUOTED_LOGIN = re.compile(r"(?P<start>[a-z]%3A%2F%2F)(?:(?!%2F|%40)[\w.~%-]){1,200}%40", re.IGNORECASE)
_QUERY = re.compile(
    r"""(?P<start>[?&\#](?:[\w.%-]{0,64}(?:key|sig|signature|token|secret|pass|passwd|password|pwd|pw|auth|credential|jwt|session)
        |code)=)[^\s&\#"'<>]+""",
    re.IGNORECASE | re.VERBOSE,
)
# After `Bearer` in prose come words; a token has digits, several capitals inside, padding or twenty letters.
_HEADER = re.compile(
    r"\b(?P<kind>[Bb]earer|BEARER|Basic)(?::\s*|\s+)(?=[\w.~+/-]*(?:\d|=|[\w.~+/-]{20}|[a-z][A-Z]\w*[a-z][A-Z]))[\w.~+/-]{6,}=*"
)
_SHAPES = re.compile(
    r"""(?<![A-Za-z0-9])(?:
        hf_[A-Za-z0-9]{16,} | (?:sk|rk|pk)[-_](?=[\w-]*(?:\d|[A-Za-z]{20}))[\w-]{16,} | (?:AKIA|ASIA)[A-Z0-9]{16}
      | gh[pousr]_[A-Za-z0-9]{16,} | github_pat_\w{16,} | glpat-[\w-]{16,} | xox[abeprs]-[\w-]{10,}
      | (?:gsk|tgp_v\d|dop_v\d|whsec)_(?=\w*\d)[A-Za-z0-9]{24,} | nvapi-[\w-]{24,} | pypi-[\w-]{40,}
      | SG\.[\w-]{16,}\.[\w-]{16,}
      | AIza[\w-]{30,} | ya29\.[\w-]{16,} | r8_[A-Za-z0-9]{20,} | npm_[A-Za-z0-9]{20,} | wandb_v\d_\w{16,}
      | eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?
    )""",
    re.VERBOSE,
)
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
# A key of W&B's older kind is 40 hexadecimal digits, as is a commit: it is one where wandb is spoken of.
_WANDB = re.compile(r"(?P<start>wandb[\w.-]*(?:\s+login)?[\s:='\"]+(?:--key[\s=]+)?)[0-9a-f]{40}\b", re.IGNORECASE)


def is_secret_key(key: str) -> bool:
    """Whether a setting or environment variable of this name holds a secret: ``HF_TOKEN``, ``wandb_api_key``."""
    return _KEY.fullmatch(key) is not None


def redact(text: str) -> str:
    """``text`` with secrets masked.

    Masked are values of environment variables whose names say that they are secret, also as JSON and URLs write them;
    values of ``key=value`` and ``key: value`` pairs with such names; logins in addresses, and what their queries call a
    key, token or signature; tokens of headers; private keys; and keys that are known by their shape (Hugging Face,
    OpenAI, AWS, GitHub, Weights & Biases and others). Prose stays: `the secret: a garden`, `a password: "OPEN"`.
    """
    for value in _secrets_of(tuple(os.environ.items())):
        text = text.replace(value, MASK)
    text = _PEM.sub(MASK, text)
    text = _URL_LOGIN.sub(rf"\g<start>{MASK}@", text)
    text = _QUOTED_LOGIN.sub(rf"\g<start>{MASK}%40", text)
    text = _QUERY.sub(rf"\g<start>{MASK}", text)
    text = _ASSIGNMENT.sub(_mask_value, text)
    text = _OPTION.sub(lambda match: match["start"] + MASK if _looks_secret(match["value"]) else match[0], text)
    text = _HEADER.sub(rf"\g<kind> {MASK}", text)
    text = _WANDB.sub(rf"\g<start>{MASK}", text)
    return _SHAPES.sub(MASK, text)


@lru_cache(maxsize=1)  # every line that is told comes by here, and the environment hardly ever changes
def _secrets_of(environment: tuple[tuple[str, str], ...]) -> list[str]:
    """Its secret values in all forms, the longest first."""
    values = [value for name, value in environment if is_secret_key(name) and len(value) >= MIN_SECRET_LENGTH]
    forms: tuple[Callable[[str], str], ...] = (
        str, quote, quote_plus, lambda text: quote(text, safe=""), lambda text: json.dumps(text)[1:-1],
    )  # fmt: skip
    return sorted({form(value) for value in values for form in forms}, key=len, reverse=True)


def _mask_value(match: re.Match[str]) -> str:
    value, name = match["value"], match["name"]
    if value.lower() in _EMPTY or not value.strip("\"' "):
        return match[0]
    bare = value.strip("\"'")
    # In prose a plain word may stand before a colon; what follows is a secret if it looks like one.
    prose = match["sign"] == ":" and match["key"][0] not in "\"'" and name in (name.lower(), name.upper(), name.title())
    if prose and re.fullmatch(r"[A-Za-z ]+", name) and name.lower() != "authorization" and not _looks_secret(bare):
        return match[0]
    mark = value[0] if value[0] in "\"'" else ""
    return f"{match['key']}{mark}{MASK}{mark}"


def _looks_secret(text: str) -> bool:
    """Whether a text is neither words nor a number: at least six characters, letters and digits in one."""
    kinds = (r"\d", r"[^\W\d]")
    return len(text) >= MIN_SECRET_LENGTH and not re.search(r"\s", text) and all(re.search(k, text) for k in kinds)


def same_but_for_secrets(one: Any, other: Any) -> bool:
    """Whether two settings are equal where neither has a secret masked: what is masked depends on the environment."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_but_for_secrets(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_but_for_secrets, one, other))
    if not (isinstance(one, str) and isinstance(other, str)):
        return bool(one == other)
    return one == other or _covers(one, other) or _covers(other, one)


def _covers(masked: str, text: str) -> bool:
    pattern = ".*".join(map(re.escape, masked.split(MASK)))
    return MASK in masked and re.fullmatch(pattern, text, re.DOTALL) is not None


class RedactingFormatter(logging.Formatter):
    """A log record as text, secrets masked."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def mask_logs_and_tracebacks() -> None:
    """From here on this process also masks what it logs before a run has a log, and the traceback that it ends with."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(RedactingFormatter())

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))

    sys.excepthook = hook


def _may_be_secret(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""


def redact_values(value: Any) -> Any:
    """A copy of nested dicts and lists with secrets masked: texts and numbers under keys that say so, and what texts
    hold. A section that is named like a secret is still a section."""
    if isinstance(value, Mapping):
        return {
            key: MASK if is_secret_key(str(key)) and _may_be_secret(item) else redact_values(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact_values(item) for item in value]
    return redact(value) if isinstance(value, str) else value
