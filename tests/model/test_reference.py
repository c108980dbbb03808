"""Checks the reference implementation of the tests against transformers and PEFT.

Its prototype extractor is compared in `test_prototype_extractor.py`.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, CLIPVisionModel, LlavaForConditionalGeneration

from tests import released
from tests.reference import read_reference, read_weights, take, vision_features


IMAGE_TOKEN_ID = 500


def prompt(num_images: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_images)
    words = torch.randint(3, 400, (12,), generator=generator)
    images = torch.full((9 * num_images,), IMAGE_TOKEN_ID)
    pixel_values = torch.randn(num_images, 3, 42, 42, generator=generator) if num_images else None
    return {"input_ids": torch.cat([words[:5], images, words[5:]]), "pixel_values": pixel_values}


@pytest.mark.parametrize("layout", ["older", "newer", "transformers5"])
def test_llava_has_the_logits_of_transformers(tmp_path, layout):
    folder = released.write_llava_hf(tmp_path / "llava", layout)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.image_token_id = IMAGE_TOKEN_ID
    reference = read_reference(folder)
    outputs = []
    for num_images in (0, 1, 2):
        inputs = prompt(num_images)
        logits = reference.logits(**inputs, image_token_id=IMAGE_TOKEN_ID)
        with torch.no_grad():
            expected = model(input_ids=inputs["input_ids"][None], pixel_values=inputs["pixel_values"]).logits[0]
        assert 1 < expected.std() < 20
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
        outputs.append(logits)
    blank = reference.logits(prompt(1)["input_ids"], torch.zeros(1, 3, 42, 42), IMAGE_TOKEN_ID)
    assert (blank[-1] - outputs[1][-1]).abs().max() > 0.5


def test_lora_has_the_logits_and_features_of_peft(tmp_path):
    base = released.write_language_model(tmp_path / "base")
    tower = released.write_clip(tmp_path / "clip", whole=False)
    source = released.write_sq_llava_lora(tmp_path / "sq", base, tower, vision_lora="folder")
    reference = read_reference(source, base, tower)
    inputs = prompt(1)

    llm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    llm = PeftModel.from_pretrained(llm, source).eval()
    text_ids = inputs["input_ids"].clamp_max(400)
    with torch.no_grad():
        expected = llm(text_ids[None]).logits[0]
    torch.testing.assert_close(reference.logits(text_ids), expected, atol=2e-5, rtol=1e-5)

    vision = CLIPVisionModel.from_pretrained(tower, dtype=torch.float32)
    vision = get_peft_model(vision, LoraConfig.from_pretrained(source / "Vit-lora"))
    weights = take(
        read_weights(source / "Vit-lora" / "adapter_model.bin"), "base_model.model.vision_tower.vision_model."
    )
    set_peft_model_state_dict(vision, {f"base_model.model.{name}": tensor for name, tensor in weights.items()})
    with torch.no_grad():
        states = vision.eval()(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    features = vision_features(reference.vision, inputs["pixel_values"])
    torch.testing.assert_close(features, states[:, 1:], atol=2e-5, rtol=1e-5)
    reference.vision.lora = None
    assert (vision_features(reference.vision, inputs["pixel_values"]) - features).abs().max() > 0.1
