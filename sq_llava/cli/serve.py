"""`sq-llava serve`: the options of the server."""

import os
from pathlib import Path
from typing import Annotated

import typer

from sq_llava.cli.options import Device, Dtype, LoadIn4Bit, LoadIn8Bit, ModelArgument, check_model_options, load_model
from sq_llava.console import errors_in_one_line, messages_console


LIMITS = {"rich_help_panel": "Limits"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="0.0.0.0 to be reached from other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    model_name: Annotated[str | None, typer.Option(help="What clients call it; default: the folder's name.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Name of the environment variable with the key that clients must send.")
    ] = None,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Texts that are generated side by side.")] = 16,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Requests beside those; one more gets the status 429.", **LIMITS)
    ] = 64,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Megabytes of a request.", **LIMITS)] = 20.0,
    max_images: Annotated[int, typer.Option(min=0, help="Of a request.", **LIMITS)] = 8,
    max_megapixels: Annotated[
        float, typer.Option(min=0.001, help="Of all images, padded to squares.", **LIMITS)
    ] = 64.0,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Image tokens included; default: what the model reads.", **LIMITS)
    ] = None,
    request_seconds: Annotated[float, typer.Option(min=0.1, help="Of a request, from first to last.", **LIMITS)] = 120,
    allow_remote_images: Annotated[
        bool, typer.Option("--allow-remote-images", help="Fetch http(s) images, of public addresses only.", **LIMITS)
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: LoadIn4Bit = False,
    load_in_8bit: LoadIn8Bit = False,
) -> None:
    """Serve a model to OpenAI clients, with images: http://HOST:PORT/v1."""
    with errors_in_one_line():
        api_key = _read_key(api_key_env)
        check_model_options(model, device, dtype)
        import uvicorn

        from sq_llava.serving.app import create_app
        from sq_llava.serving.chat import Limits

        assistant = load_model(model, device, dtype, load_in_4bit, load_in_8bit)
        limits = Limits(
            max_body_bytes=int(max_body_mb * 1e6),
            max_images=max_images,
            max_pixels=int(max_megapixels * 1e6),
            max_prompt_tokens=max_prompt_tokens,
            max_waiting=max_waiting,
            request_seconds=request_seconds,
            allow_remote_images=allow_remote_images,
        )
        name = model_name or (Path(model).resolve().name if Path(model).is_dir() else model)
        app = create_app(assistant, name, limits, max_batch_size, api_key)
        if host not in LOOPBACK and api_key is None:
            messages_console.print("Anybody who reaches this port can use the model: see --api-key-env.")
    messages_console.print(f"The model's name is {name}.", markup=False, soft_wrap=True)
    # SIGTERM and Ctrl-C: no new requests, and those that are under way are finished.
    uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=int(request_seconds) + 5, server_header=False)


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key:
        raise ValueError(f"--api-key-env: the environment variable {variable} is not set.")
    return key
