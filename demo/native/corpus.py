"""The twin's texts and tokenizer: chapters of the King James Bible, byte-level BPE learnt on the training part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0  # the first special token that the trainer is given
TEXTS = "bible"


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; END_OF_TEXT has END_OF_TEXT_ID."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def tokenizer_config(context: int) -> dict[str, object]:
    """tokenizer_config.json."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": context,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def token_stream(tokenizer: Tokenizer, documents: Sequence[str]) -> Tensor:
    """All documents one after the other, each after an END_OF_TEXT: int64 [number of tokens]."""
    import torch

    ids = [token for text in tokenizer.encode_batch(list(documents)) for token in (END_OF_TEXT_ID, *text.ids)]
    return torch.tensor(ids)


def windows(stream: Tensor, length: int) -> Tensor:
    """The stream cut into rows of `length` + 1 tokens that share one token with the next row: [rows, length + 1].

    Every token but the first is predicted once; a rest that fills no row is dropped.
    """
    rows = (len(stream) - 1) // length
    return stream[: rows * length + 1].unfold(0, length + 1, length)
