"""What is trained on: prompts with their images, pairs, or sets of captioned pictures."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from glm_training.config.sections.base import FilePath, Section

OWN_SIZE = "the model's own: 128 for `tiny` (vgt: 64), what its folder says, else 1024 (vgt: 448)"


class ImageSizeConfig(Section):
    """Size of generated, target and source images."""

    height: int = Field(
        default=1024,
        ge=32,
        le=8192,
        multiple_of=32,
        description="Pixels.",
        json_schema_extra={"default_text": OWN_SIZE},
    )
    width: int = Field(
        default=1024,
        ge=32,
        le=8192,
        multiple_of=32,
        description="Pixels.",
        json_schema_extra={"default_text": OWN_SIZE},
    )


BUCKET_MULTIPLES = {"glm_image": 32, "sdxl": 64}
"""Pixels of which both sides of a bucket are multiples, of the families whose pictures may have any shape."""


class BucketsConfig(Section):
    """Pictures in their own shapes: aspect-ratio buckets. `image_size` is then the area that none exceeds."""

    enabled: bool = Field(
        default=False,
        description="Each picture has the largest size of its own shape within the area of `image_size` and within "
        "itself, in multiples of 32 px (SDXL: 64); batches have one size. For finetuning, `dpo` and rewards.",
        json_schema_extra={"default_text": "true for `images` of GLM-Image and SDXL without `image_size`, else false"},
    )
    upscale: bool = Field(default=False, description="Smaller pictures are enlarged to that area.")
    smallest: int = Field(
        default=64,
        ge=32,
        le=8192,
        multiple_of=32,
        description="Pixels of the shortest side of a bucket; a picture with a shorter one is left out, or at fault.",
    )


class ImageSetConfig(Section):
    """A set of captioned pictures, an entry of `data.images`."""

    path: FilePath = Field(
        description="A folder or file (docs/data_at_scale.md), or the id of a dataset on the Hugging Face Hub."
    )
    weight: float | None = Field(
        default=None, gt=0, le=1_000_000, description="Its share of what is drawn; for all sets or for none."
    )
    repeats: int = Field(
        default=1, ge=1, le=1_000_000, description="Without weights: how often each of its samples comes in an epoch."
    )
    cap_source: str | None = Field(
        default=None,
        min_length=1,
        description="Key of captions in JSON, or column of a table; null = `caption`, or a .txt where there is one; "
        "of columns `prompt`, `caption`, `text` and their like.",
    )
    root: FilePath | None = Field(
        default=None, description="Folder where the paths of a listing start; null = the listing's own."
    )
    split: str | None = Field(
        default=None, min_length=1, description="Of a Hugging Face dataset; null = `train`, or the only one."
    )


def _image_sets(value: Any) -> Any:
    """`a/folder` as `[{path: a/folder}]`; so, too, inside a list. Raises ValueError with what is wrong in an entry."""
    entries = [value] if isinstance(value, str | dict) else value
    if not isinstance(entries, list):
        return value
    entries = [{"path": entry} if isinstance(entry, str) else entry for entry in entries]
    for number, entry in enumerate(entries, start=1):
        _check_entry(number, entry)
    return entries


def _check_entry(number: int, entry: Any) -> None:
    known = list(ImageSetConfig.model_fields)
    if not isinstance(entry, dict):
        raise ValueError(f"Entry {number} is neither a path nor a mapping with the keys {', '.join(known)}")
    for key in entry:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"Entry {number} has the unknown key `{key}`: {hint}")
    try:
        ImageSetConfig.model_validate(entry)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"Entry {number}, `{first['loc'][0]}`: {first['msg']}") from error


class DataConfig(Section):
    """Prompts and images. Line i of the prompts goes with `i.png` (or .jpg, .jpeg, .webp) of each folder."""

    prompts_file: FilePath | None = Field(
        default=None,
        description="One prompt per line.",
        json_schema_extra={"default_text": "`data/<mode>/prompts.txt`, or null with `metadata_file`"},
    )
    source_images_dir: FilePath | None = Field(
        default=None,
        description="Images to edit (i2i).",
        json_schema_extra={"default_text": "`data/i2i/source_images` in i2i without `metadata_file`, else null"},
    )
    target_images_dir: FilePath | None = Field(
        default=None,
        description="Images to reach; null = `reward.target_images_dir`. If both are given they must agree.",
    )
    pairs: FilePath | None = Field(
        default=None,
        description="DPO: preference pairs, as a folder with metadata.jsonl, a human_feedback.json list or a Hugging "
        "Face dataset on disk.",
    )
    pairs_split: str = Field(default="train", min_length=1, description="DPO: split of a Hugging Face dataset.")
    metadata_file: FilePath | None = Field(
        default=None,
        description="JSON lines with a prompt and its images each, in place of `prompts_file`; paths start at its "
        "folder, or at the folders above where those are given.",
    )
    images: Annotated[list[ImageSetConfig], BeforeValidator(_image_sets)] | None = Field(
        default=None,
        min_length=1,
        description="Captioned pictures, in place of prompts: a folder of pictures, metadata.jsonl or another table, "
        "prompts.txt, webdataset tars, a listing, a Hugging Face dataset (docs/data_at_scale.md). Told by content.",
        json_schema_extra={
            "allowed": "path, list of paths and of `{path, weight, repeats, cap_source, root, split}`, or null",
        },
    )
    crop: Literal["center", "random"] = Field(
        default="center", description="`images`: where a picture is cut once it covers the size."
    )
    min_side: int = Field(
        default=80,
        ge=0,
        le=65536,
        description="`images`: a picture with a side of at most this many pixels is left out, and counted; 0 = none.",
        json_schema_extra={"default_text": "80, or below `image_size` where that is smaller"},
    )
    max_aspect: float = Field(
        default=10.0,
        ge=1,
        le=1_000_000,
        description="`images`: so is one whose longer side is more than this many times the shorter.",
    )
    index_dir: FilePath | None = Field(
        default=None,
        description="`images`: where indexes of tars are kept, for several runs; null = `cache` in `output_dir`.",
    )
    trigger_word: str | None = Field(
        default=None,
        min_length=1,
        description="`images`: goes before each caption that does not hold it, and is the caption of pictures without.",
    )
    caption_dropout: float = Field(
        default=0.0, ge=0, le=1, description="`images`: share of pictures that are trained on with an empty caption."
    )
    validation: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="`images`: share of the pictures that is held out to judge by, chosen by what is in them; at least "
        "one, of 32 and more at least four; 0 = none.",
        json_schema_extra={
            "default_text": "0.05 in supervised finetuning of GLM-Image and SDXL without `evaluation.eval_images`, "
            "else 0"
        },
    )
    num_workers: int = Field(
        default=4, ge=0, le=1024, description="Threads that decode images ahead; 0 = decode when needed."
    )
    shuffle: bool = Field(default=True, description="New order in every epoch, from `seed`; false = file order.")
    pin_memory: bool = Field(default=True, description="Page-locked memory for copies to the GPU.")
    augmentation: bool = Field(
        default=False,
        description="Flip images, target and source alike; not where the prompt quotes text or names a side.",
    )
    max_bad_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of prompts, or of `images`, that may be left out because they are at fault; 0 = none.",
    )
    image_size: ImageSizeConfig = ImageSizeConfig()
    buckets: BucketsConfig = BucketsConfig()
