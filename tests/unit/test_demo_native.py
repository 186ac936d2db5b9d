"""The native twin: its recipe on a tiny slice, the same logits in transformers, and the committed checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from demo import data
from demo.native import CHECKPOINT, curve, held_out_chapters
from demo.native import train as train_module
from demo.native.corpus import END_OF_TEXT_ID, token_stream, train_tokenizer, windows
from demo.native.curve import read_log
from demo.native.model import MixtureOfExperts, NativeConfig, NativeModel, load_hub_state
from demo.native.muon import orthogonal
from demo.native.train import Clock, Training, evaluate, run
from runtime.errors import UsageError

TINY = NativeConfig(
    vocab_size=300,
    hidden=32,
    layers=2,
    heads=2,
    experts=8,
    top_k=2,
    intermediate=8,
    shared_intermediate=16,
    context=32,
)
SHORT = Training(minutes=None, steps=30, batch_tokens=128, length=32, short_length=16, warm_up_steps=5)
CHAPTERS = {f"X{n}": " ".join(f"And verse {m} was good." for m in range(n, n + 30)) for n in range(80)}


@pytest.fixture
def tiny_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.SETS, "bible", replace(data.SETS["bible"], read=lambda _path: CHAPTERS))
    monkeypatch.setattr(data, "fetch_download", lambda _source, folder: folder)


@pytest.mark.usefixtures("tiny_texts")
def test_the_recipe_on_a_tiny_slice(tmp_path: Path) -> None:
    """Trains, keeps a log and a checkpoint that transformers reads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "native"
    run(TINY, SHORT, out, tmp_path)
    rows = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 30 and rows[-1]["tokens"] == 30 * 128 and rows[-1]["rate"] == 0
    # random weights know nothing: ln 300 = 5.7 nats
    assert rows[-1]["cross_entropy"] < 4.5 and 0 <= rows[-1]["least_load"] <= 1 <= rows[-1]["most_load"]
    facts = json.loads((out / "training.json").read_text())
    assert facts["model"]["experts"] == 8 and facts["training"]["steps"] == 30
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("And verse 7 was good.").input_ids) == "And verse 7 was good."
    assert tokenizer.eos_token_id == END_OF_TEXT_ID
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert model.config.num_experts == 8 and model.config.norm_topk_prob
    with pytest.raises(UsageError, match="is not empty"):
        run(TINY, SHORT, out, tmp_path)


