"""`longforge serve`."""

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from longforge.errors import InputError
from longforge.server.settings import ServeSettings

__all__ = ["serve"]

DEFAULTS = ServeSettings()

ENGINE_FAILED = 70
"""Exit code; that of a mistake (2) must not make a supervisor try again."""


def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="Model folder. Without one, the shipped demo model.", show_default=False),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name in requests (default: the folder's).")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = DEFAULTS.host,
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 picks a free one.", min=0, max=65535)
    ] = DEFAULTS.port,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads (default: the cores that are free).", min=1)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = DEFAULTS.device,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = DEFAULTS.dtype,
    context: Annotated[
        int | None,
        typer.Option(help="Most tokens of a request (default: what the model was made for).", min=2),
    ] = None,
    pages: Annotated[
        int | None,
        typer.Option(help="Pages of keys and values (default: 16 full contexts, 4 GiB at most).", min=1),
    ] = None,
    drafts: Annotated[
        int | None,
        typer.Option(
            help="Most tokens that the model's MTP module guesses ahead of each answer (default: 0).",
            min=0,
            max=3,
        ),
    ] = None,
    host_cache: Annotated[
        float,
        typer.Option(help="GiB of memory for pages that the pool has no room for; 0 for none.", min=0),
    ] = DEFAULTS.host_cache_bytes // 2**30,
    file_cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for such pages, where later servers of the same model find them; several servers "
            "may share it. Whoever can write there can change answers.",
            show_default=False,
        ),
    ] = None,
    file_cache_gib: Annotated[
        float, typer.Option(help="GiB that this folder may hold.", min=0)
    ] = DEFAULTS.file_cache_bytes // 2**30,
    max_running: Annotated[
        int, typer.Option(help="Most requests that generate at once.", min=1)
    ] = DEFAULTS.max_running,
    max_requests: Annotated[
        int, typer.Option(help="Most open requests; more are refused for now.", min=1)
    ] = DEFAULTS.max_requests,
    max_queued_tokens: Annotated[
        int, typer.Option(help="Most prompt tokens of open requests together.", min=1)
    ] = DEFAULTS.max_queued_tokens,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File of API keys, lines name:key. The key named admin may pause the engine and change its "
            "weights. One key alone may come in LONGFORGE_API_KEY.",
            show_default=False,
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Name under which requests may come (may be repeated).", show_default=False),
    ] = None,
    max_body_mib: Annotated[
        int, typer.Option(help="Largest body of a request, in MiB.", min=1)
    ] = DEFAULTS.max_body_bytes // 2**20,
    drain_seconds: Annotated[
        float, typer.Option(help="How long open answers may go on after Ctrl-C or SIGTERM.", min=0)
    ] = DEFAULTS.drain_seconds,
) -> None:
    """Serve a model over HTTP in the dialects of OpenAI (/v1/chat/completions, /v1/completions,
    /v1/responses) and Anthropic (/v1/messages), with a web page at /.

    Ends with code 70 when the engine has failed, so that a supervisor starts it again.
    """
    from longforge.errors import EngineError
    from longforge.server import launch

    settings = ServeSettings(
        model=model,
        name=name,
        host=host,
        port=port,
        threads=threads,
        device=device,
        dtype=dtype,
        context=context,
        pages=pages,
        drafts=drafts,
        host_cache_bytes=_bytes("host cache", host_cache),
        file_cache=file_cache,
        file_cache_bytes=_bytes("file cache GiB", file_cache_gib),
        max_running=max_running,
        max_requests=max_requests,
        max_queued_tokens=max_queued_tokens,
        api_key_file=api_key_file,
        allowed_hosts=tuple(allowed_host or ()),
        max_body_bytes=max_body_mib * 2**20,
        drain_seconds=drain_seconds,
    )
    try:
        launch.serve(settings)
    except EngineError as error:
        print(f"longforge: {error}", file=sys.stderr)
        raise typer.Exit(ENGINE_FAILED) from None


def _bytes(name: str, gib: float) -> int:
    if not math.isfinite(gib):
        raise InputError(f"{name}: expected a number of GiB, got {gib}")
    return int(gib * 2**30)
