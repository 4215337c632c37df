"""Reading captioned pictures out of tars: this package's reader beside webdataset's, as JSON.

    pip install webdataset
    python -m benchmarks.captioned_reader [--pictures 1200] [--workers 2] [--rounds 3] [--output FILE]

Both read the same tars of JPEG pictures with captions, decode them, cut them to 256 px with the same filter, and give
batches of 32 as float tensors: ours shuffled over all samples and read by offset, in threads; webdataset as streams in
processes, with a buffer of 1,000 to shuffle in. Rounds alternate and the best of each counts, since others may use the
machine too. Pictures per second are of the wall clock from the first batch on, so without the start of webdataset's
processes; CPU time is that of all processes, starts included.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from glm_training.data import StatefulSampler
from glm_training.data.captioned.dataset import CaptionedImages, Shaping
from glm_training.data.captioned.layouts.tars.index import index_tar
from glm_training.data.captioned.options import Reading, SetOptions
from glm_training.data.captioned.recognise import open_sets

SIDE, BATCH, TARS = 256, 32, 4


def jpeg(number: int) -> bytes:
    """640 x 480 with structure at several scales, some 60 kB, as a photograph has."""
    random = np.random.default_rng(number)
    picture = np.zeros((480, 640, 3))
    for cells in (4, 16, 64, 160):
        noise = random.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
        picture += np.asarray(Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC), dtype=float) / 4
    file = io.BytesIO()
    Image.fromarray(picture.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_tars(folder: Path, pictures: int) -> list[Path]:
    paths = [folder / f"{place:03d}.tar" for place in range(TARS)]
    for place, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for number in range(place, pictures, TARS):
                for name, data in ((f"{number:06d}.jpg", jpeg(number)), (f"{number:06d}.txt", b"a picture of noise")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return paths


def ours(folder: Path, workers: int, epoch: int) -> Iterator[int]:
    """Pictures of each batch, over one epoch."""
    sets = open_sets([SetOptions(folder)], Reading(True))
    data = CaptionedImages(sets, Shaping(SIDE, SIDE), num_workers=workers, try_first=0)
    sampler = StatefulSampler(len(data), BATCH, seed=epoch)
    for _ in range(len(data) // BATCH):
        batch = data.batch(sampler.next(), epoch=epoch)
        data.prefetch(sampler.peek(), epoch=sampler.peek_epochs())
        assert batch.targets is not None
        yield len(batch.targets)
    data.close()


def fitted(image: Image.Image) -> torch.Tensor:
    cut = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1).contiguous().float() / 255


def same(caption: str) -> str:
    return caption


def theirs(paths: list[Path], workers: int, epoch: int) -> Iterator[int]:
    import webdataset

    stream = webdataset.WebDataset([str(path) for path in paths], shardshuffle=TARS, seed=epoch)
    stream = stream.shuffle(1000).decode("pil").to_tuple("jpg", "txt").map_tuple(fitted, same).batched(BATCH)
    for pictures, _ in webdataset.WebLoader(stream, batch_size=None, num_workers=workers):
        yield len(pictures)


def timed(batches: Iterator[int]) -> tuple[float, int]:
    """Seconds from the first batch to the last, and the pictures of those between."""
    next(batches)
    start = time.perf_counter()
    count = sum(batches)
    return time.perf_counter() - start, count


def cpu_seconds() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def compare(paths: list[Path], workers: int, rounds: int) -> dict[str, Any]:
    readers: dict[str, Callable[[int], Iterator[int]]] = {
        "ours": lambda epoch: ours(paths[0].parent, workers, epoch),
        "webdataset": lambda epoch: theirs(paths, workers, epoch),
    }
    rates: dict[str, list[float]] = {name: [] for name in readers}
    cpu: dict[str, list[float]] = {name: [] for name in readers}
    for epoch in range(rounds):
        for name, reader in readers.items():
            before = cpu_seconds()
            seconds, count = timed(reader(epoch))
            rates[name].append(count / seconds)
            cpu[name].append((cpu_seconds() - before) / (count + BATCH) * 1000)
    found: dict[str, Any] = {
        name: {
            "pictures_per_second": round(max(rates[name]), 1),
            "cpu_milliseconds_per_picture": round(min(cpu[name]), 2),
            "rounds": [round(rate, 1) for rate in rates[name]],
        }
        for name in readers
    }
    ratio = found["ours"]["pictures_per_second"] / found["webdataset"]["pictures_per_second"]
    return found | {"ratio": round(ratio, 2)}


def indexing(folder: Path) -> dict[str, float]:
    """Headers per second, of a tar of small members in the memory of the system."""
    path = folder / "small.tar"
    samples = 20_000
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            for kind, data in (("jpg", b"x" * 600), ("txt", b"y" * 40)):
                info = tarfile.TarInfo(f"{number:08d}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert len(index_tar(path).rows) == samples
        seconds.append(time.perf_counter() - start)
    path.unlink()
    return {"samples_per_second": round(samples / min(seconds))}


def permutation(count: int) -> dict[str, float]:
    """Seconds until the first sample of an epoch of `count` is drawn, and of 1,000 draws from there on."""
    sampler = StatefulSampler(count, 1, seed=0)
    start = time.perf_counter()
    sampler.next()
    first = time.perf_counter() - start
    for _ in range(1000):
        sampler.next()
    return {"samples": count, "first_draw_seconds": round(first, 2),
            "next_draw_microseconds": round((time.perf_counter() - start - first) * 1000, 1)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index = indexing(folder)
        paths = write_tars(folder, arguments.pictures)
        size = sum(path.stat().st_size for path in paths) / arguments.pictures
        found = {
            "machine": {
                "cpus": os.cpu_count(),
                "load": round(os.getloadavg()[0], 1),
                "python": platform.python_version(),
            },
            "pictures": arguments.pictures,
            "bytes_per_sample": round(size),
            "workers": arguments.workers,
            **compare(paths, arguments.workers, arguments.rounds),
            "index": index,
            "permutation": permutation(25_000_000),
        }
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
