"""What the OCR engines can read: which model a language needs, where its file lies, and the characters it knows.

    python -m glm_training.rewards.ocr_models ru hi

fetches RapidOCR's models of these languages to where they are looked for; a run does so by itself.
"""

from __future__ import annotations

import argparse
import struct
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glm_training.rewards.types import RewardBackendError
from glm_training.utils.console import Console
from glm_training.utils.downloads import AddressFile, DownloadError
from glm_training.utils.writable import expanded

DEFAULT_LANGUAGE = "ch"
"""Chinese, Japanese, English and the Latin scripts in one model, which lies in RapidOCR's wheel."""

_KEY = "reward.options.text_accuracy"
_KINDS = (("PP-OCRv6", "small"), ("PP-OCRv5", "mobile"), ("PP-OCRv4", "mobile"))
"""Generation and size of RapidOCR's recognisers, the preferred first."""

_MODEL_OF = {
    **dict.fromkeys(("ru", "uk", "be"), "eslav"),
    **dict.fromkeys(("bg", "mk", "sr", "rs_cyrillic", "mn", "kk", "ky", "tg", "tt"), "cyrillic"),
    **dict.fromkeys(("fa", "ur", "ug", "ps"), "arabic"),
    **dict.fromkeys(("hi", "mr", "ne", "sa", "bho", "mai"), "devanagari"),
}
"""Language codes for which RapidOCR has the name of a script."""

_SCRIPTS = {
    "CYRILLIC": "cyrillic",
    "ARABIC": "arabic",
    "DEVANAGARI": "devanagari",
    "HANGUL": "korean",
    "THAI": "th",
    "GREEK": "el",
    "TAMIL": "ta",
    "TELUGU": "te",
    "GEORGIAN": "ka",
}
"""First word of a character's Unicode name -> the language whose model has such characters."""


def languages_for(characters: Iterable[str]) -> list[str]:
    """The languages whose RapidOCR models have the scripts of `characters`, where there are some."""
    scripts = (unicodedata.name(character, "").replace("-", " ").partition(" ")[0] for character in characters)
    return list(dict.fromkeys(_SCRIPTS[script] for script in scripts if script in _SCRIPTS))


def recogniser_of(language: str) -> AddressFile:
    """RapidOCR's recogniser for a language or script, where RapidOCR keeps it. Raises RewardBackendError naming those
    that there are."""
    import rapidocr
    from rapidocr import ModelType, OCRVersion
    from rapidocr.inference_engine.base import FileInfo, InferSession
    from rapidocr.utils.typings import EngineType, TaskType

    name = _MODEL_OF.get(language.lower(), language)
    for version, size in _KINDS:
        wanted = FileInfo(EngineType.ONNXRUNTIME, OCRVersion(version), TaskType.REC, name, ModelType(size))
        try:
            found: Any = InferSession.get_model_url(wanted)
        except ValueError:
            continue
        url = found["model_dir"]
        place = Path(rapidocr.__file__).parent / "models" / url.rpartition("/")[2]
        return AddressFile("text_accuracy", url, place, found["SHA256"])
    raise RewardBackendError(
        f"text_accuracy: RapidOCR has no model for the language {language!r} of {_KEY}.languages; it has "
        f"{', '.join(_supported())}. A model of your own goes into {_KEY}.model_files"
    )


def _supported() -> list[str]:
    from rapidocr import ModelType, OCRVersion
    from rapidocr.utils.model_resolver import list_supported_langs
    from rapidocr.utils.typings import TaskType

    found = [list_supported_langs(TaskType.REC, OCRVersion(version), ModelType(size)) for version, size in _KINDS]
    return sorted({name for names in found for name in names} | set(_MODEL_OF))


