"""Writes tiny random checkpoints with the files and the names of weights of the public releases.

    base = write_language_model(tmp_path / "base")
    tower = write_clip(tmp_path / "clip")
    source = write_sq_llava_lora(tmp_path / "sqllava-lora", base=base, vision=tower)

Sizes are those of `tests/tiny.py`: 9 image tokens, 5 prototypes. Weights are float32 with a standard deviation of 0.2,
so that logits depend on all of them. Values depend only on `seed` and the order of the tensors: the same arguments
give equal folders. `.bin` files are pickles, as in the releases.
"""

import io
import json
from functools import partial
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaTokenizer

from tests.released_weights import (
    TEXT,
    TEXT_LINEARS,
    VISION,
    VISION_LINEARS,
    clip_text_weights,
    llava_hf_weights,
    lora_weights,
    prefixed,
    projector_weights,
    text_weights,
    vision_weights,
)
from tests.tiny import CORPUS


CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
NUM_LATENTS = 5
# Names in the releases' configurations. Pass folders instead to make sources whose parts are all on this machine.
RELEASED_BASE = "Lin-Chen/ShareGPT4V-7B_Pretrained_vit-large336-l12_vicuna-7b-v1.5"
RELEASED_TOWER = "openai/clip-vit-large-patch14-336"


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def edit_json(path: Path, **fields) -> None:
    """Sets fields in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(path: Path, change) -> None:
    """Calls `change` with the tensors of a `.bin` or `.safetensors` file, and writes them back."""
    weights = torch.load(path) if path.suffix == ".bin" else load_file(path)
    change(weights)
    if path.suffix == ".bin":
        torch.save(weights, path)
    else:
        save_file(weights, path, metadata={"format": "pt"})


def _write_weights(
    folder: Path, weights: dict, shards: int, safetensors: bool, dtype: torch.dtype = torch.float32
) -> None:
    stem, suffix = ("model", "safetensors") if safetensors else ("pytorch_model", "bin")
    weights = {name: w.to(dtype).contiguous() if w.is_floating_point() else w for name, w in weights.items()}
    names = list(weights)
    files, size = {}, -(-len(names) // shards)
    for index in range(shards):
        part = {name: weights[name] for name in names[index * size : (index + 1) * size]}
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{index + 1:05d}-of-{shards:05d}.{suffix}"
        files |= dict.fromkeys(part, file)
        if safetensors:
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    if shards > 1:
        total = sum(tensor.nbytes for tensor in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": files}
        _write_json(folder / f"{stem}.{suffix}.index.json", index)


def sentencepiece_model() -> bytes:
    """A BPE model with Llama's settings: `<unk> <s> </s>` first, bytes for unknown characters, 450 pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=TEXT["vocab_size"],
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(folder: Path, kind: str = "slow") -> None:
    """
    Args:
        kind: `"slow"`: `tokenizer.model` and two JSON files, as Vicuna has; `"fast"`: also `tokenizer.json`;
            `"fast_only"`: no `tokenizer.model`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    token = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_json(
        folder / "tokenizer_config.json",
        {
            **{name: {**token, "content": content} for name, content in special_tokens.items()},
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": 1024,
            "pad_token": None,
            "padding_side": "right",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
        },
    )
    _write_json(folder / "special_tokens_map.json", special_tokens | {"pad_token": "<unk>"})
    if kind != "slow":
        # With a config.json of model_type llava, AutoTokenizer would give other ids than SentencePiece.
        LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
        if kind == "fast_only":
            (folder / "tokenizer.model").unlink()


def _llama_config(**changes) -> dict:
    return {
        **TEXT,
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.02,
        "model_type": "llama",
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "use_cache": True,
        **changes,
    }


def _llava_config(projector: str, vision: str | Path, **changes) -> dict:
    """A configuration as written by the code of LLaVA and SQ-LLaVA: Llama's, with fields `mm_*`."""
    config = _llama_config(
        architectures=["LlavaLlamaForCausalLM"],
        model_type="llava",
        freeze_mm_mlp_adapter=False,
        image_aspect_ratio="pad",
        image_grid_pinpoints=None,
        mm_hidden_size=VISION["hidden_size"],
        mm_projector_lr=2e-05,
        mm_projector_type=projector,
        mm_use_im_patch_token=False,
        mm_use_im_start_end=False,
        mm_vision_select_feature="patch",
        mm_vision_select_layer=-2,
        mm_vision_tower=str(vision),
        tune_mm_mlp_adapter=False,
        use_mm_proj=True,
    )
    if projector == "cluster":
        config["num_latents"] = NUM_LATENTS
    return {**config, **changes}


def _write_generation_config(folder: Path) -> None:
    # As in Vicuna: a temperature without sampling.
    settings = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_length": 4096}
    settings |= {"temperature": 0.9, "top_p": 0.6, "transformers_version": "4.31.0", "_from_model_config": True}
    _write_json(folder / "generation_config.json", settings)


