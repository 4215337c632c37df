"""Options of the metrics, one frozen dataclass each, named as in the YAML section ``reward.options``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from glm_training.rewards.types import RewardConfigError


def _one_of(key: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise RewardConfigError(f"{key} is {value!r}; allowed: {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class TextAccuracyOptions:
    """engine: "rapidocr" (ONNX models inside the wheel, CPU) or "pytesseract" (needs the tesseract program).

    languages: codes of the engine, each read by its own model; none is the engine's default ("ch" for rapidocr, which
    reads Chinese, Japanese, English and the Latin scripts with one model; "eng" for tesseract). model_files: pairs of a
    language and the ONNX file of its recogniser, in place of RapidOCR's own.
    extra_text_penalty: subtracted per wanted character's worth of unasked text (>= 0).
    min_confidence: readings below it are left out, in [0, 1]; 0.5 is RapidOCR's own default.
    """

    engine: str = "rapidocr"
    languages: tuple[str, ...] = ()
    model_files: tuple[tuple[str, Path | str], ...] = ()
    extra_text_penalty: float = 0.2
    min_confidence: float = 0.5

    def __post_init__(self) -> None:
        _one_of("reward.options.text_accuracy.engine", self.engine, ("rapidocr", "pytesseract"))
        if not (math.isfinite(self.extra_text_penalty) and self.extra_text_penalty >= 0):
            raise RewardConfigError("reward.options.text_accuracy.extra_text_penalty must be a number >= 0")
        if not 0 <= self.min_confidence <= 1:
            raise RewardConfigError("reward.options.text_accuracy.min_confidence must be a number in [0, 1]")


@dataclass(frozen=True)
class ObjectsOptions:
    """color, shape, relation, number: relative weights (>= 0) of the parts, one of them positive."""

    color: float = 1.0
    shape: float = 1.0
    relation: float = 1.0
    number: float = 1.0

    def __post_init__(self) -> None:
        weights = (self.color, self.shape, self.relation, self.number)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise RewardConfigError("reward.options.objects needs weights >= 0, and one of them > 0")


@dataclass(frozen=True)
class LpipsOptions:
    """backbone_weights: torchvision's AlexNet state dict; None looks in the torch hub cache."""

    backbone_weights: Path | str | None = None


@dataclass(frozen=True)
class StructureOptions:
    """reference: "source" or "target"; None is the source where there is one, else the target."""

    reference: str | None = None

    def __post_init__(self) -> None:
        _one_of("reward.options.structure.reference", self.reference, ("source", "target", None))


@dataclass(frozen=True)
class AestheticOptions:
    """clip_name: hub id (already in the local cache) or folder of a CLIP model. mlp_weights: the LAION predictor's
    state dict; None looks in the torch hub cache."""

    clip_name: str = "openai/clip-vit-large-patch14"
    mlp_weights: Path | str | None = None


@dataclass(frozen=True)
class ClipScoreOptions:
    """clip_name: hub id (already in the local cache) or folder of a CLIP model with its tokenizer."""

    clip_name: str = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class PickScoreOptions:
    """model_name, processor_name: hub ids (already in the local cache) or folders of the model and its tokenizer."""

    model_name: str = "yuvalkirstain/PickScore_v1"
    processor_name: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@dataclass(frozen=True)
class HpsV2Options:
    """weights: the file HPS_v2.1_compressed.pt; None looks in the local Hugging Face cache. architecture: the name
    that open_clip gives the model."""

    weights: Path | str | None = None
    architecture: str = "ViT-H-14"


@dataclass(frozen=True)
class ClipHOptions:
    """weights: the file open_clip_pytorch_model.bin of DFN5B-CLIP-ViT-H-14; None looks in the local Hugging Face
    cache. architecture: the name that open_clip gives the model."""

    weights: Path | str | None = None
    architecture: str = "ViT-H-14-quickgelu"


