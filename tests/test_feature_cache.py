"""Features of a frozen vision tower on disk: training with them equals training without; their making is safe."""

import io
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

import modeling_sq_llava
import train_sft
from sq_llava import feature_building, feature_cache, self_questioning
from sq_llava.adapter import LoraSize, add_adapter
from sq_llava.checkpoint import load_checkpoint, merge_adapter
from sq_llava.feature_building import Encoder, parse_size
from sq_llava.feature_cache import FeatureCache
from sq_llava.settings import parse_settings
from tests import tiny
from tests.processes import ended, fork
from tests.runs import arguments, die, history, make_parts, run


SETTINGS = {"stage": "align", "vision_lora_r": 0, "max_steps": 4, "save_strategy": "no"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


def recipe(parts: Path, folder: Path, **overrides) -> list[str]:
    return arguments(parts, folder / "run", **SETTINGS | overrides)


def build(args: list[str], folder: Path, max_size: int | None = None, batch_size: int = 2) -> str:
    """What it says."""
    said = io.StringIO()
    console = Console(file=said, width=500)
    feature_building.build(parse_settings(args), folder, max_size, batch_size, "sq-llava cache-features ...", console)
    return said.getvalue()


@pytest.fixture(scope="module")
def cache(parts, tmp_path_factory) -> Path:
    """Five shards of two images each."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch)
        build(recipe(parts, folder), folder / "features")
    return folder / "features"


def small_shards(patch=None) -> None:
    if patch is None:
        feature_building.SHARD_BYTES = 2 * 9 * 32 * 4
    else:
        patch.setattr(feature_building, "SHARD_BYTES", 2 * 9 * 32 * 4)


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob(feature_cache.SHARDS)}


def build_child(args: list[str], folder: Path) -> None:
    small_shards()
    build(args, folder)


def build_in_processes(args: list[str], folder: Path, log: Path, processes: int = 1, prepare=None) -> list[int]:
    return ended(fork(build_child, (args, folder), log, prepare and (prepare,), processes))


def kill_in_third_shard() -> None:
    """Half of the third shard is on the disk, and not under its name."""
    original, begun = feature_cache.save_file, []

    def save_file(tensors, file, metadata=None):
        original(tensors, file, metadata)
        begun.append(file)
        if sum("features-" in str(file) for file in begun) == 3:
            os.truncate(file, 500)
            die()

    feature_cache.save_file = save_file


def forbid_vision(patch: pytest.MonkeyPatch) -> None:
    def fail(*args, **kwargs):
        raise AssertionError("an image was opened or encoded")

    patch.setattr(self_questioning, "open_image", fail)
    patch.setattr(modeling_sq_llava.SQLlavaModel, "get_vision_features", fail)


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_training_with_the_cache_equals_training_without_it(stage, parts, cache, tmp_path, monkeypatch):
    # One batch of text only, others with images, and a data loader that has workers.
    settings = {"stage": stage, "train_sampling_strategy": "group_by_length", "lora_dropout": 0.0}
    if stage == "instruct":
        settings |= {"num_eval_rows": 2, "eval_strategy": "steps", "eval_steps": 2}
    without = train_sft.main(recipe(parts, tmp_path / "without", **settings))
    forbid_vision(monkeypatch)
    more = {"feature_cache": cache, "dataloader_num_workers": 2}
    train_sft.main(recipe(parts, tmp_path / "with", **settings, **more))
    ours, theirs = history(tmp_path / "with/run"), history(tmp_path / "without/run")
    assert len([entry for entry in ours if "loss" in entry or "eval_loss" in entry]) == 4 + 2 * (stage == "instruct")
    for one, other in zip(ours, theirs, strict=True):
        one, other = ({k: v for k, v in e.items() if "runtime" not in k and "second" not in k} for e in (one, other))
        assert one == pytest.approx(other, rel=1e-6, abs=1e-7)
    weights = [load_file(tmp_path / name / "run/adapter_model.safetensors") for name in ("with", "without")]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=1e-6)
    begun = without.model.get_base_model().model.multi_modal_projector.original_module.linear_1.weight
    trained = next(weight for name, weight in weights[0].items() if "linear_1.weight" in name)
    assert (trained - begun).abs().max() > 1e-3


def test_minigpt_4_is_trained_from_the_features_of_its_tower(parts, tmp_path, monkeypatch):
    blip2 = parts / "blip2"
    tiny.save_blip2(blip2)
    settings = {"vision_model_name_or_path": blip2, "qformer_model_name_or_path": blip2, "prototype_variant": "none"}
    build(recipe(parts, tmp_path, **settings), tmp_path / "features")
    train_sft.main(recipe(parts, tmp_path / "without", **settings))
    forbid_vision(monkeypatch)
    train_sft.main(recipe(parts, tmp_path / "with", **settings, feature_cache=tmp_path / "features"))
    ours, theirs = (load_file(tmp_path / name / "run/adapter_model.safetensors") for name in ("with", "without"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
    tower = load_checkpoint(str(tmp_path / "with/run"))[0].get_base_model().model
    key = feature_cache.tower_key(tower, None)
    torch.nn.init.ones_(tower.vision_tower.post_layernorm.bias)
    assert feature_cache.tower_key(tower, None) != key


def test_stage_without_lora_is_gone_on_from_with_the_same_cache_and_merged(parts, cache, tmp_path):
    train_sft.main(recipe(parts, tmp_path, feature_cache=cache, max_steps=1))
    two = recipe(parts, tmp_path / "two", stage="instruct", feature_cache=cache, max_steps=1)
    cut = two.index("--vision_model_name_or_path")
    two[cut : cut + 4] = ["--model_name_or_path", str(tmp_path / "run")]
    # The base beside the first stage has the same tower.
    assert "10 are in" in build(two, cache)
    trained = train_sft.main(two).model
    merge_adapter(str(tmp_path / "two/run"), str(tmp_path / "merged"))
    merged, processor = load_checkpoint(str(tmp_path / "merged"))
    inputs = tiny.tiny_inputs(merged.config)
    torch.testing.assert_close(merged.eval()(**inputs).logits, trained.eval()(**inputs).logits, rtol=0, atol=1e-4)
    assert not {"feature_cache", "vision_features"} & {*merged.config.to_dict(), *processor.model_input_names}


@pytest.mark.parametrize("variant", ["paper", "released", "none"])
def test_text_only_batch_gives_all_that_is_trained_a_gradient(variant):
    config = tiny.tiny_config(prototype_variant=variant)
    none, some = LoraSize(0, 1, 0.0), LoraSize(4, 8, 0.0)
    model = add_adapter(tiny.tiny_model(config), none, some, train_vusr=False).train()
    inputs = tiny.tiny_inputs(config, num_images=0)
    with pytest.MonkeyPatch.context() as patch:
        forbid_vision(patch)
        model(**inputs, labels=inputs["input_ids"], vision_features=torch.empty(0, 9, 32)).loss.backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(weight.grad is not None for weight in trained.values())
    assert all(weight.grad.eq(0).all() for name, weight in trained.items() if "language_model" not in name)
    assert any("multi_modal_projector" in name for name in trained)


def test_features_are_what_the_extractor_reads(parts, cache):
    reader = FeatureCache(cache, "")
    model = feature_building.load_tower(*[parse_settings(recipe(parts, cache))[i] for i in (0, 2)])
    processor = feature_building.composed_processor(*[parse_settings(recipe(parts, cache))[i] for i in (0, 2)])
    for index in (1, 14):
        picture = Image.open(parts / f"{index}.png").convert("RGB")
        pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        expected = model.get_vision_features(pixels)[0]
        torch.testing.assert_close(reader.features(str(parts / f"{index}.png")), expected, rtol=1e-6, atol=1e-6)
    assert (reader.shape, reader.dtype, len(reader)) == ((9, 32), torch.float32, 10)


def test_killed_and_run_again_equals_uninterrupted(parts, cache, tmp_path):
    folder, log = tmp_path / "features", tmp_path / "log"
    assert build_in_processes(recipe(parts, tmp_path), folder, log, prepare=kill_in_third_shard) == [-9]
    assert len(shards(folder)) == 2 and len(list(folder.glob("*.part"))) == 1
    times = {file: file.stat().st_mtime_ns for file in folder.glob(feature_cache.SHARDS)}
    assert build_in_processes(recipe(parts, tmp_path), folder, log) == [0], log.read_text()
    assert shards(folder) == shards(cache) and not list(folder.glob("*.part"))
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())


def test_two_processes_equal_one(parts, cache, tmp_path):
    folder, log = tmp_path / "features", tmp_path / "log"
    assert build_in_processes(recipe(parts, tmp_path), folder, log, processes=2) == [0, 0], log.read_text()
    assert shards(folder) == shards(cache) and len(shards(folder)) == 5
    assert (folder / feature_cache.FILES).read_bytes() == (cache / feature_cache.FILES).read_bytes()


@pytest.mark.slow
def test_two_processes_train_from_one_cache(parts, cache, tmp_path):
    # In this order, each process has a batch of text only while the other has images.
    rows = json.loads((parts / "train.json").read_text())
    text_only, pictured = ([row for row in rows if ("image" in row) == kind] for kind in (False, True))
    ordered = [row for pair in zip(text_only, pictured) for row in pair]
    (parts / "turns.json").write_text(json.dumps(ordered))
    settings = {"dataset_path": parts / "turns.json", "train_sampling_strategy": "sequential", "max_steps": 3}
    settings |= {"optim": "sgd", "learning_rate": 0.1}
    log = tmp_path / "log"
    one = recipe(parts, tmp_path / "one", per_device_train_batch_size=2, **settings)
    two = recipe(parts, tmp_path / "two", per_device_train_batch_size=1, feature_cache=cache, **settings)
    assert run(one, log) == [0], log.read_text()[-3000:]
    assert run(two, log, processes=2) == [0, 0], log.read_text()[-3000:]
    weights = [load_file(tmp_path / name / "run/adapter_model.safetensors") for name in ("one", "two")]
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=0, atol=1e-5)


def test_equal_images_are_kept_once_and_more_data_adds_only_what_is_new(parts, cache, tmp_path):
    folder = tmp_path / "features"
    shutil.copytree(cache, folder)
    rows = json.loads((parts / "train.json").read_text())
    shutil.copy(parts / "1.png", tmp_path / "copy.png")
    tiny.picture(99).save(tmp_path / "new.png")
    added = [{**rows[1], "image": name} for name in ("copy.png", "new.png", "new.png")]
    (tmp_path / "more.json").write_text(json.dumps(added))
    said = build(recipe(parts, tmp_path, dataset_path=tmp_path / "more.json"), folder)
    assert "2 different images, of which 1 are in" in said
    reader = FeatureCache(folder, "")
    assert len(reader) == 11
    assert torch.equal(reader.features(str(tmp_path / "copy.png")), reader.features(str(parts / "1.png")))


def test_images_that_stand_in_a_table_are_cached(parts, tmp_path):
    data = (parts / "1.png").read_bytes()
    turns = json.loads((parts / "train.json").read_text())[1]["conversations"]
    rows = [{"id": "a", "image": {"bytes": data, "path": None}, "conversations": turns}] * 2
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    args = recipe(parts, tmp_path, dataset_path=tmp_path / "rows.parquet", max_steps=1)
    assert "1 different images" in build(args, tmp_path / "features")
    train_sft.main([*args, "--feature_cache", str(tmp_path / "features")])


def test_precision_is_that_of_the_tower(parts, tmp_path):
    said = build(recipe(parts, tmp_path, dtype="bfloat16"), tmp_path / "features")
    assert "10 x 0.6 kB (9 x 32, bfloat16) are 5.8 kB" in said
    reader = FeatureCache(tmp_path / "features", "")
    assert reader.features(str(parts / "1.png")).dtype == torch.bfloat16
    train_sft.main(recipe(parts, tmp_path, dtype="bfloat16", feature_cache=tmp_path / "features", max_steps=1))


@pytest.fixture
def own_cache(parts, cache, tmp_path) -> tuple[Path, Path]:
    """Data and cache that a test may break."""
    data, folder = tmp_path / "data", tmp_path / "features"
    shutil.copytree(parts, data)
    build(recipe(data, tmp_path), folder)
    return data, folder


def test_changed_image_is_noticed_before_training(own_cache, tmp_path):
    data, folder = own_cache
    tiny.picture(77).save(data / "4.png")
    with pytest.raises(ValueError, match=r"Row 4 \(id 'r4'\): .*4\.png: has changed.*sq-llava cache-features --stage"):
        train_sft.main(recipe(data, tmp_path, feature_cache=folder))


def test_image_that_is_only_touched_or_moved_is_found_by_its_content(own_cache, tmp_path):
    data, folder = own_cache
    reader = FeatureCache(folder, "")
    before = reader.features(str(data / "4.png")).clone()
    os.utime(data / "4.png", (1, 1))
    assert torch.equal(reader.features(str(data / "4.png")), before)
    (data / "4.png").rename(data / "moved.png")
    assert torch.equal(reader.features(str(data / "moved.png")), before)
    with pytest.raises(ValueError, match=r"4\.png: no such image file"):
        reader.features(str(data / "4.png"))


def test_image_that_is_not_in_the_cache_is_an_error_of_its_row(own_cache, tmp_path):
    data, folder = own_cache
    rows = json.loads((data / "train.json").read_text())
    tiny.picture(88).save(data / "new.png")
    (data / "train.json").write_text(json.dumps([{**rows[1], "id": "x", "image": "new.png"}] * 4))
    # Also where nobody looks before.
    message = r"Row \d \(id 'x'\): .*new\.png: has no features in .*features\. Make them: sq-llava cache-features"
    for doctor in ("sample", "off"):
        with pytest.raises(ValueError, match=message):
            train_sft.main(recipe(data, tmp_path, feature_cache=folder, doctor=doctor))


def test_cache_of_another_tower_is_refused(parts, cache, tmp_path):
    other = tmp_path / "parts"
    shutil.copytree(parts, other)
    weights = other / "clip/model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "vision_model" in name and "layers.0.mlp.fc1.weight" in name)
    tensors[name][0, 0] += 1
    feature_cache.save_file(tensors, weights, {"format": "pt"})
    message = r"another tower: (\w{8}) there, (?!\1)\w{8} here \(weights \w{32} there, \w{32} here\)"
    with pytest.raises(ValueError, match=message):
        train_sft.main(recipe(other, tmp_path, feature_cache=cache))
    with pytest.raises(ValueError, match=message):
        build(recipe(other, tmp_path), cache)
    unused = next(name for name in tensors if "vision_model" in name and "layers.2.mlp.fc1.weight" in name)
    tensors = load_file(parts / "clip/model.safetensors")
    tensors[unused] += 1
    feature_cache.save_file(tensors, weights, {"format": "pt"})
    assert "10 are in" in build(recipe(other, tmp_path), cache)  # the layer above the one that is read


def test_cache_of_another_preprocessing_is_refused(parts, cache, tmp_path):
    message = r"another preprocessing: (\w{8}) there, (?!\1)\w{8} here \(do_pad True there, False here\)"
    with pytest.raises(ValueError, match=message):
        train_sft.main(recipe(parts, tmp_path, feature_cache=cache, image_aspect_ratio="crop"))
    with pytest.raises(ValueError, match=message):
        build(recipe(parts, tmp_path, image_aspect_ratio="crop"), cache)


def test_size_is_bounded_before_anything_is_written(parts, cache, tmp_path, monkeypatch):
    folder = tmp_path / "features"
    with pytest.raises(ValueError, match=r"would have 11\.5 kB, 0\.0 kB of them already there, more than.* 10\.0 kB"):
        build(recipe(parts, tmp_path), folder, max_size=10_000)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(feature_building.shutil, "disk_usage", lambda path: usage(0, 0, 9_000))
    with pytest.raises(ValueError, match=r"11\.5 kB are to be written, but the disk has 9\.0 kB free"):
        build(recipe(parts, tmp_path), folder)
    assert [file.name for file in folder.iterdir()] == ["building.lock"]


def test_sizes_are_read():
    assert (parse_size("200GB"), parse_size("1.5 GiB")) == (200 * 10**9, 3 * 2**29)
    with pytest.raises(ValueError, match="max-size is '200'"):
        parse_size("200")


def test_trained_or_quantized_tower_is_refused(parts, tmp_path):
    for settings in ({"vision_lora_r": 4}, {"load_in_4bit": True, "dtype": "float32"}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} .*is"):
            build(recipe(parts, tmp_path, **settings), tmp_path / "features")
        with pytest.raises(ValueError, match=f"{next(iter(settings))} .*is"):
            parse_settings(recipe(parts, tmp_path, feature_cache="features", **settings))


def test_unreadable_images_are_named_before_the_tower_runs(own_cache, tmp_path, monkeypatch):
    data, _ = own_cache
    (data / "4.png").write_bytes((data / "4.png").read_bytes()[:-200])
    (data / "7.png").unlink()
    monkeypatch.setattr(Encoder, "write", lambda *args: pytest.fail("the tower was run"))
    with pytest.raises(ValueError) as raised:
        build(recipe(data, tmp_path), tmp_path / "new")
    first, second, third = str(raised.value).splitlines()
    assert first == "2 images cannot be read:"
    assert (
        f"{data / 'train.json'}, row 4 (id 'r4'): image " in second and "4.png" in second and "Save it anew" in second
    )
    assert "train.json, row 7 (id 'r7'): image " in third and "no such file. Bring it back" in third


def test_broken_shard_and_two_at_work_are_said(own_cache, tmp_path):
    data, folder = own_cache
    with (folder / "building.lock").open("w") as lock:
        feature_building.fcntl.flock(lock, feature_building.fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another cache-features is writing there"):
            build(recipe(data, tmp_path), folder)
    shard = next(folder.glob(feature_cache.SHARDS))
    with safe_open(shard, "pt") as file:
        assert json.loads(file.metadata()["made_by"])["tower"]["layers"] == 2
    os.truncate(shard, 700)
    with pytest.raises(ValueError, match=rf"{shard.name} cannot be read: .*Remove it"):
        FeatureCache(folder, "")
    with pytest.raises(ValueError, match=r"nowhere: it holds no features\. Make them: sq-llava cache-features "):
        train_sft.main(recipe(data, tmp_path, feature_cache=tmp_path / "nowhere"))
