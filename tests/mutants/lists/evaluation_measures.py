"""Figures of reconstructions and of text in pictures."""

from tests.mutants.catalogue import of

MUTATIONS = [
    *of(
        "evaluation/reconstruction/frechet.py",
        "evaluation/reconstruction/test_frechet.py",
        (
            "self.scatter + scatter + torch.outer(shift, shift) * (self.count * count / total)",
            "self.scatter + scatter",
            "pieces with other means have no spread between them",
        ),
        ("shift * (count / total)", "shift * (self.count / total)", "means of pieces are weighed the wrong way round"),
        ("self.scatter / (self.count - 1)", "self.scatter / self.count", "the covariance is biased"),
        ("- 2 * overlap", "- overlap", "a Gaussian is far from itself"),
        ("(shift + first.trace()", "(first.trace()", "shifted means are no distance"),
        (
            "svdvals(_factor(first).T @ _factor(second))",
            "svdvals(first @ second).sqrt()",
            "singular covariances lose half of the digits",
        ),
        ("values[rank].sqrt()", "values[rank]", "variances stand for deviations"),
        ("or not features.isfinite().all()", "", "NaN goes into the moments"),
    ),
    *of(
        "evaluation/reconstruction/pixels.py",
        "evaluation/reconstruction/test_pixels.py",
        ("-10 * math.log10(error)", "-20 * math.log10(error)", "PSNR of an amplitude"),
        ("PUBLISHED_RANGE = 2.0", "PUBLISHED_RANGE = 1.0", "the published reading is ours"),
        ('mode="bilinear", align_corners=False', 'mode="nearest"', "pictures are resized by nearest pixels"),
        ("(images.double() - references.double())", "(images - references).double()", "errors are rounded to fp32"),
    ),
    *of(
        "rewards/structure.py",
        "evaluation/reconstruction/test_pixels.py",
        ("(0.03 * data_range) ** 2", "0.03**2", "SSIM's second constant does not know the range"),
    ),
    *of(
        "evaluation/reconstruction/inception.py",
        "evaluation/reconstruction/test_inception.py",
        ("to_uint8(images)", "to_uint8(images * 0.5)", "features are of darker pictures"),
    ),
    *of(
        "evaluation/reconstruction/suite.py",
        "evaluation/reconstruction/test_suite.py",
        ("for side in (0, 1)]", "for side in (0, 0)]", "rFID of the originals with themselves"),
        ("as_saved(resized(self._originals.read", "(resized(self._originals.read", "identical pictures are not"),
        ("drawn.float(), self._sizes.compared)", "drawn.float(), self._sizes.model)", "pictures keep the model's size"),
        ("if back != side:", "if False:", "another size back is compared all the same"),
        ('"originals": self._originals.digest, ', "", "changed originals go on in the same folder"),
        ("if not all(np.isfinite(values)):", "if False:", "an infinite PSNR has no number"),
        ("else min(first, len(self._set))", "else len(self._set)", "--first has no effect"),
    ),
    *of(
        "models/vgt/family.py",
        "models/test_reconstruct.py",
        ("weight.dtype))).clamp(0, 1)", "weight.dtype)))", "reconstructions leave [0, 1]"),
    ),
    *of(
        "evaluation/text/cvtg.py",
        "evaluation/text/test_scorers.py",
        ("span.lower().split()", "span.split()", "words asked for keep their capitals"),
        ("line.lower().split()", "line.split()", "words that were read keep their capitals"),
        ("there = set(read)", 'there = " ".join(read)', "a part of a word counts as the word"),
        ("n=1, cutoff=0)", "n=1)", "readings that are far off count as none"),
        ("max(len(word), len(nearest[0]))", "len(word)", "distances are over the length of the word asked for"),
        ("CLIP_SCALE * max(cosine, 0.0)", "CLIP_SCALE * cosine", "CLIPScore goes below 0"),
    ),
    *of(
        "evaluation/text/longtext.py",
        "evaluation/text/test_scorers.py",
        (
            '(asked & Counter(units("\\n".join(lines), language))).total()',
            'sum(asked[unit] for unit in set(units("\\n".join(lines), language)))',
            "a word asked for twice and read once counts twice",
        ),
        ('"", text).lower().split()', '"", text).split()', "English keeps its capitals"),
        ('list(_NO_LETTER.sub("", text))', 'list(_NO_LETTER.sub("", text).lower())', "Chinese loses its capitals"),
    ),
    *of(
        "evaluation/text/prompts.py",
        "evaluation/text/test_prompts.py",
        ("if number in seen:", "if False:", "two prompts have one picture"),
        ("2 * sum(chinese) >= len(chinese) > 0", "any(chinese)", "an English file with one Chinese text is Chinese"),
        ("AREAS if (place", "sorted(AREAS, reverse=True) if (place", "prompts come in another order"),
    ),
    *of(
        "evaluation/text/readers.py",
        "evaluation/text/test_readers.py",
        ("return [] if _NOTHING.fullmatch(answer) else", "return", "the sentence for nothing counts as words"),
        ("                return Failure(str(error))", "                return []", "a failed reading is an empty one"),
    ),
    *of(
        "evaluation/suites/chat.py",
        "evaluation/text/test_readers.py",
        ("if message.content is None:", "if False:", "a refusal is an answer"),
        ('            "temperature": 0,\n', '            "temperature": 1,\n', "answers are drawn"),
    ),
    *of(
        "evaluation/text/suite.py",
        "evaluation/text/test_suite.py",
        ("[True] * right + [False] * (asked - right)", "[right / asked]", "figures are over pictures, not over words"),
        ("[CLIP_PREFIX + prompt]", "[prompt]", "CLIPScore lacks its prefix"),
        ('every.add(record["index"], found)', "every.add(0, found)", "the standard error knows one prompt"),
    ),
]
