"""edge report: reductions with intervals that can be checked by hand, and pages that hold everything themselves."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edge.cli import main
from profiles.compare import compare, differences, reduction
from profiles.experts import expert_use
from profiles.report.page import build_page, run_names
from profiles.rundir import Request, Run, RunWriter, load_run
from profiles.summary import summarize
from profiles.telemetry.reading import Power, Reading
from profiles.telemetry.source import Sample
from runtime.errors import UsageError
from runtime.records import TokenRecord

MS = 1_000_000
STEP_MS = 500  # a token every half second


def record(index: int, time_ns: int, total_ms: float, misses: int) -> TokenRecord:
    """A token of a model with two layers and three experts each; every miss reads 1 MB and waits 1 ms."""
    layers = [misses // 2, misses - misses // 2]
    return TokenRecord(
        index=index, token_id=5, time_ns=time_ns, total_ms=total_ms, dense_ms=total_ms - misses, routing_ms=0.0,
        wait_ms=float(misses), expert_ms=0.0, other_ms=0.0, hits=[3 - n for n in layers], misses=layers,
        bytes=misses * 1_000_000, read_ms=0.0, queue_ms=0.0, read_busy_ms=0.0, evictions=0, minor_faults=0,
        major_faults=0,
    )  # fmt: skip


def make_run(
    folder: Path, tpots: Sequence[float], misses: int = 2, tokens: int = 5, ids: Sequence[str] | None = None,
    watts: float | None = 10.0, sha256: str = "same", router: str = "base",
) -> Run:  # fmt: skip
    """One request per value of `tpots`, whose decoded tokens all take that long."""
    header = {
        "format": 1, "bundle": "/b.bundle", "requests": len(tpots), "start_time": "2026-11-23T12:00:00Z",
        "workload": {"name": "w", "source": "s", "licence": "l", "sha256": sha256, "prompts": [], "chat": False},
        "protocol": {"name": "default", "prompts": len(tpots), "new_tokens": tokens, "cache": "warm"},
        "engine": {"model": "m", "backend": "torch", "dtype": "fp16", "slots_per_layer": 4, "router": router},
        "machine": {"device": "Testboard", "power_mode": None, "command": ["edge", "profile"], "versions": {}},
    }  # fmt: skip
    requests, at = [], 1000
    for index, tpot in enumerate(tpots):
        name = ids[index] if ids else f"p{index}"
        request = Request(index, name, 7, 0, at * MS)
        for place in range(tokens):
            at += STEP_MS
            request.records.append(record(place, at * MS, tpot, misses))
        request.finish_reason = "length"
        requests.append(request)
    power = {} if watts is None else {"VDD_IN": Power(watts * 1000)}
    reading = Reading(power_mw=power, temperatures_c={"cpu": 50.0}, ram_used_mib=4096, gr3d_mhz=(918,), cpu_mhz=(1984,))
    samples = [Sample(t * MS, reading) for t in range(0, at + 1000, 200)]
    return Run(folder, header, requests, samples, {"complete": True, "telemetry_problems": []})


def test_a_reduction_that_is_the_same_everywhere_is_certain(tmp_path: Path) -> None:
    base = make_run(tmp_path / "a", [100, 200, 300, 400, 500], misses=4)
    other = make_run(tmp_path / "b", [50, 100, 150, 200, 250], misses=1)
    found = compare(base, other)
    assert (found["tpot_ms"].base, found["tpot_ms"].other) == (300, 150)
    for name, value in (("tpot_ms", 0.5), ("misses", 0.75), ("bytes", 0.75)):
        assert (found[name].reduction, found[name].low, found[name].high) == (value, value, value)
    # 10 W over the four half seconds from the first token to the last: 20 J for 4 tokens, in both runs.
    assert (found["joules"].base, found["joules"].reduction) == (pytest.approx(5.0), pytest.approx(0.0))
    assert found["tpot_ms"].paired and found["tpot_ms"].prompts == 5


def test_pairs_are_surer_than_strangers(tmp_path: Path) -> None:
    """The prompts differ far more than the runs do: only pairs show that every prompt became 10 % faster."""
    times = [100.0, 200, 300, 400, 500, 600]
    base, other = make_run(tmp_path / "a", times), make_run(tmp_path / "b", [0.9 * t for t in times])
    paired = compare(base, other)["tpot_ms"]
    assert paired.low == pytest.approx(0.1) and paired.high == pytest.approx(0.1)
    stranger = make_run(tmp_path / "c", [0.9 * t for t in times], sha256="another")
    found = compare(base, stranger)["tpot_ms"]
    assert found.reduction == pytest.approx(0.1) and not found.paired
    assert found.low is not None and found.high is not None
    assert found.low < 0 < 0.2 < found.high
    assert compare(base, stranger) == compare(base, stranger)  # drawn with a seed


def test_what_does_not_count(tmp_path: Path) -> None:
    base, other = make_run(tmp_path / "a", [100] * 6), make_run(tmp_path / "b", [50] * 5 + [900])
    other.requests[5].finish_reason = "interrupted"
    found = compare(base, other)["tpot_ms"]
    assert (found.prompts, found.reduction) == (5, 0.5)
    few = compare(make_run(tmp_path / "a", [100] * 4), make_run(tmp_path / "b", [50] * 4))["tpot_ms"]
    assert (few.reduction, few.low, few.why) == (
        0.5,
        None,
        "4 prompts are too few for an interval, at least 5 are needed",
    )
    dark = compare(base, make_run(tmp_path / "b", [50] * 6, watts=None))["joules"]
    assert (dark.reduction, dark.why) == (None, "not measured in both runs")
    perfect = compare(make_run(tmp_path / "a", [100] * 6, misses=0), base)["misses"]
    assert (perfect.reduction, perfect.why) == (None, "there is nothing to reduce")


def test_repeats_of_a_prompt_are_one_draw(tmp_path: Path) -> None:
    ids = ["a", "b", "c", "d", "e"] * 2
    base = make_run(tmp_path / "a", [100] * 10, ids=ids)
    other = make_run(tmp_path / "b", [50] * 5 + [100] * 5, ids=ids)
    found = reduction(base, other, lambda _, request: sum(r.total_ms for r in request.decode))
    assert (found.prompts, found.reduction, found.low, found.high) == (5, 0.25, 0.25, 0.25)


def test_what_differs(tmp_path: Path) -> None:
    base = make_run(tmp_path / "a", [100])
    assert differences(base, make_run(tmp_path / "b", [50])) == []
    assert differences(base, make_run(tmp_path / "b", [50], router="tuned")) == [("router", "base", "tuned")]


class Checker(HTMLParser):
    """Open elements, ids, and whatever would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href"):
                self.links.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    local = [link for link in checker.links if link.startswith(("#", "data:image/png;base64,"))]
    assert local == checker.links
    assert {link[1:] for link in local if link.startswith("#")} <= set(checker.ids)
    assert re.findall(r"url\((?!#)", page) == []
    assert "script" not in checker.tags
    return checker


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_the_page_of_one_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [100.0, 200], ids=["<script>alert(1)</script>", "b"])
    page = build_page([run])
    check(page)
    assert headings(page) == [
        "TPOT over the answer", "Where the time goes", "Distribution of TPOT", "Hit rate per layer", "Bytes per token",
        "Misses by layer and place", "Tokens and machine on one time axis", "Answers",
    ]  # fmt: skip
    assert "&lt;script&gt;alert(1)" in page
    for label in ("power, W", "hottest, °C", "RAM used, GiB", "clock, MHz"):
        assert label in page
    assert "load, %" not in page  # nothing was told about loads
    assert "<b>150 ms</b>" in page and "<b>66.7 %</b>" in page and "<b>5.00 J</b>" in page
    assert "no Jetson board: the times say nothing about a board" in page


