"""The tokenizer of a bundle and its chat template."""

from __future__ import annotations

import pytest

from runtime import chat_template
from runtime.chat_template import render
from runtime.errors import BundleError, UsageError
from runtime.text import Tokenizer
from tests.unit.tokenizer_samples import bundle_files, byte_level, sentencepiece

MESSAGES = [{"role": "user", "content": "the dog"}]


def make(**changes: bytes | None) -> Tokenizer:
    files = {**bundle_files(byte_level()), **{k.replace("__", "."): v for k, v in changes.items()}}
    tokenizer = Tokenizer.from_files({name: data for name, data in files.items() if data is not None})
    assert tokenizer is not None
    return tokenizer


def test_a_bundle_without_tokenizer_has_none() -> None:
    assert Tokenizer.from_files({}) is None


def test_prompts_get_the_special_tokens_of_the_model_and_conversations_do_not() -> None:
    tokenizer = Tokenizer.from_files(bundle_files(sentencepiece(), template="{{ bos_token }}{{ messages[0].content }}"))
    assert tokenizer is not None
    begin = sentencepiece().token_to_id("<s>")
    assert tokenizer.encode("the")[0] == begin
    assert tokenizer.apply_chat(MESSAGES).count(begin) == 1


def test_a_begin_token_that_only_the_settings_ask_for_is_added_once() -> None:
    settings = b'{"bos_token": "<s>", "add_bos_token": true}'
    begin = byte_level().token_to_id("<s>")
    assert make(tokenizer_config__json=settings).encode("the") == [begin, *byte_level().encode("the").ids]
    both = Tokenizer.from_files(bundle_files(sentencepiece()) | {"tokenizer_config.json": settings})
    assert both is not None
    assert both.encode("the").count(sentencepiece().token_to_id("<s>")) == 1


def test_generation_defaults_are_handed_on() -> None:
    assert make(generation_config__json=b'{"temperature": 0.6}').generation_defaults == {"temperature": 0.6}
    assert make(generation_config__json=None).generation_defaults == {}


def test_truncation_left_in_the_file_does_not_cut_prompts() -> None:
    from tokenizers import Tokenizer as Library

    library = Library.from_str(byte_level().to_str())
    library.enable_truncation(2)
    library.enable_padding(length=50)
    tokenizer = make(tokenizer__json=library.to_str().encode())
    assert tokenizer.encode("a longer text") == byte_level().encode("a longer text").ids


def test_chat_template_equals_transformers() -> None:
    from transformers import PreTrainedTokenizerFast

    template = (
        "{{ bos_token }}{%- for m in messages %}\n    {%- if loop.first and m.role != 'system' %}\nhi\n    {% endif %}"
        "\n<|im_start|>{{ m['role'] }} {{ m | tojson }} {{ {'a': 'ü<'} | tojson(indent=2) }}{% if loop.index > 5 %}"
        "{% break %}{% endif %}\n{% generation %}{{ m.content | trim }}{% endgeneration %}<|im_end|>\n{% endfor %}"
    )
    reference = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="<|im_end|>")
    messages = [{"role": "user", "content": f" the {n} "} for n in range(8)]
    expected = reference.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=False)
    tokenizer = Tokenizer.from_files(bundle_files(byte_level(), template))
    assert tokenizer is not None
    assert tokenizer.apply_chat(messages, add_generation_prompt=False) == expected


def test_template_sources_in_their_order() -> None:
    named = b'{"chat_template": [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]}'
    assert make(tokenizer_config__json=named).apply_chat(MESSAGES) == byte_level().encode("D").ids
    own = make(tokenizer_config__json=named, chat_template__jinja=b"F")
    assert own.apply_chat(MESSAGES) == byte_level().encode("F").ids
    assert not make(tokenizer_config__json=b"{}").has_chat_template
    with pytest.raises(UsageError, match="no chat template"):
        make(tokenizer_config__json=b"{}").apply_chat(MESSAGES)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected identifier|expected|Expected"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{% include 'x' %}", "no loader"),
        ("{{ 'x' * 10 ** 10 }}", "512 MiB of memory"),
        ("{% for i in range(90000) %}{{ 'x' * 100 }}{% endfor %}", "more than 4194304 characters"),
        ("x" * (1 << 20) + "x", "more than the 1048576 allowed"),
    ],
)
def test_bad_templates_are_refused_with_their_reason(template: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"(?s)chat template failed: .*({reason})"):
        render(template, {"messages": []})


def test_an_endless_template_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "PROCESSOR_S", 1)
    loops = "".join(f"{{% for i{n} in range(90000) %}}" for n in range(4)) + "{% endfor %}" * 4
    with pytest.raises(UsageError, match="1 s of processor time"):
        render(loops, {})


def test_the_date_can_be_asked_for() -> None:
    assert render("{{ strftime_now('%Y') | length }}", {}) == "4"


def test_a_prompt_that_is_no_utf8_is_refused() -> None:
    with pytest.raises(UsageError, match="not valid UTF-8 at character 1"):
        make().encode("a\udcff")


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("tokenizer.json", b"{}", "cannot read it"),
        ("tokenizer.json", b"\xff", "cannot read it"),
        ("tokenizer_config.json", b"[1]", "expected an object, found list"),
        ("generation_config.json", b"{", "not valid JSON"),
        ("special_tokens_map.json", b"[" * 100_000, "not valid JSON"),
        ("chat_template.jinja", b"\xff", "not valid UTF-8"),
    ],
)
def test_damaged_files_are_named(name: str, data: bytes, reason: str) -> None:
    with pytest.raises(BundleError, match=f"tokenizer/{name}: .*{reason}"):
        Tokenizer.from_files(bundle_files(byte_level()) | {name: data})
