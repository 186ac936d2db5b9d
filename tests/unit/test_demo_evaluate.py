"""Figures of demo.evaluate on models whose answers can be computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from demo import data
from demo import evaluate as evaluate_module
from demo.evaluate import Settings, evaluate, load_model, run
from demo.evaluation_report import markdown
from demo.measure import routers, score, text_rows, with_random_routers, with_top_k
from demo.native.corpus import train_tokenizer
from runtime.errors import UsageError

SIZES = {
    "vocab_size": 280,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def mixture() -> Qwen2MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
    )
    return Qwen2MoeForCausalLM(config).eval()


def silent(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


ROWS = torch.randint(0, 280, (5, 9), generator=torch.Generator().manual_seed(1))


def test_score_of_a_model_that_knows_nothing() -> None:
    """Logits of zero: perplexity V. Routers of zero: always the same experts, EOR 1, all load on K of them."""
    found = score(silent(mixture()), ROWS)
    assert found.perplexity == pytest.approx(280, rel=1e-5) and found.tokens == 5 * 8
    assert found.routing is not None
    assert found.routing.mean_overlap == 1 and found.routing.chance == 0.25
    assert sorted(found.routing.loads[1]) == [0] * 6 + [40, 40]


def test_overlap_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts per token (0,1) (1,2) (1,2) (3,4): of three pairs 1, 2 and 0 of 2 are shared: EOR 1/2."""
    model = mixture()
    chosen = torch.tensor([[0, 1], [1, 2], [2, 1], [3, 4]])
    for gate in routers(model):
        weights = torch.full((4, 2), 0.5)
        monkeypatch.setattr(gate, "forward", lambda _x, w=weights: (torch.zeros(4, 8), w, chosen))
    found = score(model, ROWS[:1, :5])
    assert found.routing is not None
    assert found.routing.overlap == (0.5, 0.5) and found.routing.loads[0] == (1, 3, 2, 1, 1, 0, 0, 0)


def test_changes_to_routers_are_undone() -> None:
    model = mixture()
    before = score(model, ROWS)
    with with_top_k(model, 8):
        assert score(model, ROWS).routing.loads[0] == (40,) * 8  # type: ignore[union-attr]
    lengths = routers(model)[0].weight.norm(dim=1)
    with with_random_routers(model, 1):
        assert score(model, ROWS).routing != before.routing
        torch.testing.assert_close(routers(model)[0].weight.norm(dim=1), lengths)
    assert score(model, ROWS) == before
    with pytest.raises(UsageError, match="top-k 9: the model has 8 experts"), with_top_k(model, 9):
        pass


def test_rows_of_documents() -> None:
    tokenizer = train_tokenizer(["ab"], 280)
    a, b, end = (tokenizer.token_to_id(t) for t in ("a", "b", "<|endoftext|>"))
    rows = text_rows(tokenizer, ["aaaaaaaa", "bb", "a"], 3, 100)
    assert rows.tolist() == [[end, a, a, a], [a, end, b, b]]  # three tokens of the first, then whole documents
    assert text_rows(tokenizer, ["aaa"] * 9, 3, 6).shape == (2, 4)
    with pytest.raises(UsageError, match="do not fill a row of 30"):
        text_rows(tokenizer, ["a"], 30, 100)


def test_evaluation_beside_a_dense_model() -> None:
    dense = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=8)).eval()
    settings = Settings(("x",), top_k=(4,))
    found = evaluate(silent(mixture()), silent(dense), {"x": ROWS}, settings)
    result = found["sets"]["x"]
    assert result["perplexity"] == {"2": pytest.approx(280, rel=1e-5), "4": pytest.approx(280, rel=1e-5)}
    assert result["dense_perplexity"] == pytest.approx(280, rel=1e-5)
    assert [other["seed"] for other in result["random_routers"]] == [1, 2]
    assert found["load"]["least"] == 0 and found["load"]["most"] == 4
    found |= {"settings": {"split": "test", "length": 8}}
    text = markdown(found)
    assert "| x | 40 | 280.0 | 280.0 | 280.0 | 1.00 |" in text
    assert "| x | 1.000 | 0.250 | 4.00 | 1.00 to 1.00 |" in text
    with pytest.raises(UsageError, match="no top-k routers"):
        evaluate(dense, None, {"x": ROWS}, settings)


def test_files_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "model"
    mixture().save_pretrained(checkpoint)
    train_tokenizer(["a text, and more of it"] * 3, 280).save(str(checkpoint / "tokenizer.json"))
    monkeypatch.setattr(evaluate_module, "load", lambda name, split, _folder: [f"{name} {split} text"] * 20)
    run(checkpoint, None, Settings(("bible", "prose"), length=16, tokens=64), tmp_path / "out", tmp_path)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert set(found["sets"]) == {"bible", "prose"} and found["sets"]["bible"]["tokens"] == 64
    assert math.isfinite(found["sets"]["prose"]["perplexity"]["2"])
    assert len(found["weights_sha256"]["model.safetensors"]) == 64
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert "| bible | 64 |" in (tmp_path / "out" / "evaluation.md").read_text()


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        load_model(str(tmp_path), tmp_path)
    assert "chats" in data.SETS and evaluate_module.main([str(tmp_path)]) == UsageError.exit_code
