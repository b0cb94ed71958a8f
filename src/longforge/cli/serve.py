"""`longforge serve`."""

from typing import Annotated

import typer

__all__ = ["serve"]


def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="Model folder. Without one, the shipped demo model.", show_default=False),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name in requests (default: the folder's).")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 picks a free one.", min=0, max=65535)
    ] = 8000,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads (default: the cores that are free).", min=1)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    context: Annotated[
        int | None,
        typer.Option(help="Most tokens of a request (default: what the model was made for).", min=2),
    ] = None,
    pages: Annotated[
        int | None,
        typer.Option(help="Pages of keys and values (default: 16 full contexts, 4 GiB at most).", min=1),
    ] = None,
    max_running: Annotated[int, typer.Option(help="Most requests that generate at once.", min=1)] = 64,
) -> None:
    """Serve a model over HTTP: /v1/chat/completions, /v1/completions, /v1/models, /health."""
    from longforge.server import launch

    launch.serve(
        model,
        name=name,
        host=host,
        port=port,
        threads=threads,
        pages=pages,
        max_running=max_running,
        device=device,
        dtype=dtype,
        context=context,
    )
