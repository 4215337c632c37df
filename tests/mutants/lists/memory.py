"""What a run keeps in memory: weights in few bits (whose tests need bitsandbytes), narrow moments, what waits where."""

from tests.mutants.catalogue import of

MUTATIONS = [
    *of(
        "models/quantization.py",
        ("models/test_quantization.py", "trainers/test_quantised_training.py"),
        ("support_avx512bf16_for_cpu = False", "support_avx512bf16_for_cpu = True", "a CPU packs weights of rollouts"),
        ("gradient @ _dequantised(codes, absmax, gradient.dtype)", "gradient @ codes.to(gradient.dtype)", "no scale"),
        ("if id(child) in inside and type", "if type", "what is outside of the blocks has few bits too"),
        ("return output.to(input.dtype)", "return output", "the output has another dtype than the input"),
        ("module.is_loaded_in_4bit = True", "pass", "PEFT takes layers of 4 bits for plain ones"),
    ),
    *of(
        "models/glm_image/ar.py",
        ("models/test_family.py", "models/test_quantization.py"),
        (
            '= ("GlmImageTextDecoderLayer",)',
            '= ("GlmImageTextDecoderLayer", "GlmImageVisionBlock")',
            "the vision tower has few bits too",
        ),
    ),
    *of(
        "config/checks/quantization.py",
        "trainers/test_quantised_training.py",
        ("if not config.lora_for(part).enabled:", "if False:", "whole training over few bits passes"),
        ("if not config.checkpoint.save_lora_only:", "if False:", "a pipeline of few bits passes"),
        ("if config.training.method in UNSUITED:", "if False:", "methods that need full weights pass"),
    ),
    *of(
        "engine/bf16_moments.py",
        "engine/test_bf16_moments.py",
        ("0, 1 << _DROPPED_BITS, values.shape", "0, 1, values.shape", "moments are cut off"),
        ('"optimizer/moments", count)', '"optimizer/moments")', "each step rounds alike"),
        ("(1 - beta2**count)", "(1 - beta2)", "the second moment's start is not made up for"),
        ("(1 - beta1**count)", "(1 - beta1)", "the first moment's start is not made up for"),
        ('1 - group["lr"] * group["weight_decay"]', '1 - group["weight_decay"]', "the decay does not know the rate"),
        (".lerp_(gradient, 1 - beta1)", ".lerp_(gradient, beta1)", "the first moment forgets"),
        ("empty.clone()", "empty", "both moments are one"),
    ),
    *of(
        "engine/residency.py",
        "trainers/test_residency.py",
        ("            if name not in names:\n                move(CPU)", "            move(CPU)", "all leave first"),
        ("            self.units[name](self.device)", "            pass", "nothing comes"),
        ("part.place_copies(device)", "pass", "copies of the weights stay behind"),
    ),
    *of(
        "engine/parts.py",
        "trainers/test_residency.py",
        (
            "isinstance(value, Tensor) and value.dim() > 0",
            "isinstance(value, Tensor)",
            "counters move with the moments",
        ),
        ("for snapshot in (self.start, *(snap", "for snapshot in (None, *(snap", "the copy of the start stays behind"),
    ),
    *of(
        "trainers/reward_trainer.py",
        "trainers/test_residency.py",
        ('self.residency.only("ar", optimizer_of("ar"))', 'self.residency.only("ar")', "AR moments are away"),
        ('self.residency.only("dit", optimizer_of("dit"))', 'self.residency.only("dit")', "DiT moments are away"),
        ("self.residency.only(*self.family.residents())", "pass", "evaluations find nothing there"),
        ("            self.residency.all()", "            pass", "supervised steps find nothing there"),
    ),
    *of(
        "reinforcement/gate/gate.py",
        "trainers/test_residency.py",
        ('self.uses("ar")', "pass", "the gate finds no AR half"),
        ('self.uses("dit")', "pass", "the gate finds no DiT half"),
    ),
]
