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
        ("return 4.0 * count", "return 0.0", "AdamW's step needs nothing"),
        ("run.keeps_pictures and not draws)", "run.keeps_pictures)", "the VAE sleeps while pictures are decoded"),
    ),
    *of(
        "planning/memory.py",
        "planning/test_memory.py",
        ("len(half.copies) * here", "len(half.copies)", "copies are not in shards"),
        ("trained_count * self.here(part) for part", "trained_count for part", "whole gradients"),
        ("1 + (run.noisy + 1 if run.noisy else 0)", "1 + run.noisy", "one end of the noisy steps is forgotten"),
        ("tokens = self.run.written * (8 + 4", "tokens = self.run.written * (8", "log-probs are not kept"),
    ),
    *of(
        "planning/remedies.py",
        "planning/test_memory.py",
        ("if peak <= card:\n            break", "if False:\n            break", "changes that are not needed"),
        ("config, run, peak = tried, planned, after", "peak = after", "a change forgets those before it"),
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
    *of(
        "planning/memory.py",
        "planning/test_unusual_keys.py",
        ("or part.name in learns", "or True", "moments of a half that has not its turn"),
        ("return 0.0 if self.run.waits else", "return", "shards that wait on the CPU are on the GPU"),
        ("found += self._set_aside(half)", "pass", "shards need no place while averages stand in"),
        ("if run.decodes:", "if True:", "what distillation draws is decoded"),
    ),
    *of(
        "planning/remedies.py",
        "planning/test_unusual_keys.py",
        (
            "except ConfigError:\n        return None",
            "except ConfigError:\n        return config",
            "keys that are refused",
        ),
        ("if strategy_problems(tried, gpus) or", "if", "shards of what cannot lie in them"),
        ("or update_problems(tried, gpus) else", "else", "a batch that does not divide into the updates on it"),
    ),
    *of(
        "planning/run.py",
        "planning/test_unusual_keys.py",
        ("min(prompts, max(1, IMAGES_AT_ONCE // samples))", "prompts", "an evaluation draws all at once"),
        ("config.draws_in_steps() else None", "config.uses_reward() else None", "distillation draws one sample"),
    ),
    *of(
        "planning/counting.py",
        "planning/test_unusual_keys.py",
        ("4.0 * part.trained_count * len(run.teachers)", "4.0 * part.trained_count", "one teacher alone is counted"),
        ('part.total if kind == "model" else reached', "reached", "a teacher that is a model keeps a few layers"),
    ),
    *of(
        "planning/remedies.py",
        "planning/test_arithmetic.py",
        (
            "chosen_run(tried, run.gpus, memory_of, card)",
            "read_run(tried, gpus=run.gpus, strategy=run.strategy)",
            "auto stays",
        ),
    ),
    *of(
        "planning/run.py",
        "planning/test_arithmetic.py",
        ("rank=config.dmdr.guidance_rank", "rank=1", "the guidance network's adapter has another rank"),
    ),
    *of(
        "planning/disk.py",
        "planning/test_arithmetic.py",
        ("adapted |= part.saved", "adapted = True", "a student trained whole leaves no pipeline"),
    ),
    *of(
        "planning/page.py",
        "planning/test_arithmetic.py",
        ("spread if part.trained else", "spread if True else", "what lies whole on each GPU is divided"),
        ("for name in peak.moments]", "for name in memory.halves]", "moments of a half that has not its turn are told"),
    ),
    *of(
        "planning/memory.py",
        "planning/test_arithmetic.py",
        (
            "self.run.vae_micro or self.run.micro or DECODED",
            "self.run.micro or DECODED",
            "evaluations decode as they draw",
        ),
    ),
]
