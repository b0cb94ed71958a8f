"""The engine: requests in, tokens out, one step at a time.

    submit -> waiting -> let in: pages of its prefix are found -> the rest of the prompt in chunks
           -> one token a step, or several where drafts were right -> stop token | length | cancel -> pages go
           back, the full ones stay in the prefix cache

Not thread-safe: one thread owns an engine (in the server, `server.engine_loop`).
"""

import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from longforge.engine.draft_costs import GUESSED_COSTS, PLAIN, measured_costs
from longforge.engine.draft_length import DraftCosts
from longforge.engine.drafts import Drafter
from longforge.engine.page_mover import PageMover, TierSettings
from longforge.engine.pages import PagePool
from longforge.engine.prefix_cache import PrefixCache
from longforge.engine.request import EngineStats, GenerationRequest, RequestFailed, TokenEvent, check_request
from longforge.engine.results import Results, spans_of
from longforge.engine.runner import Runner, Stretch
from longforge.engine.sampler import TokenCounts
from longforge.engine.scheduler import Scheduler, Work
from longforge.engine.sequence import Sequence
from longforge.engine.tiers import TiersStats
from longforge.engine.weights import check_weights, copy_weights
from longforge.errors import EngineError, InputError
from longforge.model.causal_lm import CausalLM
from longforge.protocol import SamplingParams

if TYPE_CHECKING:
    # Compiling grammars takes a library that an engine without them does not need.
    from longforge.engine.grammar import Grammars

__all__ = ["Engine"]


