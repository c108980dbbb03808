"""Prints the result of a data check: findings, token lengths, three rows as training sees them. Writes a clean copy.

    check = DataCheck([DataSource("mine.json", "images")], processor, max_length=2048)
    with Progress() as progress:
        report = examine(check, progress)
    print_report(report, Console())
    entries = write_sound_rows(check, report, Path("clean"))

The check itself is in `sq_llava/doctor/check.py`.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from sq_llava.data.rows import RowReader
from sq_llava.data.self_questions import ANSWER, QUESTION
from sq_llava.data.sources import Table
from sq_llava.doctor.check import DataCheck, Finding, Report, examine
from sq_llava.output import folder_written_whole
from sq_llava.training.collator import SelfQuestioningCollator


SAMPLE_ROWS = 1_000
SHOWN_ERRORS = 5
SHOWN_OF_EACH_CODE = 10
BAR_WIDTH = 40
LEVEL_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold blue"}
TURN_STYLES = {ANSWER: "green", QUESTION: "cyan"}


def print_report(report: Report, console: Console) -> None:
    """Prints the first few findings of each code, and a summary."""
    by_code = defaultdict(list)
    for finding in report.findings:
        by_code[finding.level, finding.code].append(finding)
    for level, style in LEVEL_STYLES.items():
        for (_, code), findings in sorted(item for item in by_code.items() if item[0][0] == level):
            _print_code(code, findings, style, console)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    _print_summary(report.summary, say)
    if report.summary["tokens"] is not None:
        _print_tokens(report.summary["tokens"], say)


def _print_code(code: str, findings: list[Finding], style: str, console: Console) -> None:
    fixes = {finding.fix for finding in findings}
    heading = Text.assemble((f"{findings[0].level} ", style), (code, "bold"), f"  {len(findings):,}")
    console.print(heading + Text(f"  {fixes.pop()}" if len(fixes) == 1 else ""), soft_wrap=True)
    for finding in findings[:SHOWN_OF_EACH_CODE]:
        fix = f" {finding.fix}" if fixes else ""
        console.print(Text(f"    {_line(finding)}{fix}"), soft_wrap=True)
    if len(findings) > SHOWN_OF_EACH_CODE:
        console.print(f"    and {len(findings) - SHOWN_OF_EACH_CODE:,} more: --json prints all of them", style="dim")


def _line(finding: Finding) -> str:
    name = "" if finding.id is None else f" (id {finding.id!a})"
    return f"{finding.file}, row {finding.row}{name}: {finding.message}"


def _print_summary(summary: dict, say: Callable) -> None:
    say()
    for source in summary["sources"]:
        say(
            f"{source['file']}: {source['rows_looked_at']:,} of {source['rows']:,} rows checked, "
            f"{source['rows_with_errors']:,} with errors"
        )
    say(
        f"{summary['images']:,} images in {summary['image_files']:,} files; text-only rows: "
        f"{summary['text_only_share']:.1%}; self-questions per epoch: about "
        f"{summary['self_questions_per_epoch']:,.0f}"
    )


def _print_tokens(tokens: dict, say: Callable) -> None:
    say(
        f"Tokens of a row: {tokens['mean']:,.0f} on average, median {tokens['median']:,.0f}, 95% have at most "
        f"{tokens['percentile_95']:,.0f}, longest {tokens['longest']:,}; max_length {tokens['max_length']} cuts "
        f"{tokens['tokens_cut']:,} tokens off {tokens['rows_cut']:,} rows"
    )
    if tokens["packing"]:
        say(
            f"Packing: about {tokens['rows'] / tokens['packing']['packs']:.1f} of these rows per pack of "
            f"{tokens['max_length']} tokens, fill {tokens['packing']['fill']:.2f}"
        )
    most = max(bar["rows"] for bar in tokens["histogram"])
    width = len(f"{tokens['histogram'][-1]['to']:,}")
    for bar in tokens["histogram"]:
        # Rounded up: a count above 0 has at least one mark.
        marks = "█" * -(-bar["rows"] * BAR_WIDTH // most)
        say(f"  {bar['from']:>{width},} - {bar['to']:>{width},} {marks:<{BAR_WIDTH}} {bar['rows']:,}")


def print_preview(check: DataCheck, report: Report, seed: int, console: Console) -> None:
    """
    Prints rows as training sees them in its first epoch. The text in the loss is coloured and between stars. In place
    of a row that cannot be used, it prints the error: the check may have left out the lengths, and decodes no pixels.
    """
    collator = SelfQuestioningCollator(
        check.processor, check.plain, check.self_question_ratio, seed, max_length=check.max_length
    )
    reader = RowReader(check.opened, check.image_roots, [source.instructions for source in check.sources])
    console.print()
    for source, index in report.sound:
        first_row = sum(map(len, check.opened[:source]))
        console.print(Text(f"{check.opened[source].path}, row {index}", "bold"), soft_wrap=True)
        try:
            batch = collator([{**reader.read(source, index), "row_id": first_row + index}])
            shown = spell_out(check, batch["input_ids"][0].tolist(), batch["turn_kinds"][0].tolist())
        except ValueError as error:
            shown = Text(f"Training would stop at this row: {error}", LEVEL_STYLES["error"])
        console.print(shown, soft_wrap=True)
        console.print()
    if report.sound:
        console.print("The text between stars is in the loss: answers in green, self-questions in cyan.", style="dim")


def spell_out(check: DataCheck, ids: list[int], kinds: list[int]) -> Text:
    """
    Returns the text of a tokenized row, with stars around the text in the loss.

    Args:
        check ([`DataCheck`]): Has the processor.
        ids (`list[int]`): Token ids. The tokens of an image are shown as their number.
        kinds (`list[int]`): Kind of each token: `NOT_SPOKEN`, `ANSWER` or `QUESTION`.
    """
    text, begin, decoded = Text(), 0, ""
    image_token_id = check.processor.image_token_id
    keys = [(kind, token == image_token_id) for kind, token in zip(kinds, ids)]
    for end in range(1, len(ids) + 1):
        if end < len(ids) and keys[end] == keys[begin]:
            continue
        kind, is_image = keys[begin]
        # Decoded from the beginning: decoded alone, a piece would lose the space before it.
        before, decoded = decoded, check.processor.tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if is_image:
            text.append(f"<image> x {end - begin}", "magenta")
        else:
            piece = decoded[len(before) :]
            # Escaped, because control characters could move the cursor or change colours of the terminal.
            piece = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in piece)
            text.append(f"*{piece}*" if kind else piece, TURN_STYLES.get(kind, "dim"))
        begin = end
    return text


def write_sound_rows(check: DataCheck, report: Report, folder: Path) -> list[dict | None]:
    """
    Writes the rows without errors, unchanged, and `left_out.jsonl`, which lists the other rows with their errors.

    Args:
        check ([`DataCheck`]): What was checked.
        report ([`Report`]): From [`examine`], without a limit.
        folder (`Path`): New or empty folder. It appears when all of its files are complete.

    Returns:
        For each source, an entry for the setting that names it, or `None` if it has no row left.

    Raises:
        ValueError: if the folder has files already, if another process is writing it, or if some rows were not
            checked.
    """
    for source in report.summary["sources"]:
        if source["rows_looked_at"] < source["rows"]:
            raise ValueError(f"{source['file']}: only a part of the rows was checked: remove --limit.")
    with folder_written_whole(folder) as new:
        entries = [_write_kept_rows(check, report, number, new) for number in range(len(check.sources))]
        _write_lines(new / "left_out.jsonl", _left_out(report))
    return [entry and {**entry, "path": str(folder / entry["path"])} for entry in entries]


def _write_kept_rows(check: DataCheck, report: Report, number: int, folder: Path) -> dict | None:
    """Writes a file or folder for a source, and returns an entry with its name; `None` if no row is left."""
    source, rows = check.sources[number], check.opened[number]
    kept = [index for index in range(len(rows)) if index not in report.left_out[number]]
    if not kept:
        return None
    stem = Path(source.path).stem if len(check.sources) == 1 else f"{number}-{Path(source.path).stem}"
    if isinstance(rows, Table):
        path = _write_table(rows, kept, folder / stem)
    else:
        path = folder / f"{stem}.jsonl"
        _write_lines(path, rows.rows(kept))
    entry = {"path": path.name, "image_root": str(check.image_roots[number])}
    kept_settings = ("weight", "num_rows", "instructions")
    return entry | {name: value for name in kept_settings if (value := getattr(source, name))}


def print_fixed(sources: list[dict], console: Console) -> None:
    """
    Prints the settings of a recipe that name the fixed sources, in YAML.

    Args:
        sources (`list[dict]`): The sources of the summary, each with its entry of [`write_sound_rows`] as `fixed`.
        console (`Console`): Prints them.
    """
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    heading = None
    for source in sources:
        setting, entry = source["setting"], source["fixed"]
        if entry is None:
            say(f"# {setting}: {source['file']} has no row left")
        elif setting == "text_probe":
            say(f"{setting}: {json.dumps(entry['path'], ensure_ascii=False)}")
        else:
            if setting != heading:
                say(f"{setting}:")
            heading = setting
            say(f"  - {json.dumps(entry, ensure_ascii=False)}")


def _left_out(report: Report) -> Iterator[dict]:
    """The rows with errors, for `left_out.jsonl`."""
    reasons = defaultdict(list)
    for finding in report.findings:
        if finding.level == "error":
            reasons[finding.file, finding.row, finding.id].append(
                {"code": finding.code, "message": finding.message, "fix": finding.fix}
            )
    for (file, row, name), errors in reasons.items():
        yield {"file": file, "row": row, "id": name, "errors": errors}


def _write_lines(path: Path, rows) -> None:
    with path.open("wb") as stream:
        for row in rows:
            # A lone surrogate in a field that is not read is written as the same escape again.
            stream.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def _write_table(table: Table, kept: list[int], path: Path) -> Path:
    dataset = table.dataset.select(kept).with_format(None)
    if not all(map(_is_embedded, (chunk for column in dataset.data.columns for chunk in column.chunks))):
        # Cast to plain structs: for an image column, `datasets` would search the working directory for the files.
        dataset = dataset.cast(datasets.Features.from_arrow_schema(dataset.data.schema.remove_metadata()))
    if table.path.lower().endswith(".parquet"):
        path = path.with_name(f"{path.name}.parquet")
        dataset.to_parquet(path)
    else:
        dataset.save_to_disk(path)
    return path


def _is_embedded(column: pa.Array) -> bool:
    """Returns whether each image inside has its bytes, not only a path."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return _is_embedded(column.flatten())
    if not pa.types.is_struct(column.type):
        return True
    children = dict(zip((field.name for field in column.type), column.flatten()))
    if children.keys() == {"bytes", "path"}:
        return not pc.any(pc.and_(children["bytes"].is_null(), children["path"].is_valid())).as_py()
    return all(map(_is_embedded, children.values()))


