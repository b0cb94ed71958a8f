"""`longforge chat`: a conversation in the terminal, with a model here or on any server of the dialect."""

import json
import sys
import time
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

HELP = "/reset forgets the conversation, /tools shows what is offered, Ctrl-C stops an answer, Ctrl-D leaves."


def chat(
    model: Annotated[
        str | None,
        typer.Argument(help="Model folder. Without one, the shipped demo model.", show_default=False),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Talk to this server instead of loading a model.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Key of the server at --url.", envvar="OPENAI_API_KEY", show_default=False),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    tools: Annotated[
        Path | None, typer.Option(help="JSON file with the tools on offer; you type what they return.")
    ] = None,
    thinking: Annotated[str, typer.Option(help="adaptive, enabled or disabled.")] = "adaptive",
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0, max=100)] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 512,
    seed: Annotated[int | None, typer.Option(help="Makes the answers repeatable.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: the free cores).", min=1)] = None,
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
        _Conversation(base, None if url is None else api_key, asked, system, local=url is None).run()


def _local_server(model: str | None, threads: int | None) -> "BackgroundServer":
    from longforge.server.app import create_app
    from longforge.server.launch import load
    from longforge.server.running import BackgroundServer
    from longforge.server.settings import ServeSettings

    engine_loop, tokenizer, name = load(ServeSettings(model=model, threads=threads, max_running=1))
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

    def __init__(
        self, url: str, api_key: str | None, asked: dict[str, Any], system: str | None, *, local: bool
    ) -> None:
        import openai
        from rich.console import Console

        base = url.rstrip("/")
        base = base if base.endswith("/v1") else f"{base}/v1"
        # A proxy from the environment has no business between two ends of this process.
        http = openai.DefaultHttpxClient(trust_env=not local)
        self._client = openai.OpenAI(
            base_url=base, api_key=api_key or "none", max_retries=0, http_client=http
        )
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
            elif line.strip() == "/tools":
                self._show_tools()
            elif line.strip() and not self._turn(line):
                break
        if self._interactive:
            self._console.print()

    def _show_tools(self) -> None:
        offered = [tool["function"] for tool in self._asked.get("tools", ())]
        for function in offered:
            parameters = ", ".join((function.get("parameters") or {}).get("properties", {}))
            said = f"{function.get('name')}({parameters})  {function.get('description') or ''}"
            self._console.print(said.rstrip(), style="dim")
        if not offered:
            self._console.print("no tools are offered; --tools FILE offers some", style="dim")

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
        """Streams the next answer to the screen and returns it as a message.

        In a terminal, Ctrl-C ends the request, and what had come by then is the answer.
        """
        import openai

        shown = _Shown(self._console)
        try:
            with self._client.chat.completions.create(
                messages=self._messages, stream=True, stream_options={"include_usage": True}, **self._asked
            ) as stream:
                for chunk in stream:
                    shown.count(chunk.usage)
                    for choice in chunk.choices:
                        shown.add(choice.delta)
        except openai.APIError as error:
            raise InputError(_reason(error)) from None
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            shown.stop()
        finally:
            shown.end()
        if self._interactive:
            shown.tell_facts()
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
        except openai.AuthenticationError:
            raise InputError(
                f"{base}: it asks for an API key; give one with --api-key or in OPENAI_API_KEY"
            ) from None
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
        self._first: float | None = None
        self._usage: Any = None

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
                self._show(f"call {call.index}", "", f"(calls {function['name']}) ", "cyan")
            arguments = (call.function and call.function.arguments) or ""
            self._calls[call.index]["function"]["arguments"] += arguments
            self._show(f"call {call.index}", arguments, style="cyan")

    def count(self, usage: Any) -> None:
        """Takes the usage where a chunk has it."""
        self._usage = usage or self._usage

    def stop(self) -> None:
        """The user has heard enough: the calls are not made."""
        self._calls.clear()
        self._show("stopped", "(stopped)", style="dim")

    def end(self) -> None:
        """Ends the line."""
        if self._part:
            self._console.print()
            self._part = ""

    def tell_facts(self) -> None:
        """Speed and cached tokens, as far as the server told them."""
        if self._usage is None:
            return
        tokens = self._usage.completion_tokens
        facts = [f"{tokens} tokens"]
        if self._first is not None and tokens > 1:
            facts.append(f"{(tokens - 1) / max(time.monotonic() - self._first, 1e-3):.0f} tokens/s")
        details = self._usage.prompt_tokens_details
        prompt = f"prompt {self._usage.prompt_tokens}"
        if details is not None and details.cached_tokens is not None:
            prompt += f", {details.cached_tokens} cached"
        self._console.print(f"[{', '.join([*facts, prompt])}]", style="dim")

    def message(self) -> dict[str, Any]:
        """The whole answer, thinking included, as the next request needs it.

        A call that was cut off in its arguments is left out: nobody could answer it.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self._content}
        if self._thinking is not None:
            message["reasoning_content"] = self._thinking
        whole = [call for call in self._calls if _is_object(call["function"]["arguments"])]
        if whole:
            message["tool_calls"] = whole
        return message

    def _show(self, part: str, text: str, opening: str = "", style: str | None = None) -> None:
        if not text and not opening.startswith("(calls"):
            return
        if self._first is None:
            self._first = time.monotonic()
        if part != self._part:
            self.end()
            self._part = part
            text = opening + text
        self._console.print(text, style=style, end="")


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments or "{}"), dict)
    except ValueError:
        return False


def _reason(error: "openai.APIError") -> str:
    """The server's own words."""
    body = error.body
    if isinstance(body, dict) and "message" in body:
        return str(body["message"])
    return error.message