def with_experts(run: Run) -> Run:
    """Layer 0 always asks for expert 0; layer 1 takes turns between 1 and 2, with a slot for one of them only."""
    for request in run.requests:
        for token in request.records:
            other = 1 + token.index % 2
            ids = [[0], [other]] if token.index else [[0], [1, 2]]
            missed = [[], [other]] if token.index else ids
            at = request.records.index(token)
            request.records[at] = dataclasses.replace(token, experts=ids, missed=missed)
    run.header["shape"] = {"experts": 4}
    return run


def test_experts_that_come_back_are_counted(tmp_path: Path) -> None:
    use = expert_use(with_experts(make_run(tmp_path / "a", [100.0, 100], tokens=6)))
    assert use is not None and use.tokens == 10
    # Decoded tokens at places 1 to 5: expert 2 at 1, 3, 5 and expert 1 at 2, 4, all used by the prompt.
    assert use.asked.tolist() == [[10, 0, 0, 0], [0, 4, 6, 0]]
    assert use.read.tolist() == use.read_again.tolist() == [[0, 0, 0, 0], [0, 4, 6, 0]]
    assert expert_use(make_run(tmp_path / "b", [100.0])) is None  # records of an older release


def test_an_expert_that_is_read_for_the_first_time_is_not_read_again(tmp_path: Path) -> None:
    run = with_experts(make_run(tmp_path / "a", [100.0], tokens=4))
    prefill = run.requests[0].records[0]
    run.requests[0].records[0] = dataclasses.replace(prefill, experts=[[0], [3]], missed=[[0], [3]])
    use = expert_use(run)
    assert use is not None
    assert use.read.tolist()[1] == [0, 1, 2, 0]
    assert use.read_again.tolist()[1] == [0, 0, 1, 0]  # 2, then 1 for the first time each, then 2 again


