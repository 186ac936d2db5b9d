"""Streams of decoded text: equal to decoding at once, whole characters, no part of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.stream import StopStrings, StreamDecoder
from runtime.text import Tokenizer
from tests.unit.tokenizer_samples import SAMPLES, bundle_files, byte_level, sentencepiece


def load(name: str) -> Tokenizer:
    tokenizer = Tokenizer.from_files(bundle_files(SAMPLES[name]()))
    assert tokenizer is not None
    return tokenizer


LOADED = {name: load(name) for name in SAMPLES}


def pieces_of(decoder: StreamDecoder, ids: list[int]) -> list[str]:
    return [*(decoder.push(i) for i in ids), decoder.finish()]


def ids_of(name: str) -> st.SearchStrategy[list[int]]:
    """Any ids at all, special ones and ids beyond the tokenizer included."""
    return st.lists(st.integers(0, SAMPLES[name]().get_vocab_size() + 3), max_size=40)


@pytest.mark.parametrize("name", SAMPLES)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_stream_equals_decoding_at_once(name: str, data: st.DataObject) -> None:
    ids = data.draw(ids_of(name))
    decoder = LOADED[name].stream()
    assert "".join(pieces_of(decoder, ids)) == LOADED[name].decode(ids) == decoder.text


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="aü你🎉 t\n", max_size=30), name=st.sampled_from(["byte-level", "sentencepiece"]))
def test_valid_text_never_shows_a_broken_character(text: str, name: str) -> None:
    ids = LOADED[name].encode(text)
    assert all("\ufffd" not in piece for piece in pieces_of(LOADED[name].stream(), ids))


def test_a_character_of_four_tokens_appears_once_it_is_whole() -> None:
    bytes_of_party = [byte_level().token_to_id(t) for t in ("ð", "Ł", "İ", "ī")]  # F0 9F 8E 89
    assert pieces_of(LOADED["byte-level"].stream(), bytes_of_party) == ["", "", "", "🎉", ""]


def test_wrong_bytes_are_marked_and_do_not_hold_the_text_back() -> None:
    wrong, a = byte_level().token_to_id("ÿ"), byte_level().token_to_id("a")
    # A lone FF can be told to be wrong only when the next byte is there (it might have begun something).
    assert pieces_of(LOADED["byte-level"].stream(), [wrong, wrong, wrong, a]) == ["", "\ufffd", "\ufffd", "\ufffda", ""]


def test_a_run_of_byte_tokens_is_decided_as_a_whole() -> None:
    def byte(value: int) -> int:
        found = sentencepiece().token_to_id(f"<0x{value:02X}>")
        assert isinstance(found, int)
        return found

    the, special = sentencepiece().token_to_id("▁the"), sentencepiece().token_to_id("<|im_start|>")
    stream = LOADED["sentencepiece"].stream
    assert pieces_of(stream(), [byte(0xC3), byte(0xBC), the]) == ["", "", "ü the", ""]
    # A special token is no part of the text, so the run goes on behind it.
    assert pieces_of(stream(), [byte(0xC3), special, byte(0xBC)]) == ["", "", "", "ü"]
    # The third byte makes the whole run wrong: three marks, as decoding at once gives.
    assert pieces_of(stream(), [byte(0xC3), byte(0xBC), byte(0xFF)]) == ["", "", "", "\ufffd" * 3]


def test_leading_space_is_cut_once_and_not_at_every_token() -> None:
    the, special = sentencepiece().token_to_id("▁the"), sentencepiece().token_to_id("<s>")
    assert pieces_of(LOADED["sentencepiece"].stream(), [special, the, special, the]) == ["", "the", "", " the", ""]


def expected_until_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: letter by letter, the first moment at which the text ends with a stop string (the longest)."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_do_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    text, should_stop = expected_until_stop("".join(pieces), stops)
    stream, out, stopped = StopStrings(stops), "", False
    for piece in pieces:
        fresh, stopped = stream.feed(piece)
        out += fresh
        assert text.startswith(out)  # nothing is ever shown that must be taken back
        if stopped:
            break
    assert (out if stopped else out + stream.flush()) == text
    assert stopped == should_stop


@settings(max_examples=200, deadline=None)
@given(data=st.data(), name=st.sampled_from(list(SAMPLES)))
def test_stream_with_stop_strings_equals_cutting_afterwards(data: st.DataObject, name: str) -> None:
    ids = data.draw(ids_of(name))
    stops = data.draw(st.lists(st.text(alphabet="thea. \ufffd", min_size=1, max_size=3), max_size=2))
    expected, _ = expected_until_stop(LOADED[name].decode(ids), stops)
    assert "".join(pieces_of(LOADED[name].stream(stops), ids)) == expected


def test_text_is_held_only_while_a_stop_string_is_possible() -> None:
    stream = StopStrings(["END"])
    assert stream.feed("a E") == ("a ", False)
    assert stream.feed("N") == ("", False)
    assert stream.feed("X") == ("ENX", False)
    assert stream.feed("EEND") == ("E", True)


def test_a_stop_string_may_name_a_special_token() -> None:
    tokenizer = LOADED["byte-level"]
    a, end = byte_level().token_to_id("a"), byte_level().token_to_id("<|im_end|>")
    decoder = tokenizer.stream(["<|im_end|>"])
    assert [decoder.push(a), decoder.push(end), decoder.push(a), decoder.finish()] == ["a", "", "", ""]
    assert decoder.stopped
    assert decoder.text == "a"
