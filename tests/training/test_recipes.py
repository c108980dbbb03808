"""The recipes: their keys, the training of their tiny twins, the memory that they state, and the launch settings."""

import json
import os
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
from transformers import AutoImageProcessor
from transformers.distributed.fsdp import update_fsdp_plugin_peft
from trl import ModelConfig, SFTConfig, TrlParser

import train_sft
from sq_llava.checkpoints.load import load_checkpoint, merge_adapter
from sq_llava.checkpoints.prompt_layouts import recognise_chat_format
from sq_llava.data.sources import DataSource
from sq_llava.inference.assistant import Assistant
from sq_llava.training.adapter import LoraSize, add_adapter
from sq_llava.training.settings import SQLlavaArguments
from sq_llava.training.sharding import sharding_asked_for, wrap_layers
from sq_llava.training.trainer import SQLlavaTrainer
from tests import recipe_memory, tiny
from tests.chat_tokenizers import CHAT_TOKENIZERS, save_chat_model
from tests.launches import launch_environment
from tests.recipe_memory import PAIRS, RECIPES


ORIGINALS = sorted(
    file.relative_to(RECIPES)
    for file in RECIPES.glob("*/*.yaml")
    if file.parent.name not in ("accelerate", "easy-vqa")  # launch settings, and the recipes of the demo
)
LAUNCHES = sorted((RECIPES / "accelerate").glob("*.yaml"))
SIZE = LoraSize(4, 8, 0.0)


def keys(file: Path) -> set[str]:
    return set(yaml.safe_load(file.read_text()))


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A CLIP, a SigLIP, a Llama, captions and conversations with pictures."""
    root = tmp_path_factory.mktemp("parts")
    tiny.save_towers(root)
    tiny.save_siglip(root / "siglip")
    tiny.save_blip2(root / "blip2")
    tiny.picture().save(root / "a.png")
    turns = [("human", "<image>\nWhat?"), ("gpt", "A dog."), ("human", "Where?"), ("gpt", "In the grass.")]
    row = {"image": "a.png", "conversations": [{"from": role, "value": text} for role, text in turns]}
    (root / "rows.json").write_text(json.dumps([row] * 8))
    return root


def run_twin(recipe: Path, parts: Path, folder: Path, **models: Path) -> SQLlavaTrainer:
    """Trains one step of a tiny recipe, with these models and rows. `models` are others than those it names."""
    settings = yaml.safe_load((RECIPES / "tiny" / recipe).read_text())
    for source in settings.get("datasets", [settings]):
        source |= {"path" if "path" in source else "dataset_path": str(parts / "rows.json"), "image_root": str(parts)}
    for name in ("vision", "text", "qformer"):
        if path := settings.get(f"{name}_model_name_or_path"):
            settings[f"{name}_model_name_or_path"] = str(models.get(name, parts / Path(path).name))
    if "model_name_or_path" in settings:
        settings["model_name_or_path"] = str(folder / recipe.parent / Path(settings["model_name_or_path"]).name)
    settings |= {"output_dir": str(folder / recipe.with_suffix("")), "max_steps": 1, "use_cpu": True}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return train_sft.main(["--config", str(folder / "recipe.yaml"), "--resume", "0"])


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


@pytest.mark.long
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


# Two models in the manner of each pair. The tiny recipes name those of the demo.
MODELS_OF_PAIRS = {
    "siglip2-smollm2-360m": ("siglip", "smollm"),
    "siglip2-qwen3-1.7b": ("siglip", "qwen3"),
    "siglip2-smollm3-3b": ("siglip", "smollm3"),
    "clip-llama3.1-8b": ("clip", "llama31"),
    "siglip2-qwen3-8b": ("siglip", "qwen3"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair", [name if name == PAIRS[1] else pytest.param(name, marks=pytest.mark.long) for name in PAIRS]
)
def test_pair_is_trained_merged_and_answers_in_the_format_of_its_language_model(pair, parts, tmp_path):
    vision, text = MODELS_OF_PAIRS[pair]
    make, layout, end = CHAT_TOKENIZERS[text]
    save_chat_model(tmp_path / text, text)
    run_twin(Path(pair, "stage1.yaml"), parts, tmp_path, vision=parts / vision, text=tmp_path / text)
    trainer = run_twin(Path(pair, "stage2.yaml"), parts, tmp_path)
    row = trainer.data_collator([trainer.train_dataset[0]])["input_ids"][0]
    format = recognise_chat_format(make())
    assert format.layout == layout
    assert f"{format.thought}A dog.{end}" in trainer.processing_class.tokenizer.decode(row)
    merge_adapter(str(tmp_path / pair / "stage2"), str(tmp_path / "merged"))
    model, processor = load_checkpoint(str(tmp_path / "merged"))
    assert model.config.vision_config.model_type == f"{vision}_vision_model"
    images = processor.image_processor
    assert images.size["shortest_edge"] == model.config.vision_config.image_size
    assert list(images.image_mean) == list(AutoImageProcessor.from_pretrained(parts / vision).image_mean)
    [answer] = Assistant(model, processor).answer_batch([(tiny.picture(), "What?")], max_new_tokens=4)
    assert isinstance(answer, str)


@pytest.fixture(scope="module")
def big_configs(tmp_path_factory) -> Path:
    return recipe_memory.write_configurations(tmp_path_factory.mktemp("configs"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [pytest.param(recipe, marks=pytest.mark.long) if recipe.parent.name in PAIRS else recipe for recipe in ORIGINALS],
    ids=str,
)
def test_recipe_states_the_memory_that_the_dry_run_estimates(recipe, big_configs):
    header = recipe_memory.header(recipe)
    assert "estimated, not measured" in header and "Not run by this project" in header
    assert recipe_memory.estimates(recipe, big_configs) == recipe_memory.sizes_in(header)


@pytest.mark.parametrize("pair", PAIRS)
def test_table_of_pairs_says_what_their_recipes_say(pair):
    *_, line = (line for line in recipe_memory.DOCUMENT.read_text().splitlines() if line.startswith(f"| `{pair}`"))
    headers = [recipe_memory.header(Path(pair, f"stage{number}.yaml")) for number in (1, 2)]
    *_, in_four_bits = recipe_memory.sizes_in(line)
    memory = [recipe_memory.sizes_in(header)[0] for header in headers]
    assert line == recipe_memory.row(pair, [*memory, in_four_bits])


@pytest.mark.slow
@pytest.mark.long
def test_table_of_pairs_is_the_one_that_the_script_writes(tmp_path, monkeypatch):
    text = recipe_memory.DOCUMENT.read_text()
    monkeypatch.setattr(recipe_memory, "DOCUMENT", tmp_path / "training.md")
    (tmp_path / "training.md").write_text(text)
    recipe_memory.main()
    assert (tmp_path / "training.md").read_text() == text


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
