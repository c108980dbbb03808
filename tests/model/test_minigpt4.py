"""MiniGPT-4 as a configuration: BLIP-2's vision tower and Q-Former, one linear layer, and its own prompt layout."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import Blip2ForConditionalGeneration, Blip2VisionModel, BlipImageProcessorPil

import train_sft
from configuration_sq_llava import SQLlavaConfig
from demo.data import caption_rows, image_root, read_questions
from modeling_sq_llava import SQLlavaForConditionalGeneration
from processing_sq_llava import PROMPT_LAYOUTS, SQLlavaProcessor
from sq_llava.checkpoints.compose import compose, compose_config, compose_processor, load_vision_tower
from sq_llava.checkpoints.load import load_checkpoint
from sq_llava.checkpoints.provenance import read_provenance
from sq_llava.data.self_questions import ANSWER
from sq_llava.inference.assistant import Assistant
from sq_llava.training.collator import SelfQuestioningCollator
from tests import tiny
from tests.warm_python import warm_python


pytestmark = pytest.mark.slow


LAYOUT = PROMPT_LAYOUTS["minigpt4"]
ARCHITECTURE = {"prototype_variant": "none", "projector_type": "linear"}
IMAGE = {"type": "image"}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    tiny.save_towers(root)
    tiny.save_blip2(root / "blip2")
    return root


@pytest.fixture(scope="module")
def folders(parts) -> tuple[str, str, str]:
    """Vision tower, language model and Q-Former."""
    return str(parts / "blip2"), str(parts / "llama"), str(parts / "blip2")


@pytest.fixture(scope="module")
def composed(folders) -> tuple[SQLlavaForConditionalGeneration, SQLlavaProcessor]:
    model, processor = compose(*folders, processor_kwargs=LAYOUT, **ARCHITECTURE)
    return model.eval(), processor


@pytest.fixture
def processor() -> SQLlavaProcessor:
    return tiny.tiny_processor(image_seq_length=4, **LAYOUT)


# The configuration.


def test_fields_follow_from_a_blip_2_tower_and_its_qformer():
    config = tiny.tiny_minigpt4_config(num_query_tokens=7)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-1, "full")
    assert (config.num_vision_tokens, config.image_seq_length) == (10, 7)
    config = SQLlavaConfig(
        vision_config={"model_type": "blip_2_vision_model"}, resampler="qformer", prototype_variant="none"
    )
    assert (config.num_vision_tokens, config.image_seq_length) == (257, 32)
    assert (config.qformer_config.hidden_size, config.qformer_config.encoder_hidden_size) == (768, 1408)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"resampler": "perceiver"}, "resampler is 'perceiver': choose one of 'qformer'"),
        ({"resampler": None}, "qformer_config is given, but resampler is None: set resampler 'qformer'"),
        ({"prototype_variant": "paper"}, "prototype_variant is 'paper' and resampler 'qformer'.* Set .* 'none'"),
        ({"num_query_tokens": 0}, "num_query_tokens is 0: give an int of at least 1"),
        ({"image_seq_length": 10}, "image_seq_length is 10, but the Q-Former gives 4 tokens per image: remove it"),
        ({"vision_feature_layer": -2}, "vision_feature_layer is -2, but a BLIP-2 vision tower .* use -1"),
        (
            {"qformer_config": {**tiny.TINY_QFORMER, "encoder_hidden_size": 1408}},
            "encoder_hidden_size is 1408, but the vision tower's features have 32 channels: use the Q-Former",
        ),
    ],
)
def test_the_error_about_a_wrong_field_names_it_and_says_what_to_give(fields, error):
    with pytest.raises(ValueError, match=error):
        tiny.tiny_minigpt4_config(**fields)


def test_a_configuration_saved_without_resampler_fields_still_loads(tmp_path):
    tiny.tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for name in ("resampler", "qformer_config", "num_query_tokens"):
        del saved[name]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config = SQLlavaConfig.from_pretrained(tmp_path)
    assert {**config.to_dict(), "_name_or_path": ""} == {**tiny.tiny_config().to_dict(), "_name_or_path": ""}
    assert config.resampler is config.qformer_config is None
    names = {name.split(".")[1] for name in tiny.tiny_model(config).state_dict() if name.startswith("model.")}
    assert names == {"vision_tower", "prototype_extractor", "multi_modal_projector", "language_model"}


# The model.


@torch.no_grad()
def test_parts_of_a_blip_2_give_the_same_as_in_their_own_model(folders, composed):
    model, _ = composed
    blip2 = Blip2ForConditionalGeneration.from_pretrained(folders[0]).eval()
    pixel_values = tiny.tiny_inputs(model.config, num_images=2)["pixel_values"]
    theirs = blip2.get_image_features(pixel_values, return_dict=True)
    features = model.model.get_vision_features(pixel_values)
    torch.testing.assert_close(features, theirs.last_hidden_state)
    queried = model.model.resampler(features)
    torch.testing.assert_close(queried, theirs.qformer_outputs.last_hidden_state)
    image_tokens = model.get_image_features(pixel_values, return_dict=True).pooler_output
    torch.testing.assert_close(image_tokens, model.model.multi_modal_projector(queried))
    assert image_tokens.shape == (2, 4, model.config.text_config.hidden_size)


def test_qformer_stays_without_dropout_while_the_model_is_in_training():
    model = tiny.tiny_model(tiny.tiny_minigpt4_config()).train()
    assert model.model.multi_modal_projector.training
    assert not any(module.training for module in model.model.resampler.modules())
    pixel_values = tiny.tiny_inputs(model.config)["pixel_values"]
    outputs = [model.get_image_features(pixel_values, return_dict=True).pooler_output for _ in range(2)]
    assert torch.equal(*outputs)


@torch.no_grad()
def test_a_saved_model_gives_the_same_in_other_programs(composed, tmp_path):
    model, processor = composed
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, same_processor = load_checkpoint(str(tmp_path))
    inputs = tiny.tiny_inputs(model.config)
    expected = model(**inputs).logits
    assert torch.equal(again.eval()(**inputs).logits, expected)
    assert same_processor.chat_template == processor.chat_template
    torch.save((inputs, expected), tmp_path / "expected.pt")
    code = (
        "import sys, torch; from transformers import AutoModel, AutoProcessor; folder = sys.argv[1]; "
        "model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval(); "
        "processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True); "
        "inputs, expected = torch.load(folder + '/expected.pt'); torch.manual_seed(0); "
        "assert torch.equal(model(**inputs).logits, expected); "
        "assert processor.image_seq_length == 4 and processor.image_end == '</Img>'; "
        "assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs['input_ids'].shape[1]"
    )
    subprocess.run([warm_python(), "-c", code, str(tmp_path)], check=True, cwd=tmp_path)


@pytest.mark.parametrize("aspect_ratio", ["pad", "crop"])
def test_a_square_picture_has_the_pixels_that_blip_2s_own_processor_gives(aspect_ratio, folders):
    processor = compose_processor(*folders, image_aspect_ratio=aspect_ratio)
    picture = tiny.picture(width=60, height=60)
    theirs = BlipImageProcessorPil.from_pretrained(folders[0])(picture, return_tensors="pt")["pixel_values"]
    ours = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_plan_has_the_sizes_of_the_composed_model(folders, composed):
    planned = SQLlavaForConditionalGeneration(compose_config(*folders, **ARCHITECTURE))
    ours = {name: weight.shape for name, weight in composed[0].state_dict().items()}
    assert {name: weight.shape for name, weight in planned.state_dict().items()} == ours


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2"])
def test_the_vision_tower_uses_the_requested_attention(attention, folders, monkeypatch):
    # As if the package flash-attn were installed.
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *_, **__: None)
    monkeypatch.setattr(Blip2VisionModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    tower = load_vision_tower(folders[0], attn_implementation=attention)
    assert tower.config._attn_implementation == attention


def test_a_qformer_of_another_kind_of_model_is_refused(folders):
    with pytest.raises(ValueError, match=r"llama', a llama\. Give a BLIP-2 model"):
        compose_config(*folders[:2], folders[1], **ARCHITECTURE)


# The prompt.


def conversation() -> list[dict]:
    return [
        {"role": "user", "content": [IMAGE, text("What is it?")]},
        {"role": "assistant", "content": [text("A dog.")]},
        {"role": "user", "content": [text("Where?")]},
        {"role": "assistant", "content": [text("In the grass.")]},
    ]


def test_prompt_is_minigpt_4s_to_the_character(processor):
    assert processor.apply_chat_template(conversation()) == (
        "<s>###Human: <Img><image></Img>What is it? ###Assistant: A dog.</s>"
        "###Human: Where? ###Assistant: In the grass.</s>"
    )
    question = [{"role": "user", "content": [text("Compare"), IMAGE, text("with"), IMAGE]}]
    assert processor.apply_chat_template(question, add_generation_prompt=True) == (
        "<s>###Human: Compare<Img><image></Img>with<Img><image></Img> ###Assistant:"
    )
    # Stage 1 has only images and captions.
    caption = [{"role": "user", "content": [IMAGE]}, {"role": "assistant", "content": [text("A dog.")]}]
    assert processor.apply_chat_template(caption, plain=True) == "<s><image>A dog.\n"


def test_loss_is_only_on_the_answers(processor):
    collator = SelfQuestioningCollator(processor, self_question_ratio=0.0)
    batch = collator([{"row_id": 0, "messages": conversation(), "images": [tiny.picture()]}])
    labels, ids = batch["labels"][0], batch["input_ids"][0]
    assert (ids == processor.image_token_id).sum() == 4
    spoken = processor.tokenizer.decode(ids[labels != -100])
    assert spoken.strip() == "A dog.</s> In the grass.</s>"
    assert set(batch["turn_kinds"][0][labels != -100].tolist()) == {ANSWER}


# Training.


@pytest.fixture(scope="module")
def stage1(parts, tmp_path_factory):
    return train_on(caption_rows(read_questions("train"))[:16], parts, tmp_path_factory.mktemp("stage1"), max_steps=5)


def train_on(rows: list[dict], parts, output_dir, **settings):
    """Trains stage 1 on captions of easy-VQA's images."""
    (output_dir / "captions.json").write_text(json.dumps(rows))
    settings = {
        "stage": "align", "output_dir": output_dir, "vision_model_name_or_path": parts / "blip2",
        "text_model_name_or_path": parts / "llama", "qformer_model_name_or_path": parts / "blip2", **ARCHITECTURE,
        "prompt_layout": "minigpt4", "dataset_path": output_dir / "captions.json", "image_root": image_root(),
        "vision_lora_r": 0, "learning_rate": 3e-2, "per_device_train_batch_size": 4, "doctor": "off",
        "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "max_length": 128, "disable_tqdm": True, **settings,
    }  # fmt: skip
    return train_sft.main([text for name, value in settings.items() for text in (f"--{name}", str(value))])


