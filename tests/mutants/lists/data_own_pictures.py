"""Own pictures: tables, captions, what is held out, and what is told of them."""

from tests.mutants.catalogue import of

MUTATIONS = [
    *of(
        "data/captioned/layouts/folder.py",
        "data/captioned/layouts/test_other_files.py",
        ('return count > kinds.count("tar")', "return count > 0", "a stray picture hides all tars"),
        ("        self._tell_repeats(repeats)\n", "", "numbers of folders' names do nothing in silence"),
    ),
    *of(
        "data/captioned/layouts/tables/text_tables.py",
        "data/captioned/layouts/test_other_files.py",
        ("        if others:\n", "        if False:\n", "the last caption of a name counts"),
    ),
    *of(
        "data/captioned/layouts/tables/columns.py",
        "data/captioned/layouts/tables/test_tables.py",
        (
            "if source is None and plain(image) in EDITED:",
            "if False:",
            "the picture beside an edited one is no source",
        ),
        (
            "own = {plain(name): name for name in reversed(names)}",
            "own = {name: name for name in names}",
            "case matters",
        ),
        (
            "return Columns(image, cap_source, source)",
            "return Columns(image, known[0], source)",
            "cap_source is ignored",
        ),
    ),
    *of(
        "data/captioned/layouts/tables/text_tables.py",
        "data/captioned/layouts/tables/test_tables.py",
        ('_DELIMITERS = ",;\\t|"', '_DELIMITERS = ","', "semicolons and tabs are no table"),
        ("            if not line:\n                continue\n", "", "blank lines are faults"),
        ("if len(fields) != len(names):", "if False:", "fields that do not fit are cut off"),
        ("data = file.read(_HEAD).removeprefix(_BOM)", "data = file.read(_HEAD)", "a mark hides the first column"),
    ),
    *of(
        "data/captioned/layouts/tables/records.py",
        "data/captioned/layouts/tables/test_tables.py",
        ("            text = text[0]\n", "            text = text[-1]\n", "the last of several captions"),
        ("table.parent if options.root is None", "options.path if options.root is None", "paths start at the set"),
    ),
    *of(
        "data/captioned/layouts/numbered.py",
        "data/captioned/layouts/tables/test_tables.py",
        ("source[0] if source else None", "None", "edits have no sources"),
    ),
    *of(
        "data/captioned/layouts/tables/arrow.py",
        "data/captioned/layouts/tables/test_tables.py",
        (
            "name = DEFAULT_SPLIT if options.split is None",
            "name = next(iter(splits)) if options.split is None",
            "any split",
        ),
        ("if isinstance(data, bytes) and data:", "if False:", "pictures inside are not read"),
    ),
    *of(
        "data/captioned/layouts/tars/index.py",
        "data/captioned/layouts/tables/test_tables.py",
        (
            "sample[kind] = min(other, member, key=_rank)",
            "sample[kind] = member",
            "the last picture of a sample counts",
        ),
        ('return "source" if plain(name) in SOURCES else kind', "return kind", "tars have no sources"),
    ),
    *of(
        "data/captioned/sniff.py",
        "data/captioned/layouts/tables/test_tables.py",
        ('_LEFT_BEHIND = ("__MACOSX", "@eaDir")', "_LEFT_BEHIND = ()", "what systems leave behind counts"),
        ("rest = [name for name in rest if os.path.splitext(name)[0] not in stems]", "pass", "captions are tables"),
    ),
    *of(
        "data/captioned/decoding.py",
        "data/captioned/test_captions.py",
        (r"(?<!\w){re.escape", r"{re.escape", "a word inside another counts"),
        ("re.escape(self.trigger_word)", "self.trigger_word", "a word is a pattern"),
        ("[(epoch, index)], (1,)", "[(0, index)], (1,)", "every epoch drops the same captions"),
    ),
    *of(
        "data/captioned/split.py",
        "data/captioned/test_split.py",
        (
            'if len(taken) >= least and int.from_bytes(digest[:8], "big") >= limit:',
            'if int.from_bytes(digest[:8], "big") >= limit:',
            "none may be held out",
        ),
        ("not any(empties(of_set, digest) for", "not any(False for", "a set is left empty"),
        ("min(LEAST, len(places) // 8)", "1", "one alone is held out of many"),
        (
            "if usable(digest) and not any(",
            "if not any(",
            "what cannot be used is held out",
        ),
        (
            "[row for row, digest in enumerate(of_set) if digest not in taken]",
            "range(len(of_set))",
            "what is held out is trained on",
        ),
    ),
    *of(
        "data/captioned/survey.py",
        "cli/test_data.py",
        ("if len(alike) > 1]", "]", "every picture is a copy"),
        ("self.shape[1] * self.scale**2)", "self.shape[1] * self.scale)", "what is cut off is another share"),
    ),
    *of(
        "cli/data.py",
        "cli/test_data.py",
        ("        if not path.exists():\n", "        if True:\n", "a contact sheet is written over"),
        (
            "stops = len(found.broken) > config.data.max_bad_fraction * found.total",
            "stops = False",
            "faults stop nothing",
        ),
    ),
]
