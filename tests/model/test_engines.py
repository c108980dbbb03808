"""The code of a checkpoint meets the needs of inference engines. No engine runs here; `make test-vllm` runs vLLM.

An engine builds the base model with `AutoModel.from_config`, replaces layers and attention by its own, encodes images
with `get_image_features`, and finds the placeholders by the processor's offsets.
"""

import ast
import re

import pytest
import torch
from jinja2 import meta, nodes
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.chat_template_utils import _compile_jinja_template

from modeling_sq_llava import SQLlavaAutoModel, SQLlavaModel
from tests import ROOT
from tests.project.test_layout import HUB_CODE, path_of
from tests.tiny import picture, tiny_config, tiny_inputs, tiny_minigpt4_config, tiny_model, tiny_processor
from tests.vllm_configurations import CONFIGURATIONS


# Everything that the code of a checkpoint imports from transformers. The oldest supported version, 5.16.1, has it.
# Run `make test-versions`, which uses a checkpoint with each version, before you add a name.
IN_TRANSFORMERS_5_16 = {
    "transformers": {
        "AddedToken", "AutoConfig", "AutoModel", "Blip2VisionModel", "CONFIG_MAPPING", "Cache", "GenerationConfig",
        "GenerationMixin", "LlamaTokenizer", "LlavaImageProcessorPil", "LogitsProcessorList", "PreTrainedConfig",
        "PreTrainedModel", "ProcessorMixin", "SuppressTokensLogitsProcessor", "initialization",
    },
    "transformers.activations": {"ACT2FN"},
    "transformers.image_utils": {"ChannelDimension", "infer_channel_dimension_format", "is_valid_image"},
    "transformers.modeling_outputs": {
        "BaseModelOutputWithPast", "BaseModelOutputWithPooling", "MoeCausalLMOutputWithPast", "MoeModelOutputWithPast",
    },
    "transformers.models.mixtral.modeling_mixtral": {"load_balancing_loss_func"},
    "transformers.processing_utils": {"MultiModalData", "ProcessingKwargs"},
    "transformers.utils": {"can_return_tuple", "torch_compilable_check"},
}  # fmt: skip


