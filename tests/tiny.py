"""Tiny random models, tokenizers, processors and pictures, made offline within a moment."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    set_seed,
)

from configuration_sq_llava import SQLlavaConfig
from modeling_sq_llava import SQLlavaForConditionalGeneration
from processing_sq_llava import SYSTEM_MESSAGE, SQLlavaProcessor


TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 42,
    "patch_size": 14,
    "initializer_range": 0.2,
}
TINY_CLIP = {"model_type": "clip_vision_model", "projection_dim": 32, **TINY_VISION}
TINY_SIGLIP = {"model_type": "siglip_vision_model", **TINY_VISION}
TINY_BLIP2 = {"model_type": "blip_2_vision_model", **TINY_VISION}
TINY_QFORMER = {
    "model_type": "blip_2_qformer",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "encoder_hidden_size": 32,
    "initializer_range": 0.2,
}
TINY_VOCAB_SIZE = 512
# Weights are ten times larger than usual, so that the logits of a tiny model depend on every token and on the image.
TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": TINY_VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
}

CORPUS = [
    SYSTEM_MESSAGE,
    "USER: What animal is this? ASSISTANT: A dog. USER: What is it doing? ASSISTANT: Running in the green grass.",
    "Is there a red circle in the picture? No, there is a blue square and a yellow triangle.",
    "Can you describe the image in detail? What colour is the shape? The shape is a rectangle.",
]


def tiny_config(**overrides) -> SQLlavaConfig:
    """An SQ-LLaVA with 9 image tokens and 5 prototypes. `overrides` are fields of `SQLlavaConfig`."""
    fields = {
        "vision_config": dict(TINY_CLIP),
        "text_config": dict(TINY_LLAMA),
        "num_prototypes": 5,
        "image_token_id": TINY_VOCAB_SIZE - 2,
        "vusr_token_id": TINY_VOCAB_SIZE - 1,
        "initializer_range": 0.2,
    }
    return SQLlavaConfig(**{**fields, **overrides})


def tiny_minigpt4_config(**overrides) -> SQLlavaConfig:
    """A MiniGPT-4 with 4 queries."""
    fields = {
        "vision_config": dict(TINY_BLIP2),
        "resampler": "qformer",
        "qformer_config": dict(TINY_QFORMER),
        "num_query_tokens": 4,
        "prototype_variant": "none",
        "projector_type": "linear",
    }
    return tiny_config(**{**fields, **overrides})


def tiny_model(config: SQLlavaConfig | None = None, seed: int = 0) -> SQLlavaForConditionalGeneration:
    set_seed(seed)
    return SQLlavaForConditionalGeneration(config or tiny_config()).eval()


def tiny_model_for(processor: SQLlavaProcessor, **overrides) -> SQLlavaForConditionalGeneration:
    """A tiny model with the special token ids of this processor."""
    model = tiny_model(
        tiny_config(image_token_id=processor.image_token_id, vusr_token_id=processor.vusr_token_id, **overrides)
    )
    tokenizer = processor.tokenizer
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def save_model(folder: Path, **settings) -> str:
    """Writes a tiny checkpoint. `settings` are those of its processor. Returns the folder as text."""
    processor = tiny_processor(**settings)
    tiny_model_for(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def byte_level_tokenizer(trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like those of GPT-2 and Qwen: no token before the text, no padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", model_max_length=1024)


def llama_tokenizer(legacy: bool = False) -> LlamaTokenizer:
    """
    A tokenizer like Llama's, from SentencePiece: `▁` stands for a space and only before a piece, characters outside
    the vocabulary (also line breaks) become bytes, `<s>` comes before the text, and there is no padding token. With
    `legacy`, it adds a `▁` after each special token, like Mistral's.
    """
    trained = Tokenizer(models.BPE(byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    special_tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=special_tokens, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    vocab = trained.get_vocab()
    token_of_id = {token_id: token for token, token_id in vocab.items()}
    return LlamaTokenizer(
        vocab={token_of_id[token_id]: token_id for token_id in sorted(token_of_id)},
        merges=[tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]],
        add_bos_token=True,
        legacy=legacy,
        model_max_length=1024,
    )


TOKENIZERS = {
    "byte_level": byte_level_tokenizer,
    "byte_level_trimmed": partial(byte_level_tokenizer, trim_offsets=True),
    "llama": llama_tokenizer,
    "llama_legacy": partial(llama_tokenizer, legacy=True),
}


def tiny_image_processor() -> CLIPImageProcessorPil:
    side = TINY_VISION["image_size"]
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def tiny_processor(tokenizer=None, **settings) -> SQLlavaProcessor:
    """A processor for `tiny_config`. The default tokenizer is Llama's."""
    tokenizer = tokenizer or llama_tokenizer()
    return SQLlavaProcessor(tiny_image_processor(), tokenizer, **{"image_seq_length": 9, **settings})