def write_language_model(
    folder: Path,
    llava: bool = False,
    vision: str | Path = RELEASED_TOWER,
    shards: int = 2,
    safetensors: bool = False,
    inv_freq: bool = True,
    tokenizer: str = "slow",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes,
) -> Path:
    """
    Vicuna, or with `llava` the ShareGPT4V base of the release: it has LLaVA's configuration and its own projector.
    """
    folder.mkdir(parents=True)
    weights = text_weights(seed, inv_freq, **changes)
    if llava:
        weights |= prefixed("model.mm_projector.", projector_weights("mlp2x_gelu", seed + 50))
        _write_json(folder / "config.json", _llava_config("mlp2x_gelu", vision, **changes))
    else:
        _write_json(folder / "config.json", _llama_config(**changes))
    _write_weights(folder, weights, shards, safetensors, dtype)
    _write_generation_config(folder)
    write_tokenizer(folder, tokenizer)
    return folder


def write_clip(
    folder: Path,
    whole: bool = True,
    safetensors: bool = False,
    position_ids: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> Path:
    """`openai/clip-vit-large-patch14-336`: a complete CLIP, or only its vision part, as ShareGPT4V's tower."""
    folder.mkdir(parents=True)
    weights = prefixed("vision_model.", vision_weights(seed, position_ids))
    vision_config = {**VISION, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 24}
    vision_config["model_type"] = "clip_vision_model"
    if whole:
        text_config = {"model_type": "clip_text_model", "hidden_size": 16, "intermediate_size": 24}
        text_config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99, "projection_dim": 24}
        text_config |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
        weights |= clip_text_weights(seed + 100)
        config = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 24}
        config |= {"text_config": text_config, "vision_config": vision_config, "logit_scale_init_value": 2.6592}
    else:
        config = {**vision_config, "architectures": ["CLIPVisionModel"]}
    _write_json(folder / "config.json", config)
    _write_weights(folder, weights, 1, safetensors, dtype)
    _write_preprocessor(folder)
    return folder


