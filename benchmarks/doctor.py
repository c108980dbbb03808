"""The data check and the opening of a large JSON file: rows, tokens and image headers a second, and memory.

    python -m benchmarks.doctor                   # a minute; writes benchmarks/results/doctor.{json,md}
    python -m benchmarks.doctor --rows 665000     # as many as in llava_v1_5_mix665k; ten minutes, 2 GB of disk
    python -m benchmarks.doctor --quick           # few rows, writes nothing

Rows are made to be like those of llava_v1_5_mix665k: five exchanges, about 1.5 KB. Files lie in the page cache, so
that no disk is measured. The best of several rounds counts, as other work on the machine only adds time. The check
runs in processes that have started already: the seconds that this takes stand apart. Beside it, in the same run:
images decoded as a whole, and a file read by `json.loads`.
"""

import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import Progress
from tokenizers import ByteLevelBPETokenizer
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from benchmarks import common
from processing_sq_llava import SYSTEM_MESSAGE, SQLlavaProcessor
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
    """JPEG files of 640 x 480: a random, blurred picture each."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    names = [f"images/{index:06d}.jpg" for index in range(number)]
    for name in names:
        pixels = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(folder / name, quality=90)
    return names


def make_processor() -> SQLlavaProcessor:
    trained = ByteLevelBPETokenizer()
    texts = [turn["value"] for row in generate_rows(200, []) for turn in row["conversations"]]
    trained.train_from_iterator(
        [SYSTEM_MESSAGE, *texts], vocab_size=8_000, special_tokens=["</s>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="</s>")
    return SQLlavaProcessor(CLIPImageProcessorPil(), tokenizer)


def time_rows(source: DataSource, processor: SQLlavaProcessor, num_proc: int, rounds: int, with_tokens: bool) -> dict:
    """Rows a second: of the JSON opened and every row checked, without images."""
    settings = {"read_images": False, "measure_lengths": with_tokens, "max_length": 2048}
    opening = min(common.seconds_of(lambda: DataCheck([source], processor, **settings)) for _ in range(rounds))
    check = DataCheck([source], processor, **settings)
    all_rows, quiet = choose_rows(check, None), Progress(disable=True)
    with in_processes(check, num_proc) as map_in_order:
        first, *others = (
            common.seconds_of(lambda: go_through(check, all_rows, map_in_order, quiet)) for _ in range(1 + rounds)
        )
    checking = min(others)
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
    """Image headers a second, and images decoded a second as training does."""
    check = DataCheck([source], processor, measure_lengths=False)
    without = DataCheck([source], processor, measure_lengths=False, read_images=False)
    all_rows, quiet = choose_rows(check, None), Progress(disable=True)
    with in_processes(check, num_proc) as map_in_order, in_processes(without, num_proc) as map_rows:
        go_through(check, all_rows, map_in_order, quiet)
        go_through(without, all_rows, map_rows, quiet)
        seconds = min(
            common.seconds_of(lambda: go_through(check, all_rows, map_in_order, quiet)) for _ in range(rounds)
        )
        seconds -= min(
            common.seconds_of(lambda: go_through(without, all_rows, map_rows, quiet)) for _ in range(rounds)
        )
    paths = [str(Path(source.path).parent / row["image"]) for row in json.loads(Path(source.path).read_text())]
    with ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn")) as pool:

        def decode():
            list(pool.map(_decode, paths, chunksize=IMAGES_AT_A_TIME))

        decode()
        decoding = min(common.seconds_of(decode) for _ in range(rounds))
    return {
        "images": len(paths),
        "headers_per_second": len(paths) / seconds,
        "decoded_per_second": len(paths) / decoding,
    }


def _decode(path: str) -> tuple[int, int]:
    return open_image(path).size


def measure_opening(path: str, form: str) -> dict:
    """Call it in a fresh process: the peak of its memory counts."""
    before = common.resident_bytes("VmRSS")
    start = time.perf_counter()
    number = len(load_rows([DataSource(path)]) if form == "load_rows" else json.loads(Path(path).read_text()))
    seconds = time.perf_counter() - start
    peak = common.resident_bytes("VmHWM")
    return {"rows": number, "seconds": seconds, "peak_mib": peak / 2**20, "before_mib": before / 2**20}


def time_opening(source: DataSource) -> dict:
    result = {"bytes": Path(source.path).stat().st_size}
    for form in ("load_rows", "json"):
        result[form] = common.in_fresh_process(measure_opening, source.path, form)
    return result


def to_markdown(report: dict) -> str:
    checks, images, opening = (report[name] for name in ("rows", "images", "opening"))
    plain, tokens = checks["without_tokens"], checks["with_tokens"]
    lines = [
        "# The data check, and the opening of a large JSON file",
        "",
        f"The best of {report['rounds']} rounds, in {report['processes']} processes.",
        "",
        "| what | number | rate |",
        "|---|--:|--:|",
        f"| rows opened and checked, without tokens and images | {plain['rows']:,} | "
        f"**{plain['rows_per_second']:,.0f} rows/s** |",
        f"| the same, of a file opened already | {plain['rows']:,} | {plain['rows_per_second_opened']:,.0f} rows/s |",
        f"| rows opened and checked, with their tokens counted | {tokens['rows']:,} | "
        f"{tokens['rows_per_second']:,.0f} rows/s |",
        f"| image headers (JPEG, 640 x 480), each file once | {images['images']:,} | "
        f"**{images['headers_per_second']:,.0f} images/s** |",
        f"| the same images decoded as training does | {images['images']:,} | "
        f"{images['decoded_per_second']:,.0f} images/s |",
        "",
        f"Before that, the processes start, which takes about {plain['processes_start_seconds']:.0f} s. The tokenizer "
        "is a byte-level BPE trained on the generated rows.",
        "",
        f"{opening['load_rows']['rows']:,} rows in a file of {opening['bytes'] / 1e9:.2f} GB, by a new process, once:",
        "",
        "| by | time | peak of resident memory, libraries included | before |",
        "|---|--:|--:|--:|",
    ]
    for form, name in (("load_rows", "`load_rows`"), ("json", "`json.loads` of the whole file")):
        run = opening[form]
        lines.append(
            f"| {name} | {run['seconds']:.1f} s | {run['peak_mib']:,.0f} MiB | {run['before_mib']:,.0f} MiB |"
        )
    return "\n".join(lines)


def main():
    arguments = common.parse_arguments(__doc__, rows=20_000, rounds=2, processes=2)
    num_rows, rounds, num_proc = arguments.rows, arguments.rounds, arguments.processes
    if arguments.quick:
        num_rows, rounds, num_proc = 5_000, 1, 1
    num_images = min(4_000, num_rows // 50)
    report = {"processes": num_proc, "rounds": rounds}
    with tempfile.TemporaryDirectory() as temporary:
        folder, processor = Path(temporary), make_processor()
        print("making files", flush=True)
        names = write_images(folder, num_images)
        many = write_rows(folder / "many.json", num_rows, names)
        some = write_rows(folder / "some.json", num_rows // 10, names)
        illustrated = write_rows(folder / "images.json", num_images, names)
        print("rows", flush=True)
        report["rows"] = {
            "without_tokens": time_rows(many, processor, num_proc, rounds, with_tokens=False),
            "with_tokens": time_rows(some, processor, num_proc, rounds, with_tokens=True),
        }
        print("images", flush=True)
        report["images"] = time_images(illustrated, processor, num_proc, rounds)
        print("opening", flush=True)
        report["opening"] = time_opening(many)
    common.save("doctor", report, to_markdown(report), arguments)


if __name__ == "__main__":
    main()
