"""What of the Dockerfile can be tried where there is no Docker, on Debian:

    python -m tests.image

asks apt whether it has the packages, has pip resolve the libraries for this Python with what is copied into the image,
and asks the uv of that version whether it knows the Python. All need a network; nothing stays installed. Not tried: the
base image and its Ubuntu, that Python, a GPU.

    debootstrap --variant=minbase bookworm FOLDER
    python -m tests.image --root FOLDER --out benchmarks/results/image.json

runs the file in that Debian, as root, by chroot: each instruction in its order, the image's own command, and the run of
the file's comment, two steps of it. What the Dockerfile asks of elsewhere and is replaced is told. FOLDER is changed;
what is mounted is gone with each command. --debian-python: of the Debian, where uv cannot reach GitHub; --certificates
FILE: for a network whose authorities Debian does not know; --env OMP_NUM_THREADS=1: on a machine that has other work.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from glm_training.utils.console import Console

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Instruction:
    """A line of a Dockerfile: its word, and what follows, with lines that go on joined."""

    word: str
    rest: str


def instructions(text: str) -> list[Instruction]:
    """All of a Dockerfile, without its comments."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def mounts(rest: str) -> tuple[list[dict[str, str]], str]:
    """The options of each --mount of a RUN line, and what follows."""
    flags, command = re.fullmatch(r"((?:--mount=\S+\s+)*)(.*)", rest).groups()  # type: ignore[union-attr]  # all fits
    each = [flag.removeprefix("--mount=").split(",") for flag in flags.split()]
    return [dict(option.split("=", 1) for option in options) for options in each], command


def commands(found: list[Instruction]) -> list[list[str]]:
    """Each command of the RUN lines, in words."""
    runs = [mounts(each.rest)[1] for each in found if each.word == "RUN"]
    return [shlex.split(part) for run in runs for part in run.split("&&")]


def apt_packages(found: list[Instruction]) -> list[str]:
    """What apt-get is to install."""
    wanted = [words[2:] for words in commands(found) if words[:2] == ["apt-get", "install"]]
    return [word for words in wanted for word in words if not word.startswith("-")]


def pip_words(found: list[Instruction]) -> list[list[str]]:
    """What follows `pip install`."""
    return [words[2:] for words in commands(found) if words[:2] == ["pip", "install"]]


def copied(found: list[Instruction]) -> list[str]:
    """Files and folders of the repository that are copied into the image."""
    return [name for each in found if each.word == "COPY" for name in each.rest.split()[:-1]]


def arguments(found: list[Instruction]) -> dict[str, str]:
    """ARG lines: name -> default."""
    return dict(each.rest.split("=", 1) for each in found if each.word == "ARG")


def is_sent(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore lets a path through: the last pattern that fits it, or a folder above it, decides."""
    sent = True
    above = [path, *map(str, Path(path).parents)][:-1]
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        anywhere = bare.removeprefix("**/")
        fits = any(fnmatch.fnmatch(Path(one).name, anywhere) if anywhere != bare else _fits(one, bare) for one in above)
        if fits:
            sent = pattern.startswith("!")
    return sent


def _fits(path: str, pattern: str) -> bool:
    """Stars do not reach over a slash."""
    return path.count("/") == pattern.count("/") and fnmatch.fnmatch(path, pattern)


def patterns(text: str) -> list[str]:
    """The lines of a .dockerignore."""
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def sent(name: str) -> Iterator[Path]:
    """The files of the repository's file or folder `name` that .dockerignore lets through."""
    rules = patterns((ROOT / ".dockerignore").read_text(encoding="utf-8"))
    source = ROOT / name
    for file in [source] if source.is_file() else sorted(source.rglob("*")):
        if file.is_file() and is_sent(file.relative_to(ROOT).as_posix(), rules):
            yield file


def fill(folder: Path) -> None:
    """What the image has of the repository, into a folder."""
    for name in dict.fromkeys(copied(instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")))):
        for file in sent(name):
            place = folder / file.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)


def uv_knows(version: str, python: str) -> bool:
    """Whether uv of that version, from PyPI, has this Python among its downloads."""
    with TemporaryDirectory() as place:
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place, f"uv=={version}"]
        if subprocess.run(install, capture_output=True).returncode != 0:
            return False
        listed = [f"{place}/bin/uv", "python", "list", "--offline", "--only-downloads", "--all-versions", python]
        told = subprocess.run(listed, capture_output=True, text=True, env=os.environ | {"UV_CACHE_DIR": f"{place}/c"})
        return f"cpython-{python}-" in told.stdout


def main() -> int:
    """1 where something does not resolve or run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, metavar="FOLDER", help="of a plain Debian to run the file in")
    parser.add_argument("--debian-python", action="store_true", help="not the one that uv downloads")
    parser.add_argument("--certificates", type=Path, metavar="FILE", help="of authorities, for pip and uv")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="as of docker run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="what came of --root, as JSON, after each step")
    arguments = parser.parse_args()
    if arguments.root is None:
        return look_up()
    from tests.image_root import build

    return build(arguments.root.resolve(), arguments)


def look_up() -> int:
    """Asks for packages, libraries and the Python; 1 where one is not to be had."""
    found = instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    say, faults = Console().line, 0
    packages = apt_packages(found)
    told = subprocess.run(["apt-cache", "policy", *packages], capture_output=True, text=True).stdout
    for name, candidate in zip(packages, re.findall(r"Candidate: (.+)", told), strict=False):
        faults += candidate == "(none)"
        say(f"apt {name}: {candidate}")
    faults += len(packages) - len(re.findall(r"Candidate: ", told))
    with TemporaryDirectory() as place:
        folder = Path(place)
        fill(folder)
        for words in pip_words(found):
            there = [word.replace("/tmp/", f"{place}/") for word in words]
            dry = [sys.executable, "-m", "pip", "install", "--dry-run", "-q", "--ignore-installed", *there]
            done = subprocess.run(dry, cwd=folder, capture_output=True, text=True)
            faults += done.returncode != 0
            say(f"pip install {' '.join(words)}: " + ("resolves" if done.returncode == 0 else done.stderr[-500:]))
    known = uv_knows(arguments(found)["UV"], arguments(found)["PYTHON"])
    faults += not known
    say(f"uv {arguments(found)['UV']}: {'has' if known else 'has no'} Python {arguments(found)['PYTHON']}")
    say("not tried: the base image and its Ubuntu, that Python, a GPU")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
