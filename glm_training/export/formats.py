"""The files of an export: a stock pipeline, adapters, or the trained parts alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from glm_training.export.lora import write_adapters
from glm_training.export.models import base_folder, folder_of, merged_model, skeleton_of, trainers_model, whole_model
from glm_training.export.source import ExportError, Kind, Source
from glm_training.models.family import Family
from glm_training.models.run_folders import PIPELINE
from glm_training.models.vgt.family import VGT
from glm_training.utils.tensor_file import share_files

Format = Literal["pipeline", "lora", "safetensors"]

ONE_FILE = "1000GB"
"""Larger than any network: stock `save_pretrained` cuts its files at so many bytes."""


@dataclass(frozen=True)
class Wanted:
    """What is to be written of a source. `dtype`: None keeps every tensor's own."""

    source: Source
    format: Format
    kind: Kind
    merge: bool
    dtype: torch.dtype | None

    def check(self) -> None:
        """Raises ExportError where the format does not fit what was trained."""
        adapted = self.source.adapted
        if self.format == "lora" and not adapted:
            raise ExportError(
                f"the run trained the whole {' and '.join(self.source.whole)} and no adapters: choose --format "
                "pipeline or safetensors"
            )
        if self.format == "lora" and self.merge:
            raise ExportError(
                "--merge puts adapters into the weights: choose --format pipeline or safetensors for that"
            )
        if self.format != "lora" and adapted and not self.merge:
            raise ExportError(
                f"the run trained adapters of the {' and '.join(adapted)}, which --format {self.format} cannot hold: "
                "add --merge, or choose --format lora"
            )

    @property
    def copies(self) -> bool:
        """Whether the files are those of the checkpoint as they are."""
        written = self.source.as_written(self.kind) and self.source.pipeline is not None
        return written and self.dtype is None and self.format != "lora" and not self.source.on_another_base

    @property
    def folders(self) -> list[str]:
        """How the names of the files in the checkpoint's pipeline begin that are written; nothing for all."""
        return [""] if self.format == "pipeline" else [f"{folder_of(part)}/" for part in self.source.config.parts()]

    def model(self) -> Family:
        """The model that is written, in memory; for what is no copy. Raises ExportError and ModelLoadError."""
        source, dtype = self.source, self.dtype
        own = getattr(torch, source.config.model.torch_dtype)
        written = source.as_written(self.kind) and not source.on_another_base
        if source.pipeline is not None and written and dtype is not None and not self._has_lost(own, dtype):
            return whole_model(source, dtype)
        if source.adapted:
            return merged_model(source, self.kind, dtype)
        family = trainers_model(source, self.kind, dtype or own)
        if dtype is not None:
            for part in source.whole:
                for parameter in family.trainable(part).values():
                    parameter.data = parameter.data.to(dtype)
        return family

    def _has_lost(self, own: torch.dtype, dtype: torch.dtype) -> bool:
        """Whether the adapters in the checkpoint's pipeline were rounded to what `dtype` can tell apart, and can be
        merged anew: what the optimizer averaged beside them is in the pipeline alone."""
        anew = bool(self.source.adapted) and not (self.kind == "shown" and self.source.whole)
        return anew and torch.promote_types(own, dtype) != own

    def bytes_needed(self) -> int:
        """About what is written, from above."""
        files = self.source.manifest.files
        if self.format == "lora":
            return 3 * sum(record.size for name, record in files.items() if name.startswith("lora_"))
        copied = [
            record.size
            for name, record in files.items()
            if any(name.startswith(f"{PIPELINE}/{folder}") for folder in self.folders)
        ]
        if copied:
            return 2 * sum(copied) if self.dtype == torch.float32 else sum(copied)
        folder = base_folder(self.source.config, self.source.base)
        weights = 0 if folder is None else sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        return 2 * weights if self.dtype == torch.float32 else weights


def write(wanted: Wanted, folder: Path, base: str | None) -> None:
    """Writes an export's files, without its card, into the empty `folder`. Raises ExportError, ModelLoadError, OSError.

    A copy loads no model; anything else needs the memory of one.
    """
    source = wanted.source
    if wanted.format == "lora":
        adapters = [source.adapter(part, wanted.kind) for part in source.adapted]
        write_adapters(folder, adapters, wanted.dtype, base, layers_per_block(source))
    elif wanted.copies:
        _copy(source, folder, wanted.folders)
    elif wanted.format == "pipeline":
        wanted.model().save_pretrained(folder)
    else:
        family = wanted.model()
        for part in source.config.parts():
            save_part(family, part, folder / folder_of(part))
    share_files(folder)


def save_part(family: Family, part: str, folder: Path) -> None:
    """One part alone, in one file, as its stock class reads it."""
    module: Any = family.module(part)
    if isinstance(family, VGT):
        module.save_pretrained(folder)  # without the teacher, which is no part of it
    else:
        module.save_pretrained(str(folder), safe_serialization=True, max_shard_size=ONE_FILE)


def _copy(source: Source, target: Path, folders: list[str]) -> None:
    """Files of the checkpoint's pipeline, verified as they are read."""
    start = f"{PIPELINE}/"
    names = [name for name in source.manifest.files if name.startswith(start)]
    names = [name for name in names if any(name.removeprefix(start).startswith(folder) for folder in folders)]
    source.verify(*names)
    for name in names:
        place = target / name.removeprefix(start)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.files / name, place)


def layers_per_block(source: Source) -> int | None:
    """Of SDXL's UNet, from its configuration alone; None for another model. Raises ExportError where it is not here."""
    if source.family != "sdxl":
        return None
    file = None if source.pipeline is None else source.pipeline / "unet" / "config.json"
    if file is not None:
        return int(json.loads(file.read_text(encoding="utf-8"))["layers_per_block"])
    skeleton: Any = skeleton_of(source.config, source.base, "unet")
    if skeleton is None:
        raise ExportError(
            f"the configuration of {source.base} is not here, which says how the layers are called in kohya's format: "
            "name a folder, or a hub id that is in the local cache, with --base"
        )
    return int(skeleton.config["layers_per_block"])