class Engine:
    """Continuous batching over a pool of pages, with a prefix cache and speculative decoding.

    pages: pages in the pool, each of `model.config.block_size` tokens; together they also bound the context.
    max_running: most sequences that generate at once. max_batch_tokens: most tokens in one forward pass.
    prefix_cache: whether pages are kept for later prompts. drafts: most tokens that the model's MTP module
    guesses ahead, 0 to 3; 0 without a module. draft_costs: what decides how many are worth it. tiers: where
    pages are kept beside the pool. grammars: serves requests with a grammar; without it they are refused.
    cuda_graphs: whether small batches on a GPU run as CUDA graphs, where the model allows it.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        pages: int,
        max_running: int = 64,
        max_batch_tokens: int = 2048,
        prefix_cache: bool = True,
        drafts: int = 0,
        draft_costs: DraftCosts | None = None,
        tiers: TierSettings | None = None,
        grammars: "Grammars | None" = None,
        cuda_graphs: bool = True,
    ) -> None:
        _check_sizes(pages, max_running, max_batch_tokens, drafts)
        config = model.config
        if drafts and (not config.mtp_modules or config.has("lightning")):
            why = "none" if not config.mtp_modules else "layers whose state cannot be taken back"
            raise InputError(f"drafts: expected a model with an MTP module to guess with, it has {why}")
        self.config = config
        self.context = min(config.max_positions, pages * config.block_size)
        """Most tokens of one request, prompt and answer together."""
        self._grammars = grammars
        self._max_running = max_running
        self._caching = prefix_cache
        self._cache = PrefixCache(PagePool(pages), config.block_size)
        self._runner = Runner(
            model.eval(),
            pages=pages,
            max_running=max_running,
            context=self.context,
            drafts=drafts,
            cuda_graphs=cuda_graphs,
        )
        self._drafter = None
        if drafts:
            costs = draft_costs or GUESSED_COSTS
            self._drafter = Drafter(self._runner, drafts, costs, observe=draft_costs is None)
        wanted = prefix_cache and tiers is not None and (tiers.host_bytes or tiers.folder)
        self._mover = PageMover(tiers, self._runner, self._cache) if wanted and tiers else None
        self._scheduler = Scheduler(
            self._cache,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            spare=drafts,
            restore=self._mover and self._mover.restore,
            on_preempt=self._preempted,
        )
        self._results = Results(self._runner, model.version)
        self._sequences: dict[str, Sequence] = {}
        self.let_in: dict[str, float | None] = {}
        """Of the requests in the last step that had no token before it: when each was first let in, in
        seconds of `time.perf_counter`. Not in the events, which are the same each time."""
        self._arrivals = 0
        self._steps = self._prompt_tokens = self._cancelled = 0

    @property
    def version(self) -> int:
        """Version of the weights that the next token is sampled from."""
        return self._results.version

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._sequences)

    def check(self, request: GenerationRequest) -> None:
        """The checks of `submit` that need no state; may be called from any thread."""
        check_request(request, vocab_size=self.config.vocab_size, context=self.context)
        if request.params.grammar is not None:
            if self._grammars is None:
                raise InputError("grammar: this engine was made without a tokenizer, it serves no grammars")
            self._grammars.start(request.params.grammar)

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
        self._arrivals += 1
        sequence = Sequence(request, limit=limit, seed=seed, arrival=self._arrivals)
        if params.needs_counts:
            sequence.counts = TokenCounts(request.prompt_ids)
        if params.grammar is not None and self._grammars is not None:
            sequence.matcher = self._grammars.start(params.grammar)
        self._adopt(sequence)
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)

    def cancel(self, request_id: str) -> bool:
        """Forgets a request and gives its pages back at once. False if it is not (or no longer) here."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        self._scheduler.remove(sequence)
        self._cancelled += 1
        return True

    def step(self) -> list[TokenEvent | RequestFailed]:
        """One forward pass: new tokens in order of scheduling, several of a request where drafts were right.

        A request that fails by its own fault ends with RequestFailed, the others go on. Empty without work.
        """
        started = time.perf_counter()
        work = self._scheduler.schedule()
        self.let_in = {s.request.id: s.let_in for s, *_ in work if not s.generated}
        if not work:
            return []
        planned = time.perf_counter()
        self._steps += 1
        for item in work:
            self._show_pages(item.sequence)
        reported = any(item.sequence.request.report_blocks for item in work)
        blocks = list[Tensor]() if reported else None
        spans = spans_of(work)
        places = [row for span in spans for row in span.sampled]
        hidden = self._runner.run([_stretch(item) for item in work], places, blocks)
        prompts = self._count_prompts(work)
        events, ended = self._results.take(spans, hidden, blocks)
        if self._mover is not None and max(prompts, default=0) > 1:
            # Sampling waits for a GPU; what loading took, in `schedule`, is no prefill.
            self._mover.saw_prefill(sum(prompts), time.perf_counter() - planned)
        sequences = [item.sequence for item in work]
        if self._drafter is not None:
            self._drafter.propose(sequences, ended)
        for sequence in sequences:
            self._publish(sequence)
        for sequence in ended:
            del self._sequences[sequence.request.id]
            self._scheduler.remove(sequence)
        if self._drafter is not None and not ended:
            self._drafter.saw(work, time.perf_counter() - started)
        return events

    def swap_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Replaces all weights between two steps, all or nothing, and gives them `version`.

        state: the names and shapes of `model.state_dict()`, finite; version: above the present one. Cached
        pages of the old weights can never match again. Running requests keep theirs (keys and values of the
        old weights) to themselves and go on; each token they sample from now on carries the new version.
        Errors: EngineError for the version, CheckpointError for the tensors; then nothing has changed.
        """
        if version <= self.version:
            raise EngineError(f"weights version: expected more than the active {self.version}, got {version}")
        target = self._runner.model.state_dict()
        check_weights(state, target)
        copy_weights(state, target)
        self._runner.weights_changed()
        self._results.version = self._runner.model.version = version
        self.reset_cache()
        if self._mover is not None:
            self._mover.new_weights()
        for sequence in self._sequences.values():
            if sequence.row < 0:
                self._adopt(sequence)

    def reset_cache(self) -> int:
        """Forgets all cached pages of the pool; requests that run keep theirs to themselves, and the slower
        tiers theirs. Returns how many."""
        for sequence in self._scheduler.running:
            sequence.root = None
        return self._cache.forget()

    def close(self) -> None:
        """Lets pages that wait to be written to files get there."""
        if self._mover is not None:
            self._mover.close()

    def tier_stats(self) -> TiersStats | None:
        """What the slower tiers did; None without any."""
        return self._mover and self._mover.stats()

    def stats(self) -> EngineStats:
        """Counters and occupancy now."""
        results = self._results
        return EngineStats(
            version=self.version,
            running=len(self._scheduler.running),
            waiting=self._scheduler.waiting,
            pages=self._cache.pool.total,
            free_pages=self._cache.pool.free,
            context=self.context,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=results.generated_tokens,
            finished=results.finished,
            cancelled=self._cancelled,
            cached_pages=self._cache.pool.idle,
            preemptions=self._scheduler.preemptions,
            prefix_queried_tokens=self._scheduler.queried_tokens,
            prefix_hit_tokens=self._scheduler.hit_tokens,
            drafts=results.drafts,
            drafted_tokens=results.drafted_tokens,
            accepted_tokens=results.accepted_tokens,
            accepted_by_place=tuple(results.accepted_by_place),
            failed=results.failed,
        )

    def check_pages(self) -> None:
        """Asserts that free, cached and used pages are the pool, and that each is used by whom it says."""
        self._cache.pool.check(sequence.pages for sequence in self._scheduler.running)
        self._cache.check()

    def warm_up(self) -> None:
        """Runs short requests, so that the first real one does not pay for compilation, and measures what
        drafts cost, unless that was given. Forgets what is cached. The engine must be idle."""
        assert not self.has_work, "warm-up needs an idle engine"
        self.reset_cache()
        mover, self._mover = self._mover, None  # a step that compiles does not tell what prefill takes
        self._runner.warm_up()
        self._step_seconds()
        if self._drafter is not None and self._drafter.costs is GUESSED_COSTS:
            self._drafter.costs = PLAIN
            self._drafter.costs = measured_costs(
                self._runner, self._step_seconds(), self._cache.pool.total, self._max_running
            )
            self._drafter.forget()
        self._steps = self._prompt_tokens = 0
        self._results = Results(self._runner, self.version)
        self._mover = mover

    def _step_seconds(self) -> float:
        """Seconds of a step of one short request, alone: the lower quartile."""
        prompt = (0,) * max(1, min(self.config.block_size + 1, self.context - 32))
        params = SamplingParams(max_tokens=32, temperature=0.0)
        self.submit(GenerationRequest("warm-up", prompt, params, cache=False))
        seconds = []
        while self.has_work:
            started = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - started)
        return sorted(seconds)[len(seconds) // 4]

    def _adopt(self, sequence: Sequence) -> None:
        """Says where a sequence without pages will find and leave some: under the weights of now."""
        if self._caching and sequence.request.cache:
            sequence.root = (self.version, sequence.request.tenant)
            sequence.page_keys = []

    def _preempted(self, sequence: Sequence) -> None:
        sequence.drafting.pending = []
        self._adopt(sequence)

    def _publish(self, sequence: Sequence) -> None:
        before = sequence.published
        self._runner.replace_pages(sequence, self._scheduler.publish(sequence))
        if self._mover is not None:
            self._mover.keep(sequence, range(before, sequence.published))

    def _count_prompts(self, work: list[Work]) -> list[int]:
        """Prompt tokens of each that has some, before they are booked."""
        prompts = []
        for sequence, tokens, _, _ in work:
            left = len(sequence.request.prompt_ids) - sequence.computed
            if left > 0:
                prompts.append(min(tokens, left))
        self._prompt_tokens += sum(prompts)
        return prompts

    def _show_pages(self, sequence: Sequence) -> None:
        let_in = sequence.shown == 0
        sequence.shown = self._runner.show_pages(sequence, sequence.shown)
        if let_in and self._drafter is not None:
            self._drafter.begin(sequence)


def _stretch(item: Work) -> Stretch:
    sequence, _, drafts, _ = item
    ids = sequence.ids[sequence.computed : sequence.computed + item.tokens].tolist()
    return Stretch(sequence, sequence.computed, ids + list(drafts) if drafts else ids)


def _check_sizes(pages: int, max_running: int, max_batch_tokens: int, drafts: int) -> None:
    sizes = {"pages": pages, "max_running": max_running, "max_batch_tokens": max_batch_tokens}
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")
    if max_batch_tokens < max_running:
        raise InputError(
            f"max_batch_tokens: expected at least max_running ({max_running}), got {max_batch_tokens}"
        )
    if not 0 <= drafts <= 3:
        raise InputError(f"drafts: expected 0 to 3, got {drafts}")
