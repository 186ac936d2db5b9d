"""`edge engines` and what it orchestrates: progress, resume, refusals before work, a builder that dies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge import cli
from edge.engines import format_results
from export import engine_worker, engines
from export.engines import PartResult, build_engines, check_memory, estimate_bytes
from runtime.backends.tensorrt_library import load
from runtime.bundle import Bundle
from runtime.engine_store import EngineLimits, EngineStore, Target, engine_keys
from runtime.errors import BudgetError, BundleError, EdgeError, UsageError
from runtime.layout import layer_file
from tests.parity.dense_models import MODELS, make_bundle, write_manifest
from tests.rtx import needs_rtx

CONFIG = MODELS["gqa-bias-gate"]
PARTS = ["layer_00", "mlp_00", "layer_01", "mlp_01", "head"]
TARGET = Target("tensorrt", "10.3.0", "Orin sm_87 x8")
OPTIONS = EngineLimits(64, 16, 1 << 20)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(make_bundle(tmp_path / "b.bundle", CONFIG).path)


@pytest.fixture
def store(bundle: Bundle, tmp_path: Path) -> EngineStore:
    return EngineStore(bundle.manifest, tmp_path / "store")


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the builder's process is asked for; it answers with an engine of the part's name."""
    asked: list[dict[str, Any]] = []

    def run(request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request)
        Path(request["out"]).write_bytes(request["part"].encode())
        timings = bytes.fromhex(request["timing_cache"]) + b"t"
        return {"seconds": 2.0, "peak_bytes": 9, "layers": 3, "timing_cache": timings.hex()}

    monkeypatch.setattr(engines, "_run_worker", run)
    return asked


def ignore(result: PartResult, done: int, total: int) -> None:
    pass


def test_every_part_is_built_once_with_shared_timings(
    bundle: Bundle, store: EngineStore, worker: list[dict[str, Any]]
) -> None:
    seen: list[tuple[str, int, int]] = []
    results = build_engines(bundle, TARGET, OPTIONS, store, lambda r, done, all: seen.append((r.part, done, all)))
    assert [request["part"] for request in worker] == PARTS
    assert seen == [(part, n + 1, 5) for n, part in enumerate(PARTS)]
    # Each part is given the timings of those before it: equal layers are not timed again.
    assert [bytes.fromhex(request["timing_cache"]) for request in worker] == [b"t" * n for n in range(5)]
    assert {request["compute_capability"] for request in worker} == {None}
    assert [(r.part, r.engine_bytes, r.reused) for r in results] == [(p, len(p), False) for p in PARTS]
    keys = engine_keys(bundle, TARGET, OPTIONS)
    assert [bytes(store.read(keys[part])) for part in PARTS] == [part.encode() for part in PARTS]


def test_an_interrupted_build_goes_on(bundle: Bundle, store: EngineStore, monkeypatch: pytest.MonkeyPatch,
                                      worker: list[dict[str, Any]]) -> None:  # fmt: skip
    whole = engines._run_worker

    def dies_third(request: dict[str, Any]) -> dict[str, Any]:
        if len(worker) == 2:
            raise EdgeError("layer_01: the builder was killed")
        return whole(request)

    monkeypatch.setattr(engines, "_run_worker", dies_third)
    with pytest.raises(EdgeError, match="killed"):
        build_engines(bundle, TARGET, OPTIONS, store, ignore)
    monkeypatch.setattr(engines, "_run_worker", whole)
    results = build_engines(bundle, TARGET, OPTIONS, store, ignore)
    assert [request["part"] for request in worker] == PARTS
    assert [r.reused for r in results] == [True, True, False, False, False]
    assert build_engines(bundle, TARGET, OPTIONS, store, ignore)[4].seconds == 2.0
    assert len(worker) == 5


