"""Small tokenizers of the kinds that checkpoints bring, built with the tokenizers library."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = ["the quick brown fox jumps over the lazy dog", "Grüße aus Köln, 你好 🎉🎉", "def main():\n    return 1  # done"]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def byte_level() -> Tokenizer:
    """GPT-2's kind: every byte is a letter, so a character may be cut anywhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


@cache
def sentencepiece(cut_spaces: int = 1) -> Tokenizer:
    """Llama 2's kind: spaces are letters, unknown characters fall back to byte tokens, a leading space is cut."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", *SPECIAL, *(f"<0x{b:02X}>" for b in range(256))])}
    for token in ["▁", "▁▁", "t", "h", "e", "▁t", "he", "▁the", "a", "b", "▁a", "\n", "o", ".", "ü", "\ufffd"]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [("▁", "▁"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", cut_spaces, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    begin = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    return tokenizer


@cache
def metaspace() -> Tokenizer:
    """Unigram with a Metaspace decoder, which drops the space of the first token only."""
    pieces = [("<unk>", 0.0), ("▁", -2.0), ("▁the", -3.0), ("▁dog", -3.5), ("s", -4.0), ("d", -5.0), ("▁▁", -6.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@cache
def word_pieces() -> Tokenizer:
    """Words joined by spaces, pieces marked with ##."""
    words = ["[UNK]", "the", "dog", "##s", "##gy", ".", "don", "'", "t", "n't", "is"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


SAMPLES = {
    "byte-level": byte_level,
    "sentencepiece": sentencepiece,
    "two spaces cut": lambda: sentencepiece(2),
    "metaspace": metaspace,
    "word-pieces": word_pieces,
}


def bundle_files(tokenizer: Tokenizer, template: str | None = CHATML) -> dict[str, bytes]:
    """What a bundle's tokenizer folder would hold."""
    settings: dict[str, object] = {
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_end|>", "special": True},
        "model_max_length": 1000000000000000019884624838656,
    }
    if template is not None:
        settings["chat_template"] = template
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [tokenizer.token_to_id("</s>")]}).encode(),
    }
