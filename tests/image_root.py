"""The Dockerfile's instructions in a plain Debian, one after the other: `python -m tests.image --root FOLDER`."""

from __future__ import annotations

import argparse
import json
import os
import posixpath
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.quickstart import machine
from glm_training.utils.console import Console
from tests.image import ROOT, Instruction, arguments, instructions, mounts, sent

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""What Docker begins with."""
SHM_MIB = 64
"""Of /dev/shm in a container, without --shm-size."""
LIMIT_SECONDS = 3600
AUTHORITIES = "/run/authorities.crt"
DEBIAN_PYTHON = "/usr/bin/python3"


@dataclass(frozen=True)
class Step:
    """An instruction of the last stage and what it runs in: folder, user, ENV, and ARG, which only RUN sees."""

    instruction: Instruction
    workdir: str = "/"
    user: str = "root"
    environment: Mapping[str, str] | None = None
    arguments: Mapping[str, str] | None = None


def expanded(text: str, values: Mapping[str, str]) -> str:
    """`text` with $NAME and ${NAME} as Docker reads them: a name that nobody gave is empty."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: values.get(found[1] or found[2], ""), text)


def steps(found: list[Instruction], given: Mapping[str, str]) -> list[Step]:
    """Of the last stage, with the values `given` to ARG. Raises ValueError for what is not known here."""
    first = max(number for number, each in enumerate(found) if each.word == "FROM") + 1
    listed = list[Step]()
    workdir, user = "/", "root"
    environment, arguments_seen = {"PATH": PATH}, dict[str, str]()
    for each in found[first:]:
        values = arguments_seen | environment
        if each.word == "ENV":
            pairs = dict(word.split("=", 1) for word in shlex.split(each.rest))
            environment = environment | {name: expanded(value, values) for name, value in pairs.items()}
        elif each.word == "ARG":
            name, default = each.rest.split("=", 1)
            arguments_seen = arguments_seen | {name: given.get(name, expanded(default, values))}
        elif each.word == "WORKDIR":
            workdir = posixpath.join(workdir, expanded(each.rest, values))
        elif each.word == "USER":
            user = expanded(each.rest, values)
        elif each.word not in ("RUN", "COPY", "ENTRYPOINT", "CMD") or each.rest.startswith("--from"):
            raise ValueError(f"{each.word} {each.rest}: not known here")
        listed.append(Step(each, workdir, user, environment, arguments_seen))
    return listed


def commands_told(text: str, image: str) -> list[list[str]]:
    """What follows the image's name in each `docker run` of a Dockerfile's comments."""
    comments = "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    lines = [line for line in comments.replace("\\\n", " ").splitlines() if line.startswith("docker run ")]
    words = [shlex.split(line, comments=True) for line in lines]
    return [each[each.index(image) + 1 :] for each in words]


def copy(step: Step, root: Path) -> None:
    """COPY: files by their names, of a folder what is in it."""
    *names, place = step.instruction.rest.split()
    target = posixpath.join(step.workdir, place)
    if len(names) > 1 and not place.endswith("/"):
        raise ValueError(f"COPY {step.instruction.rest}: several files go into a folder, with / behind its name")
    for name in names:
        files = list(sent(name))
        if not files:
            raise ValueError(f"COPY {step.instruction.rest}: {name} is not sent to Docker")
        for file in files:
            inner = file.relative_to(ROOT / name).as_posix() if (ROOT / name).is_dir() else ""
            named = posixpath.join(target, inner or (file.name if place.endswith("/") else ""))
            there = root / named.strip("/")
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, there)


def home(user: str, passwd: str) -> str:
    """Of a user in a passwd file. Raises ValueError for one that it does not have."""
    for line in passwd.splitlines():
        if line.split(":")[0] == user:
            return line.split(":")[5]
    raise ValueError(f"USER {user}: there is no such user in the image")


