"""The contents of planned files: small for the largest models, and the same bytes however they are asked for."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import torch

from export.checkpoint import Checkpoint
from export.contents import Tensors
from export.families.base import Rows
from tests.checkpoints import make_checkpoint

EMBED = "model.embed_tokens.weight"  # [200, 64]


def test_re_ordered_rows_cost_a_few_bytes_each(tmp_path: Path) -> None:
    """Every one of DeepSeek-V2's 60 layers has 8,192 single rows of q. Three words each (tensor, first value, offset)
    are 24 bytes, growing lists add an eighth; 40 bytes would be 20 MB for the whole model.
    """
    runs = 8192
    with Checkpoint.open(make_checkpoint(tmp_path / "checkpoint", "qwen3_moe")) as checkpoint:
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            rows = (Rows(EMBED, (200, 64), n % 200, 1) for n in range(runs))
            content = Tensors(checkpoint, "F16", b"", rows)
            held = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
    assert content.end == runs * 64 * 2
    assert held < 40 * runs


def test_any_range_is_the_same_bytes(tmp_path: Path) -> None:
    order = random.Random(0).sample(range(200), 200)
    header = b"h" * 40
    with Checkpoint.open(make_checkpoint(tmp_path / "checkpoint", "qwen3_moe")) as checkpoint:
        content = Tensors(checkpoint, "F16", header, (Rows(EMBED, (200, 64), n, 1) for n in order))
        info = checkpoint.tensors[EMBED]
        source = torch.frombuffer(bytearray(checkpoint.read(info, 0, info.bytes)), dtype=torch.float32)
        rows = source.view(200, 64)[order].to(torch.float16)
        whole = header + rows.numpy().tobytes() + bytes(100)  # 40 + 25,600 bytes, then zeros
        assert content.end == 40 + 25600
        for step in (1 << 20, 4096, 1002, 8):
            found = bytearray(len(whole))
            for start in range(0, len(whole), step):
                content.fill(start, memoryview(found)[start : start + step])
            assert found == whole, step
