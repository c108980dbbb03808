"""Converted checkpoints: equal to the forward pass from the formulas, whole, and refused if anything does not fit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import sentencepiece
import torch
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.utils import logging
from typer.testing import CliRunner

from benchmarks import convert as conversion
from sq_llava.checkpoints import convert
from sq_llava.checkpoints.layouts import recognise
from sq_llava.checkpoints.load import load_checkpoint
from sq_llava.checkpoints.weights import unused_kind, weight_name
from sq_llava.cli.main import app
from sq_llava.resources import CODE_FILES
from tests import ROOT, released, tiny
from tests.reference import read_reference
from tests.warm_python import warm_python


EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Language models and towers that released checkpoints stand on."""
    root = tmp_path_factory.mktemp("parts")
    released.write_language_model(root / "base")
    released.write_language_model(root / "tied", tie_word_embeddings=True, tokenizer="fast_only", safetensors=True)
    released.write_language_model(root / "llava-base", llava=True)
    released.write_clip(root / "clip")
    released.write_clip(root / "tower", whole=False, safetensors=True)
    return root


def convert_folder(source: Path, out: Path, base=None, vision=None, **settings) -> convert.Conversion:
    conversion = convert.plan(recognise(source, base, vision), out, **settings)
    convert.write(conversion, Progress(disable=True))
    return conversion


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def make_prompt(image_token_id: int, num_images: int) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(num_images)
    words = torch.randint(3, 400, (12,), generator=generator)
    images = torch.full((9 * num_images,), image_token_id)
    pixel_values = torch.randn(num_images, 3, 42, 42, generator=generator) if num_images else None
    return {"input_ids": torch.cat([words[:5], images, words[5:]]), "pixel_values": pixel_values}


