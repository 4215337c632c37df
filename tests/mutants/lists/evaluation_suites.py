"""Benchmarks: their stages, the rules of GenEval and DPG-Bench, their judges."""

from tests.mutants.catalogue import of

SUITES = "evaluation/suites"

MUTATIONS = [
    *of(
        f"{SUITES}/protocol.py",
        (f"{SUITES}/test_stages.py",),
        (
            "sums = [math.fsum(value - mean for value in group) for group in groups.values() if group]",
            "sums = [value - mean for value in values]",
            "pictures of a prompt count as independent",
        ),
    ),
    *of(
        f"{SUITES}/stages.py",
        (f"{SUITES}/test_files.py", f"{SUITES}/test_stages.py"),
        ("groups[world.rank :: world.world_size], suite", "groups, suite", "every process judges everything"),
        (
            "raise EvaluationError(faults[0])",
            "raise EvaluationError(faults[-1])",
            "the last process that failed is told",
        ),
        ("    return data.endswith(_END)\n", "    return True\n", "a picture that lacks its end is whole"),
        (
            "                if absent:\n",
            "                if True:\n",
            "neighbours of a torn picture are written over",
        ),
        ('and record.get("file") == _digest(path)', "and True", "pictures that were changed keep their records"),
        (
            'return {"picture": picture.path, "failure": said.reason}',
            'return {"picture": picture.path, "file": _digest(path), "failure": said.reason}',
            "failures are never tried again",
        ),
        (
            'good = [record for record in records if "failure" not in record]',
            'good = [record | {"mean": 0.0} for record in records]',
            "failures are scored as wrong",
        ),
        ("if absent and place.images is None:", "if False:", "pictures that are not drawn yet are failures"),
    ),
    *of(
        f"{SUITES}/files.py",
        (f"{SUITES}/test_files.py", f"{SUITES}/test_stages.py"),
        ("(name in known) != (name in wanted)", "False", "a setting of nothing is no setting"),
        ("{**known, section: wanted}", "{section: wanted}", "the judge's settings replace those of the pictures"),
        ("        if differences:\n", "        if False:\n", "other settings go on in the same folder"),
        (
            "for path in (out / RECORDS, *parts):",
            "for path in (*parts, out / RECORDS):",
            "old failures win over new records",
        ),
        (
            '        if number == len(lines) and not line.endswith(b"\\n"):\n            break\n',
            "",
            "a torn line ends the run",
        ),
    ),
    *of(
        f"{SUITES}/drawing.py",
        (f"{SUITES}/test_drawing.py",),
        ("picture.index * MOST_SAMPLES + sample", "picture.index", "samples of a prompt are one picture"),
        (
            "(place % side * width, place // side * height)",
            "(place // side * width, place % side * height)",
            "tiles go by columns",
        ),
    ),
    *of(
        f"{SUITES}/geneval/rules.py",
        (f"{SUITES}/geneval/test_rules.py",),
        ('if detection["score"] > threshold:', 'if detection["score"] >= threshold:', "a score of .3 counts"),
        (
            'if tag == "counting" else THRESHOLD',
            'if tag == "colors" else THRESHOLD',
            "counts are made of unsure objects",
        ),
        ("objects[:MAX_OBJECTS]", "objects", "more than 16 objects count"),
        ('[: clause["count"]]\n        reason', "\n        reason", "the unsure objects are looked at too"),
        ("max(abs(along) - margin, 0.0)", "abs(along)", "near objects are in a relation"),
        ('"left of": x < -OFFSET', '"left of": x <= -OFFSET', "an offset of .5 counts"),
        ('"above": y < -OFFSET, "below": y > OFFSET', '"above": y > OFFSET, "below": y < -OFFSET', "y runs up"),
        (
            "along / math.hypot(*offset) for along",
            "along / math.hypot(*shortened) for along",
            "offsets are over what the margin left",
        ),
        (
            'if colors.count(clause["color"]) < count:',
            'if not colors.count(clause["color"]):',
            "one of two colours is enough",
        ),
        ('if number >= clause["count"]:', 'if number > clause["count"]:', "one too many is not too many"),
        ("matched.append(found if reason is None else None)", "matched.append(found)", "what failed is a target"),
    ),
    *of(
        f"{SUITES}/geneval/suite.py",
        (f"{SUITES}/geneval/test_rules.py",),
        (
            "error = math.sqrt(math.fsum(e**2 for e in known)) / len(tags)",
            "error = math.fsum(known) / len(tags)",
            "errors of tags add up",
        ),
    ),
    *of(
        f"{SUITES}/dpg/rules.py",
        (f"{SUITES}/dpg/test_rules.py",),
        ("    while lost :=", "    if lost :=", "zeroing stops at the children"),
        (
            "if not holding.issuperset(parents[question])}",
            "if parents[question] and holding.isdisjoint(parents[question])}",
            "one of two parents is enough",
        ),
        ("zeroed.setdefault(item, []).extend(tiles)", "zeroed[item] = tiles", "one picture of an item counts"),
        ('.strip(".!").lower() == "yes"', '.lower().startswith("yes")', "yes, but not quite is yes"),
    ),
    *of(
        f"{SUITES}/dpg/suite.py",
        (f"{SUITES}/dpg/test_suite.py",),
        ("[(tile, asked) for tile in cut]", "[(tile, asked) for tile in cut[:1]]", "one tile of four is scored"),
    ),
    *of(
        f"{SUITES}/answering.py",
        (f"{SUITES}/test_answering.py",),
        (
            'return plain if plain in ("yes", "no") else Failure(',
            "return plain if True else Failure(",
            "what a chat model cannot say is a no",
        ),
    ),
    *of(
        f"{SUITES}/vision_models.py",
        (f"{SUITES}/test_vision_models.py",),
        ("GREY = (0x99, 0x99, 0x99)", "GREY = (0, 0, 0)", "objects are cut out on black"),
        (
            "float(columns[-1] + 1), float(rows[-1] + 1)",
            "float(columns[-1]), float(rows[-1])",
            "boxes lack their last pixel",
        ),
        ("normalize(rows.mean(dim=1), dim=-1)", "normalize(rows[:, 0], dim=-1)", "one text for a colour"),
    ),
]
