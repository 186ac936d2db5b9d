"""Renders one chat template: JSON on stdin, JSON on stdout. A script of its own, started by runtime/chat_template.py.

It imports nothing of this project: it runs isolated (python -I), where a checkout is not on the path. Its argument is
the folder that holds Jinja.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

sys.path.extend(sys.argv[1:])

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class GenerationBlock(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - the name and form that Jinja asks for

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def render(template: str, variables: dict[str, Any], max_chars: int) -> str:
    """The text of the template. Raises TemplateError, or ValueError beyond `max_chars`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    pieces, chars = [], 0
    for piece in environment.from_string(template).generate(variables):
        chars += len(piece)
        if chars > max_chars:
            raise ValueError(f"it writes more than {max_chars} characters")
        pieces.append(piece)
    return "".join(pieces)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which a prompt is not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        return {"text": render(request["template"], request["variables"], request["max_chars"])}
    except MemoryError:
        return {"error": f"it needs more than {request['memory_bytes'] >> 20} MiB of memory"}
    except Exception as error:  # whatever a foreign program raises is an answer, not a crash of ours
        return {"error": str(error) or type(error).__name__}


def _main() -> None:
    request = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (request["memory_bytes"], request["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CPU, (request["processor_s"], request["processor_s"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    json.dump(_answer(request), sys.stdout)


if __name__ == "__main__":
    _main()
