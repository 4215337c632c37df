"""Models of transformers that look at pictures: detectors, and CLIP as a judge of colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from glm_training.evaluation.suites.detectors import RECORDED_FROM, Detected, whole_box
from glm_training.evaluation.suites.geneval.rules import COLORS
from glm_training.evaluation.suites.protocol import EvaluationError, Failure
from glm_training.rewards.clip import ClipPair, image_embeddings, text_embeddings
from glm_training.rewards.types import RewardBackendError, from_pil
from glm_training.utils.console import Console
from glm_training.utils.hub_files import fetch_where_allowed

SEGMENTS, BOXES = "ForUniversalSegmentation", "ForObjectDetection"
"""How the classes end that can be used: masks of instances, or boxes."""

OTHER_NAMES = {
    "airplane": ("aeroplane",),
    "computer keyboard": ("keyboard",),
    "computer mouse": ("mouse",),
    "couch": ("sofa",),
    "dining table": ("diningtable",),
    "donut": ("doughnut",),
    "hair drier": ("hair dryer",),
    "motorcycle": ("motorbike",),
    "potted plant": ("pottedplant",),
    "tv": ("tvmonitor", "tv monitor", "television"),
    "tv remote": ("remote", "remote control"),
}
"""GenEval's name of a class -> what detectors that were trained on COCO call it."""

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
"""What CLIP compares an object with; GenEval's words."""

GREY = (0x99, 0x99, 0x99)
"""What lies around an object."""


def plain(name: str) -> str:
    """A class as names are compared: lower case, spaces between words."""
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


