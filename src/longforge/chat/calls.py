"""One tool call read tag by tag: the inverse of `format.py`."""

import re
from re import Match

from longforge.chat.arguments import ArgumentWriter
from longforge.chat.scanner import Scanner
from longforge.chat.schema import Schema
from longforge.chat.syntax import SYNTAX
from longforge.chat.tokens import CALL_PREFIX, Family
from longforge.protocol import ToolCall

__all__ = ["INVOKE", "CallReader"]

INVOKE = re.compile(r'invoke\s+name="([^"]*)"\s*')
_PARAMETER = re.compile(r'parameter\s+name="([^"]+)"\s*')
_ELIDED = re.compile(rf"\s*({re.escape(CALL_PREFIX)})?")


class CallReader:
    """Reads from behind `<invoke name="...">` to the end of the call.

    A tag inside a text argument may be the text's own, and only what follows tells. Then it is kept back,
    with what follows it, until a later tag decides: one that closes the argument makes it text, one that can
    only stand outside makes it what it looked like.
    """

    def __init__(self, family: Family, name: str, schema: object) -> None:
        self.name = name
        self.ended = False
        self.cut_off = False
        """Whether only the end of the text ended the call."""
        self._family = family
        self._syntax = SYNTAX[family]
        self._arguments = ArgumentWriter(family, Schema(schema))
        self._doubtful: list[str] = []  # a tag that may be text, and what follows it
        self._doubtful_body = ""

    def step(self, scanner: Scanner) -> bool:
        """Go on by one tag; False when that needs more text."""
        in_value = self._arguments.in_value
        text, tag = scanner.until(self._syntax.value if in_value else self._syntax.outside)
        if self._doubtful:
            self._doubtful.append(text)
        else:
            self._arguments.add(text)
        if tag is None:
            return False
        if not in_value:
            passed = self._outside(tag)
        elif self._doubtful:
            passed = self._after_doubtful(tag, scanner)
        else:
            passed = self._inside(tag)
        if passed:
            scanner.at = tag.end()
        return True

    def cut(self, scanner: Scanner) -> None:
        """The text ended inside the call: all that is open ends here. Half a tag at its end is no text."""
        if self._doubtful or not self._arguments.in_text or self._is_half_a_tag(scanner.rest):
            scanner.drop()
        scanner.final = True
        while not self.ended and (self.step(scanner) or self._doubtful):
            if not self.ended and self._doubtful and scanner.empty:
                self._settle(scanner)
        if not self.ended:
            self.cut_off = True
            self._end(whole=False)

    def take(self) -> str:
        """The JSON of arguments since the last time."""
        return self._arguments.take()

    def call(self) -> ToolCall:
        """The call, when it has ended and its JSON is taken."""
        return ToolCall(self.name, self._arguments.arguments())

    def stray(self) -> str:
        """Text inside the call that is none of its arguments."""
        return "".join(self._arguments.stray)

    def _outside(self, tag: Match[str]) -> bool:
        """A tag with no argument open. Whether it is dealt with; a tag that ends the call is not passed."""
        body = tag["body"]
        if tag["slash"]:
            if body == "invoke" or body == self._syntax.block:
                self._end()
                return body == "invoke"
            self._close_nothing(tag)
            return True
        name = self._name_of(body)
        if name is None:
            self._end()
            return False
        opened = self._arguments.open(name)
        assert opened, "where no argument is open, one can begin"
        return True

    def _close_nothing(self, tag: Match[str]) -> None:
        """A closing tag of no open argument: of one whose opening tag the model left out, or of nothing."""
        arguments = self._arguments
        if tag[0].startswith("<"):
            arguments.add("" if arguments.run_is_blank else tag[0])
        elif arguments.run_is_blank or arguments.has(tag["body"]):
            arguments.end_run()
        else:
            run = arguments.take_run()
            start = _ELIDED.match(run)
            assert start is not None, "an empty match is one too"
            arguments.open(tag["body"])
            arguments.add(run[start.end() :])
            arguments.close()

    def _inside(self, tag: Match[str]) -> bool:
        """A tag inside an argument. Whether it is dealt with."""
        body, arguments = tag["body"], self._arguments
        if tag["slash"]:
            return self._close_inside(body, tag[0])
        if self._family == "m2":
            arguments.add(tag[0])
        elif self._name_of(body) is None:
            self._end()
            return False
        elif not arguments.open(body):
            if arguments.in_text and arguments.misses(body):
                arguments.close()
                arguments.open(body)
            else:
                arguments.add(tag[0])
        return True

    def _close_inside(self, body: str, tag: str) -> bool:
        if self._closes(body):
            self._close(body, tag)
        elif self._arguments.in_text:
            self._doubt(body, tag)
        elif self._ends(body):
            self._end()
            return body == "invoke"
        return True

    def _after_doubtful(self, tag: Match[str], scanner: Scanner) -> bool:
        """A tag behind one that may be text. Whether it is dealt with."""
        body, slash = tag["body"], bool(tag["slash"])
        end_is_doubtful = self._ends(self._doubtful_body)
        if slash and (self._closes(body) or not (end_is_doubtful or self._ends(body))):
            self._arguments.add("".join(self._doubtful))
            self._doubtful.clear()
            return self._close_inside(body, tag[0])
        closes_block = self._doubtful_body == "invoke" and body == self._syntax.block
        if end_is_doubtful and (not closes_block if slash else self._name_of(body) is not None):
            self._doubtful.append(tag[0])
            return True
        self._settle(scanner)
        return False

    def _settle(self, scanner: Scanner) -> None:
        """The doubtful tag is a tag: it closes its argument, or stands outside all of them."""
        if self._ends(self._doubtful_body):
            while self._arguments.in_value:
                self._arguments.close()
            scanner.back("".join(self._doubtful))
        else:
            self._arguments.close()
            scanner.back("".join(self._doubtful[1:]))
        self._doubtful.clear()

    def _doubt(self, body: str, tag: str) -> None:
        self._doubtful = [tag]
        self._doubtful_body = body

    def _ends(self, body: str) -> bool:
        """Whether a closing tag ends the call or its block."""
        return body == "invoke" or body == self._syntax.block

    def _closes(self, body: str) -> bool:
        """Whether a closing tag closes an open argument."""
        return body == "parameter" if self._family == "m2" else body in self._arguments.open_names

    def _close(self, body: str, tag: str) -> None:
        """Closes an argument and what is open inside it. M2's tag names none, so it may be the text's own."""
        if self._family == "m3":
            for _ in range(self._arguments.open_names.index(body) + 1):
                self._arguments.close()
        elif self._arguments.in_text:
            self._doubt(body, tag)
        else:
            self._arguments.close()

    def _name_of(self, body: str) -> str | None:
        """The argument that an opening tag opens; None: it opens none, but a call or a block."""
        if self._family == "m2":
            match = _PARAMETER.fullmatch(body)
            return match[1] if match else None
        return None if body == self._syntax.block or INVOKE.fullmatch(body) else body

    def _is_half_a_tag(self, rest: str) -> bool:
        """Whether a text argument was going to be closed when the text ended."""
        if self._family == "m3":
            return rest.startswith(CALL_PREFIX)
        endings = ("</parameter>", "</invoke>", f"</{self._syntax.block}>")
        return any(ending.startswith(rest) for ending in endings)

    def _end(self, *, whole: bool = True) -> None:
        self._arguments.end(whole=whole)
        self.ended = True
