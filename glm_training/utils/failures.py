"""What fails beside the training does not end it: it is told once, and the run goes on.

Beside the training lies all that a run tells about itself: figures, pictures, tables, trackers, the terminal, links to
a checkpoint and copies of what is in it, old checkpoints that were to go. The weights and what resumes them do not: a
save that fails ends the run (`checkpoint.commit`), and so does an error in a step (`engine.stopping`).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

_told: set[str] = set()


@contextmanager
def beside_training(what: str, outcome: str = "the run goes on") -> Iterator[None]:
    """Around something beside the training; `what` names it ("writing the sample pictures"), `outcome` what follows.

    An error inside is told once per `what` (`begin_telling` starts anew), and leaves the block at the place where it
    came up. The except is broad because whatever draws, writes or sends here (Pillow, rich, a tracker's client) may
    raise what it likes, and none of it is worth a run of days. Nothing inside may talk to the run's other processes,
    which would wait for the rest of it.
    """
    try:
        yield
    except Exception as error:
        tell_once(what, error, outcome)


def tell_once(what: str, error: Exception, outcome: str = "the run goes on") -> None:
    """A warning on standard error and in `train.log` that `what` failed, unless it was given before; the traceback of
    what is no error of the operating system goes to the log alone."""
    if what in _told:
        return
    _told.add(what)  # before logging: the log itself may be what fails
    cause = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    logger.warning("%s failed and %s: %s (told once)", what, outcome, cause)
    if not isinstance(error, OSError):
        logger.info("where %s failed:", what, exc_info=error)


def begin_telling() -> None:
    """A run begins: what an earlier one in this process was told counts no more."""
    _told.clear()
