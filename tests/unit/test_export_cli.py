"""edge export, verify and inspect: exit codes, what goes to stdout, and no traceback."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from edge.cli import main
from runtime import layout
from tests.checkpoints import make_checkpoint
from tests.unit.test_export_families import OLMOE, QWEN15_MOE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("cli") / "my-model", "olmoe", num_hidden_layers=2)


def test_export_verify_inspect(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["export", str(checkpoint), out, "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out.splitlines()[-1])
    files = [p for p in Path(out).rglob("*") if p.is_file()]
    assert result["files"] == len(files)
    assert result["bytes"] == sum(p.stat().st_size for p in files) - (Path(out) / layout.MANIFEST).stat().st_size
    assert "no tokenizer.json" in shown.err

    assert main(["verify", out]) == 0
    assert "every hash is right" in capsys.readouterr().out
    assert main(["verify", out, "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True

    assert main(["inspect", out, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    # 10 experts of 3 x 64 x 48 fp16 values: 18,432 bytes, 5 pages; top-3 in 2 layers
    assert (figures["blob_bytes"], figures["token_cycle_bytes"]) == (20480, 6 * 20480)
    assert figures["expert_bytes"] == 20 * 20480
    assert figures["expert_bytes"] == sum(p.stat().st_size for p in files if "experts" in p.parts)
    assert figures["kv_bytes_per_token"] == 2 * 2 * (2 * 16) * 2  # layers, K and V, 2 heads of 16, fp16
    assert (figures["source"], figures["routers"], figures["graphs"]) == ("my-model", ["base"], ["fp16", "fp32"])
    assert main(["inspect", out]) == 0
    table = capsys.readouterr().out
    assert "10 per layer, top-3, width 48" in table
    assert "olmoe" in table


def test_verify_of_a_damaged_bundle_exits_2_and_names_the_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(checkpoint), str(out), "--graphs", "none"]) == 0
    assert not list((out / "dense").glob("*.onnx"))
    blob = out / layout.expert_file(1, 3)
    blob.write_bytes(bytes(blob.stat().st_size))
    capsys.readouterr()
    assert main(["verify", str(out)]) == 2
    text = capsys.readouterr().out
    assert layout.expert_file(1, 3) in text
    assert "1 problems" in text
    assert main(["verify", str(out), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], len(report["problems"])) == (False, 1)


@pytest.mark.parametrize(
    ("published", "wanted"),
    [
        # blob: 3 x 2048 x inner fp16 values. Cycle: layers x top-k blobs. KV: layers x 2 x 16 heads x 128 x 2 bytes.
        (QWEN15_MOE, {"blob_bytes": 17301504, "token_cycle_bytes": 96 * 17301504, "kv_bytes_per_token": 196608}),
        (OLMOE, {"blob_bytes": 12582912, "token_cycle_bytes": 128 * 12582912, "kv_bytes_per_token": 131072}),
    ],
)
def test_inspect_of_a_config_alone(
    published: dict[str, Any], wanted: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published))
    for path in (tmp_path, tmp_path / "config.json"):
        assert main(["inspect", str(path), "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert {key: figures[key] for key in wanted} == wanted
        assert figures["kind"] == "checkpoint"


def test_a_checkpoint_and_its_bundle_have_the_same_figures(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(checkpoint), str(tmp_path / "out"), "--graphs", "none"])
    capsys.readouterr()
    figures = []
    for path in (checkpoint, tmp_path / "out"):
        assert main(["inspect", str(path), "--json"]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    before, after = figures
    assert {key: after[key] for key in before if key != "kind"} == {k: v for k, v in before.items() if k != "kind"}
    headers = 4096 * (2 + 2)  # embed, head and two layers, one page of header each
    dense = sum(p.stat().st_size for p in (tmp_path / "out/dense").glob("*.safetensors"))
    assert after["dense_bytes"] == dense - headers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "CK"], "the following arguments are required: OUT"),
        (["export", "CK", "OUT", "--graphs", "fp8"], "'fp8' is not one of fp16, fp32, none"),
        (["export", "CK", "OUT", "--workers", "0"], "--workers 0: expected 1 to 64"),
        (["export", "CK", "OUT", "--colour", "red"], "--colour"),
        (["export", "CK", "OUT", "--gate-dtype", "fp32"], "--gate-dtype goes with --hf"),
        (["export", "CK", "OUT", "--hf", "--router", "r", "--workers", "8"], "--workers is for bundles"),
        (["export", "CK", "OUT", "--hf", "--router", "r", "--graphs", "none"], "--graphs is for bundles"),
        (["export", "CK", "OUT", "--hf", "--router", "r", "--name", "x"], "--name is for bundles"),
        (["export", "nowhere", "OUT"], "nowhere: no such folder"),
        (["export", "CK/config.json", "OUT"], "a checkpoint is a folder"),
        (["export", "CK", "TMP"], "exists already"),
        (["export", "CK", "TMP/no/OUT"], "mkdir -p"),
        (["verify", "nowhere"], "no such bundle"),
        (["verify", "CK"], "not a bundle"),
        (["inspect", "nowhere"], "no such bundle or checkpoint"),
        (["inspect", "TMP"], "neither a bundle"),
    ],
)
def test_mistakes_exit_2_with_one_message(
    words: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"CK": str(checkpoint), "OUT": str(tmp_path / "out"), "TMP": str(tmp_path)}
    argv = [next((w.replace(k, v) for k, v in places.items() if w.startswith(k)), w) for w in words]
    argv = [w.replace("OUT", "out") for w in argv]
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert os.listdir(tmp_path) == []


def test_an_interrupted_export_says_that_it_resumed(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from export.exporter import export_bundle
    from export.writer import ProgressEvent

    out = tmp_path / "out"

    def interrupt(event: ProgressEvent) -> None:
        if event.done_bytes > event.total_bytes // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(checkpoint, out, progress=interrupt)
    assert not out.exists()
    assert main(["inspect", str(tmp_path / ".out.partial/bundle")]) == 2
    assert "leaves no bundle" in capsys.readouterr().err
    assert main(["export", str(checkpoint), str(out), "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["reused_bytes"] > result["bytes"] // 2
    assert "resumed an interrupted export" in shown.err
    shutil.rmtree(out)
