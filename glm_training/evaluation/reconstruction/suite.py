"""Reconstructions as a suite: originals from a folder or tars, squashed to the autoencoder's size, through it and back,
and compared at a smaller size, as published evaluations do (448 px, then 256).

OUT/originals.jsonl       the number of each original and where it comes from
OUT/00000000.png ...      its reconstruction, at the size of the comparison
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glm_training.data.captioned.options import Reading, SetOptions
from glm_training.data.captioned.recognise import open_sets
from glm_training.data.captioned.samples import BadSample, ImageSet
from glm_training.data.pictures.images import decode_image
from glm_training.data.problems import DataError
from glm_training.evaluation.reconstruction.frechet import frechet_distance, moments_of
from glm_training.evaluation.reconstruction.inception import DIMENSION, Inception
from glm_training.evaluation.reconstruction.pixels import mean_squared_error, psnr, resized, similarities, squashed
from glm_training.evaluation.suites.files import lines_of, write_whole
from glm_training.evaluation.suites.protocol import (
    EvaluationError,
    Failure,
    Figure,
    Maker,
    Picture,
    Record,
    Scores,
    mean_of,
)
from glm_training.rewards.lpips_similarity import LpipsSimilarity
from glm_training.rewards.options import LpipsOptions
from glm_training.rewards.types import RewardBackendError, RewardBatch, from_pil
from glm_training.utils.console import Console
from glm_training.utils.hub_files import fetch_where_allowed
from glm_training.utils.pictures import as_saved, to_pil
from glm_training.utils.words import counted

ORIGINALS = "originals.jsonl"
_AT_ONCE = 256
"""Features that are decoded together."""


class Originals:
    """The pictures that are reconstructed: the first `first` of a folder or of webdataset tars, None for all.

    Raises DataError where `path` is no set of pictures.
    """

    def __init__(self, path: Path, first: int | None = None) -> None:
        (self._set,) = open_sets([SetOptions(path)], Reading(captions=False))
        self._count = len(self._set) if first is None else min(first, len(self._set))

    def __len__(self) -> int:
        return self._count

    @property
    def digest(self) -> str:
        """Changes with what is in the files."""
        told = json.dumps([self._count, sorted(self._set.digests().items())])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    @property
    def remarks(self) -> list[str]:
        """What of the set is left out."""
        faults = self._set.faults
        if not faults:
            return []
        verb = "counts" if len(faults) == 1 else "count"
        first = ": ".join(filter(None, (str(faults[0].path), faults[0].key, faults[0].reason)))
        return [f"{counted(len(faults), 'picture')} cannot be used and {verb} nowhere, first {first}."]

    def name(self, row: int) -> str:
        """The file that an original is in, and its name there."""
        path, key = self._set.where(row)
        return f"{path}: {key}" if key else str(path)

    def read(self, row: int, side: int) -> Tensor:
        """[1, 3, side, side] in [0, 1]: squashed. Raises EvaluationError naming a picture that cannot be read."""
        data: ImageSet = self._set
        try:
            return squashed(decode_image(data.where(row)[0], data.read(row).image), side)
        except (BadSample, DataError) as error:
            reason = error.fault.reason if isinstance(error, BadSample) else error.problems[0].reason
            raise EvaluationError(
                f"{self.name(row)} cannot be read: {reason}. Mend it, or take it out of --originals"
            ) from error


@dataclass(frozen=True)
class Sizes:
    """Sides in pixels: of what goes through the autoencoder, and of what is compared."""

    model: int
    compared: int


class Reconstruction:
    """inception, lpips: None leaves rFID or LPIPS out."""

    name = "reconstruction"

    def __init__(
        self, originals: Originals, sizes: Sizes, inception: Inception | None, lpips: LpipsSimilarity | None
    ) -> None:
        self._originals, self._sizes = originals, sizes
        self._inception, self._lpips = inception, lpips

    @property
    def judged_by(self) -> str:
        parts = ["pixels", *(["Inception"] if self._inception else []), *(["AlexNet"] if self._lpips else [])]
        return f"{', '.join(parts)} at {self._sizes.compared} px"

    @property
    def judge_settings(self) -> Mapping[str, Any]:
        return {"originals": self._originals.digest, "size": self._sizes.model}

    @property
    def drawing_settings(self) -> dict[str, Any]:
        """What decides the pictures besides the model."""
        return {**self.judge_settings, "compared": self._sizes.compared}

    def pictures(self) -> list[Picture]:
        """One of each original."""
        return [Picture(f"{row:08d}.png", self._originals.name(row), row) for row in range(len(self._originals))]

    def prepare(self, folder: Path) -> None:
        """Writes which original has which number."""
        listed = ({"picture": picture.path, "original": picture.prompt} for picture in self.pictures())
        write_whole(folder / ORIGINALS, lines_of(listed))

    def find(self, folder: Path) -> list[Picture]:
        """All of them: what is not in the folder is a failure. Raises EvaluationError where nothing is."""
        pictures = self.pictures()
        if not any((folder / picture.path).is_file() for picture in pictures):
            raise EvaluationError(f"--images {folder} holds no reconstructions 00000000.png, 00000001.png, ...")
        return pictures

    def check_judge(self) -> None:
        if self._inception is not None:
            self._inception.check()
        if self._lpips is not None:
            problems = fetch_where_allowed(self._lpips.wanted(), Console().line)
            try:
                self._lpips.check()
            except RewardBackendError as error:
                message = "\n".join([*problems, str(error)]).replace(
                    "set reward.options.lpips.backbone_weights to", "give --alexnet"
                )
                message = message.replace("reward.options.lpips.backbone_weights", "--alexnet")
                raise EvaluationError(f"{message}, or pass --no-lpips") from error

    def judge(self, pictures: list[tuple[Picture, Image.Image]]) -> list[Record | Failure]:
        return [self._record(picture, image) for picture, image in pictures]

    def _record(self, picture: Picture, image: Image.Image) -> Record | Failure:
        """One at a time: the networks' last digits depend on how many pictures they see together."""
        reference = self.reference(picture.index)
        drawn = from_pil(image)
        if drawn.shape != reference.shape:
            side = self._sizes.compared
            return Failure(f"has {image.width} x {image.height} px, not the {side} x {side} of the comparison")
        own, published = similarities(drawn, reference)
        record: Record = {
            "index": picture.index,
            "original": picture.prompt,
            "mse": mean_squared_error(drawn, reference).item(),
            "ssim": own.item(),
            "ssim_published": published.item(),
        }
        if self._lpips is not None:
            batch = RewardBatch(drawn, [""], targets=reference)
            record["lpips"] = 1 - self._lpips.score(batch).values.item()
        if self._inception is not None:
            features = self._inception.features(torch.cat([reference, drawn]))
            record["features"] = [_packed(row) for row in features]
        return record

    def reference(self, row: int) -> Tensor:
        """[1, 3, H, W] of 8 bits: what the reconstruction of an original is compared with."""
        return as_saved(resized(self._originals.read(row, self._sizes.model), self._sizes.compared))

    def maker(self, reconstruct: Callable[[Tensor], Tensor]) -> Maker:
        """Draws by `reconstruct`, which takes images [B, 3, H, W] in [0, 1] and gives as many of that size.

        Raises EvaluationError or ValueError, before anything is written, for a size that it does not take.
        """
        side = self._sizes.model
        with torch.no_grad():
            back = reconstruct(torch.zeros(1, 3, side, side)).shape[-1]
        if back != side:
            raise EvaluationError(
                f"pictures of {side} px come back with {back} px: give --size a multiple of what the autoencoder makes "
                "one place of its latents of"
            )

        def make(pictures: Sequence[Picture]) -> list[Image.Image]:
            images = torch.cat([self._originals.read(picture.index, side) for picture in pictures])
            with torch.no_grad():
                drawn = reconstruct(images)
            return [to_pil(image) for image in resized(drawn.float(), self._sizes.compared)]

        return make

    def score(self, records: list[Record]) -> Scores:
        scores = score(records)
        scores.remarks += self._originals.remarks
        return scores


