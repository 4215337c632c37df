"""What a run writes about itself: ``metrics.jsonl`` and ``train.log`` always, to TensorBoard and other trackers when
asked."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from glm_training.utils.distributed import World
from glm_training.utils.failures import begin_telling, beside_training, tell_once
from glm_training.utils.metrics_file import MetricsFile
from glm_training.utils.pictures import Pictures
from glm_training.utils.redaction import RedactingFormatter, redact
from glm_training.utils.trackers import Service, TensorBoardTracker, Tracker, TrackerError

__all__ = ["RunLogger", "TrackerError", "redact"]

PACKAGE = "glm_training"
logger = logging.getLogger(__name__)


class _LogFile(logging.FileHandler):
    """``train.log``. What cannot be written to it is told once, without the traceback of `logging`'s own."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, Exception):
            tell_once("writing train.log", error)


class RunLogger:
    """The run directory's log. Only the main process writes; on the others every method does nothing.

    A tracker that fails is switched off with one warning; training and the local files go on.

    Args:
        run_dir: the run directory, made if absent.
        world: this process.
        use_tensorboard: write event files to ``log_dir``, by default ``run_dir/tensorboard``.
        services: other trackers to report to.
        resume_step: the step a resumed run continues from; later figures are set aside. None when it starts.
        within_interval: whether that step lies between two logged ones; its own training figures are then set aside.
        config: settings to show in those; secrets are masked.

    Raises:
        TrackerError: the package or key of one of `services` is missing.
    """

    def __init__(
        self,
        run_dir: Path,
        world: World,
        *,
        use_tensorboard: bool = True,
        services: Sequence[Service] = (),
        log_dir: Path | None = None,
        resume_step: int | None = None,
        within_interval: bool = False,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        for service in services:
            service.check()  # on every process, so that none is left waiting for the main one
        self._trackers: list[Tracker] = []
        self._metrics: MetricsFile | None = None
        self._handlers: list[logging.Handler] = []
        begin_telling()
        if not world.is_main:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = MetricsFile(run_dir, resume_step, within_interval)
        self._handlers = [logging.lastResort] if logging.lastResort is not None else []
        with beside_training("writing train.log"):
            self._handlers.append(_LogFile(run_dir / "train.log", encoding="utf-8"))
        self._start_text_log()
        if use_tensorboard:
            folder = log_dir or run_dir / "tensorboard"
            self._start(TensorBoardTracker.name, lambda: TensorBoardTracker(folder, resume_step))
        for service in services:
            self._start(service.name, partial(service.start, run_dir, resume_step is not None, config or {}))

    def _start_text_log(self) -> None:
        """The package's log records go to ``train.log``; warnings still reach standard error."""
        package = logging.getLogger(PACKAGE)
        package.setLevel(logging.INFO)
        for handler in self._handlers:
            if isinstance(handler, _LogFile):
                handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            package.addHandler(handler)

    def _start(self, name: str, make: Callable[[], Tracker]) -> None:
        started: list[Tracker] = []
        if self._survives(name, lambda: started.append(make())):
            self._trackers += started

    def _survives(self, name: str, action: Callable[[], None]) -> bool:
        """Run one call of a tracker's library; False, after one warning, when it fails."""
        done = False
        with beside_training(name, "is off for the rest of this run (metrics.jsonl goes on)"):
            action()
            done = True
        return done

    def _tell(self, action: Callable[[Tracker], None]) -> None:
        self._trackers = [each for each in self._trackers if self._survives(each.name, partial(action, each))]

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Figures of a step: a line of ``metrics.jsonl``, and a point per tag in the trackers."""
        if self._metrics is not None:
            self._metrics.write(step, scalars)
            self._tell(lambda tracker: tracker.log(step, scalars))

    def images(self, step: int, tag: str, images: Pictures, captions: Sequence[str]) -> None:
        """Images with a caption each, for the trackers.

        Raises:
            ValueError: when shapes or counts do not fit.
        """
        shapes = [list(image.shape) for image in images]
        if any(len(shape) != 3 or shape[0] != 3 for shape in shapes) or len(captions) != len(images):
            raise ValueError(f"images are [B, 3, H, W] with B captions, not {shapes} with {len(captions)}")
        self._tell(lambda tracker: tracker.images(step, tag, images, captions))

    def text(self, message: str) -> None:
        """A line of ``train.log``."""
        if self._metrics is not None:
            logger.info("%s", message)

    def close(self) -> None:
        """Send what is left, and close the files; safe to call twice."""
        self._tell(lambda tracker: tracker.close())
        self._trackers = []
        lost = 0 if self._metrics is None else self._metrics.close()
        if lost:
            logger.warning("%d lines of metrics.jsonl could not be written and are lost", lost)
        package = logging.getLogger(PACKAGE)
        for handler in self._handlers:
            package.removeHandler(handler)
            if isinstance(handler, _LogFile):
                with beside_training("writing train.log"):
                    handler.close()
        self._handlers = []

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, *details: object) -> None:
        self.close()
