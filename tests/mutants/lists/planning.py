"""What a run takes, worked out beforehand."""

from tests.mutants.catalogue import of

MUTATIONS = [
    *of(
        "planning/passes.py",
        "planning/test_peaks.py",
        ("(2 * sizes.ratio + 9) * at.low", "(sizes.ratio + 9) * at.low", "the DiT's GELU keeps nothing"),
        ("(4 * sizes.ratio + (9 if", "(2 * sizes.ratio + (9 if", "the gate of the AR half is not kept"),
        ("each * min(CODES", "at.low * min(CODES", "scoring takes the logits alone"),
        ("last = WIDE * sizes.vocabulary", "last = 0 * sizes.vocabulary", "the embedding has no gradient"),
        ("kept = stack.layers * at.low * stack.numbers + around", "kept = around", "checkpoints keep no inputs"),
        ("2 * sizes.layers * sizes.keys", "sizes.layers * sizes.keys", "a cache of keys without values"),
    ),
    *of(
        "planning/counting.py",
        ("planning/test_counting.py", "planning/test_memory.py"),
        ("2 * (count + 4.0 * math.ceil(count / EIGHT_BIT_BLOCK))", "count", "one moment of 8 bits"),
        ("math.prod(shape[:-2]) * shape[-1]", "shape[-1]", "a kernel's columns are counted once"),
        ("(4.0 if matrix else 8.0)", "4.0", "Muon keeps one moment of everything"),
        ('"adamw": 4.0,', '"adamw": 0.0,', "AdamW's step needs nothing"),
        ("run.caches and not draws)", "run.caches)", "the VAE sleeps while pictures are decoded"),
    ),
    *of(
        "planning/memory.py",
        "planning/test_memory.py",
        ("len(half.copies) / shards", "len(half.copies)", "copies are not in shards"),
        ("trained_count / self.run.shards for part", "trained_count for part", "whole gradients"),
        ("1 + (run.noisy + 1 if run.noisy else 0)", "1 + run.noisy", "one end of the noisy steps is forgotten"),
        ("tokens = self.written * (8 + 4", "tokens = self.written * (8", "log-probs are not kept"),
    ),
    *of(
        "planning/remedies.py",
        "planning/test_memory.py",
        ("if peak <= capacity:\n            break", "if False:\n            break", "changes that are not needed"),
        ("run, peak = tried, after", "peak = after", "a change forgets those before it"),
    ),
    *of(
        "planning/schedule.py",
        "planning/test_memory.py",
        ("// (run.batch_size * run.gpus))", "// run.batch_size)", "steps as if one GPU trained"),
        ("/ (rate * gpus)", "/ rate", "days as if one GPU trained"),
    ),
    *of(
        "planning/run.py",
        "planning/test_memory.py",
        ("if compares and not (fresh", "if compares and (fresh", "a copy of what needs none"),
    ),
]
