"""Chat templates: programs in the Jinja language that come with a checkpoint, so they are not trusted.

A template runs in Jinja's immutable sandbox inside a process of its own with limits on memory, processor time and
output: the sandbox keeps it from Python's internals, and the limits keep a template like `'x' * 10 ** 10`, or a loop in
a loop in a loop, from taking the machine down. Starting that process costs about a tenth of a second per prompt.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from runtime.errors import UsageError

MAX_TEMPLATE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 4 << 20
MEMORY_BYTES = 512 << 20
PROCESSOR_S = 5
_WORKER = Path(__file__).with_name("chat_template_worker.py")
_WALL_S = 60  # the worker ends itself by its processor time; this is for a machine that has none to give


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text of `template` with `variables` (plain JSON values).

    Raises UsageError when the template is wrong, refuses its input (raise_exception) or exceeds a limit.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise _refused(f"it has {len(template)} characters, more than the {MAX_TEMPLATE_CHARS} allowed")
    request = {"template": template, "variables": dict(variables), "max_chars": MAX_OUTPUT_CHARS}
    limits = {"memory_bytes": MEMORY_BYTES, "processor_s": PROCESSOR_S}
    # Isolated: neither the working directory nor the environment can slip a module in. It leaves the user's own site
    # folder out, too, so the worker is told where Jinja is.
    command = [sys.executable, "-I", str(_WORKER), str(Path(jinja2.__file__).parents[1])]
    try:
        data = json.dumps(request | limits).encode()
        # In a session of its own, so that a Ctrl-C at the terminal is ours to answer.
        done = subprocess.run(
            command, input=data, capture_output=True, timeout=_WALL_S, check=False, start_new_session=True
        )
    except subprocess.TimeoutExpired:
        raise _refused(f"it did not end within {_WALL_S} s") from None
    if done.returncode < 0:
        raise _refused(f"it was stopped (signal {-done.returncode}): {PROCESSOR_S} s of processor time are allowed")
    if done.returncode > 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise _refused(f"its process failed: {''.join(last) or done.returncode}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise _refused(answer["error"])
    text: str = answer["text"]
    return text


def _refused(reason: str) -> UsageError:
    return UsageError(f"the bundle's chat template failed: {reason}")