class TransformersDetector:
    """Any detector of boxes or segmenter of instances in transformers, with its own image processor.

    Of a segmenter a box encloses its mask, ends excluded, as mmdet has it for GenEval's Mask2Former.
    """

    def __init__(self, model: str, device: torch.device | None = None) -> None:
        """model: a folder, or a hub id that is in the local cache."""
        self.name = f"transformers:{model}"
        self._model_name = model
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def check(self, classes: Sequence[str]) -> None:
        unknown = [name for name in classes if self._label(name) is None]
        if unknown:
            some = ", ".join(sorted(self._labels)[:12])
            raise EvaluationError(
                f"--detector {self.name} does not know {', '.join(unknown[:10])}, which the prompts ask for; its "
                f"{len(self._labels)} classes begin {some}. Give a detector that was trained on them"
            )
        _ = self._processor

    def _label(self, name: str) -> int | None:
        return next((self._labels[n] for n in (name, *OTHER_NAMES.get(name, ())) if n in self._labels), None)

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        config = self._loaded(lambda: AutoConfig.from_pretrained(self._model_name, local_files_only=True))
        kind = (getattr(config, "architectures", None) or ["no class"])[0]
        if not kind.endswith((SEGMENTS, BOXES)):
            raise EvaluationError(
                f"--detector {self.name} is a {kind}: a class is needed whose name ends with {BOXES} or {SEGMENTS}"
            )
        return config

    @cached_property
    def _labels(self) -> dict[str, int]:
        return {plain(name): int(number) for number, name in self._config.id2label.items()}

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoImageProcessor

        return self._loaded(lambda: AutoImageProcessor.from_pretrained(self._model_name, local_files_only=True))

    @cached_property
    def _model(self) -> Any:
        import transformers

        kind = getattr(transformers, self._config.architectures[0])
        model = self._loaded(lambda: kind.from_pretrained(self._model_name, dtype=torch.float32, local_files_only=True))
        return model.requires_grad_(False).eval().to(self._device)

    def _loaded(self, load: Any) -> Any:
        try:
            return load()
        except (OSError, ValueError, KeyError, AttributeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise EvaluationError(
                f"--detector {self.name} is neither a folder of a detector nor in the local Hugging Face cache "
                f"({first}). Run `hf download {self._model_name}`, or name a folder that holds it"
            ) from error

    @torch.no_grad()
    def detect(self, images: Sequence[Image.Image], classes: Sequence[str]) -> list[list[Detected] | Failure]:
        """One picture at a time: a batch is padded, which changes what is found."""
        wanted = {self._label(name): name for name in classes}
        return [self._found(image, wanted) for image in images]

    def _found(self, image: Image.Image, wanted: Mapping[int | None, str]) -> list[Detected]:
        processor = self._processor
        inputs = processor(images=image, return_tensors="pt").to(self._device)
        outputs = self._model(**inputs)
        size = [(image.height, image.width)]
        if self._config.architectures[0].endswith(BOXES):
            (found,) = processor.post_process_object_detection(outputs, threshold=RECORDED_FROM, target_sizes=size)
            rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
            detected = [Detected(wanted[label], score, tuple(box)) for label, score, box in rows if label in wanted]
        else:
            (found,) = processor.post_process_instance_segmentation(
                outputs, threshold=RECORDED_FROM, target_sizes=size, return_binary_maps=True
            )
            detected = []
            for place, segment in enumerate(found["segments_info"]):
                if segment["label_id"] in wanted:
                    mask = found["segmentation"][place].cpu().numpy() > 0
                    detected.append(Detected(wanted[segment["label_id"]], segment["score"], enclosing(mask), mask))
        return sorted(detected, key=lambda one: -one.score)


def enclosing(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The box of a mask [H, W] that is not empty: first pixel, and the one after the last."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def crop_on_grey(image: Image.Image, detected: Detected) -> Image.Image:
    """An object cut out by its box, with #999 where its mask, if it has one, leaves off."""
    image = image.convert("RGB")
    if detected.mask is not None:
        grey = Image.new("RGB", image.size, GREY)
        image = Image.composite(image, grey, Image.fromarray(detected.mask.astype(np.uint8) * 255))
    return image.crop(whole_box(detected.box, image.size))


class ClipColors:
    """Probabilities of GenEval's ten colours: softmax of 100 times the cosines of the crop with each colour's text.

    A colour's text is the mean of the unit embeddings of `TEMPLATES`, of unit length again (zero-shot classification
    with an ensemble of prompts, Radford et al. 2021).
    """

    def __init__(self, model: str, device: torch.device | None = None) -> None:
        """model: a folder, or a hub id, of a CLIP with its tokenizer."""
        self.name = f"CLIP {model}"
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._pair = ClipPair("--colors", (model, "colors"), (model, "colors"), device)
        self._texts: dict[str, torch.Tensor] = {}

    def check(self) -> None:
        """Loads it, fetched where it is not here."""
        for problem in fetch_where_allowed(self._pair.wanted(), Console().line):
            Console().line(problem)  # what is missing then, and what to do, is said by loading it
        self._load()

    def _load(self) -> tuple[Any, Any]:
        try:
            return self._pair.load()
        except RewardBackendError as error:
            raise EvaluationError(str(error).replace("reward.options.colors", "--colors")) from error

    def colors(self, image: Image.Image, objects: Sequence[tuple[Detected, str]]) -> list[Mapping[str, float]]:
        clip, _ = self._load()
        found: list[Mapping[str, float]] = []
        for detected, name in objects:
            embedding = image_embeddings(clip, from_pil(crop_on_grey(image, detected)))[0]
            probabilities = (100 * self._classifier(name) @ embedding).softmax(dim=0)
            found.append(dict(zip(COLORS, probabilities.tolist(), strict=True)))
        return found

    def _classifier(self, name: str) -> torch.Tensor:
        """[10, width]: a row for each colour of an object of this class."""
        if name not in self._texts:
            clip, tokenizer = self._load()
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            rows = text_embeddings(clip, tokenizer, texts).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self._texts[name] = torch.nn.functional.normalize(rows.mean(dim=1), dim=-1)
        return self._texts[name]
