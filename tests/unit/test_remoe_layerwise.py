"""Tuning from recorded router inputs, and the `edge tune` command: what it writes, refuses and resumes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edge.cli import main
from export.exporter import export_bundle
from export.families import parse_config
from export.settings import ExportOptions
from export.source import read_config
from remoe.layerwise import inputs_of, measure_layers, tune_layers
from remoe.objective import Objective
from remoe.trace import Trace
from remoe.tune import Numbers
from remoe.tune_log import TuneLog, read_log
from remoe.tune_options import TuneOptions
from runtime.config import ModelConfig
from runtime.errors import EdgeError, UsageError
from runtime.layout import BASE_ROUTER, router_tensors
from runtime.router_file import gates_sha256, load_router
from tests.checkpoints import make_checkpoint

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 300, "num_experts": 8, "num_experts_per_tok": 2}
LOCAL = Objective(ce=0.0, trust=0.1, miss=1.0, cache_slots=3, warmup_steps=0)
TEXT = "In the beginning was the word, and the word was with the router, and the router was the gate. " * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its bundle, a text, and a trace of the text with router inputs."""
    path = tmp_path_factory.mktemp("layerwise")
    checkpoint = make_checkpoint(path / "ck", "qwen2_moe", tokenizer=True, gate_std=1.0, **SMALL)
    export_bundle(checkpoint, path / "bundle", ExportOptions(graphs=()))
    (path / "text.txt").write_text(TEXT)
    words = ["trace", str(path / "bundle"), "--text", str(path / "text.txt"), "--hidden", "--window", "64"]
    assert main([*words, "--tokens", "256", "--out", str(path / "t.trace.safetensors")]) == 0
    return path


def config_of(folder: Path) -> ModelConfig:
    return parse_config(read_config(folder / "ck"))


def test_layers_learn_locality_from_the_trace_alone(folder: Path) -> None:
    trace = Trace.load(folder / "t.trace.safetensors")
    stock, _ = load_router(folder / "bundle" / BASE_ROUTER, router_tensors(config_of(folder)))
    inputs = inputs_of([trace], gates_sha256(stock), ["t"])
    assert inputs.tokens == 256
    options = TuneOptions(LOCAL, steps=25, batch=2, lr=1e-2, lr_warmup_steps=0)
    steps: list[int] = []
    tuned = tune_layers(inputs, stock, options, 64, lambda numbers: steps.append(int(numbers["step"])))
    before, after = (measure_layers(inputs, tensors, stock, [3]) for tensors in (stock, tuned.tensors))
    assert steps == list(range(1, 51))  # two layers, one after the other
    assert after["misses_3"] < 0.8 * before["misses_3"]
    assert after["eor"] > before["eor"]
    assert before["changed"] == 0.0 < after["changed"]
    again = tune_layers(inputs, stock, options, 64)
    assert all(torch.equal(again.tensors[name], tuned.tensors[name]) for name in stock)


@pytest.mark.parametrize("at", [2, 4, 5, 7])
def test_interrupted_layers_go_on_bit_for_bit(at: int, folder: Path, tmp_path: Path) -> None:
    """Two layers of four steps: within the first, at its end, at the beginning of the second, before its end."""
    stock, _ = load_router(folder / "bundle" / BASE_ROUTER, router_tensors(config_of(folder)))
    inputs = inputs_of([Trace.load(folder / "t.trace.safetensors")], gates_sha256(stock), ["t"])
    options = TuneOptions(LOCAL, steps=4, batch=2, lr=1e-2, lr_warmup_steps=2)
    whole = tune_layers(inputs, stock, options, 64)

    def interrupt(numbers: Numbers) -> None:
        if numbers["step"] == at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        tune_layers(inputs, stock, options, 64, interrupt, tmp_path / "s")
    resumed = tune_layers(inputs, stock, options, 64, state=tmp_path / "s")
    assert [n["step"] for n in resumed.history] == list(range(at + 1, 9))
    assert [n["loss"] for n in resumed.history] == [n["loss"] for n in whole.history[at:]]
    assert resumed.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(resumed.tensors[name], whole.tensors[name]) for name in whole.tensors)


