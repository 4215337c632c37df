"""The metrics that come with the package, and the reward.options section with the options of each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from glm_training.config.sections.base import FilePath, PlaceName, Section, no_as_text

METRICS = ("lpips", "aesthetic", "text_accuracy", "objects", "structure", "clip_score", "pick_score", "hps_v2")
"""Metrics that come with the package; any other is named `remote/name`, `module:Class` or `path/to/file.py:Class`."""

REMOTE_PREFIX = "remote/"
"""Before the name of an entry of `reward.options.remote`: the metric that it computes."""


class TextAccuracyConfig(Section):
    """Reading the quoted text of the prompt off the image."""

    engine: Literal["rapidocr", "pytesseract"] = Field(default="rapidocr", description="OCR engine.")
    languages: list[Annotated[str, BeforeValidator(no_as_text), Field(pattern=r"^[\w+-]+$")]] = Field(
        default=[],
        description="What the engine reads, in its own words, as `[ch, ru, hi]` or `[eng, rus]`; `[]` = its default "
        "(rapidocr: Chinese, Japanese, English and the Latin scripts).",
        json_schema_extra={"allowed": "list of language codes"},
    )
    model_files: dict[str, FilePath] = Field(
        default={},
        description="rapidocr: ONNX file of the recogniser for a language, in place of RapidOCR's own.",
        json_schema_extra={"allowed": "mapping of language to file"},
    )
    extra_text_penalty: float = Field(
        default=0.2,
        ge=0,
        le=1_000_000,
        description="Taken off per wanted character's worth of text that nobody asked for.",
    )
    min_confidence: float = Field(
        default=0.5, ge=0, le=1, description="Readings of which the engine is less sure than this count as not read."
    )


class ObjectsConfig(Section):
    """Coloured shapes and how they stand to each other, against the target's: the weights of the parts."""

    color: float = Field(default=1.0, ge=0, le=1_000_000, description="Share of the objects that have their colour.")
    shape: float = Field(default=1.0, ge=0, le=1_000_000, description="Share of the objects that have their shape.")
    relation: float = Field(
        default=1.0,
        ge=0,
        le=1_000_000,
        description="Share of the pairs of unlike objects that stand to each other as in the target.",
    )
    number: float = Field(default=1.0, ge=0, le=1_000_000, description="How near the number of objects comes.")


class LPIPSConfig(Section):
    """Perceptual distance to the target."""

    backbone_weights: FilePath | None = Field(
        default=None, description="Its ImageNet weights; null = looked for in torch hub's cache."
    )


class AestheticConfig(Section):
    """LAION aesthetic predictor: an MLP on a CLIP embedding."""

    clip_name: PlaceName = Field(
        default="openai/clip-vit-large-patch14", min_length=1, description="Hub id or folder of the CLIP."
    )
    mlp_weights: FilePath | None = Field(
        default=None,
        description="Weights of the MLP (`sac+logos+ava1-l14-linearMSE`); null = looked for in torch hub's cache.",
    )


class StructureConfig(Section):
    """Structural similarity (SSIM)."""

    reference: Literal["source", "target"] | None = Field(
        default=None, description="Image to compare with; null = the source in i2i, the target in t2i."
    )


class ClipScoreConfig(Section):
    """CLIPScore: agreement of image and prompt."""

    clip_name: PlaceName = Field(
        default="openai/clip-vit-large-patch14", min_length=1, description="Hub id or folder of the CLIP."
    )


class PickScoreConfig(Section):
    """PickScore: human preference, by a CLIP."""

    model_name: PlaceName = Field(
        default="yuvalkirstain/PickScore_v1", min_length=1, description="Hub id or folder of the model."
    )
    processor_name: PlaceName = Field(
        default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        min_length=1,
        description="Hub id or folder of its tokenizer.",
    )


class HpsV2Config(Section):
    """HPSv2.1: human preference, by an open_clip model."""

    weights: FilePath | None = Field(
        default=None, description="The file `HPS_v2.1_compressed.pt`; null = looked for in the Hugging Face cache."
    )
    architecture: str = Field(default="ViT-H-14", min_length=1, description="open_clip's name of the model.")


class RemoteRewardConfig(Section):
    """A reward that a server computes; the metric is called `remote/<its name>`."""

    url: str = Field(
        pattern=r"^https?://[^\s/@?#]+(/[^\s@?#]*)?$",
        description="Address below which `/score` and `/health` lie.",
        json_schema_extra={
            "allowed": "`http(s)://host[:port][/path]` without a login or query; secrets go through `token_variable`"
        },
    )
    send: list[Literal["target", "source"]] = Field(
        default=[],
        description="Images that go out besides the generated one.",
        json_schema_extra={"allowed": "list of `target` and `source`"},
    )
    batch_size: int = Field(default=8, ge=1, le=65536, description="Samples per request.")
    concurrent_requests: int = Field(default=2, ge=1, le=65536, description="Requests in flight at once, per process.")
    timeout_seconds: float = Field(
        default=120.0,
        gt=0,
        le=1_000_000,
        description="Longest time for one request, from its sending to the last byte of the answer.",
    )
    retries: int = Field(default=5, ge=0, le=1_000_000, description="Attempts after the first one.")
    backoff_seconds: float = Field(
        default=2.0,
        ge=0,
        le=1_000_000,
        description="Wait before the first of them; it doubles each time, up to a minute.",
    )
    token_variable: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_]\w*$",
        description="Environment variable whose value is sent as a bearer token.",
        json_schema_extra={"allowed": "name of an environment variable or null"},
    )


REMOTE_DRIFT_FREE = frozenset(RemoteRewardConfig.model_fields) - {"url", "send"}
"""What of a remote reward cannot change its scores: a run may resume with other values without asking."""


class RewardOptionsConfig(Section):
    """Options of the metrics that come with the package."""

    text_accuracy: TextAccuracyConfig = TextAccuracyConfig()
    objects: ObjectsConfig = ObjectsConfig()
    lpips: LPIPSConfig = LPIPSConfig()
    aesthetic: AestheticConfig = AestheticConfig()
    structure: StructureConfig = StructureConfig()
    clip_score: ClipScoreConfig = ClipScoreConfig()
    pick_score: PickScoreConfig = PickScoreConfig()
    hps_v2: HpsV2Config = HpsV2Config()
    remote: dict[str, RemoteRewardConfig] = Field(
        default={},
        description="Rewards that servers compute, by name: the metric `remote/name`. Keys of each: "
        f"{', '.join(f'`{key}`' for key in RemoteRewardConfig.model_fields)}.",
        json_schema_extra={"allowed": "mapping of name to section"},
    )
