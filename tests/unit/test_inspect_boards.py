"""`edge inspect` on nothing but a config.json: sizes of DeepSeek-V2-Lite and the slots that fit, derived by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge.boards import BOARDS, board_plan
from edge.cli import main
from export.families import parse_config
from tests.published_configs import DEEPSEEK_V2, DEEPSEEK_V2_LITE, GRANITE_3_1B_A400M

BLOB = 3 * 2048 * 1408 * 2
# Per layer: queries, latent and rope key, their way up to keys and values, output, two norms. Then the MLPs.
ATTENTION = 16 * 192 * 2048 + 576 * 2048 + 512 + 16 * (128 + 128) * 512 + 2048 * 16 * 128 + 2 * 2048
DENSE = 2 * (
    2 * 102400 * 2048 + 2048 + 27 * ATTENTION + 3 * 2048 * 10944 + 26 * 3 * 2048 * 2816
)  # embedding, head, final norm; layers


def test_figures_of_the_lite_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V2_LITE))
    assert main(["inspect", str(tmp_path / "config.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["experts"], found["blob_bytes"]) == (64, BLOB)
    assert found["token_cycle_bytes"] == 26 * 6 * BLOB
    assert found["dense_bytes"] == DENSE
    assert found["kv_values_per_layer"] == 512 + 64
    assert found["kv_bytes_per_token"] == 27 * 576 * 2
    # 6.1 and 14.92 GB usable, less 2.62 dense, 0.13 KV cache, 0.01 router, in steps of 26 blobs of 17.3 MB.
    assert [plan["slots_per_layer"] for plan in found["boards"]] == [7, 27]


def test_the_table_names_values_per_layer_and_boards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V2_LITE))
    assert main(["inspect", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "576 values per layer" in table
    assert "7 slots per layer, 11% of all experts" in table


def test_a_model_that_is_too_large_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V2))
    assert main(["inspect", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("does not run") == len(BOARDS)


def test_no_more_slots_than_experts() -> None:
    plan = board_plan("agx-orin", parse_config(GRANITE_3_1B_A400M))
    assert (plan["slots_per_layer"], plan["runs"]) == (32, True)


def test_inspect_and_forecast_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V2_LITE))
    for board in BOARDS:
        assert main(["forecast", str(tmp_path), "--device", board, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["fit"]
        plan = board_plan(board, parse_config(DEEPSEEK_V2_LITE))
        assert (plan["slots_per_layer"], plan["expert_bytes"]) == (found["slots"], found["expert_bytes"])
