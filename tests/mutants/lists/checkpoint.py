"""What a save promises, and what a resume takes."""

from tests.mutants.catalogue import of

COMMIT = ("checkpoint/test_commit.py", "checkpoint/test_disk_errors.py")

MUTATIONS = [
    *of(
        "checkpoint/commit.py",
        COMMIT,
        (
            "        verify_checkpoint(final)\n    except CheckpointError as error:\n        raise",
            "        pass\n    except CheckpointError as error:\n        raise",
            "latest moves to what was not read back",
        ),
        ("        disk.sync_file(handle)\n    return FileRecord", "    return FileRecord", "states are not synced"),
        (
            '            with path.open("rb") as handle:\n                disk.sync_file(handle)\n',
            "",
            "exports are not synced",
        ),
        (
            'folder.rglob("*") if path.is_dir()), folder):\n        disk.sync_folder(path)',
            'folder.rglob("*") if path.is_dir()), folder):\n        pass',
            "folders of exports are not synced",
        ),
        ("    disk.sync_folder(partial / STATES)\n", "", "the folder of states is not synced"),
        (
            "    disk.rename(partial, final)\n    disk.sync_folder(parent)\n",
            "    disk.rename(partial, final)\n",
            "the name of a checkpoint is not synced",
        ),
        (
            "    disk.rename(fresh, path)\n    disk.sync_folder(path.parent)",
            "    disk.rename(fresh, path)",
            "the pointer is not synced",
        ),
        (
            "for name in ours[:-total_limit]:",
            "for name in ours[: -total_limit + 1]:",
            "one checkpoint too many is deleted",
        ),
        ("for name in ours[:-total_limit]:", "for name in ours[total_limit:]:", "the newest are deleted"),
        ("if ledger.made(checkpoints_dir / name, name)]", "if True]", "what was added to is deleted"),
        (
            "    if final.exists() and ledger.made(final, final.name):\n        disk.rename(final, replaced)\n    elif",
            "    if",
            "this run's own checkpoint is set aside; kept twice",
        ),
        (
            "if disk.free_bytes(checkpoints_dir) < needed:",
            "if disk.free_bytes(checkpoints_dir) < 0:",
            "a full disk is met half-way",
        ),
        ("+ extra_bytes + SLACK_BYTES", "+ SLACK_BYTES", "exports are not counted in what is needed"),
        ("            _check_export(partial, path)\n", "", "torn exports are vouched for"),
        (
            "undo.callback(_discard, partial)",
            "undo.callback(str, partial)",
            "the space of a failed save is not given back",
        ),
        (
            "sha256.update(chunk)\n            size += len(chunk)",
            "sha256.update(chunk)\n            size += 1",
            "sizes are wrong",
        ),
        ("metadata, files)", "metadata, {})", "the manifest lists no files"),
        ('return f"step-{step:06d}"', 'return f"step-{step}"', "names do not sort"),
        (
            "        files |= _settle_extra(partial, partial / name)\n",
            "        _settle_extra(partial, partial / name)\n",
            "exports are not in the manifest",
        ),
        ("for prefix in (PARTIAL, REMOVED):", "for prefix in (REMOVED,):", "half-written saves stay"),
    ),
    *of(
        "checkpoint/best.py",
        ("checkpoint/test_best.py", "trainers/test_best_checkpoint.py"),
        ("score > self.score if", "score >= self.score if", "of equal scores the later is the best"),
        ("if self.higher_is_better else score <", "if True else score <", "the highest loss is the best"),
    ),
    *of(
        "checkpoint/commit.py",
        "checkpoint/test_commit.py",
        ("if best is not None and name == best.name:", "if False:", "the best is pruned"),
    ),
    *of(
        "checkpoint/ledger.py",
        "checkpoint/test_commit.py",
        ("if not found or step_of(each) < step_of(found[-1]):", "if True:", "what was gone back behind is an ancestor"),
    ),
    *of(
        "engine/best.py",
        "trainers/test_best_checkpoint.py",
        ("each.step >= max(since, 1)]", "each.step >= 1]", "scores under other settings compete"),
        ("[read_best(self.folder), *logged]", "logged", "a lost log loses the best"),
        ("if rewarded and total else [losses", "if total else [losses", "a finetuning is judged by its total"),
        ("len(values) < len(chosen)", "False", "half a loss is a loss"),
        ("higher_is_better=chosen is not losses", "higher_is_better=True", "more loss is better"),
    ),
    *of(
        "engine/named_model.py",
        "engine/test_named_model.py",
        ("dict.fromkeys([*first, *own])", "dict.fromkeys(own)", "a run is its last checkpoint"),
        ("            _verify_weights(path)\n", "            pass\n", "a damaged checkpoint is taken"),
        ("replace(each, strength=strength)", "each", "--lora has no strength"),
        ("[*self.adapters, *adapters])", "adapters)", "a run of adapters alone is its base model"),
    ),
    *of(
        "checkpoint/resume.py",
        ("checkpoint/test_resume.py",),
        (
            "dict.fromkeys([*pointed, *listed, *names])",
            "dict.fromkeys([*listed, *names])",
            "latest does not follow the pointer",
        ),
        (
            "dict.fromkeys([*pointed, *listed, *names])",
            "dict.fromkeys([*pointed, *names])",
            "latest falls back to an abandoned step",
        ),
        ("made_by == ledger.run if made_by is not None", "True if made_by is not None", "latest crosses runs"),
        (
            "key=lambda path: step_of(path.name), reverse=True",
            "key=lambda path: step_of(path.name)",
            "the oldest is the newest",
        ),
        (
            "manifest = verify_checkpoint(path) if verify else read_manifest(path)",
            "manifest = read_manifest(path)",
            "damage is not looked for",
        ),
        (
            "return ResumePoint(path, verify_checkpoint(path), tuple(skipped))",
            "return ResumePoint(path, read_manifest(path), tuple(skipped))",
            "a damaged latest is resumed",
        ),
        (
            "return ResumePoint(path, verify_checkpoint(path), tuple(skipped))",
            "return ResumePoint(path, verify_checkpoint(path), ())",
            "what was passed over is not named",
        ),
    ),
    *of(
        "checkpoint/manifest.py",
        ("checkpoint/test_resume.py", "checkpoint/test_commit.py"),
        ("if digest != _body_digest(body):", "if False:", "a changed manifest passes"),
        (
            "return None if found.sha256 == record.sha256 else",
            "return None if True else",
            "other content of the same size passes",
        ),
        ("if found.size != record.size:", "if found.size > record.size:", "cut files are told as other content; kept"),
        ('".." in relative.parts', "False", "a manifest reaches outside"),
    ),
    *of(
        "checkpoint/ledger.py",
        ("checkpoint/test_commit.py", "checkpoint/test_resume.py"),
        ("return all(path.is_dir() or", "return any(path.is_dir() or", "checkpoints with foreign files are deleted"),
        (
            "if entry not in self.entries:\n                return False",
            "if False:\n                return False",
            "what another run made is deleted",
        ),
        ("return list(reversed(newest_first))", "return list(newest_first)", "the newest are pruned"),
    ),
    *of(
        "checkpoint/state_tree.py",
        ("checkpoint/test_state_tree.py",),
        ('{"$float": str(value)}', "0.0", "infinite numbers come back as zero"),
        (
            'return tuple(decode(item, tensors) for item in structure["$tuple"])',
            'return [decode(item, tensors) for item in structure["$tuple"]]',
            "tuples come back as lists",
        ),
        ("if tensor.numel() and view in self._seen and", "if False and", "tied tensors are stored twice"),
        (
            "return whole.to(parameter.device, copy=True)",
            "return whole.to(parameter.device)",
            "a loaded optimizer shares its state with the tree",
        ),
    ),
]