def test_killed_layers_go_on_from_their_last_state(folder: Path, tmp_path: Path) -> None:
    stock, _ = load_router(folder / "bundle" / BASE_ROUTER, router_tensors(config_of(folder)))
    inputs = inputs_of([Trace.load(folder / "t.trace.safetensors")], gates_sha256(stock), ["t"])
    options = TuneOptions(LOCAL, steps=4, batch=2, lr=1e-2, lr_warmup_steps=0, save_every=3)

    class Killed(Exception):
        pass

    def kill(numbers: Numbers) -> None:
        if numbers["step"] == 8:
            raise Killed

    with pytest.raises(Killed):
        tune_layers(inputs, stock, options, 64, kill, tmp_path / "s")
    for other, found in ((dataclasses.replace(options, lr=1e-3), "options"), (options, "data")):
        with pytest.raises(UsageError, match=f"had other {found}"):
            tune_layers(inputs, stock, other, 64 if found == "options" else 32, state=tmp_path / "s")
    resumed = tune_layers(inputs, stock, options, 64, state=tmp_path / "s")
    assert [n["step"] for n in resumed.history] == [7, 8]
    whole = tune_layers(inputs, stock, options, 64)
    assert all(torch.equal(resumed.tensors[name], whole.tensors[name]) for name in whole.tensors)
    (tmp_path / "s").write_bytes(b"nonsense" * 10)
    with pytest.raises(UsageError, match="not the state of a tuning run"):
        tune_layers(inputs, stock, options, 64, state=tmp_path / "s")


def test_layers_whose_loss_is_no_number_stop(folder: Path) -> None:
    stock, _ = load_router(folder / "bundle" / BASE_ROUTER, router_tensors(config_of(folder)))
    inputs = inputs_of([Trace.load(folder / "t.trace.safetensors")], gates_sha256(stock), ["t"])
    inputs = dataclasses.replace(inputs, hidden=[h * np.float16("nan") for h in inputs.hidden])
    options = TuneOptions(LOCAL, steps=4, batch=2, lr=1e-2, lr_warmup_steps=0)
    with pytest.raises(EdgeError, match="step 1: the loss is nan: lower the learning rate"):
        tune_layers(inputs, stock, options, 64)


def test_the_measure_is_the_traces_own_routing(folder: Path) -> None:
    """Overlap of the recorded choices, recomputed from the ids in the file."""
    trace = Trace.load(folder / "t.trace.safetensors")
    stock, _ = load_router(folder / "bundle" / BASE_ROUTER, router_tensors(config_of(folder)))
    numbers = measure_layers(inputs_of([trace], gates_sha256(stock), ["t"]), stock, stock, [2])
    shared = [
        len(set(trace.experts[t, layer].tolist()) & set(trace.experts[t - 1, layer].tolist())) / 2
        for t in range(1, len(trace))
        for layer in range(2)
        if trace.requests[t] == trace.requests[t - 1]
    ]
    assert numbers["eor"] == pytest.approx(float(np.mean(shared)), abs=0.01)  # fp16 inputs may turn a close choice
    starts = np.flatnonzero(np.diff(trace.requests, prepend=-1))
    cold = 2 * 2 * len(starts)
    # With C = K a step misses what the step before did not choose.
    assert numbers["misses_2"] * 256 == pytest.approx(cold + sum(2 * (1 - s) for s in shared), rel=0.01)


