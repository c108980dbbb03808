"""The review page: writes one HTML file in which a person keeps or drops each text, and reads the decisions back.

    write_sheet(out / "review.html", entries, title)
    read_decisions(Path("decisions.json"))

The page needs neither a network nor a server. It contains small copies of the images. All texts are escaped. A
Content-Security-Policy allows only its own script, and no requests. The browser remembers the decisions until "Save
decisions" writes a JSON file. A decision can have the text as the person has edited it. It holds for one text: if the
text of a row changes, the decision is void.
"""

import base64
import hashlib
import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from sq_llava.data.images import jpeg_data_url
from sq_llava.data.row_layouts import is_unicode
from sq_llava.generation.text_rules import MARKUP
from sq_llava.json_text import parse_json
from sq_llava.output import written_whole


# For the images of the page: 5,000 of them take about 200 MB.
THUMBNAIL_SIDE = 512
THUMBNAIL_QUALITY = 80
DECISIONS = ("keep", "drop")
TEMPLATE = files("sq_llava.generation") / "review_sheet.html"


@dataclass(frozen=True)
class Decision:
    """
    What a person decided about a text.

    Args:
        word (`str`): "keep" or "drop".
        text (`str`, *optional*): The text that the person wrote in its place.
    """

    word: str
    text: str | None = None

    @property
    def drops(self) -> bool:
        return self.word == "drop"


@dataclass(frozen=True)
class Entry:
    """A row to check: its opened image, its text, and the earlier decision, if there is one."""

    id: str
    image: Image.Image
    text: str
    decision: Decision | None = None


def hash_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_sheet(path: Path, entries: Iterable[Entry], title: str) -> None:
    """Writes the page in one step. Entries are read one by one, so their images are never all in memory."""
    page = TEMPLATE.read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    page = page.replace("SCRIPT_HASH", base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())
    head, _, foot = page.partition("ENTRIES")
    with written_whole(path) as new, new.open("w", encoding="utf-8") as file:
        file.write(head.replace("TITLE", html.escape(title)))
        for entry in entries:
            file.write(_entry_html(entry))
        file.write(foot)


def _entry_html(entry: Entry) -> str:
    decision = f' data-decision="{entry.decision.word}"' if entry.decision else ""
    if entry.decision and entry.decision.text is not None:
        decision += f' data-edited="{html.escape(entry.decision.text)}"'
    return (
        f'<article tabindex="-1" data-id="{html.escape(entry.id)}" data-hash="{hash_of_text(entry.text)}"{decision}>'
        f'<img src="{jpeg_data_url(entry.image, THUMBNAIL_SIDE, THUMBNAIL_QUALITY)}" alt="">'
        f"<div><p>{html.escape(entry.text)}</p><footer><code>{html.escape(entry.id)}</code>"
        '<button type="button" data-edit>Edit</button>'
        '<button type="button" data-decide="keep">Keep</button>'
        '<button type="button" data-decide="drop">Drop</button></footer></div></article>\n'
    )


def read_decisions(path: Path) -> dict[tuple[str, str], Decision]:
    """
    Reads the decisions that the review page saved.

    Returns:
        (id, hash of the text) -> decision.

    Raises:
        ValueError: If the file is malformed. The message names entry, field and value.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"--decisions {path}: no such file.") from error
    except ValueError as error:
        raise ValueError(f"--decisions {path}: not JSON ({error}). Save it again from the review page.") from error
    if not isinstance(content, list):
        raise ValueError(f"--decisions {path}: is {type(content).__name__}, expected the list that the page saves.")
    return dict(_decision(entry, f"--decisions {path}, entry {number}") for number, entry in enumerate(content))


def _decision(entry: Any, place: str) -> tuple[tuple[str, str], Decision]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{place}: is {entry!r:.100}, expected an object with id, text_hash and decision.")
    for name in ("id", "text_hash", "decision"):
        if not isinstance(entry.get(name), str):
            raise ValueError(f"{place}: {name} is {entry.get(name)!r:.100}, expected a text, as the page saves it.")
    if entry["decision"] not in DECISIONS:
        raise ValueError(f"{place}: decision is {entry['decision']!r:.100}, expected {' or '.join(DECISIONS)}.")
    text = entry.get("text")
    is_text = isinstance(text, str) and text.strip() and is_unicode(text)
    if text is not None and (not is_text or MARKUP.search(text)):
        raise ValueError(
            f"{place}: text is {text!r:.100}, expected a text without markup, or no text if it was not edited. Edit "
            f"{entry['id']!r} again on the review page."
        )
    return (entry["id"], entry["text_hash"]), Decision(entry["decision"], text)


def check_decisions(decisions: Iterable[tuple[str, str]], texts: Mapping[str, str], path: Path) -> None:
    """
    Raises:
        ValueError: If a decision is about an unknown row, or about an earlier text of a row.
    """
    for id, text_hash in decisions:
        if id not in texts:
            raise ValueError(
                f"--decisions {path}: {id!r} is not on the review page of this folder. Save decisions from that page."
            )
        if hash_of_text(texts[id]) != text_hash:
            raise ValueError(
                f"--decisions {path}: the text of {id!r} has changed since the decision. Open review.html, decide "
                "again and save."
            )
