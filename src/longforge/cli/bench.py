"""`longforge bench`."""

from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(
    help="Measure against rivals, on this machine.", no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def _group() -> None:
    pass


@app.command()
def attention(
    device: Annotated[
        str | None,
        typer.Option(help="cuda or cpu. Without it, CUDA where there is some.", show_default=False),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Contexts in tokens.")] = "32k,128k,512k,1m",
    phase: Annotated[str, typer.Option(help="What to measure.")] = "decode,prefill,train",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 64,
    groups: Annotated[int, typer.Option(help="Key and value heads.")] = 4,
    dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    index_dim: Annotated[int, typer.Option(help="Channels of the index branch.")] = 128,
    block: Annotated[int, typer.Option(help="Tokens of a block.")] = 128,
    top_k: Annotated[int, typer.Option(help="Blocks selected per token and group.")] = 16,
    chunk: Annotated[
        int | None,
        typer.Option(help="Queries of a prefill chunk (8192 on CUDA, 512 on a CPU).", show_default=False),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no new point after this long.", show_default=False)
    ] = None,
    longest: Annotated[
        float | None,
        typer.Option(
            help="Leave out contestants that take more seconds a step (10 on CUDA, 60 on a CPU).",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also write the JSON array here.", show_default=False)
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Draw speed-up against length (png, svg, pdf).", show_default=False
        ),
    ] = None,
) -> None:
    """MSA against every dense attention that this machine has, and against transformers' own MSA where it is
    installed and fits in memory. The default layer is M3's.

    Refuses to report while our path differs from the reference. A prefill is measured by one chunk in the
    middle of the context, which costs what its chunks cost on average.
    """
    from longforge.bench.command import attention as run

    run(
        device=device, lengths=lengths, phase=phase, dtype=dtype, heads=heads, groups=groups, dim=dim,
        index_dim=index_dim, block=block, top_k=top_k, chunk=chunk, minutes=minutes, longest=longest,
        json=as_json, out=out, plot=plot,
    )  # fmt: skip


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="Model folder. Without one, the shipped demo model.", show_default=False),
    ] = None,
    measures: Annotated[
        str, typer.Option(help="What to measure.")
    ] = "decode,http,speculation,prefill,first-token",
    batches: Annotated[str, typer.Option(help="Requests at once.")] = "1,16",
    prompt: Annotated[str, typer.Option(help="Tokens of a prompt that is continued.")] = "96",
    tokens: Annotated[str, typer.Option(help="New tokens of each answer.")] = "128",
    prefill: Annotated[
        str | None,
        typer.Option(help="Tokens of prompts to prefill (512, 2k and the context).", show_default=False),
    ] = None,
    first_token: Annotated[str, typer.Option(help="Tokens of prompts for the first token.")] = "2k,100k",
    talks: Annotated[int, typer.Option(help="Conversations for speculation.")] = 3,
    dtypes: Annotated[
        str, typer.Option(help="fp32, bf16; the first alone where we race ourselves.")
    ] = "fp32,bf16",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads (default: the cores that are free).", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Turns that each side gets.")] = 5,
    compiled: Annotated[
        bool, typer.Option(help="Let transformers try its compiled step as well, slow to compile.")
    ] = True,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no new point after this long.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also write the JSON array here.", show_default=False)
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Draw both sides' rates (png, svg, pdf).", show_default=False),
    ] = None,
) -> None:
    """Our engine against transformers on the same weights, on this machine's CPU: decode, prefill, and
    against itself speculation, HTTP and the first token of a cached prompt.

    Refuses to report while greedy answers of the two sides differ. Without transformers, its side is left
    out.
    """
    from longforge.bench.serve_command import serve as run

    run(
        model, measures=measures, batches=batches, prompt=prompt, tokens=tokens, prefill=prefill,
        first_token=first_token, talks=talks, dtypes=dtypes, threads=threads, rounds=rounds,
        compiled=compiled, minutes=minutes, json=as_json, out=out, plot=plot,
    )  # fmt: skip
