"""From a model folder to a running server."""

import os
from pathlib import Path

import torch

from longforge.chat import Tokenizer
from longforge.chat.tokens import EOS
from longforge.engine import Engine
from longforge.errors import CheckpointError, InputError
from longforge.kernels.host_memory import keep_freed_memory
from longforge.model import CausalLM, KVCache, ModelConfig, shipped
from longforge.server.app import create_app
from longforge.server.engine_loop import EngineLoop
from longforge.server.running import bind, run_server, url_of

__all__ = ["default_pages", "load", "serve"]

POOL_REQUESTS = 16
"""The default pool holds this many requests that fill the context, if they fit POOL_BYTES."""

POOL_BYTES = 4 * 2**30


def serve(
    model: str | Path | None = None,
    *,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    threads: int | None = None,
    pages: int | None = None,
    max_running: int = 64,
) -> None:
    """Serves a model folder (None: the shipped demo model) until Ctrl-C or SIGTERM.

    name: the model's name in requests (None: the folder's). port: 0 picks a free one. threads: CPU threads
    (None: as torch finds). pages: pages in the pool. Prints one line with the URL when it is ready. Errors:
    InputError for a port in use or a bad number, CheckpointError for the folder; before anything is served.
    """
    listener = bind(host, port)  # first, so that a port in use is told before a model is loaded
    try:
        engine_loop, tokenizer, model_name = load(
            model, name=name, threads=threads, pages=pages, max_running=max_running
        )
    except BaseException:
        listener.close()
        raise
    engine = engine_loop.engine

    def announce() -> None:
        print(
            f"longforge serves {model_name} at {url_of(listener)}/v1 "
            f"(context {engine.context}, {engine.stats().pages} pages of {engine.config.block_size} tokens, "
            f"{torch.get_num_threads()} threads); Ctrl-C stops it",
            flush=True,
        )

    app = create_app(engine_loop, tokenizer, model_name)
    run_server(app, listener, on_ready=announce, on_stop=engine_loop.stop)


def load(
    model: str | Path | None = None,
    *,
    name: str | None = None,
    threads: int | None = None,
    pages: int | None = None,
    max_running: int = 64,
) -> tuple[EngineLoop, Tokenizer, str]:
    """A warm engine in its loop (not started), the tokenizer and the model's name; arguments of `serve`."""
    keep_freed_memory()
    if threads is not None:
        if threads < 1:
            raise InputError(f"threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)
    folder = shipped.path() if model is None else Path(model)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a model folder, there is none")
    tokenizer = Tokenizer.load(folder)
    try:
        tokenizer.token_id(EOS)  # every request stops at it: told now, not at the first one
    except InputError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    causal_lm = CausalLM.from_pretrained(folder)
    config = causal_lm.config
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}"
        )
    if pages is not None:
        _check_memory(pages, config, causal_lm.dtype)
    engine = Engine(
        causal_lm,
        pages=default_pages(config, causal_lm.dtype) if pages is None else pages,
        max_running=max_running,
        max_batch_tokens=max(2048, max_running),
    )
    engine.warm_up()
    return EngineLoop(engine, threads=threads), tokenizer, name or folder.resolve().name


def default_pages(config: ModelConfig, dtype: torch.dtype = torch.float32) -> int:
    """Pages for POOL_REQUESTS requests that fill the context, or as many as POOL_BYTES hold."""
    wanted = POOL_REQUESTS * -(-config.max_positions // config.block_size)
    page_bytes = KVCache(config, 1, "meta", dtype).bytes
    return max(1, min(wanted, POOL_BYTES // page_bytes))


def _check_memory(pages: int, config: ModelConfig, dtype: torch.dtype) -> None:
    """InputError for a pool that is larger than this machine's memory."""
    needed = pages * KVCache(config, 1, "meta", dtype).bytes / 2**30
    held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if needed > held:
        raise InputError(
            f"pages: expected at most {held:.1f} GiB, got {pages} pages of {needed:.1f} GiB together"
        )
