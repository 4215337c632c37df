"""The rewards of DMDR: their scores, their gradient to the images, and loud without their weights."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn import functional as F

from glm_training.rewards import (
    ClipHOptions,
    DifferentiableOptions,
    DifferentiableScorers,
    HpsV2Options,
    RewardBackendError,
    RewardBatch,
    RewardCalculator,
    RewardConfigError,
    RewardOptions,
)
from glm_training.rewards.types import to_pil
from tests.reward_files import write_open_clip

PROMPTS = ["a red cat", "zebra", "a red cat"]
LONG = " ".join(["word"] * 100)
CPU = torch.device("cpu")
ONE = {"clip_h": DifferentiableOptions({"clip_h": 1.0}), "hps_v2": DifferentiableOptions({"hps_v2": 1.0})}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> DifferentiableOptions:
    folder = tmp_path_factory.mktemp("scorers")
    return DifferentiableOptions(
        {"clip_h": 0.3, "hps_v2": 0.5},
        clip_h=ClipHOptions(write_open_clip(folder, "tiny-clip-h", seed=3, quick_gelu=True), "tiny-clip-h"),
        hps_v2=HpsV2Options(write_open_clip(folder, "tiny-hps-diff", seed=2), "tiny-hps-diff"),
    )


@pytest.fixture(scope="module")
def images(picture: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return torch.cat([picture, noise, noise.flip(-1)])[..., :96, :]  # 96 x 128: neither squashing nor padding is idle


def scorers(options: DifferentiableOptions, **changes: object) -> DifferentiableScorers:
    return DifferentiableScorers(replace(options, **changes), CPU)


def stock(options: DifferentiableOptions, name: str) -> open_clip.CLIP:
    """open_clip's own model with the weights of a scorer."""
    own = options.clip_h if name == "clip_h" else options.hps_v2
    model = open_clip.create_model(own.architecture).eval()
    model.load_state_dict(torch.load(str(own.weights), weights_only=True)["state_dict"])
    return model


def texts(model: open_clip.CLIP, prompts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return model.encode_text(open_clip.get_tokenizer("ViT-H-14")(prompts), normalize=True)


def hps_scores(options: DifferentiableOptions, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """[B] of the metric that has no gradient."""
    calculator = RewardCalculator({"hps_v2": 1}, options=RewardOptions(hps_v2=options.hps_v2))
    return calculator.compute_rewards(RewardBatch(images, prompts)).components["hps_v2"]


def test_hps_scores_as_the_metric_does(options: DifferentiableOptions, images: torch.Tensor) -> None:
    one = scorers(options, weights={"hps_v2": 1.0}, threshold=2.0)
    many, prompts = images.repeat(7, 1, 1, 1), PROMPTS * 6 + ["b", "other words", LONG]  # two chunks
    expected = hps_scores(options, many, prompts)
    assert expected.std() > 0.05
    loss, figures = one.losses(many, prompts)
    torch.testing.assert_close(figures["hps_v2"], expected.mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, 2 - expected.mean(), atol=1e-5, rtol=0)
    for row in (0, 1, 17, 20):
        alone = one.losses(many[row : row + 1], [prompts[row]])[1]["hps_v2"]
        torch.testing.assert_close(alone, expected[row], atol=1e-5, rtol=0)


def test_clip_h_scores_what_open_clip_preprocesses(options: DifferentiableOptions, images: torch.Tensor) -> None:
    model, published = stock(options, "clip_h"), open_clip.get_pretrained_cfg("ViT-H-14-quickgelu", "dfn5b")
    assert published["hf_hub"].strip("/") == "apple/DFN5B-CLIP-ViT-H-14"
    transform = open_clip.image_transform(
        32,
        is_train=False,
        mean=published["mean"],
        std=published["std"],
        resize_mode=published["resize_mode"],
        interpolation=published["interpolation"],
    )
    one = scorers(options, weights={"clip_h": 1.0})
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            picture = model.encode_image(transform(to_pil(images[row : row + 1])[0])[None], normalize=True)
        expected = (picture * texts(model, [prompt])).sum()
        got = one.losses(images[row : row + 1], [prompt])[1]["clip_h"]
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)  # PIL rounds to 8 bits on the way


def test_the_architectures_are_known_to_open_clip() -> None:
    assert open_clip.get_model_config(ClipHOptions().architecture)["quick_gelu"] is True
    assert open_clip.get_model_config(HpsV2Options().architecture).get("quick_gelu", False) is False


def test_the_loss_is_the_weighted_sum_of_the_hinges(options: DifferentiableOptions, images: torch.Tensor) -> None:
    inputs = images.clone().requires_grad_()
    loss, figures = scorers(options, threshold=1.5).losses(inputs, PROMPTS)  # above every cosine: no hinge is shut
    assert sorted(figures) == ["clip_h", "hps_v2"]
    expected = 0.3 * (1.5 - figures["clip_h"]) + 0.5 * (1.5 - figures["hps_v2"])
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    assert loss.shape == () and all(value.shape == () and not value.requires_grad for value in figures.values())


@pytest.mark.parametrize("weights", [{"clip_h": 1.0}, {"hps_v2": 2.0}, {"clip_h": 0.3, "hps_v2": 0.5}])
@pytest.mark.parametrize("method", ["refl", "srpo"])
def test_the_gradient_is_that_of_finite_differences(
    weights: dict[str, float], method: str, options: DifferentiableOptions, picture: torch.Tensor
) -> None:
    if method == "srpo" and "hps_v2" not in weights:
        return
    own = scorers(options, weights=weights, threshold=3.0, method=method, positive_words="Photo.")
    inputs = (0.25 + 0.5 * picture[..., :96, :]).repeat(2, 1, 1, 1).requires_grad_()  # away from 0 and 1
    (gradient,) = torch.autograd.grad(own.losses(inputs, PROMPTS[:2])[0], inputs)
    assert (gradient.flatten(1).norm(dim=1) > 1e-3).all()
    generator = torch.Generator().manual_seed(5)
    for direction in (gradient, gradient * torch.rand(gradient.shape, generator=generator)):
        direction = direction / direction.norm()
        with torch.no_grad():
            ahead, behind = (own.losses(inputs + step * direction, PROMPTS[:2])[0] for step in (0.02, -0.02))
        slope = (ahead - behind) / 0.04
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=0.02, atol=1e-5)


