"""An answer whose thinking ends at a number of tokens: the model is then given the closing tag and goes on.

The answer is asked for in two legs. The first is the thinking, at most `budget` tokens; the second continues
from its prompt and tokens, which the prefix cache still holds. The closing tag is not sampled, so it is no
token of the answer.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from longforge.chat import Family, Tokenizer
from longforge.protocol import SamplingParams, StopReason
from longforge.server.answer import Answer, Part

__all__ = ["BudgetedAnswer"]

CLOSE: dict[Family, str] = {"m2": "</think>", "m3": "</mm:think>"}
BEFORE_CLOSE: dict[Family, str] = {"m2": "\n", "m3": ""}
AFTER_CLOSE: dict[Family, str] = {"m2": "\n\n", "m3": ""}
"""What the templates write around it."""
NEVER = -100.0
"""Added to the logit of what must not be sampled."""


class BudgetedAnswer:
    """The same as an `Answer`, for a prompt that leaves the model inside a thinking block.

    open_answer: makes an `Answer` of prompt ids and parameters, and takes its `goes_on`. budget: most
    tokens of thinking, at least 1. params: of the whole answer; its grammar is that of what follows the
    thinking. context: of the model. Errors: as `Answer`; of the second leg while the parts are read.
    """

    def __init__(
        self,
        open_answer: Callable[..., Answer],
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        budget: int,
        family: Family,
        tokenizer: Tokenizer,
        context: int,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.cached_tokens = 0
        self._open = open_answer
        self._params = params
        self._budget = min(budget, params.max_tokens)
        self._family: Family = family
        self._tokenizer = tokenizer
        self._room = context - len(prompt_ids)
        first = replace(params, max_tokens=self._budget, grammar=None)
        self._close_id: int | None = None
        if params.grammar is not None:  # it begins where the thinking ends, so the first leg must end there
            self._close_id = tokenizer.token_id(CLOSE[family])
            never = tuple((token, NEVER) for token in params.stop_token_ids)
            first = replace(
                first,
                stop_token_ids=(*first.stop_token_ids, self._close_id),
                logit_bias=(*first.logit_bias, *never),  # nor may the answer end in its thinking
            )
        self._answer = open_answer(prompt_ids, first)

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer."""
        return self._answer.stop_string

    def close(self) -> None:
        """Cancels the generation if it still runs."""
        self._answer.close()

    async def parts(self) -> AsyncIterator[Part]:
        """The parts of both legs in order; the last one has a reason."""
        sampled: list[int] = []
        text = ""
        async for part in self._answer.parts():
            self.cached_tokens = self._answer.cached_tokens
            sampled += [event.token_id for event in part.events]
            text += part.text
            if part.reason is None:
                yield part
                continue
            closing, closing_ids = self._closing(sampled, text)
            if not self._goes_on(part.reason, sampled, closing_ids):
                yield part
                return
            # Nothing was awaited since the first leg ended, so no other request took its place meanwhile.
            self._answer.close()
            self._answer = self._open(
                (*self.prompt_ids, *sampled, *closing_ids),
                replace(self._params, max_tokens=self._params.max_tokens - len(sampled)),
                goes_on=True,
            )
            pieces = [*part.pieces[:-1], part.pieces[-1] + closing]
            yield Part("".join(pieces), part.events, None, pieces)
        async for part in self._answer.parts():
            yield part

    def _closing(self, sampled: Sequence[int], text: str) -> tuple[str, list[int]]:
        """What ends the thinking: text that the parts still lack, and ids that the model still lacks."""
        close, after = CLOSE[self._family], AFTER_CLOSE[self._family]
        if self._close_id is not None and sampled[-1] == self._close_id:
            return close + after, self._tokenizer.encode(after)
        if close in text:
            return "", []
        by_force = BEFORE_CLOSE[self._family] + close + after
        return by_force, self._tokenizer.encode(by_force)

    def _goes_on(self, reason: StopReason, sampled: Sequence[int], closing_ids: Sequence[int]) -> bool:
        if self.stop_string is not None or len(sampled) >= self._params.max_tokens:
            return False
        if len(sampled) + len(closing_ids) >= self._room:
            return False
        if reason is StopReason.STOP:
            return self._close_id is not None and sampled[-1] == self._close_id
        return len(sampled) == self._budget
