"""What fails beside the training is told once and does not end it."""

from __future__ import annotations

import errno
import logging
import os

import pytest

from glm_training.utils.failures import begin_telling, beside_training


@pytest.fixture(autouse=True)
def told_anew():
    begin_telling()


def fail(error: BaseException, what: str = "drawing a picture") -> None:
    with beside_training(what):
        raise error


def test_each_kind_is_told_once(caplog):
    for _ in range(3):
        fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/0.png"))
        fail(ZeroDivisionError("no width"), "drawing a table")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "drawing a picture failed and the run goes on: [Errno 28] No space left on device: 'runs/x/0.png' (told once)",
        "drawing a table failed and the run goes on: ZeroDivisionError: no width (told once)",
    ]
    begin_telling()
    fail(OSError(errno.EIO, os.strerror(errno.EIO)))
    assert "[Errno 5] Input/output error (told once)" in caplog.text


def test_the_traceback_of_what_is_no_error_of_the_system_goes_to_the_log_alone(caplog):
    caplog.set_level(logging.INFO, "glm_training")
    fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "one")
    fail(ValueError("a mistake of ours"), "two")
    traced = [record for record in caplog.records if record.exc_info]
    assert [(record.levelno, record.getMessage()) for record in traced] == [(logging.INFO, "where two failed:")]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_aborts_the_program_passes(stop):
    with pytest.raises(stop):
        fail(stop())
