"""An answer in the Responses dialect: output items as they grow, and the response object around them."""

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from longforge.chat.parser import Delta
from longforge.server.seal import Seal

__all__ = ["Event", "ItemEvents", "new_id"]

Event = dict[str, Any]
Kind = Literal["reasoning", "message", "function_call"]

_PREFIXES: dict[Kind, str] = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


def new_id(prefix: str) -> str:
    """A fresh id of this dialect."""
    return f"{prefix}_{uuid.uuid4().hex}"


@dataclass
class ItemEvents:
    """Events of the output items, one item after the other; sequence numbers are the stream's to give.

    seal: gives thinking sealed too (None: not). drops_empty: a thought that was skipped is no item. version:
    of the weights that wrote last; the caller keeps it up to date.
    """

    seal: Seal | None = None
    drops_empty: bool = False
    version: int = 0
    output: list[dict[str, Any]] = field(default_factory=list)
    """The items so far; the last one may still be growing."""
    _open: Kind | None = None
    _text: str = ""
    _late: list[Delta] = field(default_factory=list)
    """What came while a call was open; it must not interleave."""

    def push(self, deltas: Iterable[Delta]) -> Iterator[Event]:
        """Events of the next deltas."""
        for delta in deltas:
            if self._open == "function_call" and delta.kind in ("thinking", "content"):
                self._late.append(delta)
                continue
            yield from self._one(delta)
            if delta.kind == "call_end":
                late, self._late = self._late, []
                yield from self.push(late)

    def finish(self, *, cut: bool) -> Iterator[Event]:
        """The end of the last item; cut: by a limit. An answer without any item gets an empty message."""
        late, self._late = self._late, []
        if late:
            yield from self._close("incomplete" if cut else "completed")
            yield from self.push(late)
        if not self.output:
            yield from self._start("message", {"role": "assistant", "content": []})
        yield from self._close("incomplete" if cut else "completed")

    def _one(self, delta: Delta) -> Iterator[Event]:
        if delta.kind == "call_start":
            assert delta.call is not None, "a call starts with its name"
            fields = {"call_id": delta.call.id, "name": delta.call.name, "arguments": ""}
            yield from self._start("function_call", fields)
        elif delta.kind == "call_arguments":
            yield from self._grow("response.function_call_arguments.delta", delta.text)
        elif delta.kind == "call_end":
            yield from self._close("completed")
        elif delta.kind == "content":
            if self._open != "message":
                yield from self._start("message", {"role": "assistant", "content": []})
            yield from self._grow("response.output_text.delta", delta.text, logprobs=[])
        else:
            if self._open != "reasoning":
                if self.drops_empty and not delta.text:
                    return
                yield from self._start("reasoning", {"summary": [], "content": []})
            if delta.text:
                yield from self._grow("response.reasoning_text.delta", delta.text)

    def _start(self, kind: Kind, fields: dict[str, Any]) -> Iterator[Event]:
        yield from self._close("completed")
        self._open, self._text = kind, ""
        item = {"id": new_id(_PREFIXES[kind]), "type": kind, "status": "in_progress", **fields}
        self.output.append(item)
        yield {"type": "response.output_item.added", "output_index": len(self.output) - 1, "item": dict(item)}
        if kind != "function_call":
            yield self._event("response.content_part.added", part=self._part(""))

    def _grow(self, kind: str, text: str, **fields: Any) -> Iterator[Event]:
        self._text += text
        yield self._event(kind, delta=text, **fields)

    def _close(self, status: Literal["completed", "incomplete"]) -> Iterator[Event]:
        if self._open is None:
            return
        item, kind, self._open = self.output[-1], self._open, None
        if kind == "function_call":
            item["arguments"] = self._text
            yield self._event("response.function_call_arguments.done", arguments=self._text)
        else:
            part = self._part(self._text, kind)
            item["content"] = [part]
            if kind == "message":
                yield self._event("response.output_text.done", text=self._text, logprobs=[])
            else:
                yield self._event("response.reasoning_text.done", text=self._text)
                if self.seal is not None:
                    item["encrypted_content"] = self.seal.wrap(self._text, self.version)
            yield self._event("response.content_part.done", part=part)
        item["status"] = status
        yield {"type": "response.output_item.done", "output_index": len(self.output) - 1, "item": dict(item)}

    def _part(self, text: str, kind: Kind | None = None) -> dict[str, Any]:
        if (kind or self._open) == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _event(self, kind: str, **fields: Any) -> Event:
        place = {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}
        if not kind.startswith("response.function_call"):
            place["content_index"] = 0
        return {"type": kind, **place, **fields}
