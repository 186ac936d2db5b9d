"""The plan of a tuning run against what PyTorch counts when the step is really made."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from edge.cli import main
from export.families import parse_config
from export.source import read_config
from remoe.objective import Objective
from remoe.texts import pack
from remoe.tune import tune
from remoe.tune_options import TuneOptions
from remoe.tune_plan import plan
from tests.checkpoints import load_reference, make_checkpoint

SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 300}


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
def test_operations_per_token_are_those_that_torch_counts(family: str, tmp_path: Path) -> None:
    """Eager experts multiply only what was chosen, as the plan counts. Besides, layer terms compute the stock gates."""
    checkpoint = make_checkpoint(tmp_path / "ck", family, **SIZES)
    model, config = load_reference(checkpoint), parse_config(read_config(checkpoint))
    data = pack([[5 + n % 90 for n in range(64)]], 64, 300)
    for objective, checkpointing in ((Objective(), False), (Objective(lm_kl=1.0), False), (Objective(), True)):
        options = TuneOptions(objective, steps=1, batch=1, gradient_checkpointing=checkpointing)
        with FlopCounterMode(display=False) as counter:
            tune(model, config, data, options)
        made = plan(config, options, 64, 4)
        assert made.tokens == 64
        assert made.step_flops * 64 == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_weights_and_gates_are_counted_exactly(tmp_path: Path) -> None:
    for family in ("qwen2_moe", "granitemoe", "glm4_moe"):
        checkpoint = make_checkpoint(tmp_path / family, family)
        config = parse_config(read_config(checkpoint))
        made = plan(config, TuneOptions(), 64, 2)
        model = load_reference(checkpoint)
        gates = sum(p.numel() for n, p in model.named_parameters() if n.endswith(("gate.weight", "router.weight")))
        gates -= sum(p.numel() for n, p in model.named_parameters() if n.endswith("shared_expert_gate.weight"))
        total = sum(p.numel() for p in model.parameters())
        tied = model.config.tie_word_embeddings
        assert made.gate_parameters == gates
        assert made.weight_bytes == 2 * (total - gates), (family, tied)
        assert made.gate_bytes == 20 * gates


def test_the_command_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_checkpoint(tmp_path / "ck", "qwen2_moe") / "config.json"
    words = ["tune", str(config), "--plan", "--sequence-length", "128"]
    assert main([*words, "--tflops", "1", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    made = plan(parse_config(read_config(config)), TuneOptions(), 128, 4)
    assert told.items() >= dataclasses.asdict(made).items()
    assert told["rates"][0]["hours"] == pytest.approx(2 * told["rates"][1]["hours"])
    assert told["rates"][0]["hours"] == pytest.approx(2000 * 8 * 128 * made.step_flops / 1e12 / 3600)
    assert main([*words, "--tflops", "0"]) == 2
    assert main(["tune", str(config), "--data", "x.txt"]) == 2
    assert "needs --out FILE" in capsys.readouterr().err
