"""Reading the text in images: RapidOCR (ONNX, models inside its wheel) or tesseract.

RapidOCR's own call upsizes every image to 736 px for the detector and pads every crop to 320 px for the recogniser.
Here the detector sees an image at its own size, between 128 and 640 px on the longer side (above that it splits large
letters), crops are taken from the full image and padded to the next multiple of 32. Images are read one at a time by
single-threaded sessions on a small thread pool: batching them gained nothing (benchmarks/ocr.py), and one at a time a
reading does not depend on the batch an image sits in.
"""

from __future__ import annotations

import copy
import math
import os
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from glm_training.rewards.ocr_models import DEFAULT_LANGUAGE, dictionary_of, recogniser_file, tesseract_characters
from glm_training.rewards.options import TextAccuracyOptions
from glm_training.rewards.types import RewardBackendError, RewardSampleError, load_all, to_uint8

DETECTOR_SIDES = (128, 640)
CROP_HEIGHT = 48
CROP_WIDTH_STEP = 32
_TESSERACT_SIDE = 256


class TextReader(Protocol):
    """Reads one image. characters: all that it can read; None where the engine does not tell."""

    characters: frozenset[str] | None

    def read(self, pixels: np.ndarray) -> list[str]:
        """[H, W, 3] uint8 RGB -> its text lines, top to bottom. Raises RewardSampleError when reading fails."""


@lru_cache(maxsize=4)
def load_reader(options: TextAccuracyOptions) -> TextReader:
    """The engine of ``options``, loaded once per process. Raises RewardBackendError naming what to install."""
    if options.engine == "rapidocr":
        return RapidOcrReader(options)
    return TesseractReader(options)


def read_lines(images: torch.Tensor, reader: TextReader) -> list[list[str] | RewardSampleError]:
    """Lines of each of the [B, 3, H, W] images in [0, 1], or the error that reading it gave. Uses as many threads as
    torch does in this process (OMP_NUM_THREADS)."""

    def attempt(pixels: np.ndarray) -> list[str] | RewardSampleError:
        try:
            return reader.read(pixels)
        except RewardSampleError as error:
            return error

    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        return list(pool.map(attempt, to_uint8(images)))


def read_texts(images: torch.Tensor, options: TextAccuracyOptions | None = None) -> list[list[str]]:
    """Text lines of each image, top to bottom.

    images: [B, 3, H, W] float in [0, 1]. Raises RewardBackendError (engine missing), RewardSampleError (engine failed).
    """
    texts: list[list[str]] = []
    for position, lines in enumerate(read_lines(images, load_reader(options or TextAccuracyOptions()))):
        if isinstance(lines, RewardSampleError):
            raise RewardSampleError(f"image {position}: {lines}") from lines
        texts.append(lines)
    return texts


