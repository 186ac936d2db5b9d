"""The disk fails under an export, at every operation: no bundle or a whole one, and the next export completes it."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from export.exporter import export_bundle
from export.filesystem import FileSystem
from export.settings import ExportOptions
from export.verify import verify_bundle
from export.writer import ProgressEvent
from runtime.errors import EdgeError, UsageError
from tests.checkpoints import make_checkpoint
from tests.filesystems import CountingFileSystem, FaultyFileSystem
from tests.unit.test_export_bundle import digests

OPTIONS = ExportOptions(graphs=(), workers=1, name="model")
SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_experts": 2, "num_experts_per_tok": 1, "vocab_size": 40}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("faults") / "ck", "olmoe", **SIZE)


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("reference") / "out"
    export_bundle(source, out, OPTIONS)
    return digests(out)


@pytest.fixture(autouse=True)
def no_leaked_descriptors() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def attempt(source: Path, out: Path, fs: FileSystem) -> EdgeError | None:
    """Export; the error it ended with."""
    try:
        export_bundle(source, out, OPTIONS, fs=fs)
    except EdgeError as error:
        return error
    return None


def whole_or_invisible(out: Path, reference: dict[str, str]) -> None:
    assert not out.exists() or digests(out) == reference


@pytest.mark.parametrize(
    ("error", "persistent"), [(errno.EIO, False), (errno.ENOSPC, True)], ids=["EIO once", "ENOSPC from then on"]
)
def test_every_operation_fails_in_turn(
    error: int, persistent: bool, source: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    seen = set()
    for number in range(1, 1000):
        out = tmp_path / f"out{number}"
        fs = FaultyFileSystem(number, error, persistent)
        failure = attempt(source, out, fs)
        assert (failure is not None) == bool(fs.fired), failure
        assert failure is None or os.strerror(error) in str(failure)
        whole_or_invisible(out, reference)
        if not fs.fired:
            break
        seen.add(fs.fired[0])
        if not out.exists():
            export_bundle(source, out, OPTIONS)
        assert digests(out) == reference
        shutil.rmtree(out)
    assert not fs.fired  # the sweep reached the end
    assert number > 60
    assert seen >= {"create", "write", "truncate", "sync", "close", "rename", "append", "make_directory", "try_lock"}
    assert seen >= {"sync_directory", "remove_tree", "free_bytes"}


def test_a_failed_fsync_is_never_repeated_and_nothing_staged_is_reused(
    source: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    for verb in ("sync", "sync_directory"):
        for number in range(1, 100):
            out = tmp_path / verb
            fs = FaultyFileSystem(number, errno.EIO, only=verb)
            failure = attempt(source, out, fs)
            whole_or_invisible(out, reference)
            if not fs.fired:
                break
            calls = [i for i, name in enumerate(fs.log) if name == verb]
            after = set(fs.log[calls[number - 1] + 1 :])
            if out.exists():  # the last rename had been made
                assert "a power cut may undo it" in str(failure)
            else:
                assert "fsync failed" in str(failure)
                assert not (tmp_path / f".{verb}.partial").exists()
            assert not {"sync", "sync_directory", "write", "rename"} & after
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(tmp_path / f".{verb}.partial", ignore_errors=True)
        assert not fs.fired
        assert number > 5


def test_an_interrupted_export_reuses_what_was_finished(
    source: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    out, events = tmp_path / "out", []
    fs = FaultyFileSystem(4, errno.ENOSPC, only="create")  # the fourth of six files
    with pytest.raises(EdgeError, match="run the same command again"):
        export_bundle(source, out, OPTIONS, fs=fs)
    assert fs.fired == ["create"]
    events: list[ProgressEvent] = []
    second = CountingFileSystem()
    export_bundle(source, out, OPTIONS, events.append, second)
    assert second.log.count("create") == 3
    assert 0 < events[-1].reused_bytes < events[-1].total_bytes
    assert digests(out) == reference
    assert os.listdir(tmp_path) == ["out"]


def test_a_staged_file_that_changed_is_written_again(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(EdgeError):
        export_bundle(source, out, OPTIONS, fs=FaultyFileSystem(5, errno.EIO, only="create"))
    staged = [p for p in (tmp_path / ".out.partial/bundle").rglob("*") if p.is_file()]
    assert len(staged) == 4
    data = bytearray(staged[0].read_bytes())
    data[-1] ^= 1
    staged[0].write_bytes(data)
    staged[1].write_bytes(b"short")
    staged[2].unlink()
    (tmp_path / ".out.partial/bundle/stranger").touch()
    events: list[ProgressEvent] = []
    export_bundle(source, out, OPTIONS, events.append)
    assert digests(out) == reference
    assert events[-1].reused_bytes == (out / staged[3].relative_to(tmp_path / ".out.partial/bundle")).stat().st_size


@pytest.mark.parametrize("keep", [0, 1, 40, -30, -1])
def test_a_torn_journal_costs_only_time(keep: int, source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out, journal = tmp_path / "out", tmp_path / ".out.partial/journal"
    with pytest.raises(EdgeError):
        export_bundle(source, out, OPTIONS, fs=FaultyFileSystem(5, errno.EIO, only="create"))
    journal.write_bytes(journal.read_bytes()[:keep])
    with pytest.raises(EdgeError):
        export_bundle(source, out, OPTIONS, fs=FaultyFileSystem(1, errno.EIO, only="rename"))
    export_bundle(source, out, OPTIONS)
    assert digests(out) == reference


@pytest.mark.parametrize("change", ["touch", "edit", "options"])
def test_another_source_does_not_resume(change: str, source: Path, tmp_path: Path) -> None:
    path, out, options = shutil.copytree(source, tmp_path / "ck"), tmp_path / "out", OPTIONS
    with pytest.raises(EdgeError):
        export_bundle(path, out, OPTIONS, fs=FaultyFileSystem(3, errno.EIO, only="create"))
    if change == "touch":
        os.utime(path / "model.safetensors")
    elif change == "edit":
        (path / "config.json").write_text((path / "config.json").read_text() + "\n")
    else:
        options = ExportOptions(graphs=(), workers=1, name="another name")
    with pytest.raises(UsageError, match=r"cannot be resumed; remove it with: rm -r .*\.out\.partial"):
        export_bundle(path, out, options)
    assert not out.exists()


def test_a_second_exporter_is_locked_out(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused = []

    def at_the_first_file(event: ProgressEvent) -> None:
        if not refused:
            with pytest.raises(UsageError, match="locked: another export"):
                export_bundle(source, out, OPTIONS)
            refused.append(True)

    export_bundle(source, out, OPTIONS, at_the_first_file)
    assert refused
    assert digests(out) == reference


def test_too_little_space_is_said_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    class AlmostFull(CountingFileSystem):
        def free_bytes(self, path: Path) -> int:
            return 1000

    fs = AlmostFull()
    with pytest.raises(UsageError, match=r"16,8\d\d,\d\d\d bytes are needed, 1,000 are free"):
        export_bundle(source, tmp_path / "out", OPTIONS, fs=fs)
    assert "create" not in fs.log
    assert not (tmp_path / "out").exists()


def test_the_kernels_own_file_size_limit(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(EdgeError, match=os.strerror(errno.EFBIG)):
            export_bundle(source, out, OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not out.exists()
    export_bundle(source, out, OPTIONS)
    assert digests(out) == reference


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_disk_that_really_fills_up(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    class Optimist(FileSystem):
        """Passes the check of free space, so that the writes meet the end of the disk."""

        def free_bytes(self, path: Path) -> int:
            return 1 << 40

    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], check=True)
    try:
        failures = 0
        for size_kib in range(16, 400, 12):
            subprocess.run(["mount", "-o", f"remount,size={size_kib}k", str(disk)], check=True)
            failure = attempt(source, disk / "out", Optimist())
            if failure is None:
                break
            assert os.strerror(errno.ENOSPC) in str(failure)
            assert not (disk / "out").exists()
            failures += 1
        assert failures > 1
        assert digests(disk / "out") == reference
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_read_only_target(source: Path, tmp_path: Path) -> None:
    fs = FaultyFileSystem(1, errno.EROFS, only="make_directory")
    with pytest.raises(EdgeError, match=os.strerror(errno.EROFS)):
        export_bundle(source, tmp_path / "out", OPTIONS, fs=fs)
    assert fs.fired
    assert os.listdir(tmp_path) == []


def test_many_workers_report_one_failure_and_stop(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    options = ExportOptions(graphs=(), workers=6, name="model")
    for verb in ("write", "sync", "rename", "create"):
        for number in (1, 4, 6):
            out = tmp_path / f"{verb}{number}"
            fs = FaultyFileSystem(number, errno.EIO, only=verb)
            with pytest.raises(EdgeError, match=os.strerror(errno.EIO)):
                export_bundle(source, out, options, fs=fs)
            assert fs.fired == [verb]
            assert not out.exists()
            export_bundle(source, out, options)
            assert digests(out) == reference
            assert verify_bundle(out).problems == ()


def test_a_writer_without_fsync_would_be_noticed(source: Path, tmp_path: Path) -> None:
    fs = CountingFileSystem()
    export_bundle(source, tmp_path / "out", OPTIONS, fs=fs)
    created = fs.log.count("create") + 1  # the manifest is opened by append
    folders = 6  # bundle, dense, experts, experts/layer_00, routers, work
    assert fs.log.count("sync") == created + fs.log.count("sync_directory")
    assert fs.log.count("sync_directory") == folders + 1  # and the folder where the bundle appears
    last_file, appears = (len(fs.log) - 1 - fs.log[::-1].index(name) for name in ("write", "rename"))
    assert fs.log[last_file:appears].count("sync_directory") == folders
    assert fs.log[appears + 1 : appears + 3] == ["sync_directory", "sync"]
