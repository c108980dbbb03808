"""The command `sq-llava generate-data` in this process, and the files that it makes."""

from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from sq_llava.cli.main import app


# What a run makes from the answers. Its other files hold the command, which names the folder.
MADE = ("data.jsonl", "llava.json", "rejected.jsonl", "failures.jsonl")


def generate_data(*arguments, **settings) -> Result:
    return CliRunner().invoke(app, ["generate-data", *map(str, arguments)], **settings)


def made(out: Path, *more: str) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in (*MADE, *more)}


def texts_of(row: dict) -> list[str]:
    """The questions and answers of a row."""
    return [message["content"][-1]["text"] for message in row["messages"]]
