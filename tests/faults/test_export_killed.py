"""SIGKILL in front of every file operation of an export: no bundle or a whole one, and resuming completes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.checkpoints import make_checkpoint

SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_experts": 2, "num_experts_per_tok": 1, "vocab_size": 40}
ROOT = Path(__file__).parents[2]


def test_kill_and_resume(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "ck", "olmoe", **SIZE)
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.export_killer", str(source), str(tmp_path), "3"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["wrong"] == 0, seen
    assert seen["killed"] > 60, seen  # every one of them died of the signal
    assert seen["resumed"] > 50, seen
    assert seen["killed"] == seen["resumed"] + seen["visible_after_kill"], seen
