"""The table of docs/hardware.md: what usual runs take of a GPU, as `glm-train plan` works it out.

python -m benchmarks.plan_table
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glm_training.config import load_config
from glm_training.planning.plan import Card, make_plan

ROOT = Path(__file__).parents[1]
GIB = 1 << 30
CARDS = (24, 48, 80, 141)
"""GB as their makers name them; a driver shows about as many GiB."""

WHOLE = ("lora.enabled=false", "checkpoint.save_lora=false", "checkpoint.save_lora_only=false")


@dataclass(frozen=True)
class Row:
    """A run: its configuration with overrides, on so many GPUs."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    gpus: int = 1
    strategy: str | None = None


ROWS = (
    Row("both halves, LoRA, 1024²", "t2i_training"),
    Row("both halves, LoRA, 512²", "t2i_training", ("data.image_size.height=512", "data.image_size.width=512")),
    Row("AR, full, `adamw_8bit`", "t2i_training", (*WHOLE, "model.component=ar", "training.optimizer=adamw_8bit")),
    Row("DiT, full", "t2i_training", (*WHOLE, "model.component=dit")),
    Row("DiT, full, `adamw_8bit`", "t2i_training", (*WHOLE, "model.component=dit", "training.optimizer=adamw_8bit")),
    Row("both, full, 8 GPUs, DDP", "t2i_training", WHOLE, 8, "ddp"),
    Row("both, full, 8 GPUs, FSDP", "t2i_training", WHOLE, 8, "fsdp"),
    Row("both, full, 8 GPUs, FSDP, `gather: block`", "t2i_training", (*WHOLE, "distributed.gather=block"), 8, "fsdp"),
    Row("SDXL, LoRA, DPO", "sdxl_dpo_lora"),
    Row("SDXL, full, DPO", "sdxl_dpo_lora", (*WHOLE, "training.optimizer=adamw")),
    Row("SDXL, full, DPO, `adamw_8bit`", "sdxl_dpo_lora", (*WHOLE, "training.optimizer=adamw_8bit")),
)


def table() -> list[str]:
    """The lines of the table."""
    lines = ["| what is trained | peak, GiB | at its largest in | fits on |", "|---|---|---|---|"]
    for row in ROWS:
        config = load_config([str(ROOT / "configs" / f"{row.config}.yaml")], list(row.overrides))
        plan = make_plan(config, gpus=row.gpus, card=Card(None, ""), strategy=row.strategy)
        peak = plan.peak.total / GIB
        fitting = next((f"{card} GB" for card in CARDS if peak <= card), "none")
        lines.append(f"| {row.name} | {peak:.1f} | {plan.peak.name} | {fitting} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
