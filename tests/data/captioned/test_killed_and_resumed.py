"""Three tars read by two processes, which are killed in the middle of one; one process goes on: every sample exactly
once in each epoch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from glm_training.data import StatefulSampler
from glm_training.data.captioned.dataset import CaptionedImages, Shaping
from glm_training.data.samplers.mixed_sampler import BLOCK, MixedSampler
from tests.data.captioned.building import captioned, opened, tars, write_tar

SIZES, BATCH = (50, 30, 20), 3
ROOT = Path(__file__).parents[3]


def killed_after(output: Path, folder: Path, steps: int) -> list[list[dict]]:
    """What two processes wrote before both were killed, neither before `steps` steps; a torn line is left out."""
    output.mkdir()
    command = [
        sys.executable,
        "-m",
        "tests.data.captioned.reading_worker",
        str(folder),
        str(output),
    ]
    workers = [subprocess.Popen([*command, str(rank), "2", str(BATCH)], cwd=ROOT, env=os.environ) for rank in (0, 1)]
    files = [output / f"rank{rank}.jsonl" for rank in (0, 1)]
    try:
        end = time.monotonic() + 300
        while not all(file.exists() and file.read_bytes().count(b"\n") >= steps for file in files):
            assert time.monotonic() < end and all(worker.poll() is None for worker in workers)
            time.sleep(0.02)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL] * 2
    return [[json.loads(line) for line in file.read_bytes().splitlines(True) if line.endswith(b"\n")] for file in files]


@pytest.mark.skipif(os.name != "posix", reason="kills processes by signal")
def test_every_sample_once_per_epoch(tmp_path: Path) -> None:
    """Their last checkpoint was that of step 12: each of the tars was read in part."""
    folder = tars(tmp_path / "set", SIZES)
    written = killed_after(tmp_path / "run", folder, 14)
    before = [(key, epoch) for lines in written for line in lines[:12] for key, epoch in _drawn(line)]
    ends = (50, 80, 100)
    parts = Counter(next(tar for tar, end in enumerate(ends) if int(key.split()[1]) < end) for key, _ in before)
    assert all(0 < parts[tar] < size for tar, size in enumerate(SIZES))
    states = [lines[11]["state"] for lines in written]
    assert states[0] == states[1] == {"position": 12 * 2 * BATCH}
    data = CaptionedImages([opened(folder)], Shaping(32, 32, crop="random"))
    sampler = StatefulSampler(len(data), 7, seed=5)
    sampler.load_state_dict(states[0])
    after: list[tuple[str, int]] = []
    while sampler.position < 300:
        after += _step(data, sampler)
    seen = Counter((before + after)[:300])
    assert seen == {(f"picture {number}", epoch): 1 for number in range(100) for epoch in range(3)}
    # what the killed processes had drawn beyond the checkpoint is drawn again, no more and no less
    lost = {drawn for lines in written for line in lines[12:14] for drawn in _drawn(line)}
    assert lost == set(after[: 2 * 2 * BATCH])


def test_mixed_sets_once_per_epoch_of_each(tmp_path: Path) -> None:
    folder = tars(tmp_path / "set", SIZES)
    other = write_tar(tmp_path / "other.tar", captioned(range(200, 207)))
    weights = [3.0, 1.0]

    def begun(rank: int, world_size: int, batch_size: int) -> tuple[CaptionedImages, MixedSampler]:
        data = CaptionedImages([opened(folder), opened(other)], Shaping(32, 32), weights=weights, rank=rank)
        return data, MixedSampler(data.set_lengths, weights, batch_size, seed=5, rank=rank, world_size=world_size)

    drawn: list[tuple[str, int]] = []
    two = [begun(rank, 2, BATCH) for rank in (0, 1)]
    for _ in range(9):
        for data, sampler in two:
            drawn += _step(data, sampler)
    data, alone = begun(0, 1, 10)
    alone.load_state_dict(two[1][1].state_dict())
    while alone.position < BLOCK:
        drawn += _step(data, alone)
    seen = Counter(drawn[:BLOCK])
    assert set(seen.values()) == {1}
    assert Counter(int(key.split()[1]) >= 200 for key, _ in seen) == {False: BLOCK * 3 // 4, True: BLOCK // 4}
    assert all((f"picture {number}", epoch) in seen for number in range(100) for epoch in range(BLOCK * 3 // 4 // 100))
    assert all((f"picture {number}", epoch) in seen for number in range(200, 207) for epoch in range(BLOCK // 4 // 7))


def _step(data: CaptionedImages, sampler: StatefulSampler) -> list[tuple[str, int]]:
    epochs = sampler.peek_epochs()
    return list(zip(data.batch(sampler.next(), epoch=epochs).prompts, epochs, strict=True))


def _drawn(line: dict) -> list[tuple[str, int]]:
    return list(zip(line["keys"], line["epochs"], strict=True))
