"""What every section shares: strict types, no unknown keys, no change after loading."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from glm_training.utils.writable import is_too_long

Part = Literal["ar", "dit", "unet", "autoencoder", "generator"]
"""A trainable part: GLM-Image's autoregressive generator and its diffusion decoder, SDXL's UNet, VGT's two models."""


class Section(BaseModel):
    """A mapping of the YAML file. Values are taken as written: `"4"` is no integer and `true` is no number."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )


def _path(value: Any) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value
    _short(value)
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"There is no home folder of {Path(value).parts[0]}") from error


def _short(value: Any) -> Any:
    if isinstance(value, str) and is_too_long(value):
        raise ValueError("No file system takes a name of over 255 bytes, or a path of over 4095")
    return value


FilePath = Annotated[Path, BeforeValidator(_path)]
"""A file or folder; relative ones start at the current directory."""


PlaceName = Annotated[str, BeforeValidator(_short)]
"""A file or folder, or else a name with a meaning of its own."""


def no_as_text(value: Any) -> Any:
    """`no`, which YAML reads as false, back as the word."""
    return "no" if value is False else value
