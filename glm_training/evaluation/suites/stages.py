"""The three stages of a benchmark: generate, judge, score. Each begins where it was interrupted, on any number of
processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from glm_training.data import DataError
from glm_training.data.pictures.images import decode_image
from glm_training.evaluation.suites.files import (
    LINES,
    RECORDS,
    RESULTS,
    PartFile,
    check_settled,
    lines_of,
    merge_records,
    read_settings,
    settle,
    write_whole,
)
from glm_training.evaluation.suites.protocol import EvaluationError, Failure, Maker, Picture, Record, Scores, Suite
from glm_training.evaluation.suites.results import results
from glm_training.utils.console import Console
from glm_training.utils.distributed import World, broadcast_object, gather_objects
from glm_training.utils.words import counted

JUDGED_AT_ONCE = 8
"""Pictures that a suite is given together."""

_NAMED = 5
_END = b"IEND\xaeB`\x82"
"""Of a PNG: the last chunk with its checksum."""
_TOLD = 20
"""Lines of progress away from a terminal."""


@dataclass(frozen=True)
class Place:
    """Where an evaluation lies. out: its folder. images: a folder of the user's in the benchmark's layout, None where
    the pictures are drawn into `out`."""

    out: Path
    images: Path | None = None

    @property
    def pictures(self) -> Path:
        """The folder in the benchmark's layout."""
        return self.images or self.out


def generate(
    suite: Suite,
    make: Maker,
    settings: Mapping[str, Any],
    place: Place,
    world: World,
    *,
    at_once: int,
    doing: str = "drawing",
) -> None:
    """Draws what is not there yet of `suite.pictures()`, in groups of `at_once` files: always the same groups, since
    the numbers of a batched model depend on how many are drawn together by a rounding.

    settings: all that decides the pictures. doing: what `make` does, for the line that says so. Raises EvaluationError
    where other settings drew what is there.
    """
    wanted = suite.pictures()

    def begin() -> None:
        _refuse_strangers(place.out, wanted)
        remedy = "Give another --out, or the settings of then"
        settle(place.out, "pictures", {"suite": suite.name, **settings, "at_once": at_once}, remedy=remedy)
        suite.prepare(place.out)

    together(world, begin, main_only=True)
    groups = [wanted[start : start + at_once] for start in range(0, len(wanted), at_once)]
    together(world, lambda: _draw(groups[world.rank :: world.world_size], make, place.out, world, doing))


def _refuse_strangers(out: Path, wanted: Sequence[Picture]) -> None:
    if "pictures" not in read_settings(out) and (found := [p.path for p in wanted if (out / p.path).exists()]):
        raise EvaluationError(
            f"{out} holds {found[0]}, and nothing is known of how it was drawn: give another --out, or name the folder "
            "as --images"
        )