class RapidOcrReader:
    """PP-OCR's detector from the rapidocr wheel, and a recogniser for each language, each reading every region: the
    surest one counts, of equals the first. Never downloads."""

    def __init__(self, options: TextAccuracyOptions) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # or onnxruntime leaves an id in the home folder
        try:
            import cv2
            from rapidocr import RapidOCR
            from rapidocr.ch_ppocr_det import TextDetector
            from rapidocr.ch_ppocr_det.utils import ResizeImgError
            from rapidocr.ch_ppocr_rec import TextRecognizer
            from rapidocr.inference_engine.onnxruntime.main import ONNXRuntimeError
        except ImportError as error:
            raise RewardBackendError(
                f"text_accuracy: rapidocr does not import ({error}); run `pip install 'rapidocr>=3.10' onnxruntime`, "
                "or set reward.options.text_accuracy.engine: pytesseract"
            ) from error
        self._failures: tuple[type[Exception], ...] = (ONNXRuntimeError, ResizeImgError, cv2.error)
        files = load_all(
            partial(recogniser_file, language, dict(options.model_files))
            for language in options.languages or (DEFAULT_LANGUAGE,)
        )
        # Building RapidOCR loads no model: it parses the settings. A model_path switches its downloader off.
        config: Any = RapidOCR(
            params={"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1}
        ).cfg
        for part in (config.Det, config.Rec):
            part.engine_cfg = config.EngineConfig.onnxruntime
            part.lang_type = DEFAULT_LANGUAGE  # decides nothing once the files are given
        config.Rec.font_path = None
        config.Det.model_path = str(_bundled_detector(config.Det))
        self._min_confidence = options.min_confidence
        self._detector: Any = TextDetector(config.Det)
        self._recognizers: list[Any] = []
        for file in dict.fromkeys(files):
            settings = copy.deepcopy(config.Rec)
            dictionary = dictionary_of(file)
            settings.model_path, settings.rec_keys_path = str(file), None if dictionary is None else str(dictionary)
            self._recognizers.append(TextRecognizer(settings))
        # the first character is CTC's blank
        self.characters: frozenset[str] | None = frozenset(
            text for recognizer in self._recognizers for text in recognizer.postprocess_op.character[1:]
        )

    def read(self, pixels: np.ndarray) -> list[str]:
        """See TextReader."""
        try:
            readings = [self._recognize(crop) for crop in self._crops(np.ascontiguousarray(pixels[:, :, ::-1]))]
        except self._failures as error:
            size = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise RewardSampleError(f"rapidocr failed on a {size} image: {error}") from error
        return [text for text, confidence in readings if text.strip() and confidence >= self._min_confidence]

    def _crops(self, image: np.ndarray) -> list[np.ndarray]:
        """[H, W, 3] BGR -> the upright text regions, in reading order."""
        from rapidocr.ch_ppocr_det.utils import DetPreProcess
        from rapidocr.utils.process_img import get_rotate_crop_image

        smallest, largest = DETECTOR_SIDES
        height, width = image.shape[:2]
        limit = (largest, "max") if max(height, width) > largest else (smallest, "min")
        resized = DetPreProcess(*limit, self._detector.mean, self._detector.std)(image)
        if resized is None:
            raise RewardSampleError(f"a {width}x{height} image is too thin for the text detector")
        boxes, _ = self._detector.postprocess_op(self._detector.session(resized), (height, width))
        return [get_rotate_crop_image(image, box) for box in self._detector.sorted_boxes(np.float32(boxes))]

    def _recognize(self, crop: np.ndarray) -> tuple[str, float]:
        """One region -> its text and confidence in [0, 1]."""
        height, width = crop.shape[:2]
        padded = math.ceil(CROP_HEIGHT * width / height / CROP_WIDTH_STEP) * CROP_WIDTH_STEP
        readings = []
        for recognizer in self._recognizers:
            # It takes the padded width as a ratio and rounds down; half a pixel keeps it from losing one.
            pixels = recognizer.resize_norm_img(crop, (padded + 0.5) / CROP_HEIGHT)
            (reading,), _ = recognizer.postprocess_op(recognizer.session(pixels[None]))
            readings.append(reading)
        text, confidence = max(readings, key=lambda reading: reading[1])
        return logical_order(text), confidence


def logical_order(text: str) -> str:
    """A line as it is read, from one as it is seen from left to right: what is written from the right is turned round.

    Numbers keep their order. Where letters of both directions stand in a line, each part stays in its place: what the
    line as a whole runs like cannot be seen.
    """
    kinds = [unicodedata.bidirectional(character) for character in text]
    if not {"R", "AL"} & set(kinds):
        return text
    if "L" not in kinds:
        return _turned(text)
    parts, start = [], 0
    for index in range(1, len(text) + 1):
        if index == len(text) or (kinds[index] == "L") != (kinds[start] == "L"):
            part = text[start:index]
            core = part.strip() if kinds[start] != "L" else ""
            parts.append(part.replace(core, _turned(core)) if core else part)
            start = index
    return "".join(parts)


def _turned(text: str) -> str:
    """`text` backwards, numbers in it forwards."""
    return re.sub(r"\d+(?:[.,:/]\d+)*", lambda match: match[0][::-1], text[::-1])


def _bundled_detector(part: Any) -> Path:
    """The wheel's detector."""
    import rapidocr
    from rapidocr.inference_engine.base import FileInfo, InferSession

    wanted = FileInfo(part.engine_type, part.ocr_version, part.task_type, part.lang_type, part.model_type)
    name = Path(InferSession.get_model_url(wanted)["model_dir"]).name
    path = Path(rapidocr.__file__).parent / "models" / name
    if not path.is_file():
        raise RewardBackendError(
            f"text_accuracy: this rapidocr has no {name} among its own models; run `pip install --force-reinstall "
            "'rapidocr==3.10.0'`, or set reward.options.text_accuracy.engine: pytesseract"
        )
    return path


@dataclass(frozen=True)
class _Word:
    line: tuple[int, int, int]
    text: str
    confidence: float


class TesseractReader:
    """The tesseract program through the pytesseract package: for documents rather than for coloured signs."""

    def __init__(self, options: TextAccuracyOptions) -> None:
        missing = []
        if find_spec("pytesseract") is None:
            missing.append("the Python package: `pip install 'glm_training[pytesseract]'`")
        if shutil.which("tesseract") is None:
            missing.append("the tesseract program: `apt-get install tesseract-ocr`")
        if missing:
            raise RewardBackendError(f"text_accuracy: engine pytesseract lacks {' and '.join(missing)}")
        import pytesseract

        self._tesseract: Any = pytesseract
        languages = options.languages or ("eng",)
        self._language = "+".join(languages)
        self._min_confidence = options.min_confidence
        installed = pytesseract.get_languages()
        absent = [code for code in self._language.split("+") if code not in installed]
        if absent:
            raise RewardBackendError(
                f"text_accuracy: tesseract has no language {absent} (it has {installed}); "
                f"run `apt-get install {' '.join('tesseract-ocr-' + code.replace('_', '-') for code in absent)}`"
            )

        self.characters = _tesseract_characters(self._language.split("+"))

    def read(self, pixels: np.ndarray) -> list[str]:
        """See TextReader."""
        # Colours cost tesseract most: of 24 coloured signs it read 5 as they are, 17 in stretched grey as one block.
        image = ImageOps.autocontrast(Image.fromarray(pixels).convert("L"))
        factor = math.ceil(_TESSERACT_SIDE / max(image.size))
        if factor > 1:
            image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
        try:
            table = self._tesseract.image_to_data(
                image, lang=self._language, config="--psm 6", output_type=self._tesseract.Output.DICT
            )
        except self._tesseract.TesseractError as error:
            raise RewardSampleError(f"tesseract failed: {error}") from error
        columns = (table["block_num"], table["par_num"], table["line_num"], table["text"], table["conf"])
        words = [_Word(tuple(row[:3]), row[3].strip(), float(row[4]) / 100) for row in zip(*columns, strict=True)]
        return _lines([word for word in words if word.text and word.confidence >= self._min_confidence])


def _tesseract_characters(languages: Sequence[str]) -> frozenset[str] | None:
    """What the languages' files say they can read; None where the files are not found or do not say it."""
    listing = subprocess.run(["tesseract", "--list-langs"], capture_output=True, text=True, check=False)
    stated = re.search(r'"([^"\n]+)"', listing.stdout + listing.stderr)
    folder = stated[1] if stated is not None else os.environ.get("TESSDATA_PREFIX")
    if folder is None:
        return None
    try:
        found = [tesseract_characters(Path(folder) / f"{language}.traineddata") for language in languages]
    except (OSError, ValueError):
        return None
    return frozenset().union(*found)


def _lines(words: Sequence[_Word]) -> list[str]:
    """Words in reading order -> their lines."""
    lines: dict[tuple[int, int, int], list[str]] = {}
    for word in words:
        lines.setdefault(word.line, []).append(word.text)
    return [" ".join(texts) for texts in lines.values()]