@pytest.mark.parametrize("module", HUB_CODE)
def test_code_of_a_checkpoint_imports_only_what_the_oldest_supported_transformers_has(module):
    for node in ast.walk(ast.parse(path_of(module).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "transformers":
            assert {alias.name for alias in node.names} <= IN_TRANSFORMERS_5_16[node.module], node.module
        elif isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("transformers")]


@pytest.fixture(params=[tiny_config, tiny_minigpt4_config], ids=["SQ-LLaVA", "MiniGPT-4"])
def base(request) -> SQLlavaModel:
    """The base as an engine builds it, with the weights of `tiny_model(base.config)`."""
    base = SQLlavaAutoModel._from_config(request.param())
    base.load_state_dict(tiny_model(base.config).model.state_dict())
    return base.eval()


@torch.no_grad()
def test_base_takes_embeddings_with_images_and_returns_hidden_states_first(base):
    model, inputs = tiny_model(base.config), tiny_inputs(base.config)
    image_tokens = base.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    placeholders = inputs["input_ids"] == base.config.image_token_id
    embeddings = base.get_input_embeddings()(inputs["input_ids"].masked_fill(placeholders, 0))
    embeddings[placeholders] = image_tokens.flatten(0, 1)
    outputs = base(
        inputs_embeds=embeddings,
        position_ids=torch.arange(embeddings.shape[1]).unsqueeze(0),
        use_cache=False,
        return_dict=False,
    )
    assert isinstance(outputs, tuple)
    torch.testing.assert_close(model.lm_head(outputs[0]), model(**inputs).logits)


@pytest.mark.parametrize("num_images", [1, 3])
def test_image_features_are_the_tokens_of_one_image_after_another(num_images, base):
    pixel_values = tiny_inputs(base.config, num_images=num_images)["pixel_values"]
    with torch.no_grad():
        image_tokens = base.get_image_features(pixel_values, return_dict=True).pooler_output
        alone = [base.get_image_features(image[None], return_dict=True).pooler_output for image in pixel_values]
    assert image_tokens.shape == (num_images, base.config.image_seq_length, base.config.text_config.hidden_size)
    torch.testing.assert_close(image_tokens, torch.cat(alone))


def test_only_the_language_model_uses_the_attention_of_an_engine_and_passes_its_arguments():
    seen = []

    def attention(module, *args, engine_argument=None, **kwargs):
        seen.append((type(module).__name__, engine_argument))
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("engine", attention)
    config = tiny_config()
    config.text_config._attn_implementation = "engine"
    base = SQLlavaModel(config).eval()
    assert base.language_model.config is config.text_config is config.get_text_config()
    with torch.no_grad():
        base(**tiny_inputs(config), engine_argument=7)
    assert seen == [("LlamaAttention", 7)] * config.text_config.num_hidden_layers


@pytest.mark.parametrize("variant", ["paper", "released", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_linear_layers_can_be_replaced_by_layers_that_accept_only_their_own_dtype(variant, dtype):
    model = tiny_model(tiny_config(prototype_variant=variant)).to(dtype)
    pixel_values = tiny_inputs(model.config)["pixel_values"]
    before = model.get_image_features(pixel_values, return_dict=True).pooler_output
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in linears:
        linear = model.get_submodule(name)
        replacement = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
        replacement.load_state_dict(linear.state_dict())
        model.set_submodule(name, replacement.to(dtype))
    assert "model.multi_modal_projector.linear_1" in linears
    assert torch.equal(model.get_image_features(pixel_values, return_dict=True).pooler_output, before)


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_processor_returns_the_offsets_of_the_placeholders(num_images, any_tokenizer):
    processor = tiny_processor(any_tokenizer)
    messages = [{"role": "user", "content": [*[{"type": "image"}] * num_images, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [picture(seed) for seed in range(num_images)] or None
    inputs = processor(text=[text], images=images, return_text_replacement_offsets=True, return_tensors="pt")
    replacements = inputs["text_replacement_offsets"][0]
    assert [text[slice(*each["span"])] for each in replacements] == ["<image>"] * num_images
    assert [(each["type"], each["replacement"]) for each in replacements] == [("image", "<image>" * 9)] * num_images
    numbers = processor._get_num_multimodal_tokens(image_sizes=[[40, 60]] * num_images)
    assert (numbers["num_image_tokens"], numbers["num_image_patches"]) == ([9] * num_images, [1] * num_images)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 9 * num_images
    assert "num_image_tokens" not in processor._get_num_multimodal_tokens()


def test_servers_find_the_loop_over_parts_and_the_keywords_of_the_template():
    template = tiny_processor().chat_template
    parsed = _compile_jinja_template(template).environment.parse(template)
    message_content = nodes.Getitem(nodes.Name("message", "load"), nodes.Const("content"), "load")
    # Without a loop in exactly this spelling, vLLM treats the content as plain text and writes <image> into it.
    assert message_content in [loop.iter for loop in parsed.find_all(nodes.For)]
    assert "message" in [loop.target.name for loop in parsed.find_all(nodes.For)]
    # vLLM passes only those `chat_template_kwargs` of a request that the template uses.
    assert {"add_generation_prompt", "ask"} <= meta.find_undeclared_variables(parsed)


def test_document_lists_the_models_on_which_vllm_is_compared():
    section = (ROOT / "docs" / "serving.md").read_text().split("### Tested models")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", section, re.MULTILINE)
    assert rows == [(each.name, each.description) for each in CONFIGURATIONS]


class ImageSide(nn.Module):
    """Pixels -> image tokens: the part that is exported (for example to ONNX) beside the language model."""

    def __init__(self, model: SQLlavaModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values, return_dict=True).pooler_output


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "released"])
@torch.no_grad()
def test_image_side_can_be_exported_for_any_number_of_images(variant):
    side = ImageSide(tiny_model(tiny_config(prototype_variant=variant)).model)
    config = side.model.config
    two, five = (tiny_inputs(config, num_images=number)["pixel_values"] for number in (2, 5))
    exported = torch.export.export(side, (two,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    torch.testing.assert_close(exported(five), side(five))
