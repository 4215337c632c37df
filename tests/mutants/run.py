"""Makes each mistake of the catalogue in a copy of the tree and tells whether the tests notice.

python -m tests.mutants.run, on POSIX. How to read what it prints: CONTRIBUTING.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.mutants.catalogue import ROOT, Mutation, misfit, mutations

ENOUGH = 0.97
"""Share of the mutations that must be noticed."""
KILLED, SURVIVED, TIMEOUT, UNJUDGED = "killed", "survived", "timeout", "unjudged"
_FORKS = multiprocessing.get_context("forkserver")


def tree_copy(folder: Path) -> Path:
    """The tracked and new files of this tree in `folder`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


class FirstFailure:
    """For pytest: writes the id of the first test, or file, that fails. Read from the log it could be cut short: the
    values in its brackets may hold what parts it from the message."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.path.exists():
            self.path.write_text(report.nodeid, encoding="utf-8")

    pytest_collectreport = pytest_runtest_logreport


def _pytest(copy: str, tests: tuple[str, ...], log: str, failed: str) -> None:
    """In a process of its own: the tests of the copy; its exit code is pytest's, and the first test that fails is
    named in the file `failed`."""
    os.setsid()  # so that what tests start ends with them
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in [name for name in sys.modules if name.split(".")[0] in ("glm_training", "tests", "examples")]:
        del sys.modules[name]
    os.chdir(copy)
    sys.path[:] = [copy, *(place for place in sys.path if Path(place or ".").resolve() not in (ROOT, Path(copy)))]
    os.environ["PYTHONPATH"] = copy
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import pytest

    sys.exit(
        pytest.main(
            ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=line", *tests], [FirstFailure(Path(failed))]
        )
    )


class Copies:
    """Copies of the tree that test runs take turns in."""

    def __init__(self, folder: Path, count: int, seconds: float) -> None:
        self.seconds = seconds
        self._free: queue.Queue[Path] = queue.Queue()
        for number in range(count):
            self._free.put(tree_copy(folder / f"copy-{number}"))

    def outcome(self, mutation: Mutation | None, tests: tuple[str, ...]) -> tuple[str, str]:
        """What the tests say of the tree with `mutation` in it, or as it is, and the first that fails."""
        copy = self._free.get()
        try:
            if mutation is None:
                return self._run(copy, tests)
            path = copy / mutation.path
            before = path.read_bytes()
            path.write_text(mutation.applied(copy), encoding="utf-8")
            try:
                return self._run(copy, tests)
            finally:
                path.write_bytes(before)
        finally:
            self._free.put(copy)

    def _run(self, copy: Path, tests: tuple[str, ...]) -> tuple[str, str]:
        log, failed = copy.with_suffix(".log"), copy.with_suffix(".failed")
        failed.unlink(missing_ok=True)
        process = _FORKS.Process(target=_pytest, args=(str(copy), tests, str(log), str(failed)))
        process.start()
        process.join(self.seconds)
        overdue = process.is_alive()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        if overdue:
            return TIMEOUT, f"longer than {self.seconds:.0f} s"
        if process.exitcode == 0:
            return SURVIVED, ""
        if failed.exists():
            return KILLED, failed.read_text(encoding="utf-8")
        told = log.read_text(encoding="utf-8", errors="replace")
        return KILLED, told.strip()[-300:] or f"exit code {process.exitcode}"


class Ledger:
    """Outcomes kept in a file, so that a run goes on where another was stopped. An outcome counts while the mutated
    file and the test files are the same."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, dict[str, str]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.known[row["key"]] = row

    @staticmethod
    def key(mutation: Mutation, tests: tuple[str, ...]) -> str:
        digest = hashlib.sha256(repr((mutation, tests)).encode())
        for name in sorted({test.split("::")[0] for test in tests}):
            files = [ROOT / name] if (ROOT / name).is_file() else sorted((ROOT / name).rglob("*.py"))
            for file in files:
                digest.update(file.read_bytes())
        digest.update((ROOT / mutation.path).read_bytes())
        return digest.hexdigest()

    def keep(self, key: str, outcome: str, by: str, what: str) -> None:
        self.known[key] = {"key": key, "outcome": outcome, "by": by, "what": what}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.known[key]) + "\n")


