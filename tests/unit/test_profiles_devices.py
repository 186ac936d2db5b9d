"""Device profiles: all that ship load, and a wrong one is refused with the field's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from profiles.device import device_names, load_device, parse_device
from runtime.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "profiles/devices/orin-nx-16gb.toml").read_text()


def test_the_profiles_that_ship() -> None:
    assert device_names() == ["agx-orin", "orin-nano-8gb", "orin-nx-16gb", "orin-nx-8gb"]
    for name in device_names():
        device = load_device(name)
        assert device.name == name
        assert device.memory_nominal_bytes_per_s
        assert device.memory_read_bytes_per_s.value < device.memory_nominal_bytes_per_s.value
        assert device.mode().name == device.default_mode
    board = load_device("orin-nx-16gb")
    assert (board.ram_bytes.value, board.ram_bytes.mark) == (15656 * 2**20, "field")
    assert [m.name for m in board.modes] == ["MAXN_SUPER", "40W", "25W", "15W", "10W"]
    gpu = board.mode("25W").gpu_mhz
    assert gpu is not None and gpu.value == 408
    assert board.mode("15W").cpu_mhz is None  # not known, so not there
    assert load_device(str(ROOT / "profiles/devices/agx-orin.toml")) == load_device("agx-orin")


def test_no_profile_claims_a_measurement_of_ours() -> None:
    """Until somebody has run on a board, no figure may bear the mark "measured"."""
    for path in (ROOT / "profiles/devices").glob("*.toml"):
        assert 'mark = "measured"' not in path.read_text()
        assert "ot yet run on a board" in path.read_text()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('name = "orin-nx-16gb"', "name = 3", "x.toml.name: expected str, found int 3"),
        ("[ram_bytes]\n", "[ram_byte]\n", "x.toml: unknown field 'ram_byte' (known: name, title"),
        ("value = 60.0e9\n", "", "x.toml.memory_read_bytes_per_s: field 'value' is missing"),
        ("value = 60.0e9\n", "value = true\n", "memory_read_bytes_per_s.value: expected float, found bool"),
        ("value = 60.0e9\n", "value = nan\n", "memory_read_bytes_per_s.value: nan is not a finite number"),
        ("value = 60.0e9\n", "value = -1\n", "x.toml.memory_read_bytes_per_s.value: -1.0 cannot be"),
        ("value = 60.0e9\n", "value = 0\n", "memory_read_bytes_per_s.value: 0.0 cannot be"),
        ('mark = "doc"', 'mark = "sure"', "mark: 'sure' is not one of 'doc', 'field', 'measured', 'assumed'"),
        ('source = "a slow NVMe drive"', 'source = " "', "x.toml.storage.low.source is empty"),
        ("low = { value = 2.0e9", "low = { value = 9.0e9", "must rise from low over typical to high"),
        ('default_mode = "40W"', 'default_mode = "60W"', "no power mode '60W' (known: MAXN_SUPER, 40W, 25W, 15W, 10W)"),
        ('name = "25W"', 'name = "40W"', "x.toml: two power modes have the same name"),
        ("[storage]", "[storage", "x.toml: not valid TOML: "),
        ("gpu_mhz = { value = 408, ", "gpu_mhz = { ", "x.toml.modes[2].gpu_mhz: field 'value' is missing"),
    ],
)
def test_a_wrong_profile_is_refused_by_field(before: str, after: str, message: str) -> None:
    assert before in TEXT
    with pytest.raises(UsageError) as caught:
        parse_device(TEXT.replace(before, after, 1), "x.toml")
    assert message in str(caught.value)


def test_names_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown device 'orin' \(known: agx-orin, orin-nano-8gb, "):
        load_device("orin")
    with pytest.raises(UsageError, match=r"none.toml: No such file"):
        load_device(str(tmp_path / "none.toml"))
    for data, message in ((b"\xff", "not UTF-8 text"), (b"#" * 300_000, "300000 bytes are no device profile")):
        (tmp_path / "odd.toml").write_bytes(data)
        with pytest.raises(UsageError, match=message):
            load_device(str(tmp_path / "odd.toml"))


def test_the_package_carries_its_files() -> None:
    """A data file that no pattern of pyproject.toml names is missing from an installed package."""
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["profiles"]
    folder = ROOT / "profiles"
    data = {p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert data == {p for pattern in settings for p in folder.glob(pattern)}
