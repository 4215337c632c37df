"""Whose a run directory is: taken by one run, kept from the next, set aside whole, or gone on with."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from glm_training.checkpoint.commit import save_checkpoint
from glm_training.checkpoint.ledger import Ledger
from glm_training.checkpoint.manifest import read_manifest
from glm_training.checkpoint.resume import load_checkpoint
from glm_training.checkpoint.run_record import RunRecord
from glm_training.config import Config, load_config
from glm_training.engine.errors import SettingsError, TrainingError
from glm_training.engine.run_directory import chosen_point, held_run_directory, occupied_message
from glm_training.utils.distributed import World
from glm_training.utils.folder_lock import LOCK
from tests.faulty_system import refusing


def config_of(folder: Path, *overrides: str) -> Config:
    path = folder / "run.yaml"
    path.write_text(f"output_dir: {folder}/run\nlogging: {{use_tensorboard: false}}\n")
    pairs = "training.method=dpo" in overrides
    needed = [f"data.pairs={folder}"] if pairs else ["training.use_reward=false", f"data.target_images_dir={folder}"]
    return load_config(path, [*needed, *overrides])


def begin(config: Config, *, steps: int = 0, saved: int = 0, **options: bool) -> int | None:
    """A run that logs `steps` figures, saves after `saved` more steps than it resumed with, and ends; that step."""
    choose = partial(chosen_point, config, auto=options.get("auto", False))
    with held_run_directory(config, World(), choose, **options) as directory:
        directory.make_room(World())
        start = 0 if directory.point is None else load_checkpoint(directory.point.path)["s"]["step"]
        with directory.open(config, World(), 100) as log:
            for step in range(start + 1, start + steps + 1):
                log.log(step, {"loss": 1.0})
        if saved:
            save_checkpoint(config.checkpoint_dir(), start + saved, {"s": {"step": start + saved}}, total_limit=None)
    return None if directory.point is None else start


def held(config: Config):
    """A run of this process that is on."""
    return held_run_directory(config, World(), lambda: None)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -- one run at a time -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("running", "here"),
    [
        ([], []),
        ([], ["checkpoint.resume_from=latest"]),
        ([], ["output_dir={}/two", "checkpoint.save_dir={}/run/checkpoints"]),
        (["checkpoint.save_dir={}/saves"], ["output_dir={}/two", "checkpoint.save_dir={}/saves"]),
        (
            ["logging.use_tensorboard=true", "logging.log_dir={}/events"],
            ["output_dir={}/two", "logging.use_tensorboard=true", "logging.log_dir={}/link"],
        ),
    ],
)
def test_a_second_run_is_refused_by_name_and_changes_nothing(tmp_path, running, here):
    (tmp_path / "link").symlink_to(tmp_path / "events")
    first, second = (config_of(tmp_path, *(word.format(tmp_path) for word in words)) for words in (running, here))
    with held(first):
        before = files(tmp_path)
        with pytest.raises(SettingsError, match=f"in use by another run .host .+, pid {os.getpid()}, since 20"):
            begin(second, overwrite=True)
        assert files(tmp_path) == before and not (tmp_path / "two").exists()
    assert begin(first, steps=1) is None
    assert not list(tmp_path.rglob(LOCK))


def test_runs_with_folders_of_their_own_share_a_cache(tmp_path):
    shared = ["training.method=dpo", f"dpo.cache_dir={tmp_path}/cache"]
    with held(config_of(tmp_path, *shared)):
        assert begin(config_of(tmp_path, *shared, f"output_dir={tmp_path}/two"), steps=1) is None


def test_a_run_that_fails_to_load_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), held(config_of(tmp_path)):
        assert (tmp_path / "run" / LOCK).exists()
        raise ZeroDivisionError
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lost", ["renamed", "removed", "unlocked"])
def test_a_folder_that_a_run_loses_stays_its_own(tmp_path, caplog, lost):
    config, latest = config_of(tmp_path), config_of(tmp_path, "checkpoint.resume_from=latest")
    with held(config) as directory, directory.open(config, World(), 100):
        save_checkpoint(config.checkpoint_dir(), 1, {"s": {"step": 1}}, total_limit=None)
        directory.confirm(config)
        run = Ledger.read(config.checkpoint_dir()).run
        if lost == "renamed":
            os.rename(tmp_path / "run", tmp_path / "moved")
        elif lost == "removed":
            shutil.rmtree(tmp_path / "run")
        else:
            (tmp_path / "run" / LOCK).unlink()
        directory.confirm(config)
        directory.confirm(config)
        assert caplog.text.count("renamed, removed or unlocked by somebody") == 1
        with pytest.raises(SettingsError, match="in use by another run"):
            begin(latest)
        save_checkpoint(config.checkpoint_dir(), 2, {"s": {"step": 2}}, total_limit=None)
    saved = sorted(path.name for path in config.checkpoint_dir().glob("step-*"))
    assert saved == ["step-000001", "step-000002"][lost != "unlocked" :]
    assert read_manifest(config.checkpoint_dir() / "step-000002").run == run == RunRecord.read(config.output_dir).run
    assert begin(latest) == 2


def test_a_run_whose_folder_another_one_has_taken_saves_nothing_there(tmp_path):
    config = config_of(tmp_path)
    with held(config) as first, first.open(config, World(), 100):
        os.rename(tmp_path / "run", tmp_path / "moved")
        with held(config) as second, second.open(config, World(), 100):
            before = files(tmp_path / "run")
            with pytest.raises(TrainingError, match=f"in use by another run .*pid {os.getpid()}.*has begun there"):
                first.confirm(config)
            second.confirm(config)
            assert files(tmp_path / "run") == before


# -- a run that starts -------------------------------------------------------------------------------------------------


def test_a_run_that_starts_does_not_take_a_folder_that_holds_one(tmp_path):
    config = config_of(tmp_path)
    begin(config, steps=2, saved=2)
    before = files(tmp_path)
    with pytest.raises(SettingsError) as refused:
        begin(config)
    told = str(refused.value)
    assert f"output_dir: {tmp_path}/run holds a run already, of 20" in told
    assert told.count("holds a run already") == 1, "what lies inside goes with it"
    assert "--resume: it goes on" in told and "another output_dir" in told
    assert f"--overwrite: it is renamed, whole, to {tmp_path}/run.old-1" in told
    assert occupied_message(config) == told
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "free"),
    [
        ([], True),
        (["notes.txt", "data/0.png", "checkpoints/base.safetensors", "samples/mine.png"], True),
        (["config.yaml"], False),
        (["metrics.jsonl"], False),
        (["checkpoints/step-000010/manifest.json"], False),
        (["samples/step-000000/0.png"], False),
        (["checkpoints/.partial-step-000010/states/s.json"], False),
    ],
)
def test_what_holds_a_run_and_what_does_not(tmp_path, content, free):
    (tmp_path / "run").mkdir()
    for name in content:
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    before = files(tmp_path / "run")
    if free:
        begin(config_of(tmp_path), steps=1)
        assert files(tmp_path / "run").items() >= before.items()
        return
    with pytest.raises(SettingsError, match="Choose one"):
        begin(config_of(tmp_path))
    assert files(tmp_path / "run") == before


def test_a_file_of_the_users_own_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine")
    with pytest.raises(SettingsError, match=r"run/config.yaml is no run's, and would be written over") as refused:
        begin(config_of(tmp_path))
    assert "--resume" not in str(refused.value)


def test_a_run_that_came_to_nothing_is_no_run(tmp_path):
    begin(config_of(tmp_path))
    (tmp_path / "run" / "cache").mkdir()
    first = RunRecord.read(tmp_path / "run")
    begin(config_of(tmp_path), steps=1)
    assert RunRecord.read(tmp_path / "run").run != first.run and (tmp_path / "run" / "cache").exists()


@pytest.mark.parametrize("key", ["checkpoint.save_dir", "checkpoint.lora_dir", "logging.log_dir"])
def test_a_folder_elsewhere_that_holds_another_run_is_named_by_its_key(tmp_path, key):
    shared = [f"{key}={tmp_path}/shared", "logging.use_tensorboard=true", "lora.enabled=true"]
    shared.append("checkpoint.save_lora=true")
    begin(config_of(tmp_path, *shared), steps=1, saved=1)
    if key == "checkpoint.lora_dir":
        (tmp_path / "shared" / "step-000001").mkdir()
    second = config_of(tmp_path, *shared, f"output_dir={tmp_path}/two")
    with pytest.raises(SettingsError, match=f"^{key}: {tmp_path}/shared holds a run already"):
        begin(second)
    assert not (tmp_path / "two").exists()
    begin(second, overwrite=True)
    assert (tmp_path / "shared.old-1").is_dir() and (tmp_path / "run" / "metrics.jsonl").exists()


# -- set aside ---------------------------------------------------------------------------------------------------------


def test_overwrite_sets_the_old_run_aside_whole(tmp_path, capsys):
    config = config_of(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    begin(config, steps=2, saved=2)
    first, run = files(tmp_path / "run"), Ledger.read(config.checkpoint_dir()).run
    begin(config, steps=1, overwrite=True)
    assert files(tmp_path / "run.old-1") == first
    assert f"set aside: {tmp_path}/run is now {tmp_path}/run.old-1" in capsys.readouterr().out
    assert not (tmp_path / "run" / "notes.txt").exists() and Ledger.read(config.checkpoint_dir()).run != run
    begin(config, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["run", "run.old-1", "run.old-2"]
    begin(config, overwrite=True)
    assert not (tmp_path / "run.old-3").exists(), "there was nothing to set aside"


def test_overwrite_of_a_link_leaves_the_link(tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "large disk")
    begin(config_of(tmp_path), steps=1)
    begin(config_of(tmp_path), steps=2, overwrite=True)
    assert (tmp_path / "run").is_symlink() and (tmp_path / "large disk.old-1" / "metrics.jsonl").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_overwrite_does_not_take_away_what_is_needed(tmp_path, monkeypatch):
    begin(config_of(tmp_path), steps=1)
    before = files(tmp_path)
    (tmp_path / "run" / "prompts.txt").write_text("a cat\n")
    with pytest.raises(SettingsError, match=r"cannot be set aside \(--overwrite\) with data.prompts_file \(.*prompts"):
        begin(config_of(tmp_path, f"data.prompts_file={tmp_path}/run/prompts.txt"), overwrite=True)
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(SettingsError, match="with the current folder in it"):
        begin(config_of(tmp_path), overwrite=True)
    monkeypatch.chdir(tmp_path)
    inner = config_of(tmp_path, f"output_dir={tmp_path}/run/inner")
    with held(inner), pytest.raises(SettingsError, match="with a run that is in .*/run/inner"):
        begin(config_of(tmp_path), overwrite=True)
    (tmp_path / "run" / "prompts.txt").unlink()
    assert files(tmp_path) == before


def test_a_run_is_not_resumed_and_set_aside_at_once(tmp_path):
    begin(config_of(tmp_path), steps=1, saved=1)
    with pytest.raises(SettingsError, match="do one of the two"):
        begin(config_of(tmp_path, "checkpoint.resume_from=latest"), overwrite=True)


# -- gone on with ------------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_id_and_a_new_one_has_another(tmp_path):
    config, latest = config_of(tmp_path), config_of(tmp_path, "checkpoint.resume_from=latest")
    begin(config, saved=1)
    assert begin(latest, saved=1) == 1
    manifests = [read_manifest(config.checkpoint_dir() / f"step-00000{step}") for step in (1, 2)]
    record = RunRecord.read(config.output_dir)
    assert manifests[0].run == manifests[1].run == Ledger.read(config.checkpoint_dir()).run == record.run
    assert record.checkpoints == "checkpoints"
    branch = config_of(tmp_path, f"checkpoint.resume_from={tmp_path}/run", f"output_dir={tmp_path}/branch")
    assert begin(branch, saved=1) == 2
    assert read_manifest(tmp_path / "branch/checkpoints/step-000003").run not in (None, record.run)


def test_a_new_run_killed_before_its_first_save_does_not_resume_the_old_one(tmp_path):
    config, latest = config_of(tmp_path), config_of(tmp_path, "checkpoint.resume_from=latest")
    begin(config, saved=3)
    begin(config, steps=2, overwrite=True)
    with pytest.raises(SettingsError, match="no checkpoint of this run"):
        begin(latest)


def test_auto_resumes_what_there_is_and_starts_where_there_is_nothing(tmp_path):
    config = config_of(tmp_path, "checkpoint.resume_from=auto")
    assert begin(config, steps=2) is None
    assert begin(config, steps=2) is None, "killed before its first save: it starts again in its place"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "run" / "metrics.discarded.jsonl").read_text().splitlines()) == 2
    assert begin(config, saved=3) is None
    assert begin(config, saved=3) == 3
    assert begin(config_of(tmp_path), auto=True) == 6


def test_auto_starts_as_the_file_says_and_takes_nobody_elses_folder(tmp_path):
    stage = config_of(tmp_path)
    begin(stage, saved=5)
    second = config_of(tmp_path, f"output_dir={tmp_path}/two", f"checkpoint.resume_from={tmp_path}/run")
    assert begin(second, saved=1, auto=True) == 5
    assert begin(second, saved=1, auto=True) == 6, "its own, and not the first stage's again"
    (tmp_path / "three" / "samples" / "step-000000").mkdir(parents=True)
    with pytest.raises(SettingsError, match="three holds a run already"):
        begin(config_of(tmp_path, f"output_dir={tmp_path}/three"), auto=True)


def test_a_run_that_was_stopped_before_its_first_figure_is_told_by_its_output_dir(tmp_path):
    events = "logging.use_tensorboard=true"
    config = config_of(tmp_path, events)
    begin(config, saved=1)
    told = occupied_message(config)
    assert told.startswith(f"output_dir: {tmp_path}/run holds a run already, of 20") and told.count("holds a run") == 1
    assert "another output_dir: both are kept" in told and f"to {tmp_path}/run.old-1, and the new" in told
    begin(config, saved=1, overwrite=True)
    assert (tmp_path / "run.old-1" / "checkpoints" / "step-000001").is_dir()
    other = config_of(tmp_path, events, f"output_dir={tmp_path}/two", f"checkpoint.save_dir={tmp_path}/run/checkpoints")
    assert occupied_message(other).startswith(f"checkpoint.save_dir: {tmp_path}/run/checkpoints holds a run")


@pytest.mark.parametrize("record", ["", None, "[]"])
def test_auto_knows_a_run_whose_record_is_damaged_by_its_ledger(tmp_path, record):
    """As a power failure leaves it, say."""
    config = config_of(tmp_path)
    begin(config, steps=2)
    if record is None:
        (tmp_path / "run" / "run.json").unlink()
    else:
        (tmp_path / "run" / "run.json").write_text(record)
    assert "--resume auto: it starts again in its place" in occupied_message(config)
    assert begin(config, auto=True) is None
    (tmp_path / "run" / "metrics.jsonl").write_text("mine")
    shutil.rmtree(config.checkpoint_dir())
    (tmp_path / "run" / "run.json").unlink()
    assert "--resume" not in occupied_message(config), "nothing says whose it is"
    with pytest.raises(SettingsError, match="holds a run already"):
        begin(config, auto=True)


def test_a_save_that_was_not_finished_is_nothing_to_resume(tmp_path):
    config = config_of(tmp_path)
    begin(config, steps=2)
    (config.checkpoint_dir() / ".partial-step-000002").mkdir()
    with pytest.raises(SettingsError, match="--resume auto: it starts again in its place") as refused:
        begin(config)
    assert "--resume: it goes on" not in str(refused.value)
    assert begin(config, auto=True) is None


def test_auto_does_not_start_over_a_run_whose_checkpoints_are_damaged(tmp_path):
    config = config_of(tmp_path)
    begin(config, saved=1)
    (config.checkpoint_dir() / "step-000001" / "states" / "s.json").write_text("{}")
    with pytest.raises(SettingsError, match="step-000001 is damaged"):
        begin(config, auto=True)


def test_a_run_does_not_go_on_into_the_folder_of_another(tmp_path):
    one = config_of(tmp_path, f"checkpoint.save_dir={tmp_path}/one")
    begin(one, steps=1, saved=1)
    begin(config_of(tmp_path, f"output_dir={tmp_path}/two", f"checkpoint.save_dir={tmp_path}/two/saves"), steps=1)
    mixed = ["checkpoint.resume_from=latest", f"checkpoint.save_dir={tmp_path}/one", f"output_dir={tmp_path}/two"]
    with pytest.raises(SettingsError, match=f"output_dir {tmp_path}/two belongs to another run"):
        begin(config_of(tmp_path, *mixed))


def test_the_manifest_of_a_checkpoint_reads_with_its_run(tmp_path):
    begin(config_of(tmp_path), saved=1)
    content = json.loads((tmp_path / "run" / "checkpoints" / "step-000001" / "manifest.json").read_text())
    assert content["metadata"]["run"] == json.loads((tmp_path / "run" / "run.json").read_text())["run"]


# -- places that take no files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("locks", [False, True], ids=["no lock either", "but the lock"])
@pytest.mark.parametrize("resumed", [False, True], ids=["a new run", "a resumed one"])
def test_a_disk_that_takes_nothing_when_a_run_opens_is_told(tmp_path, resumed, locks):
    config = config_of(tmp_path)
    if resumed:
        begin(config, steps=2, saved=1)
        config = config_of(tmp_path, "checkpoint.resume_from=latest")
    with (
        refusing(tmp_path / "run", but=tmp_path / "run" / f".{LOCK}" if locks else None),
        pytest.raises(SettingsError, match="run cannot be laid out: .*No space left on device.*another output_dir"),
    ):
        begin(config)
