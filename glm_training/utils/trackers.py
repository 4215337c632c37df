"""TensorBoard and Weights & Biases behind one small interface."""

import importlib.util
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from glm_training.utils.pictures import to_pil
from glm_training.utils.redaction import redact, redact_values

WANDB_ID = "wandb_id.txt"


class TrackerError(RuntimeError):
    """A tracker was asked for that cannot start here; the message names the remedy."""


class Tracker(Protocol):
    """A place that shows figures and images beside ``metrics.jsonl``."""

    name: str

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Figures of a step, by tag."""

    def images(self, step: int, tag: str, images: Tensor, captions: Sequence[str]) -> None:
        """Images ``[B, 3, H, W]`` in [0, 1] of a step, under ``tag/0``, ``tag/1``..."""

    def close(self) -> None:
        """Send what is left."""


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

    def images(self, step: int, tag: str, images: Tensor, captions: Sequence[str]) -> None:
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


class WandbTracker:
    """A Weights & Biases run; a resumed training continues it. Figures lie over ``step``, which may go back."""

    name = "Weights & Biases"

    def __init__(
        self,
        run_dir: Path,
        *,
        project: str,
        entity: str | None,
        mode: str,
        resume: bool,
        config: Mapping[str, Any] | None,
    ) -> None:
        import wandb

        self._wandb = wandb
        identifier = run_dir / WANDB_ID
        known = identifier.read_text(encoding="ascii").strip() if resume and identifier.exists() else None
        self._run = wandb.init(
            project=project,
            entity=entity,
            mode=mode,  # type: ignore[arg-type]
            dir=str(run_dir),
            id=known,
            resume="allow" if known else None,
            name=run_dir.name,
            config=redact_values(config or {}),
            save_code=False,
            # Off: it would upload all that is printed, unmasked; and with its facts of the machine the command line.
            settings=wandb.Settings(console="off", x_disable_meta=any(redact(word) != word for word in sys.argv)),
        )
        identifier.write_text(f"{self._run.id}\n", encoding="ascii")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def images(self, step: int, tag: str, images: Tensor, captions: Sequence[str]) -> None:
        pictures = [
            self._wandb.Image(to_pil(image), caption=redact(caption))
            for image, caption in zip(images, captions, strict=True)
        ]
        self._run.log({"step": step, tag: pictures})

    def close(self) -> None:
        self._run.finish()


def check_wandb(mode: str) -> None:
    """Raise ``TrackerError`` where Weights & Biases cannot start: no package, or no key for ``online``."""
    if importlib.util.find_spec("wandb") is None:
        raise TrackerError(
            'logging.use_wandb is true, but the package wandb is missing: pip install "glm_training[wandb]"'
        )
    if mode == "online" and not os.environ.get("WANDB_API_KEY"):
        raise TrackerError(
            "logging.use_wandb is true, but the environment has no WANDB_API_KEY; export it, or set "
            "logging.wandb_mode: offline and upload later with `wandb sync`"
        )
