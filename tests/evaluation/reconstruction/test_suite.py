"""Originals through a stand-in for an autoencoder, and back: figures worked out by hand, from folders and tars."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glm_training.data.problems import DataError
from glm_training.evaluation.reconstruction.inception import DIMENSION, Inception
from glm_training.evaluation.reconstruction.suite import (
    Originals,
    Reconstruction,
    Sizes,
    _packed,
    _unpacked,
    alexnet,
    score,
)
from glm_training.evaluation.suites.protocol import EvaluationError, Scores
from glm_training.evaluation.suites.stages import Place, generate, judge
from glm_training.evaluation.suites.stages import score as score_stage
from glm_training.utils.distributed import World
from tests.reward_files import write_alexnet

WORLD = World()


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def grey(level: int, width: int = 40, height: int = 30) -> Image.Image:
    return Image.new("RGB", (width, height), (level,) * 3)


def folder_of(place: Path, *images: Image.Image) -> Path:
    place.mkdir()
    for number, image in enumerate(images):
        (place / f"{number}.png").write_bytes(png(image))
    return place


def suite(path: Path, sizes=(32, 16), first=None, inception=None, lpips=None) -> Reconstruction:
    return Reconstruction(Originals(path, first), Sizes(*sizes), inception, lpips)


def run(tested: Reconstruction, out: Path, reconstruct=lambda images: images, at_once: int = 4) -> Scores:
    place = Place(out)
    generate(tested, tested.maker(reconstruct), tested.drawing_settings, place, WORLD, at_once=at_once)
    judge(tested, place, WORLD)
    scores = score_stage(tested, place, WORLD)
    assert scores is not None
    return scores


def values(scores: Scores) -> dict[str, float | None]:
    return {figure.name: figure.value for figure in scores.figures}


def test_identical_pictures(tmp_path):
    scores = run(suite(folder_of(tmp_path / "in", noise(40, 30, 0), noise(20, 60, 1))), tmp_path / "out")
    assert values(scores) == {"PSNR (dB)": math.inf, "SSIM": 1, "SSIM, published reading": 1}
    (first, *_) = json.loads((tmp_path / "out" / "results.json").read_text())["figures"]
    assert first["value"] == "inf" and first["error"] is None


@pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None,
    reason='needs the evaluation extra: pip install "glm_training[evaluation]"',
)
def test_identical_pictures_by_networks(tmp_path, request):
    weights = request.getfixturevalue("weights")
    networks = {
        "inception": Inception(weights),
        "lpips": alexnet(write_alexnet(tmp_path / "alexnet.pth")),
    }
    path = folder_of(tmp_path / "in", noise(40, 30, 0), noise(20, 60, 1))
    tested = suite(path, sizes=(32, 32), **networks)
    tested.check_judge()
    scores = run(tested, tmp_path / "out")
    found = values(scores)
    assert abs(found["rFID"]) <= 1e-3 and found["LPIPS (AlexNet)"] == 0
    assert tested.judged_by == "pixels, Inception, AlexNet at 32 px"
    assert "rFID of 2 pictures is biased" in scores.remarks[-1]


def test_rfid_is_between_originals_and_reconstructions(monkeypatch):
    """Of 3 numbers each: means 2 apart in the first; variances 2 and 8 in the second, 2 and 0 in the third."""
    monkeypatch.setattr("glm_training.evaluation.reconstruction.suite.DIMENSION", 3)
    originals = torch.tensor([[0.0, 0, 1], [0, 2, 1], [0, 1, 0], [0, 1, 2]]) * torch.tensor([1, math.sqrt(3), 3**0.5])
    drawn = torch.tensor([[2.0, -1, 1], [2, 3, 1], [2, 1, 1], [2, 1, 1]]) * torch.tensor([1, math.sqrt(3), 3**0.5])
    pairs = zip(originals, drawn, strict=True)
    same = {"mse": 0.1, "ssim": 0.0, "ssim_published": 0.0}
    records = [{"picture": str(n), "features": [_packed(row) for row in pair], **same} for n, pair in enumerate(pairs)]
    scores = score(records)
    figure = {figure.name: figure for figure in scores.figures}["rFID"]
    expected = 4 + (math.sqrt(8) - math.sqrt(2)) ** 2 + 2
    assert figure.value == pytest.approx(expected, abs=1e-5) and figure.count == 4  # features are fp32
    assert "features" not in scores.lines[0]


def test_figures_by_hand(tmp_path):
    """Of flat pictures at .2 and .4 (51 and 102 of 255), each a tenth (25.5, which rounds to 26) lighter or darker."""

    def shifted(images):
        return images + torch.tensor([0.1, -0.1])[: len(images), None, None, None]

    path = folder_of(tmp_path / "in", grey(51), grey(102))
    scores = run(suite(path), tmp_path / "out", shifted)
    # 51 + 25.5 = 76.5 -> 76 (to even), 102 - 25.5 = 76.5 -> 76
    errors = [((76 - 51) / 255) ** 2, ((102 - 76) / 255) ** 2]
    psnrs = [-10 * math.log10(error) for error in errors]
    found = values(scores)
    assert found["PSNR (dB)"] == pytest.approx(sum(psnrs) / 2, abs=1e-4)
    ssims = [(2 * x * y + c) / (x * x + y * y + c) for c in (1e-4, 4e-4) for x, y in ((0.2, 76 / 255), (0.4, 76 / 255))]
    assert found["SSIM"] == pytest.approx(sum(ssims[:2]) / 2, abs=1e-5)
    assert found["SSIM, published reading"] == pytest.approx(sum(ssims[2:]) / 2, abs=1e-5)
    assert scores.figures[0].error == pytest.approx(abs(psnrs[0] - psnrs[1]) / 2, abs=1e-4)  # s / sqrt 2


def test_one_identical_picture_makes_the_mean_infinite():
    records = [{"picture": "a", "mse": 0.0, "ssim": 1.0, "ssim_published": 1.0}]
    records.append({"picture": "b", "mse": 0.01, "ssim": 0.5, "ssim_published": 0.75})
    figures = {figure.name: figure for figure in score(records).figures}
    assert figures["PSNR (dB)"].value == math.inf and figures["PSNR (dB)"].error is None
    assert figures["SSIM"].value == 0.75 and "rFID" not in figures


def test_what_goes_through_is_squashed_and_what_is_compared_is_smaller(tmp_path):
    seen = []

    def watched(images):
        seen.append(images.clone())
        return images

    path = folder_of(tmp_path / "in", noise(50, 20, 0), noise(31, 77, 1), noise(10, 10, 2))
    tested = suite(path, sizes=(28, 12), first=2)
    run(tested, tmp_path / "out", watched, at_once=1)
    seen = seen[1:]  # the first is a look at whether it takes the size
    assert [tuple(images.shape) for images in seen] == [(1, 3, 28, 28)] * 2
    assert sorted(file.name for file in (tmp_path / "out").glob("*.png")) == ["00000000.png", "00000001.png"]
    assert Image.open(tmp_path / "out" / "00000000.png").size == (12, 12)
    expected = np.asarray(noise(50, 20, 0).resize((28, 28), Image.Resampling.BILINEAR)) / 255
    np.testing.assert_allclose(seen[0][0].permute(1, 2, 0), expected, atol=1e-6)


def test_tars_and_folders_of_the_same_pictures_have_the_same_figures(tmp_path):
    images = [noise(40, 30, seed) for seed in range(3)]
    path = folder_of(tmp_path / "in", *images)
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for number, image in enumerate(images):
            entry = tarfile.TarInfo(f"{number:04d}.png")
            entry.size = len(png(image))
            tar.addfile(entry, io.BytesIO(png(image)))
    found = [
        values(run(suite(source), tmp_path / f"out-{source.name}", lambda images: images * 0.5))
        for source in (path, tmp_path / "set.tar")
    ]
    assert found[0] == found[1]
    listed = [json.loads(line) for line in (tmp_path / "out-set.tar" / "originals.jsonl").read_text().splitlines()]
    assert [entry["picture"] for entry in listed] == [f"{n:08d}.png" for n in range(3)]
    assert all("set.tar" in entry["original"] and f"{n:04d}" in entry["original"] for n, entry in enumerate(listed))


def test_changed_originals_do_not_go_on_in_the_same_folder(tmp_path):
    path = folder_of(tmp_path / "in", grey(51))
    run(suite(path), tmp_path / "out")
    (path / "1.png").write_bytes(png(grey(90)))
    with pytest.raises(EvaluationError, match="originals: .* there, .* now"):
        run(suite(path), tmp_path / "out")


def test_what_is_wrong_with_originals_is_told_with_its_name(tmp_path):
    path = folder_of(tmp_path / "in", grey(51), grey(102))
    (path / "1.png").write_bytes(png(grey(102))[:50])
    with pytest.raises(EvaluationError, match=r"1\.png cannot be read.*take it out of --originals"):
        run(suite(path), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        suite(tmp_path / "empty")


def test_an_autoencoder_that_gives_another_size_back_is_told_how_to_be_asked(tmp_path):
    path = folder_of(tmp_path / "in", grey(51))
    with pytest.raises(EvaluationError, match="of 32 px come back with 24 px: give --size a multiple"):
        run(suite(path), tmp_path / "out", lambda images: images[..., :24, :24])
    assert not (tmp_path / "out").exists()  # the next run may have another size


def test_reconstructions_of_others_are_compared_if_they_have_the_size(tmp_path):
    path = folder_of(tmp_path / "in", grey(51), grey(102), grey(153))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    grey(51, 16, 16).save(theirs / "00000000.png")
    grey(102, 20, 20).save(theirs / "00000001.png")
    tested, place = suite(path), Place(tmp_path / "out", theirs)
    judge(tested, place, WORLD)
    scores = score_stage(tested, place, WORLD)
    assert scores is not None and scores.figures[0].count == 1
    assert "20 x 20 px, not the 16 x 16" in scores.remarks[-1] and "00000002.png" in scores.remarks[-1]
    with pytest.raises(EvaluationError, match="no reconstructions 00000000.png"):
        tested.find(path)


def test_missing_weights_are_told_in_the_words_of_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = folder_of(tmp_path / "in", grey(51))
    with pytest.raises(EvaluationError) as told:
        suite(path, lpips=alexnet(None)).check_judge()
    message = str(told.value)
    assert "give --alexnet" in message and "pass --no-lpips" in message and "reward.options" not in message


def test_a_file_that_is_no_alexnet_is_told_on_one_line(tmp_path):
    (tmp_path / "alexnet.pth").write_text("{}")
    path = folder_of(tmp_path / "in", grey(51))
    with pytest.raises(EvaluationError) as told:
        suite(path, lpips=alexnet(tmp_path / "alexnet.pth")).check_judge()
    message = str(told.value)
    assert "alexnet.pth is not a state dict of torchvision's AlexNet" in message and "check --alexnet" in message
    assert "\n" not in message and "weights_only" not in message and "reward.options" not in message


def test_originals_that_cannot_be_used_are_told_in_the_words_of_the_command(tmp_path):
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for name, data in (("0.png", png(grey(51))), ("1.png", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    remark = run(suite(tmp_path / "in.tar"), tmp_path / "out").remarks[-1]
    assert remark == f"1 picture cannot be used and counts nowhere, first {tmp_path / 'in.tar'}: 1: 1.png is empty."


def test_features_go_through_records_bit_by_bit():
    features = torch.randn(DIMENSION, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_unpacked(json.loads(json.dumps(_packed(features)))), features)
