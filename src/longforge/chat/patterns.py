"""Regular expressions of JSON schemas, as the grammar's dialect writes them."""

import re

from longforge.errors import InputError

__all__ = ["whole_text_pattern"]

_PIECE = re.compile(r"\\.|\[\^?\]?|[^\\]", re.DOTALL)
# A schema's classes are of ASCII (ECMA 262); the grammar's are of all of Unicode.
_CLASSES = {r"\d": "0-9", r"\w": "A-Za-z0-9_"}


def whole_text_pattern(pattern: str, where: str) -> str:
    """A pattern of all texts in which `pattern` is found. It can stand between slashes.

    Anchors may stand at the ends of the whole pattern only. Errors: InputError for others.
    """
    body = pattern.removeprefix("^")
    prefix = "" if body != pattern else "(?s:.*)"
    suffix = "(?s:.*)"
    if body.endswith("$") and not _odd_backslashes(body[:-1]):
        body, suffix = body[:-1], ""
    pieces, anchored, branches = _translated(body)
    if anchored or (branches and not (prefix and suffix)):
        raise InputError(f"{where}: pattern {pattern!r:.80}: anchors are supported at its ends only")
    return f"{prefix}(?:{pieces}){suffix}"


def _odd_backslashes(text: str) -> bool:
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1


def _translated(body: str) -> tuple[str, bool, bool]:
    """The pattern, whether it has an anchor inside, and whether it has alternatives outside all groups."""
    out: list[str] = []
    anchored = branches = in_class = False
    depth = 0
    for match in _PIECE.finditer(body):
        piece = match[0]
        if piece.lower() in _CLASSES:
            inside = _CLASSES[piece.lower()]
            negated = piece[1].isupper()
            if negated and in_class:
                anchored = True  # cannot be said; refused like an anchor
            out.append(inside if in_class else f"[{'^' if negated else ''}{inside}]")
            continue
        if in_class:
            in_class = piece != "]"
            piece = rf"\{piece}" if piece[0] == "[" else piece
        elif piece[0] == "[":
            in_class = True
        else:
            anchored = anchored or piece in ("^", "$", r"\b", r"\B", r"\A", r"\Z", r"\z")
            depth += (piece == "(") - (piece == ")")
            branches = branches or (piece == "|" and depth == 0)
        out.append({"/": r"\/", "\n": r"\n"}.get(piece, piece))
    return "".join(out), anchored, branches
