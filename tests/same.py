"""Trees of tensors: bit for bit, and flat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def assert_identical(left: Any, right: Any, path: str = "") -> None:
    """Two trees of tensors and values are equal; the failure names the place."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left.nan_to_num(7.0), right.nan_to_num(7.0)), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_identical(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), path
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_identical(a, b, f"{path}/{i}")
    else:
        assert left == right, path


def flat(tree: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a tree, whole where it lies in shards, by its place below `path`."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flat(value, f"{path}.{key}")
    elif isinstance(tree, torch.Tensor):
        yield path, tree
    elif hasattr(tree, "whole"):
        yield path, tree.whole()
