"""The arithmetic of the benchmarks' floors, by hand, and the disk and memory tools on small files."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from bench import disk
from bench.cgroup import MemoryGroup, Verdict
from bench.common import interleaved
from bench.decode import DecodeOptions, Round, parse_slots, summarise
from bench.disk import MIB, ReadRates, best_reader, blob_files, measure_reads, measure_write
from bench.export import shares_of_ceiling
from bench.memory_limit import LimitOptions, check_enough, check_refused
from profiles.bandwidth import Bandwidth, BandwidthReader, field_medians, measure_bandwidth, median_seconds
from profiles.floor import Disk, PartCosts, active_bytes, median_floor, token_floor
from profiles.raw_reads import RawReader, page_aligned
from runtime.config import AttentionConfig, ModelConfig, RopeConfig, RouterConfig
from runtime.errors import EdgeError, UsageError
from runtime.records import TokenRecord

ROOT = Path(__file__).parents[2]
COSTS = PartCosts(head_s=5.0, block_s=1.0, shared_s=0.5, expert_s=0.25)
DISK = Disk(blob_bytes=2_000_000, bytes_per_s=1_000_000.0)  # 2 s per blob


def record(hits: list[int], misses: list[int]) -> TokenRecord:
    zero = dict.fromkeys(TokenRecord.__dataclass_fields__, 0)
    return TokenRecord(**{**zero, "hits": hits, "misses": misses})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("hits", "misses", "seconds"),
    [
        (4, 0, 1.0 + (0.5 + 4 * 0.25)),  # nothing to read
        (3, 1, 1.0 + 2.0 + 0.25),  # reading hides shared and resident experts; the missed one comes last
        (0, 4, 1.0 + 8.0 + 0.25),  # missed experts but the last are computed while the next is read
    ],
)
def test_floor_of_a_layer(hits: int, misses: int, seconds: float) -> None:
    assert token_floor(COSTS, DISK, record([hits], [misses])) == 5.0 + seconds


@pytest.mark.parametrize(
    ("hits", "misses", "seconds"),
    [
        (3, 1, 1.0 + (0.5 + 3 * 0.25) + 0.25),
        (1, 3, 1.0 + (0.5 + 3 * 0.25) + 0.25),  # whatever is read, the last missed expert comes after the arithmetic
        (0, 4, 1.0 + (0.5 + 3 * 0.25) + 0.25),
    ],
)
def test_floor_of_a_layer_whose_arithmetic_is_the_longer(hits: int, misses: int, seconds: float) -> None:
    fast = Disk(blob_bytes=2_000_000, bytes_per_s=8_000_000.0)  # 0.25 s per blob
    assert token_floor(COSTS, fast, record([hits], [misses])) == 5.0 + seconds


def test_floor_of_tokens_adds_layers_and_head() -> None:
    tokens = [record([4, 4], [0, 0]), record([3, 4], [1, 0]), record([0, 0], [4, 4])]
    assert median_floor(COSTS, DISK, tokens) == 5.0 + 3.25 + 2.5


def test_active_bytes_by_hand() -> None:
    config = ModelConfig(
        family="test",
        vocab_size=10,
        hidden_size=8,
        num_layers=1,
        max_context=16,
        norm_eps=1e-6,
        activation="silu",
        attention=AttentionConfig("gqa", 2, 1, 4, 4, 4, 0.5),
        rope=RopeConfig(4, 1e4),
        router=RouterConfig(num_experts=3, top_k=2),
        moe_layers=(0,),
        expert_intermediate_size=6,
    )
    norms, qkv, out, head = 8 + 8, (8 + 4 + 4) * 8, 8 * 8, 10 * 8
    router_bytes, expert_bytes = 4 * 3 * 8, 2 * 3 * 6 * 8
    assert active_bytes(config) == 2 * (norms + qkv + out + head) + router_bytes + 2 * expert_bytes


def test_shares_are_taken_within_a_round() -> None:
    """The machine is twice as slow after the first round: TPOT is 1.5 x the floor in all."""
    rounds = []
    for slower in (1.0, 2.0, 2.0):
        costs = PartCosts(*(slower * cost for cost in dataclasses.astuple(COSTS)))
        token = dataclasses.replace(record([3], [1]), bytes=900, read_busy_ms=1000.0 * slower)
        round_ = Round([token], None, costs, 1000, 1000.0 / slower, 3.0 * slower)
        floor_ms = 1000 * round_.floor_s
        token = dataclasses.replace(token, total_ms=1.5 * floor_ms)
        guessed = dataclasses.replace(token, total_ms=1.2 * floor_ms, prefetched=1, wasted_bytes=90)
        rounds.append(dataclasses.replace(round_, records=[token], guessed=[guessed]))
    setting = summarise(8, 0.8, rounds)
    assert (setting.floor_s, setting.tpot_s, setting.prefetch_tpot_s) == (15.0, 22.5, pytest.approx(18.0))
    assert (setting.over_floor, setting.over_memory_floor) == (1.5, 3.75)
    assert setting.prefetch_over_floor == pytest.approx(1.2)
    assert (setting.prefetched_share, setting.wasted_share) == (1.0, 0.1)
    assert setting.prefetch_read_share == pytest.approx(0.9)
    assert (setting.read_bytes_per_s, setting.read_share) == (450.0, pytest.approx(0.9))
    assert setting.alone_share == 0.8
    assert setting.hit_rate == 0.75
    assert setting.parts.head_s == 10.0
    alone = summarise(8, None, [dataclasses.replace(each, guessed=None) for each in rounds])
    assert (alone.prefetch_tpot_s, alone.prefetch_read_share, alone.prefetched_share) == (None, None, None)
    assert alone.tpot_s == 22.5


def test_best_of_read_rates() -> None:
    rates = ReadRates({(MIB, 1): [1.0] * 3, (MIB, 4): [3.0, 9.0, 1.0], (None, 1): [2.0] * 3})
    assert (rates.best, rates.best_setting) == (3.0, (MIB, 4))


def test_the_readings_that_choose_a_setting_do_not_rate_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, asked = iter([5.0, 9.0, 1.0] * 3), []

    def rate(_: object, block: int | None, threads: int, total_bytes: int) -> float:
        asked.append((block, threads, total_bytes))
        return next(sweep, 2.0)

    (tmp_path / "blob").write_bytes(bytes(MIB))
    monkeypatch.setattr("bench.disk.RawReader.rate", rate)
    monkeypatch.setattr("bench.disk.BLOCKS", (MIB,))
    with best_reader([tmp_path / "blob"], 100, (2, 4, 8)) as raw:
        found = raw(7)
    assert found == 2.0
    assert asked == [(MIB, count, 100) for count in (2, 4, 8)] * 3 + [(MIB, 4, 7)]


def test_rivals_take_turns() -> None:
    order: list[str] = []
    rivals = {name: lambda name=name: float(order.append(name) or len(order)) for name in "ab"}  # type: ignore[misc]
    assert interleaved(rivals, 2) == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    assert order == ["a", "b", "a", "b"]
    assert median_seconds([], 3) == 0.0


def test_bandwidth_is_the_median_of_readings_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = [Bandwidth(1.0, 9.0, 3.0), Bandwidth(5.0, 2.0, 4.0), Bandwidth(3.0, 6.0, 2.0)]
    assert field_medians(readings) == Bandwidth(3.0, 6.0, 3.0)
    asked = iter(readings)
    monkeypatch.setattr("profiles.bandwidth._ROWS", 2)
    monkeypatch.setattr("profiles.bandwidth.BandwidthReader.read", lambda _: next(asked))
    assert measure_bandwidth(3).best == 6.0


def test_a_bandwidth_reading_counts_what_it_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profiles.bandwidth._ROWS", 2)
    monkeypatch.setattr("profiles.bandwidth.median_seconds", lambda *_: 1.0)
    assert BandwidthReader().read() == Bandwidth(16384, 16384, 32768)  # 2 x 4096 values of 2 bytes in one second


def test_a_bound_shell_is_seen_on_stderr_and_in_the_result(capfd: pytest.CaptureFixture[str]) -> None:
    words = "from bench.common import conclude, run_main; run_main(lambda: conclude('x', {}))"
    core = min(os.sched_getaffinity(0))
    bind = partial(os.sched_setaffinity, 0, {core})
    subprocess.run([sys.executable, "-c", words], cwd=ROOT, check=True, preexec_fn=bind)
    out, err = capfd.readouterr()
    count = os.cpu_count()
    assert f"bench: may run on 1 of {count} cores" in err
    assert ("bound" in err) == (count != 1)
    machine = json.loads(out)["machine"]
    assert (machine["usable_cores"], machine["cores"]) == (1, count)


def test_slots_in_words() -> None:
    assert parse_slots(["8", "all"]) == (8, 1 << 20)
    with pytest.raises(UsageError, match="--slots half: expected a number or all"):
        parse_slots(["half"])
    assert DecodeOptions((8,)).read_threads > 0


@pytest.fixture
def direct_folder(tmp_path: Path) -> Path:
    probe = tmp_path / "probe"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip(f"{tmp_path}: this file system has no O_DIRECT")
    probe.unlink()
    return tmp_path


def test_an_export_is_measured_against_the_disk_around_it() -> None:
    """100 between writes of 100 and 300 is half; 90 between 300 and 60 is half, too, though the disk became slow."""
    assert shares_of_ceiling([100.0, 90.0], [100.0, 300.0, 60.0]) == [0.5, 0.5]


class TestDisk:
    def test_pieces_cover_each_file_once(self, direct_folder: Path) -> None:
        """A file of 2 MiB and 100 bytes: two blocks, the tail below a page left out."""
        (direct_folder / "x").write_bytes(bytes(2 * MIB + 100))
        reader = RawReader.open([direct_folder / "x"])
        pieces = sorted(piece[1:] for piece in reader._pieces(MIB, 2 * MIB))
        assert pieces == [(0, MIB), (MIB, MIB)]
        assert reader.rate(MIB, 2, 2 * MIB) > 0
        assert reader.rate(None, 1, seconds=0.01) > 0
        reader.close()

    def test_reads_go_through_all_of_the_memory(self, direct_folder: Path) -> None:
        """Eight pages of a file over and over into eight pages of memory: all of them arrive, and nothing grows."""
        pages = {bytes([i]) * 4096 for i in range(8)}
        (direct_folder / "x").write_bytes(b"".join(pages))
        reader = RawReader.open([direct_folder / "x"], memory_bytes=8 * 4096)
        for threads in (4, 1):
            reader.rate(4096, threads, 64 * 4096)
            assert len(reader._ring.memory) == 8 * 4096
        assert {bytes(reader._ring.memory[i : i + 4096]) for i in range(0, 8 * 4096, 4096)} == pages
        reader.close()

    def test_a_measurement_goes_on_where_the_last_one_stopped(self, direct_folder: Path) -> None:
        """Short ones would otherwise read into the same few pages, which stay in the processor's cache."""
        (direct_folder / "x").write_bytes(b"x" * 3 * 4096)
        reader = RawReader.open([direct_folder / "x"], memory_bytes=8 * 4096)
        for pages in (3, 6, 8):
            reader.rate(4096, 2, 3 * 4096)
            assert bytes(reader._ring.memory).count(b"x") == pages * 4096
        reader.close()

    def test_every_setting_is_measured(self, direct_folder: Path) -> None:
        for name in "ab":
            (direct_folder / name).write_bytes(bytes(MIB))
        rates = measure_reads([direct_folder / "a", direct_folder / "b"], MIB, rounds=1, threads=(1, 2))
        assert set(rates.by_setting) == {(block, n) for block in disk.BLOCKS for n in (1, 2)}
        assert min(rates.by_setting.values()) > 0

    def test_write_leaves_nothing_behind(self, direct_folder: Path) -> None:
        assert measure_write(direct_folder, 16 * MIB) > 0
        assert list(direct_folder.iterdir()) == []

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="nothing: cannot be read with O_DIRECT"):
            RawReader.open([tmp_path / "nothing"])
        with pytest.raises(UsageError, match="no files to read"):
            RawReader.open([])

    def test_finds_blobs_before_other_files(self, tmp_path: Path) -> None:
        (tmp_path / "large").write_bytes(bytes(MIB))
        assert blob_files(tmp_path) == [tmp_path / "large"]
        blob = tmp_path / "experts/layer_00/expert_000.fp16"
        blob.parent.mkdir(parents=True)
        blob.write_bytes(b"")
        assert blob_files(tmp_path) == [blob]

    def test_memory_for_reads_is_page_aligned(self) -> None:
        import ctypes

        view = page_aligned(8192)
        assert ctypes.addressof(ctypes.c_char.from_buffer(view)) % 4096 == 0
        assert len(view) == 8192


