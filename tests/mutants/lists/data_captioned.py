"""Captioned pictures: members of tars, layouts, mixing, and what is left out."""

from tests.mutants.catalogue import of

MUTATIONS = [
    *of(
        "data/samplers/mixed_sampler.py",
        "data/samplers/test_mixed_sampler.py",
        (
            "exact = [Fraction(weight) for weight in weights]",
            "exact = [Fraction(1) for weight in weights]",
            "weights do nothing",
        ),
        ("            place -= count\n", "", "places of other sets count for a set"),
        (
            "return self._starts[number] + int(",
            "return int(",
            "every set draws from the first",
        ),
        (
            '"mixture set", number, epoch)',
            '"mixture set", number, 0)',
            "every epoch of a set has one order",
        ),
        ('self.seed, "mixture", block)', 'self.seed, "mixture", 0)', "every block is shuffled alike"),
        (
            "return -(-self.rounds_for(epochs) * BLOCK // self.global_batch_size)",
            "return self.rounds_for(epochs) * BLOCK // self.num_items",
            "too few steps",
        ),
    ),
    *of(
        "data/captioned/layouts/tars/members.py",
        "data/captioned/layouts/tars/test_tar_members.py",
        ("cut=self._ended)", "cut=False)", "a cut member counts as whole"),
        ("if total - 256 * high != checksum:", "if False:", "a header with a wrong checksum counts"),
        (
            "before = min(place - data_end + _TAIL, place)",
            "before = min(_TAIL, place)",
            "the end of data is not digested",
        ),
        (
            "size = header.size if self._size is None else self._size",
            "size = header.size + 1",
            "members are a byte too long",
        ),
        ('elif key == b"size" and value.isdigit():', 'elif key == b"sizes":', "sizes of pax are not read"),
    ),
    *of(
        "data/captioned/layouts/tars/index.py",
        "data/captioned/layouts/tars/test_tar_index.py",
        ('key, _, kind = name.partition(".")', 'key, _, kind = name.rpartition(".")', "masks count as pictures"),
        ("if sample is None or kind in sample:", "if sample is None:", "a name that comes again hides the first"),
        ('return f"{name} (byte {offset})" if', "return name if", "samples of one name count once"),
        ('or facts["crc"] != zlib.crc32(body)', "", "a damaged index counts"),
        ("{path.absolute()} {stamp}", "{path.absolute()}", "a changed tar is not noticed"),
    ),
    *of(
        "data/captioned/layouts/tars/open_files.py",
        "data/captioned/layouts/tars/test_tar_index.py",
        ("if stamp_of(os.fstat(file.fileno())) != stamp:", "if False:", "a tar that changed is read on"),
        ("self._close_beyond(self._limit)", "pass", "files stay open without bound"),
    ),
    *of(
        "data/captioned/samples.py",
        "data/captioned/layouts/test_layouts.py",
        ('if not real.startswith(os.path.join(root, "")):', "if False:", "links lead out of the folder"),
        ('caption = " ".join(text.split())', "caption = text.strip()", "captions of several lines"),
        ('if not path.startswith(os.path.join(top, "")):', "if False:", "a listing names files anywhere"),
    ),
    *of(
        "data/captioned/layouts/listing.py",
        "data/captioned/layouts/test_layouts.py",
        ("for key in _KEYS if captions else _KEYS[:1]:", "for key in _KEYS[:1]:", "records without annotation count"),
    ),
    *of(
        "data/captioned/dataset.py",
        ("data/captioned/test_captioned_images.py", "data/captioned/test_killed_and_resumed.py"),
        (
            '"captioned replacement", epoch, index, attempt)',
            '"captioned replacement", 0, 0, attempt)',
            "one stands in for all",
        ),
        ("        self.skipped.note(found.broken)\n", "", "broken samples that were tried do not count"),
        (
            "place = index - self._ends[number] + self.set_lengths[number]",
            "place = index",
            "sets begin elsewhere",
        ),
        ("for attempt in range(ATTEMPTS):", "for attempt in range(2):", "two broken ones end the run"),
    ),
    *of(
        "data/captioned/decoding.py",
        "data/captioned/test_captioned_images.py",
        ('"captioned crop", [(epoch, index)]', '"captioned crop", [(0, index)]', "every epoch has the same crop"),
        ("self._shaping.flip and may_flip(prompt) and is", "self._shaping.flip and is", "left and right are swapped"),
        ("if short <= self.min_side:", "if short < self.min_side:", "80 pixels are enough"),
    ),
    *of(
        "data/captioned/skipped.py",
        "data/captioned/test_skipped.py",
        (
            "if self._file is None or key in self._written:",
            "if self._file is None:",
            "samples are named again and again",
        ),
        ('if kind == "broken":', 'if kind == "Broken":', "a resume forgets what was broken"),
        (
            "torn = file.tell() > 0 and not _ends_a_line(self._file)",
            "torn = False",
            "a torn line takes the next one with it",
        ),
    ),
    *of(
        "engine/captioned_setup.py",
        "engine/test_captioned_setup.py",
        ("min_side=0, max_aspect=inf,", "min_side=80, max_aspect=inf,", "small held-out pictures are refused"),
        ("weights=weights or None,", "weights=None,", "weights of the configuration do nothing"),
        ("repeats=[one.repeats for one in data.images],", "repeats=None,", "repeats of the configuration do nothing"),
    ),
    *of(
        "data/captioned/samples.py",
        "data/captioned/layouts/test_layouts.py",
        ("if len(captions) > HASHED_CAPTIONS:", "if captions:", "changed captions are no drift"),
    ),
    *of(
        "data/captioned/sniff.py",
        "data/captioned/layouts/test_layouts.py",
        ("        if real in seen:", "        if False:", "a link back is walked again and again"),
    ),
    *of(
        "data/captioned/recognise.py",
        "data/captioned/layouts/test_layouts.py",
        (
            "            problems += error.problems\n",
            "            problems = error.problems\n",
            "the last set's faults alone",
        ),
    ),
    *of(
        "data/captioned/held_out.py",
        "engine/test_captioned_setup.py",
        ("self._rows.append(row)", "self._rows.append(len(self._rows))", "prompts of other pictures"),
        ("elif len(examples) < count:", "else:", "more held-out pictures than asked for"),
    ),
    *of(
        "config/checks/captioned.py",
        "config/test_captioned_checks.py",
        ("if any(weights) and not all(weights):", "if False:", "a set without a weight among weights"),
        ("        if path is not None:\n", "        if False:\n", "prompts beside sets of pictures are ignored"),
    ),
]
