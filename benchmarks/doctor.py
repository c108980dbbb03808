"""The data check and the opening of a large JSON file: rows, tokens and image headers per second, and memory.

    python -m benchmarks.doctor                   # a minute; writes benchmarks/results/doctor.{json,md}
    python -m benchmarks.doctor --rows 665000     # as many rows as llava_v1_5_mix665k; ten minutes, 2 GB of disk

The rows resemble those of llava_v1_5_mix665k: five exchanges, about 1.5 KB. The files are in the page cache, so no
disk is measured. The best of several rounds counts, because other work on the machine only adds time. The processes of
the check have already started; their start-up time is reported separately. For comparison, the same run decodes whole
images, and reads the file with `json.loads`.
"""

import json
import multiprocessing
import random
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import Progress
from transformers import CLIPImageProcessorPil

from benchmarks import common
from benchmarks.random_models import train_tokenizer
from processing_sq_llava import SQLlavaProcessor
from sq_llava.data.images import open_image
from sq_llava.data.rows import load_rows
from sq_llava.data.sources import DataSource
from sq_llava.doctor.check import IMAGES_AT_A_TIME, DataCheck, choose_rows, go_through, in_processes


WORDS = ["the", "picture", "shows", "dog", "cat", "running", "green", "grass", "people", "table", "under", "near"]
EXCHANGES = 5


def generate_rows(number: int, images: list[str]) -> Iterator[dict]:
    generator = random.Random(0)
    questions, answers = (
        [" ".join(generator.choices(WORDS, k=generator.randint(low, high))) for _ in range(500)]
        for low, high in ((5, 18), (10, 55))
    )
    for index in range(number):
        turns = []
        for exchange in range(EXCHANGES):
            begin = "<image>\n" if exchange == 0 and images else ""
            turns.append({"from": "human", "value": f"{begin}{generator.choice(questions)}?"})
            turns.append({"from": "gpt", "value": f"{generator.choice(answers).capitalize()}."})
        image = {"image": images[index % len(images)]} if images else {}
        yield {"id": f"{index:012d}", **image, "conversations": turns}


def write_rows(path: Path, number: int, images: list[str]) -> DataSource:
    with path.open("w") as stream:
        for index, row in enumerate(generate_rows(number, images)):
            stream.write(("[" if index == 0 else ",\n") + json.dumps(row))
        stream.write("]")
    return DataSource(str(path))