SQ_LORA = released.write_sq_llava_lora
# What is written; the base and the tower that it stands on.
SOURCES = {
    "lora with ViT-LoRA in both places": (SQ_LORA, "base", "clip"),
    "lora with ViT-LoRA in its folder": (partial(SQ_LORA, vision_lora="folder"), "base", "tower"),
    "lora with ViT-LoRA of its own rank": (partial(SQ_LORA, vision_lora="inside", vision_rank=8), "base", "clip"),
    "lora without ViT-LoRA": (partial(SQ_LORA, vision_lora=None), "base", "clip"),
    "lora stabilised": (partial(SQ_LORA, use_rslora=True, alpha=4), "base", "clip"),
    "lora on a base with a projector": (SQ_LORA, "llava-base", "clip"),
    "lora on a tied base": (SQ_LORA, "tied", "clip"),
    "merged": (released.write_sq_llava_merged, None, "clip"),
    "merged without its tower": (partial(released.write_sq_llava_merged, tower_inside=False), None, "tower"),
    "merged, in one safetensors": (partial(released.write_sq_llava_merged, shards=1, safetensors=True), None, "clip"),
    "projector": (released.write_projector, "base", "clip"),
    "projector of LLaVA": (partial(released.write_projector, projector="mlp2x_gelu"), "tied", "tower"),
    "llava": (partial(released.write_llava, tokenizer="fast"), None, "clip"),
    "llava with one linear layer": (partial(released.write_llava, projector="linear"), None, "clip"),
    "llava lora": (released.write_llava_lora, "base", "clip"),
    "llava on Mistral": (partial(released.write_llava, model_type="llava_mistral"), None, "clip"),
    "llava-hf, older": (partial(released.write_llava_hf, layout="older"), None, None),
    "llava-hf, newer": (partial(released.write_llava_hf, layout="newer"), None, None),
    "llava-hf, of transformers 5": (partial(released.write_llava_hf, layout="transformers5"), None, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_result_has_the_logits_of_the_source(parts, tmp_path, name):
    write, *stands_on = SOURCES[name]
    source = write(tmp_path / "source")
    base, vision = (parts / part if part else None for part in stands_on)
    conversion = convert_folder(source, tmp_path / "result", base, vision)
    assert conversion.processor.image_token_id >= 450
    model, processor = load_checkpoint(str(tmp_path / "result"))
    reference = read_reference(source, base, vision)
    outputs = []
    for num_images in (0, 1, 2):
        prompt = make_prompt(processor.image_token_id, num_images)
        expected = reference.logits(**prompt, image_token_id=processor.image_token_id)
        with torch.no_grad():
            logits = model(input_ids=prompt["input_ids"][None], pixel_values=prompt["pixel_values"]).logits[0]
        difference = (logits[:, : expected.shape[1]] - expected).abs().max()
        assert difference < 1e-5 * expected.abs().max()
        outputs.append(logits[-1])
    assert (outputs[0] - outputs[1]).abs().max() > 0.1


@pytest.mark.slow
def test_auto_classes_load_the_result_in_a_fresh_process_elsewhere(parts, tmp_path):
    source = SQ_LORA(tmp_path / "source", base=parts / "base", vision=parts / "clip")
    convert_folder(source, tmp_path / "result")
    prompt = make_prompt(450, 1)
    torch.save({**prompt, "input_ids": prompt["input_ids"][None]}, tmp_path / "prompt.pt")
    code = (
        "import torch, warnings\n"
        "from transformers import AutoModel, AutoProcessor\n"
        "model = AutoModel.from_pretrained('result', trust_remote_code=True)\n"
        "processor = AutoProcessor.from_pretrained('result', trust_remote_code=True)\n"
        "prompt = torch.load('prompt.pt')\n"
        "assert processor.image_token_id == 450\n"
        "with warnings.catch_warnings():\n"
        "    warnings.simplefilter('error')\n"
        "    new = model.generate(**prompt, max_new_tokens=2)\n"
        "assert new.shape[1] > prompt['input_ids'].shape[1]\n"
        "torch.save(model(**prompt).logits.detach(), 'logits.pt')\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    done = subprocess.run(
        [warm_python(), "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # What transformers logs when a setting of sampling stands beside greedy decoding.
    assert "generation flags" not in done.stderr
    expected = read_reference(source, parts / "base", parts / "clip").logits(**prompt, image_token_id=450)
    logits = torch.load(tmp_path / "logits.pt")[0, :, : expected.shape[1]]
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_result_is_a_whole_repository_of_the_hub(parts, tmp_path):
    source = SQ_LORA(tmp_path / "source", base=parts / "base", vision=parts / "clip")
    convert_folder(source, tmp_path / "result")
    files = {file.name for file in (tmp_path / "result").iterdir()}
    assert files >= {
        *CODE_FILES, "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert {file.name for file in tmp_path.iterdir()} == {"source", "result"}
    for file in (tmp_path / "result").glob("*.py"):
        assert file.read_bytes() == (ROOT / file.name).read_bytes()
    for file in (tmp_path / "result").glob("*.json"):
        assert str(tmp_path) not in file.read_text() and str(parts) not in file.read_text()
    with safe_open(tmp_path / "result" / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}
    card = (tmp_path / "result" / "README.md").read_text()
    assert "converted from `source`" in card and "the LoRA of the authors' SQ-LLaVA" in " ".join(card.split())


def test_configuration_says_what_the_source_said(parts, tmp_path):
    changes = {"num_latents": 4, "mm_vision_select_layer": -3, "rope_theta": 5e5, "image_aspect_ratio": "square"}
    source = released.write_sq_llava_merged(tmp_path / "source", vision=parts / "clip", **changes)
    conversion = convert.plan(recognise(source), tmp_path / "result")
    config, processor = conversion.model.config, conversion.processor
    assert (config.prototype_variant, config.num_prototypes) == ("released", 4)
    assert config.projector_hidden_act == "quick_gelu"
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-3, "default")
    assert config.text_config.rope_parameters["rope_theta"] == 5e5
    assert config.text_config.to_dict().keys() <= {*tiny.tiny_config().text_config.to_dict(), "_name_or_path"}
    assert processor.image_aspect_ratio == "crop"


@pytest.mark.parametrize("tokenizer", ["slow", "fast", "fast_only"])
def test_ids_of_texts_are_those_of_sentencepiece(parts, tmp_path, tokenizer):
    base = released.write_language_model(tmp_path / "base", tokenizer=tokenizer)
    source = released.write_projector(tmp_path / "source", base=base, vision=parts / "clip")
    tokenizer = convert.plan(recognise(source), tmp_path / "result").processor.tokenizer
    encode = sentencepiece.SentencePieceProcessor(str(parts / "base" / "tokenizer.model")).encode
    # Not of a text that begins with a space, to which SentencePiece adds another; prompts do not begin so.
    for text in ("What animal is this?\nA dog, 12 cats.", "Ähnliches 猫 🐈\t  two  spaces", "USER: Hi ASSISTANT:"):
        assert tokenizer(text, add_special_tokens=False).input_ids == encode(text)


@pytest.mark.parametrize("tokenizer", ["slow", "fast", "fast_only"])
def test_prompt_has_the_tokens_of_the_authors_code_which_tokenizes_text_behind_an_image_apart(
    parts, tmp_path, tokenizer
):
    base = released.write_language_model(tmp_path / "base", tokenizer=tokenizer)
    source = released.write_projector(tmp_path / "source", base=base, vision=parts / "clip")
    processor = convert.plan(recognise(source), tmp_path / "result").processor
    encode = sentencepiece.SentencePieceProcessor(str(parts / "base" / "tokenizer.model")).encode
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What animal is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    pieces = [f"{processor.system_message} USER: ", "\n", "\nWhat animal is this? ASSISTANT:"]
    expected = [processor.tokenizer.bos_token_id, *encode(pieces[0])]
    for piece in pieces[1:]:
        expected += [processor.image_token_id, *encode(piece)]
    assert ids == expected


def test_new_rows_are_the_mean_of_the_others(parts, tmp_path):
    source = released.write_projector(tmp_path / "source", base=parts / "base", vision=parts / "clip")
    conversion = convert_folder(source, tmp_path / "result")
    weights = load_weights(tmp_path / "result")
    base = released.text_weights()
    for name, old in ((EMBEDDINGS, base["model.embed_tokens.weight"]), (HEAD, base["lm_head.weight"])):
        assert weights[name].shape == (512, 64)
        torch.testing.assert_close(weights[name][:450], old, atol=0, rtol=0)
        torch.testing.assert_close(weights[name][450:], old.mean(0).expand(62, -1))
    assert (conversion.processor.image_token_id, conversion.processor.vusr_token_id) == (450, 451)
    assert "from 450 to 512 rows, for <image>, [vusr] and padding" in " ".join(convert.describe(conversion))


def test_tied_embeddings_stay_tied(parts, tmp_path):
    source = released.write_llava_lora(tmp_path / "source", base=parts / "tied", vision=parts / "clip")
    convert_folder(source, tmp_path / "result")
    assert HEAD not in load_weights(tmp_path / "result")
    model, _ = load_checkpoint(str(tmp_path / "result"))
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_llava_of_transformers_keeps_its_ids_and_weights(tmp_path):
    source = released.write_llava_hf(tmp_path / "source")
    processor = convert_folder(source, tmp_path / "result").processor
    config = json.loads((source / "config.json").read_text())
    assert (processor.image_token_id, processor.tokenizer.pad_token_id) == (
        config["image_token_index"],
        config["pad_token_id"],
    )
    assert len(processor.tokenizer) == 452
    old, new = load_weights(source), load_weights(tmp_path / "result")
    assert new.keys() == {weight_name(name) for name in old}
    for name, tensor in old.items():
        assert torch.equal(new[weight_name(name)], tensor)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_start_of_training_has_a_new_extractor_and_all_else_of_llava(tmp_path, variant):
    source = released.write_llava_hf(tmp_path / "source")
    conversion = convert_folder(source, tmp_path / "start", prototypes=variant)
    new, old = load_weights(tmp_path / "start"), load_weights(source)
    old = {weight_name(name): tensor for name, tensor in old.items()}
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    added = new.keys() - old.keys()
    assert added and all(name.startswith("model.prototype_extractor.") for name in added)
    assert f"The prototype extractor ({variant}) is new, untrained" in " ".join(convert.describe(conversion))
    assert "extractor is new" in (tmp_path / "start" / "README.md").read_text()
    model, processor = load_checkpoint(str(tmp_path / "start"))
    assert model.config.projector_hidden_act == "gelu"
    assert processor.vusr_token_id == model.config.vusr_token_id == 452
    assert processor.system_message == convert.VICUNA_SYSTEM_MESSAGE
    prompt = make_prompt(processor.image_token_id, 1)
    assert model(input_ids=prompt["input_ids"][None], pixel_values=prompt["pixel_values"]).logits.isfinite().all()


def test_prompt_of_a_release_is_that_of_the_authors(parts, tmp_path):
    source = SQ_LORA(tmp_path / "source", base=parts / "base", vision=parts / "clip")
    processor = convert.plan(recognise(source), tmp_path / "result").processor
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What animal is this?"}]},
        {"role": "assistant", "content": "A dog."},
        {"role": "vusr", "content": "What is it doing?"},
    ]
    assert processor.apply_chat_template(messages) == (
        "<s> A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.Also, the artificial intelligence assistant is a "
        "curious virtual user. The virtual user asks complex questions that are relevant to the content in the "
        "image, for example, asking about background knowledge of the objects in the image, asking to discuss about "
        "events happening in the image, etc. Again, do not ask about uncertain details. USER: <image> \nWhat animal "
        "is this? ASSISTANT: A dog.</s>VUSER: What is it doing?</s>"
    )
    assert processor.vusr_token_id is None and "[vusr]" not in processor.tokenizer.get_vocab()


def test_prompt_of_llava_is_that_of_vicuna(parts, tmp_path):
    source = released.write_llava(tmp_path / "source", vision=parts / "clip")
    processor = convert.plan(recognise(source), tmp_path / "result").processor
    assert processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True) == (
        "<s> A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Hi ASSISTANT:"
    )
    assert processor.image_aspect_ratio == "pad"


def test_generation_is_greedy_and_stops_as_the_source_does_and_at_the_delimiter(parts, tmp_path):
    source = released.write_llava(tmp_path / "source", vision=parts / "clip")
    file = source / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 7}))
    convert_folder(source, tmp_path / "result")
    settings = json.loads((tmp_path / "result" / "generation_config.json").read_text())
    assert settings["do_sample"] is False and settings["eos_token_id"] == [2, 7]
    assert (settings["bos_token_id"], settings["pad_token_id"]) == (1, 0)
    assert not {"temperature", "top_p", "max_length"} & settings.keys()


