"""CLIPScore, PickScore and HPSv2.1: against the score recomputed from the model, and loud without their weights."""

import sys
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import functional as V
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from glm_training.rewards import (
    ClipScoreOptions,
    HpsV2Options,
    PickScoreOptions,
    RewardBackendError,
    RewardBatch,
    RewardCalculator,
    RewardOptions,
)
from glm_training.rewards.clip import _Clamp, crop_square, pad_square, squash_square
from glm_training.rewards.types import to_pil
from tests.reward_files import write_clip, write_open_clip

PROMPTS = ["a red cat", "zebra", "a red cat"]
LONG = " ".join(["word"] * 40)  # 160 tokens


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def hps_options(tmp_path_factory: pytest.TempPathFactory) -> HpsV2Options:
    return HpsV2Options(write_open_clip(tmp_path_factory.mktemp("hps"), "tiny-hps", seed=2), "tiny-hps")


@pytest.fixture(scope="module")
def calculators(clip_folder: Path, hps_options: HpsV2Options) -> dict[str, RewardCalculator]:
    options = RewardOptions(
        clip_score=ClipScoreOptions(str(clip_folder)),
        pick_score=PickScoreOptions(str(clip_folder), str(clip_folder)),
        hps_v2=hps_options,
    )
    return {name: RewardCalculator({name: 1}, options=options) for name in ("clip_score", "pick_score", "hps_v2")}


@pytest.fixture(scope="module")
def images(picture: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return torch.cat([picture, noise, noise])[..., :96, :]  # 96 x 128: neither cropping nor padding is idle


def test_what_is_cut_off_at_black_and_white_learns_as_any_other_pixel() -> None:
    values = torch.tensor([-0.5, 0.0, 0.25, 1.0, 1.5], requires_grad=True)
    cut = _Clamp.apply(values)
    assert cut.tolist() == [0.0, 0.0, 0.25, 1.0, 1.0]
    (cut * torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0])).sum().backward()
    assert values.grad.tolist() == [2.0, 3.0, 5.0, 7.0, 11.0]


def unnormalised(pixels: torch.Tensor) -> torch.Tensor:
    """What CLIP's means and deviations were taken off."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return pixels * std + mean


def test_what_does_not_fit_a_square_is_cut_off_filled_up_or_squashed() -> None:
    """Of 5 x 8 px: columns 1 to 5 are left; a border of 1 row lies above and one of 2 below; of a picture that is twice
    as wide as high, all is left."""
    image = (torch.arange(8) / 8).expand(1, 3, 5, 8)
    cropped, padded = unnormalised(crop_square(image, 5)), unnormalised(pad_square(image, 8))
    torch.testing.assert_close(cropped, image[..., 1:6], rtol=0, atol=1e-6)
    torch.testing.assert_close(padded, F.pad(image, (0, 0, 1, 2)), rtol=0, atol=1e-6)
    tall = unnormalised(pad_square(image.mT, 8))
    torch.testing.assert_close(tall, F.pad(image.mT, (1, 2)), rtol=0, atol=1e-6)
    halves = torch.tensor([0.0, 1.0]).repeat_interleave(16).expand(1, 3, 16, 32)
    squashed = unnormalised(squash_square(halves, 16))[0, 0]
    assert squashed.shape == (16, 16) and (squashed[:, :5].abs() < 1e-5).all() and (squashed[:, 11:] > 1 - 1e-5).all()


def stock_cosines(folder: Path, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Image by image with transformers' own processor, model and similarity."""
    clip, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    values = []
    for image, prompt in zip(to_pil(images), prompts, strict=True):
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
        tokens = torch.cat([tokens[:, :76], tokens[:, -1:]], dim=1) if tokens.shape[1] > 77 else tokens
        with torch.no_grad():
            logits = clip(input_ids=tokens, pixel_values=pixels).logits_per_image.item()
        values.append(logits / clip.logit_scale.exp().item())
    return torch.tensor(values)


def test_clip_score_is_the_cosine(
    clip_folder: Path, calculators: dict[str, RewardCalculator], images: torch.Tensor
) -> None:
    prompts = [*PROMPTS[:2], LONG]
    expected = stock_cosines(clip_folder, images, prompts)
    assert (expected[0] - expected[1]).abs() > 0.05
    got = calculators["clip_score"].compute_rewards(RewardBatch(images, prompts)).total
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)  # the stock processor rounds to 8 bits on the way


