"""The native twin: a small mixture of experts trained from scratch, whose routers grew with their experts."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).with_name("checkpoint")  # what transformers and `edge export` read
HELD_OUT = Path(__file__).with_name("held_out.txt")  # chapters of the test part, a blank line between them


def held_out_chapters() -> list[str]:
    """Chapters that the twin was never trained on, one line per verse."""
    return HELD_OUT.read_text(encoding="utf-8").rstrip("\n").split("\n\n")