def test_lora_is_added_in_float32_and_rounded_once(parts, tmp_path):
    base = released.write_language_model(tmp_path / "base", dtype=torch.float16)
    source = released.write_llava_lora(tmp_path / "source", base=base, vision=parts / "clip")
    conversion = convert_folder(source, tmp_path / "result")
    assert conversion.model.dtype == torch.float16
    lora = torch.load(source / "adapter_model.bin")
    name = "model.layers.0.mlp.up_proj"
    down, up = (lora[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    weight = released.text_weights()[f"{name}.weight"].half()
    expected = (weight.double() + 2.0 * up.double() @ down.double()).half()
    result = load_weights(tmp_path / "result")[weight_name(f"{name}.weight")]
    # A value on the border between two float16 may fall to either side in float32.
    assert (result != expected).float().mean() < 0.001
    rounded_first = weight + (2.0 * up @ down).half()
    assert (rounded_first != expected).float().mean() > 0.05


def test_patterns_of_a_module_come_before_rank_and_alpha_of_all(parts, tmp_path):
    source = released.write_llava_lora(tmp_path / "source", base=parts / "base", vision=parts / "clip")
    module = "model.layers.1.self_attn.q_proj"
    weights = torch.load(source / "adapter_model.bin")
    for letter in "AB":
        name = f"base_model.model.{module}.lora_{letter}.weight"
        weights[name] = weights[name][:4] if letter == "A" else weights[name][:, :4].contiguous()
    torch.save(weights, source / "adapter_model.bin")
    config = json.loads((source / "adapter_config.json").read_text())
    patterns = {"rank_pattern": {r"layers\.1\..*q_proj": 4}, "alpha_pattern": {module: 20, "up_proj": 8}}
    (source / "adapter_config.json").write_text(json.dumps(config | patterns))
    convert_folder(source, tmp_path / "result")
    result = load_weights(tmp_path / "result")
    for name, scale in ((module, 5.0), ("model.layers.0.mlp.up_proj", 1.0), ("model.layers.0.mlp.down_proj", 2.0)):
        down, up = (weights[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        expected = released.text_weights()[f"{name}.weight"] + scale * up @ down
        torch.testing.assert_close(result[weight_name(f"{name}.weight")], expected)


def test_vision_lora_that_never_learned_is_said(parts, tmp_path):
    source = SQ_LORA(tmp_path / "source", base=parts / "base", vision=parts / "clip", zero_vision_b=True)
    lines = list(convert.describe(convert.plan(recognise(source), tmp_path / "result")))
    assert "ViT-LoRA: merged into 18 matrices, rank 4, scaled by 3." in lines
    assert any("All B matrices of the ViT-LoRA are zero" in line for line in lines)


def test_vision_lora_of_stage_1_is_merged_too(parts, tmp_path):
    projector = released.write_projector(tmp_path / "projector")
    release = SQ_LORA(tmp_path / "release", vision_lora="folder")
    shutil.copytree(release / "Vit-lora", projector / "Vit-lora")
    convert_folder(projector / "mm_projector.bin", tmp_path / "stage1", parts / "base", parts / "clip")
    convert_folder(release, tmp_path / "stage2", parts / "base", parts / "clip")
    stage1, stage2 = load_weights(tmp_path / "stage1"), load_weights(tmp_path / "stage2")
    tower = [name for name in stage1 if name.startswith("model.vision_tower.")]
    assert all(torch.equal(stage1[name], stage2[name]) for name in tower)
    name = "encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(stage1[f"model.vision_tower.{name}"], released.vision_weights()[name])


def test_everything_that_is_not_used_is_counted(parts, tmp_path):
    source = SQ_LORA(tmp_path / "source", base=parts / "llava-base", vision=parts / "clip")
    lines = [line.split() for line in convert.describe(convert.plan(recognise(source), tmp_path / "result"))]
    lines = [line for line in lines if line[:2] == ["Not", "used"]]
    counts = {" ".join(line[3:]).partition(":")[0]: int(line[2].strip("():")) for line in lines}
    assert counts == {
        f"connector of {parts / 'llava-base'}; the source has its own.": 4,
        "ln_1": 2,
        "inv_freq": 2,
        "position_ids": 2,
        "text_model": 20,
        "projection": 2,
        "logit_scale": 1,
    }


@pytest.mark.parametrize(
    "name", ["model.mm_projector.sim_gamma", "model.layers.0.self_attn.rotary", "transformer.h.0.attn.weight"]
)
def test_strange_names_have_no_weight(name):
    targets = tiny.tiny_model(tiny.tiny_config(prototype_variant="released")).state_dict()
    assert unused_kind(name) is None
    try:
        assert weight_name(name) not in targets
    except ValueError as error:
        assert "is not a name of a weight" in str(error)


@pytest.mark.slow
def test_small_files_hold_the_same_weights_as_a_large_one(parts, tmp_path):
    source = SQ_LORA(tmp_path / "source", base=parts / "base", vision=parts / "clip")
    convert_folder(source, tmp_path / "one")
    convert_folder(source, tmp_path / "many", max_shard_size="100KB")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 5 and {file.name for file in files} == set(index["weight_map"].values())
    one, many = load_weights(tmp_path / "one"), load_weights(tmp_path / "many")
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in many.values())
    assert all(file.stat().st_size < 150_000 or len(load_file(file)) == 1 for file in files)
    loaded, _ = load_checkpoint(str(tmp_path / "many"))
    assert all(torch.equal(tensor, one[name]) for name, tensor in loaded.state_dict().items())


def edit_config(source: Path, file: str = "config.json", **fields) -> None:
    config = json.loads((source / file).read_text())
    (source / file).write_text(json.dumps({**config, **fields}))


def edit_weights(file: Path, change) -> None:
    weights = torch.load(file)
    change(weights)
    torch.save(weights, file)


def edit_shard(source: Path, name: str, change) -> None:
    index = json.loads((source / "pytorch_model.bin.index.json").read_text())
    edit_weights(source / index["weight_map"][name], change)


def cut_off(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


TRAINABLES = "non_lora_trainables.bin"
SHARD = "pytorch_model-00002-of-00002.bin"
NORM, UP = "model.norm.weight", "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
# What is done to a source, and what is said of it.
LORA_FAULTS = {
    "no projector": (lambda s: (s / TRAINABLES).unlink(), "non_lora_trainables.bin, which holds the .* is missing"),
    "no LoRA": (lambda s: (s / "adapter_model.bin").unlink(), "adapter_model.bin, which holds the LoRA, is missing"),
    "rank": (
        lambda s: edit_config(s, "adapter_config.json", r=16),
        r"has the rank 8, but .*source/adapter_config.json says 16, so its alpha is not known. Put the",
    ),
    "rank of ViT-LoRA": (
        lambda s: shutil.rmtree(s / "Vit-lora"),
        r"vision_tower.* has the rank 4, but .*says 8.*\(a ViT-LoRA's into Vit-lora\)",
    ),
    "half of a pair": (
        lambda s: edit_weights(s / "adapter_model.bin", lambda w: w.pop(UP)),
        "up_proj has lora_A, but not the other half",
    ),
    "DoRA": (lambda s: edit_config(s, "adapter_config.json", use_dora=True), "use_dora is true"),
    "shape of LoRA": (
        lambda s: edit_weights(s / "adapter_model.bin", lambda w: w.update({UP: torch.ones(3, 8)})),
        r"LoRA of \(3, 8\) x \(8, 64\) does not fit model.layers.0.mlp.up_proj.weight of \(96, 64\)",
    ),
    "incomplete projector": (
        lambda s: edit_weights(s / TRAINABLES, lambda w: w.pop("base_model.model.model.mm_projector.f.bias")),
        r"1 weights that no tensor fills: model.prototype_extractor.f.bias\.$",
    ),
    "strange tensor": (
        lambda s: edit_weights(s / TRAINABLES, lambda w: w.update({"base_model.model.model.extra": torch.ones(1)})),
        r"1 tensors that have no use: base_model.model.model.extra in .*non_lora_trainables.bin\.$",
    ),
    "another tower": (
        lambda s: edit_weights(
            s / TRAINABLES, lambda w: w.update({"base_model.model.model.mm_projector.c.weight": torch.ones(16, 16)})
        ),
        r"1 wrong shapes: .*mm_projector.c.weight in .*: \(16, 16\), not \(32, 32\)",
    ),
    "projector type": (lambda s: edit_config(s, mm_projector_type="mlp3x"), "mm_projector_type is 'mlp3x', which"),
    "image start": (lambda s: edit_config(s, mm_use_im_start_end=True), "mm_use_im_start_end is true"),
    "aspect ratio": (lambda s: edit_config(s, image_aspect_ratio="anyres"), "image_aspect_ratio is 'anyres'"),
    "cut off": (lambda s: cut_off(s / "adapter_model.bin"), r"adapter_model.bin is not read: it is damaged"),
}


@pytest.mark.parametrize("fault", LORA_FAULTS)
def test_fault_of_a_lora_is_said_and_nothing_written(parts, tmp_path, fault):
    source = SQ_LORA(tmp_path / "source", base=parts / "base", vision=parts / "clip")
    break_it, message = LORA_FAULTS[fault]
    break_it(source)
    with pytest.raises(ValueError, match=message):
        convert.plan(recognise(source), tmp_path / "new" / "result")
    assert not (tmp_path / "new").exists()


WHOLE_FAULTS = {
    "missing file": (lambda s: (s / SHARD).unlink(), r"pytorch_model-00002-of-00002.bin: no such file"),
    "cut off": (lambda s: cut_off(s / SHARD), r"pytorch_model-00002-of-00002.bin is not read: it is damaged"),
    "missing tensor": (
        lambda s: edit_shard(s, NORM, lambda w: w.pop(NORM)),
        r"1 weights that no tensor fills: model.language_model.norm.weight",
    ),
    "both ways": (
        lambda s: edit_shard(s, NORM, lambda w: w.update({"model.norm.scale": w.pop(NORM)})),
        r"1 tensors that have no use: model.norm.scale in .*bin. 1 weights that no tensor fills: model.*norm.weight",
    ),
    "twice": (
        lambda s: edit_shard(s, NORM, lambda w: w.update({"language_model.model.norm.weight": w[NORM]})),
        r"language_model.model.norm.weight and model.norm.weight .* are both model.language_model.norm.weight",
    ),
    "no tokenizer": (lambda s: (s / "tokenizer.model").unlink(), "holds neither tokenizer.model nor tokenizer.json"),
    "no weights": (lambda s: [f.unlink() for f in s.glob("pytorch_model*")], "but holds no weights"),
    "ViT-LoRA beside": (lambda s: (s / "Vit-lora").mkdir(), "nothing says whether that is merged into them"),
    "model type": (lambda s: edit_config(s, model_type="llava_mpt2"), "model_type is 'llava_mpt2', of a"),
}


@pytest.mark.parametrize("fault", WHOLE_FAULTS)
def test_fault_of_a_whole_checkpoint_is_said_and_nothing_written(parts, tmp_path, fault):
    source = released.write_llava(tmp_path / "source", vision=parts / "clip")
    break_it, message = WHOLE_FAULTS[fault]
    break_it(source)
    with pytest.raises(ValueError, match=message):
        convert.plan(recognise(source), tmp_path / "new" / "result")
    assert not (tmp_path / "new").exists()


def test_vision_lora_that_differs_in_its_two_places_is_refused(parts, tmp_path):
    source = SQ_LORA(tmp_path / "source", base=parts / "base", vision=parts / "clip", differing=True)
    message = r"ViT-LoRA in .*source/adapter_model.bin differs from that in .*Vit-lora/adapter_model.bin.* Move the"
    with pytest.raises(ValueError, match=message):
        convert.plan(recognise(source), tmp_path / "result")
    source = SQ_LORA(tmp_path / "fewer", base=parts / "base", vision=parts / "clip")

    def drop_last_layer(weights):
        for name in [name for name in weights if ".layers.2." in name]:
            del weights[name]

    edit_weights(source / "Vit-lora" / "adapter_model.bin", drop_last_layer)
    with pytest.raises(ValueError, match=message.replace("source", "fewer")):
        convert.plan(recognise(source), tmp_path / "result")


def test_cut_off_safetensors_are_named(tmp_path):
    source = released.write_llava_hf(tmp_path / "source")
    cut_off(source / "model-00002-of-00003.safetensors")
    with pytest.raises(ValueError, match=r"model-00002-of-00003.safetensors is damaged or cut off"):
        convert.plan(recognise(source), tmp_path / "result")


def test_missing_parts_are_asked_for_by_their_options(parts, tmp_path):
    source = SQ_LORA(tmp_path / "source", base="org/base", vision="org/tower")
    with pytest.raises(ValueError, match=r"stands on org/base, which is not on this machine: .* as --base"):
        convert.plan(recognise(source), tmp_path / "result")
    with pytest.raises(ValueError, match=r"needs org/tower, which is not on this machine: .* as --vision"):
        convert.plan(recognise(source, parts / "base"), tmp_path / "result")
    lone = released.write_projector(tmp_path / "lone", config=False)
    with pytest.raises(ValueError, match=r"stands on a model that it does not name: .* as --base"):
        convert.plan(recognise(lone, vision=parts / "clip"), tmp_path / "result")


def test_parts_that_a_source_has_itself_are_refused(parts, tmp_path):
    source = released.write_llava_hf(tmp_path / "source")
    with pytest.raises(ValueError, match="with its vision tower: leave --vision out"):
        convert.plan(recognise(source, vision=parts / "clip"), tmp_path / "result")
    with pytest.raises(ValueError, match="with all of the language model: leave --base out"):
        convert.plan(recognise(source, base=parts / "base"), tmp_path / "result")
    merged = released.write_sq_llava_merged(tmp_path / "merged", vision=parts / "clip")
    with pytest.raises(ValueError, match="has a trained prototype extractor: leave --prototypes out"):
        convert.plan(recognise(merged), tmp_path / "result", prototypes="paper")


LLAVA_HF_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{% generation %}{{ part['text'] }}{% endgeneration %}{% endfor %}"
    "{% endfor %}"
)
CHATML_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
VICUNA_TEMPLATE = "{% for m in messages %}{{ 'USER: ' + m['content'] }}{% endfor %}"


def write_template(folder: Path, file: str, template: str) -> None:
    if file.endswith(".jinja"):
        (folder / file).write_text(template)
        return
    fields = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    value = [{"name": "default", "template": template}] if file == "tokenizer_config.json" else template
    (folder / file).write_text(json.dumps({**fields, "chat_template": value}))


@pytest.mark.parametrize(
    "file", ["chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json"]
)
def test_source_with_other_prompts_than_vicuna_s_is_refused(tmp_path, file):
    source = released.write_llava_hf(tmp_path / "source")
    write_template(source, file, CHATML_TEMPLATE)
    with pytest.raises(ValueError, match=rf"source/{file}: chat_template is .* have no USER:.* take the template out"):
        convert.plan(recognise(source), tmp_path / "result")
    for template in (LLAVA_HF_TEMPLATE, VICUNA_TEMPLATE):
        write_template(source, file, template)
        lines = list(convert.describe(convert.plan(recognise(source), tmp_path / "result")))
        assert f"Prompts are Vicuna's, with its system message, in place of those by {source / file}." in lines


def test_padding_in_place_of_the_source_s_crop_is_said(tmp_path):
    source = released.write_llava_hf(tmp_path / "source")
    line = "Images are padded to a square, as LLaVA-1.5 was trained; the source's processor crops them."
    assert line in list(convert.describe(convert.plan(recognise(source), tmp_path / "result")))
    edit_config(source, "preprocessor_config.json", do_pad=True)
    assert line not in list(convert.describe(convert.plan(recognise(source), tmp_path / "result")))


def test_own_checkpoint_and_filled_folder_are_refused(parts, tmp_path):
    source = released.write_llava_hf(tmp_path / "source")
    convert_folder(source, tmp_path / "result")
    with pytest.raises(ValueError, match="a checkpoint of this library: there is nothing to convert"):
        convert.plan(recognise(tmp_path / "result"), tmp_path / "again")
    with pytest.raises(ValueError, match="result is not empty: give a new folder"):
        convert.plan(recognise(source), tmp_path / "result")
    (tmp_path / "empty").mkdir()
    convert_folder(source, tmp_path / "empty")
    assert load_weights(tmp_path / "empty").keys() == load_weights(tmp_path / "result").keys()


def test_projector_without_configuration_takes_the_released_settings_and_says_so(parts, tmp_path):
    source = released.write_projector(tmp_path / "source", config=False)
    conversion = convert.plan(recognise(source, parts / "base", parts / "clip"), tmp_path / "result")
    config = conversion.model.config
    assert (config.num_prototypes, config.vision_feature_layer) == (256, -2)
    text = " ".join(convert.describe(conversion))
    assert "no config.json beside the projector" in text and "256 are taken" in text


def test_all_files_are_on_the_disk_before_the_folder_has_its_name(parts, tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync

    def record(descriptor: int) -> None:
        assert not (tmp_path / "result").exists()
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", record)
    source = released.write_llava(tmp_path / "source", vision=parts / "clip")
    convert_folder(source, tmp_path / "result", max_shard_size="100KB")
    result = tmp_path / "result"
    assert {path.stat().st_ino for path in result.iterdir()} <= synced


@pytest.mark.parametrize("step", ["write_file", "custom_object_save", "write_card"])
def test_conversion_that_ends_early_leaves_no_folder_and_begins_anew(parts, tmp_path, monkeypatch, step):
    source = released.write_llava(tmp_path / "source", vision=parts / "clip")

    def end(*arguments, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(convert, step, end)
        with pytest.raises(KeyboardInterrupt):
            convert_folder(source, tmp_path / "result")
    assert not (tmp_path / "result").exists()
    convert_folder(source, tmp_path / "result")
    assert {file.name for file in tmp_path.iterdir()} == {"source", "result"}


@pytest.mark.slow
def test_killed_conversion_leaves_no_folder_and_begins_anew(parts, tmp_path):
    source = released.write_llava(tmp_path / "source", vision=parts / "clip")
    code = (
        "import os, signal, sys\n"
        "from rich.progress import Progress\n"
        "from sq_llava.checkpoints import convert\n"
        "from sq_llava.checkpoints.layouts import recognise\n"
        "write_file, done = convert.write_file, []\n"
        "def kill_at_the_third(*arguments):\n"
        "    write_file(*arguments)\n"
        "    done.append(arguments)\n"
        "    len(done) < 3 or os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert.write_file = kill_at_the_third\n"
        "convert.write(convert.plan(recognise(sys.argv[1]), sys.argv[2], max_shard_size='100KB'), Progress())\n"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "result")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "result").exists()
    assert len(list((tmp_path / "half-written-result" / "result").glob("*.safetensors"))) == 3
    convert_folder(source, tmp_path / "result")
    assert {file.name for file in tmp_path.iterdir()} == {"source", "result"}


@pytest.mark.slow
def test_memory_is_that_of_the_largest_files_not_of_the_checkpoint():
    report = conversion.run(conversion.SMALL, num_shards=4, with_peer=False)
    assert report["convert"]["peak_bytes"] <= report["bound_bytes"] < report["base_bytes"]


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)], env={"COLUMNS": "119"})


def test_command_says_what_it_found_and_did(parts, tmp_path):
    source = SQ_LORA(tmp_path / "source")
    out = tmp_path / "result"
    result = run(source, "--base", parts / "base", "--vision", parts / "clip", "--out", out, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stderr.split())
    assert "is the LoRA of the authors' SQ-LLaVA: adapter_config.json, and" in text
    assert "LLM-LoRA: merged into 14 matrices, rank 8, scaled by 2." in text
    assert "of bfloat16; prototypes: released; marker of its questions: VUSER:" in text
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_weights(out).values())


