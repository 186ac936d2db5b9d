"""What `edge tune` refuses before it loads anything, and how a run that was stopped or cannot be logged ends."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from edge.cli import main
from export.exporter import export_bundle
from export.settings import ExportOptions
from remoe.objective import Objective
from remoe.tune_log import TuneLog, read_log
from runtime.config import RouterConfig
from runtime.errors import EdgeError, UsageError
from tests.checkpoints import make_checkpoint

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 300, "num_experts": 8, "num_experts_per_tok": 2}
TEXT = "A router that is asked the same thing twice should answer the same thing twice. " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its bundle, a text, and a trace of it with router inputs."""
    path = tmp_path_factory.mktemp("refusals")
    checkpoint = make_checkpoint(path / "ck", "qwen2_moe", tokenizer=True, gate_std=1.0, **SMALL)
    export_bundle(checkpoint, path / "bundle", ExportOptions(graphs=()))
    (path / "text.txt").write_text(TEXT)
    words = ["trace", str(path / "bundle"), "--text", str(path / "text.txt"), "--hidden", "--window", "64"]
    assert main([*words, "--tokens", "128", "--out", str(path / "t.trace.safetensors")]) == 0
    return path


def tune(checkpoint: Path, folder: Path, out: Path, *words: str) -> int:
    run = ["--sequence-length", "64", "--steps", "4", "--batch", "2", "--lr-warmup", "1", "--device", "cpu"]
    return main(["tune", str(checkpoint), "--data", str(folder / "text.txt"), "--out", str(out), *run, *words])


WORDS = {
    "no such device": (["--device", "gpu7"], "--device 'gpu7': expected cpu, cuda or cuda:N"),
    "rates without a plan": (["--tflops", "100"], "--tflops belongs to --plan"),
    "stock gates beside the model": (["--router", "x"], "to begin with tuned gates use --start"),
    "a gap of no term": (["--margin-gap", "0.5"], "--margin-gap changes nothing while --margin is 0"),
    "a scaling of no prior": (["--prior-scaling", "token"], "--prior-scaling changes nothing while --prior is 0"),
    "a gap that is no number": (["--margin", "1", "--margin-gap", "nan"], "margin_gap = nan"),
    "a strength that is no number": (["--layer-strength", "nan,1"], "layer_strength = (nan, 1.0) are not numbers"),
    "an unknown target": (["--reuse-target", "next"], "reuse_target 'next' is not previous or cache"),
    "lags that are none": (["--lags", "1,x"], "--lags '1,x': expected numbers with commas, as 1,2,4,8,16"),
    "held-out text for nothing": (["--eval-data", "x.txt", "--eval-sequences", "0"], "0 measures none"),
    "fewer than none held out": (["--eval-sequences", "-1"], "--eval-sequences -1: expected 0 (none) or more"),
    "gates that are not there": (["--start", "none.safetensors"], "none.safetensors: no such router file"),
    "sizes that are no numbers": (["--eval-slots", "x"], "--eval-slots 'x': expected numbers"),
    "data that is not there": (["--data", "none"], "none: no such file"),
}


@pytest.mark.parametrize("name", WORDS)
def test_words_without_effect_or_sense_are_refused_before_the_model_is_loaded(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.tune._load_model", lambda *_: pytest.fail("the model was loaded"))
    words, expected = WORDS[name]
    assert tune(folder / "ck", folder, tmp_path / "r.safetensors", *words) == 2
    assert expected in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "words",
    [["--dtype", "fp32"], ["--device", "cpu"], ["--experts", "eager"], ["--eval-sequences", "0"], ["--eval-slots", "4"],
     ["--tokenizer", "x"], ["--head-share", "0.5"], ["--gradient-checkpointing"], ["--no-hidden-gradient"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_options_of_the_model_are_refused_without_it(
    words: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = ["tune", "--from-trace", str(folder / "t.trace.safetensors"), "--router", str(folder / "bundle")]
    assert main([*trace, "--out", str(tmp_path / "r.safetensors"), "--steps", "1", *words]) == 2
    assert f"{words[0]} has no meaning with --from-trace" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_trace_is_not_called_held_out(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = ["tune", "--from-trace", str(folder / "t.trace.safetensors"), "--router", str(folder / "bundle")]
    assert main([*trace, "--out", str(tmp_path / "r.safetensors"), "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("on the trace") and "held out" not in out


def test_a_checkpoint_that_lacks_a_tensor_is_not_filled_up(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would put random values in its place, and the gates would be tuned to those."""
    broken = shutil.copytree(folder / "ck", tmp_path / "ck")
    name = "model.layers.1.mlp.gate.weight"
    tensors = load_file(broken / "model.safetensors")
    del tensors[name]
    save_file(tensors, broken / "model.safetensors")
    assert tune(broken, folder, tmp_path / "r.safetensors") == 2
    assert f"tensor {name} is missing" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["ck"]


def test_a_weight_that_is_no_number_is_not_blamed_on_the_learning_rate(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(folder / "ck", tmp_path / "ck")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    assert tune(broken, folder, tmp_path / "r.safetensors", "--eval-sequences", "0") == 1
    assert "a weight of the checkpoint is no number (edge export names it)" in capsys.readouterr().err
    assert not (tmp_path / "r.safetensors").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_tells_by_what(
    number: int,
    code: int,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = TuneLog.write

    def stop(self: TuneLog, numbers: dict[str, Any]) -> None:
        write(self, numbers)
        if numbers.get("step") == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(TuneLog, "write", stop)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert tune(folder / "ck", folder, tmp_path / "r.safetensors", "--eval-sequences", "0") == code
    assert sorted(os.listdir(tmp_path)) == ["r.jsonl", "r.safetensors.state"]
    assert "the same command with --resume goes on with it" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_full_disk_names_the_log(tmp_path: Path) -> None:
    log = TuneLog(tmp_path / "r.jsonl")
    log.write({"step": 1})
    log._file.close()
    log._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115 - a disk without space
    with pytest.raises(EdgeError, match=f"r.jsonl: the log cannot be written: {os.strerror(errno.ENOSPC)}"):
        log.write({"step": 2})
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        log._file.close()
    assert [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()] == [{"step": 1}]


def test_two_runs_of_one_router_do_not_mix(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.safetensors"
    first = TuneLog(tmp_path / "r.jsonl")
    first.write({"step": 1})
    assert tune(folder / "ck", folder, out, "--eval-sequences", "0") == 2
    assert "r.jsonl: another run is writing this log" in capsys.readouterr().err
    assert (tmp_path / "r.jsonl").read_text() == '{"step": 1}\n'
    first.close()
    assert tune(folder / "ck", folder, out, "--eval-sequences", "0") == 0
    assert [n["step"] for n in read_log(tmp_path / "r.jsonl") if "step" in n] == [1, 2, 3, 4]


def test_softness_and_reach_are_finite() -> None:
    router = RouterConfig(num_experts=8, top_k=2)
    for setting in ({"miss_softness": float("inf")}, {"margin_reach": float("nan")}, {"sharpen": float("nan")}):
        with pytest.raises(UsageError, match=next(iter(setting))):
            Objective(**setting).check(router, 2)  # type: ignore[arg-type]
