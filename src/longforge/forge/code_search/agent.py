"""The agent: a program that answers one question about a tree with the official `openai` package.

It is told where the model is (`OPENAI_BASE_URL`, `OPENAI_API_KEY`) and its task, and nothing of who serves or
trains the model. Alone:

    echo '{"question": "Which file defines class Task?", "tools_socket": "..."}' | \
        python -m longforge.forge.code_search.agent

prints one line of JSON: `answer`, `outcome` (answered, gave_up, failed), `messages`, `error`. `agent_host.py`
runs the same `run_episode` in a fork per episode.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import openai

from longforge.errors import InputError
from longforge.forge.code_search.prompts import TOOL_SPECS, opening_messages
from longforge.forge.code_search.sandbox import call_tool

__all__ = ["AgentTask", "main", "parse_task", "run_episode"]

MAX_CALLS_PER_TURN = 4


@dataclass(frozen=True)
class AgentTask:
    """What one agent is asked to do, and its limits."""

    question: str
    tools_socket: str
    """Unix socket of the tool server."""
    max_turns: int = 5
    """Model calls, the final answer included."""
    max_tokens: int = 128
    """Of one model call."""
    temperature: float | None = None
    """None leaves it to the server."""
    timeout_s: float = 120.0
    """Of one model call."""
    model: str = "policy"


def parse_task(body: Mapping[str, Any]) -> AgentTask:
    """Make a task of JSON fields.

    Raises:
        InputError: a field is missing or unknown.
    """
    known = {field.name for field in fields(AgentTask)}
    unknown, missing = sorted(set(body) - known), sorted({"question", "tools_socket"} - set(body))
    if unknown or missing:
        what = f"unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(missing)}"
        raise InputError(f"agent task: expected fields of {', '.join(sorted(known))}, got {what}")
    return AgentTask(**body)


def run_episode(task: AgentTask, client: openai.OpenAI) -> dict[str, Any]:
    """Ask the model, run the tools it calls, and repeat until it answers or its turns run out."""
    messages: list[Any] = [{"role": m.role, "content": m.content} for m in opening_messages(task.question)]
    result: dict[str, Any] = {"answer": None, "outcome": "gave_up", "messages": messages, "error": None}
    options: dict[str, Any] = {} if task.temperature is None else {"temperature": task.temperature}
    try:
        for _ in range(task.max_turns):
            completion = client.chat.completions.create(
                model=task.model,
                messages=messages,
                tools=_TOOLS,
                max_tokens=task.max_tokens,
                timeout=task.timeout_s,
                **options,
            )
            message = completion.choices[0].message
            messages.append(message.to_dict())  # as it came, thinking and unknown fields included
            if not message.tool_calls:
                return result | {"answer": message.content or "", "outcome": "answered"}
            for call in message.tool_calls[:MAX_CALLS_PER_TURN]:
                text = _run_tool(task.tools_socket, call)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": text})
    except (openai.OpenAIError, OSError, IndexError) as problem:
        return result | {"outcome": "failed", "error": f"{type(problem).__name__}: {problem}"}
    return result


def make_client(**options: Any) -> openai.OpenAI:
    """A client of the endpoint that the environment names. A failed call fails the episode: no retries."""
    return openai.OpenAI(max_retries=0, **options)


def main(arguments: list[str] | None = None) -> int:
    """Read a task (first argument or standard input), run it, print the result as one line of JSON."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        task = parse_task(json.loads(arguments[0] if arguments else sys.stdin.read()))
        for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
            if not os.environ.get(name):
                raise InputError(
                    f"{name}: expected in the environment, found nothing; set it to the endpoint's"
                )
        client = make_client()
    except (InputError, ValueError) as problem:
        print(f"agent: {problem}", file=sys.stderr)
        return 2
    result = run_episode(task, client)
    print(json.dumps(result), flush=True)
    return 0 if result["outcome"] != "failed" else 1


_TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": spec.name, "description": spec.description, "parameters": spec.parameters},
    }
    for spec in TOOL_SPECS
]


def _run_tool(socket_path: str, call: Any) -> str:
    """The result of one tool call, or one line saying why there is none."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError:
        return "error: arguments are not JSON"
    if not isinstance(arguments, dict):
        return "error: arguments are not named"
    return call_tool(socket_path, call.function.name, arguments)[1]


if __name__ == "__main__":
    sys.exit(main())
