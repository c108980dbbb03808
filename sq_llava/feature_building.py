"""Runs a frozen vision tower once over all images of a recipe, and keeps its features (`sq_llava/feature_cache.py`).

    sq-llava cache-features --config recipe.yaml --vision_lora_r 0 --output features --max-size 800GB
    torchrun --nproc_per_node 8 -m sq_llava.cli cache-features --config recipe.yaml --vision_lora_r 0 --output features

First every row is read and every image file looked at as the doctor does, and hashed: what is wrong is said before the
tower runs, and how much disk it will take. Then each process writes shards of its own. An image that is there already,
from this recipe or another one, is not encoded again. Killed, it goes on where it was: the shards, and the batches
within them, are the same for any number of processes and kills. What it does not do: load the language model of a
recipe that names the two towers.
"""

import fcntl
import json
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress, TextColumn
from torch.utils.data import DataLoader, Dataset
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, SFTConfig

from modeling_sq_llava import SQLlavaForConditionalGeneration, SQLlavaModel
from processing_sq_llava import SQLlavaProcessor
from sq_llava.adapter import without_adapter
from sq_llava.checkpoint import (
    compose_config,
    load_base_of,
    load_model,
    load_vision_tower,
    text_config_of,
)
from sq_llava.data import load_rows
from sq_llava.feature_cache import (
    DIGEST,
    SHARDS,
    FeatureCache,
    FileIndex,
    as_bytes,
    digest_of,
    image_bytes,
    processor_key,
    short,
    tower_key,
    write_whole,
)
from sq_llava.images import Fault, image_faults, image_name, open_image
from sq_llava.locations import is_adapter
from sq_llava.settings import SQLlavaArguments, composed_processor, require_frozen_tower, starting_point
from sq_llava.sources import DataSource


# A kill costs each process at most what it has of one shard.
SHARD_BYTES = 2**28
ROWS_AT_A_TIME = 256
READING_THREADS = 8
SHOWN_ERRORS = 5
UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_size(text: str) -> int:
    """Bytes of a size such as `200GB`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w+)", text)
    if match is None or match[2] not in UNITS:
        raise ValueError(f"max-size is {text!r}: give a number and one of {', '.join(UNITS)}, such as 200GB.")
    return int(float(match[1]) * UNITS[match[2]])


def size_of(num_bytes: float) -> str:
    for unit in ("GB", "MB"):
        if num_bytes >= UNITS[unit]:
            return f"{num_bytes / UNITS[unit]:,.1f} {unit}"
    return f"{num_bytes / 1000:,.1f} kB"


def autocast_dtype(training_args: SFTConfig) -> torch.dtype | None:
    """The mixed precision that a forward pass has in training."""
    return torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None


class ImagePlace(NamedTuple):
    """Where an image stands: the number of its data set, its row there, and its place among the row's images."""

    rows: int
    row: int
    position: int


