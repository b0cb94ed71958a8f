"""From a model folder to a running server."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from longforge.chat import Tokenizer
from longforge.chat.tokens import EOS
from longforge.engine import Engine
from longforge.engine.grammar import Grammars
from longforge.engine.page_mover import TierSettings
from longforge.errors import CheckpointError, EngineError, InputError
from longforge.kernels.host_memory import keep_freed_memory
from longforge.model import CausalLM, KVCache, ModelConfig, shipped
from longforge.model.checkpoint import config_of
from longforge.server.app import create_app
from longforge.server.banner import Features, ServerFacts, banner, draining
from longforge.server.cores import free_cores
from longforge.server.engine_loop import EngineLoop
from longforge.server.front_door import LOOPBACK_HOSTS, Door
from longforge.server.keys import ApiKeys
from longforge.server.placement import choose_placement
from longforge.server.running import Drain, bind, run_server, url_of
from longforge.server.settings import ServeSettings

__all__ = [
    "DEFAULT_DRAFTS",
    "chosen_drafts",
    "default_pages",
    "load",
    "model_folder",
    "serve",
    "served_hosts",
]

KEY_VARIABLE = "LONGFORGE_API_KEY"

POOL_REQUESTS = 16
"""The default pool holds this many requests that fill the context, if they fit POOL_BYTES."""

POOL_BYTES = 4 * 2**30

DEFAULT_DRAFTS = 0
"""Most tokens guessed ahead where nothing else was asked for and the model has a module to guess with."""


def serve(settings: ServeSettings) -> None:
    """Serves a model folder until Ctrl-C or SIGTERM.

    Prints where it is when it is ready, the URL in the first line. Errors: InputError for a port in use or a
    bad number, ConfigError for the keys, CheckpointError for the folder, all before anything is served;
    EngineError when the engine has failed, after open requests were told.
    """
    door = Door(
        ApiKeys.load(settings.api_key_file, os.environ.get(KEY_VARIABLE)),
        served_hosts(settings.host, settings.allowed_hosts),
        settings.max_body_bytes,
    )
    listener = bind(settings.host, settings.port)  # first: a port in use is told before a model is loaded
    try:
        cores = free_cores()
        threads = cores.free if settings.threads is None else settings.threads
        engine_loop, tokenizer, model_name = load(replace(settings, threads=threads))
    except BaseException:
        listener.close()
        raise
    facts = _facts(
        settings,
        engine_loop,
        model=model_name,
        url=url_of(listener),
        threads_why=cores.why if settings.threads is None else "as asked",
        api_keys=len(door.keys.digests),
    )
    app = create_app(engine_loop, tokenizer, model_name, door=door)
    drain = Drain(
        engine_loop.drain,
        lambda: engine_loop.open_requests == 0,
        settings.drain_seconds,
        tell=lambda: print(draining(engine_loop.open_requests, settings.drain_seconds), flush=True),
    )
    run_server(
        app,
        listener,
        on_ready=lambda: print(banner(facts), flush=True),
        on_stop=engine_loop.stop,
        drain=drain,
        failed=lambda: engine_loop.crashed,
    )
    if engine_loop.crashed:
        raise EngineError("engine: it has failed, see above; the server has ended, start it again")
    engine_loop.engine.close()  # its thread has ended


def served_hosts(host: str, more: Sequence[str]) -> frozenset[str] | None:
    """The names that requests may give a server that listens on `host`; None for any.

    On a loopback address only its own, so that a web page cannot reach the server under a name that it lets
    point there. Elsewhere any, unless some are named.
    """
    named = frozenset(name.lower() for name in more)
    if _is_loopback(host):
        return LOOPBACK_HOSTS | {host} | named
    return named or None


def load(settings: ServeSettings) -> tuple[EngineLoop, Tokenizer, str]:
    """A warm engine in its loop (not started), the tokenizer and the model's name."""
    keep_freed_memory()
    folder = model_folder(settings.model)
    threads = free_cores().free if settings.threads is None else settings.threads
    torch.set_num_threads(threads)
    tokenizer = Tokenizer.load(folder)
    try:
        tokenizer.token_id(EOS)  # every request stops at it: told now, not at the first one
    except InputError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    placement = choose_placement(folder, settings.device, settings.dtype)
    causal_lm = CausalLM.from_pretrained(folder, placement.dtype, placement.device)
    if settings.context is not None:
        causal_lm.config = replace(causal_lm.config, max_positions=settings.context)
    config = causal_lm.config
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}"
        )
    pages, tiers = settings.pages, _tiers(settings)
    if pages is not None:
        needed = pages * KVCache(config, 1, "meta", causal_lm.dtype).bytes
        _check_memory(needed, f"pages: expected at most {{}}, got {pages} pages of {{}} together")
    _check_memory(tiers.host_bytes, "host cache: expected at most {}, got {}")
    engine = Engine(
        causal_lm,
        pages=default_pages(config, causal_lm.dtype) if pages is None else pages,
        max_running=settings.max_running,
        max_batch_tokens=max(2048, settings.max_running),
        drafts=chosen_drafts(settings.drafts, config),
        tiers=tiers,
        grammars=Grammars(tokenizer, config.vocab_size),
    )
    engine.warm_up()
    loop = EngineLoop(
        engine, threads=threads, max_requests=settings.max_requests, max_tokens=settings.max_queued_tokens
    )
    return loop, tokenizer, settings.name or folder.resolve().name


