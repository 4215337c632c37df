"""One process of a run that reads pictures: writes what each step had, and the state after it, until it is killed.

python -m tests.data.captioned.reading_worker TARS OUTPUT RANK WORLD_SIZE BATCH_SIZE
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from glm_training.data import StatefulSampler
from glm_training.data.captioned.dataset import CaptionedImages, Shaping
from tests.data.captioned.building import opened


def main(folder: str, output: str, rank: int, world_size: int, batch_size: int) -> None:
    data = CaptionedImages(
        [opened(Path(folder), index_dir=Path(output) / "cache")],
        Shaping(32, 32, crop="random"),
        num_workers=2,
        skipped_dir=Path(output),
        rank=rank,
    )
    sampler = StatefulSampler(len(data), batch_size, seed=5, rank=rank, world_size=world_size)
    with (Path(output) / f"rank{rank}.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1000):
            epochs = sampler.peek_epochs()
            batch = data.batch(sampler.next(), epoch=epochs)
            data.prefetch(sampler.peek(), epoch=sampler.peek_epochs())
            line = {"step": step, "keys": batch.prompts, "epochs": epochs, "state": sampler.state_dict()}
            file.write(json.dumps(line) + "\n")
            file.flush()
            time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