@dataclass
class Images:
    """
    The images of several data sets.

    Args:
        rows (`list[datasets.Dataset]`): Each as of [`load_rows`].
        sources (`list[list[DataSource]]`): What each was made of.
    """

    rows: list[datasets.Dataset]
    sources: list[list[DataSource]]

    def read(self, image: ImagePlace) -> str | dict[str, Any]:
        """The path of an image, or what stands in its row."""
        return self.rows[image.rows][image.row]["images"][image.position]

    def place(self, image: ImagePlace) -> str:
        row, unread = (rows[image.row] for rows in (self.rows[image.rows], self.rows[image.rows].with_format(None)))
        return f"{self.sources[image.rows][unread['source']].path}, row {unread['index']} (id {row['id']!r})"

    def of_process(self, process: int, num_processes: int) -> Iterator[list[tuple[ImagePlace, str | dict[str, Any]]]]:
        """The images of a process's share of the rows, some rows at a time."""
        for number, rows in enumerate(self.rows):
            begin, end = (len(rows) * part // num_processes for part in (process, process + 1))
            for first in range(begin, end, ROWS_AT_A_TIME):
                of_rows = rows[first : min(first + ROWS_AT_A_TIME, end)]["images"]
                yield [
                    (ImagePlace(number, first + offset, position), image)
                    for offset, images in enumerate(of_rows)
                    for position, image in enumerate(images)
                ]


class LookedAt(NamedTuple):
    """What one image file gives: its digest; its path, size and time of change if it is a file; what is wrong."""

    digest: bytes
    path: bytes | None = None
    size: int = 0
    time: int = 0
    fault: str | None = None


def look_at(image: str | dict[str, Any], known: FileIndex) -> LookedAt:
    """Reads an image file once, for its digest and for what the doctor says of it."""
    try:
        if isinstance(image, dict):
            status, digest = None, None
        else:
            status, digest = Path(image).stat(), known.find(Path(image))
        if digest is None:
            data = image_bytes(image)
            digest, faults = digest_of(data), list(image_faults({"bytes": data, "path": image_name(image)}))
        else:
            faults = []  # it was looked at before
    except OSError as error:
        again = Fault("image_unreadable", f"image {image_name(image)!r} could not be read: {error}.", "Try it again.")
        digest, faults = b"", list(image_faults(image)) or [again]
    wrong = next((f"{fault.message} {fault.fix}" for fault in faults if fault.level == "error"), None)
    if wrong or status is None:
        return LookedAt(digest, fault=wrong)
    return LookedAt(digest, digest_of(image.encode()), status.st_size, status.st_mtime_ns)


def look_at_all(images: Images, known: FileIndex, progress: Progress) -> tuple[dict[bytes, ImagePlace], FileIndex]:
    """
    Looks at every image, each process at its share.

    Returns:
        The first place of each content, in the order of the rows; and the digests of all files.

    Raises:
        ValueError: with the first of those that cannot be read.
    """
    state = PartialState()
    bar = progress.add_task("Rows", total=sum(map(len, images.rows)) / state.num_processes, speed="")
    contents, files, wrong = {}, {}, []
    seen = set()
    with ThreadPoolExecutor(READING_THREADS) as pool:
        for batch in images.of_process(state.process_index, state.num_processes):
            new = []
            for image, source in batch:
                if isinstance(source, dict) or source not in seen:
                    new.append((image, source))
                if isinstance(source, str):
                    seen.add(source)
            for (image, _), looked_at in zip(new, pool.map(lambda pair: look_at(pair[1], known), new)):
                if looked_at.fault is not None:
                    wrong.append(f"{images.place(image)}: {looked_at.fault}")
                    continue
                contents.setdefault(looked_at.digest, image)
                if looked_at.path is not None:
                    files[looked_at.path] = (looked_at.size, looked_at.time, looked_at.digest)
            progress.advance(bar, ROWS_AT_A_TIME)
    found = gather_object([(contents, files, wrong)])
    wrong = [line for *_, lines in found for line in lines]
    if wrong:
        more = [f"and {len(wrong) - SHOWN_ERRORS:,} more."] if len(wrong) > SHOWN_ERRORS else []
        raise ValueError("\n  ".join([f"{len(wrong):,} images cannot be read:", *wrong[:SHOWN_ERRORS], *more]))
    first = {}
    for digest, image in sorted(((d, i) for c, *_ in found for d, i in c.items()), key=lambda pair: pair[1]):
        first.setdefault(digest, image)
    return first, join_files(known, {path: entry for _, f, _ in found for path, entry in f.items()})


def join_files(known: FileIndex, files: dict[bytes, tuple[int, int, bytes]]) -> FileIndex:
    before = zip(known.paths.tolist(), known.sizes.tolist(), known.times.tolist(), known.digests.tolist())
    joined = sorted(({path: entry for path, *entry in before} | files).items())
    sizes, times, digests = zip(*(entry for _, entry in joined)) if joined else ((), (), ())
    return FileIndex(
        np.array([path for path, _ in joined], DIGEST),
        np.array(sizes, np.int64),
        np.array(times, np.int64),
        np.array(digests, DIGEST),
    )


def load_tower(arguments: SQLlavaArguments, model_config: ModelConfig) -> SQLlavaModel:
    """The model with its vision tower as training will have it; made from parts, the rest is on the device "meta"."""
    start, parts = starting_point(arguments, model_config)
    loading = {"attn_implementation": model_config.attn_implementation}
    if start is not None:
        load = load_base_of if is_adapter(start) else load_model
        whole = load(start, dtype=model_config.dtype, **loading)
        whole.model.language_model = None
        return whole.model.eval()
    dtype = model_config.dtype
    if dtype in (None, "auto"):
        dtype = text_config_of(parts[1]).dtype  # training gives the tower that of the language model
        if dtype is None:
            raise ValueError(f"dtype is 'auto', but the configuration of {parts[1]} names none: give dtype.")
    with torch.device("meta"):
        model = SQLlavaModel._from_config(compose_config(*parts), **loading)
    model.vision_tower = load_vision_tower(parts[0], dtype=dtype, **loading)
    return model.eval()


@dataclass
class PixelReader(Dataset):
    """Images of given contents as pixels; a `ValueError` in place of one that cannot be read."""

    images: Images
    processor: SQLlavaProcessor
    chosen: list[tuple[bytes, ImagePlace]]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> torch.Tensor | ValueError:
        digest, place = self.chosen[index]
        image = self.images.read(place)
        try:
            data = image_bytes(image)
            if digest_of(data) != digest:
                raise ValueError(f"{image_name(image)} has changed since the start: run the same once more.")
            opened = open_image({"bytes": data, "path": image_name(image)})
        except (OSError, ValueError) as error:
            return ValueError(f"{self.images.place(place)}: {error}")
        return self.processor.image_processor([opened], return_tensors="pt")["pixel_values"][0]


@dataclass
class Encoder:
    """
    Args:
        model ([`SQLlavaModel`]): With its tower on the device to compute on.
        processor ([`SQLlavaProcessor`]): Of the model.
        autocast (`torch.dtype`, *optional*): Of mixed precision.
        batch_size, num_workers (`int`): Images at a time, and processes that read them.
    """

    model: SQLlavaModel
    processor: SQLlavaProcessor
    autocast: torch.dtype | None
    batch_size: int
    num_workers: int
    bytes_of_image: int = field(init=False)
    images_of_shard: int = field(init=False)

    def __post_init__(self):
        self.tower = tower_key(self.model, self.autocast)
        self.preprocessing = processor_key(self.processor)
        side = self.model.config.vision_config.image_size
        channels = self.model.vision_tower.embeddings.patch_embedding.in_channels
        blank = self.features(torch.zeros(1, channels, side, side))
        self.blank = blank[0]
        self.bytes_of_image = self.blank.nbytes
        batches = SHARD_BYTES // self.bytes_of_image // self.batch_size
        self.images_of_shard = max(batches, 1) * self.batch_size

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        device = self.model.vision_tower.embeddings.patch_embedding.weight.device
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            return self.model.get_vision_features(pixel_values)

    def encode(self, shards: list[list[tuple[bytes, ImagePlace]]], images: Images) -> Iterator[torch.Tensor]:
        """The features of shards, a batch at a time. No batch has images of two: so it is the same in any run."""
        starts = np.cumsum([0, *map(len, shards)]).tolist()
        batches = [
            range(start + first, start + min(first + self.batch_size, len(shard)))
            for start, shard in zip(starts, shards)
            for first in range(0, len(shard), self.batch_size)
        ]
        reader = PixelReader(images, self.processor, [entry for shard in shards for entry in shard])
        for pixels in DataLoader(reader, batch_sampler=batches, num_workers=self.num_workers, collate_fn=list):
            for error in pixels:
                if isinstance(error, ValueError):
                    raise error
            yield self.features(torch.stack(pixels))

    def write(self, shards: list[list[tuple[bytes, ImagePlace]]], images: Images, folder: Path, advance) -> None:
        """Writes shards of these images; `advance` is told of how many images there are features."""
        # One entry: safetensors writes several in any order, and the bytes would differ from run to run.
        metadata = {"made_by": json.dumps({"tower": self.tower, "preprocessing": self.preprocessing})}
        encoded = self.encode(shards, images)
        with ThreadPoolExecutor(1) as pool:  # the next shard is computed while one is written
            writing = pool.submit(lambda: None)
            for shard in shards:
                features = torch.empty(len(shard), *self.blank.shape, dtype=self.blank.dtype)
                for first in range(0, len(shard), self.batch_size):
                    batch = next(encoded)
                    features[first : first + len(batch)] = batch
                    advance(len(batch))
                writing.result()
                digests = np.array([digest for digest, _ in shard], DIGEST)
                file = folder / SHARDS.replace("*", digests[0].decode())
                tensors = {"features": features, "digests": as_bytes(digests)}
                writing = pool.submit(write_whole, tensors, file, metadata)
            writing.result()


@contextmanager
def only_build(folder: Path) -> Iterator[None]:
    """Holds a folder for the processes of one launch, and removes what a killed one has left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    state = PartialState()
    with (folder / "building.lock").open("w") as lock:
        if state.is_main_process:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"{folder}: another cache-features is writing there. Let it end first.") from error
            for part in folder.glob("*.part"):
                part.unlink()
        state.wait_for_everyone()
        yield


def require_space(folder: Path, num_bytes: int, max_size: int | None) -> None:
    """
    Raises:
        ValueError: if so many bytes beside what is in the folder are more than `max_size`, or than the disk has.
    """
    there = sum(shard.stat().st_size for shard in folder.glob(SHARDS))
    if max_size is not None and there + num_bytes > max_size:
        raise ValueError(
            f"{folder} would have {size_of(there + num_bytes)}, {size_of(there)} of them already there, more than "
            f"max-size {size_of(max_size)}. Raise that, or take fewer rows (num_rows of a data set)."
        )
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(
            f"{folder}: {size_of(num_bytes)} are to be written, but the disk has {size_of(free)} free. Give a "
            "folder on another disk, or take fewer rows (num_rows of a data set)."
        )


@dataclass(frozen=True)
class Plan:
    """What is to be made: the images of which there are no features yet, and what is known of all files."""

    images: Images
    missing: list[tuple[bytes, ImagePlace]]
    num_contents: int
    files: FileIndex


def build(
    recipe: tuple[SQLlavaArguments, SFTConfig, ModelConfig],
    folder: Path,
    max_size: int | None,
    batch_size: int,
    command: str,
    console: Console,
) -> None:
    """
    Makes the features of all images of a recipe that are not in the folder yet, in all processes of a launch.

    Args:
        recipe: As `parse_settings` gives it.
        folder (`Path`): To write to.
        max_size (`int`, *optional*): Most bytes that the folder may have.
        batch_size (`int`): Images that the tower is given at a time.
        command (`str`): What an error says is to be run.
        console (`rich.console.Console`): For progress and results.

    Raises:
        ValueError: if the tower is not frozen, a row or an image is wrong, another tower or preprocessing made the
            folder, or there is not enough space.
    """
    arguments, training_args, model_config = recipe
    require_frozen_tower(arguments, model_config)
    processor = composed_processor(arguments, model_config)
    sources = [each for each in (arguments.datasets, arguments.eval_datasets) if each]
    images = Images([load_rows(each, training_args.seed, processor.image_seq_length) for each in sources], sources)
    with only_build(folder), progress_of_main_process(console) as progress:
        model = load_tower(arguments, model_config)
        model.vision_tower.to(training_args.device)
        workers = training_args.dataloader_num_workers
        encoder = Encoder(model, processor, autocast_dtype(training_args), batch_size, workers)
        there = FeatureCache(folder, command) if any(folder.glob(SHARDS)) else None
        if there is not None:
            there.require(encoder.tower, encoder.preprocessing)
        contents, files = look_at_all(images, FileIndex.read(folder), progress)
        missing = [(digest, place) for digest, place in contents.items() if there is None or digest not in there]
        plan = Plan(images, missing, len(contents), files)
        if PartialState().is_main_process:
            announce(plan, encoder, folder, console)
        require_space(folder, len(missing) * encoder.bytes_of_image, max_size)
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            files.write(folder)
        run(plan, encoder, folder, progress, console)


def run(plan: Plan, encoder: Encoder, folder: Path, progress: Progress, console: Console) -> None:
    """Writes the shards of a plan, each process every so-many-th."""
    state = PartialState()
    size = encoder.images_of_shard
    shards = [plan.missing[first : first + size] for first in range(0, len(plan.missing), size)]
    own = shards[state.process_index :: state.num_processes]
    start = time.perf_counter()
    bar = progress.add_task("Images", total=sum(map(len, own)), speed="")

    def advance(number: int) -> None:
        progress.advance(bar, number)
        rate = state.num_processes * progress.tasks[bar].completed / (time.perf_counter() - start)
        progress.update(bar, speed=f"{rate:,.1f} images/s, {size_of(rate * encoder.bytes_of_image)}/s")

    encoder.write(own, plan.images, folder, advance)
    state.wait_for_everyone()
    if state.is_main_process:
        seconds = time.perf_counter() - start
        rate = len(plan.missing) / seconds
        say(console, f"{len(plan.missing):,} images in {seconds:,.1f} s, {rate:,.1f} a second.")
        say(console, f"Train with --feature_cache {folder}")


def announce(plan: Plan, encoder: Encoder, folder: Path, console: Console) -> None:
    """Says what is to be done, and the size that it takes."""
    shape = " x ".join(f"{number:,}" for number in encoder.blank.shape)
    each, missing = encoder.bytes_of_image, len(plan.missing)
    dtype = str(encoder.blank.dtype).removeprefix("torch.")
    say(
        console,
        f"{plan.num_contents:,} different images, of which {plan.num_contents - missing:,} are in {folder} already. "
        f"{missing:,} x {size_of(each)} ({shape}, {dtype}) are {size_of(missing * each)}. Tower "
        f"{short(encoder.tower)}, preprocessing {short(encoder.preprocessing)}.",
    )


def say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def progress_of_main_process(console: Console) -> Progress:
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[speed]}"))
    return Progress(*columns, console=console, transient=True, disable=not PartialState().is_main_process)


def check_cache(
    cache: FeatureCache,
    model: PeftModel | SQLlavaForConditionalGeneration,
    processor: SQLlavaProcessor,
    training_args: SFTConfig,
    rows: list[datasets.Dataset | None],
    limit: int | None,
) -> None:
    """
    Looks whether a cache is of this tower and preprocessing, and has the images of about `limit` rows.

    Raises:
        ValueError: if not, with both towers or the row.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"feature_cache is {cache.folder}: under ZeRO-3 a process has no whole vision tower, and cannot tell "
            "whether the features are its own. Launch with ZeRO-2, DDP or FSDP."
        )
    tower = tower_key(without_adapter(model).model, autocast_dtype(training_args))
    cache.require(tower, processor_key(processor))
    for each in rows:
        if each is not None:
            cache.check_rows(each, limit)