def test_traces_that_do_not_fit_are_refused(folder: Path) -> None:
    trace = Trace.load(folder / "t.trace.safetensors")
    with pytest.raises(UsageError, match=r"t: recorded from 'ck' .* name the bundle"):
        inputs_of([trace], "0" * 64, ["t"])
    arrays = {n: getattr(trace, n) for n in ("experts", "weights", "tokens", "requests", "positions", "decode")}
    with pytest.raises(UsageError, match="--hidden"):
        inputs_of([Trace.from_arrays(trace.info, arrays)], trace.info.gates_sha256, ["t"])
    stock, _ = load_router(folder / "bundle" / BASE_ROUTER, router_tensors(config_of(folder)))
    inputs = inputs_of([trace], gates_sha256(stock), ["t"])
    with pytest.raises(UsageError, match="no language model"):
        tune_layers(inputs, stock, TuneOptions(Objective()))


def command(folder: Path, out: Path, *words: str) -> int:
    run = ["--sequence-length", "64", "--steps", "4", "--batch", "2", "--lr", "1e-2", "--lr-warmup", "1"]
    data = ["--data", str(folder / "text.txt"), "--eval-sequences", "2", "--device", "cpu"]
    return main(["tune", str(folder / "ck"), *data, "--out", str(out), *run, *words])


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_command_writes_router_log_and_picture(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.safetensors"
    assert command(folder, out, "--preset", "cache", "--cache-slots", "4", "--json") == 0
    result = last_json(capsys)
    assert set(result) >= {"router", "log", "plot", "before", "after", "seconds", "steps"}
    assert set(result["before"]) >= {"ppl", "kl", "agreement", "eor", "misses_2", "misses_4", "load_cv"}
    assert result["before"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert result["after"]["kl"] > 0
    tensors, told = load_router(out, router_tensors(config_of(folder)))
    assert told is not None
    base = load_file(folder / "bundle" / BASE_ROUTER)
    assert told.base_gates_sha256 == gates_sha256(base)
    assert (told.base_model, told.method, told.steps) == ("ck", "cache", 4)
    assert told.options["objective"]["cache_slots"] == 4
    assert told.metrics["after"] == result["after"]
    assert not torch.equal(tensors["layer_00.weight"], base["layer_00.weight"])
    assert [n["step"] for n in read_log(tmp_path / "r.jsonl") if "step" in n] == [1, 2, 3, 4]
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(os.listdir(tmp_path)) == ["r.jsonl", "r.png", "r.safetensors"]
    words = ["generate", str(folder / "bundle"), "--router", str(out), "--prompt", "a", "--max-new-tokens", "2"]
    assert main([*words, "--slots-per-layer", "4", "--json"]) == 0
    assert command(folder, out) == 2
    assert "add --force to replace it" in capsys.readouterr().err


def test_layers_from_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.safetensors"
    words = ["tune", "--from-trace", str(folder / "t.trace.safetensors"), "--out", str(out), "--steps", "3"]
    assert main([*words, "--router", str(folder / "bundle"), "--lr", "1e-2", "--lr-warmup", "0", "--json"]) == 0
    result = last_json(capsys)
    assert result["after"]["changed"] > 0
    _, told = load_router(out, router_tensors(config_of(folder)))
    assert told is not None and told.method == "layer-wise"
    assert told.options["objective"]["ce"] == 0.0
    assert main([*words, "--force"]) == 2
    assert "--router BUNDLE" in capsys.readouterr().err
    assert main([*words, "--force", "--router", str(out)]) == 2
    assert "holds tuned gates" in capsys.readouterr().err


BAD: dict[str, tuple[bytes, str, list[str], str]] = {
    "empty": (b" \n", "d.txt", [], "d.txt: empty"),
    "binary": (bytes(range(256)), "d.txt", [], "not UTF-8 text"),
    "zeros": (b"ab\0cd", "d.txt", [], "zero bytes"),
    "too short": (b"few words", "d.txt", [], "too short for one sequence of 64"),
    "no held-out text": (TEXT[:140].encode(), "d.txt", [], "of which 2 should be held out"),
    "not json": (b'{"text": "a"}\n{oops\n', "d.jsonl", [], "d.jsonl:2: not JSON"),
    "other keys": (b'{"prompt": "a"}\n', "d.jsonl", [], "d.jsonl:1: expected"),
    "other kind": (b"a,b\n", "d.csv", [], "expected a .txt file"),
    "number": (TEXT.encode(), "d.txt", ["--lr", "fast"], "--lr 'fast': expected float"),
    "long": (TEXT.encode(), "d.txt", ["--sequence-length", "4096"], "this model goes up to 256"),
    "slots": (TEXT.encode(), "d.txt", ["--cache-slots", "1"], "below the 2 experts of one token"),
    "resume nothing": (TEXT.encode(), "d.txt", ["--resume"], "no run of this --out was interrupted"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_written(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, file, words, expected = BAD[name]
    (tmp_path / file).write_bytes(data)
    assert command(folder, tmp_path / "r.safetensors", "--data", str(tmp_path / file), *words) == 2
    assert expected in capsys.readouterr().err
    assert os.listdir(tmp_path) == [file]


def test_wrong_tokenizers_and_unwanted_checkpoints_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = make_checkpoint(tmp_path / "small", "olmoe", vocab_size=40)  # ids of the tokenizer go up to 258
    words = ["tune", str(small), "--data", str(folder / "text.txt"), "--out", str(tmp_path / "r.safetensors")]
    assert main([*words, "--sequence-length", "64", "--tokenizer", str(folder / "ck")]) == 2
    assert "the tokenizer is not that of this model" in capsys.readouterr().err
    assert main([*words, "--sequence-length", "64"]) == 2
    assert "no tokenizer.json" in capsys.readouterr().err
    for change, expected in (
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights are not supported"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "never run"),
    ):
        odd = shutil.copytree(folder / "ck", tmp_path / expected.replace(" ", "-"))
        value = json.loads((odd / "config.json").read_text())
        (odd / "config.json").write_text(json.dumps({**value, **change}))
        assert main(["tune", str(odd), *words[2:]]) == 2
        assert expected in capsys.readouterr().err
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(folder / "ck/config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    assert main(["tune", str(pickled), *words[2:]]) == 2
    assert "only pickled weights" in capsys.readouterr().err


def test_interrupted_layers_from_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    words = ["tune", "--from-trace", str(folder / "t.trace.safetensors"), "--router", str(folder / "bundle"),
             "--steps", "3", "--lr", "1e-2", "--lr-warmup", "0"]  # fmt: skip
    assert main([*words, "--out", str(whole)]) == 0
    write = TuneLog.write

    def interrupt(self: TuneLog, numbers: dict[str, Any]) -> None:
        write(self, numbers)
        if numbers.get("step") == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(TuneLog, "write", interrupt)
        assert main([*words, "--out", str(cut)]) == 130
    assert main([*words, "--out", str(cut)]) == 2
    assert "add --resume to go on with it" in capsys.readouterr().err
    assert main([*words, "--out", str(cut), "--resume"]) == 0
    first, second = (load_file(path) for path in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [n["step"] for n in read_log(tmp_path / "cut.jsonl") if "step" in n] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "cut.safetensors.state").exists()


def test_an_interrupted_command_goes_on_and_says_so_before(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    assert command(folder, whole) == 0
    write = TuneLog.write

    def interrupt(self: TuneLog, numbers: dict[str, Any]) -> None:
        write(self, numbers)
        if numbers.get("step") == 2:
            os.kill(os.getpid(), 2)

    with monkeypatch.context() as patched:
        patched.setattr(TuneLog, "write", interrupt)
        assert command(folder, cut) == 130
    assert not cut.exists()
    assert command(folder, cut) == 2
    assert "add --resume to go on with it, or --force" in capsys.readouterr().err
    assert command(folder, cut, "--lr", "1e-3", "--resume") == 2
    assert "other options" in capsys.readouterr().err
    assert command(folder, cut, "--resume") == 0
    first, second = (load_file(path) for path in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [n["step"] for n in read_log(tmp_path / "cut.jsonl") if "step" in n] == [1, 2, 3, 4]
    assert not (tmp_path / "cut.safetensors.state").exists()
