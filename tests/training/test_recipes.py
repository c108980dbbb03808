"""The recipes: their keys, the training of their tiny twins, the memory that they state, and the launch settings."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from safetensors.torch import load_file
from transformers import Blip2Config, CLIPVisionConfig, LlamaConfig
from transformers.distributed.fsdp import update_fsdp_plugin_peft
from trl import ModelConfig, SFTConfig, TrlParser

import train_sft
from configuration_sq_llava import CLIP_VIT_L_14_336, VICUNA_7B
from sq_llava.data.sources import DataSource
from sq_llava.resources import find_resource
from sq_llava.training.adapter import LoraSize, add_adapter
from sq_llava.training.settings import SQLlavaArguments
from sq_llava.training.sharding import sharding_asked_for, wrap_layers
from tests import runs, tiny
from tests.launches import launch_environment


RECIPES = find_resource("recipes")
ORIGINALS = sorted(file.relative_to(RECIPES) for file in RECIPES.glob("*b/*.yaml"))  # of 7b and 13b models
LAUNCHES = sorted((RECIPES / "accelerate").glob("*.yaml"))
SIZE = LoraSize(4, 8, 0.0)


def keys(file: Path) -> set[str]:
    return set(yaml.safe_load(file.read_text()))


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A CLIP, a Llama, captions and conversations with pictures."""
    root = tmp_path_factory.mktemp("parts")
    tiny.save_towers(root)
    tiny.save_blip2(root / "blip2")
    tiny.picture().save(root / "a.png")
    turns = [("human", "<image>\nWhat?"), ("gpt", "A dog."), ("human", "Where?"), ("gpt", "In the grass.")]
    row = {"image": "a.png", "conversations": [{"from": role, "value": text} for role, text in turns]}
    (root / "rows.json").write_text(json.dumps([row] * 8))
    return root


def run_twin(recipe: Path, parts: Path, folder: Path) -> None:
    """Trains one step of a tiny recipe, with these models and rows."""
    settings = yaml.safe_load((RECIPES / "tiny" / recipe).read_text())
    for source in settings.get("datasets", [settings]):
        source |= {"path" if "path" in source else "dataset_path": str(parts / "rows.json"), "image_root": str(parts)}
    for name in ("vision", "text", "qformer"):
        if path := settings.get(f"{name}_model_name_or_path"):
            settings[f"{name}_model_name_or_path"] = str(parts / Path(path).name)
    if "model_name_or_path" in settings:
        settings["model_name_or_path"] = str(folder / recipe.parent / Path(settings["model_name_or_path"]).name)
    settings |= {"output_dir": str(folder / recipe.with_suffix("")), "max_steps": 1, "use_cpu": True}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    train_sft.main(["--config", str(folder / "recipe.yaml"), "--resume", "0"])


@pytest.mark.parametrize("recipe", ORIGINALS, ids=str)
def test_tiny_twin_has_the_same_keys(recipe):
    assert keys(RECIPES / "tiny" / recipe) == keys(RECIPES / recipe)


@pytest.mark.parametrize("recipe", sorted(RECIPES.rglob("*.yaml")), ids=lambda file: str(file.relative_to(RECIPES)))
def test_recipe_names_no_folder_of_an_environment(recipe):
    assert "site-packages" not in recipe.read_text() and ".venv" not in recipe.read_text()


def test_every_tiny_twin_has_an_original():
    twins = {file.relative_to(RECIPES / "tiny") for file in (RECIPES / "tiny").glob("*/*")}
    assert twins == set(ORIGINALS)


@pytest.mark.parametrize("recipe", [*ORIGINALS, *(Path("tiny") / recipe for recipe in ORIGINALS)], ids=str)
def test_recipe_has_no_unknown_setting(recipe):
    parser = TrlParser((SQLlavaArguments, SFTConfig, ModelConfig))
    arguments, training_args, model_config = parser.parse_args_and_config(
        ["--config", str(RECIPES / recipe), "--use_cpu", "true"]
    )
    for name, value in yaml.safe_load((RECIPES / recipe).read_text()).items():
        holder = next(part for part in (arguments, training_args, model_config) if name in vars(part))
        if name == "datasets":
            value = [DataSource(**source) for source in value]
        # Some strings become an enumeration or a list.
        assert getattr(holder, name) == value or str(value) in str(getattr(holder, name)) or value == "none", name


def test_unknown_setting_in_a_recipe_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("stage: align\ndataset_path: x\noutput_dir: y\nlearning_rat: 1.0e-3\n")
    with pytest.raises(ValueError, match="learning_rat"):
        train_sft.main(["--config", str(tmp_path / "recipe.yaml"), "--use_cpu", "true"])


@pytest.mark.slow
@pytest.mark.parametrize("size", ["7b", pytest.param("13b", marks=pytest.mark.long)])
def test_tiny_twins_train_one_after_another(size, parts, tmp_path):
    for name in ("stage1", "stage1-sharegpt4v", "stage2", "stage2-sharegpt4v", "stage2-qlora"):
        recipe = Path(f"sq-llava-{size}/{name}.yaml")
        run_twin(recipe, parts, tmp_path)
        assert (tmp_path / recipe.with_suffix("") / "adapter_model.safetensors").is_file(), name


