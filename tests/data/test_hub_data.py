"""Datasets of the Hub, from a local server, online and from the cache; and folders with the same files."""

import io
import json
import os
import subprocess
from pathlib import Path

import datasets
import pytest

from sq_llava.data.images import image_faults, open_image
from sq_llava.data.rows import load_rows
from sq_llava.data.sources import DataSource
from tests import ROOT, tiny
from tests.local_hub import LocalHub
from tests.pictures import encoded
from tests.warm_python import warm_python


pytestmark = pytest.mark.slow


def rows(name: str, number: int) -> list[dict]:
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    return [{"id": f"{name}{index}", "messages": messages} for index in range(number)]


PICTURE = encoded(tiny.picture(), "PNG")


def parquet(name: str, number: int) -> bytes:
    stream = io.BytesIO()
    with_images = [{**row, "images": [{"bytes": PICTURE, "path": None}]} for row in rows(name, number)]
    table = datasets.Dataset.from_list(with_images)
    table.cast_column("images", datasets.List(datasets.Image())).to_parquet(stream)
    return stream.getvalue()


CARD = """---
configs:
- config_name: small
  data_files: small/*.parquet
- config_name: big
  data_files:
  - {split: train, path: big/train-*}
  - {split: test, path: big/test-*}
---
"""
CHARTS = {
    "README.md": CARD.encode(),
    "small/0.parquet": parquet("s", 2),
    "big/train-0.parquet": parquet("a", 3),
    "big/train-1.parquet": parquet("b", 3),
    "big/test-0.parquet": parquet("t", 1),
}
METADATA = {"file_name": "pictures/a.png", "id": "f", "prompt": "What?", "completion": "A dog."}
PICTURES = {"pictures/a.png": PICTURE, "metadata.jsonl": json.dumps(METADATA).encode()}
RELATIVE = {"data.jsonl": json.dumps({**rows("r", 1)[0], "image": "pictures/a.png"}).encode(), "a.png": PICTURE}
SCRIPT = b"open('ran', 'w').close()"

