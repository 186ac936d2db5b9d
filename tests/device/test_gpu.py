"""The checks of bench/gpu.py on the GPU of this machine, with small models. Skipped, with the reason, where none is."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import gpu
from export.exporter import export_bundle
from runtime.cuda.device import Device, open_device
from runtime.errors import UsageError
from tests.checkpoints import make_checkpoint

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device() -> Device:
    try:
        return open_device()
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["qwen2_moe", "deepseek_v2"])
def settings(request: pytest.FixtureRequest, device: Device, tmp_path_factory: pytest.TempPathFactory) -> gpu.Settings:
    folder = tmp_path_factory.mktemp("gpu")
    export_bundle(str(make_checkpoint(folder / "checkpoint", request.param)), folder / "bundle")
    return gpu.Settings(Path(folder / "bundle"), slots_per_layer=4, tokens=16, context=128)


@pytest.mark.parametrize("name", gpu.CHECKS)
def test_check(name: str, settings: gpu.Settings, device: Device) -> None:
    outcome = gpu._outcome(gpu.CHECKS[name], settings, device)
    if outcome["status"] == "not run":
        pytest.skip(outcome["reason"])
    assert outcome["status"] == "pass", outcome
