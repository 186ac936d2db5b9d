"""Building one engine, seen by a TensorRT that only records: order of calls, shape ranges, features by release."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from export.blocks import build_graphs
from export.engine_build import BuildRequest, build, shape_ranges
from runtime.backends.tensorrt_library import Library, cure, jetpack, load
from runtime.engine_store import EngineLimits
from runtime.errors import EdgeError, UsageError
from runtime.graph_io import PartIO, TensorIO, attention_scratch_bytes, dense_parts, part_io, weight_files
from runtime.layout import graph_file
from tests.parity.dense_models import MODELS
from tests.unit.fake_tensorrt import Log, fake_module

CONFIG = MODELS["gqa-bias-gate"]  # 8 heads, 2 key heads of 16, hidden 64
OPTIONS = EngineLimits(context=128, prefill=32, workspace_bytes=1000)
BLOCK = part_io(CONFIG, "layer_00")


def request(io: PartIO = BLOCK, **changes: Any) -> BuildRequest:
    values: dict[str, Any] = {"graph": b"onnx", "graph_path": "/b/dense/x.onnx", "io": io, "workspace_bytes": 1000}
    return BuildRequest("layer_00", ranges=shape_ranges(CONFIG, "layer_00", OPTIONS), **{**values, **changes})


def run(log: Log, io: PartIO = BLOCK, without: tuple[str, ...] = (), engine: Any = b"engine", **changes: Any) -> Any:
    module = fake_module(log, io, without, engine)
    return build(Library(module, "tensorrt", "10.3.0"), request(**changes))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_inputs_and_outputs_are_those_of_the_graphs(name: str, dtype: str) -> None:
    """What builder and back-end believe about a graph, against the graph: names, order, types, dimensions."""
    config = MODELS[name]
    kinds = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.FLOAT: "fp32"}
    graphs = dict(build_graphs(config, dtype, lambda file, tensor: (0, 0)))
    assert [graph_file(part, dtype) for part in [*dense_parts(config), "expert"]] == list(graphs)
    for part in [*dense_parts(config), "expert"]:
        graph = onnx.load_from_string(graphs[graph_file(part, dtype)]).graph

        def described(values: Any) -> tuple[TensorIO, ...]:
            return tuple(
                TensorIO(
                    value.name,
                    kinds[value.type.tensor_type.elem_type],
                    tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
                )
                for value in values
            )

        assert part_io(config, part, dtype) == PartIO(described(graph.input), described(graph.output))
        places = {entry.value for t in graph.initializer for entry in t.external_data if entry.key == "location"}
        assert {Path(file).name for file in weight_files(config, part)} == places


def test_order_of_a_build_on_tensorrt_10() -> None:
    log: Log = []
    built = run(log, timing_cache=b"old")
    assert [entry[0] for entry in log] == [
        "network", "parse", "limit", "max_aux_streams", "timing cache", "profile", "profile", "build",
    ]  # fmt: skip
    assert log[0] == ("network", 1 << 1)  # strongly typed, and nothing else
    assert log[1] == ("parse", b"onnx", "/b/dense/x.onnx")
    assert log[2:5] == [("limit", "workspace", 1000), ("max_aux_streams", 0), ("timing cache", b"old", False)]
    assert (built.engine, built.layers, built.timing_cache) == (b"engine", 3, b"old+")


def test_the_two_profiles() -> None:
    """Decoding: one token after 1 ... 128 rows. Prompts: 1 ... 32 tokens. The mask has a column for every row."""
    log: Log = []
    run(log)
    decode, prefill = (entry[1] for entry in log if entry[0] == "profile")
    assert decode["x"] == ((1, 64), (1, 64), (1, 64))
    assert decode["past_k"] == ((1, 2, 16), (128, 2, 16), (128, 2, 16))
    assert decode["mask"] == ((1, 2), (1, 129), (1, 129))
    assert prefill["x"] == ((1, 64), (32, 64), (32, 64))
    assert prefill["cos"] == ((1, 16), (32, 16), (32, 16))
    assert prefill["mask"] == ((1, 2), (32, 160), (32, 160))
    assert list(decode) == list(prefill) == [tensor.name for tensor in BLOCK.inputs]


def test_a_long_context_is_tuned_for_a_usual_one() -> None:
    decode, prefill = shape_ranges(CONFIG, "layer_00", EngineLimits(8192, 512))
    assert decode["past_v"] == ((1, 2, 16), (1024, 2, 16), (8192, 2, 16))
    assert prefill["x"] == ((1, 64), (128, 64), (512, 64))


def test_expert_graph_takes_its_tokens() -> None:
    decode, prefill = shape_ranges(CONFIG, "expert", OPTIONS)
    assert decode["h"] == ((1, 64), (1, 64), (1, 64))
    assert prefill["h"] == ((1, 64), (32, 64), (32, 64))
    assert prefill["gate"] == ((24, 64),) * 3


def test_what_attention_works_in() -> None:
    """16 heads, 512 tokens after 4096 rows: 2 x 4 x 16 x 512 x 4608 bytes; TensorRT-RTX asks for 20 kB more than that
    when it is given too little (302,010,368).
    """
    config = replace(CONFIG, attention=replace(CONFIG.attention, num_heads=16))
    assert attention_scratch_bytes(config, 4096, 512) == 301_989_888


def test_releases_without_some_features() -> None:
    """TensorRT 11 has no flag for strong typing: all networks are. A release without timings gives none."""
    log: Log = []
    built = run(log, without=("STRONGLY_TYPED", "max_aux_streams", "create_timing_cache"))
    assert [entry[0] for entry in log] == ["network", "parse", "limit", "profile", "profile", "build"]
    assert log[0] == ("network", 0)
    assert built.timing_cache == b""


def test_a_gpu_that_is_not_there() -> None:
    log: Log = []
    run(log, compute_capability="86")
    assert ("num_compute_capabilities", 1) in log
    assert log.index(("num_compute_capabilities", 1)) < log.index(("capability", "sm86", 0)) < log.index(("build",))
    with pytest.raises(UsageError, match=r"cannot build for SM86 without such a GPU.*remoe-edge\[rtx\]"):
        run([], without=("set_compute_capability",), compute_capability="86")
    with pytest.raises(UsageError, match="SM87"):
        run([], compute_capability="87")


def test_refusals_carry_tensorrts_own_words() -> None:
    log: Log = []
    with pytest.raises(EdgeError, match="layer_00: TensorRT's parser refuses the graph: In node 3: UNSUPPORTED_NODE"):
        run(log, graph=b"")
    assert log[-1][0] == "parse"
    with pytest.raises(EdgeError, match=r"layer_00: TensorRT 10\.3\.0 cannot build this graph: no reason given"):
        run([], engine=None)


def test_another_graph_than_the_runtime_binds_is_not_built() -> None:
    log: Log = []
    other = PartIO(BLOCK.inputs, BLOCK.outputs[:-1])
    with pytest.raises(EdgeError, match="v_new"):
        run(log, io=other)
    assert ("build",) not in log


def test_loading_tells_what_is_missing_and_the_cure() -> None:
    def nothing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    with pytest.raises(UsageError) as caught:
        load(find=nothing)
    text = str(caught.value)
    assert "\n" not in text and "No module named 'tensorrt'" in text and "No module named 'tensorrt_rtx'" in text
    found = load(find=lambda name: SimpleNamespace(__version__="11.0") if name == "tensorrt_rtx" else nothing(name))
    assert (found.flavour, str(found)) == ("tensorrt-rtx", "TensorRT-RTX 11.0")


@pytest.mark.parametrize(
    ("line", "release", "python"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic", 6, "python3.10"),
        ("# R39 (release), REVISION: 2.0, GCID: 1, BOARD: generic", 7, "python3.12"),
    ],
)
def test_the_cure_on_a_board(tmp_path: Path, line: str, release: int, python: str) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text(line)
    assert jetpack(tmp_path) == release
    assert jetpack(tmp_path / "elsewhere") is None
    text = cure(root=tmp_path)
    assert f"on JetPack {release} run: sudo apt-get install python3-libnvinfer" in text
    assert f"make setup-board PYTHON={python}" in text
