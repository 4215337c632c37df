"""The page of a run, and which of several is better."""

from tests.mutants.catalogue import of

MUTATIONS = [
    *of(
        "report/statistics.py",
        "report/test_statistics.py",
        (
            "_t(confidence, count - 1) * math.sqrt",
            "_t(confidence, count) * math.sqrt",
            "one degree of freedom too many",
        ),
        ("0.5 + confidence / 2", "confidence", "a one-sided interval"),
        ("variance(values) / count)", "variance(values))", "the spread of prompts for that of their mean"),
        ("one**2 / (len(first) - 1)", "one**2 / len(first)", "Welch's degrees of freedom"),
    ),
    *of(
        "report/comparison.py",
        "report/test_comparison.py",
        ("estimate([b - a for a, b in pairs]", "estimate([a - b for a, b in pairs]", "differences have the wrong sign"),
        ("difference.sign * (1 if higher else -1) if pairs else 0", "difference.sign", "a larger loss is better"),
        ("(1 - CONFIDENCE) / len(pairs)", "(1 - CONFIDENCE)", "the best of many is picked as if there were two"),
        ('one.digest == two.digest != ""', "one.digest == two.digest", "sets that nobody knows to be the same"),
        ("and often[1][each] == 1]", "]", "prompts without a text of their own are matched"),
        ("        if not rewards:\n", "        if True:\n", "rewards of other metrics are compared"),
    ),
]
