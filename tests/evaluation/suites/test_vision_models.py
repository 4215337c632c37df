"""Detectors of transformers and CLIP's colours, on tiny models of the real classes whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from glm_training.evaluation.suites.detectors import Detected, ShapesColors, ShapesDetector
from glm_training.evaluation.suites.geneval.rules import COLORS
from glm_training.evaluation.suites.protocol import EvaluationError
from glm_training.evaluation.suites.vision_models import (
    ClipColors,
    TransformersDetector,
    crop_on_grey,
    enclosing,
)
from tests.reward_files import write_clip
from tests.small_world import Jitter, Scene, draw


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def yolos(tmp_path_factory):
    """Finds in every picture, whatever it shows, 3 objects of class 1 ("tvmonitor") of score .75, in the box whose
    centre is (.5, .25) and whose sides are (.5, .25) of the picture's."""
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=[32, 32],
        patch_size=16, num_detection_tokens=3, id2label={0: "N/A", 1: "tvmonitor", 2: "dog"},
        label2id={"N/A": 0, "tvmonitor": 1, "dog": 2},
    )  # fmt: skip
    model = YolosForObjectDetection(config)
    with torch.no_grad():
        last = model.class_labels_classifier.layers[-1]
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.01, 0.75, 0.04, 0.2]).log())  # the last one is no object
        last = model.bbox_predictor.layers[-1]
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.5, 0.25, 0.5, 0.25]).logit())
    folder = tmp_path_factory.mktemp("yolos")
    model.save_pretrained(folder)
    YolosImageProcessor(size={"height": 32, "width": 32}, do_pad=False).save_pretrained(folder)
    return str(folder)


def test_boxes_of_a_detector_are_in_pixels_of_the_picture_and_classes_in_words_of_the_prompts(yolos):
    detector = TransformersDetector(yolos)
    detector.check(["tv", "dog"])
    found = detector.detect([noise(80, 40), noise(40, 200)], ["tv", "dog"])
    for objects, box in zip(found, ((20, 5, 60, 15), (10, 25, 30, 75)), strict=True):
        assert [one.name for one in objects] == ["tv"] * 3
        for one in objects:
            assert one.score == pytest.approx(0.75, rel=1e-5) and one.mask is None
            assert one.box == pytest.approx(box, rel=1e-5)
    assert detector.detect([noise(80, 40)], ["dog"]) == [[]]


def test_a_class_that_the_detector_does_not_know_is_named_before_anything_is_drawn(yolos):
    with pytest.raises(EvaluationError, match=r"does not know bench, cat, .* its 3 classes begin dog, n/a, tvmonitor"):
        TransformersDetector(yolos).check(["tv", "bench", "cat"])


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    """5 queries, each a "remote" with probability .8; what their masks are is random."""
    torch.manual_seed(1)
    swin = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=8,
        encoder_layers=1, decoder_layers=2, num_attention_heads=1, dim_feedforward=8, num_queries=5,
        id2label={0: "person", 1: "remote"}, label2id={"person": 0, "remote": 1},
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.zero_()
        model.class_predictor.bias.copy_(torch.tensor([0.05, 0.8, 0.15]).log())
    folder = tmp_path_factory.mktemp("mask2former")
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


def test_boxes_of_a_segmenter_enclose_its_masks_and_scores_are_class_times_mask(mask2former):
    image = noise(96, 48)
    detector = TransformersDetector(mask2former)
    detector.check(["tv remote", "person"])
    (objects,) = detector.detect([image], ["tv remote"])
    assert objects and all(one.name == "tv remote" for one in objects)
    for one in objects:
        assert one.mask.shape == (48, 96) and one.mask.any()
        inside = [(x, y) for y in range(48) for x in range(96) if one.mask[y, x]]
        columns, rows = zip(*inside, strict=True)
        assert one.box == (min(columns), min(rows), max(columns) + 1, max(rows) + 1)
        # a pixel of the mask has at least probability .5, so a score lies between .4 and .8
        assert 0.4 - 1e-3 <= one.score <= 0.8
    assert [one.score for one in objects] == sorted((one.score for one in objects), reverse=True)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(mask2former).eval()
    inputs = Mask2FormerImageProcessor.from_pretrained(mask2former)(images=image, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).masks_queries_logits
    masks = torch.nn.functional.interpolate(logits, size=(384, 384), mode="bilinear", align_corners=False)[0].double()
    inside = masks > 0
    means = [(m.sigmoid()[i].mean().item() * 0.8) for m, i in zip(masks, inside, strict=True) if i.any()]
    assert [one.score for one in objects] == pytest.approx(sorted(means, reverse=True), rel=1e-4)


