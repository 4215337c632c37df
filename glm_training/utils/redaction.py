"""Keeping secrets out of files and trackers."""

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
MIN_SECRET_LENGTH = 6  # a shorter value of an environment variable would mask ordinary words

# `token` only as a whole last word: tokens, token_count and tokenizer are everyday words here.
_SECRET_KEY = r"[\w.-]*(?:secret|password|passwd|api[_-]?key|credential)[\w.-]*|(?:[\w.-]*[_.-])?token"
_KEY = re.compile(rf"(?:{_SECRET_KEY})", re.IGNORECASE)
_ASSIGNMENT = re.compile(
    rf"""(?P<key>(?<![\w.-])["']?(?:{_SECRET_KEY})["']?\s*[:=]\s*)(?P<value>"[^"\n]*"|'[^'\n]*'|[^\s,;}}\]"']+)""",
    re.IGNORECASE,
)
_URL_LOGIN = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)[^\s/@:]+:[^\s/@]+@", re.IGNORECASE)
_EMPTY = {"null", "none", "~", "true", "false", '""', "''"}


def is_secret_key(key: str) -> bool:
    """Whether a setting or environment variable of this name holds a secret: ``HF_TOKEN``, ``wandb_api_key``."""
    return _KEY.fullmatch(key) is not None


def redact(text: str) -> str:
    """``text`` with secrets masked: values of environment variables and of ``key: value`` or ``key=value`` pairs whose
    names say so, and logins in addresses."""
    values = {value for name, value in os.environ.items() if is_secret_key(name) and len(value) >= MIN_SECRET_LENGTH}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, MASK)
    text = _ASSIGNMENT.sub(_mask_value, text)
    return _URL_LOGIN.sub(rf"\g<scheme>{MASK}@", text)


def _mask_value(match: re.Match[str]) -> str:
    value = match["value"]
    if value.lower() in _EMPTY:
        return match[0]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{match['key']}{quote}{MASK}{quote}"


def redact_values(value: Any) -> Any:
    """A copy of nested dicts and lists with secrets masked, by key and within texts."""
    if isinstance(value, Mapping):
        return {
            key: MASK if is_secret_key(str(key)) and item not in (None, "") else redact_values(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact_values(item) for item in value]
    return redact(value) if isinstance(value, str) else value