def write_images(folder: Path, number: int) -> list[str]:
    """Writes random, blurred pictures as JPEG files of 640 x 480 pixels."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    names = [f"images/{index:06d}.jpg" for index in range(number)]
    for name in names:
        pixels = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(folder / name, quality=90)
    return names


def make_processor() -> SQLlavaProcessor:
    texts = [turn["value"] for row in generate_rows(200, []) for turn in row["conversations"]]
    return SQLlavaProcessor(CLIPImageProcessorPil(), train_tokenizer(texts, vocab_size=8_000))


def fastest(function: Callable[[], object], rounds: int) -> float:
    return min(common.seconds_of(function) for _ in range(rounds))


def time_check(check: DataCheck, num_proc: int, rounds: int) -> tuple[float, float]:
    """Seconds of the first pass over all rows, which starts the processes, and of the fastest pass after it."""
    all_rows, quiet = choose_rows(check, None), Progress(disable=True)
    with in_processes(check, num_proc) as map_in_order:

        def run():
            go_through(check, all_rows, map_in_order, quiet)

        return common.seconds_of(run), fastest(run, rounds)


def time_rows(source: DataSource, processor: SQLlavaProcessor, num_proc: int, rounds: int, with_tokens: bool) -> dict:
    """Rows per second: the JSON is opened and every row is checked, without images."""

    def opened() -> DataCheck:
        return DataCheck([source], processor, read_images=False, measure_lengths=with_tokens, max_length=2048)

    opening, check = fastest(opened, rounds), opened()
    first, checking = time_check(check, num_proc, rounds)
    number = len(check.opened[0])
    return {
        "rows": number,
        "processes_start_seconds": first - checking,
        "open_seconds": opening,
        "check_seconds": checking,
        "rows_per_second": number / (opening + checking),
        "rows_per_second_opened": number / checking,
    }


def time_images(source: DataSource, processor: SQLlavaProcessor, num_proc: int, rounds: int) -> dict:
    """Image headers per second, and images per second that are decoded as in training."""
    with_images, without = (
        time_check(DataCheck([source], processor, measure_lengths=False, read_images=read), num_proc, rounds)[1]
        for read in (True, False)
    )
    paths = [str(Path(source.path).parent / row["image"]) for row in json.loads(Path(source.path).read_text())]
    with ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn")) as pool:

        def decode():
            list(pool.map(_decode, paths, chunksize=IMAGES_AT_A_TIME))

        decode()
        decoding = fastest(decode, rounds)
    headers_per_second = len(paths) / (with_images - without)
    return {
        "images": len(paths),
        "headers_per_second": headers_per_second,
        "decoded_per_second": len(paths) / decoding,
    }


def _decode(path: str) -> tuple[int, int]:
    return open_image(path).size


def measure_opening(path: str, form: str) -> dict:
    """Seconds and memory for opening a file. Call it in a fresh process, so that the peak is its own."""
    before, rows = common.resident_bytes("VmRSS"), []

    def read():
        rows.append(load_rows([DataSource(path)]) if form == "load_rows" else json.loads(Path(path).read_text()))

    seconds = common.seconds_of(read)
    peak = common.resident_bytes("VmHWM")
    return {"rows": len(rows[0]), "seconds": seconds, "peak_mib": peak / 2**20, "before_mib": before / 2**20}


def to_markdown(report: dict) -> str:
    checks, images, opening = (report[name] for name in ("rows", "images", "opening"))
    plain, tokens = checks["without_tokens"], checks["with_tokens"]
    rates = [
        ["rows opened and checked, without tokens and images", plain["rows"], "rows", plain["rows_per_second"]],
        ["the same, when the file is already open", plain["rows"], "rows", plain["rows_per_second_opened"]],
        ["rows opened and checked, with tokens counted", tokens["rows"], "rows", tokens["rows_per_second"]],
        ["image headers (JPEG, 640 x 480)", images["images"], "images", images["headers_per_second"]],
        ["the same images, decoded as in training", images["images"], "images", images["decoded_per_second"]],
    ]
    runs = {"`load_rows`": opening["load_rows"], "`json.loads` of the whole file": opening["json"]}
    memory = [
        [name, f"{run['seconds']:.1f} s", f"{run['peak_mib']:,.0f} MiB", f"{run['before_mib']:,.0f} MiB"]
        for name, run in runs.items()
    ]
    return common.text(
        "# The data check, and the opening of a large JSON file",
        f"The best of {report['rounds']} rounds, in {report['processes']} processes.",
        common.table(
            ["what", "number", "rate"],
            [[what, f"{number:,}", f"{rate:,.0f} {unit}/s"] for what, number, unit, rate in rates],
        ),
        f"Starting the processes takes about {plain['processes_start_seconds']:.0f} s more. The tokenizer is a "
        "byte-level BPE that was trained on the generated rows.",
        f"Opening {opening['load_rows']['rows']:,} rows in a file of {opening['bytes'] / 1e9:.2f} GB, once, in a new "
        "process:",
        common.table(["way", "time", "peak of resident memory, with libraries", "memory before"], memory),
    )


def main():
    arguments = common.parse_arguments(
        __doc__,
        rows=(20_000, "Number of rows."),
        rounds=(2, "Number of rounds; the best counts."),
        processes=(2, "Number of processes that check."),
    )
    num_rows, rounds, num_proc = arguments.rows, arguments.rounds, arguments.processes
    if arguments.quick:
        num_rows, rounds, num_proc = 5_000, 1, 1
    num_images = min(4_000, num_rows // 50)
    with tempfile.TemporaryDirectory() as temporary:
        folder, processor = Path(temporary), make_processor()
        print("writing files", flush=True)
        names = write_images(folder, num_images)
        many = write_rows(folder / "many.json", num_rows, names)
        some = write_rows(folder / "some.json", num_rows // 10, names)
        illustrated = write_rows(folder / "images.json", num_images, names)
        print("checking rows", flush=True)
        checks = {
            "without_tokens": time_rows(many, processor, num_proc, rounds, with_tokens=False),
            "with_tokens": time_rows(some, processor, num_proc, rounds, with_tokens=True),
        }
        print("checking images", flush=True)
        images = time_images(illustrated, processor, num_proc, rounds)
        print("opening a file", flush=True)
        opening = {"bytes": Path(many.path).stat().st_size}
        for form in ("load_rows", "json"):
            opening[form] = common.in_fresh_process(measure_opening, many.path, form)
    report = {"processes": num_proc, "rounds": rounds, "rows": checks, "images": images, "opening": opening}
    common.save("doctor", report, to_markdown, arguments)


if __name__ == "__main__":
    main()