def test_what_is_no_detector_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(EvaluationError, match=r"transformers:nobody/nothing is neither a folder .*hf download nobody/"):
        TransformersDetector("nobody/nothing").check(["dog"])
    write_clip(tmp_path)
    with pytest.raises(EvaluationError, match=r"is a CLIPModel: a class is needed whose name ends with ForObject"):
        TransformersDetector(str(tmp_path)).check(["dog"])


def test_an_object_is_cut_out_on_999():
    image = noise(6, 5)
    mask = np.zeros((5, 6), dtype=bool)
    mask[1:4, 2:4] = True
    mask[2, 2] = False
    crop = np.asarray(crop_on_grey(image, Detected("dog", 0.9, (1.6, 1.2, 4.4, 3.8), mask)))
    assert crop.shape == (3, 2, 3)  # box rounded to (2, 1, 4, 4)
    wanted = np.asarray(image)[1:4, 2:4].copy()
    wanted[1, 0] = (0x99, 0x99, 0x99)
    np.testing.assert_array_equal(crop, wanted)
    np.testing.assert_array_equal(
        np.asarray(crop_on_grey(image, Detected("dog", 0.9, (1.6, 1.2, 4.4, 3.8)))), np.asarray(image)[1:4, 2:4]
    )
    assert crop_on_grey(image, Detected("dog", 0.9, (5.9, 4.9, 5.9, 4.9))).size == (1, 1)


def test_a_mask_of_one_pixel_has_a_box_of_one_pixel():
    mask = np.zeros((5, 6), dtype=bool)
    mask[4, 3] = True
    assert enclosing(mask) == (3, 4, 4, 5)


def test_colours_are_the_softmax_over_mean_texts(tmp_path):
    """Against a computation from the raw model."""
    write_clip(tmp_path)
    colors = ClipColors(str(tmp_path))
    colors.check()
    image = noise(40, 40, seed=3)
    objects = [(Detected("car", 0.9, (0, 0, 40, 40)), "car"), (Detected("dog", 0.9, (10, 0, 40, 30)), "dog")]
    found = colors.colors(image, objects)
    from transformers import CLIPTokenizer

    model = CLIPModel.from_pretrained(tmp_path).eval()
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    for (detected, name), told in zip(objects, found, strict=True):
        side = model.config.vision_config.image_size
        crop = image.crop([int(v) for v in detected.box])
        pixels = torch.from_numpy(np.asarray(crop).copy()).permute(2, 0, 1)[None] / 255
        pixels = torch.nn.functional.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
        with torch.no_grad():
            seen = model.get_image_features(pixel_values=(pixels - mean) / std).pooler_output[0]
            cosines = []
            for color in COLORS:
                texts = [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}",
                         f"a photo of a {color} object"]  # fmt: skip
                rows = [model.get_text_features(**tokenizer(t, return_tensors="pt")).pooler_output[0] for t in texts]
                mean_text = sum(row / row.norm() for row in rows)
                cosines.append(float(mean_text @ seen / mean_text.norm() / seen.norm()))
        top = max(cosines)
        weights = [math.exp(100 * (cosine - top)) for cosine in cosines]
        assert list(told) == list(COLORS)
        # a cosine is off by some 1e-6, which 100 times over moves a probability by 1e-4 of itself
        assert list(told.values()) == pytest.approx([w / sum(weights) for w in weights], rel=1e-3, abs=1e-6)
    assert max(found[0].values()) > 0.11  # it does tell colours apart


def test_a_clip_that_is_not_there_is_refused_in_words_of_the_command(tmp_path):
    with pytest.raises(EvaluationError, match="--colors") as raised:
        ClipColors("nobody/nothing").check()
    assert "reward" not in str(raised.value) and "hf download nobody/nothing" in str(raised.value)


def test_shapes_of_a_scene_have_their_boxes_and_colours():
    image = draw(Scene("red", "square", 1, "left of", "blue", "circle"), Jitter(0, 0))
    detector = ShapesDetector()
    (found,) = detector.detect([image], ["square", "circle"])
    assert {one.name: one.score for one in found} == {"square": 1.0, "circle": 1.0}
    boxes = {one.name: one.box for one in found}
    # centres (32, 64) and (96, 64); half sides .88 x 23 and 23, each edge shared by two pixels at most
    assert boxes["square"] == pytest.approx((32 - 20.24, 64 - 20.24, 32 + 20.24, 64 + 20.24), abs=1.5)
    assert boxes["circle"] == pytest.approx((96 - 23, 64 - 23, 96 + 23, 64 + 23), abs=1.5)
    colors = ShapesColors().colors(image, [(one, one.name) for one in found])
    assert {one.name: told for one, told in zip(found, colors, strict=True)} == {
        "square": {"red": 1.0},
        "circle": {"blue": 1.0},
    }
    assert detector.detect([image], ["triangle"]) == [[]]
    with pytest.raises(EvaluationError, match="finds circle, square, triangle; the prompts ask for bench"):
        detector.check(["circle", "bench"])