def chrooted(root: Path, step: Step, words: list[str], binds: Mapping[str, Path]) -> list[str]:
    """The command for `words` in `root` with what a container has, mounted for this command alone: its namespace, and
    all that is mounted in it, end with it."""
    there = shlex.quote(str(root))
    lines = [
        "set -e",
        f"mount -t proc proc {there}/proc",
        f"mount -t sysfs -o ro sysfs {there}/sys",
        f"mount -t tmpfs -o mode=1777,size={SHM_MIB}m shm {there}/dev/shm",
        *(f"mount --bind {shlex.quote(str(source))} {there}{place}" for place, source in binds.items()),
        "exec "
        + shlex.join(
            ["chroot", f"--userspec={step.user}", str(root), "/usr/bin/env", f"--chdir={step.workdir}", *words]
        ),
    ]
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", "\n".join(lines)]


@contextmanager
def places(root: Path, binds: Mapping[str, Path]) -> Iterator[None]:
    """Something at each place to mount over; the files are gone afterwards."""
    made = []
    for place, source in binds.items():
        there = root / place.strip("/")
        if source.is_dir():
            there.mkdir(parents=True, exist_ok=True)
        elif not there.exists():
            there.parent.mkdir(parents=True, exist_ok=True)
            there.touch()
            made.append(there)
    try:
        yield
    finally:
        for there in made:
            there.unlink()


@dataclass(frozen=True)
class Image:
    """The Debian in `root`. always: what is mounted at each command, place -> file here. stages: folder of each stage
    that RUN mounts from. network: variables for pip and uv. given: those of docker run --env."""

    root: Path
    always: Mapping[str, Path]
    stages: Mapping[str, Path]
    network: Mapping[str, str]
    given: Mapping[str, str]

    def run(self, step: Step, words: list[str], *, building: bool = True) -> tuple[int, str]:
        """The return code of a command, and what it printed. Of a RUN its mounts are made."""
        asked = mounts(step.instruction.rest)[0] if step.instruction.word == "RUN" else []
        binds = {**self.always, **dict(map(self._mounted, asked))}
        own = step.environment or {}
        variables = {**(step.arguments or {}), **own, **self.network} if building else {**own, **self.given}
        variables["HOME"] = home(step.user, (self.root / "etc/passwd").read_text(encoding="utf-8"))
        with places(self.root, binds):
            done = subprocess.run(
                chrooted(self.root, step, words, binds), env=variables, stdin=subprocess.DEVNULL, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", timeout=LIMIT_SECONDS,
            )  # fmt: skip
        return done.returncode, done.stdout

    def _mounted(self, mount: Mapping[str, str]) -> tuple[str, Path]:
        """A cache is a folder beside the root, which stays, as Docker's does."""
        if mount.get("type") == "cache":
            cache = self.root.with_name(f"{self.root.name}.cache") / mount["target"].strip("/").replace("/", "_")
            cache.mkdir(parents=True, exist_ok=True)
            return mount["target"], cache
        return mount["target"], self.stages[mount["from"]] / mount["source"].strip("/")

    def do(self, step: Step) -> tuple[int, str]:
        """One instruction, as `docker build` does it."""
        word, rest = step.instruction.word, step.instruction.rest
        if word == "RUN":
            return self.run(step, ["/bin/sh", "-c", mounts(rest)[1]])
        if word == "COPY":
            copy(step, self.root)
        if word == "WORKDIR":
            (self.root / step.workdir.strip("/")).mkdir(parents=True, exist_ok=True)
        return 0, ""

    def bytes_used(self) -> int:
        """What its files take of the disk, in bytes."""
        told = subprocess.run(["du", "-sxB1", str(self.root)], capture_output=True, text=True, check=True).stdout
        return int(told.split()[0])


