"""Our engine behind its server, against the same engine stepped in this process: what HTTP costs."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import torch

from longforge.bench import serve_client
from longforge.bench.serve_ours import engine_for, generate, random_prompts
from longforge.bench.serve_rates import decode_rate, in_turns
from longforge.bench.serve_rows import Row
from longforge.bench.serve_setting import Setting, say
from longforge.errors import CheckError
from longforge.server.app import create_app
from longforge.server.engine_loop import EngineLoop
from longforge.server.running import BackgroundServer

__all__ = ["http"]


def http(s: Setting) -> Iterator[list[Row]]:
    """Tokens a second of streamed answers, counted where they arrive: in a client process on this machine."""
    if s.tokenizer is None:
        say("http: left out, the folder has no tokenizer")
        return
    switching = sys.getswitchinterval()
    try:
        for batch in s.options.batches:
            if s.out_of_time(f"http, batch {batch}"):
                return
            yield [_http(s, batch)]
    finally:
        sys.setswitchinterval(switching)  # a server sets its own


def _http(s: Setting, batch: int) -> Row:
    options, dtype = s.options, s.options.dtypes[0]
    model, tokenizer = s.models[dtype], s.tokenizer
    assert tokenizer is not None, "looked at before"
    prompts = random_prompts(model, batch, options.prompt, seed=batch)
    sizes = (model, batch, options.prompt, options.tokens)
    engine, served = engine_for(*sizes), engine_for(*sizes)
    loop = EngineLoop(served, threads=torch.get_num_threads())
    with BackgroundServer(create_app(loop, tokenizer, "bench"), on_stop=loop.stop) as server:
        runs = {
            "ours": lambda: decode_rate(_ask(server.url, prompts, options.tokens)),
            "engine": lambda: decode_rate(generate(engine, prompts, options.tokens).times),
        }
        for run in runs.values():
            run()
        rates = in_turns(runs, options.rounds, s.deadline)
    return s.about.row(
        "decode through HTTP", "tokens/s", dtype, rates["ours"], "ours, without HTTP", rates["engine"],
        batch=batch, prompt=options.prompt, tokens=options.tokens,
        note="streamed; the client takes part of the same cores",
    )  # fmt: skip


def _ask(url: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[float]]:
    """When each token of each answer was there. CheckError for an answer that is not whole."""
    place = urlsplit(url)
    fixed = {"model": "bench", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    fixed |= {"stream": True, "return_token_ids": True}
    bodies = [{**fixed, "prompt": list(prompt)} for prompt in prompts]
    done = subprocess.run(
        [sys.executable, serve_client.__file__],
        input=json.dumps({"host": place.hostname, "port": place.port, "bodies": bodies}),
        capture_output=True,
        text=True,
        check=False,
    )
    times = json.loads(done.stdout) if done.returncode == 0 else []
    if [len(of) for of in times] != [tokens] * len(prompts):
        raise CheckError(
            f"bench serve: {len(prompts)} streamed answers of {tokens} tokens expected, got "
            f"{[len(of) for of in times]} {done.stderr.strip()[-200:]}; nothing is reported while the check "
            "fails"
        )
    return times