def test_a_score_above_the_threshold_has_no_gradient(options: DifferentiableOptions, images: torch.Tensor) -> None:
    scores = hps_scores(options, images, PROMPTS)
    good = scores > scores.median()
    assert good.sum() == 1
    inputs = images.clone().requires_grad_()
    own = scorers(options, weights={"hps_v2": 1.0}, threshold=scores.median().item() + 1e-4)
    (gradient,) = torch.autograd.grad(own.losses(inputs, PROMPTS)[0], inputs)
    assert (gradient[good] == 0).all() and (gradient[~good].flatten(1).norm(dim=1) > 0).all()
    loss, _ = scorers(options, threshold=-2.0).losses(inputs, PROMPTS)
    assert loss == 0 and (torch.autograd.grad(loss, inputs)[0] == 0).all()


@pytest.mark.parametrize("name", ["clip_h", "hps_v2"])
def test_black_and_white_pixels_learn_too(name: str, options: DifferentiableOptions) -> None:
    inputs = torch.zeros(1, 3, 32, 32)
    inputs[..., 10:20, 10:20] = 1  # bicubic overshoots around the square
    inputs = F.interpolate(inputs, size=(96, 96)).requires_grad_()
    (gradient,) = torch.autograd.grad(scorers(options, weights={name: 1.0}).losses(inputs, ["cat"])[0], inputs)
    assert (gradient != 0).all()


