"""`sq-llava demo` (the web page) and `sq-llava prototypes`."""

from pathlib import Path
from typing import Annotated

import typer

from sq_llava.cli.options import (
    Loading,
    ModelArgument,
    ModelOptions,
    OptionsOf,
    check_model_options,
    load_model,
    takes_options,
)
from sq_llava.console import console, errors_in_one_line, examples, loading, messages_console, needs_extra
from sq_llava.early_checks import require_folder, require_image
from sq_llava.output import written_whole
from sq_llava.serving.settings import AllowedHosts


app = typer.Typer()


@app.command(epilog=examples("sq-llava demo runs/demo/model", "sq-llava demo org/sq-llava-7b --load-in-4bit"))
@takes_options
def demo(
    model: ModelArgument,
    model_options: Loading,
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0: reachable from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    allowed_hosts: AllowedHosts = None,
) -> None:
    """Start a web page to chat about pictures, at http://HOST:PORT."""
    with errors_in_one_line():
        check_model_options(model, **model_options)
        with needs_extra("page"), loading():
            from sq_llava.page.layout import create_page, launch_settings
        settings = launch_settings(host, allowed_hosts)
        assistant = load_model(model, **model_options)
        create_page(assistant).launch(server_port=port, **settings)


@app.command(
    epilog=examples(
        "sq-llava prototypes runs/demo/images/test/images/0.png --model runs/demo/model --out seen.png",
        "sq-llava prototypes dog.png --model org/sq-llava-7b --out seen.png --top 8",
    )
)
@takes_options
def prototypes(
    image: Annotated[Path, typer.Argument(help="Image file.", show_default=False)],
    model: Annotated[dict, OptionsOf(ModelOptions, without=("load_in_4bit", "load_in_8bit"))],
    out: Annotated[Path, typer.Option(help="PNG file to write.", show_default=False)],
    top: Annotated[int | None, typer.Option(min=1, help="Show only the N largest prototypes.")] = None,
) -> None:
    """Colour an image by its prototypes: each image token gets the colour of its prototype."""
    with errors_in_one_line():
        if out.suffix.lower() != ".png":
            raise ValueError(f"--out {out}: the file name must end in .png.")
        require_folder(out.parent)
        if out.exists() and image.exists() and out.samefile(image):
            raise ValueError(f"--out {out} is the input image: give another file.")
        require_image(image)
        check_model_options(**model)
        with loading():
            from sq_llava.data.images import open_image

        picture = open_image(image)
        assistant = load_model(**model)
        from sq_llava.inference.prototypes import colour_of_rank, look, paint

        seen = look(assistant, picture)
        chosen = [*seen.shares][:top]
        with written_whole(out) as new:
            paint(picture, seen, chosen).save(new)
        for rank, prototype in enumerate(chosen):
            red, green, blue = colour_of_rank(rank)
            console.print(
                f"[rgb({red},{green},{blue})]■[/] prototype {prototype}: {seen.shares[prototype]:.1%} of the image"
            )
    messages_console.print(f"Wrote {out}", markup=False, soft_wrap=True)