def test_command_proves_its_result(parts, tmp_path):
    source = released.write_llava(tmp_path / "source", vision=parts / "clip")
    result = run(source, "--out", tmp_path / "result", "--verify")
    assert result.exit_code == 0, result.output
    assert "equal" in result.stdout and "NOT equal" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "--out", "new"], "none (the source): no such folder"),
        (["source", "--out", "new", "--dtype", "int8"], "--dtype is 'int8': give auto, float32"),
        (["source", "--out", "new", "--prototypes", "none"], "--prototypes is 'none': choose one of paper, released"),
        (["source", "--out", "new", "--max-shard-size", "5"], "Unit"),
        (["source", "--out", "source"], "source is not empty"),
    ],
)
def test_wrong_input_ends_with_one_line_and_writes_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    released.write_llava_hf(tmp_path / "source")
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr and "Traceback" not in result.output
    assert {file.name for file in tmp_path.iterdir()} == {"source"}


def test_help_has_an_example_for_each_layout():
    examples = run("--help").stdout.partition("Examples:")[2]
    for example in ("sqllava-lora-7b", "llava-v1.5-7b", "llava-v1.5-7b-lora", "stage1/mm_projector.bin"):
        assert f"sq-llava convert {example} --" in examples
    assert examples.count("sq-llava convert llava-hf/llava-1.5-7b-hf") == 2
