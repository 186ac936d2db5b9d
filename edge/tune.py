"""`edge tune`: train the routers of a checkpoint to use again what is in the expert cache."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge import console
from edge.tune_options import add_objective_arguments, add_run_arguments, tune_options
from edge.tune_view import TuneView
from runtime import __version__
from runtime.errors import UsageError

if TYPE_CHECKING:
    import torch

    from remoe.texts import Sequences
    from remoe.tune import Tuned
    from remoe.tune_log import TuneLog
    from remoe.tune_options import TuneOptions
    from remoe.workers import Workers
    from runtime.config import ModelConfig

NAME = "tune"
HELP = "tune the routers of a checkpoint for reuse of experts"
EXAMPLES = """
edge tune ./Qwen1.5-MoE-A2.7B --data chats.jsonl --out chats.router.safetensors
edge tune ./model --data book.txt --out r.safetensors --preset cache --cache-slots 12 --steps 200 --lr 1e-3
edge tune ./model --data book.txt --out r.safetensors --steps 200 --lr 1e-3 --resume
edge tune --from-trace book.trace.safetensors --router qwen.bundle --out r.safetensors
edge tune ./Qwen1.5-MoE-A2.7B/config.json --plan --dtype bf16 --gradient-checkpointing
edge generate qwen.bundle --router r.safetensors --prompt "Hello"
"""
# None until the arguments are read, so that what has no meaning with --from-trace can be refused.
_MODEL_DEFAULTS = {"eval_sequences": 8, "dtype": "fp32", "experts": "grouped_mm"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `edge tune`."""
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", nargs="?", help="folder with config.json and *.safetensors, or org/name")
    add("--data", metavar="FILE", type=Path, nargs="+", help=".txt (a document each) or .jsonl (text or messages)")
    add("--out", metavar="FILE", type=Path, help="the tuned router; log, picture and state lie beside it")
    add("--force", action="store_true", help="replace OUT, and start over where a run was interrupted")
    add("--resume", action="store_true", help="go on with the interrupted run of this OUT")
    add("--json", action="store_true", help="print the result as one JSON object")
    add("--plan", action="store_true", help="only tell memory, work and hours; CHECKPOINT may be a config.json")
    add("--tflops", metavar="N", type=float, nargs="+",
        help="sustained rates for the hours of --plan (default: 100 200 300)")  # fmt: skip
    group = parser.add_argument_group("data and model")
    add = group.add_argument
    add("--sequence-length", metavar="N", type=int, default=2048, help="tokens per sequence (default: %(default)s)")
    add("--eval-data", metavar="FILE", type=Path, nargs="+", help="held-out text (default: the end of --data)")
    add("--eval-sequences", metavar="N", type=int,
        help=f"sequences held out to measure before and after; 0: none (default: {_MODEL_DEFAULTS['eval_sequences']})",
    )  # fmt: skip
    add(
        "--eval-slots",
        metavar="C,C",
        help="cache sizes per layer whose misses are measured (default: K,2K)",
    )
    add("--tokenizer", metavar="DIR", type=Path, help="of another folder (default: CHECKPOINT's)")
    add("--start", metavar="FILE", type=Path, help="begin with the gates of this router file")
    add("--dtype", choices=["fp32", "bf16"],
        help=f"of the frozen weights; gates are fp32 (default: {_MODEL_DEFAULTS['dtype']})")  # fmt: skip
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--experts", choices=["grouped_mm", "eager", "batched_mm"],
        help=f"how transformers computes experts (default: {_MODEL_DEFAULTS['experts']})")  # fmt: skip
    group = parser.add_argument_group("without the model")
    add = group.add_argument
    add("--from-trace", metavar="TRACE", type=Path, nargs="+", help="recorded router inputs (edge trace --hidden)")
    add("--router", metavar="FILE", type=Path, help="the stock gates: a bundle, or a router file")
    add_objective_arguments(parser)
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Tune, measure, write. Raises UsageError for whatever cannot be, before the model is loaded."""
    options = tune_options(args)
    if args.plan:
        from edge.tune_plan import show_plan

        return show_plan(_with_defaults(args), options)
    if args.tflops is not None:
        raise UsageError("--tflops belongs to --plan, which tells hours and tunes nothing: leave one of them out")
    if args.out is None:
        raise UsageError("edge tune needs --out FILE, the tuned router")
    _check_paths(args)
    if args.from_trace:
        from edge.tune_layers import run_layers

        with _told_how_to_go_on(args):
            return run_layers(args, options)
    if not args.checkpoint or not args.data:
        raise UsageError("edge tune needs CHECKPOINT and --data FILE ..., or --from-trace TRACE and --router BUNDLE")
    if args.router is not None:
        raise UsageError("--router names the stock gates of --from-trace: to begin with tuned gates use --start FILE")
    _check_held_out(_with_defaults(args))
    _need_transformers()
    from remoe.workers import Workers

    workers = Workers(args.device)
    try:
        with _told_how_to_go_on(args):
            return _tune(args, options, workers)
    finally:
        workers.close()


@contextlib.contextmanager
def _told_how_to_go_on(args: argparse.Namespace) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if state_path(args.out).is_file():
            console.note("the run is kept: the same command with --resume goes on with it")
        raise


def _tune(args: argparse.Namespace, options: TuneOptions, workers: Workers) -> int:
    from remoe.tune import Teacher, tune
    from remoe.tune_eval import evaluate

    path, config, name = _open_checkpoint(args)
    options.check(config, workers.count)
    train, held_out, data_sha256 = _sequences(args, path, config)
    _say(args, workers, f"{train.tokens:,} tokens in {len(train)} sequences, {len(held_out or ())} held out")
    if options.lr_warmup_steps > options.steps:
        _say(args, workers, f"a warm-up of {options.lr_warmup_steps} steps outlasts the run: try --lr-warmup")
    slots, given = _slots(args, options, config), _given_gates(args, config)
    model = _load_model(path, args).to(workers.device)
    start = _start_gates(args, config, model, given)
    log = open_log(args) if workers.first else None
    before = evaluate(model, config, held_out, None, slots) if held_out is not None and workers.first else {}
    began = time.perf_counter()
    with TuneView(options.steps, args.json or not workers.first) as view:

        def on_step(numbers: dict[str, float]) -> None:
            view.show(numbers)
            if log is not None:
                log.write(numbers)

        state = state_path(args.out)
        tuned = tune(
            model, config, train, options, workers=workers, teacher=Teacher(), start=start, state=state, on_step=on_step
        )
    seconds = time.perf_counter() - began
    if not workers.first or log is None:
        return 0
    prior = options.objective.cache_prior(config.router)
    after = evaluate(model, config, held_out, tuned.tensors, slots, prior=prior) if held_out is not None else {}
    data = {"sha256": data_sha256, "files": [p.name for p in args.data], "tokens": train.tokens,
            "sequence_length": args.sequence_length}  # fmt: skip
    save(args, options, tuned, name, data, {"before": before, "after": after})
    finish(args, log, {"before": before, "after": after, "seconds": round(seconds, 1), "steps": tuned.steps})
    return 0


def state_path(out: Path) -> Path:
    """Where an unfinished run of this router is kept."""
    return out.with_name(out.name + ".state")


def save(
    args: argparse.Namespace,
    options: TuneOptions,
    tuned: Tuned,
    name: str,
    data: dict[str, Any],
    metrics: dict[str, Any],
) -> None:
    """Write the router file with where it comes from; the state of the run has then done its duty."""
    import torch

    from runtime.router_file import Provenance, gates_sha256, save_router
    from runtime.strict import to_dict

    settings = to_dict(options)
    settings["preset"] = args.preset
    versions = {"remoe-edge": __version__, "torch": torch.__version__, "python": platform.python_version()}
    sha256 = gates_sha256(tuned.stock)
    method = "layer-wise" if args.from_trace else args.preset
    save_router(
        args.out, tuned.tensors, Provenance(sha256, name, method, settings, data, metrics, tuned.steps, versions)
    )
    state_path(args.out).unlink(missing_ok=True)


def finish(args: argparse.Namespace, log: TuneLog, result: dict[str, Any]) -> None:
    """The picture, and what came out: numbers before and after."""
    log.write({"result": result})
    log.close()
    picture: Path | None = args.out.with_suffix(".png")
    try:
        from remoe.tune_log import plot

        plot(log.history, args.out.with_suffix(".png"), args.out.name)
    except ImportError:
        picture = None
        console.note("no picture of the run: pip install 'remoe-edge[bench]' for matplotlib")
    except OSError as error:  # the router is written: a full disk does not take it back
        console.note(f"no picture of the run: {picture}: {error.strerror}")
        picture = None
    files = {"router": str(args.out), "log": str(log.path), "plot": str(picture) if picture else None}
    if args.json:
        console.print_json({**files, **result})
        return
    before, after = result["before"], result["after"]
    if after:
        rows = [[n, f"{before[n]:.5g}", f"{after[n]:.5g}", _change(before[n], after[n])] for n in after]
        title = "on the trace" if args.from_trace else "held out"  # a trace is measured on what it was tuned with
        print(console.format_table([[title, "before", "after", ""], *rows]))
    print(f"{args.out}: {result['steps']} steps in {result['seconds']:.0f} s; log {files['log']}, plot {files['plot']}")


def open_log(args: argparse.Namespace) -> TuneLog:
    """The log beside OUT; a resumed run goes on with it."""
    from remoe.tune_log import TuneLog
    from remoe.tune_state import step_of_state

    state = state_path(args.out)
    return TuneLog(args.out.with_suffix(".jsonl"), step_of_state(state) if args.resume else None)


def _check_paths(args: argparse.Namespace) -> None:
    state = state_path(args.out)
    if not args.out.parent.is_dir():
        raise UsageError(f"{args.out.parent}: no such folder for --out")
    if not os.access(args.out.parent, os.W_OK):
        raise UsageError(f"--out {args.out}: {args.out.parent} is no folder that can be written to")
    if args.out.suffix != ".safetensors":
        raise UsageError(f"--out {args.out}: a router file ends in .safetensors")
    if args.resume and args.force:
        raise UsageError("--resume goes on with a run and --force starts over: give one of them")
    if args.resume and not state.is_file():
        raise UsageError(f"--resume: {state} is not there, so no run of this --out was interrupted")
    if state.exists() and not args.resume and not args.force:
        raise UsageError(f"{state}: a run was interrupted: add --resume to go on with it, or --force to start over")
    if args.out.exists() and not args.force and not args.resume:
        raise UsageError(f"{args.out}: exists: add --force to replace it")
    if args.force:
        state.unlink(missing_ok=True)


def _open_checkpoint(args: argparse.Namespace) -> tuple[Path, ModelConfig, str]:
    """Folder, config and name; pickled, quantised and damaged checkpoints and such with code of their own end here.

    So do those whose tensors are not those of the architecture: transformers would fill in random ones.
    """
    from export.checkpoint import Checkpoint
    from export.families import family_of, read_model
    from export.plan import Plan

    with Checkpoint.open(args.checkpoint) as source:
        config = read_model(source.config, source.generation)
        Plan(source, family_of(source.config), config)
        local = Path(args.checkpoint).exists()
        return source.path, config, source.path.resolve().name if local else args.checkpoint


def _sequences(args: argparse.Namespace, path: Path, config: ModelConfig) -> tuple[Sequences, Sequences | None, str]:
    from remoe.texts import encode, pack, read_documents

    length = args.sequence_length
    if length > config.max_context:
        raise UsageError(f"--sequence-length {length}: this model goes up to {config.max_context}")
    documents, sha256 = read_documents(args.data)
    held_out = read_documents(args.eval_data)[0] if args.eval_data else None
    tokenizer = _tokenizer(args.tokenizer or path)

    def chat(messages: list[dict[str, str]]) -> list[int]:
        if not tokenizer.chat_template:
            raise UsageError(f"{args.tokenizer or path}: no chat template, which data with `messages` needs")
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)

    def packed(texts: list[Any]) -> Sequences:
        ids = encode(texts, lambda text: tokenizer(text)["input_ids"], chat, tokenizer.eos_token_id)
        return pack(ids, length, config.vocab_size)

    train = packed(documents)
    if held_out is not None:
        return train, packed(held_out).take(slice(0, args.eval_sequences)), sha256
    if args.eval_sequences == 0:
        return train, None, sha256
    return *train.split(args.eval_sequences), sha256


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    if not (path / "tokenizer.json").is_file():
        raise UsageError(f"{path}: no tokenizer.json: name a folder with one, --tokenizer DIR")
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    tokenizer.model_max_length = 1 << 30  # documents are cut into sequences later: no warnings of long ones
    return tokenizer


def _load_model(path: Path, args: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        path,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype],
        experts_implementation=args.experts,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    ).eval()


def _with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, with the defaults that wait for it to be known that the model is used."""
    for name, value in _MODEL_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def _check_held_out(args: argparse.Namespace) -> None:
    if args.eval_sequences < 0:
        raise UsageError(f"--eval-sequences {args.eval_sequences}: expected 0 (none) or more")
    if args.eval_data and args.eval_sequences == 0:
        raise UsageError("--eval-data names held-out text, but --eval-sequences 0 measures none: leave one of them out")


