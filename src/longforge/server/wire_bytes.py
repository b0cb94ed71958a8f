"""Bodies as bytes."""

import json
from typing import Any

__all__ = ["json_bytes", "named_sse"]


def json_bytes(body: Any) -> bytes:
    """JSON on the wire. Half a surrogate pair, which a model may write into arguments, stays an escape."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def named_sse(event: dict[str, Any]) -> bytes:
    """One server-sent event, named by its type."""
    return f"event: {event['type']}\ndata: ".encode() + json_bytes(event) + b"\n\n"
