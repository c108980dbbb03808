"""Features of a frozen vision tower on disk: each image once, read instead of decoded and encoded.

    sq-llava cache-features --config recipe.yaml --vision_lora_r 0 --output features
    accelerate launch -m train_sft --config recipe.yaml --vision_lora_r 0 --feature_cache features

A folder holds shards, `features-<digest of their first image>.safetensors`:

    features   (images, N, D), in the precision that the tower computes in: what the prototype extractor reads
    digests    (images, 32) bytes, the BLAKE2b of each image file in hexadecimal
    metadata   the tower and the preprocessing that made them, as JSON

and `files.safetensors`, which knows the digest of a file by its path, size and time of change, so that training need
not read the file; where these differ, its bytes decide. A file stands under its final name only when it is whole.

Here the folder is read; `sq_llava/feature_building.py` writes it. What it does not do: compute what is missing.
"""

import json
import os
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from modeling_sq_llava import SQLlavaModel
from processing_sq_llava import SQLlavaProcessor
from sq_llava.images import image_name


FILES = "files.safetensors"
SHARDS = "features-*.safetensors"
DIGEST_BYTES = 16
# Hexadecimal: NumPy cuts zeros off the end of raw bytes.
DIGEST = np.dtype(f"S{2 * DIGEST_BYTES}")
# What decides the pixels of an image.
PREPROCESSING = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_pad", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std",
)  # fmt: skip
# Of a tower's configuration, what decides its features beside the weights.
TOWER_SETTINGS = ("model_type", "hidden_act", "num_attention_heads", "layer_norm_eps", "patch_size")


def digest_of(data: bytes) -> bytes:
    return blake2b(data, digest_size=DIGEST_BYTES).hexdigest().encode()


def image_bytes(image: str | dict[str, Any]) -> bytes:
    """The bytes of an image file: of one that stands in its row, or at a path."""
    return image["bytes"] if isinstance(image, dict) else Path(image).read_bytes()


def tower_key(model: SQLlavaModel, autocast: torch.dtype | None) -> dict[str, Any]:
    """
    What decides the features of pixels: the weights that are run, which layer is read and how, the precision.

    Args:
        model ([`SQLlavaModel`]): Its vision tower, whole and on any device but "meta".
        autocast (`torch.dtype`, *optional*): Of mixed precision, in which the tower runs in training.
    """
    config, tower = model.config, model.vision_tower
    hashed = blake2b(digest_size=DIGEST_BYTES)
    run = [tower.embeddings, *tower.encoder.layers[: config.num_vision_layers_used]]
    if config.vision_config.model_type == "clip_vision_model":
        run.insert(1, tower.pre_layrnorm)
    elif config.vision_config.model_type == "blip_2_vision_model":
        run.append(tower.post_layernorm)
    for module in run:
        for name, weight in module.named_parameters():
            hashed.update(f"{name}{tuple(weight.shape)}".encode())
            hashed.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    key = {
        "weights": hashed.hexdigest(),
        "layers": config.num_vision_layers_used,
        "select": config.vision_feature_select_strategy,
        "dtype": str(tower.embeddings.patch_embedding.weight.dtype).removeprefix("torch."),
        "autocast": str(autocast).removeprefix("torch."),
        **{name: getattr(config.vision_config, name) for name in TOWER_SETTINGS},
    }
    return as_read(key)


def processor_key(processor: SQLlavaProcessor) -> dict[str, Any]:
    """What decides the pixels of an image file."""
    image_processor = processor.image_processor
    settings = image_processor.to_dict()
    # The classes of Pillow and of torchvision resize a little differently.
    return as_read({"class": type(image_processor).__name__, **{name: settings.get(name) for name in PREPROCESSING}})


def as_read(key: dict[str, Any]) -> dict[str, Any]:
    """A key as a shard gives it back: with lists in place of tuples."""
    return json.loads(json.dumps(key))


def short(key: dict[str, Any]) -> str:
    """A key in a few characters."""
    return blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=4).hexdigest()


@cache  # a shard is mapped, not held: a process keeps no open file and no memory for it
def _features_of(shard: Path):
    with safe_open(shard, "pt") as file:
        return file.get_slice("features")


