"""safetensors files of our own: what the stock reader makes of them, their bytes, and their modes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from glm_training.utils.tensor_file import share_files, write_tensor_file

TENSORS = {"narrow": torch.arange(3, dtype=torch.uint8), "wide": torch.arange(6.0).view(2, 3).T}
METADATA = {name: f"of {name}" for name in "edcbafg"}


def header(path: Path) -> dict[str, object]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_the_stock_reader_finds_tensors_and_metadata(tmp_path) -> None:
    write_tensor_file(tmp_path / "a.safetensors", TENSORS, METADATA)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in found)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == METADATA


def test_metadata_have_one_order(tmp_path) -> None:
    """The library writes seven keys in one of 5040 orders."""
    write_tensor_file(tmp_path / "a.safetensors", TENSORS, METADATA)
    assert list(header(tmp_path / "a.safetensors")["__metadata__"]) == list("abcdefg")  # type: ignore[call-overload]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, mask) -> None:
    before = os.umask(mask)
    try:
        (tmp_path / "out/below").mkdir(parents=True)
        write_tensor_file(tmp_path / "out/ours.safetensors", TENSORS, METADATA)
        save_file({"a": torch.zeros(1)}, tmp_path / "out/below/theirs.safetensors")
        (tmp_path / "out/private.txt").touch(mode=0o600)
        share_files(tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*.*")}
    assert modes == {"ours.safetensors": 0o666 & ~mask, "theirs.safetensors": 0o666 & ~mask, "private.txt": 0o600}
