"""The table for the Orin NX: its sizes and times by hand, the page, and the measured table on a small model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bench import orin, orin_measure, orin_page
from bench.orin import OrinOptions, cache_sizes, simulated
from export.exporter import export_bundle
from export.families import read_model
from profiles.device import load_device
from profiles.sizes import model_sizes
from profiles.workloads import Prompt, Workload
from runtime.config import ModelConfig
from tests.checkpoints import make_checkpoint
from tests.published_configs import DEEPSEEK_V2_LITE


@pytest.fixture(scope="module")
def lite() -> ModelConfig:
    return read_model(dict(DEEPSEEK_V2_LITE), {})


def test_cache_sizes_rise(lite: ModelConfig) -> None:
    sizes = cache_sizes(model_sizes(lite, 4096), 27)
    assert list(sizes.values()) == [6, 8, 12, 27, 32, 58]
    assert [name for name, slots in sizes.items() if slots == 27] == ["what fits"]


def test_the_smallest_cache_keeps_what_the_published_overlap_says(lite: ModelConfig) -> None:
    rows = simulated(lite, load_device("orin-nx-16gb"), OrinOptions(requests=2, tokens=40))
    assert [row.slots for row in rows if row.cold] == [6, 8, 12, 27, 32, 58]
    smallest = next(row for row in rows if row.slots == 6 and row.cold)
    # Of 40 steps the first finds an empty cache, the others what the step before had.
    for router, overlap in orin.OVERLAPS.items():
        cell = smallest.cells[router]
        assert cell.hit_rate == pytest.approx(overlap * 39 / 40, abs=0.01)
        assert cell.fast_ms < cell.tpot_ms < cell.slow_ms
        # Nothing is faster than reading the misses at 3.5 GB/s, 26 last experts and the head at 60 GB/s.
        assert cell.tpot_ms > 1000 * (cell.misses_per_token * 17_301_504 / 3.5e9 + 26 * 17_301_504 / 60e9)
    assert [row.fits for row in rows if row.cold] == [True] * 4 + [False] * 2


def test_the_page_names_what_it_stands_on(lite: ModelConfig, tmp_path: Path) -> None:
    device = load_device("orin-nx-16gb")
    rows = simulated(lite, device, OrinOptions(requests=1, tokens=4))
    page = orin_page.write(tmp_path / "results", rows, device, 17_301_504, (1, 4)).read_text()
    assert page.count("*published: ShareGPT*") == 2 and "1.81 x" in page
    for text in ("Simulated, not measured", "no expert cache of its own", "| drive, usual | 3.50e9 | assumed |",
                 "1 requests of 4 decode steps", orin_page.ON_A_BOARD):  # fmt: skip
        assert text in page
    assert (tmp_path / "results" / "orin-nx-simulated.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_that_is_committed_is_of_this_code() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/results/orin-nx-simulated.md").read_text()
    assert "| K | 6 | 0.269 to 0.340 |" in page and "no figure of ours on this page comes from a board" in page


def test_measured_on_a_small_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", "qwen2_moe", tokenizer=True, vocab_size=300)
    export_bundle(checkpoint, tmp_path / "m.bundle")
    prompts = tuple(Prompt(f"p{number}", "word " * (number + 1)) for number in range(5))
    monkeypatch.setattr(orin_measure, "load_workload", lambda name, _: Workload(name, "a test", "ours", prompts))
    words = ["--measure", str(tmp_path / "m.bundle"), "--router", "base", "--slots", "4", "--prompts", "5"]
    words += ["--tokens", "3", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "results")]
    assert orin.main(words) == 0
    page = (tmp_path / "results" / "orin-nx-measured.md").read_text()
    assert "no Jetson board" in page and page.count("*published: ") == 3
    rows = [
        line.split(" | ") for line in page.splitlines() if line.startswith(("| ShareGPT", "| GSM8K", "| HumanEval"))
    ]
    assert len(rows) == 3 and all(row[2].split(" to ")[0] == row[2].split(" to ")[1] for row in rows)  # the same router
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["rows"][0]["base"]["decode_tokens"] == 10
    assert orin.main(words) == 2
    assert "a run never writes over another one" in capsys.readouterr().err
    assert orin.main(words[:2]) == 2
    assert "name the tuned one with --router" in capsys.readouterr().err


def test_options_say_the_papers_protocol() -> None:
    assert dataclasses.astuple(OrinOptions())[:2] == (128, 64)
