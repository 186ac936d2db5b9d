"""The measured rate of tuning: the plan's operations over the time of the loop itself, for the model that was cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.tuning import TuningOptions, run
from runtime.errors import UsageError
from tests.checkpoints import make_checkpoint

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 64, "num_experts": 8, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tuning") / "ck", "qwen2_moe", **SMALL) / "config.json"


def test_layers_are_cut_and_work_follows(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {layers: run(config, TuningOptions(layers, length=16, steps=2)) for layers in (2, 4)}
    assert "2 layers with experts of 2" in capsys.readouterr().out
    for result in found.values():
        assert result["share_of_ceiling"] == result["flops_per_core_s"] / result["product_flops_per_core_s"] > 0
    layer = (found[4]["step_flops_per_token"] - found[2]["step_flops_per_token"]) / 2
    assert 0 < found[2]["step_flops_per_token"] - layer < 2 * layer  # the lowest one has no way back, the head has none


@pytest.mark.parametrize("layers", [1, 5])
def test_too_few_or_too_many_layers(config: Path, layers: int) -> None:
    with pytest.raises(UsageError, match=f"--layers {layers}: expected 2 .* to 4"):
        run(config, TuningOptions(layers))
