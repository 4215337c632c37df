"""Which text the OCR engines can read: alphabets out of their models, languages, files; what is said before training.

No font is needed: a recogniser for another script is the bundled one with other names for its letters.
"""

from __future__ import annotations

import hashlib
import socket
import struct
import unicodedata
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import rapidocr
import torch

from glm_training.cli.validate import validate
from glm_training.config import ConfigError
from glm_training.rewards import (
    RewardBackendError,
    RewardBatch,
    RewardCalculator,
    RewardOptions,
    RewardSampleError,
    TextAccuracyOptions,
    ocr_models,
    read_texts,
    word_accuracy,
)
from glm_training.rewards.ocr import load_reader, logical_order
from glm_training.rewards.ocr_models import fetch, languages_for, recogniser_of, tesseract_characters
from glm_training.rewards.text_accuracy import unreadable
from glm_training.utils.downloads import AddressFile
from tests.runs import config_of, write_config

ALPHABET = frozenset("abcdefghijklmnopqrstuvwxyz0123456789.,'\"-!?é" + "İßﬁ½①")
CYRILLIC = dict(zip("OPENABCD", "ОПЕНАБЦД", strict=True))


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("OPEN 24, don’t – “stop” „now“!", ""),
        ("ＯＰＥＮ", ""),  # full width
        (unicodedata.normalize("NFD", "Café"), ""),
        ("Cafè " + unicodedata.normalize("NFD", "è"), "è"),
        ("ﬁsh oﬀ", ""),  # ligatures come apart
        ("Straße STRASSE", ""),
        ("½ ①", ""),  # as the alphabet's own come to: 1⁄2 and 1
        ("İstanbul", ""),
        ("soft\u00adhy\u200bphen\u200d \u2066left\u2069", ""),  # nobody sees these
        ("Привет OPEN пир", "привет"),
        ("٣ 3", "٣"),
        ("🎉🎉 a ❤\ufe0f", "🎉❤"),
        ("नमस्ते", "नमस्ते"),
        ("...…", ""),
    ],
)
def test_characters_are_compared_as_they_are_scored(text: str, missing: str) -> None:
    assert unreadable(f"a sign \u300c{text}\u300d", ALPHABET) == "".join(dict.fromkeys(missing))


def test_what_is_not_quoted_need_not_be_read() -> None:
    assert unreadable('вывеска "OPEN"', ALPHABET) == "" and unreadable('"Привет"', None) == ""


def test_the_alphabet_is_that_of_the_bundled_model() -> None:
    characters = load_reader(TextAccuracyOptions()).characters
    assert characters is not None and len(characters) > 10_000
    assert set("OPEN日語éßﬁ🎉☕ ") - {"ﬁ"} <= characters and not set("дмн한ไक") & characters


def test_scripts_name_the_languages_that_have_them() -> None:
    assert languages_for("при한안☃٣") == ["cyrillic", "korean", "arabic"]


@pytest.mark.parametrize(
    ("language", "file"),
    [
        ("ch", "PP-OCRv6_rec_small.onnx"),
        ("fr", "PP-OCRv6_rec_small.onnx"),
        ("ru", "eslav_PP-OCRv5_rec_mobile.onnx"),
        ("cyrillic", "cyrillic_PP-OCRv5_rec_mobile.onnx"),
        ("ar", "arabic_PP-OCRv5_rec_mobile.onnx"),
        ("hi", "devanagari_PP-OCRv5_rec_mobile.onnx"),
        ("ko", "korean_PP-OCRv5_rec_mobile.onnx"),
        ("ka", "ka_PP-OCRv4_rec_mobile.onnx"),
    ],
)
def test_a_language_has_its_model(language: str, file: str) -> None:
    assert recogniser_of(language).url.endswith(f"/{file}") and len(recogniser_of(language).sha256) == 64


def test_an_absent_model_names_its_file_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(RewardBackendError) as caught:
        load_reader(TextAccuracyOptions(languages=("ch", "ru", "hi")))
    first, second = str(caught.value).splitlines()
    assert f"{Path(rapidocr.__file__).parent}/models/eslav_PP-OCRv5_rec_mobile.onnx" in first
    assert "python -m glm_training.rewards.ocr_models ru" in first and "text_accuracy.model_files.ru" in first
    assert "devanagari_PP-OCRv5_rec_mobile.onnx" in second and "https://" in second


# -- recognisers given by path -----------------------------------------------------------------------------------------


