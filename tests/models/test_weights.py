"""Weights from a file that is not what it should be."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from glm_training.models.weights import load_weights


@pytest.mark.parametrize("name", ["start.bin", "start.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html>not found</html>" * 9]
)
def test_damaged_files_are_named(tmp_path, name, content) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is no file of weights"):
        load_weights(nn.Linear(2, 2), path)


def test_a_torn_download_is_named(tmp_path) -> None:
    path = tmp_path / "start.bin"
    torch.save(nn.Linear(64, 64).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"start\.bin is no file of weights"):
        load_weights(nn.Linear(64, 64), path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(ValueError, match="no state dict"):
        load_weights(nn.Linear(2, 2), path)


def test_both_formats_set_the_weights(tmp_path) -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save(source.state_dict(), tmp_path / "a.bin")
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    for name in ("a.bin", "a.safetensors"):
        nn.init.zeros_(target.weight)
        load_weights(target, tmp_path / name)
        assert torch.equal(target.weight, source.weight)


@pytest.mark.parametrize("outer", ["state_dict", "model"])
def test_a_state_dict_may_stand_under_a_name(tmp_path, outer) -> None:
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save({outer: source.state_dict(), "step": 3}, tmp_path / "start.pth")
    load_weights(target, tmp_path / "start.pth")
    assert torch.equal(target.weight, source.weight) and torch.equal(target.bias, source.bias)
