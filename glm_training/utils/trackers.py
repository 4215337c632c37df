"""TensorBoard, Weights & Biases, SwanLab and trackio behind one small interface."""

import importlib.util
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from glm_training.utils.pictures import Pictures, to_pil
from glm_training.utils.redaction import redact, redact_values

WANDB_ID, SWANLAB_ID, TRACKIO_NAME = "wandb_id.txt", "swanlab_id.txt", "trackio_name.txt"
"""Files of a run directory that name the tracker's run, which a resumed training continues."""


class TrackerError(RuntimeError):
    """A tracker was asked for that cannot start here; the message names the remedy."""


class Tracker(Protocol):
    """A place that shows figures and images beside ``metrics.jsonl``."""

    name: str

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Figures of a step, by tag."""

    def images(self, step: int, tag: str, images: Pictures, captions: Sequence[str]) -> None:
        """Images of a step, under ``tag/0``, ``tag/1``..."""

    def close(self) -> None:
        """Send what is left."""


class Service(Protocol):
    """A tracker of an optional package, with its settings."""

    name: str

    def check(self) -> None:
        """Raise ``TrackerError`` where it cannot start: no package, or no key for ``online``."""

    def start(self, run_dir: Path, resume: bool, config: Mapping[str, Any]) -> Tracker:
        """A run of it, named after `run_dir`, with the settings `config`, secrets masked; `resume` continues the run
        that `run_dir` knows."""


class TensorBoardTracker:
    """Event files in ``log_dir``. TensorBoard hides what earlier files hold after ``resume_step`` (None: all of it)."""

    name = "TensorBoard"

    def __init__(self, log_dir: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _hush_writer_threads()
        purge_step = 0 if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(log_dir), purge_step=purge_step)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def images(self, step: int, tag: str, images: Pictures, captions: Sequence[str]) -> None:
        for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
            self._writer.add_image(f"{tag}/{index}", image.detach().float().cpu().clamp(0, 1), step)
            self._writer.add_text(f"{tag}/{index}", redact(caption), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _hush_writer_threads() -> None:
    """TensorBoard writes in a thread, whose error comes up in the next call of its writer, where it is told. Python
    would print the thread's traceback besides."""
    before = threading.excepthook

    def hook(arguments: Any) -> None:
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            before(arguments)

    hook.__module__ = __name__
    if getattr(before, "__module__", None) != __name__:  # once per process
        threading.excepthook = hook


@dataclass(frozen=True)
class Wandb:
    """Weights & Biases; `mode` is ``online`` (needs ``WANDB_API_KEY``) or ``offline``."""

    project: str
    entity: str | None
    mode: str
    name = "Weights & Biases"

    def check(self) -> None:
        """See Service."""
        _check_package("wandb")
        if self.mode == "online" and not os.environ.get("WANDB_API_KEY"):
            raise TrackerError(
                "logging.use_wandb is true, but the environment has no WANDB_API_KEY; export it, or set "
                "logging.wandb_mode: offline and upload later with `wandb sync`"
            )

    def start(self, run_dir: Path, resume: bool, config: Mapping[str, Any]) -> Tracker:
        """See Service."""
        return WandbTracker(run_dir, self, resume, config)