def fields(data: bytes) -> list[tuple[int, bytes]]:
    """(number, bytes with tag) of the fields of a protobuf message."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = data[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value, at

    found, at = [], 0
    while at < len(data):
        tag, end = varint(at)
        if tag & 7 == 2:
            length, end = varint(end)
            end += length
        else:
            _, end = varint(end)
        found.append((tag >> 3, data[at:end]))
        at = end
    return found


def delimited(number: int, content: bytes) -> bytes:
    size, length = b"", len(content)
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


METADATA = 14
"""Number of ModelProto.metadata_props."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled recogniser with Cyrillic names for some Latin letters, and without any names."""
    folder = tmp_path_factory.mktemp("models")
    data = (Path(rapidocr.__file__).parent / "models" / "PP-OCRv6_rec_small.onnx").read_bytes()
    characters = load_reader(TextAccuracyOptions())._recognizers[0].postprocess_op.character[1:-1]  # type: ignore[attr-defined]
    names = "\n".join(CYRILLIC.get(character, character) for character in characters)
    bare = b"".join(field for number, field in fields(data) if number != METADATA)
    entry = delimited(1, b"character") + delimited(2, names.encode())
    (folder / "named.onnx").write_bytes(bare + delimited(METADATA, entry))
    (folder / "beside.onnx").write_bytes(bare)
    (folder / "beside.txt").write_text(names, encoding="utf-8")
    (folder / "nameless.onnx").write_bytes(bare)
    (folder / "torn.onnx").write_bytes(data[: len(data) // 2])
    return {path.stem: path for path in folder.glob("*.onnx")}


def options_of(file: Path, *languages: str) -> TextAccuracyOptions:
    return TextAccuracyOptions(languages=languages or ("own",), model_files=(("own", file),))


@pytest.mark.parametrize("name", ["named", "beside"])
def test_a_recogniser_of_ones_own_reads_with_its_own_alphabet(
    models: dict[str, Path], name: str, draw_sign: Callable[..., torch.Tensor]
) -> None:
    options = options_of(models[name])
    assert read_texts(draw_sign("OPEN")[None], options) == [["ОПЕН"]]
    assert unreadable('"Опен"', load_reader(options).characters) == ""
    result = RewardCalculator({"text_accuracy": 1}, options=RewardOptions(options)).compute_rewards(
        RewardBatch(draw_sign("OPEN")[None], ['знак "ОПЕН"'])
    )
    assert result.total.tolist() == [1.0]


def test_of_two_recognisers_that_are_as_sure_the_first_is_taken(
    models: dict[str, Path], draw_sign: Callable[..., torch.Tensor]
) -> None:
    sign = draw_sign("OPEN")[None]
    assert read_texts(sign, options_of(models["named"], "ch", "own")) == [["OPEN"]]
    assert read_texts(sign, options_of(models["named"], "own", "ch")) == [["ОПЕН"]]
    characters = load_reader(options_of(models["named"], "own", "ch")).characters
    assert characters is not None and set("OPENОПЕН") <= characters


@pytest.mark.parametrize(
    ("name", "said"), [("torn", "cannot be loaded"), ("nameless", "no `character` in its metadata.*nameless.txt")]
)
def test_a_file_that_is_no_recogniser_is_refused(models: dict[str, Path], name: str, said: str) -> None:
    with pytest.raises(RewardBackendError, match=f"{models[name]}.*{said}"):
        load_reader(options_of(models[name]))


def test_a_file_that_is_not_there_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(RewardBackendError, match=f"model_files.own: there is no file {tmp_path}/none.onnx"):
        load_reader(options_of(tmp_path / "none.onnx"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model_files={ru: a.onnx}"], "the language `ru` is not read.*Add it to"),
        (["model_files={ru: a.onnx}", "languages=[eu]"], "the language `ru` is not read"),
        (["model_files={ru: a.onnx}", "languages=[ru]", "engine=pytesseract"], "pytesseract takes no files"),
        (["languages=['a b']"], "languages"),
    ],
)
def test_files_and_languages_belong_together(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        config_of(tmp_path, *(f"reward.options.text_accuracy.{override}" for override in overrides))


# -- before training, and where it was not looked at -------------------------------------------------------------------

PROMPTS = ['a sign "OPEN"', 'вывеска "Привет"', "no words", 'mixed "OPEN 한글"']


def test_unreadable_prompts_are_problems_with_their_places() -> None:
    report = RewardCalculator({"text_accuracy": 1, "structure": 1}).check_prompts(
        PROMPTS, True, False, places=["line 3", "line 4", "line 6", "line 9"]
    )
    (problem,) = report.problems
    assert "2 of 4 prompts" in problem and "line 4 ('вывеска \"Привет\"': п р и в е т)" in problem
    assert "line 9 ('mixed \"OPEN 한글\"': 한 글)" in problem and "here cyrillic, korean" in problem
    assert "reward.options.text_accuracy.languages" in problem and "reward.on_error: skip" in problem


def test_a_metric_that_does_not_count_only_notes_them() -> None:
    report = RewardCalculator({"text_accuracy": 0, "structure": 1}).check_prompts(PROMPTS, True, False)
    assert report.problems == [] and any("1 ('вывеска" in note for note in report.notes)


def test_under_skip_the_metric_does_not_apply_to_them(draw_sign: Callable[..., torch.Tensor]) -> None:
    calculator = RewardCalculator({"text_accuracy": 1, "structure": 3}, options=RewardOptions(on_error="skip"))
    report = calculator.check_prompts(PROMPTS, True, False)
    assert report.problems == [] and report.applies["text_accuracy"] == 1
    assert any("is left out there, as reward.on_error: skip says" in note for note in report.notes)
    sign = draw_sign("OPEN")[None]
    result = calculator.compute_rewards(RewardBatch(sign, ['"Привет"'], targets=sign))
    assert result.total.tolist() == [1.0] and result.components["text_accuracy"].isnan().all()
    alone = RewardCalculator({"text_accuracy": 1}, options=RewardOptions(on_error="skip"))
    assert "applies to 1 sample: line 2" in alone.check_prompts(PROMPTS[:1] + ['"Привет"'], True, False,
        places=["line 1", "line 2"]).problems[0]  # fmt: skip


def test_text_that_cannot_be_read_is_no_score(draw_sign: Callable[..., torch.Tensor]) -> None:
    sign = draw_sign("OPEN")[None]
    with pytest.raises(RewardSampleError, match=r"text_accuracy: the OCR engine has no п р и в е т"):
        RewardCalculator({"text_accuracy": 1}).compute_rewards(RewardBatch(sign, ['"Привет"']))
    with pytest.raises(RewardSampleError, match="prompt 0: the OCR engine has no п"):
        word_accuracy(sign, ['"Привет"'])


def test_validate_names_file_line_and_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path)
    prompts = tmp_path / "data" / "prompts.txt"
    prompts.write_text('a red circle\na sign "CAFE"\nлавка "Хлеб"\na sign "½ OFF"\n', encoding="utf-8")
    metrics = "reward.metrics={text_accuracy: 0.5, structure: 0.5}"
    assert validate([str(path)], [metrics], None) == 2
    error = capsys.readouterr().err
    assert f"training data ({prompts})" in error and "1 of 4 prompts quote: line 3 ('лавка \"Хлеб\"': х л е б)" in error
    assert validate([str(path)], [metrics, "reward.on_error=skip"], None) == 0
    assert "line 3 ('лавка" in capsys.readouterr().out


# -- lines from the right, tesseract, fetching -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", ["OPEN 24", "日本", "مرحبا", "مرحبا بكم", "السعر 12.50", "שלום", "OPEN مرحبا", "OPEN مرحبا بكم CAFE", ""]
)
def test_what_is_written_from_the_right_is_turned_round(line: str) -> None:
    """As seen: each run of Arabic or Hebrew backwards, numbers in it forwards; a line without Latin from the right."""
    seen = {
        "مرحبا": "مرحبا"[::-1],
        "مرحبا بكم": "مرحبا بكم"[::-1],
        "السعر 12.50": "12.50 " + "السعر"[::-1],
        "שלום": "שלום"[::-1],
        "OPEN مرحبا": "OPEN " + "مرحبا"[::-1],
        "OPEN مرحبا بكم CAFE": "OPEN " + "مرحبا بكم"[::-1] + " CAFE",
    }.get(line, line)
    assert logical_order(seen) == line


def traineddata(characters: list[str], parts: int = 24) -> bytes:
    """A file of tesseract's with an LSTM's characters and a part after them."""
    names = ["NULL", "Joined", "|Broken|0|1", *characters]
    text = "\n".join([str(len(names)), *(f"{name} 3 0,255,0,255 Latin 1 0 1 {name}" for name in names)]).encode()
    start = 4 + 8 * parts
    offsets = [-1] * parts
    offsets[21], offsets[22] = start, start + len(text)
    return struct.pack(f"<i{parts}q", parts, *offsets) + text + b"recoder"


def test_tesseracts_characters_come_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "deu.traineddata"
    file.write_bytes(traineddata(["a", "ß", "ﬁ", "é"]))
    assert tesseract_characters(file) == {"a", "ß", "ﬁ", "é"}


@pytest.mark.parametrize("data", [b"", b"PNG", struct.pack("<i", 1 << 30), traineddata([])[:60], b"\0" * 500])
def test_another_file_is_none_of_tesseracts(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match="no traineddata file"):
        tesseract_characters(tmp_path / "x")


@pytest.mark.parametrize("whole", [True, False])
def test_a_fetched_model_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    content = b"a model" * 1000

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content if whole else content[:100])

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing is logged."""

    (tmp_path / "models").mkdir()
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/ru.onnx"
        path = tmp_path / "models" / "ru.onnx"
        model = AddressFile("text_accuracy", url, path, hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(ocr_models, "recogniser_of", lambda language: model)
        if whole:
            assert fetch("ru") == tmp_path / "models" / "ru.onnx"
        else:
            with pytest.raises(RewardBackendError, match="is not ru.onnx: its SHA-256 is .*model_files.ru"):
                fetch("ru")
    left = [path.name for path in (tmp_path / "models").iterdir() if path.suffix != ".lock"]
    assert left == (["ru.onnx"] if whole else [])