def test_pick_score_is_the_scaled_cosine_over_26(
    clip_folder: Path, calculators: dict[str, RewardCalculator], images: torch.Tensor
) -> None:
    expected = torch.tensor(3.0).exp() * stock_cosines(clip_folder, images, PROMPTS) / 26
    got = calculators["pick_score"].compute_rewards(RewardBatch(images, PROMPTS)).total
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)
    cosines = calculators["clip_score"].compute_rewards(RewardBatch(images, PROMPTS)).total
    torch.testing.assert_close(got, torch.tensor(3.0).exp() * cosines / 26, atol=1e-5, rtol=0)


def test_hps_is_the_cosine_on_the_padded_picture(
    hps_options: HpsV2Options, calculators: dict[str, RewardCalculator], images: torch.Tensor
) -> None:
    model = open_clip.create_model("tiny-hps").eval()
    model.load_state_dict(torch.load(str(hps_options.weights), weights_only=True)["state_dict"])
    values = []
    for image, prompt in zip(to_pil(images), PROMPTS, strict=True):
        square = Image.new("RGB", (32, 32))
        square.paste(image.resize((32, 24), Image.Resampling.BICUBIC), (0, 4))
        pixels = V.normalize(V.to_tensor(square), open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        with torch.no_grad():
            pair = model.encode_image(pixels[None]), model.encode_text(open_clip.get_tokenizer("ViT-H-14")([prompt]))
        values.append(F.cosine_similarity(*pair).item())
    got = calculators["hps_v2"].compute_rewards(RewardBatch(images, PROMPTS)).total
    torch.testing.assert_close(got, torch.tensor(values), atol=2e-3, rtol=0)
    assert abs(values[0] - values[1]) > 0.05


@pytest.mark.parametrize("metric", ["clip_score", "pick_score", "hps_v2"])
def test_a_batch_scores_as_its_samples_do(
    metric: str, calculators: dict[str, RewardCalculator], images: torch.Tensor
) -> None:
    many = RewardBatch(images.repeat(7, 1, 1, 1), PROMPTS * 6 + ["b", "a long one of other words", LONG])  # two chunks
    together = calculators[metric].compute_rewards(many).total
    alone = [calculators[metric].compute_rewards(many.select([row])).total for row in (0, 1, 16, 19, 20)]
    torch.testing.assert_close(together[[0, 1, 16, 19, 20]], torch.cat(alone), atol=1e-5, rtol=0)
    assert together[1] == pytest.approx(together[4].item(), abs=1e-5)
    assert len(set(together.tolist())) > 3


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("clip_score", ["hf download", "openai/clip-vit-large-patch14", "reward.options.clip_score.clip_name"]),
        (
            "pick_score",
            [
                "hf download yuvalkirstain/PickScore_v1",
                "reward.options.pick_score.model_name",
                'hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K --include "*.json" "*.txt"',
                "reward.options.pick_score.processor_name",
            ],
        ),
        ("hps_v2", ["hf download xswu/HPSv2 HPS_v2.1_compressed.pt", "reward.options.hps_v2.weights"]),
    ],
)
def test_missing_weights_name_the_remedy(metric: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "nowhere")
    with pytest.raises(RewardBackendError) as caught:
        RewardCalculator({metric: 1}).check()
    message = str(caught.value)
    assert message.startswith(f"{metric}: ") and all(part in message for part in expected), message


def test_hps_without_open_clip_names_the_extra(monkeypatch: pytest.MonkeyPatch, hps_options: HpsV2Options) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(RewardBackendError, match=r"pip install 'glm_training\[hps\]'"):
        RewardCalculator({"hps_v2": 1}, options=RewardOptions(hps_v2=hps_options)).check()


def test_weights_of_another_model_are_refused(hps_options: HpsV2Options, tmp_path: Path) -> None:
    torch.save({"state_dict": {"logit_scale": torch.zeros(())}}, tmp_path / "other.pt")
    options = RewardOptions(hps_v2=HpsV2Options(tmp_path / "other.pt", hps_options.architecture))
    with pytest.raises(RewardBackendError, match="does not fit open_clip's tiny-hps"):
        RewardCalculator({"hps_v2": 1}, options=options).check()
