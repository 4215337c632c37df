"""LPIPS, SSIM and the aesthetic score: against their references, and loud when their weights are missing."""

from pathlib import Path
from unittest.mock import patch

import lpips
import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPModel

from glm_training.rewards import (
    AestheticOptions,
    LpipsOptions,
    RewardBackendError,
    RewardBatch,
    RewardCalculator,
    RewardConfigError,
    RewardError,
    RewardOptions,
    RewardResult,
    StructureOptions,
)
from glm_training.rewards.aesthetic import MLP_URL, AestheticPredictor
from glm_training.rewards.lpips_similarity import ALEXNET_URL
from glm_training.rewards.structure import Structure, ssim
from glm_training.rewards.types import to_pil
from tests.reward_files import write_aesthetic


def lpips_calculator(path: Path | str) -> RewardCalculator:
    return RewardCalculator({"lpips": 1}, options=RewardOptions(lpips=LpipsOptions(backbone_weights=path)))


def against_target(calculator: RewardCalculator, images: torch.Tensor, target: torch.Tensor) -> RewardResult:
    prompts = ["a picture"] * len(images)
    return calculator.compute_rewards(RewardBatch(images, prompts, targets=target.expand_as(images)))


def stock_lpips(path: Path) -> lpips.LPIPS:
    """The lpips package's own model, with the convolutions of ``path``."""
    with torch.random.fork_rng(devices=[]), patch.object(torch.nn.Linear, "reset_parameters"):  # 59M unused weights
        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = torch.load(path, weights_only=True)
    for part in (model.net.slice1, model.net.slice2, model.net.slice3, model.net.slice4, model.net.slice5):
        for name, layer in part.named_children():
            if isinstance(layer, torch.nn.Conv2d):
                layer.load_state_dict({key: state[f"features.{name}.{key}"] for key in ("weight", "bias")})
    return model


def test_lpips_ranks_the_target_above_a_near_copy_above_noise(
    alexnet_file: Path, picture: torch.Tensor, noise: torch.Tensor
) -> None:
    near = (picture + 0.05 * (noise - 0.5)).clamp(0, 1)
    same, close, far = against_target(
        lpips_calculator(alexnet_file), torch.cat([picture, near, noise]), picture
    ).total.tolist()
    assert same == 1.0
    assert same > close > far


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained':UserWarning", "ignore:Arguments other than:UserWarning")
def test_lpips_equals_the_reference_package(alexnet_file: Path, picture: torch.Tensor, noise: torch.Tensor) -> None:
    with torch.no_grad():
        expected = 1 - stock_lpips(alexnet_file)(noise, picture, normalize=True).flatten()
    got = against_target(lpips_calculator(alexnet_file), noise, picture).total
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert expected.item() < 0.99


def test_lpips_takes_images_below_the_backbones_minimum(alexnet_file: Path, noise: torch.Tensor) -> None:
    small = noise[..., :24, :32]
    result = against_target(lpips_calculator(alexnet_file), torch.cat([small, 1 - small]), small)
    assert result.total[0] == 1.0 and result.total[1] < 1.0