BIG, PLAIN = {"path": "org/charts", "name": "big"}, {"path": "org/plain"}
# The source, and the ids that are loaded online, or a part of the error.
CASES = {
    "a configuration": ({"path": "org/charts", "name": "small"}, ["s0", "s1"]),
    "a part of a split": ({**BIG, "split": "train[:50%]"}, ["a0", "a1", "a2"]),
    "two splits": ({**BIG, "split": "test+train[5:]"}, ["t0", "b2"]),
    "a branch": ({**PLAIN, "revision": "v1"}, ["old0"]),
    "the newest": (PLAIN, ["new0", "new1"]),
    "pictures": ({"path": "org/pictures"}, ["f"]),
    "pictures by path": ({"path": "org/relative"}, ["r0"]),
    "no configuration": ({"path": "org/charts"}, "pick one among the available configs: ['small', 'big']"),
    "an unknown configuration": ({"path": "org/charts", "name": "tiny"}, "not found. Available: ['small', 'big']"),
    "no split": (BIG, "split is None: use one of train, test, or a part such as train[:10%]"),
    "an unknown split": ({**BIG, "split": "val"}, "split is 'val': use one of train, test"),
    "an unknown revision": ({**PLAIN, "revision": "v9"}, "Revision 'v9' doesn't exist"),
    "an unknown dataset": ({"path": "org/none"}, "org/none: cannot be loaded: Dataset 'org/none' doesn't exist"),
    "a script": ({"path": "org/script"}, "scripts are no longer supported"),
}
OFFLINE = {
    **{name: CASES[name] for name in ("a configuration", "a part of a split", "a branch")},
    "no configuration": ({"path": "org/charts"}, "'small'|multiple|big, small"),
    "an unknown revision": (
        {**PLAIN, "revision": "v9"},
        "the Hub does not give revision 'v9', and the cache has only the commits ",
    ),
    "an unknown dataset": ({"path": "org/none"}, "Couldn't reach 'org/none' on the Hub"),
}
CHILD = """
import json, sys
import datasets
from huggingface_hub import constants
from sq_llava import load_rows
from sq_llava.data.sources import DataSource
datasets.disable_progress_bars()
results = []
for is_offline, cases in enumerate(json.loads(sys.argv[1])):
    # As HF_HUB_OFFLINE=1 sets them in a new process, which would take seconds to start.
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = bool(is_offline)
    results.append({})
    for name, (source, _) in cases.items():
        try:
            read = load_rows([DataSource(**source)])[:]
            images = [[i if isinstance(i, str) else i["bytes"].hex() for i in row] for row in read["images"]]
            results[-1][name] = {"ids": read["id"], "images": images, "num_images": read["num_images"]}
        except ValueError as error:
            results[-1][name] = str(error)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[dict, dict, Path]:
    """Results of `CASES`, then of `OFFLINE`, in a process whose Hub is the local server; and its cache folder."""
    folder = tmp_path_factory.mktemp("hub")
    with LocalHub() as hub:
        hub.add_dataset("org/charts", CHARTS)
        hub.add_dataset("org/plain", {"README.md": b"", "data/train-0.parquet": parquet("old", 1)}, "v1")
        hub.add_dataset("org/plain", {"README.md": b"", "data/train-0.parquet": parquet("new", 2)})
        hub.add_dataset("org/pictures", PICTURES)
        hub.add_dataset("org/relative", RELATIVE)
        hub.add_dataset("org/script", {"script.py": SCRIPT})
        variables = {**os.environ, **hub.environment(None), "HF_HOME": str(folder), "PYTHONPATH": str(ROOT)}
        command = [warm_python(), "-c", CHILD, json.dumps([CASES, OFFLINE])]
        done = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return (*json.loads(done.stdout), folder)


@pytest.mark.parametrize("name", CASES)
def test_a_dataset_of_the_hub_is_loaded_or_refused_with_the_choices(results, name):
    result, expected = results[0][name], CASES[name][1]
    assert expected in result if isinstance(expected, str) else result["ids"] == expected


@pytest.mark.parametrize("name", OFFLINE)
def test_offline_only_the_requested_data_of_the_cache_is_loaded(results, name):
    result, expected = results[1][name], OFFLINE[name][1]
    if isinstance(expected, str):
        assert any(part in result for part in expected.split("|"))
    else:
        assert result["ids"] == expected


def test_images_of_the_hub_need_no_image_root_unless_they_are_paths(results):
    online, _, folder = results
    assert online["a configuration"]["images"] == [[PICTURE.hex()]] * 2
    assert online["a configuration"]["num_images"] == [1, 1]
    ((in_cache,),) = online["pictures"]["images"]
    assert open_image(in_cache).tobytes() == tiny.picture().tobytes()
    ((missing,),) = online["pictures by path"]["images"]
    (fault,) = image_faults(missing)
    assert (
        fault.code == "image_missing" and "`hf download org/relative --repo-type dataset --local-dir DIR`" in fault.fix
    )
    assert "image_root" in fault.fix and not (folder / "ran").exists()


def write(folder: Path, files: dict[str, bytes]) -> str:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return str(folder)


def test_a_folder_with_the_files_of_a_hub_dataset_is_loaded_as_one(tmp_path):
    path = write(tmp_path / "charts", CHARTS)
    assert load_rows([DataSource(path, name="big", split="train[:50%]")])[:]["id"] == ["a0", "a1", "a2"]
    with pytest.raises(ValueError, match=r"available configs: \['small', 'big'\]"):
        load_rows([DataSource(path)])
    with pytest.raises(ValueError, match="split is None: use one of train, test"):
        load_rows([DataSource(path, name="big")])
    with pytest.raises(ValueError, match="revision is 'v1', but a folder has no revisions"):
        load_rows([DataSource(path, name="small", revision="v1")])


def test_a_folder_of_images_with_their_rows_is_loaded_and_its_images_stay_inside(tmp_path):
    path = write(tmp_path / "pictures", PICTURES)
    (row,) = load_rows([DataSource(path)])
    assert row["id"] == "f" and row["images"] == [str(tmp_path.resolve() / "pictures" / "pictures" / "a.png")]
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="is outside the image root"):
        load_rows([DataSource(path, image_root=str(tmp_path / "other"))])[0]


def test_splits_of_saved_datasets_are_honoured_and_those_of_files_refused(tmp_path):
    train, test = (datasets.Dataset.from_list(rows(name, 4)) for name in ("train", "test"))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "several")
    train.save_to_disk(tmp_path / "one")
    train.to_parquet(tmp_path / "rows.parquet")

    def load(place: str, **settings) -> list[str]:
        return load_rows([DataSource(str(tmp_path / place), **settings)])[:]["id"]

    assert load("several", split="test[:1]+train[75%:]") == ["test0", "train3"]
    assert load("one") == load("rows.parquet") == ["train0", "train1", "train2", "train3"]
    for split in ("val", None):
        with pytest.raises(ValueError, match=f"split is {split!r}: use one of train, test"):
            load("several", split=split)
    with pytest.raises(ValueError, match="split is 'test', but a folder of a single dataset has no splits"):
        load("one", split="test")
    for field in ("split", "name", "revision"):
        with pytest.raises(ValueError, match=f"{field} is 'x', but a Parquet file has no "):
            load("rows.parquet", **{field: "x"})