def _draw(groups: Sequence[Sequence[Picture]], make: Maker, out: Path, world: World, doing: str) -> None:
    left = [group for group in groups if not all(is_whole(out / picture.path) for picture in group)]
    if not left:
        return
    console = Console(world.is_main)
    console.line(f"{doing} {counted(sum(map(len, left)), 'picture')}")
    with console.progress(len(left), every=max(1, len(left) // _TOLD)) as progress:
        for number, group in enumerate(left, start=1):
            missing = [not is_whole(out / picture.path) for picture in group]
            for picture, image, absent in zip(group, make(group), missing, strict=True):
                if absent:
                    save_whole(out / picture.path, image)
            progress.update(number, {})


def save_whole(path: Path, image: Image.Image) -> None:
    """A PNG under `path` whole, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    image.save(fresh, "PNG")
    os.replace(fresh, path)


def is_whole(path: Path) -> bool:
    """Whether a PNG is there to its end; its reader would forgive a few bytes."""
    try:
        data = path.read_bytes()
        decode_image(path, data)
    except (DataError, OSError):
        return False
    return data.endswith(_END)


def judge(suite: Suite, place: Place, world: World) -> None:
    """Records of every picture that has none, one of a failure, or one of other contents of the file.

    Raises EvaluationError where pictures are still to be drawn, and where another judge made what is there.
    """
    wanted = _judged(suite, place)
    suite.check_judge()

    def begin() -> dict[str, Record]:
        place.out.mkdir(parents=True, exist_ok=True)
        absent = [picture.path for picture in wanted if not (place.pictures / picture.path).exists()]
        if absent and place.images is None:
            raise EvaluationError(
                f"{counted(len(absent), 'picture')} of {len(wanted)} {'is' if len(absent) == 1 else 'are'} not drawn "
                f"in {place.out}: {_some(absent)}. Run --stage generate first, which does what is missing"
            )
        settings = {"suite": suite.name, "judge": suite.judged_by, **suite.judge_settings}
        if place.images is not None:
            settings["images"] = str(place.images.resolve())
        remedy = "Give another --out, with the pictures as --images where they are in this one"
        settle(place.out, "judge", settings, remedy=remedy)
        return merge_records(place.out, [picture.path for picture in wanted])

    known = together(world, begin, main_only=True)
    left = [picture for picture in wanted if not _is_known(known.get(picture.path), place.pictures / picture.path)]
    groups = [left[start : start + JUDGED_AT_ONCE] for start in range(0, len(left), JUDGED_AT_ONCE)]
    together(world, lambda: _judge(groups[world.rank :: world.world_size], suite, place, world))
    together(world, lambda: merge_records(place.out, [picture.path for picture in wanted]), main_only=True)


def _judged(suite: Suite, place: Place) -> list[Picture]:
    return suite.pictures() if place.images is None else suite.find(place.images)


def _judge(groups: Sequence[Sequence[Picture]], suite: Suite, place: Place, world: World) -> None:
    if not groups:
        return
    file = PartFile(place.out, world.rank)
    console = Console(world.is_main)
    console.line(f"judging {counted(sum(map(len, groups)), 'picture')} ({suite.judged_by})")
    with console.progress(len(groups), every=max(1, len(groups) // _TOLD)) as progress:
        for number, group in enumerate(groups, start=1):
            opened = [(picture, _opened(place.pictures / picture.path)) for picture in group]
            readable = [(picture, image) for picture, image in opened if isinstance(image, Image.Image)]
            said = dict(zip([p.path for p, _ in readable], suite.judge(readable) if readable else [], strict=True))
            said |= {picture.path: found for picture, found in opened if isinstance(found, Failure)}
            file.append([_record(picture, place.pictures / picture.path, said[picture.path]) for picture in group])
            progress.update(number, {})


def _opened(path: Path) -> Image.Image | Failure:
    try:
        return decode_image(path)
    except DataError as error:
        return Failure(str(error))


def _digest(path: Path) -> str | None:
    """Of the contents of a file; None where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return None


def _is_known(record: Record | None, path: Path) -> bool:
    """Whether it is of these contents; that of a failure is of none."""
    return record is not None and record.get("file") == _digest(path)


def _record(picture: Picture, path: Path, said: Record | Failure) -> Record:
    if isinstance(said, Failure):
        return {"picture": picture.path, "failure": said.reason}
    return {"picture": picture.path, "file": _digest(path), **said}


def score(suite: Suite, place: Place, world: World) -> Scores | None:
    """The figures of all records, on the main process, which writes them; None on the others.

    Raises EvaluationError where there is no record, or some pictures have none: the judge was interrupted; and where
    the records are of other pictures or questions.
    """

    def work() -> Scores:
        wanted = _judged(suite, place)
        asked = {"suite": suite.name, **suite.judge_settings}
        if place.images is not None:
            asked["images"] = str(place.images.resolve())
        check_settled(place.out, "judge", asked, remedy="Give the settings of then, or judge into another --out")
        known = merge_records(place.out, [picture.path for picture in wanted])
        missing = [picture.path for picture in wanted if picture.path not in known]
        if missing:
            raise EvaluationError(
                f"{counted(len(missing), 'picture')} of {len(wanted)} {'has' if len(missing) == 1 else 'have'} no "
                f"record in {place.out}: {_some(missing)}. Run --stage judge first, which does what is missing"
            )
        records = [known[picture.path] for picture in wanted]
        failed = {record["picture"]: record["failure"] for record in records if "failure" in record}
        good = [record for record in records if "failure" not in record]
        if not good:
            first = next(iter(failed.items()), ("none", "there are no pictures"))
            raise EvaluationError(f"no picture could be judged, so there are no figures. {first[0]}: {first[1]}")
        scores = _scored(suite, good, place.out)
        if failed:
            noted = f"{counted(len(failed), 'picture')} of {len(wanted)} could not be judged and count nowhere"
            scores.remarks.append(f"{noted}: {_some([f'{name} ({why})' for name, why in failed.items()])}")
        settings = read_settings(place.out)
        report = results(suite.name, scores, settings, pictures=len(wanted), failures=failed)
        write_whole(place.out / RESULTS, report)
        if scores.lines:
            write_whole(place.out / LINES, lines_of(scores.lines))
        return scores

    return work() if world.is_main else None


def _scored(suite: Suite, records: list[Record], out: Path) -> Scores:
    """Raises EvaluationError, naming the first, where a record is none of the suite's."""
    try:
        return suite.score(records)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        for record in records:
            try:
                suite.score([record])
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise EvaluationError(
                    f"{out / RECORDS}: what it says of {record['picture']} is no record of --suite {suite.name} "
                    f"({type(error).__name__}: {error}); delete the line and run the judge again, which does what is "
                    "missing"
                ) from error
        raise


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def together(world: World, work: Callable[[], Any], *, main_only: bool = False) -> Any:
    """What `work` gives on this process, or on all what it gives on the main one; none goes on while another failed.

    Raises EvaluationError on every process with what the first that failed has to say.
    """
    outcome, fault = None, None
    if world.is_main or not main_only:
        try:
            outcome = work()
        except (EvaluationError, OSError) as error:
            if world.world_size == 1:
                raise
            fault = str(error)
    faults = [found for found in gather_objects(world, fault) if found is not None]
    if faults:
        raise EvaluationError(faults[0])
    return broadcast_object(world, outcome) if main_only else outcome
