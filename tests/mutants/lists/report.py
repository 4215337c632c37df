"""The page of a run, and which of several is better."""

from tests.mutants.catalogue import of

MUTATIONS = [
    *of(
        "report/page.py",
        "report/test_page.py",
        ('for character in "<>&', 'for character in "', "a prompt ends the script"),
        ("kept = redact(value[: MAX_TEXT + 1])", "kept = value[: MAX_TEXT + 1]", "secrets of prompts are shown"),
        ("if path.exists() and MARK.encode()", "if False and MARK.encode()", "a file of the user's is written over"),
        ("autoescape=True", "autoescape=False", "a text of the settings is markup"),
    ),
    *of(
        "report/charts.py",
        "report/test_page.py",
        (
            "estimate([value for value in found.get(step",
            "estimate([1.0 for value in found.get(step",
            "bands of nothing",
        ),
        ("series.steps[each - 1 :: each]", "series.steps[::each]", "means stand at the step before theirs"),
        ('TRAINING if head == "reward" else HELD_OUT', "TRAINING", "held-out rewards have no line of their own"),
    ),
    *of(
        "report/monitors.py",
        "report/test_page.py",
        ("fmean(values[:window]), fmean(values[-window:])", "values[0], values[-1]", "single steps are compared"),
    ),
    *of(
        "report/run.py",
        "report/test_run.py",
        ("or (run.figures and step > run.step)", "", "samples of a discarded stretch are shown"),
        ("run.going = run.going and not ended", "pass", "a run that has ended is said to run"),
    ),
    *of(
        "trainers/run.py",
        "report/test_written.py",
        ("if not (world.is_main and", "if not (True and", "every process writes the page"),
        (
            "                finally:\n                    write_report",
            "                except KeyError:\n                    write_report",
            "no page",
        ),
    ),
    *of(
        "utils/statistics.py",
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