def test_missing_lpips_weights_name_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(RewardBackendError) as caught:
        RewardCalculator({"lpips": 1}).check()
    message = str(caught.value)
    assert ALEXNET_URL in message and str(tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth") in message
    assert "reward.options.lpips.backbone_weights" in message


def test_lpips_weights_in_the_hub_cache_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, alexnet_file: Path
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").write_bytes(alexnet_file.read_bytes())
    RewardCalculator({"lpips": 1}).check()


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", "other"], ids=["empty", "html", "other model"])
def test_a_file_that_is_not_alexnet_is_refused(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"features.0.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(RewardBackendError, match="not a state dict of torchvision's AlexNet"):
        lpips_calculator(path).check()


@pytest.mark.parametrize("size", [(128, 128), (31, 47), (7, 9)])
def test_ssim_equals_skimage(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(3, 3, *size, generator=generator)
    others = images + torch.tensor([0.02, 0.2, 1.0])[:, None, None, None] * torch.rand(3, 3, *size, generator=generator)
    others = others.clamp(0, 1)
    expected = [
        structural_similarity(image.numpy(), other.numpy(), data_range=1, channel_axis=0)
        for image, other in zip(images, others, strict=True)
    ]
    np.testing.assert_allclose(ssim(images, others).numpy(), expected, atol=1e-5)


def test_ssim_of_flat_and_near_equal_images_is_stable() -> None:
    flat = torch.full((1, 3, 16, 16), 0.7)
    assert ssim(flat, flat).item() == pytest.approx(1.0, abs=1e-9)
    assert ssim(flat, flat + 1e-4).item() == pytest.approx(1.0, abs=1e-6)


def test_structure_ranks_the_target_above_noise(picture: torch.Tensor, noise: torch.Tensor) -> None:
    same, far = against_target(RewardCalculator({"structure": 1}), torch.cat([picture, noise]), picture).total.tolist()
    assert same == pytest.approx(1.0) and far < 0.3


@pytest.mark.parametrize(("reference", "expected"), [(None, 1.0), ("source", 1.0), ("target", 0.1)])
def test_structure_reference(
    picture: torch.Tensor, noise: torch.Tensor, reference: str | None, expected: float
) -> None:
    calculator = RewardCalculator(
        {"structure": 1}, options=RewardOptions(structure=StructureOptions(reference=reference))
    )
    batch = RewardBatch(picture, ["edit"], targets=noise, sources=picture)
    assert calculator.compute_rewards(batch).total.item() == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(
    ("reference", "applies"),
    [
        ("source", {"neither": False, "target": False, "source": True, "both": True}),
        ("target", {"neither": False, "target": True, "source": False, "both": True}),
        (None, {"neither": False, "target": True, "source": True, "both": True}),
    ],
)
def test_structure_applies_where_its_reference_is(
    picture: torch.Tensor, noise: torch.Tensor, reference: str | None, applies: dict[str, bool]
) -> None:
    metric = Structure(StructureOptions(reference=reference), torch.device("cpu"))
    for given, wanted in applies.items():
        has = {"has_target": given in ("target", "both"), "has_source": given in ("source", "both")}
        assert metric.applies("a picture", **has) is wanted, given
        if wanted and given != "both":
            only = RewardBatch(picture, ["a picture"], **{f"{given}s": picture})
            assert metric.score(only).values.item() == pytest.approx(1), given
    assert metric.needs == {"source": "a source image", "target": "a target image"}.get(
        reference or "", "a source or a target image"
    )


def test_a_wrong_structure_reference_is_refused() -> None:
    with pytest.raises(RewardConfigError, match="reward.options.structure.reference is 'taget'"):
        StructureOptions(reference="taget")


@pytest.mark.parametrize("metric", ["lpips", "structure"])
def test_sizes_that_differ_are_an_error(metric: str, alexnet_file: Path) -> None:
    calculator = RewardCalculator({metric: 1}, options=RewardOptions(lpips=LpipsOptions(backbone_weights=alexnet_file)))
    with pytest.raises(RewardError, match=f"the metric {metric} raised ValueError: {metric}: "):
        calculator.compute_rewards(RewardBatch(torch.rand(1, 3, 64, 64), ["a"], targets=torch.rand(1, 3, 32, 64)))


@pytest.fixture(scope="module")
def aesthetic_files(tmp_path_factory: pytest.TempPathFactory) -> AestheticOptions:
    """See `write_aesthetic`."""
    return write_aesthetic(tmp_path_factory.mktemp("aesthetic"))


@pytest.mark.parametrize("size", [(128, 96), (80, 128)])
def test_aesthetic_is_the_predictor_on_the_normalised_embedding(
    aesthetic_files: AestheticOptions, picture: torch.Tensor, noise: torch.Tensor, size: tuple[int, int]
) -> None:
    images = torch.cat([picture, noise])[..., : size[0], : size[1]]
    calculator = RewardCalculator({"aesthetic": 1}, options=RewardOptions(aesthetic=aesthetic_files))
    got = calculator.compute_rewards(RewardBatch(images, ["a", "b"])).total
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = processor(to_pil(images), return_tensors="pt")["pixel_values"]
    predictor = AestheticPredictor(768)
    predictor.load_state_dict(torch.load(str(aesthetic_files.mlp_weights), weights_only=True))
    with torch.no_grad():
        clip = CLIPModel.from_pretrained(aesthetic_files.clip_name).eval()
        embedding = clip.get_image_features(pixel_values=pixels).pooler_output
        expected = predictor.eval()(F.normalize(embedding, dim=-1)) / 10
    assert abs(expected[0] - expected[1]) > 0.03
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)  # the stock processor rounds to 8 bits on the way


def test_the_predictor_has_the_published_layers() -> None:
    shapes = {name: tuple(value.shape) for name, value in AestheticPredictor().state_dict().items() if "weight" in name}
    assert shapes == {
        "layers.0.weight": (1024, 768),
        "layers.2.weight": (128, 1024),
        "layers.4.weight": (64, 128),
        "layers.6.weight": (16, 64),
        "layers.7.weight": (1, 16),
    }


def test_missing_aesthetic_files_are_all_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    options = AestheticOptions(clip_name=str(tmp_path / "no-clip"))
    with pytest.raises(RewardBackendError) as caught:
        RewardCalculator({"aesthetic": 1}, options=RewardOptions(aesthetic=options)).check()
    message = str(caught.value)
    assert MLP_URL in message and "reward.options.aesthetic.mlp_weights" in message
    assert "no-clip" in message and "reward.options.aesthetic.clip_name" in message


def test_a_predictor_of_another_clip_is_refused(aesthetic_files: AestheticOptions, tmp_path: Path) -> None:
    torch.save(AestheticPredictor(512).state_dict(), tmp_path / "b32.pth")
    options = AestheticOptions(clip_name=aesthetic_files.clip_name, mlp_weights=tmp_path / "b32.pth")
    with pytest.raises(RewardBackendError, match="does not fit the predictor"):
        RewardCalculator({"aesthetic": 1}, options=RewardOptions(aesthetic=options)).check()