def test_memory_is_estimated_before_anything_is_built(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest part decides: layer_01 here, whose file has 100 x 10^6 bytes of weights once its size is faked."""
    monkeypatch.setattr(engines, "part_weight_bytes", lambda b, part: 100_000_000 if part == "layer_01" else 1)
    options = EngineLimits(64, 16, 200_000_000)
    assert estimate_bytes(100_000_000, options) == 600_000_000 + 4 * 100_000_000 + 200_000_000
    monkeypatch.setattr(engines, "limit", lambda: (1_200_000_000, "the machine's free memory"))
    assert check_memory(bundle, options, PARTS) == 1_200_000_000
    monkeypatch.setattr(engines, "limit", lambda: (1_199_999_999, "the machine's free memory"))
    text = r"building layer_01 may take 600 \+ 4 x 100 of weights \+ 200 of workspace = 1200 MB.*leaves 1200 MB"
    with pytest.raises(BudgetError, match=text):
        check_memory(bundle, options, PARTS)
    assert check_memory(bundle, options, []) == 0


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "memory ran out .*it resumes"),
        ("raise SystemExit('no more')", "ended with 1: no more: run the same command again"),
        ("", "ended with 0: without a word"),
        ("""print('{"error": "weights are bad", "usage": true}')""", "^weights are bad$"),
    ],
)
def test_a_builder_that_dies_is_told(
    bundle: Bundle, store: EngineStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, message: str
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(program)
    monkeypatch.setattr(engine_worker, "__file__", str(script))
    with pytest.raises(EdgeError, match=message):
        build_engines(bundle, TARGET, OPTIONS, store, ignore)
    assert store.built_options() == []


def test_damaged_graphs_and_weights_never_reach_tensorrt(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "b", CONFIG).path
    for file in ("dense/head.fp16.onnx", layer_file(1)):
        data = bytearray((path / file).read_bytes())
        data[-1] ^= 1
        (path / file).write_bytes(data)
    bundle = Bundle.open(path)
    with pytest.raises(BundleError, match=r"head\.fp16\.onnx: checksum"):
        engine_worker.checked_graph(bundle, "head")
    assert engine_worker.checked_graph(bundle, "layer_01")
    with pytest.raises(BundleError, match=r"dense/layer_01\.safetensors: BLAKE3 differs"):
        engine_worker.check_weights(bundle, "layer_01")
    engine_worker.check_weights(bundle, "layer_00")
    engine_worker.check_weights(bundle, "expert")


def test_a_bundle_without_fp16_graphs(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "b", CONFIG).path
    write_manifest(path, CONFIG, ("fp32",))
    with pytest.raises(UsageError, match=r"has no fp16 graphs \(found: fp32\).*--graphs fp16"):
        engine_keys(Bundle.open(path), TARGET, OPTIONS)


def test_the_builder_process_loads_little(bundle: Bundle) -> None:
    """torch would cost every part a second and 200 MB that a board does not have."""
    code = (
        "import sys, json; from export import engine_worker, engine_build; "
        "from runtime import engine_store, bundle; from runtime.backends import tensorrt_library; "
        "heavy = {'torch', 'onnx', 'transformers', 'rich'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--check", "--prune"], "--prune removes engines and --check keeps none"),
        (["--context", "0", "--check"], "--context 0: this model allows 1 to 128 tokens"),
        (["--context", "129", "--check"], "--context 129: this model allows 1 to 128 tokens"),
        (["--workspace", "many"], "'many' is not a size"),
    ],
)
def test_refusals(bundle: Bundle, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["engines", str(bundle.path), *words]) == 2
    assert message in capsys.readouterr().err


@needs_rtx
def test_check_builds_everything_without_a_gpu(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real builder, in its own processes; the table has a row for each part and nothing is kept."""
    monkeypatch.setenv("REMOE_EDGE_ENGINES", str(tmp_path / "kept"))
    assert cli.main(["engines", str(bundle.path), "--check", "--json", "--context", "64", "--workspace", "64M"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [part["part"] for part in answer["parts"]] == [*PARTS, "expert"]
    assert (answer["kept"], answer["target"]["capability"], answer["options"]["prefill"]) == (False, "86", 64)
    for part in answer["parts"]:
        assert part["seconds"] > 0 and part["layers"] > 5
        # It carries the weights: four matrices of 64 x 64 and more in a block.
        assert part["engine_bytes"] > 4 * 64 * 64 * 2
        assert 50_000_000 < part["peak_bytes"] < 600_000_000
    assert not (tmp_path / "kept").exists()


@needs_rtx
def test_real_engines_in_the_store(bundle: Bundle, store: EngineStore) -> None:
    """TensorRT-RTX through the builder's processes into the store; damaged weights stop it, the rest is kept."""
    library = load(("tensorrt-rtx",))
    target, options = Target("tensorrt-rtx", library.version, "sm_86", "86"), EngineLimits(64, 16, 64 << 20)
    weights = bundle.path / layer_file(1)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UsageError, match=r"^dense/layer_01\.safetensors: BLAKE3 differs from the manifest"):
        build_engines(bundle, target, options, store, ignore)
    weights.write_bytes(whole)
    results = build_engines(bundle, target, options, store, ignore)
    assert [(r.part, r.reused) for r in results] == [(part, part in PARTS[:2]) for part in PARTS]
    for part, key in engine_keys(bundle, target, options).items():
        assert len(store.read(key)) == next(r.engine_bytes for r in results if r.part == part) > 100_000


@needs_rtx
def test_too_little_workspace_is_told_with_the_cure(bundle: Bundle, store: EngineStore) -> None:
    """TensorRT finds no kernel that works in a kilobyte, and says so."""
    target = Target("tensorrt-rtx", load(("tensorrt-rtx",)).version, "sm_86", "86")
    with pytest.raises(EdgeError, match=r"layer_00: .* cannot build this graph: .*workspace.*: give more with --work"):
        build_engines(bundle, target, EngineLimits(64, 16, 1 << 10), store, ignore)
    assert store.built_options() == []


def test_the_table() -> None:
    rows = [PartResult("head", 21.36, 622_641_772, 2_077_224_960, 18, 622_338_048, False)]
    rows.append(PartResult("mlp_00", 0.04, 50_000, 347_000_000, 5, 0, True))
    assert format_results(rows).splitlines() == [
        "part    seconds  engine MB  weights MB  peak MB  layers",
        "head    21.4     622.6      622.3       2077.2   18",
        "mlp_00  0.0      0.1        0.0         347.0    5       from the store",
    ]
