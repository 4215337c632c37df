"""The network of rFID: torch-fidelity's own class, here with random weights, read from a file without unpickling it."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import pytest
import torch

from glm_training.evaluation.reconstruction import inception
from glm_training.evaluation.reconstruction.frechet import frechet_distance, moments_of
from glm_training.evaluation.reconstruction.inception import DIMENSION, URL, Inception
from glm_training.evaluation.suites.protocol import EvaluationError

needs_fidelity = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None,
    reason='needs the evaluation extra: pip install "glm_training[evaluation]"',
)
CPU = torch.device("cpu")


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    small = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear") * 255).round() / 255


@needs_fidelity
def test_features_are_those_of_torch_fidelitys_class_on_8_bits(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = pictures(2)
    own = Inception(weights, CPU).features(images)
    theirs = FeatureExtractorInceptionV3("i", ["2048"], feature_extractor_weights_path=str(weights))
    (expected,) = theirs((images * 255).round().to(torch.uint8))
    assert own.shape == (2, DIMENSION) and own.dtype == torch.float32
    assert torch.equal(own, expected)
    assert (own[0] - own[1]).abs().max() > 0.01 * own.abs().max()  # two pictures have two features
    assert torch.equal(Inception(weights, CPU).features(images + 0.4 / 255), own)  # less than half a level


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("bomb-went-off"),))


@needs_fidelity
def test_a_file_of_something_else_is_named_and_never_run(tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    Path("bomb.pth").write_bytes(pickle.dumps({"fc.weight": Bomb()}))
    torch.save({"fc.weight": torch.zeros(3)}, "other.pth")
    for name in ("bomb.pth", "other.pth", "absent.pth"):
        with pytest.raises(EvaluationError, match=f"{name} is not .*--inception"):
            Inception(Path(name), CPU).check()
    assert not Path("bomb-went-off").exists()


@needs_fidelity
def test_weights_that_are_nowhere_are_named_with_their_address(tmp_path, monkeypatch, weights):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(EvaluationError) as told:
        Inception(None, CPU).check()
    assert URL in str(told.value) and "--inception" in str(told.value) and str(tmp_path) in str(told.value)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / URL.rsplit("/", 1)[1]).write_bytes(weights.read_bytes())
    Inception(None, CPU).check()


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(inception, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"glm_training\[evaluation\]"):
        Inception(None, CPU).check()


@needs_fidelity
def test_the_distance_is_torch_fidelitys_where_covariances_are_regular():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    draw = torch.Generator().manual_seed(0)
    one = torch.randn(200, 8, generator=draw, dtype=torch.float64)
    other = torch.randn(150, 8, generator=draw, dtype=torch.float64) @ torch.randn(8, 8, generator=draw).double() + 1
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (one, other)), verbose=False)
    own = frechet_distance(moments_of([one[:70], one[70:]], 8), moments_of([other], 8))
    assert own == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