def test_srpo_by_hand(options: DifferentiableOptions, images: torch.Tensor) -> None:
    own = scorers(options, method="srpo", positive_words="Real.", negative_words="CG", strength=0.25, threshold=5.0)
    loss, figures = own.losses(images, PROMPTS)
    model = stock(options, "hps_v2")
    feature = 1.25 * texts(model, [f"Real. {prompt}" for prompt in PROMPTS])
    feature = feature - texts(model, [f"CG {prompt}" for prompt in PROMPTS])
    assert (feature.norm(dim=-1) - 1).abs().max() > 0.05  # not of unit length
    size = F.interpolate(images, size=(24, 32), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    with torch.no_grad():
        rows = model.encode_image((F.pad(size, (0, 0, 4, 4)) - mean) / std, normalize=True)
    expected = (rows * feature).sum(dim=-1).mean()
    torch.testing.assert_close(figures["hps_v2"], expected, atol=1e-5, rtol=0)
    plain = scorers(options, threshold=5.0).losses(images, PROMPTS)[1]
    torch.testing.assert_close(figures["clip_h"], plain["clip_h"], atol=0, rtol=0)  # it reads the prompt itself
    assert (figures["hps_v2"] - plain["hps_v2"]).abs() > 0.01
    torch.testing.assert_close(loss, 0.3 * (5 - figures["clip_h"]) + 0.5 * (5 - expected), atol=1e-5, rtol=0)


def test_refl_puts_its_words_before_the_prompt_of_hps(options: DifferentiableOptions, images: torch.Tensor) -> None:
    figures = scorers(options, positive_words="Realistic photo").losses(images, PROMPTS)[1]
    expected = hps_scores(options, images, [f"Realistic photo {prompt}" for prompt in PROMPTS]).mean()
    torch.testing.assert_close(figures["hps_v2"], expected, atol=1e-5, rtol=0)
    plain = scorers(options).losses(images, PROMPTS)[1]
    assert figures["clip_h"] == plain["clip_h"] and figures["hps_v2"] != plain["hps_v2"]


def test_weights_stay_frozen_and_a_text_is_read_once(
    options: DifferentiableOptions, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, graphs, models = [], [], []
    encode = open_clip.CLIP.encode_text

    def watched(model: open_clip.CLIP, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        features = encode(model, tokens, normalize)
        read.append(len(tokens))
        graphs.append(features.requires_grad)
        models.append(model)
        return features

    monkeypatch.setattr(open_clip.CLIP, "encode_text", watched)
    inputs = images.clone().requires_grad_()
    scorers(options).losses(inputs, PROMPTS)[0].backward()
    assert inputs.grad is not None and inputs.grad.abs().sum() > 0
    assert read == [2, 2] and graphs == [False, False]
    for model in models:
        assert not model.training
        assert all(not value.requires_grad and value.grad is None for value in model.parameters())


def test_autocast_is_the_callers(options: DifferentiableOptions, images: torch.Tensor) -> None:
    own = scorers(options)
    inputs = images.bfloat16().requires_grad_()
    exact, _ = own.losses(inputs, PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        loss, figures = own.losses(inputs, PROMPTS)
    loss.backward()
    assert exact.dtype == loss.dtype == torch.float32 and loss != exact
    torch.testing.assert_close(loss, exact, atol=0.02, rtol=0)
    assert inputs.grad is not None and inputs.grad.isfinite().all() and inputs.grad.abs().sum() > 0
    assert all(value.dtype == torch.float32 for value in figures.values())


def test_sizes_that_disagree_are_refused(options: DifferentiableOptions, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="for 2 prompts"):
        scorers(options).losses(images, PROMPTS[:2])


CLIP_H_REMEDY = ["hf download apple/DFN5B-CLIP-ViT-H-14 open_clip_pytorch_model.bin", "dmdr.reward.clip_h_weights"]
HPS_REMEDY = ["hf download xswu/HPSv2 HPS_v2.1_compressed.pt", "reward.options.hps_v2.weights"]


def failure(options: DifferentiableOptions) -> list[str]:
    with pytest.raises(RewardBackendError) as caught:
        DifferentiableScorers(options, CPU).check()
    return str(caught.value).splitlines()


def test_all_that_is_missing_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "nowhere")
    lines = failure(DifferentiableOptions({"clip_h": 1.0, "hps_v2": 1.0}))
    assert len(lines) == 2
    for line, name, remedy in zip(lines, ("clip_h", "hps_v2"), (CLIP_H_REMEDY, HPS_REMEDY), strict=True):
        assert line.startswith(f"{name}: ") and all(part in line for part in remedy), line
    assert len(failure(ONE["hps_v2"])) == 1  # what has no weight is not loaded


def test_without_open_clip_the_extra_is_named_and_the_files_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    lines = failure(DifferentiableOptions({"clip_h": 1.0}, clip_h=ClipHOptions("/nowhere/clip.bin")))
    assert "pip install 'glm_training[hps]'" in lines[0]
    assert "not found at /nowhere/clip.bin" in lines[1] and all(part in lines[1] for part in CLIP_H_REMEDY)


@pytest.mark.parametrize(
    ("name", "remedy", "key"),
    [
        ("clip_h", CLIP_H_REMEDY, "dmdr.reward.clip_h_architecture"),
        ("hps_v2", HPS_REMEDY, "reward.options.hps_v2.architecture"),
    ],
)
def test_wrong_files_and_architectures_are_told(
    name: str, remedy: list[str], key: str, options: DifferentiableOptions, tmp_path: Path
) -> None:
    own = getattr(options, name)
    (tmp_path / "page.bin").write_text("<html>not found</html>")
    torch.save({"logit_scale": torch.zeros(())}, tmp_path / "other.bin")
    for file in ("page.bin", "other.bin"):
        wrong = replace(ONE[name], **{name: replace(own, weights=tmp_path / file)})
        message = "\n".join(failure(wrong))
        assert re.match(f"{name}: .*{file} does not fit open_clip's {own.architecture}", message), message
        assert all(part in message for part in remedy), message
    (line,) = failure(replace(ONE[name], **{name: replace(own, architecture="ViT-H-15")}))
    assert "'ViT-H-15'" in line and key in line


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"weights": {}}, "no scorer"),
        ({"weights": {"aesthetic": 1.0}}, "'clip_h', 'hps_v2'"),
        ({"weights": {"clip_h": 0.0}}, "clip_h must be a number > 0"),
        ({"weights": {"clip_h": 1.0}, "method": "srpo"}, "srpo concerns hps_v2"),
        ({"method": "draft"}, "'refl', 'srpo'"),
        ({"threshold": float("nan")}, "finite threshold"),
        ({"strength": 0.0}, "srpo_strength > 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(RewardConfigError, match=re.escape(told)):
        DifferentiableOptions(**{"weights": {"hps_v2": 1.0}, **changes})  # type: ignore[arg-type]
