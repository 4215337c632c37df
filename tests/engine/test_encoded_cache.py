"""Encoded tensors on disk: found by content, whole or not at all, never an obscure crash."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from glm_training.engine.encoding.cache import EncodedCache, content_key, weights_fingerprint
from glm_training.engine.errors import TrainingError
from glm_training.models.sdxl.tiny import build_tiny
from glm_training.utils.failures import begin_telling
from tests.faulty_system import refusing

KEY = content_key("image", image="abc", height=64)
TENSORS = {"latents": torch.arange(6.0).view(2, 3), "size": torch.tensor([3, 4]), "half": torch.ones(2).bfloat16()}


def file_of(folder: Path) -> Path:
    (path,) = folder.rglob("*.safetensors")
    return path


def test_what_is_put_is_found_again_by_another_process(tmp_path) -> None:
    EncodedCache(tmp_path / "a/b").put(KEY, TENSORS)
    found = EncodedCache(tmp_path / "a/b").get(KEY)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in TENSORS.items())
    assert EncodedCache(tmp_path / "a/b").get(content_key("image", image="abd", height=64)) is None
    assert [path.name for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


def test_a_key_is_its_kind_and_its_facts() -> None:
    assert KEY == content_key("image", height=64, image="abc") and len(KEY) == 64
    assert len({KEY, content_key("text", image="abc", height=64), content_key("image", image="abc", height=65)}) == 3


def damage_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a flipped bit": damage_bit,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "no safetensors": lambda path: path.write_bytes(b"\xff" * 4096),
    "another's tensors": lambda path: save_file({"weights": torch.ones(3)}, path),
    "another key's file": lambda path: path.write_bytes(other_file().read_bytes()),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def other_file() -> Path:
    folder = Path(os.environ["OTHER_CACHE"])
    EncodedCache(folder).put(content_key("image", image="other"), TENSORS)
    return file_of(folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_file_is_made_anew(tmp_path, monkeypatch, damage) -> None:
    monkeypatch.setenv("OTHER_CACHE", str(tmp_path / "other"))
    folder = tmp_path / "cache"
    EncodedCache(folder).put(KEY, TENSORS)
    DAMAGES[damage](file_of(folder))
    cache = EncodedCache(folder)
    assert cache.get(KEY) is None
    if damage != "a folder":
        cache.put(KEY, TENSORS)
        assert torch.equal(EncodedCache(folder).get(KEY)["latents"], TENSORS["latents"])


def test_entries_and_fingerprints_follow_every_value(tmp_path) -> None:
    cache, mine = EncodedCache(tmp_path), torch.zeros(3, 2)
    cache.put(KEY, {"x": mine})
    mine.fill_(7)
    assert not cache.get(KEY)["x"].any(), "what is done to a tensor afterwards is not in the cache"
    layer = torch.nn.Linear(2, 3)
    before = weights_fingerprint([layer])
    assert before == weights_fingerprint([layer])
    with torch.no_grad():
        layer.weight[-1, -1] += 1
    assert before != weights_fingerprint([layer])


def test_memory_holds_the_recently_used(tmp_path) -> None:
    cache = EncodedCache(tmp_path, memory_bytes=100)
    keys = [content_key("image", image=str(i)) for i in range(3)]
    for key in keys[:2]:
        cache.put(key, {"x": torch.zeros(10)})
    cache.get(keys[0])
    cache.put(keys[2], {"x": torch.zeros(10)})
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    assert [cache.lists(key) for key in keys] == [True, False, True]


def test_a_disk_that_takes_no_more_is_explained(tmp_path, monkeypatch) -> None:
    cache = EncodedCache(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(TrainingError, match="No space left on device.*cache.dir.*cache.enabled: false"):
        cache.put(KEY, TENSORS)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cache.dir: .* cannot be made"):
        EncodedCache(tmp_path / "file/cache")


def test_what_goes_missing_in_training_is_used_also_where_the_disk_takes_no_more(tmp_path, caplog) -> None:
    begin_telling()
    cache = EncodedCache(tmp_path / "cache")
    with refusing(tmp_path / "cache"):
        for value in (1.0, 2.0):
            kept = cache.replace(content_key("image", n=value), {"latents": torch.full((2,), value)})
            assert torch.equal(kept["latents"], torch.full((2,), value))
    assert not cache.lists(content_key("image", n=1.0))
    assert caplog.text.count("writing to cache.dir failed") == 1
    cache.replace(content_key("image", n=1.0), {"latents": torch.ones(2)})
    assert EncodedCache(tmp_path / "cache").get(content_key("image", n=1.0)) is not None


def test_what_killed_runs_left_is_swept_after_a_day(tmp_path) -> None:
    EncodedCache(tmp_path).put(KEY, TENSORS)
    entry = file_of(tmp_path)
    old, new = (entry.with_name(f".partial-{name}") for name in ("old", "new"))
    for path, hours in ((old, 25), (new, 23), (entry, 25)):
        path.touch()
        os.utime(path, (time.time() - hours * 3600,) * 2)
    cache = EncodedCache(tmp_path)
    assert not old.exists() and new.exists(), "another run may be writing the new one"
    assert cache.get(KEY) is not None


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_are_for_those_that_the_umask_lets_in(tmp_path, mask) -> None:
    before = os.umask(mask)
    try:
        EncodedCache(tmp_path).put(KEY, TENSORS)
    finally:
        os.umask(before)
    assert file_of(tmp_path).stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_fingerprint_follows_every_weight_and_its_dtype() -> None:
    first, again = build_tiny().vae, build_tiny().vae
    before = weights_fingerprint([first], "1")
    assert before == weights_fingerprint([again], "1") != weights_fingerprint([again], "2")
    with torch.no_grad():
        list(again.parameters())[-1].view(-1)[0] += 1e-3
    assert weights_fingerprint([again], "1") != before
    assert weights_fingerprint([first.bfloat16()], "1") != before