class WandbTracker:
    """A Weights & Biases run. Figures lie over ``step``, which may go back."""

    name = Wandb.name

    def __init__(self, run_dir: Path, service: Wandb, resume: bool, config: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        known = _known(run_dir / WANDB_ID, resume)
        self._run = wandb.init(
            project=service.project,
            entity=service.entity,
            mode=service.mode,  # type: ignore[arg-type]
            dir=str(run_dir),
            id=known,
            resume="allow" if known else None,
            name=run_dir.name,
            config=redact_values(config),
            save_code=False,
            # Off: it would upload all that is printed, unmasked; and with its facts of the machine the command line.
            settings=wandb.Settings(console="off", x_disable_meta=_secret_in_command()),
        )
        (run_dir / WANDB_ID).write_text(f"{self._run.id}\n", encoding="ascii")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def images(self, step: int, tag: str, images: Pictures, captions: Sequence[str]) -> None:
        pictures = [
            self._wandb.Image(to_pil(image), caption=redact(caption))
            for image, caption in zip(images, captions, strict=True)
        ]
        self._run.log({"step": step, tag: pictures})

    def close(self) -> None:
        self._run.finish()


@dataclass(frozen=True)
class SwanLab:
    """SwanLab; `mode` is ``online`` (needs ``SWANLAB_API_KEY``) or ``offline``."""

    project: str
    workspace: str | None
    mode: str
    name = "SwanLab"

    def check(self) -> None:
        """See Service."""
        _check_package("swanlab")
        if self.mode == "online" and not os.environ.get("SWANLAB_API_KEY"):
            raise TrackerError(
                "logging.use_swanlab is true, but the environment has no SWANLAB_API_KEY; export it, or set "
                "logging.swanlab_mode: offline and upload later with `swanlab sync`"
            )

    def start(self, run_dir: Path, resume: bool, config: Mapping[str, Any]) -> Tracker:
        """See Service."""
        return SwanLabTracker(run_dir, self, resume, config)


class SwanLabTracker:
    """A SwanLab run. It keeps the first value of a figure at a step: what a resumed run computes anew adds none."""

    name = SwanLab.name

    def __init__(self, run_dir: Path, service: SwanLab, resume: bool, config: Mapping[str, Any]) -> None:
        import swanlab

        self._swanlab = swanlab
        known = _known(run_dir / SWANLAB_ID, resume)
        with _own_hooks(), redirect_stdout(sys.stderr):
            self._run = swanlab.init(
                project=service.project,
                workspace=service.workspace,
                mode=service.mode,
                log_dir=str(run_dir / "swanlog"),
                id=known,
                resume="allow" if known else "never",
                name=run_dir.name,
                config=redact_values(config),
                settings=swanlab.Settings(
                    interactive=False,
                    # Off: it would upload all that is printed, unmasked, the command line, and a remote's login.
                    terminal=swanlab.Settings.Terminal(proxy_type="none"),
                    probe=swanlab.Settings.Probe(runtime=not _secret_in_command(), git=False),
                ),
            )
        (run_dir / SWANLAB_ID).write_text(f"{self._run.id}\n", encoding="utf-8")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def images(self, step: int, tag: str, images: Pictures, captions: Sequence[str]) -> None:
        pictures = [
            self._swanlab.Image(to_pil(image), caption=redact(caption))
            for image, caption in zip(images, captions, strict=True)
        ]
        self._run.log({tag: pictures}, step=step)

    def close(self) -> None:
        with _own_hooks(), redirect_stdout(sys.stderr):
            self._run.finish()


@dataclass(frozen=True)
class Trackio:
    """trackio; `mode` is ``offline``, a database on this machine, or ``online``, the Hugging Face Space `space` (needs
    ``HF_TOKEN``)."""

    project: str
    space: str | None
    mode: str
    name = "trackio"

    def check(self) -> None:
        """See Service."""
        _check_package("trackio")
        if self.mode == "online" and not os.environ.get("HF_TOKEN"):
            raise TrackerError(
                "logging.use_trackio is true, but the environment has no HF_TOKEN for the Space; export it, or set "
                "logging.trackio_mode: offline and upload later with `trackio sync`"
            )

    def start(self, run_dir: Path, resume: bool, config: Mapping[str, Any]) -> Tracker:
        """See Service."""
        return TrackioTracker(run_dir, self, resume, config)


class TrackioTracker:
    """A trackio run. Its database lies where `trackio show` looks: ``TRACKIO_DIR``, by default in Hugging Face's cache,
    with those of other runs, so the run's name gets an ending of its own."""

    name = Trackio.name

    def __init__(self, run_dir: Path, service: Trackio, resume: bool, config: Mapping[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        known = _known(run_dir / TRACKIO_NAME, resume)
        with redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=service.project,
                name=known or f"{run_dir.name}-{secrets.token_hex(3)}",
                space_id=service.space if service.mode == "online" else None,
                resume="allow",
                config=redact_values(config),
                embed=False,
            )
        (run_dir / TRACKIO_NAME).write_text(f"{self._run.name}\n", encoding="utf-8")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def images(self, step: int, tag: str, images: Pictures, captions: Sequence[str]) -> None:
        pictures = {
            f"{tag}/{index}": self._trackio.Image(to_pil(image), caption=redact(caption))
            for index, (image, caption) in enumerate(zip(images, captions, strict=True))
        }
        self._run.log(pictures, step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._trackio.finish()


def _check_package(package: str) -> None:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:  # without an origin it is a folder of that name, as `wandb` leaves one
        raise TrackerError(
            f"logging.use_{package} is true, but the package {package} is missing: pip install "
            f'"glm_training[{package}]"'
        )


def _known(file: Path, resume: bool) -> str | None:
    """The tracker's run that a resumed training continues."""
    return file.read_text(encoding="utf-8").strip() or None if resume and file.exists() else None


def _secret_in_command() -> bool:
    return any(redact(word) != word for word in sys.argv)


@contextmanager
def _own_hooks() -> Iterator[None]:
    """Inside, a library that takes Ctrl-C and tracebacks over, or gives back those it found long ago, has no effect on
    them: a run ends by its own rules, and what it ends with is masked."""
    hook, main = sys.excepthook, threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        sys.excepthook = hook
        if main and handler is not None:
            signal.signal(signal.SIGINT, handler)
