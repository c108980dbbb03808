"""The data check and the opening of a large JSON file: rows, tokens and image headers a second, and memory.

    python benchmarks/doctor.py            # writes benchmarks/results/doctor.{json,md}; ten minutes, 2 GB of disk
    python benchmarks/doctor.py --quick    # fewer rows, writes nothing

Rows are made to be like those of llava_v1_5_mix665k: five exchanges, about 1.5 KB. Files lie in the page cache, so
that no disk is measured. The best of several rounds counts, as other work on the machine only adds time. The check
runs in processes that have started already: the seconds that this takes stand apart. Beside it, in the same run:
images decoded as a whole, and a file read by `json.loads`.
"""

import argparse
import json
import multiprocessing
import platform
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from rich.progress import Progress
from tokenizers import ByteLevelBPETokenizer
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from processing_sq_llava import SYSTEM_MESSAGE, SQLlavaProcessor
from sq_llava.data import load_rows
from sq_llava.doctor import IMAGES_AT_A_TIME, DataCheck, choose_rows, go_through, in_processes
from sq_llava.images import open_image
from sq_llava.sources import DataSource


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


def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def time_rows(source: DataSource, processor: SQLlavaProcessor, num_proc: int, rounds: int, with_tokens: bool) -> dict:
    """Rows a second: of the JSON opened and every row checked, without images."""
    settings = {"read_images": False, "measure_lengths": with_tokens, "max_length": 2048}
    opening = min(seconds_of(lambda: DataCheck([source], processor, **settings)) for _ in range(rounds))
    check = DataCheck([source], processor, **settings)
    all_rows, quiet = choose_rows(check, None), Progress(disable=True)
    with in_processes(check, num_proc) as map_in_order:
        first, *others = (
            seconds_of(lambda: go_through(check, all_rows, map_in_order, quiet)) for _ in range(1 + rounds)
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
        seconds = min(seconds_of(lambda: go_through(check, all_rows, map_in_order, quiet)) for _ in range(rounds))
        seconds -= min(seconds_of(lambda: go_through(without, all_rows, map_rows, quiet)) for _ in range(rounds))
    paths = [str(Path(source.path).parent / row["image"]) for row in json.loads(Path(source.path).read_text())]
    with ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn")) as pool:

        def decode():
            list(pool.map(_decode, paths, chunksize=IMAGES_AT_A_TIME))

        decode()
        decoding = min(seconds_of(decode) for _ in range(rounds))
    return {
        "images": len(paths),
        "headers_per_second": len(paths) / seconds,
        "decoded_per_second": len(paths) / decoding,
    }


def _decode(path: str) -> tuple[int, int]:
    return open_image(path).size


def measure_opening(path: str, form: str) -> dict:
    """Call it in a fresh process: the peak of its memory counts."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    number = len(load_rows([DataSource(path)]) if form == "load_rows" else json.loads(Path(path).read_text()))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"rows": number, "seconds": seconds, "peak_mib": peak / 1024, "before_mib": before / 1024}


def in_fresh_process(function: Callable, *arguments):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def time_opening(source: DataSource, rounds: int) -> dict:
    result = {"bytes": Path(source.path).stat().st_size}
    for form in ("load_rows", "json"):
        runs = [in_fresh_process(measure_opening, source.path, form) for _ in range(rounds)]
        result[form] = min(runs, key=lambda run: run["seconds"])
        result[form]["peak_mib"] = max(run["peak_mib"] for run in runs)
    return result


def to_markdown(report: dict) -> str:
    checks, images, opening, host = (report[name] for name in ("rows", "images", "opening", "machine"))
    plain, tokens = checks["without_tokens"], checks["with_tokens"]
    lines = [
        "# The data check, and the opening of a large JSON file",
        "",
        f"Made by `{report['command']}`: the best of {report['rounds']} rounds, in {report['processes']} processes. "
        f"Other work ran too; the load was {report['load_before']:.1f} before and {report['load_after']:.1f} after.",
        f"{host['processor']}, Pillow {host['pillow']}, transformers {host['transformers']}, Python {host['python']}.",
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
        f"{opening['load_rows']['rows']:,} rows in a file of {opening['bytes'] / 1e9:.2f} GB, by a fresh process:",
        "",
        "| by | time | peak of resident memory, libraries included | before |",
        "|---|--:|--:|--:|",
    ]
    for form, name in (("load_rows", "`load_rows`"), ("json", "`json.loads` of the whole file")):
        run = opening[form]
        lines.append(
            f"| {name} | {run['seconds']:.1f} s | {run['peak_mib']:,.0f} MiB | {run['before_mib']:,.0f} MiB |"
        )
    return "\n".join(lines) + "\n"


def load_average() -> float:
    return float(Path("/proc/loadavg").read_text().split()[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows, one round; print, write nothing")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--output-dir", type=Path, default=Path(__file__).parent / "results", help="default: benchmarks/results"
    )
    arguments = parser.parse_args()
    num_rows, num_tokenized, num_images, num_opened = (200_000, 50_000, 4_000, 665_000)
    if arguments.quick:
        num_rows, num_tokenized, num_images, num_opened = (5_000, 1_000, 200, 5_000)
    rounds, num_proc = (1 if arguments.quick else arguments.rounds), arguments.processes
    report = {
        "command": " ".join(["python", "benchmarks/doctor.py", *sys.argv[1:]]),
        "machine": {
            "processor": f"{multiprocessing.cpu_count()} CPU cores ({platform.machine()})",
            "pillow": Image.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "processes": num_proc,
        "rounds": rounds,
        "load_before": load_average(),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder, processor = Path(temporary), make_processor()
        print("making files", flush=True)
        names = write_images(folder, num_images)
        many, some = (
            write_rows(folder / "many.json", num_rows, names),
            write_rows(folder / "some.json", num_tokenized, names),
        )
        illustrated = write_rows(folder / "images.json", num_images, names)
        large = write_rows(folder / "large.json", num_opened, names)
        print("rows", flush=True)
        report["rows"] = {
            "without_tokens": time_rows(many, processor, num_proc, rounds, with_tokens=False),
            "with_tokens": time_rows(some, processor, num_proc, rounds, with_tokens=True),
        }
        print("images", flush=True)
        report["images"] = time_images(illustrated, processor, num_proc, rounds)
        print("opening", flush=True)
        report["opening"] = time_opening(large, rounds)
    report["load_after"] = load_average()
    print("\n" + to_markdown(report))
    if not arguments.quick:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        path = arguments.output_dir / "doctor.json"
        path.write_text(json.dumps(report, indent=2) + "\n")
        path.with_suffix(".md").write_text(to_markdown(report))
        print(f"Written to {path} and .md")


if __name__ == "__main__":
    main()
