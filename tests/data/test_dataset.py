"""Batches: the right pixels, decoded once, flipped by counter, the same with and without threads."""

from pathlib import Path

import pytest
import torch

from glm_training.data import DataError, I2IDataset, T2IDataset, describe_drift, load_image, may_flip
from glm_training.data import dataset as dataset_module
from glm_training.data.pictures.images import CroppedImage

SIZE = {"height": 32, "width": 64}


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the files decoded so far."""
    names: list[str] = []
    original = dataset_module.load_fitted

    def counted(path: Path, height: int, width: int) -> CroppedImage:
        names.append(f"{path.parent.name}/{path.name}")
        return original(path, height, width)

    monkeypatch.setattr(dataset_module, "load_fitted", counted)
    return names


def test_i2i_batch(files) -> None:
    batch = I2IDataset(files.load("i2i"), **SIZE).batch([2, 0])
    assert batch.indices == [2, 0] and batch.prompts == ["a thing 2", "a thing 0"]
    assert batch.targets is not None and batch.sources is not None
    assert batch.targets.dtype == torch.float32 and batch.targets.shape == (2, 3, 32, 64)
    for row, index in enumerate([2, 0]):
        assert torch.equal(batch.targets[row], load_image(files.targets / f"{index}.png", 32, 64))
        assert torch.equal(batch.sources[row], load_image(files.sources / f"{index}.png", 32, 64))


def test_original_sizes_and_crops_are_those_of_the_targets(files) -> None:
    """40 x 36 pixels cover 64 x 32 as 64 x 57.6: 12.8 rows are cut off at the top, and as many at the bottom."""
    for augmentation in (False, True):
        batch = T2IDataset(files.load(), **SIZE, augmentation=augmentation).batch([2, 0, 1], epoch=3)
        assert batch.original_sizes is not None and batch.crops is not None
        assert batch.original_sizes.tolist() == [[36, 40]] * 3 and batch.crops.tolist() == [[13, 0]] * 3
        assert batch.original_sizes.dtype == batch.crops.dtype == torch.int64
    moved = batch.to("cpu")
    assert moved.crops is batch.crops and moved.original_sizes is batch.original_sizes
    without = T2IDataset(files.load(target_images_dir=None, require_targets=False), **SIZE).batch([1])
    assert without.original_sizes is None and without.crops is None


def test_the_size_of_an_item(files) -> None:
    dataset = T2IDataset(files.load(), **SIZE)
    assert [dataset.size_of(index) for index in range(4)] == [(32, 64)] * 4
    with pytest.raises(IndexError, match="outside a dataset of 4"):
        dataset.size_of(4)


def test_t2i_batch_with_and_without_targets(files) -> None:
    with_targets = T2IDataset(files.load(), **SIZE)
    without = T2IDataset(files.load(target_images_dir=None, require_targets=False), **SIZE)
    assert with_targets.has_targets and with_targets.batch([1]).targets is not None
    assert not without.has_targets and without.batch([1]).targets is None
    assert with_targets.batch([1]).sources is None and len(without) == 4


def test_the_kinds_refuse_each_others_examples(files) -> None:
    with pytest.raises(ValueError, match="no example may have a source"):
        T2IDataset(files.load("i2i"), **SIZE)
    with pytest.raises(ValueError, match="every example needs a source"):
        I2IDataset(files.load("t2i"), **SIZE)
    mixed = files.load()[:2] + files.load(target_images_dir=None, require_targets=False)[2:]
    with pytest.raises(ValueError, match="target image, but 2 of 4"):
        T2IDataset(mixed, **SIZE)
    with pytest.raises(ValueError, match="at least one example"):
        T2IDataset([], **SIZE)


def test_positions_out_of_place(files) -> None:
    dataset = T2IDataset(files.load(), **SIZE)
    for position in (-1, 4):
        with pytest.raises(IndexError, match="outside a dataset of 4"):
            dataset.batch([position])
    with pytest.raises(ValueError, match="at least one position"):
        dataset.batch([])
    with pytest.raises(ValueError, match="2 epochs were given for 1"):
        dataset.batch([0], epoch=[0, 1])


def test_positions_skip_the_quarantined(files) -> None:
    (files.targets / "1.png").write_bytes(b"no")
    dataset = T2IDataset(files.load(max_bad_fraction=0.5), **SIZE)
    assert dataset.batch([1]).prompts == ["a thing 2"] and dataset.examples[1].index == 2


def test_images_are_decoded_once_when_they_fit(files, decoded) -> None:
    dataset = I2IDataset(files.load("i2i"), **SIZE)
    first = dataset.batch([0, 1, 1])
    assert sorted(decoded) == [f"{role}_images/{index}.png" for role in ("source", "target") for index in (0, 1)]
    assert torch.equal(dataset.batch([0, 1, 1]).targets, first.targets) and len(decoded) == 4


def test_nothing_is_kept_when_the_whole_does_not_fit(files, decoded) -> None:
    needed = 4 * 3 * 32 * 64
    for cache_bytes, reads in ((needed, 1), (needed - 1, 2)):
        decoded.clear()
        dataset = T2IDataset(files.load(), **SIZE, cache_bytes=cache_bytes)
        assert torch.equal(dataset.batch([0]).targets, dataset.batch([0]).targets)
        assert len(decoded) == reads


def test_a_caller_cannot_spoil_the_kept_images(files) -> None:
    dataset = T2IDataset(files.load(), **SIZE)
    first = dataset.batch([0]).targets
    kept = first.clone()
    first.zero_()
    assert torch.equal(dataset.batch([0]).targets, kept)


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_prefetch_decodes_ahead_and_changes_nothing(files, decoded, cache_bytes: int) -> None:
    expected = I2IDataset(files.load("i2i"), **SIZE).batch([3, 1, 3])
    decoded.clear()
    with I2IDataset(files.load("i2i"), **SIZE, num_workers=2, cache_bytes=cache_bytes) as dataset:
        dataset.prefetch([3, 1])
        dataset.prefetch([3, 1])
        batch = dataset.batch([3, 1, 3])
        assert len(decoded) == 4
        assert torch.equal(batch.targets, expected.targets) and torch.equal(batch.sources, expected.sources)


def test_prefetched_images_nobody_asks_for_are_let_go(files) -> None:
    with T2IDataset(files.load(), **SIZE, num_workers=1, cache_bytes=0) as dataset:
        for position in (0, 1, 2):
            dataset.prefetch([position])
        assert [image.path.name for image in dataset._pending] == ["2.png"]


def test_without_threads_prefetch_does_nothing(files, decoded) -> None:
    T2IDataset(files.load(), **SIZE).prefetch([0])
    assert decoded == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_lost_after_the_scan_is_an_error(files, num_workers: int) -> None:
    with T2IDataset(files.load(), **SIZE, num_workers=num_workers) as dataset:
        (files.targets / "2.png").unlink()
        with pytest.raises(DataError, match="2.png"):
            dataset.batch([2])


def test_pin_memory_needs_cuda(files) -> None:
    batch = T2IDataset(files.load(), **SIZE, pin_memory=True).batch([0])
    assert batch.targets is not None and batch.targets.is_pinned() == torch.cuda.is_available()


def test_to_moves_the_images(files) -> None:
    batch = T2IDataset(files.load(), **SIZE).batch([1]).to("meta")
    assert batch.targets.device.type == "meta" and batch.sources is None and batch.prompts == ["a thing 1"]


def flips(dataset, epoch) -> list[bool]:
    plain = I2IDataset(dataset.examples, **SIZE).batch([0, 1, 2, 3])
    batch = dataset.batch([0, 1, 2, 3], epoch=epoch)
    result = []
    for row in range(4):
        flipped = torch.equal(batch.targets[row], plain.targets[row].flip(-1))
        assert flipped != torch.equal(batch.targets[row], plain.targets[row])
        assert flipped == torch.equal(batch.sources[row], plain.sources[row].flip(-1))
        result.append(flipped)
    return result


def test_flips_are_a_function_of_seed_epoch_and_index(files) -> None:
    examples = files.load("i2i")
    dataset = I2IDataset(examples, **SIZE, augmentation=True, seed=3)
    by_epoch = [flips(dataset, epoch) for epoch in range(16)]
    assert by_epoch == [flips(I2IDataset(examples, **SIZE, augmentation=True, seed=3), epoch) for epoch in range(16)]
    assert by_epoch != [flips(I2IDataset(examples, **SIZE, augmentation=True, seed=4), epoch) for epoch in range(16)]
    assert len({tuple(row) for row in by_epoch}) > 4
    assert 16 < sum(map(sum, by_epoch)) < 48
    assert flips(dataset, [5, 6, 7, 8]) == [by_epoch[5 + row][row] for row in range(4)]


def test_flips_are_off_by_default_and_spare_prompts_that_forbid_them(files) -> None:
    assert not any(flips(I2IDataset(files.load("i2i"), **SIZE), epoch)[0] for epoch in range(16))
    files.prompts.write_text('a sign "OPEN"\ntwo\nthree\nfour\n')
    dataset = I2IDataset(files.load("i2i"), **SIZE, augmentation=True)
    rows = [flips(dataset, epoch) for epoch in range(16)]
    assert not any(row[0] for row in rows) and any(row[1] for row in rows)


@pytest.mark.parametrize(
    ("prompt", "allowed"),
    [
        ("a red cube", True),
        ("a bright copyright symbol, upright", True),
        ("the dog's bone", True),
        ('a sign "OPEN"', False),
        ("a sign “OPEN”", False),
        ("a sign 'OPEN'", False),
        ("写着「你好」的牌子", False),
        ("a cube LEFT of a ball", False),
        ("the rightmost ball", False),
        ("left-handed", False),
        ("turning counterclockwise", False),
        ("左边的猫", False),
    ],
)
def test_may_flip(prompt: str, allowed: bool) -> None:
    assert may_flip(prompt) is allowed


def test_fingerprint_ignores_names_and_sees_every_change(files) -> None:
    def fingerprint() -> str:
        return I2IDataset(files.load("i2i"), **SIZE).fingerprint()

    original = fingerprint()
    assert len(original) == 64 and fingerprint() == original
    moved = files.root.with_name("moved")
    files.root.rename(moved)
    files.root = moved
    assert fingerprint() == original
    seen = {original}
    files.prompts.write_text("a thing 0\na thing 1\na thing 3\na thing 2\n")
    seen.add(fingerprint())
    data = (files.targets / "0.png").read_bytes()
    (files.targets / "0.png").write_bytes(data + b"\0")
    seen.add(fingerprint())
    (files.sources / "0.png").write_bytes((files.sources / "1.png").read_bytes())
    seen.add(fingerprint())
    seen.add(T2IDataset(files.load(), **SIZE).fingerprint())
    assert len(seen) == 5


def test_drift_names_the_examples(files) -> None:
    before = T2IDataset(files.load(), **SIZE).example_digests()
    assert describe_drift(before, before) == []
    (files.targets / "0.png").write_bytes((files.targets / "1.png").read_bytes())
    after = T2IDataset(files.load()[:3], **SIZE).example_digests()
    assert describe_drift(before, after) == ["index 0: prompt or image changed", "index 3: removed"]
    assert describe_drift(after, before)[1] == "index 3: added"


def test_fingerprint_of_a_lost_file_is_an_error(files) -> None:
    dataset = T2IDataset(files.load(), **SIZE)
    (files.targets / "2.png").unlink()
    with pytest.raises(DataError, match="2.png: cannot be read"):
        dataset.fingerprint()