def score(records: Sequence[Record]) -> Scores:
    """Means over pictures of PSNR, both readings of SSIM and LPIPS, and rFID of all of them.

    PSNR of identical pictures is infinite, and so is a mean with one of them.
    """
    values = [psnr(record["mse"]) for record in records]
    figures = [
        _mean("PSNR (dB)", values),
        _mean("SSIM", [record["ssim"] for record in records]),
        _mean("SSIM, published reading", [record["ssim_published"] for record in records]),
    ]
    remarks = ["SSIM, published reading: with the data range 2 for pictures in [0, 1], as published figures have it."]
    if all("lpips" in record for record in records):
        figures.append(_mean("LPIPS (AlexNet)", [record["lpips"] for record in records]))
    if all("features" in record for record in records):
        if len(records) > 1:
            figures.append(Figure("rFID", _rfid(records), None, len(records)))
        else:
            remarks.append("rFID needs two pictures or more.")
        if len(records) <= DIMENSION:
            remarks.append(
                f"rFID of {counted(len(records), 'picture')} is biased: published ones are of 50,000, and fewer than "
                f"{DIMENSION} do not span the features."
            )
    lines = [{name: value for name, value in record.items() if name != "features"} for record in records]
    return Scores(figures, lines, remarks)


def _mean(name: str, values: Sequence[float]) -> Figure:
    if not all(np.isfinite(values)):
        return Figure(name, float("inf"), None, len(values))
    return mean_of(name, {place: [value] for place, value in enumerate(values)})


def _rfid(records: Sequence[Record]) -> float:
    """In the order of the records, whoever judged them: the same to the last digit on any number of processes."""
    sides = [moments_of(_features(records, side), DIMENSION) for side in (0, 1)]
    return frechet_distance(*sides)


def _features(records: Sequence[Record], side: int) -> Iterable[Tensor]:
    for start in range(0, len(records), _AT_ONCE):
        yield torch.stack([_unpacked(record["features"][side]) for record in records[start : start + _AT_ONCE]])


def _packed(features: Tensor) -> str:
    """fp32 little-endian in base64."""
    return base64.b64encode(features.numpy().astype("<f4").tobytes()).decode("ascii")


def _unpacked(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32))


def alexnet(weights: Path | None) -> LpipsSimilarity:
    """LPIPS, from torchvision's AlexNet in a file, or in torch's cache."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return LpipsSimilarity(LpipsOptions(weights), device)
