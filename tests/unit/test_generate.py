"""edge generate and edge chat on small real bundles: prompts, output, Ctrl-C, records, errors."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge import answer, chat, report
from edge.chat import model_defaults
from edge.cli import main
from edge.options import EngineOptions, GenerateOptions
from runtime.engine import Engine
from runtime.sampler import Sampler
from tests.checkpoints import make_checkpoint

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """ "text": a bundle with tokenizer and chat template, "plain": without template, "ids": without tokenizer."""
    folder = tmp_path_factory.mktemp("bundles")
    made = {}
    for name in ("text", "plain", "ids"):
        sizes = {"num_hidden_layers": 2, "vocab_size": 300}
        checkpoint = make_checkpoint(folder / name, "qwen2_moe", tokenizer=name != "ids", **sizes)
        if name == "text":
            (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
        if name == "plain":
            settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
            del settings["chat_template"]
            (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
        made[name] = str(folder / f"{name}.bundle")
        assert main(["export", str(checkpoint), made[name], "--graphs", "none"]) == 0
    return made


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        found = json.loads(self.out.splitlines()[-1])
        assert isinstance(found, dict)
        return found


Run = Callable[..., Outcome]


@pytest.fixture
def edge(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(*words: str, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        code = main([*words, "--threads", "1"])
        return Outcome(code, *capsys.readouterr())

    return run


def test_the_answer_is_on_stdout_and_one_table_on_stderr(edge: Run, bundles: dict[str, str]) -> None:
    with Engine.open(bundles["text"], EngineOptions(threads=1)) as engine:
        expected = "".join(t.text for t in engine.generate("hello", GenerateOptions(max_new_tokens=9, ignore_eos=True)))
    done = edge("generate", bundles["text"], "--prompt", "hello", "--max-new-tokens", "9", "--ignore-eos")
    assert (done.code, done.out) == (0, expected if expected.endswith("\n") else expected + "\n")
    rows = [line.split()[0] for line in done.err.splitlines() if not line.startswith("edge:")]
    assert rows == ["tokens", "TTFT", "TPOT", "speed", "hit", "read", "memory"]
    assert "5 read, 9 written (length)" in done.err


def test_json_is_the_only_thing_on_stdout(edge: Run, bundles: dict[str, str]) -> None:
    done = edge("generate", bundles["text"], "--prompt", "hello", "--max-new-tokens", "4", "--ignore-eos", "--json")
    assert len(done.out.splitlines()) == 1
    promised = "token_ids text ttft_ms tpot_ms tokens_per_s hit_rate expert_bytes_per_token read_bytes_per_s"
    assert {*promised.split(), "peak_rss_bytes", "expert_budget_bytes"} <= set(done.json)
    assert set(done.json["tpot_ms"]) == {"median", "p95", "mean"}
    assert len(done.json["token_ids"]) == 4


def test_every_source_of_a_prompt_gives_the_same_answer(edge: Run, bundles: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Grüße\n")
    with Engine.open(bundles["text"]) as engine:
        ids = ",".join(map(str, engine.encode("Grüße")))
    sources: list[tuple[list[str], bytes]] = [
        (["--prompt", "Grüße"], b""),
        (["--prompt-file", str(file)], b""),
        (["--prompt-file", "-"], "Grüße\n".encode()),
        (["--prompt", "-"], "Grüße".encode()),
        ([], "Grüße\n".encode()),
        (["--prompt-ids", ids], b""),
    ]
    options = ["--max-new-tokens", "5", "--json"]
    found = [edge("generate", bundles["text"], *words, *options, stdin=data) for words, data in sources]
    assert [done.code for done in found] == [0] * len(sources)
    assert len({tuple(done.json["token_ids"]) for done in found}) == 1


def test_a_bundle_without_tokenizer_prints_ids_that_can_be_given_back(edge: Run, bundles: dict[str, str]) -> None:
    done = edge("generate", bundles["ids"], "--prompt-ids", "5 6,7", "--max-new-tokens", "6", "--ignore-eos")
    again = edge("generate", bundles["ids"], "--prompt-ids", "5,6,7", "--max-new-tokens", "6", "--ignore-eos", "--json")
    assert [int(i) for i in done.out.strip().split(",")] == again.json["token_ids"]
    assert again.json["text"] == ""


def test_sampling_options_reach_the_sampler(edge: Run, bundles: dict[str, str]) -> None:
    def ids(*words: str) -> list[int]:
        options = ["--prompt", "x", "--max-new-tokens", "12", "--ignore-eos", "--json"]
        found = edge("generate", bundles["text"], *options, *words).json["token_ids"]
        assert isinstance(found, list)
        return found

    greedy, hot = ids(), ids("--temperature", "5", "--seed", "1")
    assert hot == ids("--temperature", "5", "--seed", "1")
    assert hot != ids("--temperature", "5", "--seed", "2")
    assert hot != greedy
    assert ids("--temperature", "5", "--top-k", "1") == greedy
    assert ids("--temperature", "5", "--top-p", "1e-9") == greedy
    assert ids("--repetition-penalty", "1e6") != greedy or len(set(greedy)) == len(greedy)


def test_the_conversation_goes_through_the_template(edge: Run, bundles: dict[str, str]) -> None:
    options = ["--max-new-tokens", "3", "--json"]
    chatted = edge("generate", bundles["text"], "--chat", "--system", "S", "--prompt", "hi", *options)
    plain = edge("generate", bundles["text"], "--prompt", "system: S\nuser: hi\nanswer:", *options)
    assert chatted.json["token_ids"] == plain.json["token_ids"]
    assert chatted.json["prompt_tokens"] == plain.json["prompt_tokens"]


def test_stop_text_ends_the_answer_before_it(edge: Run, bundles: dict[str, str]) -> None:
    options = ["--prompt", "hello", "--max-new-tokens", "30", "--ignore-eos", "--json"]
    whole = edge("generate", bundles["text"], *options).json["text"]
    stop = next(whole[i : i + 2] for i in range(3, len(whole)) if "\ufffd" not in whole[i : i + 2])
    done = edge("generate", bundles["text"], *options, "--stop", stop, "--stop", "never in there")
    assert done.json["text"] == whole[: whole.index(stop)]
    assert done.json["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt-ids", "1,2,x"], "argument --prompt-ids: '1,2,x' is not a list of token ids"),
        (["--prompt-ids", "1,9999"], "token id 9999 is not in the vocabulary of 300"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt-file", "/nowhere/x"], "--prompt-file /nowhere/x: No such file"),
        (["--prompt", "x", "--system", "y"], "--system needs --chat"),
        (["--prompt-ids", "1", "--chat"], "--chat needs a text"),
        (["--prompt", "x", "--temperature", "nan"], "temperature is nan, it must be"),
        (["--prompt", "x", "--top-p", "0"], "top_p is 0.0, it must be"),
        (["--prompt", "x", "--stop", ""], "--stop ''"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--prompt", "x", "--max-new-tokens", "999"], "need a context of 1000"),
        (["--prompt", "x", "--slots-per-layer", "1"], "1 slots per layer cannot hold the top 3 experts"),
        (["--prompt", "x", "--backend", "tensorrt"], "TensorRT"),
        (["--prompt", "x", "--router", "none"], "router"),
        (["--prompt", "x", "--record", "/nowhere/r.jsonl"], "--record /nowhere/r.jsonl: No such file"),
    ],
)
def test_what_cannot_be_exits_2_with_one_error(
    words: list[str], message: str, edge: Run, bundles: dict[str, str]
) -> None:
    done = edge("generate", bundles["text"], *words)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("edge: error:") == 1


def test_prompts_that_are_no_text(edge: Run, bundles: dict[str, str]) -> None:
    done = edge("generate", bundles["text"], stdin=b"abc\xff")
    assert (done.code, "stdin: not UTF-8 text (byte 3 is 0xff)" in done.err) == (2, True)
    done = edge("generate", bundles["ids"], "--prompt", "x")
    assert (done.code, "has no tokenizer" in done.err) == (2, True)
    done = edge("generate", bundles["plain"], "--prompt", "x", "--chat")
    assert (done.code, "no chat template" in done.err) == (2, True)


def press_ctrl_c(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ctrl_c_ends_after_the_token_in_work(
    edge: Run, bundles: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = answer.Printer.show
    seen: list[int] = []

    def show_and_press(self: answer.Printer, text: str, token_id: int) -> None:
        show(self, text, token_id)
        seen.append(token_id)
        if len(seen) == 3:
            press_ctrl_c()

    monkeypatch.setattr(answer.Printer, "show", show_and_press)
    record = tmp_path / "r.jsonl"
    before = signal.getsignal(signal.SIGINT)
    done = edge("generate", bundles["text"], "--prompt", "x", "--ignore-eos", "--record", str(record), "--json")
    assert done.code == 130
    assert len(done.json["token_ids"]) == 3
    assert done.json["finish_reason"] == "interrupted"
    assert "(interrupted)" in done.err
    assert [line["type"] for line in lines_of(record)] == ["run", "prefill", "token", "token", "end"]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_the_prompt_is_read_ends_at_once(
    edge: Run, bundles: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampler, "choose", press_ctrl_c)  # the first token is not chosen before the prompt is read
    record = tmp_path / "r.jsonl"
    done = edge("generate", bundles["text"], "--prompt", "x", "--record", str(record))
    assert (done.code, done.out) == (130, "")
    assert "0 written (interrupted)" in done.err
    assert "Traceback" not in done.err
    kinds = [line["type"] for line in lines_of(record)]
    assert (kinds[0], kinds[-1]) == ("run", "end")


def test_chat_remembers_and_resets(edge: Run, bundles: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    conversations: list[list[dict[str, str]]] = []

    class Spy(chat.Conversation):
        def _answer(self, line: str) -> None:
            super()._answer(line)
            conversations.append([dict(m) for m in self._messages])

    monkeypatch.setattr(chat, "Conversation", Spy)
    lines = b"one\n\n/stats\ntwo\n/reset\nthree\n/what\n/exit\nnever read\n"
    done = edge("chat", bundles["text"], "--system", "S", "--max-new-tokens", "4", "--seed", "3", stdin=lines)
    assert done.code == 0
    users = [[m["content"] for m in messages if m["role"] == "user"] for messages in conversations]
    assert users == [["one"], ["one", "two"], ["three"]]
    assert all(messages[0] == {"role": "system", "content": "S"} for messages in conversations)
    answers = [messages[-1]["content"] for messages in conversations]
    assert done.out == "".join(a if a.endswith("\n") or not a else a + "\n" for a in answers)
    assert "TPOT" in done.err
    assert "unknown command /what" in done.err


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(
    edge: Run, bundles: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    show = answer.Printer.show
    tokens: list[int] = []

    def show_and_press(self: answer.Printer, text: str, token_id: int) -> None:
        show(self, text, token_id)
        tokens.append(token_id)
        if len(tokens) == 2:
            press_ctrl_c()

    monkeypatch.setattr(answer.Printer, "show", show_and_press)
    done = edge("chat", bundles["text"], "--max-new-tokens", "5", "--ignore-eos", stdin=b"one\ntwo\n")
    assert done.code == 0
    assert len(tokens) == 2 + 5


def test_a_conversation_that_outgrows_the_context_can_be_reset(edge: Run, bundles: dict[str, str]) -> None:
    lines = b"x" * 300 + b"\n/reset\nhi\n/stats\n"
    done = edge("chat", bundles["text"], "--max-new-tokens", "4", stdin=lines)
    assert done.code == 0
    assert "need a context of" in done.err
    assert "/reset starts a new conversation" in done.err
    assert "tokens    " in done.err  # the second answer has figures


def test_chat_needs_a_chat_template(edge: Run, bundles: dict[str, str]) -> None:
    for name, missing in (("plain", "chat template"), ("ids", "tokenizer")):
        done = edge("chat", bundles[name], stdin=b"hi\n")
        assert (done.code, f"has no {missing}" in done.err) == (2, True)


def test_the_models_own_defaults_count_only_where_it_is_meant_to_be_sampled() -> None:
    sampled = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": 2}
    assert model_defaults(sampled) == {"repetition_penalty": 1.05, "temperature": 0.7, "top_k": 20}
    assert model_defaults({"do_sample": True, "top_p": 0.9}) == {"temperature": 1.0, "top_p": 0.9}
    assert model_defaults({"temperature": 0.7}) == {}
    assert model_defaults({"do_sample": True, "temperature": "hot", "top_k": True}) == {}


def test_the_table_shows_a_dash_for_what_was_not_measured() -> None:
    unknown = {"ttft_ms", "tokens_per_s", "hit_rate", "expert_bytes_per_token", "read_bytes_per_s", "prefetched_share"}
    values: dict[str, Any] = dict.fromkeys(unknown)
    values |= {"tpot_ms": {}, "memory_plan_bytes": {"total_bytes": 2_500_000_000}, "peak_rss_bytes": 1_230_000_000}
    values |= {"mapped_code_bytes": 230_000_000, "prefetch": 0}
    values |= {"policy": "lru", "slots": 24, "expert_budget_bytes": 415_000_000, "direct_io": False}
    values |= {"prompt_tokens": 3, "token_ids": [], "finish_reason": "interrupted"}
    rows = dict(report.summary_rows(values))
    assert rows["TPOT"] == "median - ms, p95 - ms"
    assert rows["hit rate"] == "- % (lru, 24 experts in 415 MB)"
    assert rows["read"] == "- MB per token, - GB/s through the page cache"
    assert rows["memory"] == "peak 1000 MB of 2500 MB planned, and 230 MB of mapped code"
    assert "guesses" not in rows
    rows = dict(report.summary_rows(values | {"prefetch": 1, "prefetched_share": 0.274}))
    assert rows["guesses"] == "27.4 % of the misses were on their way when asked for"


def test_a_full_disk_under_the_record_names_the_file(bundles: dict[str, str], edge: Run) -> None:
    done = edge("generate", bundles["text"], "--prompt", "x", "--max-new-tokens", "2", "--record", "/dev/full")
    assert done.code == 1
    assert "--record /dev/full: No space left on device: the record ends before the run" in done.err
