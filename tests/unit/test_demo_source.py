"""The demo's source: a quantised GGUF file becomes the tensors and the tokenizer that Hugging Face expects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from demo.source import LAYER_NAMES, DenseSource, unpermute
from demo.tokenizer import build_tokenizer, generation_config, tokenizer_config
from runtime.errors import CheckpointError
from tests.unit.demo_models import HIDDEN, INNER, LAYERS, TEMPLATE, TinyModel, write_tiny_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_unpermute_by_hand() -> None:
    """Two heads of four rows: pairs (0, 1) and (2, 3) of a head become rows (0, 2) and (1, 3)."""
    rows = np.array([[0], [2], [1], [3], [10], [12], [11], [13]], np.float32)
    assert unpermute(rows, heads=2).ravel().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


def test_every_tensor_is_dequantised_exactly(tiny: TinyModel) -> None:
    source = DenseSource(tiny.path)
    for layer in range(LAYERS):
        for name in LAYER_NAMES:
            expected = tiny.weights[f"model.layers.{layer}.{name}.weight"]
            np.testing.assert_array_equal(source.layer(layer, name), expected, err_msg=name)
    np.testing.assert_array_equal(source.embedding(), tiny.weights["model.embed_tokens.weight"])
    np.testing.assert_array_equal(source.final_norm(), tiny.weights["model.norm.weight"])


def test_config_comes_from_the_metadata(tiny: TinyModel) -> None:
    config = DenseSource(tiny.path).config
    assert (config.hidden_size, config.intermediate_size, config.num_layers) == (HIDDEN, INNER, LAYERS)
    assert (config.num_heads, config.num_kv_heads, config.max_context) == (4, 2, 128)
    assert config.vocab_size == len(tiny.tokens)
    assert config.norm_eps == 1e-5  # stored as fp32, which is 9.99999974e-06
    assert config.rope_theta == 10000.0


def test_tokenizer_merges_and_splits_digits(tiny: TinyModel) -> None:
    data = DenseSource(tiny.path).tokenizer()
    tokenizer = build_tokenizer(data)
    assert tokenizer.encode("hello world12").tokens == ["hello", "Ġw", "o", "r", "l", "d", "1", "2"]
    assert tokenizer.encode("hello<|im_end|>").ids[-1] == 2
    assert tokenizer.decode(tokenizer.encode("naïve 東京 1+1").ids) == "naïve 東京 1+1"


def test_companions_name_the_special_tokens(tiny: TinyModel) -> None:
    data = DenseSource(tiny.path).tokenizer()
    config = tokenizer_config(data, max_context=128)
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert config["chat_template"] == TEMPLATE
    assert generation_config(data)["eos_token_id"] == 2


def test_another_pre_tokenizer_is_refused(tiny: TinyModel) -> None:
    data = DenseSource(tiny.path).tokenizer()
    other = type(data)(**{**data.__dict__, "pre_tokenizer": "llama-bpe"})
    with pytest.raises(CheckpointError, match="'llama-bpe', expected 'smollm'"):
        build_tokenizer(other)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="'gpt2', expected 'llama'"):
        DenseSource(path)