def tiny_inputs(config: SQLlavaConfig, num_images: int = 1, num_words: int = 12, seed: int = 0) -> dict:
    """One prompt with random pixels: four random ids, the placeholders of all images, the other random ids."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, TINY_VOCAB_SIZE - 100, (1, num_words), generator=generator)
    placeholders = torch.full((1, num_images * config.image_seq_length), config.image_token_id)
    inputs = {"input_ids": torch.cat([words[:, :4], placeholders, words[:, 4:]], dim=1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if num_images:
        side = config.vision_config.image_size
        inputs["pixel_values"] = torch.randn(num_images, 3, side, side, generator=generator)
    return inputs


def left_padded(prompts: list[dict]) -> dict:
    """A left-padded batch of prompts with different lengths and numbers of images."""
    length = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch = {
        name: torch.cat([F.pad(prompt[name], (length - prompt[name].shape[1], 0)) for prompt in prompts])
        for name in ("input_ids", "attention_mask")
    }
    pixel_values = [prompt["pixel_values"] for prompt in prompts if "pixel_values" in prompt]
    if pixel_values:
        batch["pixel_values"] = torch.cat(pixel_values)
    return batch


def picture(seed: int = 0, width: int = 60, height: int = 40) -> Image.Image:
    """An image of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def save_towers(root: Path) -> None:
    """Writes a CLIP to `root/clip` and a Llama to `root/llama`, as they are on the Hub."""
    set_seed(0)
    save_clip(root / "clip")
    tokenizer = llama_tokenizer()
    LlamaForCausalLM(LlamaConfig(**{**TINY_LLAMA, "vocab_size": len(tokenizer)})).save_pretrained(root / "llama")
    tokenizer.save_pretrained(root / "llama")


def save_clip(folder: Path) -> None:
    """Writes a CLIP with both towers."""
    text = {"num_hidden_layers": 1, "hidden_size": 32}
    CLIPModel(CLIPConfig(text_config=text, vision_config=TINY_VISION)).save_pretrained(folder)
    tiny_image_processor().save_pretrained(folder)


def save_siglip(folder: Path, **fields) -> None:
    """
    Writes a SigLIP, or a SigLIP 2 of fixed resolution, as it is on the Hub: both towers and a pooling head. `fields`
    are those of its vision tower.
    """
    text = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision = {**TINY_VISION, **fields}
    SiglipModel(SiglipConfig(text_config={**text, "vocab_size": 64}, vision_config=vision)).save_pretrained(folder)
    side = vision["image_size"]
    SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)


def save_tied_llama(folder: Path) -> Path:
    """Writes a Llama whose head is its embeddings."""
    tokenizer = llama_tokenizer()
    config = LlamaConfig(**TINY_LLAMA | {"vocab_size": len(tokenizer), "tie_word_embeddings": True})
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(root: Path, exchanges_of: Callable[[int], list[tuple[str, str]]], num_rows: int = 16) -> Path:
    """
    Writes `root/train.json` in LLaVA's layout, and pictures into the same folder. Every third row has no image.

    Args:
        root: Folder to write to.
        exchanges_of: Function from a row's number to its questions and answers.
        num_rows: Number of rows.
    """
    rows = []
    for index in range(num_rows):
        turns = [turn for asked, said in exchanges_of(index) for turn in (("human", asked), ("gpt", said))]
        row = {"id": f"r{index}", "conversations": [{"from": role, "value": text} for role, text in turns]}
        if index % 3:
            picture(index).save(root / f"{index}.png")
            row["image"] = f"{index}.png"
            row["conversations"][0]["value"] = "<image>\n" + row["conversations"][0]["value"]
        rows.append(row)
    (root / "train.json").write_text(json.dumps(rows))
    return root


def save_blip2(folder: Path) -> Blip2ForConditionalGeneration:
    """Writes a BLIP-2 in transformers' layout, with its own language model and its image processor."""
    set_seed(1)
    opt = {"model_type": "opt", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 16}
    opt |= {"num_attention_heads": 2, "word_embed_proj_dim": 16, "max_position_embeddings": 32}
    config = Blip2Config(
        vision_config=TINY_BLIP2,
        qformer_config=TINY_QFORMER,
        text_config=opt,
        num_query_tokens=4,
        image_token_index=39,
    )
    model = Blip2ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.query_tokens)  # they start at zero, and equal queries would act as one
    model.save_pretrained(folder)
    side = TINY_VISION["image_size"]
    BlipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    return model


def logits_of(model, inputs, **kwargs) -> torch.Tensor:
    """The logits of a forward pass, `(batch_size, sequence_length, vocab_size)`."""
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def is_tied(model) -> bool:
    """Whether the head and the input embeddings are one weight."""
    return model.lm_head.weight is model.get_input_embeddings().weight
