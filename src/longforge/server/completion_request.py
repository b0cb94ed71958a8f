"""Body of POST /v1/completions."""

from typing import Annotated

from pydantic import Field, model_validator

from longforge.server.sampling_fields import MAX_TOP_LOGPROBS, Sampling

__all__ = ["MAX_ANSWERS", "CompletionRequest"]

MAX_ANSWERS = 256
"""Most answers of one request: prompts times n."""

Ids = Annotated[list[int], Field(strict=True)]


class CompletionRequest(Sampling):
    """Body of POST /v1/completions. Ids in `prompt` go to the model as they are."""

    prompt: str | list[int] | list[str] | list[Ids]
    max_tokens: int | None = Field(default=None, ge=0)
    """0 only with `echo`: nothing but the prompt is wanted."""
    echo: bool | None = None
    """Give the prompt back before the answer, with its log-probabilities if `logprobs` is set."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def limit(self) -> int:
        """Most tokens of an answer; 16 is the dialect's default."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts in order, each text or ids."""
        prompt = self.prompt
        if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
            return [prompt]  # pyright: ignore[reportReturnType] - a list that begins with an id holds ids
        return list(prompt)  # pyright: ignore[reportReturnType]

    @model_validator(mode="after")
    def _fits_together(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: expected at least 1 without echo, got 0")
        answers = len(self.prompts) * self.choices
        if answers > MAX_ANSWERS:
            raise ValueError(
                f"prompt: expected at most {MAX_ANSWERS} answers (prompts times n), got {answers}"
            )
        return self
