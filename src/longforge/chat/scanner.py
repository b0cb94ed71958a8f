"""Text that comes in pieces, searched for tags without looking at any of it twice."""

import re
from re import Match

from longforge.chat.syntax import Marks

__all__ = ["Scanner"]

_SPACE = re.compile(r"\s*")


class Scanner:
    """A window on a text: what has come and is not dealt with. It stays as short as half a tag."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        """What lies before is dealt with."""
        self.final = False
        """Nothing more will come."""

    @property
    def empty(self) -> bool:
        """Whether all that came is dealt with."""
        return self.at >= len(self.text)

    @property
    def rest(self) -> str:
        """What came and is not dealt with."""
        return self.text[self.at :]

    def push(self, text: str) -> None:
        """More of the text."""
        self.text = self.text[self.at :] + text
        self.at = 0

    def drop(self) -> None:
        """Forget what came and is not dealt with."""
        self.text = self.text[: self.at]

    def back(self, text: str) -> None:
        """Return to before `text`, which was the last to be dealt with."""
        start = self.at - len(text)
        if start >= 0:
            self.at = start
        else:  # a part of it has left the window
            self.text = text + self.rest
            self.at = 0

    def until(self, marks: Marks) -> tuple[str, Match[str] | None]:
        """The text before the next of `marks`, and that mark; None: it is not whole yet.

        Stands before the mark, or before what could still become one.
        """
        match = marks.whole.search(self.text, self.at)
        if match is not None:
            end = match.start()
        else:
            half = None if self.final else marks.partial.search(self.text, self.at)
            end = len(self.text) if half is None else half.start()
        text = self.text[self.at : end]
        self.at = end
        return text, match

    def space(self) -> str:
        """The whitespace that stands here, passed over."""
        match = _SPACE.match(self.text, self.at)
        assert match is not None, "no whitespace matches too"
        self.at = match.end()
        return match[0]

    def here(self, marks: Marks) -> tuple[bool, Match[str] | None]:
        """The mark that stands here, if it is whole; and whether one stands here or still may."""
        match = marks.whole.match(self.text, self.at)
        if match is not None:
            return True, match
        if self.empty:
            return True, None
        return not self.final and marks.partial.match(self.text, self.at) is not None, None
