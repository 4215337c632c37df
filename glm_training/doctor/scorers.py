"""Whether OCR reads, tesseract and its languages are here, and the metrics' networks load."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec

import torch
from PIL import Image, ImageDraw, ImageFont

from glm_training.doctor.commands import Asked, apt_install, glm_train, pip_install, reinstall
from glm_training.doctor.findings import Finding, failed, note, ok
from glm_training.doctor.worker import configuration
from glm_training.engine.reward_setup import differentiable_options, reward_options
from glm_training.rewards import DifferentiableScorers, RewardCalculator, RewardError, read_texts
from glm_training.rewards.reward_calculator import METRICS, REMOTE_PREFIX
from glm_training.rewards.types import from_pil
from glm_training.utils.downloads import AddressFile
from glm_training.utils.hub_files import Wanted, is_offline

WORD = "STOP"
_COMMAND = re.compile(r"`((?:pip|apt-get|python|hf) [^`]+)`")
_KEY = re.compile(r"(?:reward\.options|dmdr\.reward)\.[\w.]*\w")


def reading(asked: Asked) -> Iterator[Finding]:
    """OCR of a word that is drawn here."""
    picture = Image.new("RGB", (128, 64), "white")
    ImageDraw.Draw(picture).text((10, 14), WORD, fill="black", font=ImageFont.load_default(size=36))
    try:
        (lines,) = read_texts(from_pil(picture))
    except RewardError as error:
        yield failed("OCR", str(error), _anew())
        return
    if lines != [WORD]:
        yield failed("OCR", f"rapidocr reads {lines} where {WORD} is written", _anew())
        return
    yield ok("OCR", f"rapidocr {version('rapidocr')} reads a word that was drawn for it")


def _anew() -> list[str]:
    """RapidOCR with the models that lie in its wheel, and what runs them."""
    return pip_install("rapidocr==3.10.0", "onnxruntime", options=["--force-reinstall", "--no-deps"])


def tesseract(asked: Asked) -> Iterator[Finding]:
    """The program and the languages of `reward.options.text_accuracy`; without a configuration, whether it is here."""
    if not asked.paths:
        if shutil.which("tesseract") is None:
            yield note("tesseract", "absent; wanted by text_accuracy with engine: pytesseract", apt_install(_APT))
        return
    config = configuration(asked)
    options = config.reward.options.text_accuracy
    if "text_accuracy" not in _named(asked) or options.engine != "pytesseract":
        return
    wanted = [code for words in options.languages or ["eng"] for code in words.split("+")]
    packages = [f"{_APT}-{code.replace('_', '-').lower()}" for code in wanted if code != "eng"]
    if shutil.which("tesseract") is None:
        yield failed("tesseract", "the program is not on the PATH", apt_install(_APT, *packages))
        return
    here = _languages()
    absent = [code for code in wanted if code not in here]
    if absent:
        lacking = [f"{_APT}-{code.replace('_', '-').lower()}" for code in absent]
        told = f"it has no language {', '.join(absent)} (it has {', '.join(here) or 'none'})"
        yield failed("tesseract", told, apt_install(*lacking))
        return
    if find_spec("pytesseract") is not None:  # else that is a finding of the extras
        yield _loaded("tesseract", RewardCalculator({"text_accuracy": 1.0}, options=reward_options(config)), asked)


_APT = "tesseract-ocr"


def _languages() -> list[str]:
    done = subprocess.run(["tesseract", "--list-langs"], capture_output=True, text=True, timeout=60)
    lines = (done.stdout or done.stderr).splitlines()  # the first one says where they lie
    return [line.strip() for line in lines[1:] if line.strip()]


def at_hand(asked: Asked) -> Iterator[Finding]:
    """Which metrics have their files here."""
    lacking = [name for name in METRICS if not all(file.here() for file in RewardCalculator({name: 1.0}).wanted())]
    ready = [name for name in METRICS if name not in lacking]
    told = f"{', '.join(ready)} have their files"
    if not lacking:
        yield ok("metrics", told)
        return
    yield note("metrics", f"{told}; those of {', '.join(lacking)} are fetched when a run that names them starts, or by "
               "glm-train download CONFIG", ready=ready, lacking=lacking)  # fmt: skip


def scorers(asked: Asked) -> Iterator[Finding]:
    """The metrics that the configuration names, and the scorers of a distillation, each loaded on the CPU."""
    config = configuration(asked)
    options = reward_options(config)
    for name in _named(asked):
        by_tesseract = name == "text_accuracy" and options.text_accuracy.engine == "pytesseract"
        if name in METRICS and not by_tesseract:
            yield _loaded(f"metric {name}", RewardCalculator({name: 1.0}, options=options), asked)
    others = [name for name in _named(asked) if name not in METRICS and not name.startswith(REMOTE_PREFIX)]
    remote = [name for name in _named(asked) if name.startswith(REMOTE_PREFIX)]
    if config.reward.calculator is not None:
        others.append(config.reward.calculator)
    if others or remote:
        told = f"not looked at: {', '.join([*others, *remote])}; to have them loaded or asked:"
        yield note("rewards", told, glm_train("validate", asked))
    if config.training.method == "dmdr" and config.dmdr.cold_start_steps is not None:
        scorers = DifferentiableScorers(differentiable_options(config), torch.device("cpu"))
        yield _loaded("the scorers of dmdr.reward", scorers, asked)


def _named(asked: Asked) -> list[str]:
    """The metrics of a run, which are scored in its steps or at its evaluations."""
    config = configuration(asked)
    if not (config.uses_reward() or (config.reward.enabled and config.evaluation.enabled)):
        return []
    names = {} if config.reward.calculator is not None else dict.fromkeys(config.scored_weights())
    return list(names | dict.fromkeys(config.reward.monitors.metrics))


def _loaded(name: str, scorer: RewardCalculator | DifferentiableScorers, asked: Asked) -> Finding:
    files = scorer.wanted()
    absent = [file for file in files if not file.here()]
    if absent:
        told = f"not here: {', '.join(file.name for file in absent)}{_begun(absent)}"
        return failed(name, told, download(asked))
    try:
        scorer.check()
    except RewardError as error:
        return failed(name, str(error), _remedy(error, files, asked))
    return ok(name, "it loads")


def download(asked: Asked, *changed: str) -> list[str]:
    """Fetches what a configuration needs, with keys `changed`, whatever HF_HUB_OFFLINE says."""
    return glm_train("download", asked, *changed, changes={"HF_HUB_OFFLINE": "0"} if is_offline() else None)


def _begun(files: list[Wanted]) -> str:
    parts = [file.path.with_name(f".{file.name}.part") for file in files if isinstance(file, AddressFile)]
    size = sum(part.stat().st_size for part in parts if part.is_file())
    return f" ({size / 1e6:.1f} MB of it were fetched before it broke off)" if size else ""


def _remedy(error: RewardError, files: list[Wanted], asked: Asked) -> list[str]:
    """The command that the message names; or a file that was fetched and does not load is fetched anew; or one that the
    configuration names is not asked for."""
    named, key = _COMMAND.search(str(error)), _KEY.search(str(error))
    if named is not None:
        words = [shlex.quote(word) for word in shlex.split(named[1])]
        return pip_install(*shlex.split(named[1])[2:]) if words[:2] == ["pip", "install"] else words
    broken = [shlex.quote(str(file.path)) for file in files if isinstance(file, AddressFile)]
    if broken:
        return ["rm", *broken, "&&", *download(asked)]
    return reinstall() if key is None else download(asked, f"{key[0]}=null")
