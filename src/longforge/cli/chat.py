"""`longforge chat`: a conversation in the terminal, with a model here or on any server of the dialect."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longforge.errors import InputError

if TYPE_CHECKING:
    import openai
    from rich.console import Console

    from longforge.server.running import BackgroundServer

__all__ = ["chat"]

HELP = "Ctrl-D leaves, /reset forgets the conversation."


def chat(
    model: Annotated[
        str | None,
        typer.Argument(help="Model folder. Without one, the shipped demo model.", show_default=False),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Talk to this server instead of loading a model.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    tools: Annotated[
        Path | None, typer.Option(help="JSON file with the tools on offer; you type what they return.")
    ] = None,
    thinking: Annotated[str, typer.Option(help="adaptive, enabled or disabled.")] = "adaptive",
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0)] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 512,
    seed: Annotated[int | None, typer.Option(help="Makes the answers repeatable.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: as torch finds).", min=1)] = None,
) -> None:
    """Chat with a model. Thinking is shown dimmed; reads lines from a pipe as well."""
    if url is not None and model is not None:
        raise InputError(f"chat: expected a model folder or --url, got both {model} and {url}")
    asked: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
    if seed is not None:
        asked["seed"] = seed
    if tools is not None:
        asked["tools"] = _read_tools(tools)
    if thinking not in ("adaptive", "enabled", "disabled"):
        raise InputError(f"thinking: expected adaptive, enabled or disabled, got {thinking!r}")
    asked["extra_body"] = {"thinking": {"type": thinking}}
    with ExitStack() as stack:
        base = url or stack.enter_context(_local_server(model, threads)).url
        _Conversation(base, asked, system, local=url is None).run()


def _local_server(model: str | None, threads: int | None) -> "BackgroundServer":
    from longforge.server.app import create_app
    from longforge.server.launch import load
    from longforge.server.running import BackgroundServer

    engine_loop, tokenizer, name = load(model, threads=threads, max_running=1)
    return BackgroundServer(create_app(engine_loop, tokenizer, name), on_stop=engine_loop.stop)


def _read_tools(path: Path) -> list[Any]:
    """Tools in OpenAI's form, or bare functions, from a JSON list."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a JSON file with a list of tools ({error})") from error
    if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
        raise InputError(f"{path}: expected a JSON list of tools")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in listed]


class _Conversation:
    """Reads what the user says, shows what the model says."""

    def __init__(self, url: str, asked: dict[str, Any], system: str | None, *, local: bool) -> None:
        import openai
        from rich.console import Console

        base = url.rstrip("/")
        base = base if base.endswith("/v1") else f"{base}/v1"
        # A proxy from the environment has no business between two ends of this process.
        http = openai.DefaultHttpxClient(trust_env=not local)
        self._client = openai.OpenAI(base_url=base, api_key="none", max_retries=0, http_client=http)
        self._asked = {**asked, "model": self._served_model(base)}
        self._console: Console = Console(highlight=False, markup=False, soft_wrap=True)
        self._start: list[Any] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._start)
        self._interactive = sys.stdin.isatty()

    def run(self) -> None:
        """Until the input ends."""
        if self._interactive:
            self._console.print(f"{self._asked['model']}. {HELP}", style="dim")
        while (line := self._read("> ")) is not None:
            if line.strip() == "/reset":
                self._messages = list(self._start)
            elif line.strip() and not self._turn(line):
                break
        if self._interactive:
            self._console.print()

    def _turn(self, line: str) -> bool:
        """One turn: the answer, and as long as it calls tools, their results and the next answer.

        False when the input ended before a result.
        """
        before = len(self._messages)
        self._messages.append({"role": "user", "content": line})
        while True:
            try:
                answer = self._answer()
            except InputError as error:
                if not self._interactive:
                    raise
                self._console.print(f"{error}", style="red")
                del self._messages[before:]
                return True
            self._messages.append(answer)
            if not answer.get("tool_calls"):
                return True
            for call in answer["tool_calls"]:
                result = self._read(f"{call['function']['name']} returns> ")
                if result is None:
                    return False
                self._messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})

    def _answer(self) -> dict[str, Any]:
        """Streams the next answer to the screen and returns it as a message."""
        import openai

        shown = _Shown(self._console)
        try:
            for chunk in self._client.chat.completions.create(
                messages=self._messages, stream=True, **self._asked
            ):
                for choice in chunk.choices:
                    shown.add(choice.delta)
        except openai.APIError as error:
            raise InputError(_reason(error)) from None
        finally:
            shown.end()
        return shown.message()

    def _read(self, prompt: str) -> str | None:
        try:
            line = input(prompt if self._interactive else "")
            line.encode()  # where the locale let other bytes through
        except EOFError:
            return None
        except UnicodeError:
            raise InputError("input: expected UTF-8 text, got other bytes") from None
        return line

    def _served_model(self, base: str) -> str:
        import openai

        try:
            return self._client.models.list().data[0].id
        except openai.APIError as error:
            reason = str(error)
        except (AttributeError, IndexError, TypeError, ValueError):
            # A reply of another kind passes through the client as it is.
            reason = "what answers gives no list of models"
        raise InputError(f"{base}: expected a model server, got none ({reason})")


class _Shown:
    """One answer, on the screen as it comes and as a message in the end."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._part = ""
        self._thinking: str | None = None
        self._content = ""
        self._calls: list[dict[str, Any]] = []

    def add(self, delta: Any) -> None:
        """Shows one delta of the stream."""
        thought = getattr(delta, "reasoning_content", None)
        if thought is not None:
            self._thinking = (self._thinking or "") + thought
            self._show("thinking", thought, "(thinking) ", "dim")
        if delta.content:
            self._content += delta.content
            self._show("content", delta.content)
        for call in delta.tool_calls or ():
            if call.index == len(self._calls):
                function = {"name": call.function.name, "arguments": ""}
                self._calls.append({"id": call.id, "type": "function", "function": function})
            function = self._calls[call.index]["function"]
            function["arguments"] += call.function.arguments
            self._show(f"call {call.index}", call.function.arguments, f"(calls {function['name']}) ", "cyan")

    def end(self) -> None:
        """Ends the line."""
        if self._part:
            self._console.print()

    def message(self) -> dict[str, Any]:
        """The whole answer, thinking included, as the next request needs it."""
        message: dict[str, Any] = {"role": "assistant", "content": self._content}
        if self._thinking is not None:
            message["reasoning_content"] = self._thinking
        if self._calls:
            message["tool_calls"] = self._calls
        return message

    def _show(self, part: str, text: str, opening: str = "", style: str | None = None) -> None:
        if not text:
            return
        if part != self._part:
            self.end()
            self._part = part
            text = opening + text
        self._console.print(text, style=style, end="")


def _reason(error: "openai.APIError") -> str:
    """The server's own words."""
    body = error.body
    if isinstance(body, dict) and "message" in body:
        return str(body["message"])
    return error.message
