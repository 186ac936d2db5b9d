"""docs/bundle-format.md: its reader reads a real bundle, its tables name every key."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from export.exporter import export_bundle
from export.settings import ExportOptions
from runtime import layout
from runtime.config import AttentionConfig, ModelConfig, RopeConfig, RouterConfig
from runtime.manifest import FORMAT_VERSION, ExpertLayout, Manifest
from tests.checkpoints import make_checkpoint

PAGE = (Path(__file__).parents[2] / "docs/bundle-format.md").read_text()


def test_the_reader_of_the_page_works(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "ck", "qwen2_moe", num_hidden_layers=1)
    config = export_bundle(source, tmp_path / "out", ExportOptions(graphs=())).config
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    values = config.hidden_size * config.expert_intermediate_size
    assert run.stdout.split(" ", 2) == [str(values), str(values), f"{sorted(layout.layer_tensors(config, 0))}\n"]


@pytest.mark.parametrize("kind", [Manifest, ModelConfig, AttentionConfig, RopeConfig, RouterConfig, ExpertLayout])
def test_every_key_is_described(kind: type) -> None:
    known = set(re.findall(r"[a-z][a-z0-9_]*", " ".join(re.findall(r"`([^`]*)`", PAGE))))
    assert {field.name for field in dataclasses.fields(kind)} - known == set()


def test_the_version_is_the_one_that_the_code_writes() -> None:
    assert f"# The bundle format, version {FORMAT_VERSION}\n" in PAGE