def model_folder(model: str | Path | None) -> Path:
    """The folder of a model, None being the shipped one. CheckpointError where there is none."""
    folder = shipped.path() if model is None else Path(model)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a model folder, there is none")
    return folder


def chosen_drafts(asked: int | None, config: ModelConfig) -> int:
    """Most tokens that are guessed ahead; without asking DEFAULT_DRAFTS, or none where the model cannot.

    Whether it can do what was asked, the engine says.
    """
    if asked is not None:
        return asked
    return DEFAULT_DRAFTS if config.mtp_modules and not config.has("lightning") else 0


def _facts(
    settings: ServeSettings, loop: EngineLoop, *, model: str, url: str, threads_why: str, api_keys: int
) -> ServerFacts:
    """What the banner tells of a server that is ready."""
    folder, config = model_folder(settings.model), loop.engine.config
    keyless = None if api_keys else settings.host
    return ServerFacts(
        model=model,
        url=url,
        context=loop.engine.context,
        pages=loop.stats().pages,
        page_tokens=config.block_size,
        threads=torch.get_num_threads(),
        threads_why=threads_why,
        placement=str(choose_placement(folder, settings.device, settings.dtype)),
        features=_features(config, settings.drafts, _tiers(settings), api_keys),
        notices=_notices(config_of(folder).max_positions, settings.context, keyless),
    )


def _tiers(settings: ServeSettings) -> TierSettings:
    return TierSettings(settings.host_cache_bytes, settings.file_cache, settings.file_cache_bytes)


def _features(config: ModelConfig, drafts: int | None, tiers: TierSettings, api_keys: int) -> Features:
    """What `load` switches on."""
    places = [
        (tiers.host_bytes > 0, f"host memory {tiers.host_bytes / 2**30:g} GiB"),
        (tiers.folder is not None, f"files {tiers.file_bytes / 2**30:g} GiB"),
    ]
    return Features(
        sparse_blocks=config.top_k_blocks if config.has("sparse") else 0,
        prefix_cache=True,
        draft_tokens=chosen_drafts(drafts, config),
        constrained=True,
        tiers=tuple(place for on, place in places if on),
        api_keys=api_keys,
    )


def _notices(trained: int, context: int | None, keyless: str | None) -> tuple[str, ...]:
    """trained: positions that the model was made for. keyless: the address, where no API key is asked for."""
    notices = []
    if context is not None and context > trained:
        notices.append(
            f"the model was made for {trained:,} positions; beyond them its answers may be of no use"
        )
    if keyless is not None and not _is_loopback(keyless):
        notices.append(
            f"whoever reaches {keyless} may use this server; --api-key-file makes it ask for API keys"
        )
    return tuple(notices)


def _is_loopback(host: str) -> bool:
    return host in LOOPBACK_HOSTS or host == "::1" or host.startswith("127.")


def default_pages(config: ModelConfig, dtype: torch.dtype = torch.float32) -> int:
    """Pages for POOL_REQUESTS requests that fill the context, or as many as POOL_BYTES hold."""
    wanted = POOL_REQUESTS * -(-config.max_positions // config.block_size)
    page_bytes = KVCache(config, 1, "meta", dtype).bytes
    return max(1, min(wanted, POOL_BYTES // page_bytes))


def _check_memory(needed: int, message: str) -> None:
    """InputError for more bytes than this machine's memory. message: with a place for either."""
    held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > held:
        raise InputError(message.format(*(f"{size / 2**30:.1f} GiB" for size in (held, needed))))