class Session:
    def __init__(self, copies: Copies, ledger: Ledger) -> None:
        self.copies, self.ledger = copies, ledger

    def judge(self, mutation: Mutation, whole: bool) -> tuple[str, str]:
        """(outcome, what noticed it); `UNJUDGED` where that fails without the mutation too."""
        outcome, by = self._kept(mutation, mutation.tests)
        return self._kept(mutation, ("tests",)) if outcome == SURVIVED and whole else (outcome, by)

    def _kept(self, mutation: Mutation, tests: tuple[str, ...]) -> tuple[str, str]:
        key = Ledger.key(mutation, tests)
        if key not in self.ledger.known:
            outcome, by = self.copies.outcome(mutation, tests)
            if outcome != SURVIVED and self.copies.outcome(None, (by,) if "::" in by else tests)[0] != SURVIVED:
                return UNJUDGED, f"{by} fails without it"
            self.ledger.keep(key, outcome, by, str(mutation))
        row = self.ledger.known[key]
        return row["outcome"], row["by"]


def report(session: Session, chosen: Iterable[Mutation], jobs: int, whole: bool) -> int:
    """Prints a line for each and the sum; the exit code."""
    counts = dict.fromkeys((KILLED, TIMEOUT, SURVIVED, UNJUDGED), 0)
    survivors: list[str] = []

    def one(mutation: Mutation) -> tuple[Mutation, str, str, float]:
        started = time.monotonic()
        outcome, by = session.judge(mutation, whole)
        return mutation, outcome, by, time.monotonic() - started

    with ThreadPoolExecutor(jobs) as pool:
        for mutation, outcome, by, seconds in pool.map(one, chosen):
            counts[outcome] += 1
            print(f"{outcome:<9} {seconds:5.1f} s  {mutation}{f'  [{by}]' if by else ''}", flush=True)
            if outcome in (SURVIVED, UNJUDGED):
                survivors.append(f"{mutation}\n    {mutation.old!r} -> {mutation.new!r}\n    {by or 'unnoticed'}")
    total, noticed = sum(counts.values()), counts[KILLED] + counts[TIMEOUT]
    print(
        f"\n{total} mutations: {noticed} killed ({counts[TIMEOUT]} by the time limit), {counts[SURVIVED]} survived, ",
        end="",
    )
    print(f"{counts[UNJUDGED]} not judged; {100 * noticed / max(total, 1):.1f} % killed")
    print("\n".join(survivors))
    return 0 if noticed >= ENOUGH * total else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only mutations in whose file or description one of these occurs")
    parser.add_argument("--whole", action="store_true", help="what its own tests let pass meets the whole suite")
    parser.add_argument("--jobs", type=int, default=2, help="test runs at a time")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of a test run")
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "glm_training-mutants.jsonl")
    arguments = parser.parse_args()
    chosen = [one for one in mutations() if not arguments.words or any(word in str(one) for word in arguments.words)]
    stale = {mutation: why for mutation in chosen if (why := misfit(mutation)) is not None}
    _FORKS.set_forkserver_preload(["tests.warm_libraries"])
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = Copies(Path(folder), arguments.jobs, arguments.seconds)
        fitting = [mutation for mutation in chosen if mutation not in stale]
        code = report(Session(copies, Ledger(arguments.state)), fitting, arguments.jobs, arguments.whole)
    for mutation, why in stale.items():
        print(f"stale: {mutation}: {why}", file=sys.stderr)
    return 2 if stale else code


if __name__ == "__main__":
    sys.exit(main())