@torch.no_grad()
def loss_of_captions(trainer, shift: int = 0) -> float:
    """The loss with the image of each row, or with the image `shift` rows before it."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    pixel_values = batch["pixel_values"].roll(shift, 0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = trainer.model.eval()(**inputs, pixel_values=pixel_values).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).item()


def assert_only_the_projector_is_trained(trainer, base: str):
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all(".multi_modal_projector." in name for name in trained)
    begun = SQLlavaForConditionalGeneration.from_pretrained(base).state_dict()
    merged = load_checkpoint(trainer.args.output_dir)[0].merge_and_unload().state_dict()
    assert begun.keys() == merged.keys()
    for name, weight in merged.items():
        assert torch.equal(weight, begun[name]) != name.startswith("model.multi_modal_projector."), name


def test_stage_one_trains_only_the_projector(stage1):
    assert_only_the_projector_is_trained(stage1, f"{stage1.args.output_dir}/base")


@pytest.mark.long
def test_stage_one_learns_which_caption_belongs_to_which_image(parts, tmp_path):
    rows = {row["conversations"][1]["value"]: row for row in caption_rows(read_questions("train"))}
    trainer = train_on(list(rows.values())[:4], parts, tmp_path, max_steps=60, lr_scheduler_type="constant")
    own = loss_of_captions(trainer)
    assert all(own < loss_of_captions(trainer, shift) - 0.2 for shift in (1, 2, 3))


def test_stage_two_trains_only_the_projector_on_answers_to_the_four_instructions(stage1, tmp_path):
    recipe = yaml.safe_load((Path(train_sft.__file__).parent / "recipes/tiny/minigpt4-7b/stage2.yaml").read_text())
    recipe["datasets"][0] |= {"path": f"{stage1.args.output_dir}/captions.json", "image_root": str(image_root())}
    recipe |= {"model_name_or_path": stage1.args.output_dir, "output_dir": str(tmp_path / "run"), "use_cpu": True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    trainer = train_sft.main(["--config", str(tmp_path / "recipe.yaml")])
    assert_only_the_projector_is_trained(trainer, f"{stage1.args.output_dir}/base")
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(16)])
    tokenizer = trainer.processing_class.tokenizer
    prompts = [tokenizer.decode(ids[labels == -100]) for ids, labels in zip(batch["input_ids"], batch["labels"])]
    asked = {prompt.partition("</Img>")[2].partition(" ###Assistant:")[0] for prompt in prompts}
    assert asked == set(recipe["datasets"][0]["instructions"])
    stages = read_provenance(tmp_path / "run")["stages"]
    assert stages[1]["data"][0]["instructions"] == recipe["datasets"][0]["instructions"]
    assert "instructions" not in stages[0]["data"][0]


def test_assistant_answers_about_an_image(composed):
    answers = Assistant(*composed).answer_batch([(tiny.picture(), "What is it?")] * 2, max_new_tokens=4)
    assert len(answers) == 2 and answers[0] == answers[1]
