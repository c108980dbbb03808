"""`sq-llava recipes`: lists the recipes that the library brings along, and copies them to where they can be edited.

    sq-llava recipes
    sq-llava recipes copy sq-llava-7b

They name one another by paths such as `recipes/sq-llava-7b/stage1.yaml`, so a copy in a folder `recipes` works as
it is; in another folder, the paths in its comments are those of that folder.
"""

import re
from pathlib import Path
from typing import Annotated

import typer

from sq_llava.console import console, errors_in_one_line, examples, messages_console
from sq_llava.resources import find_resource


# Settings of `accelerate launch`, and a script for Slurm: they go along with every recipe.
LAUNCH = "accelerate"
SUFFIXES = (".yaml", ".sbatch")

app = typer.Typer(name="recipes")


def list_recipes() -> dict[str, Path]:
    """The files by their names, such as `sq-llava-7b/stage1`."""
    root = find_resource("recipes")
    files = sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES)
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in files}


def summary(file: Path) -> str:
    """The first sentence of the comment that a file begins with."""
    lines = file.read_text(encoding="utf-8").splitlines()
    start = lines[0].startswith("#!")
    header = lines[start : next((number for number, line in enumerate(lines) if line[:1] != "#"), None)]
    text = " ".join(line.removeprefix("#").strip() for line in header)
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def copy_recipes(name: str, folder: Path) -> tuple[list[Path], list[Path]]:
    """
    Copies the recipe `name`, or all of a folder of them, and the launch settings.

    Returns:
        The files that were written, and those that were there already: launch settings, and equal recipes.

    Raises:
        ValueError: for an unknown name, or if a recipe would have to be overwritten; nothing is written then.
    """
    recipes = list_recipes()
    wanted = name.removeprefix("recipes/").removesuffix(".yaml").rstrip("/")
    chosen = {key for key in recipes if f"{key}/".startswith(f"{wanted}/")}
    if not chosen:
        raise ValueError(f"{name}: no such recipe or folder of recipes; `sq-llava recipes` lists them.")
    root, texts = find_resource("recipes"), {}
    for key in sorted(chosen | {key for key in recipes if key.startswith(f"{LAUNCH}/")}):
        text = recipes[key].read_text(encoding="utf-8").replace("recipes/", f"{folder.as_posix()}/")
        target = folder / recipes[key].relative_to(root)
        texts[target] = text
        is_edited = target.exists() and (not target.is_file() or target.read_text(encoding="utf-8") != text)
        if is_edited and key in chosen:
            raise ValueError(f"{target} is there already, and differs: move it away, or name another folder.")
    written = [target for target in texts if not target.exists()]
    for target in written:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(texts[target], encoding="utf-8")
    return written, [target for target in texts if target not in written]


@app.callback(invoke_without_command=True, epilog=examples("sq-llava recipes", "sq-llava recipes copy sq-llava-7b"))
def recipes(context: typer.Context) -> None:
    """List the recipes and launch settings that come with the library, or copy them."""
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
        str, typer.Argument(help="A recipe of the list, or a folder of them: sq-llava-7b.", show_default=False)
    ],
    folder: Annotated[Path, typer.Argument(help="Where to.")] = Path("recipes"),
) -> None:
    """Copy recipes and launch settings into a folder, to be edited there. No file is overwritten."""
    with errors_in_one_line():
        written, kept = copy_recipes(name, folder)
    for path in written:
        messages_console.print(f"Wrote {path}", markup=False, soft_wrap=True)
    for path in kept:
        messages_console.print(f"Kept {path}, which is there already", markup=False, soft_wrap=True)
