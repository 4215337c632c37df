"""What leaves a run: files of adapters, weights, what is verified, what stays here."""

from tests.mutants.catalogue import of

LORA = ("export/test_lora_files.py",)
RUN = ("export/test_run.py",)
FAMILIES = ("export/test_families.py",)
SCRUB = ("export/test_scrub.py",)

MUTATIONS = [
    *of(
        "export/lora.py",
        LORA,
        ("_cast(adapter.scale * b.float(), dtype or b.dtype)", "_cast(b, dtype)", "diffusers' file without alpha in B"),
        ('| {"lora_alpha": adapter.rank,', '| {"lora_alpha": adapter.alpha,', "diffusers applies alpha a second time"),
        ("torch.tensor(adapter.alpha, dtype", "torch.tensor(float(adapter.rank), dtype", "kohya's alpha is the rank"),
        ("(layers_per_block + 1) * int(block)", "layers_per_block * int(block)", "kohya's blocks of SDXL"),
        ("a.any() and b.any()", "a.any() or b.any()", "an adapter whose B is zero is exported"),
        ("if not value.isfinite().all():", "if False:", "an adapter that is not finite is exported"),
    ),
    *of(
        "export/source.py",
        (*RUN, *FAMILIES),
        ("'ema' if kind == 'average' else 'weights'", "'weights'", "the average is that of no average"),
        ("if not self.as_written(kind):", "if False:", "adapters of the average, whatever is asked"),
        ("verify_checkpoint(self.files, only=names)", "read_manifest(self.folder)", "damaged files are exported"),
    ),
    *of(
        "export/models.py",
        FAMILIES,
        ("weight.float() + adapter.scale * (b", "weight.float() + (b", "merged without alpha"),
        ("merge_into(family, merged)", "pass", "adapters that the run merged first are left out"),
    ),
    *of(
        "export/formats.py",
        FAMILIES,
        ("and not self._has_lost(own, dtype)", "", "merged weights come from the run's rounded pipeline"),
    ),
    *of(
        "export/fresh.py",
        (*RUN, *FAMILIES),
        ("not value.isfinite().all()", "False", "weights that are not finite pass"),
        ("if off > bound:", "if False:", "any picture passes"),
        ("if told.get(what):", "if False:", "a missing weight passes"),
        ("if off.max() == 0:", "if False:", "a training that changed nothing passes"),
        ("weights is not None and weights != ", "bool(weights) or ", "an AR half that changed nothing passes"),
        ("if off.max() == 0 and trained:", "if False:", "an AR half that writes the same tokens is refused"),
    ),
    *of(
        "export/run.py",
        RUN,
        ("shutil.rmtree(fresh, ignore_errors=True)", "pass", "a failed export leaves its beginning"),
        ("disk.free_bytes(fresh.parent) < needed", "False", "the disk is not looked at"),
        ("os.path.lexists(target.folder) and not target.overwrite", "False", "what is there is renamed unasked"),
        ("        if not overwrite:\n", "        if False:\n", "what has come there meanwhile is renamed unasked"),
        ("        lock.acquire()\n", "        place.mkdir(exist_ok=True)\n", "two exports write into one folder"),
    ),
    *of(
        "export/holding.py",
        (*RUN, "export/test_holding.py"),
        ("if not (kept.files / MANIFEST).is_file():", "if False:", "a lost checkpoint is told as anything else"),
        (">= needed + room", ">= room", "a copy takes the room of the export"),
        ("and in_use(source.run)", "", "a run that has ended is copied"),
        ("kept = replace(source, links=folder)", "pass", "a checkpoint is read where its run deletes it"),
        (".replace(str(folder), str(source.folder))", "", "an error names a place that is gone"),
    ),
    *of(
        "export/places.py",
        RUN,
        ("if _has_checkpoints(folder):", "if False:", "an export among the checkpoints of a run"),
        ("if (folder / MANIFEST).is_file():", "if False:", "an export in a checkpoint"),
        ("_is_called_like_a_step(place.name) and", "False and", "an export called like a step"),
    ),
    *of(
        "export/scrub.py",
        SCRUB,
        ("_PATH.sub(lambda", "re.sub('(?!)', lambda", "absolute paths are told"),
        ("for name in names_of_this_place():", "for name in ():", "names of users are told"),
        ("redact(text))", "text)", "secrets are told"),
        ('if above.lower().endswith(("/home", "/users"))', "if False", "a home folder's name is told"),
        ("_KNOWN_HOSTS.fullmatch(", "_KNOWN_HOSTS.match(", "a host that begins like a known one is told"),
    ),
]  # fmt: skip
