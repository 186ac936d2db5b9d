"""The rivals of bench/mla.py compute the same attention, so their times may be compared."""

from __future__ import annotations

import json

import pytest
import torch

from bench import mla
from profiles.bandwidth import Bandwidth
from runtime.errors import EdgeError


def test_bench_ends_with_its_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(mla, "measure_bandwidth", lambda: Bandwidth(1e10, 1e10, 1e10))
    assert mla.main(["--context", "33", "--layers", "1", "--rounds", "1"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    sizes = {name: rival["cache_bytes"] for name, rival in last["rivals"].items()}
    assert sizes.pop("compressed") == 34 * 576 * 2  # fp16, 33 tokens and the one that is decoded
    assert set(sizes.values()) == {34 * 16 * (192 + 128) * 2}


@torch.inference_mode()
def test_a_rival_that_computes_something_else_is_refused() -> None:
    config = mla.lite(1, 34)
    weights = [mla.random_layer(config, 0)]
    compressed = mla.Compressed(config, weights, 33)
    wrong = mla.Expanded(config, weights, compressed.cache)
    wrong.keys.neg_()
    h = torch.randn(1, config.hidden_size, dtype=mla.DTYPE)
    with pytest.raises(EdgeError, match="wrong, layer 0"):
        mla.check_equal({"compressed": compressed, "wrong": wrong}, h, 1)