def test_transformers_computes_the_same(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from demo.native.save import save_checkpoint

    torch.manual_seed(3)
    model = NativeModel(TINY)
    for parameter in model.parameters():  # biases and norms that matter, weights that bf16 holds
        parameter.data = (parameter.data + 0.3 * torch.randn_like(parameter)).to(torch.bfloat16).float()
    save_checkpoint(model, train_tokenizer(list(CHAPTERS.values()), TINY.vocab_size), tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, TINY.vocab_size, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("tiny_texts")
def test_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    from demo.native.save import save_checkpoint

    torch.manual_seed(4)
    model = NativeModel(TINY)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter).to(torch.bfloat16).float()
    (tmp_path / "start").mkdir()
    save_checkpoint(model, train_tokenizer(list(CHAPTERS.values()), TINY.vocab_size), tmp_path / "start")
    run(TINY, replace(SHORT, steps=1), tmp_path / "on", tmp_path, tmp_path / "start")  # its only step has rate 1 / 5
    again = NativeModel(TINY)
    load_hub_state(again, load_file(tmp_path / "start" / "model.safetensors"))
    for (name, before), (_, after) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(before, after), name
    with pytest.raises(UsageError, match="not a checkpoint of this recipe"):
        run(replace(TINY, experts=9), SHORT, tmp_path / "other", tmp_path, tmp_path / "start")


def test_mixture_token_by_token() -> None:
    """The sorted, padded products equal the formula, one token at a time."""
    torch.manual_seed(0)
    model = NativeModel(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    moe = model.mixtures()[0]
    x = torch.randn(1, 40, TINY.hidden)
    with torch.no_grad():
        found = moe(x)[0]
        expected = torch.stack([_one_token(moe, row) for row in x[0]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _one_token(moe: MixtureOfExperts, row: torch.Tensor) -> torch.Tensor:
    values, chosen = (moe.gate @ row).softmax(-1).topk(moe.top_k)
    gate, up = (moe.shared_gate_up.weight @ row).chunk(2)
    out = torch.sigmoid(moe.shared_gate.weight @ row) * (moe.shared_down.weight @ (F.silu(gate) * up))
    for value, expert in zip(values / values.sum(), chosen.tolist(), strict=True):
        gate, up = (moe.gate_up[expert] @ row).chunk(2)
        out = out + value * (moe.down[expert] @ (F.silu(gate) * up))
    return out


def test_balance_is_one_for_an_even_load_and_e_for_one_expert() -> None:
    moe = NativeModel(replace(TINY, experts=2, top_k=1)).mixtures()[0]
    x = torch.zeros(1, 4, TINY.hidden)
    x[0, :2, 0], x[0, 2:, 0] = 1, -1
    moe.gate.data.zero_()
    moe.gate.data[0, 0], moe.gate.data[1, 0] = 50, -50  # sure of the sign
    moe(x)
    assert moe.balance.item() == pytest.approx(1) and moe.chosen.flatten().tolist() == [0, 0, 1, 1]
    moe(x.abs())
    assert moe.balance.item() == pytest.approx(2)


def test_evaluation_by_hand() -> None:
    """A model whose logits are all zero: ln V nats; a router that always takes expert 0 and 1: reuse 1, load E / K."""
    model = NativeModel(TINY)
    for parameter in model.parameters():
        parameter.data.zero_()
    found = evaluate(model, torch.randint(0, TINY.vocab_size, (3, 17)))
    assert found.perplexity == pytest.approx(300, rel=1e-5)
    assert found.reuse == 1 and (found.least_load, found.most_load) == (0, 4)


def test_windows_share_one_token() -> None:
    rows = windows(torch.arange(12), 4)
    assert rows.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]


def test_documents_begin_with_end_of_text() -> None:
    tokenizer = train_tokenizer(["aaaa"], 300)
    stream = token_stream(tokenizer, ["x", "yz"])
    assert stream.tolist().count(END_OF_TEXT_ID) == 2 and stream[0] == END_OF_TEXT_ID
    assert tokenizer.decode(stream.tolist()) == "xyz"


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (3, 16, 16)])
def test_muon_update_is_nearly_orthogonal(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape) * 100).float())
    assert values.min() > 0.4 and values.max() < 1.4


def test_schedule_by_steps() -> None:
    clock = Clock(Training(minutes=None, steps=100, warm_up_steps=10, length=64, short_length=32, short_share=0.7))
    seen = []
    for step in (0, 9, 69, 70, 100):
        clock.step = step
        seen.append((round(clock.rate, 3), clock.length))
    assert seen == [(0.1, 32), (0.91, 32), (0.31, 32), (0.3, 64), (0.0, 64)]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").touch()
    assert train_module.main(["--out", str(tmp_path), "--steps", "1"]) == UsageError.exit_code
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_texts")
def test_the_same_steps_give_the_same_weights(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(TINY, replace(SHORT, steps=2), tmp_path / name, tmp_path)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]


def test_the_committed_twin() -> None:
    """It loads with no code of its own, predicts chapters that it has not seen, and every expert has work."""
    from tokenizers import Tokenizer

    from demo.evaluate import load_model
    from demo.measure import score, text_rows

    model = load_model(str(CHECKPOINT), Path("unused"))
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    found = score(model, text_rows(tokenizer, held_out_chapters(), 512, 2048))
    assert found.routing is not None
    # an untrained model of its kind: 2,048; the frequency of words alone: about 390
    assert found.perplexity < 45 and found.tokens == 2048
    assert found.routing.chance == 0.125 < found.routing.mean_overlap < 0.5
    assert min(map(min, found.routing.loads)) > 0


def test_the_held_out_chapters_are_of_the_test_part() -> None:
    chapters = held_out_chapters()
    assert len(chapters) >= 3 and all(len(chapter) > 300 and "\n" in chapter for chapter in chapters)


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    columns = ["tokens", "training_cross_entropy", "validation_perplexity", "least_load", "most_load", "reuse"]
    log = tmp_path / "training.jsonl"
    log.write_text("".join(json.dumps(dict.fromkeys(columns, n)) + "\n" for n in (1, 2)))
    assert read_log(log)["tokens"] == [1, 2]
    curve.main([str(log), str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