@pytest.mark.slow
@pytest.mark.parametrize("system", ["llava-7b", "llava-1.5-7b", "minigpt4-7b"])
def test_tiny_twins_of_the_other_systems_train_what_they_say(system, parts, tmp_path):
    run_twin(Path(f"{system}/stage1.yaml"), parts, tmp_path)
    adapter = load_file(tmp_path / system / "stage1" / "adapter_model.safetensors")
    assert all("multi_modal_projector" in name for name in adapter)
    later = [file.relative_to(RECIPES) for file in RECIPES.glob(f"{system}/*.yaml") if file.stem != "stage1"]
    assert later
    for recipe in later:
        run_twin(recipe, parts, tmp_path)
        folder = tmp_path / recipe.with_suffix("")
        if system == "minigpt4-7b":
            adapter = load_file(folder / "adapter_model.safetensors")
            assert all("multi_modal_projector" in name for name in adapter)
        else:
            assert (folder / "model.safetensors").is_file() and not (folder / "adapter_config.json").exists()


@pytest.fixture(scope="module")
def big_configs(tmp_path_factory) -> Path:
    """The configurations, without weights, of the vision towers and of both sizes of Vicuna."""
    root = tmp_path_factory.mktemp("configs")
    CLIPVisionConfig(**CLIP_VIT_L_14_336).save_pretrained(root / "clip-vit-large-patch14-336")
    CLIPVisionConfig(**{**CLIP_VIT_L_14_336, "image_size": 224}).save_pretrained(root / "clip-vit-large-patch14")
    Blip2Config().save_pretrained(root / "blip2-flan-t5-xxl")
    vicuna = {**VICUNA_7B, "vocab_size": 32000}
    LlamaConfig(**vicuna).save_pretrained(root / "7b")
    LlamaConfig(
        **vicuna, hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=13824
    ).save_pretrained(root / "13b")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ORIGINALS, ids=str)
def test_recipe_states_the_memory_that_the_dry_run_estimates(recipe, big_configs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    header = (RECIPES / recipe).read_text().split("\nstage:")[0]
    assert "estimated, not measured" in header and "Not run by this project" in header
    num_gpus = 8 if "8 GPUs" in header else 1
    first = yaml.safe_load((RECIPES / recipe).with_name("stage1.yaml").read_text())
    parts = {
        name: str(big_configs / Path(first[name]).name)
        for name in ("vision_model_name_or_path", "qformer_model_name_or_path")
        if name in first
    }
    parts["text_model_name_or_path"] = str(big_configs / recipe.parent.name.rpartition("-")[2])
    settings = {"config": RECIPES / recipe, "dry_run": "meta", "num_gpus": num_gpus, "use_cpu": True}
    train_sft.main(runs.command_line(settings | parts))
    total = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("│ total "))
    sizes = re.compile(r"\d+\.\d GiB")
    assert sizes.findall(total) == sizes.findall(header)


@pytest.mark.parametrize("file", LAUNCHES, ids=lambda file: file.name)
def test_accelerate_reads_the_launch_settings(file):
    config = load_config_from_file(str(file))
    assert config.mixed_precision == "bf16"
    assert config.num_processes == {"single": 1, "zero3_offload": 1, "hsdp": 16}.get(file.stem, 8)


def test_fsdp2_makes_each_layer_a_unit_of_its_own(monkeypatch):
    for name, value in launch_environment(RECIPES / "accelerate" / "fsdp2.yaml").items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward and plugin.cpu_ram_efficient_loading
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    model = add_adapter(tiny.tiny_model(), SIZE, SIZE, train_vusr=True)
    accelerator = type("Accelerator", (), {"state": type("State", (), {"fsdp_plugin": plugin})})
    wrap_layers(plugin, model)
    update_fsdp_plugin_peft(model, accelerator)  # as the Trainer does
    plugin.set_auto_wrap_policy(model)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    units = [name.removeprefix("base_model.model.model.") for name, module in model.named_modules() if policy(module)]
    assert units == [
        *(f"vision_tower.encoder.layers.{index}" for index in range(3)),
        *(f"language_model.layers.{index}" for index in range(2)),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            "dp_replicate_size 2 and dp_shard_size 8, which is 16 processes, but 1 were started. Set --",
        ),
        ({"parallelism_config_tp_size": 2}, "The launch sets tp_size 2. The loss needs whole sequences"),
    ],
    ids=["size", "kind"],
)
def test_mesh_of_another_size_or_kind_is_refused(options, message, monkeypatch, tmp_path):
    for name, value in launch_environment(RECIPES / "accelerate" / "hsdp.yaml", **options).items():
        monkeypatch.setenv(name, value)
    training_args = type("Arguments", (), {"world_size": 1})
    with pytest.raises(ValueError, match=message):
        sharding_asked_for(training_args)


@pytest.mark.parametrize(("launch", "stage"), [("zero2", 2), ("zero3", 3), ("zero3_offload", 3)])
def test_zero_settings_leave_batch_and_precision_to_the_recipe(launch, stage, monkeypatch):
    for name, value in launch_environment(RECIPES / "accelerate" / f"{launch}.yaml").items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    config = plugin.deepspeed_config
    assert plugin.zero3_init_flag == (stage == 3)
    assert config["zero_optimization"]["stage"] == stage
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config[name] == "auto"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_trained_weights_have_one_precision(dtype):
    model = add_adapter(tiny.tiny_model().to(torch.bfloat16), SIZE, SIZE, train_vusr=True, trained_dtype=dtype)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_slurm_script_is_sound_and_names_the_recipe():
    script = RECIPES / "accelerate" / "multi_node.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    missing = subprocess.run(["bash", script], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert missing.returncode != 0 and "give the path of a recipe" in missing.stderr