def _given_gates(args: argparse.Namespace, config: ModelConfig) -> tuple[dict[str, torch.Tensor], Any] | None:
    """Of --start: read before the model is, for it may be the wrong file."""
    if args.start is None:
        return None
    from runtime.layout import router_tensors
    from runtime.router_file import load_router

    return load_router(args.start, router_tensors(config))


def _start_gates(
    args: argparse.Namespace, config: ModelConfig, model: Any, given: tuple[dict[str, torch.Tensor], Any] | None
) -> dict[str, torch.Tensor] | None:
    if given is None:
        return None
    from remoe.gates import Gates
    from runtime.router_file import check_base, gates_sha256

    tensors, provenance = given
    stock = gates_sha256(Gates(model, config).tensors(stock=True))
    check_base(provenance, stock, args.start, str(args.checkpoint))
    return tensors


def _slots(args: argparse.Namespace, options: TuneOptions, config: ModelConfig) -> list[int]:
    router = config.router
    if not args.eval_slots:
        return sorted({router.top_k, min(2 * router.top_k, router.num_experts), options.objective.slots(router)})
    try:
        sizes = [int(part) for part in args.eval_slots.split(",")]
    except ValueError:
        raise UsageError(f"--eval-slots {args.eval_slots!r}: expected numbers, as 8,16") from None
    if min(sizes) < router.top_k:
        raise UsageError(f"--eval-slots {args.eval_slots}: a token needs {router.top_k} experts per layer")
    return sizes


def _need_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UsageError("edge tune needs transformers: pip install 'remoe-edge[tune]'") from None


def _say(args: argparse.Namespace, workers: Workers, text: str) -> None:
    if workers.first and not args.json:
        console.note(text)


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.2f} %" if before else ""