def recogniser_file(language: str, model_files: Mapping[str, Path | str]) -> Path:
    """The ONNX file that reads `language`: the one given for it, or RapidOCR's. Never fetches anything.

    Raises RewardBackendError with the file and what to do where it is absent or no recogniser.
    """
    if language in model_files:
        path = expanded(model_files[language])
        if not path.is_file():
            raise RewardBackendError(f"text_accuracy: {_KEY}.model_files.{language}: there is no file {path}")
        _check_recogniser(path, f"{_KEY}.model_files.{language} needs a recogniser in ONNX")
        return path
    model = recogniser_of(language)
    if language == DEFAULT_LANGUAGE and not model.path.is_file():
        raise RewardBackendError(
            f"text_accuracy: this rapidocr has no {model.path.name} among its own models; run `pip install "
            f"--force-reinstall 'rapidocr==3.10.0'`, or set {_KEY}.engine: pytesseract"
        )
    fetch = f"`python -m glm_training.rewards.ocr_models {language}`"
    if not model.path.is_file():
        raise RewardBackendError(
            f"text_accuracy: the model for the language {language!r} is not here: {model.path}. Where there is a "
            f"network run {fetch}, which fetches {model.url}; or set {_KEY}.model_files.{language} to where "
            f"{model.path.name} lies"
        )
    _check_recogniser(model.path, f"remove it and fetch it anew by {fetch}")
    return model.path


def dictionary_of(path: Path) -> Path | None:
    """The list of characters beside a recogniser that does not hold its own, one a line."""
    beside = path.with_suffix(".txt")
    return beside if beside.is_file() else None


def _check_recogniser(path: Path, remedy: str) -> None:
    from onnxruntime import InferenceSession

    try:
        metadata = InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_modelmeta().custom_metadata_map
    except Exception as error:  # onnxruntime has a class of its own for every kind of broken file
        raise RewardBackendError(f"text_accuracy: {path} cannot be loaded ({error}); {remedy}") from error
    if "character" not in metadata and dictionary_of(path) is None:
        raise RewardBackendError(
            f"text_accuracy: {path} does not say which characters it knows: it has no `character` in its metadata, and "
            f"no list of them lies beside it as {path.with_suffix('.txt').name}, one a line"
        )


_LSTM_UNICHARSET = 21
"""Place of the recogniser's characters among the parts of a traineddata file."""

_NOT_CHARACTERS = {"NULL", "Joined", "|Broken|0|1"}


def tesseract_characters(file: Path) -> frozenset[str]:
    """What a language of tesseract can read, from its traineddata file: a table of offsets, then its parts, of which
    the one with the characters has one a line, first on it. Raises ValueError for another kind of file."""
    data = file.read_bytes()
    try:
        (count,) = struct.unpack_from("<i", data)
        offsets = struct.unpack_from(f"<{count}q", data, 4)
        start = offsets[_LSTM_UNICHARSET]
        end = min([offset for offset in offsets if offset > start], default=len(data))
        lines = data[start:end].decode("utf-8").splitlines() if start > 0 else []
        stated = int(lines[0])
    except (struct.error, IndexError, ValueError, MemoryError) as error:
        raise ValueError(f"{file} is no traineddata file of tesseract 4 or later") from error
    characters = [line.partition(" ")[0] for line in lines[1 : stated + 1]]
    return frozenset(characters) - _NOT_CHARACTERS


def fetch(language: str) -> Path:
    """Fetches the model of `language` to where RapidOCR keeps it. Raises RewardBackendError."""
    model = recogniser_of(language)
    try:
        model.fetch()
    except DownloadError as error:
        raise RewardBackendError(
            f"{error}; fetch {model.url} elsewhere and set {_KEY}.model_files.{language} to the file"
        ) from error
    return model.path


def main() -> int:
    """Fetches the models of the languages in the arguments; 2 where one cannot be had."""
    parser = argparse.ArgumentParser(description="Fetch RapidOCR's models of languages for reward text_accuracy.")
    parser.add_argument("languages", nargs="+", metavar="LANGUAGE", help="as in reward.options.text_accuracy.languages")
    failed = False
    for language in parser.parse_args().languages:
        try:
            Console().line(f"{language}: {fetch(language)}")
        except RewardBackendError as error:
            Console().error(f"{language}: {error}")
            failed = True
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