def _column(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().view(DIGEST).ravel()


def as_bytes(digests: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(digests.view(np.uint8).reshape(len(digests), DIGEST.itemsize).copy())


def write_whole(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a file that stands under its name only when all of it is on the disk."""
    part = file.with_suffix(".part")
    save_file(tensors, part, metadata)
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    part.replace(file)


def _find(values: np.ndarray, wanted: bytes) -> int | None:
    """The place of a value in sorted ones."""
    place = int(np.searchsorted(values, np.bytes_(wanted)))
    return place if place < len(values) and values[place] == wanted else None


@dataclass
class FileIndex:
    """
    The digests of image files, by the digest of their path (sorted), their size and their time of change. As arrays:
    the workers of a data loader share them.
    """

    paths: np.ndarray = field(default_factory=lambda: np.empty(0, DIGEST))
    sizes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    times: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    digests: np.ndarray = field(default_factory=lambda: np.empty(0, DIGEST))

    @classmethod
    def read(cls, folder: Path) -> "FileIndex":
        if not (folder / FILES).is_file():
            return cls()
        table = load_file(folder / FILES)
        return cls(_column(table["paths"]), table["sizes"].numpy(), table["times"].numpy(), _column(table["digests"]))

    def write(self, folder: Path) -> None:
        numbers = {"sizes": torch.from_numpy(self.sizes), "times": torch.from_numpy(self.times)}
        write_whole({"paths": as_bytes(self.paths), "digests": as_bytes(self.digests), **numbers}, folder / FILES)

    def find(self, path: Path) -> bytes | None:
        """The digest that the file had when it was as it is now."""
        place = self.place(path)
        if place is None:
            return None
        status = path.stat()
        unchanged = self.sizes[place] == status.st_size and self.times[place] == status.st_mtime_ns
        return bytes(self.digests[place]) if unchanged else None

    def place(self, path: Path) -> int | None:
        return _find(self.paths, digest_of(str(path).encode()))


@dataclass
class FeatureCache:
    """
    The features of a folder. It can be used in several processes, and in the workers of a data loader.

    Attributes:
        folder (`Path`): Where they are.
        command (`str`): What an error says is to be run.
        shards (`list[Path]`): All whole ones.
        tower, preprocessing (`dict`): What made them; as of [`tower_key`] and [`processor_key`].
        shape, dtype: Of the features of an image, `(N, D)`.
    """

    folder: Path
    command: str
    shards: list[Path] = field(init=False)
    tower: dict[str, Any] = field(init=False)
    preprocessing: dict[str, Any] = field(init=False)
    shape: tuple[int, int] = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self):
        self.shards = sorted(self.folder.glob(SHARDS))
        if not self.shards:
            raise ValueError(f"feature_cache is {self.folder}: it holds no features. Make them: {self.command}")
        shards = [read_shard(shard) for shard in self.shards]
        self.tower, self.preprocessing, _ = shards[0]
        for shard, (tower, preprocessing, _) in zip(self.shards, shards):
            if (tower, preprocessing) != shards[0][:2]:
                raise ValueError(
                    f"{shard} was made by the tower {short(tower)} and the preprocessing {short(preprocessing)}, but "
                    f"{self.shards[0].name} by {short(self.tower)} and {short(self.preprocessing)}: a folder is for "
                    "one of each. Remove what is not wanted."
                )
        digests = np.concatenate([digests for *_, digests in shards])
        places = [np.stack([np.full(len(d), number), np.arange(len(d))], 1) for number, (*_, d) in enumerate(shards)]
        order = np.argsort(digests)
        self._digests, self._places = digests[order], np.concatenate(places)[order]
        self._files = FileIndex.read(self.folder)
        first = self._read(0)
        self.shape, self.dtype = tuple(first.shape), first.dtype

    def __len__(self) -> int:
        return len(self._digests)

    def _read(self, place: int) -> torch.Tensor:
        shard, row = self._places[place].tolist()
        return _features_of(self.shards[shard])[row]

    def features(self, image: str | dict[str, Any]) -> torch.Tensor:
        """
        The features `(N, D)` of an image, mapped from disk: to be copied, not to be written to.

        Raises:
            ValueError: if there is no such file, it has changed, or it never was in the cache.
        """
        return self._read(self._place(image))

    def __contains__(self, digest: bytes) -> bool:
        return _find(self._digests, digest) is not None

    def _place(self, image: str | dict[str, Any]) -> int:
        try:
            digest = None if isinstance(image, dict) else self._files.find(Path(image))
            has_changed = digest is None and isinstance(image, str) and self._files.place(Path(image)) is not None
            if digest is None:
                digest = digest_of(image_bytes(image))
        except FileNotFoundError as error:
            raise ValueError(f"{image}: no such image file.") from error
        place = _find(self._digests, digest)
        if place is None:
            reason = "has changed since its features were made, and has none" if has_changed else "has no features"
            raise ValueError(f"{image_name(image)}: {reason} in {self.folder}. Make them: {self.command}")
        return place

    def check_rows(self, rows: datasets.Dataset, limit: int | None) -> None:
        """
        Looks whether the images of all rows, or of about `limit`, spread evenly, are in the cache.

        Raises:
            ValueError: for the first that is not, with its row.
        """
        indices = range(len(rows)) if limit is None else np.unique(np.linspace(0, len(rows) - 1, limit).astype(int))
        for index in indices:
            row = rows[int(index)]
            try:
                for image in row["images"]:
                    self._place(image)
            except ValueError as error:
                raise ValueError(f"Row {row['row_id']} (id {row['id']!r}): {error}") from error

    def require(self, tower: dict[str, Any], preprocessing: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: if another tower or another preprocessing made the features, with all that differs.
        """
        for what, made, wanted in (
            ("tower", self.tower, tower),
            ("preprocessing", self.preprocessing, preprocessing),
        ):
            if made != wanted:
                differing = [
                    f"{name} {made.get(name)} there, {wanted.get(name)} here"
                    for name in sorted(made.keys() | wanted.keys())
                    if made.get(name) != wanted.get(name)
                ]
                raise ValueError(
                    f"{self.folder} was made by another {what}: {short(made)} there, {short(wanted)} here "
                    f"({'; '.join(differing)}). Give the settings that it was made with, or make another: "
                    f"{self.command}"
                )


def read_shard(shard: Path) -> tuple[dict[str, Any], dict[str, Any], np.ndarray]:
    """The tower, the preprocessing and the digests of a shard."""
    try:
        with safe_open(shard, "pt") as file:
            metadata, digests = file.metadata(), _column(file.get_tensor("digests"))
        made_by = json.loads(metadata["made_by"])
        return made_by["tower"], made_by["preprocessing"], digests
    except SafetensorError as error:
        raise ValueError(f"{shard} cannot be read: {error}. Remove it; cache-features makes it again.") from error


class CachedFeatures:
    """
    Stands in the place of a processor's image processor, where the images of a conversation are features already: the
    text gets the same placeholders, and the batch has `vision_features` instead of `pixel_values`.
    """

    model_input_names = ["vision_features"]

    def fetch_images(self, images: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        return images

    def __call__(self, images: list[list[torch.Tensor]], **kwargs) -> dict[str, torch.Tensor]:
        return {"vision_features": torch.stack([features for of_row in images for features in of_row])}