def _write_preprocessor(folder: Path, **fields) -> None:
    side = VISION["image_size"]
    settings = {"crop_size": side, "size": side, "do_center_crop": True, "do_normalize": True, "do_resize": True}
    settings |= {"feature_extractor_type": "CLIPFeatureExtractor", "resample": 3}
    settings |= {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    _write_json(folder / "preprocessor_config.json", {**settings, **fields})


def _lora_config(rank: int, alpha: int, base: str | Path, linears: dict, dropout: float, task: str | None) -> dict:
    return {
        "auto_mapping": None,
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "revision": None,
        "target_modules": sorted(name.rpartition(".")[2] for name in linears),
        "task_type": task,
    }


def write_sq_llava_lora(
    folder: Path,
    base: str | Path = RELEASED_BASE,
    vision: str | Path = RELEASED_TOWER,
    vision_lora: str | None = "both",
    rank: int = 8,
    alpha: int = 16,
    vision_rank: int = 4,
    vision_alpha: int = 12,
    zero_vision_b: bool = False,
    differing: bool = False,
    use_rslora: bool = False,
    seed: int = 10,
    **changes,
) -> Path:
    """
    The authors' LoRA release.

    Args:
        base, vision: Names in the configurations.
        vision_lora: Where the ViT-LoRA is: in `adapter_model.bin` ("inside"), in `Vit-lora` ("folder"), in "both",
            or nowhere (`None`).
        zero_vision_b: Whether its B matrices are zero, as in a run of the authors' code.
        differing: Whether the two places hold different values.
        changes: Fields of `config.json`.
    """
    write_llava_lora(folder, base, vision, "cluster", rank, alpha, seed, **changes)
    if use_rslora:
        edit_json(folder / "adapter_config.json", use_rslora=True)
    tower = ("encoder", VISION_LINEARS, VISION, vision_rank)
    if vision_lora in ("inside", "both"):
        prefix = "base_model.model.model.vision_tower.vision_tower.vision_model."
        inside = prefixed(prefix, lora_weights(*tower, seed + 1, zero_vision_b))
        edit_weights(folder / "adapter_model.bin", lambda weights: weights.update(inside))
    if vision_lora in ("folder", "both"):
        vit_lora = folder / "Vit-lora"
        vit_lora.mkdir()
        # The authors add this adapter to their wrapper of the tower.
        weights = lora_weights(*tower, seed + 2 if differing else seed + 1, zero_vision_b)
        torch.save(prefixed("base_model.model.vision_tower.vision_model.", weights), vit_lora / "adapter_model.bin")
        _write_json(
            vit_lora / "adapter_config.json",
            _lora_config(vision_rank, vision_alpha, vision, VISION_LINEARS, 0.2, None),
        )
    return folder


def write_llava(
    folder: Path,
    vision: str | Path = RELEASED_TOWER,
    projector: str = "mlp2x_gelu",
    tower_inside: bool = True,
    shards: int = 2,
    safetensors: bool = False,
    tokenizer: str = "slow",
    seed: int = 30,
    **changes,
) -> Path:
    """`liuhaotian/llava-v1.5-7b`: all weights with the names of the original code. The tower can be left out."""
    folder.mkdir(parents=True)
    weights = text_weights(seed, **changes)
    weights |= prefixed("model.mm_projector.", projector_weights(projector, seed + 2))
    if tower_inside:
        weights |= prefixed("model.vision_tower.vision_tower.vision_model.", vision_weights(seed + 1))
    _write_weights(folder, weights, shards, safetensors)
    _write_json(folder / "config.json", _llava_config(projector, vision, **changes))
    _write_generation_config(folder)
    write_tokenizer(folder, tokenizer)
    return folder


# An SQ-LLaVA that the authors' code merged and saved.
write_sq_llava_merged = partial(write_llava, projector="cluster", seed=20)


def write_llava_lora(
    folder: Path,
    base: str | Path = "lmsys/vicuna-7b-v1.5",
    vision: str | Path = RELEASED_TOWER,
    projector: str = "mlp2x_gelu",
    rank: int = 8,
    alpha: int = 16,
    seed: int = 40,
    **changes,
) -> Path:
    """`liuhaotian/llava-v1.5-7b-lora`: LoRA of the language model, and the projector."""
    folder.mkdir(parents=True)
    lora = lora_weights("base_model.model.model", TEXT_LINEARS, TEXT, rank, seed)
    torch.save(lora, folder / "adapter_model.bin")
    _write_json(folder / "adapter_config.json", _lora_config(rank, alpha, base, TEXT_LINEARS, 0.05, "CAUSAL_LM"))
    weights = prefixed("base_model.model.model.mm_projector.", projector_weights(projector, seed + 2))
    torch.save(weights, folder / "non_lora_trainables.bin")
    _write_json(folder / "config.json", _llava_config(projector, vision, _name_or_path=str(base), **changes))
    return folder


def write_projector(
    folder: Path,
    projector: str = "cluster",
    vision: str | Path = RELEASED_TOWER,
    base: str | Path = "lmsys/vicuna-7b-v1.5",
    config: bool = True,
    seed: int = 50,
) -> Path:
    """The output of stage 1 of the original code: `mm_projector.bin`, and a `config.json` that can be left out."""
    folder.mkdir(parents=True)
    weights = prefixed("model.mm_projector.", projector_weights(projector, seed))
    torch.save(weights, folder / "mm_projector.bin")
    if config:
        fields = {"tune_mm_mlp_adapter": True, "_name_or_path": str(base), "image_aspect_ratio": "square"}
        _write_json(folder / "config.json", _llava_config(projector, vision, **fields))
    return folder


def write_llava_hf(
    folder: Path,
    layout: str = "older",
    shards: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 60,
) -> Path:
    """
    `llava-hf/llava-1.5-7b-hf`: the ids of `<image>` and `<pad>` follow the vocabulary, and matrices have 512 rows.

    Args:
        layout: Names of weights: "older" as on the Hub (`language_model.model.*`, `vision_tower.vision_model.*`),
            "newer" as saved by transformers 4.52 (`model.language_model.*`), "transformers5" as saved by 5.x
            (`vision_tower.*`).
    """
    folder.mkdir(parents=True)
    _write_weights(folder, llava_hf_weights(layout, seed), shards, True, dtype)
    write_tokenizer(folder, "fast")
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>", "<pad>"], special_tokens=True)
    tokenizer.pad_token = "<pad>"
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    _write_json(folder / "special_tokens_map.json", special_tokens)
    image_id, pad_id = tokenizer.convert_tokens_to_ids(["<image>", "<pad>"])
    text_config = {**TEXT, "vocab_size": 512, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    vision_config = {**VISION, "model_type": "clip_vision_model", "projection_dim": 24, "vocab_size": 450}
    _write_json(
        folder / "config.json",
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "ignore_index": -100,
            "image_seq_length": 9,
            "image_token_index": image_id,
            "model_type": "llava",
            "pad_token_id": pad_id,
            "projector_hidden_act": "gelu",
            "text_config": text_config,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "vision_config": vision_config,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
    )
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": pad_id}
    _write_json(folder / "generation_config.json", generation)
    side = VISION["image_size"]
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    settings = {"do_convert_rgb": True, "do_rescale": True, "rescale_factor": 1 / 255}
    settings |= {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    _write_preprocessor(folder, **sizes, **settings)
    processor = {"image_token": "<image>", "patch_size": 14, "processor_class": "LlavaProcessor"}
    processor |= {"num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    _write_json(folder / "processor_config.json", processor)
    return folder


# Functions that write a checkpoint of each released kind.
WRITERS = {
    "sq_llava_lora": write_sq_llava_lora,
    "sq_llava": write_sq_llava_merged,
    "projector": write_projector,
    "llava": write_llava,
    "llava_lora": write_llava_lora,
    "llava_hf": write_llava_hf,
}
