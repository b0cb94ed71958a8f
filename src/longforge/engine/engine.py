"""The engine: requests in, tokens out, one step at a time.

    submit -> waiting -> [admitted: pages for the longest possible answer] -> prompt in chunks -> one token a
    step
           -> stop token | length | cancel -> pages go back

Not thread-safe: one thread owns an engine (in the server, `server.engine_loop`).
"""

import secrets
from collections.abc import Mapping

from torch import Tensor

from longforge.engine.pages import PageAllocator
from longforge.engine.request import EngineStats, GenerationRequest, TokenEvent, check_request
from longforge.engine.runner import Runner
from longforge.engine.sampler import Row, Sampled, TokenCounts, sample
from longforge.engine.scheduler import Scheduler, Sequence, Work
from longforge.engine.weights import check_weights, copy_weights
from longforge.errors import EngineError, InputError
from longforge.model.causal_lm import CausalLM
from longforge.protocol import SamplingParams, StopReason

__all__ = ["Engine"]


class Engine:
    """Continuous batching over a pool of pages.

    pages: pages in the pool, each of `model.config.block_size` tokens; together they also bound the context.
    max_running: most sequences that generate at once. max_batch_tokens: most tokens in one forward pass.
    """

    def __init__(
        self, model: CausalLM, *, pages: int, max_running: int = 64, max_batch_tokens: int = 2048
    ) -> None:
        for name, value in (
            ("pages", pages),
            ("max_running", max_running),
            ("max_batch_tokens", max_batch_tokens),
        ):
            if value < 1:
                raise InputError(f"{name}: expected at least 1, got {value}")
        if max_batch_tokens < max_running:
            raise InputError(
                f"max_batch_tokens: expected at least max_running ({max_running}), got {max_batch_tokens}"
            )
        self.config = model.config
        self.context = min(model.config.max_positions, pages * model.config.block_size)
        """Most tokens of one request, prompt and answer together."""
        self._pages = PageAllocator(pages)
        self._scheduler = Scheduler(
            self._pages,
            block_size=model.config.block_size,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
        )
        self._runner = Runner(model.eval(), pages=pages, max_running=max_running, context=self.context)
        self._sequences: dict[str, Sequence] = {}
        self._counts: dict[str, TokenCounts] = {}  # of the requests with penalties
        self._version = int(model.version)
        self._steps = self._prompt_tokens = self._generated_tokens = self._finished = self._cancelled = 0

    @property
    def version(self) -> int:
        """Version of the weights that the next token is sampled from."""
        return self._version

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._sequences)

    def check(self, request: GenerationRequest) -> None:
        """The checks of `submit` that need no state; may be called from any thread."""
        check_request(request, vocab_size=self.config.vocab_size, context=self.context)

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request.

        Without a seed it gets a random one. The answer ends at `max_tokens` or where the context is full.
        Errors: InputError for a parameter, a token id or an id in use; ContextOverflow for a prompt too long.
        """
        self.check(request)
        if request.id in self._sequences:
            raise InputError(f"request id: expected one not in use, got {request.id!r}")
        params = request.params
        limit = min(len(request.prompt_ids) + params.max_tokens, self.context)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        sequence = Sequence(request, limit=limit, seed=seed)
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)
        if params.needs_counts:
            self._counts[request.id] = TokenCounts(request.prompt_ids)

    def cancel(self, request_id: str) -> bool:
        """Forgets a request and gives its pages back at once. False if it is not (or no longer) here."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        self._counts.pop(request_id, None)
        self._scheduler.remove(sequence)
        self._cancelled += 1
        return True

    def step(self) -> list[TokenEvent]:
        """One forward pass: at most one new token per request, in order of scheduling. Empty without work."""
        work, admitted = self._scheduler.schedule()
        for sequence in admitted:
            self._runner.enter(sequence)
        if not work:
            return []
        logits = self._runner.run(work)
        sampling = self._count(work)
        if not sampling:
            return []
        sampled = sample(logits, [self._row(sequence) for sequence in sampling])
        if any(sampled.failed):
            raise EngineError("logits: expected finite numbers, got NaN or infinity; the weights are broken")
        return [self._accept(sequence, sampled, row) for row, sequence in enumerate(sampling)]

    def swap_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Replaces all weights between two steps, all or nothing, and gives them `version`.

        state: the names and shapes of `model.state_dict()`, finite; version: above the present one. Running
        requests keep their pages (keys and values of the old weights) and go on; each token they sample from
        now on carries the new version. Errors: EngineError for the version, CheckpointError for the tensors;
        then nothing has changed.
        """
        if version <= self._version:
            raise EngineError(
                f"weights version: expected more than the active {self._version}, got {version}"
            )
        target = self._runner.model.state_dict()
        check_weights(state, target)
        copy_weights(state, target)
        self._version = self._runner.model.version = version

    def stats(self) -> EngineStats:
        """Counters and occupancy now."""
        return EngineStats(
            version=self._version,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            pages=self._pages.total,
            free_pages=self._pages.free,
            context=self.context,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            finished=self._finished,
            cancelled=self._cancelled,
        )

    def check_pages(self) -> None:
        """Asserts that every page is free or owned by exactly one running request."""
        self._pages.check(sequence.pages for sequence in self._scheduler.running)

    def warm_up(self) -> None:
        """Runs a short request, so that the first real one does not pay for compilation.

        Engine must be idle.
        """
        assert not self.has_work, "warm-up needs an idle engine"
        prompt = (0,) * max(1, min(self.config.block_size + 1, self.context - 2))
        self.submit(GenerationRequest("warm-up", prompt, SamplingParams(max_tokens=2, temperature=0.0)))
        while self.has_work:
            self.step()
        self._steps = self._prompt_tokens = self._generated_tokens = self._finished = 0

    def _count(self, work: list[Work]) -> list[Sequence]:
        """Books the computed tokens and returns the sequences that sample now."""
        self._steps += 1
        for item in work:
            if not item.sequence.generated:
                self._prompt_tokens += item.tokens
            item.sequence.computed += item.tokens
        return [item.sequence for item in work if item.samples]

    def _row(self, sequence: Sequence) -> Row:
        request = sequence.request
        counts = self._counts.get(request.id)
        return Row(request.params, sequence.seed, sequence.known, sequence.generated, counts)

    def _accept(self, sequence: Sequence, sampled: Sampled, row: int) -> TokenEvent:
        token = sampled.token_ids[row]
        sequence.last_token = token
        sequence.generated += 1
        if sequence.request.id in self._counts:
            self._counts[sequence.request.id].add(token)
        self._generated_tokens += 1
        reason: StopReason | None = None
        if token in sequence.stops:
            reason = StopReason.STOP
        elif sequence.known >= sequence.limit:
            reason = StopReason.LENGTH
        if reason is not None:
            del self._sequences[sequence.request.id]
            self._counts.pop(sequence.request.id, None)
            self._scheduler.remove(sequence)
            self._finished += 1
        return TokenEvent(
            sequence.request.id,
            token,
            sampled.logprobs[row],
            self._version,
            sampled.top_logprobs[row],
            reason,
        )
