"""Text to token ids and back: the tokenizer of a bundle, its chat template, and streams of decoded text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from runtime.chat_template import render
from runtime.errors import BundleError, UsageError
from runtime.stream import StreamDecoder

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer of a bundle. Special tokens are recognised in prompts and left out of decoded text."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        special: Mapping[str, str],
        template: str | None,
        defaults: Mapping[str, Any],
        begin: int | None,
    ) -> None:
        self.generation_defaults = dict(defaults)  # as the checkpoint has them, unchecked: the caller chooses
        self._begin = begin  # starts every prompt, whether or not tokenizer.json says so
        self._tokenizer = tokenizer
        self._special = dict(special)
        self._template = template
        self._silent_ids = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._byte_ids = _byte_ids(tokenizer)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes | memoryview]) -> Tokenizer | None:
        """Build from the contents of a bundle's tokenizer/ by file name; None without tokenizer.json.

        Raises BundleError for files that cannot be understood.
        """
        if TOKENIZER_FILE not in files:
            return None
        tokenizer = _parse_tokenizer(bytes(files[TOKENIZER_FILE]))
        settings = _parse_object(files, SETTINGS_FILE)
        special = _special_tokens(_parse_object(files, SPECIAL_FILE) | settings)
        # LlamaTokenizer and its kin add this token on their own, so their tokenizer.json may not mention it.
        begin = tokenizer.token_to_id(special.get("bos_token", "")) if settings.get("add_bos_token") is True else None
        return cls(tokenizer, special, _template(files, settings), _parse_object(files, GENERATION_FILE), begin)

    @property
    def has_chat_template(self) -> bool:
        """Whether apply_chat works."""
        return self._template is not None

    def special_id(self, name: str) -> int | None:
        """Id of a special token by the name that the settings give it ("bos_token"), None where they have none."""
        text = self._special.get(name)
        return None if text is None else self._tokenizer.token_to_id(text)

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with the special tokens that the model expects around one."""
        ids = self._encode(text, add_special_tokens=True)
        return [self._begin, *ids] if self._begin is not None and ids[:1] != [self._begin] else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens; bytes that are no character become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def apply_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation: messages have "role" (system, user, assistant) and "content".

        Raises UsageError when the bundle has no chat template, or its template refuses the conversation.
        """
        if self._template is None:
            raise UsageError(
                "this bundle has no chat template, so it cannot hold a conversation\n"
                "  run: edge generate BUNDLE --prompt TEXT, without --chat"
            )
        conversation = {"messages": [dict(m) for m in messages], "add_generation_prompt": add_generation_prompt}
        # The template writes every special token itself.
        return self._encode(render(self._template, conversation | self._special), add_special_tokens=False)

    def stream(self, stop: Sequence[str] = ()) -> StreamDecoder:
        """A decoder for ids that arrive one by one. A stop string may also name a special token."""
        known = {text: self._tokenizer.token_to_id(text) for text in stop}
        stop_ids = {i for i in known.values() if i is not None and i in self._silent_ids}
        return StreamDecoder(self.decode, stop, self._is_silent, self._byte_ids, stop_ids)

    def _is_silent(self, token_id: int) -> bool:
        # A vocabulary may be padded beyond the tokenizer; such an id has no text.
        return token_id in self._silent_ids or self._tokenizer.id_to_token(token_id) is None

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the prompt is not valid UTF-8 at character {error.start}: {text[error.start]!r}"
            ) from None
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


def _parse_tokenizer(data: bytes) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the library raises bare Exceptions
        raise BundleError(
            f"tokenizer/{TOKENIZER_FILE}: tokenizers {tokenizers.__version__} cannot read it ({error})\n"
            "  a newer release may: pip install -U tokenizers"
        ) from None
    # Training leftovers that would cut or fill prompts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _parse_object(files: Mapping[str, bytes | memoryview], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(bytes(files[name]))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"tokenizer/{name}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise BundleError(f"tokenizer/{name}: expected an object, found {type(value).__name__}")
    return value


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Names to texts; a token is written as a string, or as an object with its content."""
    found = {}
    for name in _SPECIAL_NAMES:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _template(files: Mapping[str, bytes | memoryview], settings: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own, or in the settings as one string or a list of named ones."""
    if TEMPLATE_FILE in files:
        try:
            return bytes(files[TEMPLATE_FILE]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BundleError(f"tokenizer/{TEMPLATE_FILE}: not valid UTF-8 ({error})") from None
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _byte_ids(tokenizer: tokenizers.Tokenizer) -> set[int]:
    """Ids of the tokens <0x00> ... <0xFF>, where the decoder makes bytes of them."""
    decoder = tokenizer.decoder
    if decoder is None or decoder.decode(["<0x41>"]) != "A":
        return set()
    ids = (tokenizer.token_to_id(f"<0x{value:02X}>") for value in range(256))
    return {i for i in ids if i is not None}