class TestVerdicts:
    OPTIONS = LimitOptions(slots=4, tokens=3)

    def verdict(self, code: int = 0, hits: int = 0, kills: int = 0, tokens: int = 3, stderr: str = "") -> Verdict:
        ids = list(range(tokens))
        return Verdict(code, f'{{"token_ids": {ids}}}\n', stderr, 1_000_000, 900_000, hits, kills)

    def test_enough(self) -> None:
        assert check_enough(self.verdict(), self.OPTIONS)["token_ids"] == [0, 1, 2]

    @pytest.mark.parametrize("wrong", [{"hits": 1}, {"kills": 1}, {"tokens": 2}, {"code": 137}])
    def test_not_enough(self, wrong: dict[str, int]) -> None:
        with pytest.raises(EdgeError, match=r"the limit was met|ended with exit code 137"):
            check_enough(self.verdict(**wrong), self.OPTIONS)  # type: ignore[arg-type]

    def test_refusal_needs_the_sum_and_the_code(self) -> None:
        check_refused(self.verdict(code=2, stderr="edge: error: this run needs experts 1 + ... = 2 MB"))
        for wrong in (self.verdict(code=1, stderr="this run needs"), self.verdict(code=2, stderr="something else")):
            with pytest.raises(EdgeError, match="expected a refusal with exit code 2"):
                check_refused(wrong)

    def test_group_without_rights_says_so(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("bench.cgroup._parent", lambda: (True, tmp_path / "missing"))
        with pytest.raises(EdgeError, match="a memory control group needs root"):
            MemoryGroup(1 << 20)
