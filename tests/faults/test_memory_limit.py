"""Fixed size under a real memory limit: exactly what the plan says is enough, a tenth less is refused at start."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.cgroup import MemoryGroup
from bench.memory_limit import LimitOptions, check_enough, check_refused, plan, run_limited
from export.exporter import export_bundle
from runtime.errors import EdgeError
from tests.checkpoints import make_checkpoint

OPTIONS = LimitOptions(slots=3, tokens=48)


@pytest.fixture(scope="module", autouse=True)
def _groups() -> None:
    try:
        with MemoryGroup(64 << 20):
            pass
    except EdgeError as error:
        pytest.skip(f"no memory limit can be set here: {error}")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limit")
    # Large enough that the experts left out of the cache would be seen: 80 experts of 1.2 MB, 15 of them resident.
    sizes = {"num_hidden_layers": 5, "hidden_size": 256, "moe_intermediate_size": 768, "num_experts": 16}
    out = folder / "limit.bundle"
    export_bundle(make_checkpoint(folder / "checkpoint", "qwen2_moe", **sizes), out)
    return out


def test_the_plan_is_enough(bundle: Path) -> None:
    planned = plan(bundle, OPTIONS).total_bytes
    verdict = run_limited(bundle, OPTIONS, planned)
    check_enough(verdict, OPTIONS)
    assert verdict.peak_bytes is None or 50e6 < verdict.peak_bytes <= planned


def test_a_tenth_less_is_refused_with_the_sum(bundle: Path) -> None:
    planned = plan(bundle, OPTIONS).total_bytes
    verdict = run_limited(bundle, OPTIONS, planned * 9 // 10)
    check_refused(verdict)
    assert f"= {planned / 1e6:.0f} MB" in verdict.stderr
    assert verdict.oom_kills == 0


def test_the_limit_is_real() -> None:
    """Negative control: a process that takes more than its group allows is killed, and the group says so."""
    with MemoryGroup(48 << 20) as group:
        verdict = group.run(["python3", "-c", "bytearray(256 << 20)"], timeout_s=60)
    assert verdict.exit_code == -9 or verdict.exit_code == 137
    assert verdict.limit_hits > 0
