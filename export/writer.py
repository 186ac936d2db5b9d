"""Writes a bundle so that a crash at any moment leaves either no bundle or a whole one.

Everything happens in `.NAME.partial/` beside the bundle: `lock`, `journal` and the staging directory `bundle/`. A file
is written under another name, synced, renamed, then listed in the journal. The manifest comes last, then one rename
makes the bundle appear. A later export resumes from the files that the journal lists and that still have their hashes.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from export.contents import PlannedFile
from export.disk import Hashes, SyncError, disk_errors, synced, write_whole
from export.filesystem import FileSystem
from export.journal import Identity, Journal
from runtime.errors import CheckpointError, UsageError
from runtime.layout import MANIFEST, padded
from runtime.machine import core_counts
from runtime.manifest import FileEntry

CHUNK_BYTES = 8 << 20  # one write
PIECE_BYTES = 1 << 20  # made and hashed while it is in the processor's cache
_SPARE_BYTES = 16 << 20  # directories, journal, manifest


@dataclass(frozen=True)
class ProgressEvent:
    """How far the export is, in bytes of the bundle; `reused_bytes` of them come from an interrupted export."""

    done_bytes: int
    total_bytes: int
    reused_bytes: int
    path: str


class _StoppedError(Exception):
    """Another file failed, or the user interrupted: this one was given up."""


class BundleWriter:
    """One export: holds the lock and the staging directory from construction to `close`."""

    def __init__(self, out: Path, identity: Identity, fs: FileSystem, *, force: bool, workers: int) -> None:
        """Take the lock and open or start the journal.

        Raises UsageError when `out` exists (without `force`), when another export runs or left something else behind.
        """
        check_target(out, force)
        self.out, self._fs, self._force, self._workers = out, fs, force, workers
        self.work = out.parent / f".{out.name}.partial"
        self.staging = self.work / "bundle"
        with disk_errors(self.work), ExitStack() as opened:
            fs.make_directory(self.work)
            opened.callback(fs.close, lock := _take_lock(fs, self.work))
            if not self.staging.exists() and (self.work / "journal").exists():
                fs.remove(self.work / "journal")  # of an export that was killed after its last rename
            self._journal = Journal(fs, self.work / "journal", identity)
            opened.callback(self._journal.close)
            fs.make_directory(self.staging)
            opened.pop_all()
        self._lock = lock
        self._journal_lock = threading.Lock()
        self._stop = threading.Event()
        # Workers that shared the cores would all come to their writes at once, and the disk be idle until then.
        self._computing = threading.Semaphore(core_counts()[0])

    def write(self, files: Sequence[PlannedFile], progress: Callable[[ProgressEvent], None]) -> dict[str, FileEntry]:
        """Write (or find finished) every file; their entries for the manifest.

        Raises what a content raises, UsageError when the disk is too full from the start, EdgeError when it fails.
        """
        self._clean(files)
        self._check_space(files)
        for directory in sorted({(self.staging / file.path).parent for file in files}):
            with disk_errors(directory):
                self._fs.make_directory(directory)
        buffers: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        for _ in range(self._workers):
            buffers.put(mmap.mmap(-1, CHUNK_BYTES))  # page-aligned, as O_DIRECT wants it
        try:
            return self._run(files, buffers, progress)
        except (CheckpointError, SyncError) as error:
            self._discard(error)  # neither a bad checkpoint nor a bad disk gets better by resuming
            raise

    def finish(self, manifest: bytes) -> None:
        """Write the manifest, make the bundle appear under its name and remove what is left.

        Raises EdgeError; before the last rename nothing is visible.
        """
        fs, staged = self._fs, self.staging / MANIFEST
        try:
            with disk_errors(staged):
                self._write_small(staged, manifest)
                for directory in sorted({p.parent for p in self.staging.rglob("*")} | {self.work}):
                    synced(fs.sync_directory, directory)
                if self._force and os.path.lexists(self.out):
                    fs.exchange(self.staging, self.out)
                else:
                    fs.rename(self.staging, self.out)
        except SyncError as error:
            self._discard(error)
            raise
        with disk_errors(self.out, f"the bundle is complete, but a power cut may undo it, and '{self.work}' is left"):
            fs.sync_directory(self.out.parent)
            fs.remove_tree(self.work)

    def close(self) -> None:
        """Close journal and lock; what is staged stays for the next export."""
        with disk_errors(self.work, "its journal or lock could not be closed"):
            try:
                self._journal.close()
            finally:
                self._fs.close(self._lock)

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _discard(self, error: CheckpointError | SyncError) -> None:
        """Forget what was staged, so that the next export starts from nothing."""
        try:
            self._fs.remove(self.work / "journal")
            self._fs.remove_tree(self.work)
        except OSError as second:
            raise type(error)(f"{error}\n  run: rm -r '{self.work}' ({second.strerror})") from error

    def _run(
        self,
        files: Sequence[PlannedFile],
        buffers: queue.SimpleQueue[mmap.mmap],
        progress: Callable[[ProgressEvent], None],
    ) -> dict[str, FileEntry]:
        total, done, reused = sum(file.bytes for file in files), 0, 0
        entries: dict[str, FileEntry] = {}
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="export")
        futures = {pool.submit(self._finished_or_written, file, buffers): file for file in files}
        waiting = set(futures)
        try:
            while waiting and not self._stop.is_set():
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in (f for f in finished if f.exception() is None):
                    file = futures[future]
                    entries[file.path], old = future.result()
                    done, reused = done + file.bytes, reused + file.bytes * old
                    progress(ProgressEvent(done, total, reused, file.path))
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
        _raise_first(futures)
        return entries

    def _finished_or_written(self, file: PlannedFile, buffers: queue.SimpleQueue[mmap.mmap]) -> tuple[FileEntry, bool]:
        if self._stop.is_set():
            raise _StoppedError
        buffer = buffers.get()
        try:
            with memoryview(buffer) as view, disk_errors(self.staging / file.path):
                listed = self._journal.done.get(file.path)
                if listed is not None and self._entry_of(file, view) == listed:
                    return listed, True
                return self._write_file(file, view), False
        except BaseException:
            self._stop.set()  # at once: after a failed fsync nothing more may be written
            raise
        finally:
            buffers.put(buffer)

    def _write_file(self, file: PlannedFile, buffer: memoryview) -> FileEntry:
        fs, target = self._fs, self.staging / file.path
        temporary = target.with_name(target.name + ".tmp")
        hashes = Hashes(file.seed)
        descriptor = fs.create(temporary)
        try:
            for start in range(0, file.bytes, CHUNK_BYTES):
                if self._stop.is_set():
                    raise _StoppedError
                size = min(CHUNK_BYTES, file.bytes - start)
                with self._computing:
                    for piece in range(0, size, PIECE_BYTES):
                        part = buffer[piece : min(piece + PIECE_BYTES, size)]
                        file.content.fill(start + piece, part)
                        hashes.update(part)
                write_whole(fs, descriptor, buffer[: padded(size)])
            if file.bytes % CHUNK_BYTES != padded(file.bytes % CHUNK_BYTES):
                fs.truncate(descriptor, file.bytes)  # O_DIRECT writes whole pages only
            synced(fs.sync, descriptor)
        finally:
            fs.close(descriptor)
        if target.exists():
            fs.remove(target)
        fs.rename(temporary, target)
        entry = hashes.entry(file.bytes)
        with self._journal_lock:
            self._journal.add(file.path, entry)
        return entry

    def _entry_of(self, file: PlannedFile, buffer: memoryview) -> FileEntry | None:
        """The entry of a file that is already there; None when it is not, or has another size."""
        path = self.staging / file.path
        if not path.is_file() or path.stat().st_size != file.bytes:
            return None
        hashes = Hashes(file.seed)
        with open(path, "rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                hashes.update(buffer[:count])
                os.posix_fadvise(stream.fileno(), 0, stream.tell(), os.POSIX_FADV_DONTNEED)
        return hashes.entry(file.bytes)

    def _write_small(self, path: Path, data: bytes) -> None:
        """What runtime.whole_file does, but through FileSystem, and a failed sync is told from other errors."""
        temporary = path.with_name(path.name + ".tmp")
        descriptor = self._fs.append(temporary)
        try:
            write_whole(self._fs, descriptor, memoryview(data))
            synced(self._fs.sync, descriptor)
        finally:
            self._fs.close(descriptor)
        self._fs.rename(temporary, path)

    def _clean(self, files: Sequence[PlannedFile]) -> None:
        """Remove staged files that no journal line vouches for."""
        known = {self.staging / file.path for file in files if file.path in self._journal.done}
        for path in self.staging.rglob("*"):
            if path not in known and (path.is_symlink() or not path.is_dir()):
                with disk_errors(path):
                    self._fs.remove(path)

    def _check_space(self, files: Sequence[PlannedFile]) -> None:
        wanted = sum(padded(file.bytes) for file in files if file.path not in self._journal.done) + _SPARE_BYTES
        with disk_errors(self.work):
            free = self._fs.free_bytes(self.work)
        if free < wanted:
            raise UsageError(
                f"{self.out.parent}: {wanted:,} bytes are needed, {free:,} are free: free some space or export to "
                "another disk"
            )


def check_target(out: Path, force: bool) -> None:
    """Refuse an `out` that exists, without `force`, or that is no bundle. Raises UsageError."""
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder; run: mkdir -p '{out.parent}'")
    if not os.path.lexists(out):
        return
    if not force:
        raise UsageError(f"{out}: exists already; choose another name, or replace it with --force")
    if out.is_symlink() or not (out / MANIFEST).is_file():
        raise UsageError(f"{out}: is no bundle (no {MANIFEST}), so --force does not replace it: remove it yourself")


def _take_lock(fs: FileSystem, work: Path) -> int:
    path = work / "lock"
    descriptor = fs.append(path)
    try:
        # A writer that has just finished removes its lock file: a lock on the removed file would protect nothing.
        if fs.try_lock(descriptor) and path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except OSError:
        fs.close(descriptor)
        raise
    fs.close(descriptor)
    raise UsageError(f"{work}: locked: another export to this name is running")


def _raise_first(futures: Iterable[Future[tuple[FileEntry, bool]]]) -> None:
    """Raise the first error in the plan's order, but a SyncError before all: it decides what becomes of the rest."""
    errors = [error for f in futures if not f.cancelled() and (error := f.exception()) is not None]
    errors = [error for error in errors if not isinstance(error, _StoppedError)]
    if errors:
        raise next((error for error in errors if isinstance(error, SyncError)), errors[0])