def build(root: Path, options: argparse.Namespace) -> int:
    """Runs the Dockerfile in `root` up to the first instruction that fails, then what it says to run; 1 where one
    failed. What is known is in `options.out` after each of them."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    found = instructions(text)
    versions = arguments(found)
    with TemporaryDirectory() as place:
        install = ["-m", "pip", "install", "-q", "--no-deps", "--target", place, f"uv=={versions['UV']}"]
        subprocess.run([sys.executable, *install], check=True)
        always = {"/etc/resolv.conf": Path("/etc/resolv.conf")}
        network = dict[str, str]()
        if options.certificates is not None:
            always[AUTHORITIES] = options.certificates.resolve()
            network = dict.fromkeys(("PIP_CERT", "SSL_CERT_FILE"), AUTHORITIES)
        given = dict(each.split("=", 1) for each in options.env)
        image = Image(root, always, {"uv": Path(place, "bin")}, network, given)
        report: dict[str, Any] = {"machine": machine(), "load_before": round(os.getloadavg()[0], 1)}
        report |= {"replaced": replaced(image, versions, options.debian_python), "bytes": {"base": image.bytes_used()}}
        for line in report["replaced"]:
            Console().line(f"replaced: {line}")
        report |= {"steps": [], "runs": []}
        for record in _built(image, steps(found, _given(image, options.debian_python))):
            report["steps"].append(record)
            write(report, options.out)
        report["bytes"]["built"] = image.bytes_used()
        if not any(each["returned"] for each in report["steps"]):
            for record in _run(image, text):
                report["runs"].append(record)
                write(report, options.out)
    size = {name: f"{count / 1e9:.2f} GB" for name, count in report["bytes"].items()}
    Console().line(f"base {size['base']}, image {size['built']}")
    return 1 if any(each["returned"] for each in report["steps"] + report["runs"]) else 0


def write(report: Mapping[str, Any], out: Path | None) -> None:
    """As JSON, where there is a place for it."""
    if out is not None:
        out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def replaced(image: Image, versions: Mapping[str, str], debian_python: bool) -> list[str]:
    """What the Dockerfile names that is something else here."""
    release = re.search(r'PRETTY_NAME="(.*)"', (image.root / "etc/os-release").read_text(encoding="utf-8"))
    lines = [
        f"base image {versions['BASE']}: {release[1] if release else 'a Debian'}, a minimal one in a folder",
        f"ghcr.io/astral-sh/uv:{versions['UV']}: uv {versions['UV']} of PyPI",
    ]
    if debian_python:
        lines.append(f"Python {versions['PYTHON']} that uv downloads: python3-dev of that Debian")
    if image.network:
        lines.append("authorities for pip and uv: those of this machine's network")
    if image.given:
        lines.append("docker run: with --env " + ", ".join(f"{name}={value}" for name, value in image.given.items()))
    return [*lines, "docker run --gpus all: no GPU; volumes: none, the image's own folders"]


def _given(image: Image, debian_python: bool) -> dict[str, str]:
    """ARG that is something else here. Raises RuntimeError where Debian's Python cannot be installed."""
    if not debian_python:
        return {}
    install = "apt-get update && apt-get install -y --no-install-recommends python3-dev && rm -rf /var/lib/apt/lists/*"
    code, told = image.run(Step(Instruction("RUN", install), environment={"PATH": PATH}), ["/bin/sh", "-c", install])
    if code:
        raise RuntimeError(f"apt-get install python3-dev ended with {code}:\n{told[-2000:]}")
    return {"PYTHON": DEBIAN_PYTHON}


def _built(image: Image, todo: list[Step]) -> Iterator[dict[str, Any]]:
    """A record of each instruction that was done; none after one that failed."""
    for step in todo:
        record, told = _timed(f"{step.instruction.word} {step.instruction.rest}", lambda step=step: image.do(step))
        yield record
        if record["returned"]:
            Console().error(told[-4000:])
            return


def _run(image: Image, text: str) -> Iterator[dict[str, Any]]:
    """A record, with what it printed, of the image's own command, and of those in the comments that are others."""
    last = steps(instructions(text), {})[-1]
    words = {each.word: json.loads(each.rest) for each in instructions(text) if each.word in ("ENTRYPOINT", "CMD")}
    told = [words["CMD"], *(each for each in commands_told(text, "glm_training") if each != words["CMD"])]
    for each in told:
        short = ["training.max_steps=2"] if each[0] == "train" else []
        command = [*words["ENTRYPOINT"], *each, *short]
        record, printed = _timed(shlex.join(command), lambda command=command: image.run(last, command, building=False))
        Console().line(printed)
        yield record | {"user": last.user, "printed": printed.splitlines()}


def _timed(name: str, action: Any) -> tuple[dict[str, Any], str]:
    started = time.perf_counter()
    code, told = action()
    seconds = round(time.perf_counter() - started, 1)
    Console().line(f"{seconds:7.1f} s, returned {code}: {name}")
    return {"instruction": name, "seconds": seconds, "returned": code}, told
