"""`sq-llava serve`: starts the server."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sq_llava.cli.options import Loading, ModelArgument, OptionsOf, check_model_options, load_model, takes_options
from sq_llava.console import errors_in_one_line, examples, messages_console
from sq_llava.early_checks import require_key
from sq_llava.serving.settings import Access, Limits


LIMITS = "Limits"
ACCESS = "Access"

app = typer.Typer()


@app.command(
    epilog=examples(
        "sq-llava serve runs/demo/model",
        "SECRET=... sq-llava serve org/sq-llava-7b --host 0.0.0.0 --api-key-env SECRET",
    )
)
@takes_options
def serve(
    model: ModelArgument,
    loading: Loading,
    limits: Annotated[dict, OptionsOf(Limits, panel=LIMITS)],
    access: Annotated[dict, OptionsOf(Access, panel=ACCESS)],
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0: reachable from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    model_name: Annotated[
        str | None, typer.Option(help="Name of the model for clients. Default: folder name or Hub id.")
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            help="Name of the environment variable with the key that clients must send.", rich_help_panel=ACCESS
        ),
    ] = None,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Maximum number of texts generated at once.")] = 16,
    max_body_mb: Annotated[
        float, typer.Option(min=0.001, help="Maximum size of a request in megabytes.", rich_help_panel=LIMITS)
    ] = 20.0,
    max_megapixels: Annotated[
        float,
        typer.Option(
            min=0.001,
            help="Maximum total megapixels of a request's images.",
            rich_help_panel=LIMITS,
        ),
    ] = 64.0,
) -> None:
    """Start an OpenAI-compatible server, with images, at http://HOST:PORT/v1."""
    with errors_in_one_line():
        api_key = None if api_key_env is None else require_key(api_key_env)
        check_model_options(model, **loading)
        import uvicorn

        from sq_llava.serving.connections import TimedConnection, hosts_to_accept, is_loopback

        access = Access(**access)
        access = replace(access, allowed_hosts=hosts_to_accept(host, access.allowed_hosts))
        from sq_llava.serving.app import create_app

        assistant = load_model(model, **loading)
        limits = Limits(max_body_bytes=int(max_body_mb * 1e6), max_pixels=int(max_megapixels * 1e6), **limits)
        name = model_name or (Path(model).resolve().name if Path(model).is_dir() else model)
        app = create_app(assistant, name, limits, max_batch_size, api_key, access)
        if not is_loopback(host) and api_key is None:
            messages_console.print("Warning: without --api-key-env, anyone who can reach this port can use the model.")
    messages_console.print(f"The name of the model is {name}.", markup=False, soft_wrap=True)
    # On SIGTERM and Ctrl-C, no new requests are accepted, and running requests are finished.
    seconds = int(limits.request_seconds) + 5
    connection = partial(TimedConnection, header_seconds=limits.header_seconds)
    uvicorn.run(
        app, host=host, port=port, http=connection, ws="none", timeout_graceful_shutdown=seconds, server_header=False
    )
