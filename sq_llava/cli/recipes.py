"""`sq-llava recipes`: lists the recipes of the library, and copies them into a folder where they can be edited.

    sq-llava recipes
    sq-llava recipes copy sq-llava-7b

Recipes refer to each other by paths such as `recipes/sq-llava-7b/stage1.yaml`. A copy in a folder `recipes` works
unchanged. In a copy to another folder, `recipes/` is replaced by the path of that folder.
"""

import re
from pathlib import Path
from typing import Annotated

import typer

from sq_llava.console import console, errors_in_one_line, examples, messages_console
from sq_llava.output import output_lock, write_text
from sq_llava.resources import find_resource


# Settings for `accelerate launch` and a Slurm script. They are copied with every recipe.
LAUNCH = "accelerate"
SUFFIXES = (".yaml", ".sbatch")

app = typer.Typer(name="recipes")


def list_recipes() -> dict[str, Path]:
    """The files of all recipes, by their names, such as `sq-llava-7b/stage1`."""
    root = find_resource("recipes")
    files = sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES)
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in files}


def summary(file: Path) -> str:
    """The first sentence of the comment at the start of a file."""
    lines = file.read_text(encoding="utf-8").splitlines()
    start = lines[0].startswith("#!")
    header = lines[start : next((number for number, line in enumerate(lines) if line[:1] != "#"), None)]
    text = " ".join(line.removeprefix("#").strip() for line in header)
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def copy_recipes(name: str, folder: Path) -> tuple[list[Path], list[Path]]:
    """
    Copies a recipe, or a folder of recipes, together with the launch settings.

    Args:
        name (`str`): A name from [`list_recipes`], or a folder of recipes such as `sq-llava-7b`.
        folder (`Path`): Where to copy them.

    Returns:
        The files that were written, and the existing files that were kept: launch settings and identical recipes.

    Raises:
        ValueError: if the name is unknown, if a recipe would be overwritten, or if another process copies recipes
            into the folder. Nothing is written then.
    """
    recipes = list_recipes()
    wanted = name.removeprefix("recipes/").removesuffix(".yaml").rstrip("/")
    chosen = {key for key in recipes if f"{key}/".startswith(f"{wanted}/")}
    if not chosen:
        raise ValueError(f"{name}: no such recipe or folder of recipes. `sq-llava recipes` lists them.")
    root, texts = find_resource("recipes"), {}
    for key in sorted(chosen | {key for key in recipes if key.startswith(f"{LAUNCH}/")}):
        text = recipes[key].read_text(encoding="utf-8").replace("recipes/", f"{folder.as_posix()}/")
        target = folder / recipes[key].relative_to(root)
        texts[target] = text
        is_edited = target.exists() and (not target.is_file() or target.read_text(encoding="utf-8") != text)
        if is_edited and key in chosen:
            raise ValueError(f"{target} exists already and is different. Move it, or give another folder.")
    written = [target for target in texts if not target.exists()]
    with output_lock(folder):
        for target in written:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_text(target, texts[target])
    return written, [target for target in texts if target not in written]


@app.callback(invoke_without_command=True, epilog=examples("sq-llava recipes", "sq-llava recipes copy sq-llava-7b"))
def recipes(context: typer.Context) -> None:
    """List the recipes and launch settings of the library, or copy them."""
    if context.invoked_subcommand is not None:
        return
    with errors_in_one_line():
        found = list_recipes()
        width = max(map(len, found))
        for name, file in found.items():
            console.print(f"{name:{width}}  {summary(file)}", markup=False, highlight=False, soft_wrap=True)


@app.command(
    epilog=examples(
        "sq-llava recipes copy sq-llava-7b",
        "sq-llava recipes copy sq-llava-7b/stage1 my-recipes",
        "sq-llava doctor --config recipes/sq-llava-7b/stage1.yaml",
    )
)
def copy(
    name: Annotated[
        str,
        typer.Argument(help="Name of a recipe or of a folder of recipes, e.g. sq-llava-7b.", show_default=False),
    ],
    folder: Annotated[Path, typer.Argument(help="Folder to copy to.")] = Path("recipes"),
) -> None:
    """Copy recipes and launch settings into a folder, to edit them. No file is overwritten."""
    with errors_in_one_line():
        written, kept = copy_recipes(name, folder)
    for path in written:
        messages_console.print(f"Wrote {path}", markup=False, soft_wrap=True)
    for path in kept:
        messages_console.print(f"Kept {path}, which exists already", markup=False, soft_wrap=True)
