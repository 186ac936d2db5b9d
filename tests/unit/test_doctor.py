"""edge doctor: every row's verdict, the disk measurement, and probes that end badly."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import pytest

from edge import checks, disk, doctor, probe
from edge.checks import Check
from edge.cli import main
from profiles.raw_reads import RawReader
from runtime import native
from runtime.errors import EdgeError


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_jetson_is_recognised_by_its_device_tree_and_release(tmp_path: Path) -> None:
    write(tmp_path, "proc/device-tree/model", "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0")
    write(
        tmp_path,
        "etc/nv_tegra_release",
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64",
    )
    release = checks._jetson_release(tmp_path)
    assert release == "36.4.3"
    row = checks.device_check(tmp_path, release)
    assert row.found == "NVIDIA Jetson Orin NX Engineering Reference Developer Kit, L4T 36.4.3"


def test_another_machine_is_its_processor(tmp_path: Path) -> None:
    write(tmp_path, "proc/cpuinfo", "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n")
    assert checks._jetson_release(tmp_path) == ""
    assert checks.device_check(tmp_path, "").found == "Some CPU @ 3 GHz"


@pytest.mark.parametrize(
    ("row", "status", "words"),
    [
        (checks.python_check((3, 9)), "FAIL", "3.10 to 3.13"),
        (checks.python_check((3, 10)), "PASS", ""),
        (checks.python_check((3, 14)), "FAIL", "3.10 to 3.13"),
        (checks.power_check("15W"), "WARN", "nvpmodel -m 0"),
        (checks.power_check("MAXN_SUPER"), "PASS", ""),
        (checks.power_check(None), "WARN", "nvpmodel -q"),
        (checks.memory_check(500 << 20, "the limit"), "FAIL", "raise the limit"),
        (checks.memory_check(2 << 30, "the limit"), "WARN", "small models"),
        (checks.memory_check(14 << 30, "the limit"), "PASS", ""),
        (checks.swap_check(0, 0), "PASS", ""),
        (checks.swap_check(8 << 30, 1 << 30), "PASS", ""),
        (checks.swap_check(8 << 30, 3 << 30), "WARN", "swapoff"),
        (checks.open_files_check(1024), "WARN", "ulimit -Hn 8192"),
        (checks.open_files_check(resource.RLIM_INFINITY), "PASS", ""),
        (checks.telemetry_check(jetson=True, tegrastats=False, jtop=False), "WARN", "tegrastats"),
        (checks.telemetry_check(jetson=True, tegrastats=True, jtop=False), "PASS", ""),
        (checks.telemetry_check(jetson=False, tegrastats=False, jtop=False), "SKIP", ""),
        (disk.free_check(Path(), 5 << 30), "WARN", "13 to 60 GB"),
        (disk.direct_check(False), "WARN", "ext4"),
        (disk.speed_check({1 << 20: 0.3e9, 4 << 20: 0.4e9}), "WARN", "NVMe"),
        (disk.speed_check({1 << 20: 0.3e9, 4 << 20: 3.1e9}), "PASS", ""),
    ],
)
def test_verdicts(row: Check, status: str, words: str) -> None:
    assert row.status == status
    assert words in row.cure
    assert bool(row.cure) == (status in ("WARN", "FAIL"))  # whoever is warned is told what to do


@pytest.mark.parametrize(("text", "status"), [("always [madvise] never", "PASS"), ("always madvise [never]", "WARN")])
def test_huge_pages(tmp_path: Path, text: str, status: str) -> None:
    write(tmp_path, "sys/kernel/mm/transparent_hugepage/enabled", text)
    row = checks.huge_pages_check(tmp_path)
    assert row.status == status
    assert checks.huge_pages_check(tmp_path / "nowhere").status == "WARN"


def test_disk_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    rows = {row.name: row for row in disk.disk_checks(tmp_path, file_bytes=32 << 20, seconds=0.05)}
    assert set(rows) == {"disk", "O_DIRECT", "read speed"}
    assert rows["read speed"].found.count("GB/s") == 3
    assert list(tmp_path.iterdir()) == []


def test_scratch_file_without_tmpfile_support_is_nameless_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_EXCL | os.O_CREAT)  # an open that fails
    with disk.scratch_file(tmp_path) as descriptor:
        assert disk.fill(descriptor, 16 << 20) == 16 << 20
        assert list(tmp_path.iterdir()) == []  # a kill -9 here would leave nothing behind
        with disk.reader(descriptor) as (source, _):
            assert RawReader([(source, 16 << 20)]).rate(1 << 20, 2, seconds=0.02) > 0


def test_reads_fall_back_to_the_page_cache_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_DIRECT", os.O_DIRECTORY)  # refused for a file, as O_DIRECT is by some file systems
    rows = {row.name: row.status for row in disk.disk_checks(tmp_path, file_bytes=16 << 20, seconds=0.02)}
    assert rows["O_DIRECT"] == "WARN"
    assert rows["read speed"] != "SKIP"


def test_disks_that_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [row.status for row in disk.disk_checks(tmp_path / "missing")] == ["FAIL"]
    assert disk.disk_checks(tmp_path, file_bytes=1 << 60)[1].status == "SKIP"
    monkeypatch.setattr(disk, "fill", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    row = disk.disk_checks(tmp_path, file_bytes=1 << 20)[1]
    assert (row.status, "No space left" in row.found) == ("WARN", True)


def test_a_drive_that_fails_to_read_is_a_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> float:
        raise EdgeError("reading failed: Input/output error")

    monkeypatch.setattr(RawReader, "rate", fail)
    row = disk.disk_checks(tmp_path, file_bytes=16 << 20)[-1]
    assert (row.status, "Input/output error" in row.found) == ("FAIL", True)


def test_back_ends_run_a_kernel_here() -> None:
    rows = {row.name: row for row in doctor.backend_checks()}
    assert rows["torch cpu"].status == "PASS"
    for name in ("compiled kernel", "compiled reader"):
        assert rows[name].status == ("PASS" if native.library() else "WARN"), rows[name]
    assert rows["onnxruntime cpu"].status == "PASS"
    assert "tensorrt" in rows


@pytest.mark.parametrize(("path", "why"), [(None, "not built"), (Path("x.so"), "built for another kind of machine")])
def test_a_library_that_is_not_there_is_a_warning_with_the_cure(
    path: Path | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "library_path", lambda: path)
    rows = list(probe.probe_native())
    assert [(row["name"], row["ok"]) for row in rows] == [("compiled kernel", False), ("compiled reader", False)]
    assert {row["found"] for row in rows} == {f"RuntimeError: {why}"}
    assert {doctor._severity(row["name"]) for row in rows} == {"WARN"}
    assert all("C compiler" in doctor._cure(row["name"]) for row in rows)


def test_a_gpu_that_torch_does_not_see_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PROBES", {})
    (row,) = doctor.backend_checks(tmp_path)
    assert row.status == "SKIP"
    write(tmp_path, "dev/nvidia0", "")
    (row,) = doctor.backend_checks(tmp_path)
    assert row.status == "WARN"
    assert "JetPack or CUDA" in row.cure


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "ended with -4"),
        ("raise ImportError('libcudart.so.12: cannot open')", "ImportError: libcudart.so.12: cannot open"),
        ('print(\'{"name": "torch cpu", "ok": false, "found": "a product is wrong"}\')', "a product is wrong"),
    ],
)
def test_a_library_that_breaks_fails_its_row_only(
    script: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "probe.py", script)
    monkeypatch.setattr(probe, "__file__", str(tmp_path / "probe.py"))
    (row,) = doctor._library_checks("torch", gpu=False)
    assert row.status == "FAIL"
    assert found in row.found
    assert row.cure


def test_wrong_results_of_a_device_are_noticed() -> None:
    def wrong() -> str:
        raise ArithmeticError("a product is wrong")

    assert probe._row("x", wrong) == {"name": "x", "ok": False, "found": "ArithmeticError: a product is wrong"}


def test_exit_code_and_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "backend_checks", lambda: [Check("torch", "PASS", "fine")])
    monkeypatch.setattr(doctor, "machine_checks", lambda: [Check("memory", "WARN", "little", "buy some")])
    assert main(["doctor", "--no-speed"]) == 0
    assert capsys.readouterr().out == "WARN  memory  little\n      cure: buy some\nPASS  torch   fine\n"
    monkeypatch.setattr(doctor, "machine_checks", lambda: [Check("python", "FAIL", "2.7", "upgrade")])
    assert main(["doctor", "--no-speed", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["failed"] == ["python"]
    assert report["checks"][0] == {"name": "python", "status": "FAIL", "found": "2.7", "cure": "upgrade"}


def test_machine_checks_work_on_the_machine_that_runs_the_tests() -> None:
    names = [row.name for row in checks.machine_checks()]
    assert {"python", "device", "memory", "swap", "huge pages", "open files", "telemetry"} <= set(names)
    assert sys.version_info >= (3, 10)


def test_a_folder_that_is_not_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "elsewhere", "--no-speed"]) == 2
    assert "leave elsewhere out" in capsys.readouterr().err
