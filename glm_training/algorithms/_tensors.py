"""Argument checks shared by the algorithms.

Shape checks read metadata and cost nothing. Value checks (finite, in range) need the data: each public function gathers
all of its value checks and evaluates them together, so a call waits for the device once, not once per argument, and
`check_finite=False` on the functions of the training loop skips that one wait.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class NotFiniteError(ValueError, FloatingPointError):
    """An input holds NaN or infinite values: not the caller's mistake, as a rule, but what training came to."""


class ValueCheck(NamedTuple):
    """`ok` is a 0-dim bool tensor that stays on its device until `demand` reads it; `complaint` says what is wrong."""

    ok: Tensor
    complaint: str
    error: type[ValueError] = ValueError


def finite(name: str, tensor: Tensor) -> ValueCheck:
    """Every element of `tensor` is a number: no NaN, no infinity."""
    return ValueCheck(torch.isfinite(tensor.detach()).all(), f"{name} holds NaN or infinite values", NotFiniteError)


def demand(*checks: ValueCheck) -> None:
    """Raise the first failed check's error with the complaints of all. One device synchronisation in any case."""
    if bool(torch.stack([check.ok for check in checks]).all()):
        return
    failed = [check for check in checks if not bool(check.ok)]
    raise failed[0].error("; ".join(check.complaint for check in failed))


def require_ndim(name: str, tensor: Tensor, ndim: int, layout: str) -> None:
    """`tensor` has `ndim` dimensions, none of them empty; `layout` ("[P, G]") tells the caller what was expected."""
    if tensor.ndim != ndim or 0 in tensor.shape:
        raise ValueError(f"{name} must be a non-empty tensor of shape {layout}, got {list(tensor.shape)}")


def require_batched(name: str, tensor: Tensor) -> None:
    """`tensor` is [B, *dims] with at least one latent dimension and no empty one."""
    if tensor.ndim < 2 or 0 in tensor.shape:
        raise ValueError(f"{name} must be a non-empty tensor of shape [B, *dims], got {list(tensor.shape)}")


def require_same_shape(name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    """`tensor` has exactly the shape of `reference`; nothing is broadcast."""
    if tensor.shape != reference.shape:
        raise ValueError(
            f"{name} must have the shape of {reference_name} {list(reference.shape)}, got {list(tensor.shape)}"
        )


def require_positive(name: str, value: float) -> None:
    """`value` is a finite number above zero."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {value}")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def per_sample(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """`value` as fp32 [B, 1, ..., 1] on the device of `like` [B, *dims].

    Takes a number, a 0-dim tensor, or a tensor [B]. Numbers and 0-dim CPU tensors reach the device as a fill, without
    a copy that would make the host wait.
    """
    batch = like.shape[0]
    if isinstance(value, Tensor) and value.ndim == 0 and value.device.type == "cpu":
        value = float(value)
    if not isinstance(value, Tensor):
        flat = torch.full((batch,), float(value), device=like.device, dtype=torch.float32)
    elif value.ndim == 0:
        flat = value.to(like.device, torch.float32).expand(batch)
    elif value.shape == (batch,):
        flat = value.to(like.device, torch.float32)
    else:
        raise ValueError(f"{name} must be a number or a tensor of shape [] or [{batch}], got {list(value.shape)}")
    return flat.reshape(batch, *([1] * (like.ndim - 1)))


def mean_per_sample(tensor: Tensor) -> Tensor:
    """Mean over all dimensions but the first: [B, *dims] -> [B]."""
    return tensor.flatten(1).mean(dim=1)