def test_the_expert_map_is_on_the_page(tmp_path: Path) -> None:
    runs = [with_experts(make_run(tmp_path / name, [100.0, 200])) for name in ("a", "b")]
    page = build_page(runs[:1], png=tmp_path / "figures")
    check(page)
    assert "Experts by layer" in headings(page) and (tmp_path / "figures/experts.png").exists()
    page = build_page(runs)
    check(page)
    assert [text for text in headings(page) if "Experts" in text] == ["Experts by layer of a", "Experts by layer of b"]


def test_warnings_before_the_figures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [100.0], tokens=2)
    run.header["protocol"]["name"] = "remoe, changed: prompts=1"
    run.summary = {"complete": False, "telemetry_problems": ["tegrastats: ended by itself"]}
    page = build_page([run])
    for text in (
        "interrupted after 1 of 1", "remoe, changed: prompts=1", "tegrastats: ended by itself",
        "1 answers took less than three updates",
    ):  # fmt: skip
        assert text in page
    run.summary = None
    run.header["machine"]["device"] = "NVIDIA Jetson Orin NX"
    page = build_page([run])
    assert "This run was cut off" in page and "no Jetson board" not in page


def test_the_page_of_a_comparison(tmp_path: Path) -> None:
    base = make_run(tmp_path / "stock", [100.0, 110, 120, 130, 140], misses=4)
    tuned = make_run(tmp_path / "tuned", [80.0, 88, 96, 104, 112], misses=2, router="tuned")
    page = build_page([base, tuned], png=tmp_path / "figures")
    check(page)
    assert headings(page)[:2] == ["tuned against stock", "What differs"]
    cells = re.findall(r"<tr><td>TPOT</td>(.*?)</tr>", page)[0]
    assert re.findall(r"<td>(.*?)</td>", cells) == ["120 ms", "96.0 ms", "20.0 %", "20.0 to 20.0 %"]
    assert "<tr><td>router</td><td>base</td><td>tuned</td></tr>" in page
    drawn = sorted(p.name for p in (tmp_path / "figures").iterdir())
    assert drawn == ["bytes.png", "distribution.png", "hits.png", "parts.png", "tpot.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "figures").iterdir())


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one" / "gsm8k", [1.0]), make_run(tmp_path / "two" / "gsm8k", [1.0])]
    assert run_names(runs) == ["one/gsm8k", "two/gsm8k"]
    assert run_names(runs[:1]) == ["gsm8k"]


def write_run(run: Run) -> None:
    """As edge profile would have written it."""
    writer = RunWriter(run.path)
    writer.header(run.header)
    for sample in run.samples:
        writer.sample(sample)
    for request in run.requests:
        writer.begin(request)
        for token in request.records:
            writer.token(request.index, token)
        writer.end(request.index, str(request.finish_reason), "")
    if run.summary is not None:
        writer.summary({**run.summary, **summarize(run)})
    writer.close()


def test_every_token_is_on_disk_at_once(tmp_path: Path) -> None:
    """Tokens once waited in a buffer until their answer was complete: a run that was killed in its first had none."""
    run = make_run(tmp_path / "a", [100.0])
    writer = RunWriter(run.path)
    writer.header(run.header)
    writer.begin(run.requests[0])
    for token in run.requests[0].records[:2]:
        writer.token(0, token)
    writer.sample(run.samples[0])
    found = load_run(run.path)  # the writer is still open
    writer.close()
    assert found.requests[0].records == run.requests[0].records[:2]
    assert (found.requests[0].complete, found.samples, found.summary) == (False, run.samples[:1], None)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, factor in (("a", 1.0), ("b", 0.7)):
        write_run(make_run(tmp_path / name, [factor * t for t in (100, 120, 140, 160, 180)]))
    assert main(["report", str(tmp_path / "a")]) == 0
    check((tmp_path / "a" / "report.html").read_text())
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["against_first"]["b"]["tpot_ms"]["reduction"] == pytest.approx(0.3)
    assert found["summaries"]["a"]["tpot_ms"]["median"] == 140
    check((tmp_path / "b" / "comparison.html").read_text())


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    empty = make_run(tmp_path / "empty", [100.0], tokens=1)
    write_run(empty)
    write_run(make_run(tmp_path / "good", [100.0]))
    (tmp_path / "foreign").mkdir()
    for words, message in (
        (["none"], "none is no run of edge profile: run.json: No such file"),
        (["foreign"], "foreign is no run of edge profile"),
        (["empty"], "empty: no token was decoded in this run: there is nothing to report"),
        (["good", "--out", "/nowhere/r.html"], "/nowhere/r.html: No such file"),
    ):
        assert main(["report", str(tmp_path / words[0]), *words[1:]]) == 2
        error = capsys.readouterr().err
        assert error.count("edge: error:") == 1 and message in error
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r'needs matplotlib: pip install "remoe-edge\[bench\]"'):
        build_page([make_run(tmp_path / "x", [100.0])])
