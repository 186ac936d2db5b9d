"""An export's memory does not depend on the size of the model: tensors pass through buffers of a few MiB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).parents[2]
MEASURE = """
import json, resource, sys
from pathlib import Path
from export.exporter import export_bundle
from export.settings import ExportOptions

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large, folder = map(Path, sys.argv[1:])
options = ExportOptions(graphs=(), workers=2)
export_bundle(small, folder / "small.out", options)
before = peak()
export_bundle(large, folder / "large.out", options)
print(json.dumps({"growth": peak() - before, "embed": (folder / "large.out/dense/embed.safetensors").stat().st_size}))
"""


def test_a_large_tensor_is_never_whole_in_memory(tmp_path: Path) -> None:
    size = {"num_hidden_layers": 1, "num_experts": 2, "num_experts_per_tok": 1}
    small = make_checkpoint(tmp_path / "small", "olmoe", **size)
    # 102 MB of embedding in fp32, and as much of head, exported side by side.
    large = make_checkpoint(tmp_path / "large", "olmoe", vocab_size=100_000, hidden_size=256, **size)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["embed"] > 51_000_000
    # Two workers with a chunk, a source block and its fp32 step each: 2 x (4 + 4 + 0.5) MiB, of which the small export
    # has touched a part.
    assert seen["growth"] < 24 << 20, seen
