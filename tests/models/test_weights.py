"""Frozen copies, and weights from a file that may not be what it should be."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from glm_training.models.lora import add_lora, has_lora
from glm_training.models.weights import check_weights, frozen_copy, load_weights


class Net(nn.Module):
    """Two layers and a buffer; `first` is 1, `second` 2, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False)
        nn.init.constant_(self.first.weight, 1.0)
        nn.init.constant_(self.second.weight, 2.0)
        self.register_buffer("offset", torch.tensor([0.5]))

    def forward(self, values):
        return self.second(self.first(values)) + self.offset


def adapted() -> Net:
    """A net with an adapter on `first` that adds 4 / 2 * (1 * 1 + 1 * 1) = 4 to each of its weights."""
    net = Net()
    add_lora(net, ["first"], rank=2, alpha=4)
    layer = net.first
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(1.0)
        layer.lora_B["default"].weight.fill_(1.0)
    return net


def test_a_frozen_copy_has_weights_of_its_own() -> None:
    net = Net()
    copy = frozen_copy(net, torch.float32)
    with torch.no_grad():
        for values in (*net.parameters(), *net.buffers()):
            values.fill_(7.0)
    assert copy(torch.ones(1, 2)).tolist() == [[12.5]]  # 2 * (3 * (1 + 1)) + .5
    assert not any(param.requires_grad for param in copy.parameters())
    assert all(param.requires_grad for param in net.parameters()), "the net goes on being trained"


def test_a_frozen_copy_is_the_base_without_its_adapters() -> None:
    net = adapted()
    assert net(torch.ones(1, 2)).tolist() == [[60.5]]  # 2 * (3 * (5 + 5)) + .5
    copy = frozen_copy(net, torch.float32)
    assert copy(torch.ones(1, 2)).tolist() == [[12.5]]
    assert [name for name, _ in copy.named_parameters()] == ["first.weight", "second.weight"]
    assert type(copy.first) is nn.Linear and not has_lora(copy)
    assert has_lora(net) and net(torch.ones(1, 2)).tolist() == [[60.5]]


def test_a_frozen_copy_has_the_precision_that_was_asked_for() -> None:
    copy = frozen_copy(Net(), torch.bfloat16)
    assert {param.dtype for param in copy.parameters()} == {torch.bfloat16}


def test_loading_sets_the_base_under_adapters_and_leaves_those_alone(tmp_path) -> None:
    saved = {"first.weight": torch.full((3, 2), 3.0), "second.weight": torch.ones(1, 3), "offset": torch.zeros(1)}
    save_file(saved, tmp_path / "w.safetensors")
    net = adapted()
    load_weights(net, tmp_path / "w.safetensors")
    assert net(torch.ones(1, 2)).tolist() == [[42.0]]  # 3 * (7 + 7)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"second.weight": None}, "1 of 3 differ, first second.weight"),
        ({"other": torch.ones(1)}, "1 of 3 differ, first other"),
        ({"first.weight": torch.ones(2, 3), "offset": torch.ones(2)}, "2 of 3 differ, first first.weight"),
    ],
)
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_weights_that_do_not_fit_are_counted_and_the_first_is_named(tmp_path, name, change, told) -> None:
    saved = {key: value for key, value in (Net().state_dict() | change).items() if value is not None}
    (save_file if name == "w.safetensors" else torch.save)(saved, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} do not fit the Net: {told}"):
        check_weights(Net(), tmp_path / name)


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
