"""Publishes the chat page as a Space on the Hub, for a model that is on the Hub.

    sq-llava push runs/demo/model org/name --space

The Space gets a copy of this library, so it runs the same code as this machine, also code that was never released.
Its variable `MODEL` names the model. No token is sent to it.
"""

import shutil
from importlib.resources import files
from pathlib import Path

from huggingface_hub import HfApi, SpaceCard
from huggingface_hub.errors import RepositoryNotFoundError
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from sq_llava.locations import hub_errors
from sq_llava.resources import CODE_FILES, code_file, find_resource


# What the free hardware has: https://huggingface.co/docs/hub/spaces-overview#hardware-resources
FREE_HARDWARE = "CPU basic (2 vCPU, 16 GB of memory, free)"
# Weights of this size, in bytes, leave space for the activations and the libraries in 16 GB.
FITS_FREE_HARDWARE = 10_000_000_000
# A file that only such a Space has.
MARK = "sq_llava/page/layout.py"
NOT_NEEDED = shutil.ignore_patterns("__pycache__", ".*", "recipes", "space")


def lay_out_space(folder: Path, repo_id: str) -> dict[str, int]:
    """
    Writes the files of a Space into a new folder.

    Args:
        folder (`Path`): The folder, which must not exist.
        repo_id (`str`): Hub id of the model.

    Returns:
        Size in bytes of each file, by its path in the folder.
    """
    shutil.copytree(find_resource("space"), folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(files("sq_llava"), folder / "sq_llava", ignore=NOT_NEEDED)
    shutil.copy(find_resource("model_card.md"), folder / "sq_llava")
    for name in CODE_FILES:
        shutil.copy(code_file(name), folder)
    readme = SpaceCard((folder / "README.md").read_text())
    readme.data.title = repo_id.partition("/")[2]
    readme.data.models = [repo_id]
    readme.save(folder / "README.md")
    written = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in written}


def check_space(api: HfApi, repo_id: str) -> None:
    """
    Checks that a Space of this name may be written. It need not exist yet.

    Raises:
        ValueError: if the Space is not one of these pages, or the token may not write to it.
    """
    with hub_errors(f"The Space {repo_id} cannot be written to with this token"):
        try:
            there = api.list_repo_files(repo_id, repo_type="space")
            api.auth_check(repo_id, repo_type="space", write=True)
        except RepositoryNotFoundError:
            return  # it will be created
    if MARK not in there and set(there) - {"README.md", ".gitattributes"}:
        raise ValueError(
            f"The Space {repo_id} exists and shows something else. Rename or delete it, or push to another name."
        )


def publish_space(api: HfApi, repo_id: str, folder: Path, commit: str, private: bool) -> str:
    """
    Uploads a Space for a model, which it names in its variable `MODEL`.

    Args:
        repo_id (`str`): Hub id of the model, and of the Space.
        folder (`Path`): What [`lay_out_space`] wrote.
        commit (`str`): The model's commit. A new commit changes the README, so the Space restarts and loads it.
        private (`bool`): Create a private Space.

    Returns:
        The URL of the Space.
    """
    readme = folder / "README.md"
    link = f"[{repo_id}]({api.endpoint}/{repo_id}/tree/{commit})"
    readme.write_text(f"{readme.read_text().rstrip()}\n\nThe model is {link}, published at commit `{commit}`.\n")
    with hub_errors("The model is on the Hub, but its Space is not. Run the command again"):
        api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
        api.add_space_variable(repo_id, "MODEL", repo_id)
        api.upload_folder(
            repo_id=repo_id,
            repo_type="space",
            folder_path=folder,
            commit_message=f"Page of {repo_id}",
            delete_patterns=["sq_llava/*"],  # files of an earlier version
        )
    return f"{api.endpoint}/spaces/{repo_id}"


def print_space(repo_id: str, sizes: dict[str, int], console: Console) -> None:
    """Prints a table of a Space's files. The library's are counted by package."""
    rows: dict[str, list[int]] = {}
    for name, size in sizes.items():
        parts = name.split("/")
        place = name if len(parts) < 3 else f"{parts[0]}/{parts[1]}/"
        rows.setdefault(place, []).append(size)
    table = Table("file or folder", "files", "size", title=f"To the Space {repo_id}")
    table.columns[1].justify = table.columns[2].justify = "right"
    for name, each in rows.items():
        table.add_row(name, str(len(each)), f"{sum(each):,}")
    table.add_row("[bold]total[/bold]", str(len(sizes)), f"[bold]{sum(sizes.values()):,}[/bold]")
    console.print(table)


def what_the_space_needs(size: int, private: bool, settings_url: str) -> list[str]:
    """
    What the owner must set on the Hub by hand, in sentences.

    Args:
        size (`int`): Size of the model in bytes.
        private (`bool`): Whether the model is private.
    """
    fits = size <= FITS_FREE_HARDWARE
    hardware = f"Hardware: {FREE_HARDWARE} is what a new Space gets. The model has {decimal(size)}: " + (
        "it fits, and a GPU is faster." if fits else "it does not fit. Choose a GPU with more memory than that."
    )
    secret = "the model is private, so add HF_TOKEN, a token that can read it." if private else "none are needed."
    return [hardware, f"Secrets: {secret}", f"Both are set at {settings_url}"]
