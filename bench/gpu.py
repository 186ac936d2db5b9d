"""Everything that only a GPU can show, in one command and one JSON file: `python -m bench.gpu BUNDLE --out gpu.json`

Each check says pass, fail or not run, with the reason. A check that has not been run proves nothing, and is listed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.common import run_main, say
from bench.gpu_checks import CHECKS, NotRunError, Result, Settings
from runtime.bundle import Bundle
from runtime.cuda.device import Device, open_device
from runtime.errors import EdgeError, UsageError
from runtime.machine import describe


def run(settings: Settings, open_gpu: Callable[[], Device] = open_device) -> Result:
    """Every check; none stops the others."""
    try:
        gpu, reason = open_gpu(), ""
    except UsageError as error:
        gpu, reason = None, str(error)
    results = {}
    for name, check in CHECKS.items():
        results[name] = {"status": "not run", "reason": reason} if gpu is None else _outcome(check, settings, gpu)
        say(f"{results[name]['status']:8} {name:16} {_in_words(results[name])}")
    missing = [name for name, result in results.items() if result["status"] == "not run"]
    say(f"not run: {', '.join(missing) or 'none'}")
    facts = None if gpu is None else vars(gpu.cuda.gpu)
    return {"gpu": facts, "checks": results, "not_run": missing, "bundle": str(settings.bundle), "machine": describe()}


def _outcome(check: Callable[[Settings, Device], Result], settings: Settings, gpu: Device) -> Result:
    begin = time.monotonic()
    try:
        with torch.inference_mode():
            result = check(settings, gpu)
        outcome = {"status": "pass" if result.pop("ok") else "fail", **result}
    except NotRunError as error:
        outcome = {"status": "not run", "reason": str(error)}
    except Exception as error:  # one broken check must not hide the others
        outcome = {"status": "fail", "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    return {**outcome, "seconds": round(time.monotonic() - begin, 2)}


def _in_words(result: Result) -> str:
    facts = {name: value for name, value in result.items() if name not in ("status", "trace", "seconds")}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items()
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 when a check failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("bundle", type=Path, help="a bundle with experts")
    parser.add_argument("--slots-per-layer", type=int, help="while decoding (default: what fits)")
    parser.add_argument("--tokens", type=int, default=Settings.tokens, help="decoded per measurement")
    parser.add_argument("--context", type=int, default=Settings.context, help="tokens; engines must be built for it")
    parser.add_argument("--out", type=Path, default=Path("out/gpu.json"), help="the result (default: %(default)s)")
    options = parser.parse_args(argv)
    settings = Settings(options.bundle, options.slots_per_layer, options.tokens, options.context)
    failed: list[str] = []

    def body() -> None:
        Bundle.open(settings.bundle).close()
        result = run(settings)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        say(f"written: {options.out}")
        failed.extend(name for name, check in result["checks"].items() if check["status"] == "fail")
        if failed:
            raise EdgeError(f"failed: {', '.join(failed)}")

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