def check_before_training(check: DataCheck, limit: int | None, command: str) -> None:
    """
    Checks rows before a model is loaded, and prints how many warnings there are.

    Args:
        check ([`DataCheck`]): What to check.
        limit (`int`, *optional*): Check about this many rows, evenly spaced.
        command (`str`): The `sq-llava doctor` command that prints all findings.

    Raises:
        ValueError: if a row has an error, with the first few errors and the command.
    """
    with Progress(console=Console(stderr=True), transient=True) as progress:
        report = examine(check, progress, limit)
    looked_at = sum(source["rows_looked_at"] for source in report.summary["sources"])
    lines = [f"{_line(finding)} {finding.fix}" for finding in report.findings if finding.level == "error"]
    if lines:
        more = [f"and {len(lines) - SHOWN_ERRORS} more."] if len(lines) > SHOWN_ERRORS else []
        shown = "\n  ".join([f"{len(lines)} errors in {looked_at:,} rows of the data:", *lines[:SHOWN_ERRORS], *more])
        raise ValueError(
            f"{shown}\nTo see all errors of all rows: {command}\nAdd --fix FOLDER to write a copy without these rows."
        )
    warned = Counter(finding.code for finding in report.findings if finding.level == "warning")
    if warned:
        counts = ", ".join(f"{code} {number:,}" for code, number in warned.items())
        print(f"Warnings in {looked_at:,} rows of the data: {counts}. To see them: {command}")
