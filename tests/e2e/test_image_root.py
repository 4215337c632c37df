"""How the Dockerfile's instructions are read to be run in a plain Debian (`python -m tests.image --root`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.image import ROOT, Instruction, instructions, mounts
from tests.image_root import PATH, Step, chrooted, commands_told, copy, expanded, home, places, steps

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_mounts_are_told_from_the_command() -> None:
    line = "--mount=from=uv,source=/uv,target=/bin/uv --mount=type=cache,target=/c  uv venv --seed"
    found, command = mounts(line)
    assert found == [{"from": "uv", "source": "/uv", "target": "/bin/uv"}, {"type": "cache", "target": "/c"}]
    assert command == "uv venv --seed"
    assert mounts("a --mount=b c") == ([], "a --mount=b c")


def test_names_stand_for_their_values() -> None:
    assert expanded("a/$b:${c}d-$e.", {"b": "1", "c": "2"}) == "a/1:2d-."


def test_each_step_has_what_came_before_it() -> None:
    text = (
        "ARG A=0\nFROM x AS first\nRUN never\nFROM y\nARG A=1\nARG B=$A/2\nENV P=/p:$PATH Q=$P\nWORKDIR /w\n"
        "WORKDIR in\nRUN one\nENV Q='a b' A=3\nUSER $Q\nARG R=$A\nRUN two\n"
    )
    listed = steps(instructions(text), {"A": "7"})
    one, two = (step for step in listed if step.instruction.word == "RUN")
    assert (one.workdir, one.user) == ("/w/in", "root") and (two.workdir, two.user) == ("/w/in", "a b")
    assert one.arguments == {"A": "7", "B": "7/2"}
    assert one.environment == {"PATH": PATH, "P": f"/p:{PATH}", "Q": ""}, "a line's names have their values of before"
    assert two.environment == {"PATH": PATH, "P": f"/p:{PATH}", "Q": "a b", "A": "3"}
    assert two.arguments is not None and two.arguments["R"] == "3", "ENV goes before ARG"


@pytest.mark.parametrize("line", ["ADD a b", "COPY --from=uv /uv /uv", "SHELL ['x']"])
def test_what_is_not_known_is_not_passed_over(line) -> None:
    with pytest.raises(ValueError, match="not known here"):
        steps(instructions(f"FROM a\n{line}\n"), {})


def test_the_dockerfile_ends_as_its_user_with_its_programs_in_front() -> None:
    last = steps(instructions(TEXT), {})[-1]
    assert (last.user, last.workdir) == ("trainer", "/work") and last.environment is not None
    assert last.environment["PATH"] == f"/opt/venv/bin:{PATH}" and last.environment["HF_HOME"] == "/cache/huggingface"


def test_commands_of_the_comments() -> None:
    assert commands_told(TEXT, "glm_training") == [["doctor"], ["train", "--config", "configs/quickstart.yaml"]]


def test_files_are_copied_as_docker_copies_them(tmp_path) -> None:
    for line in ("LICENSE /tmp/other.txt", "setup.py README.md ./", "configs settings"):
        copy(Step(Instruction("COPY", line), "/work"), tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    settings = {name for name in names if name.startswith("work/settings/")}
    assert names - settings == {"tmp/other.txt", "work/setup.py", "work/README.md"}
    assert {"work/settings/quickstart.yaml", "work/settings/recipes/gspo.yaml"} <= settings
    assert (tmp_path / "tmp/other.txt").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize(
    ("line", "said"), [("tests x", "not sent to Docker"), ("setup.py README.md x", "with / behind")]
)
def test_copies_that_docker_refuses(tmp_path, line, said) -> None:
    with pytest.raises(ValueError, match=said):
        copy(Step(Instruction("COPY", line)), tmp_path)


def test_a_users_home() -> None:
    passwd = "root:x:0:0:root:/root:/bin/bash\nroots:x:9:9::/no:/bin/sh\ntrainer:x:10001:10001::/home/trainer:/bin/sh\n"
    assert (home("root", passwd), home("trainer", passwd)) == ("/root", "/home/trainer")
    with pytest.raises(ValueError, match="no such user"):
        home("train", passwd)


def test_all_that_is_mounted_is_in_a_namespace_of_the_command(tmp_path) -> None:
    words = ["sh", "-c", "echo 'a b'"]
    command = chrooted(tmp_path, Step(Instruction("RUN", ""), "/w", "trainer"), words, {"/bin/uv": Path("/x y/uv")})
    assert command[:5] == ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    *before, last = command[-1].splitlines()
    assert f"mount --bind '/x y/uv' {tmp_path}/bin/uv" in before and before[0] == "set -e"
    assert last == f"exec chroot --userspec=trainer {tmp_path} /usr/bin/env --chdir=/w sh -c 'echo '\"'\"'a b'\"'\"''"


def test_places_to_mount_over_leave_no_files(tmp_path) -> None:
    root, source = tmp_path / "root", tmp_path / "uv"
    source.touch()
    (root / "etc").mkdir(parents=True)
    (root / "etc/hosts").write_text("kept")
    binds = {"/bin/uv": source, "/etc/hosts": source, "/cache/pip": tmp_path}
    with pytest.raises(RuntimeError), places(root, binds):
        assert (root / "bin/uv").is_file() and (root / "cache/pip").is_dir()
        raise RuntimeError
    assert not (root / "bin/uv").exists() and (root / "etc/hosts").read_text() == "kept"
