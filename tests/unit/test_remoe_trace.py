"""A trace comes back as it was written, and a file that is none, or of another shape, is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from remoe.trace import Block, Trace, TraceInfo, TraceWriter
from runtime.errors import UsageError
from tests.traces import make_info, random_trace

ARRAYS = ("experts", "weights", "tokens", "requests", "positions", "decode", "logits", "hidden", "choice_bias")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "a.trace.safetensors"
    random_trace([(3, 4), (1, 2)]).save(path)
    return path


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path: Path, header: dict[str, Any], body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def with_info(path: Path, **changes: Any) -> None:
    header, body = parts(path)
    facts = json.loads(header["__metadata__"]["trace"])
    header["__metadata__"]["trace"] = json.dumps({**facts, **changes})
    rewrite(path, header, body)


def test_what_is_written_comes_back(tmp_path: Path, saved: Path) -> None:
    trace, again = random_trace([(3, 4), (1, 2)]), Trace.load(saved)
    assert again.info == trace.info
    for name in ARRAYS:
        wanted, found = getattr(trace, name), getattr(again, name)
        assert (wanted is None) == (found is None), name
        assert wanted is None or (wanted.dtype == found.dtype and np.array_equal(wanted, found)), name
    assert again.request_rows() == [range(7), range(7, 10)]
    again.save(tmp_path / "b.trace.safetensors")
    assert (tmp_path / "b.trace.safetensors").read_bytes() == saved.read_bytes()


def test_the_file_is_plain_safetensors(saved: Path) -> None:
    found = load_file(saved)
    assert {name: str(array.dtype) for name, array in found.items()} == {
        "experts": "uint8", "weights": "float16", "tokens": "int32", "requests": "int32", "positions": "int32",
        "decode": "uint8", "logits": "float16",
    }  # fmt: skip
    assert found["experts"].shape == (10, 2, 2)
    assert found["decode"].tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 1, 1]


def test_many_experts_take_two_bytes(tmp_path: Path) -> None:
    trace = random_trace([(0, 3)], layers=1, experts=300)
    trace.save(tmp_path / "t")
    assert Trace.load(tmp_path / "t").experts.dtype == np.uint16


def test_a_failed_recording_leaves_nothing(tmp_path: Path) -> None:
    trace = random_trace([(0, 3)])
    block = Block(*(getattr(trace, name) for name in ARRAYS[:7]))
    with pytest.raises(RuntimeError, match="stop"), TraceWriter(tmp_path / "t", trace.info) as writer:
        writer.add(block)
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="at least one token"), TraceWriter(tmp_path / "t", trace.info):
        pass
    with pytest.raises(UsageError, match="no folder that can be written to"):
        TraceWriter(tmp_path / "nowhere" / "t", trace.info)
    assert list(tmp_path.iterdir()) == []


def test_what_fp16_cannot_hold_is_said(tmp_path: Path) -> None:
    trace = random_trace([(0, 3)])
    block = dataclasses.replace(Block(*(getattr(trace, n) for n in ARRAYS[:7])), logits=np.full((3, 2, 8), 70000.0))
    with (
        pytest.raises(UsageError, match="does not fit fp16: leave --logits out"),
        TraceWriter(tmp_path / "t", trace.info) as writer,
    ):
        writer.add(block)


def test_a_truncated_trace_says_where_it_ends(saved: Path) -> None:
    whole = saved.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        with pytest.raises(UsageError, match=r"a\.trace\.safetensors: (not a trace|cut off)"):
            Trace.load(saved)
    saved.write_bytes(whole + b"x")
    with pytest.raises(UsageError, match="1 bytes follow the last tensor"):
        Trace.load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "made by a newer release: upgrade"),
        ({"format_version": True}, "trace format True"),
        ({"num_experts": 7}, "rules is RouterConfig"),
        ({"top_k": 0}, "top_k is 0"),
        ({"moe_layers": [2, 1]}, "moe_layers is \\(2, 1\\)"),
        ({"moe_layers": [1, 2, 3]}, r"experts is uint8 \[10, 2, 2\], expected uint8 \[10, 3, 2\]"),
        ({"kind": "dreamt"}, "'dreamt' is not one of 'generated', 'teacher-forced'"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"router": "base"}, "expected an object, found str"),
    ],
)
def test_facts_that_cannot_be_are_refused(saved: Path, changes: dict[str, Any], message: str) -> None:
    with_info(saved, **changes)
    with pytest.raises(UsageError, match=message):
        Trace.load(saved)


def test_foreign_files_are_refused(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(UsageError, match="No such file or directory; `edge trace BUNDLE --out"):
        Trace.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello, this is no trace at all")
    with pytest.raises(UsageError, match="not a trace"):
        Trace.load(tmp_path / "text")
    header, body = parts(saved)
    for changed, message in [
        ({k: v for k, v in header.items() if k != "__metadata__"}, "a safetensors file, but no trace"),
        ({**header, "colour": header["decode"]}, "bytes .* do not fit"),
        ({k: v for k, v in header.items() if k != "logits"}, "bytes follow the last tensor"),
        ({**header, "experts": {**header["experts"], "dtype": "F64"}}, "dtype 'F64' is not one of"),
        ({**header, "experts": {**header["experts"], "shape": [10, 2, 3]}}, "do not fit its shape"),
        ({**header, "experts": {"dtype": "U8"}}, "the header entry is malformed"),
    ]:
        rewrite(saved, changed, body)
        with pytest.raises(UsageError, match=message):
            Trace.load(saved)


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("experts", (0, 0, 0), 8, "beyond num_experts"),
        ("experts", (0, 0), 3, "one expert twice"),
        ("weights", (1, 1, 1), np.nan, "no number"),
        ("requests", 0, 5, "requests is not in order"),
        ("positions", 4, 9, "positions has a gap"),
        ("decode", 0, 2, "neither 0 nor 1"),
        ("decode", 1, 1, "a prompt follows"),
        ("tokens", 0, -1, "negative"),
    ],
)
def test_damaged_values_are_named(tmp_path: Path, name: str, at: Any, value: Any, message: str) -> None:
    trace = random_trace([(3, 4), (1, 2)])
    getattr(trace, name)[at] = value
    trace.save(tmp_path / "t")
    with pytest.raises(UsageError, match=message):
        Trace.load(tmp_path / "t")


def test_a_choice_bias_belongs_to_its_router(tmp_path: Path) -> None:
    trace = random_trace([(0, 2)])
    with pytest.raises(UsageError, match="choice_bias is there only for a router that has one"):
        Trace.from_arrays(
            make_info(2, 8, 2, rules=dataclasses.replace(trace.info.rules, choice_bias=True)),
            {n: getattr(trace, n) for n in ARRAYS[:7]},
        )


def test_a_trace_of_another_model_is_refused() -> None:
    trace = random_trace([(0, 2)])
    trace.check_same_model("a" * 64, "test")
    with pytest.raises(UsageError, match=r"the trace is of test \(gates aaaa.*not of other \(gates dddd"):
        trace.check_same_model("d" * 64, "other")


def test_the_documentation_names_every_tensor_and_field() -> None:
    page = (Path(__file__).parents[2] / "docs/traces.md").read_text()
    for name in (*ARRAYS, *(field.name for field in dataclasses.fields(TraceInfo))):
        assert f"`{name}`" in page, name
