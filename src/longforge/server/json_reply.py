"""A JSON reply that can carry whatever a request or a model may have put into a string."""

from typing import Any

from fastapi.responses import JSONResponse

from longforge.server.wire_bytes import json_bytes

__all__ = ["JsonReply"]


class JsonReply(JSONResponse):
    """Half a surrogate pair in a string stays an escape instead of failing the reply."""

    def render(self, content: Any) -> bytes:
        """The body as bytes."""
        return json_bytes(content)