@dataclass(frozen=True)
class DifferentiableOptions:
    """Rewards with a gradient to the images: see ``rewards/differentiable.py``.

    weights: scorer ("clip_h", "hps_v2") -> its weight (> 0). method: "refl" or "srpo". threshold: a score above it
    counts no more. positive_words: put before the prompt that hps_v2 reads; empty = the prompt alone. negative_words,
    strength: of "srpo". Raises RewardConfigError.
    """

    weights: Mapping[str, float]
    method: str = "refl"
    threshold: float = 0.7
    positive_words: str = ""
    negative_words: str = "CG Render."
    strength: float = 0.1
    clip_h: ClipHOptions = field(default_factory=ClipHOptions)
    hps_v2: HpsV2Options = field(default_factory=HpsV2Options)

    def __post_init__(self) -> None:
        _one_of("dmdr.reward.method", self.method, ("refl", "srpo"))
        for name, weight in self.weights.items():
            _one_of("a scorer of dmdr.reward.weights", name, ("clip_h", "hps_v2"))
            if not 0 < weight < math.inf:
                raise RewardConfigError(f"dmdr.reward.weights.{name} must be a number > 0, got {weight}")
        if not self.weights:
            raise RewardConfigError("dmdr.reward.weights names no scorer")
        if self.method == "srpo" and "hps_v2" not in self.weights:
            raise RewardConfigError("dmdr.reward.method srpo concerns hps_v2, which dmdr.reward.weights does not name")
        if not (math.isfinite(self.threshold) and 0 < self.strength < math.inf):
            raise RewardConfigError("dmdr.reward needs a finite threshold and srpo_strength > 0")


@dataclass(frozen=True)
class RemoteOptions:
    """A server that scores: see ``rewards/remote.py``.

    url: the address below which /score and /health lie, without login or query. send: images that go out besides the
    generated one, of "target" and "source". batch_size: samples per request; concurrent_requests: how many are in
    flight at once. timeout_seconds: longest time for a request and its whole answer. retries: attempts after the first;
    the first of them waits backoff_seconds, and each further one twice as long, up to a minute. token_variable: the
    environment variable whose value is sent as a bearer token.
    """

    url: str
    send: tuple[str, ...] = ()
    batch_size: int = 8
    concurrent_requests: int = 2
    timeout_seconds: float = 120.0
    retries: int = 5
    backoff_seconds: float = 2.0
    token_variable: str | None = None

    def __post_init__(self) -> None:
        if re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", self.url) is None:  # never quoted: it may hold a secret
            raise RewardConfigError("the url of a remote reward must be http(s)://host[:port][/path], nothing more")
        for name in self.send:
            _one_of("send of a remote reward", name, ("target", "source"))
        if self.batch_size < 1 or self.concurrent_requests < 1 or self.retries < 0:
            raise RewardConfigError("a remote reward needs batch_size and concurrent_requests >= 1 and retries >= 0")
        if not (0 < self.timeout_seconds < math.inf and 0 <= self.backoff_seconds < math.inf):
            raise RewardConfigError("a remote reward needs timeout_seconds > 0 and backoff_seconds >= 0")


@dataclass(frozen=True)
class RewardOptions:
    """Options of all metrics. on_error: "error" ends the run at a sample that cannot be scored; "skip" gives that
    sample a NaN total and counts it in ``RewardResult.skipped``. remote: name -> the server of the metric
    ``remote/name``."""

    text_accuracy: TextAccuracyOptions = field(default_factory=TextAccuracyOptions)
    objects: ObjectsOptions = field(default_factory=ObjectsOptions)
    lpips: LpipsOptions = field(default_factory=LpipsOptions)
    structure: StructureOptions = field(default_factory=StructureOptions)
    aesthetic: AestheticOptions = field(default_factory=AestheticOptions)
    clip_score: ClipScoreOptions = field(default_factory=ClipScoreOptions)
    pick_score: PickScoreOptions = field(default_factory=PickScoreOptions)
    hps_v2: HpsV2Options = field(default_factory=HpsV2Options)
    remote: Mapping[str, RemoteOptions] = field(default_factory=dict)
    on_error: str = "error"

    def __post_init__(self) -> None:
        _one_of("reward.on_error", self.on_error, ("error", "skip"))
