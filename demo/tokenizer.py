"""tokenizer.json and its companions, rebuilt from the tokens and merges of the GGUF file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from demo.source import TokenizerData
from runtime.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTROL = 3  # GGUF token type of special tokens
_NORMAL = 1


def build_tokenizer(data: TokenizerData) -> Tokenizer:
    """Byte-level BPE with digits split one by one, as SmolLM2 was trained with ("smollm" in GGUF).

    Raises CheckpointError for another pre-tokenizer or for token types that this recipe does not know.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if data.pre_tokenizer != "smollm":
        raise CheckpointError(f"tokenizer.ggml.pre is {data.pre_tokenizer!r}, expected 'smollm'")
    unknown = sorted(set(data.token_types) - {_NORMAL, _CONTROL})
    if unknown:
        raise CheckpointError(f"tokenizer.ggml.token_type has values {unknown}, expected {_NORMAL} and {_CONTROL} only")
    vocabulary = {token: index for index, token in enumerate(data.tokens)}
    left, _, right = zip(*(merge.partition(" ") for merge in data.merges), strict=True)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(zip(left, right, strict=True))))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(data.tokens, data.token_types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def tokenizer_config(data: TokenizerData, max_context: int) -> dict[str, Any]:
    """tokenizer_config.json; the chat template is the model's own."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": data.tokens[data.bos_id],
        "chat_template": data.chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": data.tokens[data.eos_id],
        "model_max_length": max_context,
        "pad_token": data.tokens[data.padding_id],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": data.tokens[data.unknown_id],
    }


def generation_config(data: TokenizerData) -> dict[str, Any]:
    """generation_config.json: where text begins and ends."""
    return {"bos_token_id": data.bos_id, "eos_token_id": data.eos_id, "pad_token_id": data.padding_id}
