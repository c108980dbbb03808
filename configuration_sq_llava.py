"""Configuration of SQ-LLaVA: a vision tower, a prototype extractor or a Q-Former, a projector and a causal LM.

SQ-LLaVA: *Self-Questioning for Large Vision-Language Assistant* (ECCV 2024, https://arxiv.org/abs/2403.11299).
The same class describes related systems:

- LLaVA-1.5: `prototype_variant="none"`.
- LLaVA: `prototype_variant="none"` and `projector_type="linear"`.
- MiniGPT-4: the fields of LLaVA, `resampler="qformer"`, and the vision tower of BLIP-2.

    >>> from transformers import AutoConfig
    >>> config = AutoConfig.from_pretrained("org/sq-llava-7b", trust_remote_code=True)
"""

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Literal, get_args

from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN


PrototypeVariant = Literal["paper", "released", "none"]
ProjectorType = Literal["mlp2x", "linear"]
SelectStrategy = Literal["default", "full"]
Resampler = Literal["qformer"]

# CLIP ViT-L/14-336 and Vicuna-7B v1.5. Vicuna has 32,000 tokens; `<image>`, `[vusr]` and `<pad>` are added, and the
# total is rounded up to a multiple of 64.
CLIP_VIT_L_14_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
VICUNA_7B = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
# Some families (Cohere, Granite, ...) multiply or divide their logits by one of these factors. SQ-LLaVA does not.
LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
# Keywords that every configuration of transformers accepts, besides its fields and the generation settings.
TRANSFORMERS_KEYWORDS = {
    "attn_implementation", "auto_map", "distributed_config", "experts_implementation", "model_type", "name_or_path",
    "num_labels", "output_attentions", "per_layer_config", "quantization_config", "torch_dtype",
}  # fmt: skip
VISION_MODEL_TYPES = ("clip_vision_model", "siglip_vision_model", "blip_2_vision_model")
# SigLIP 2 of variable resolution. Those of fixed resolution are `siglip_vision_model`, like the first SigLIP.
NAFLEX = "siglip2_vision_model"
# Largest values of the sizes in a configuration, far above those of any model. With a wrong number, such as a million
# layers, transformers would work for hours or use all memory before it finds a weight of another shape.
LARGEST_SIZES = {
    "num_hidden_layers": 1_000,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**20,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "vocab_size": 2**26,
    "max_position_embeddings": 2**28,
    "image_size": 2**14,
    "patch_size": 2**14,
    "num_channels": 2**10,
}
# No weight depends on these numbers: each is the work for one image.
MOST_PROTOTYPES, MOST_ITERATIONS, MOST_QUERIES = 2**16, 100, 2**16

# Each checkpoint holds its own code, so no entry names another repository. `AutoModel` loads a model that can generate
# (see `SQLlavaAutoModel`).
AUTO_MAP = {
    "AutoConfig": "configuration_sq_llava.SQLlavaConfig",
    "AutoModel": "modeling_sq_llava.SQLlavaAutoModel",
    "AutoModelForImageTextToText": "modeling_sq_llava.SQLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_sq_llava.SQLlavaForConditionalGeneration",
}


class SQLlavaConfig(PreTrainedConfig):
    r"""
    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the vision tower; its type is one of `VISION_MODEL_TYPES`. Default: CLIP ViT-L/14-336.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of any causal language model of transformers. Default: Vicuna-7B v1.5.
        prototype_variant (`str`, defaults to `"paper"`):
            `"paper"`: the extractor of the paper, with learned prototypes. `"released"`: the extractor of the authors'
            code and checkpoints, with prototypes pooled from the image. `"none"`: no extractor.
        num_prototypes (`int`, defaults to 256):
            K, the number of prototypes (cluster centres).
        num_prototype_iterations (`int`, defaults to 2):
            T, the number of EM iterations.
        resampler (`str`, *optional*):
            `"qformer"`: BLIP-2's Q-Former turns the vision features into `num_query_tokens` tokens, as in MiniGPT-4.
            It is frozen and never in training mode. Default: no resampler.
        qformer_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the Q-Former, of type `blip_2_qformer`. Default: that of BLIP-2.
        num_query_tokens (`int`, defaults to 32):
            Number of queries of the Q-Former.
        projector_type (`str`, defaults to `"mlp2x"`):
            `"mlp2x"`: two linear layers with an activation between them. `"linear"`: one linear layer.
        projector_hidden_act (`str`, *optional*):
            Activation of the MLP. Default: `"quick_gelu"` for the `"released"` variant, else `"gelu"`.
        vision_feature_layer (`int`, *optional*):
            Index into the vision tower's hidden states: 0 is the output of the embeddings, -1 that of the last layer.
            Later layers are not run. Default: -2; for a BLIP-2 tower -1, the only value that it supports.
        vision_feature_select_strategy (`str`, *optional*):
            `"default"` drops the CLS token, `"full"` keeps every token. Default: `"default"` for CLIP; `"full"` for
            SigLIP, which has no CLS token, and for BLIP-2, whose Q-Former reads the CLS token.
        image_token_id (`int`, defaults to 32000):
            Id of the `<image>` placeholder.
        vusr_token_id (`int`, *optional*, defaults to 32001):
            Id of `[vusr]`, the marker of a turn in which the model asks. `None` if the marker is plain text, as in the
            authors' checkpoints.
        image_seq_length (`int`, *optional*):
            Number of tokens per image. It is computed from the other fields; a value that is given is checked.
        tie_word_embeddings (`bool`, *optional*):
            Whether the LM head shares its weight with the input embeddings. Default: the value in `text_config`.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the initial weights of the extractor, the projector and the Q-Former's queries.

    Raises:
        ValueError: if a field is unknown, or if its value is wrong, also in a sub-configuration that is given as a
            `dict`.
        TypeError: if a sub-configuration is neither a `dict` nor a `PreTrainedConfig`.
    """

    model_type = "sq_llava"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig, "qformer_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    prototype_variant: PrototypeVariant = "paper"
    num_prototypes: int = 256
    num_prototype_iterations: int = 2
    resampler: Resampler | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    num_query_tokens: int = 32
    projector_type: ProjectorType = "mlp2x"
    projector_hidden_act: str | None = None
    vision_feature_layer: int | None = None
    vision_feature_select_strategy: SelectStrategy | None = None
    image_token_id: int = 32000
    vusr_token_id: int | None = 32001
    image_seq_length: int | None = None
    tie_word_embeddings: bool | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        _check_names(kwargs, is_saved=self.transformers_version is not None)
        self.vision_config = _sub_config("vision_config", self.vision_config, CLIP_VIT_L_14_336)
        self.text_config = _sub_config("text_config", self.text_config, VICUNA_7B)
        if self.vision_config.model_type == NAFLEX:
            raise ValueError(
                f"{self.vision_config.name_or_path or 'vision_config'} is a {NAFLEX} (SigLIP 2 NaFlex), whose number "
                "of patches changes with the image. SQ-LLaVA has a fixed number of tokens per image. Take a SigLIP 2 "
                "of fixed resolution, such as google/siglip2-base-patch16-384 or google/siglip2-so400m-patch14-384."
            )
        if self.vision_config.model_type not in VISION_MODEL_TYPES:
            raise ValueError(
                f"vision_config.model_type is {self.vision_config.model_type!r}: SQ-LLaVA takes "
                f"{' or '.join(VISION_MODEL_TYPES)}. Pass the vision part of a CLIP, SigLIP or BLIP-2 configuration."
            )
        for name in LOGIT_SCALES:
            scale = getattr(self.text_config, name, None)
            if scale not in (None, 1):
                raise ValueError(
                    f"text_config.{name} is {scale}: {self.text_config.model_type} scales its logits, and SQ-LLaVA "
                    "does not support that. Choose another language model."
                )
        _check_choice("prototype_variant", self.prototype_variant, PrototypeVariant)
        _check_choice("projector_type", self.projector_type, ProjectorType)
        _check_int("num_prototypes", self.num_prototypes, 1, MOST_PROTOTYPES)
        _check_int("num_prototype_iterations", self.num_prototype_iterations, 1, MOST_ITERATIONS)
        _check_int("image_token_id", self.image_token_id, lowest=0)
        if self.vusr_token_id is not None:
            _check_int("vusr_token_id", self.vusr_token_id, lowest=0)
        if self.projector_hidden_act is None:
            self.projector_hidden_act = "quick_gelu" if self.prototype_variant == "released" else "gelu"
        if self.projector_hidden_act not in ACT2FN:
            raise ValueError(
                f"projector_hidden_act is {self.projector_hidden_act!r}: give the name of an activation of "
                "transformers, such as 'gelu' or 'quick_gelu'."
            )
        self._check_vision_size()
        self._check_vision_features()
        self._check_resampler()
        self._check_image_seq_length()
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        if type(self.tie_word_embeddings) is not bool:
            raise ValueError(f"tie_word_embeddings is {self.tie_word_embeddings!r}: give True, False or None.")
        if type(self.initializer_range) is not float or self.initializer_range <= 0:
            raise ValueError(f"initializer_range is {self.initializer_range!r}: give a float above 0.")
        kwargs["auto_map"] = dict(AUTO_MAP)
        super().__post_init__(**kwargs)

    def _check_vision_size(self):
        image_size, patch_size = self.vision_config.image_size, self.vision_config.patch_size
        _check_int("vision_config.image_size", image_size, 1, LARGEST_SIZES["image_size"])
        _check_int("vision_config.patch_size", patch_size, 1, image_size)

    def _check_vision_features(self):
        num_layers, model_type = self.vision_config.num_hidden_layers, self.vision_config.model_type
        if self.vision_feature_layer is None:
            self.vision_feature_layer = -1 if model_type == "blip_2_vision_model" else -2
        layer = self.vision_feature_layer
        if type(layer) is not int or not -num_layers - 1 <= layer <= num_layers:
            raise ValueError(
                f"vision_feature_layer is {layer!r}: the vision tower has {num_layers} layers, so give an int from "
                f"{-num_layers - 1} to {num_layers}."
            )
        if model_type == "blip_2_vision_model" and self.num_vision_layers_used != num_layers:
            raise ValueError(
                f"vision_feature_layer is {layer}, but a BLIP-2 vision tower supports only its last layer: use -1."
            )
        if self.vision_feature_select_strategy is None:
            self.vision_feature_select_strategy = "default" if model_type == "clip_vision_model" else "full"
        _check_choice("vision_feature_select_strategy", self.vision_feature_select_strategy, SelectStrategy)
        if self.vision_feature_select_strategy == "default" and not self._has_cls_token:
            raise ValueError(
                "vision_feature_select_strategy is 'default', which drops the CLS token, but a SigLIP vision tower "
                "has none: use 'full'."
            )

    def _check_resampler(self):
        _check_int("num_query_tokens", self.num_query_tokens, 1, MOST_QUERIES)
        if self.resampler is None:
            if self.qformer_config is not None:
                raise ValueError("qformer_config is given, but resampler is None: set resampler 'qformer'.")
            return
        _check_choice("resampler", self.resampler, Resampler)
        if self.prototype_variant != "none":
            raise ValueError(
                f"prototype_variant is {self.prototype_variant!r} and resampler {self.resampler!r}: the Q-Former is "
                "frozen and needs the vision tower's own features. Set prototype_variant 'none'."
            )
        width = self.vision_config.hidden_size
        default = {"model_type": "blip_2_qformer", "encoder_hidden_size": width}
        self.qformer_config = _sub_config("qformer_config", self.qformer_config, default)
        if self.qformer_config.encoder_hidden_size != width:
            raise ValueError(
                f"qformer_config.encoder_hidden_size is {self.qformer_config.encoder_hidden_size}, but the vision "
                f"tower's features have {width} channels: use the Q-Former that was trained with this tower."
            )

    def _check_image_seq_length(self):
        source, number = ("vision tower", self.num_vision_tokens)
        if self.resampler is not None:
            source, number = ("Q-Former", self.num_query_tokens)
        if self.image_seq_length is None:
            self.image_seq_length = number
        elif type(self.image_seq_length) is not int or self.image_seq_length != number:
            raise ValueError(
                f"image_seq_length is {self.image_seq_length!r}, but the {source} gives {number} tokens per image: "
                "remove it. It is computed from vision_config, vision_feature_select_strategy and num_query_tokens."
            )

    @property
    def _has_cls_token(self) -> bool:
        return self.vision_config.model_type != "siglip_vision_model"

    @property
    def num_vision_tokens(self) -> int:
        """Number of vision features of one image, before the Q-Former if there is one."""
        patches = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
        return patches + int(self._has_cls_token and self.vision_feature_select_strategy == "full")

    @property
    def num_vision_layers_used(self) -> int:
        """Number of layers of the vision tower that are run, counted from the first."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer


def _check_names(names: Iterable[str], is_saved: bool):
    """
    Refuses unknown keywords: transformers would store them as attributes, and a misspelt field would have no effect.
    A saved configuration may hold fields of a later transformers. There, only misspelt names of our fields are errors.
    """
    own = [field.name for field in fields(SQLlavaConfig)]
    known = {*own, *TRANSFORMERS_KEYWORDS, *GenerationConfig().to_dict()}
    for name in names:
        close = difflib.get_close_matches(name, own, n=1, cutoff=0.8)
        if name not in known and not name.startswith("_") and (close or not is_saved):
            meant = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(own)}."
            raise ValueError(f"SQLlavaConfig has no field {name!r}: {meant}")


def _sub_config(name: str, value: dict | PreTrainedConfig | None, default: dict) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        vars(value).pop("auto_map", None)  # names code of the part's first model, which a saved SQ-LLaVA does not have
        _check_sizes(name, {size: getattr(value, size, None) for size in LARGEST_SIZES})
        return value
    if value is None:
        value = default
    if not isinstance(value, dict):
        raise TypeError(f"{name} is {value!r}: give a dict or a configuration object, or remove it.")
    fields = {"model_type": default["model_type"], **value}
    fields.pop("auto_map", None)
    if not isinstance(fields["model_type"], str) or fields["model_type"] not in CONFIG_MAPPING:
        raise ValueError(
            f"{name}.model_type is {fields['model_type']!r}, which this version of transformers does not know."
        )
    config_class = CONFIG_MAPPING[fields["model_type"]]
    # Checked before the configuration is made: some make a list with an entry for each layer.
    _check_sizes(name, {size: fields.get(config_class.attribute_map.get(size, size)) for size in LARGEST_SIZES})
    try:
        return config_class(**fields)
    except Exception as error:  # for wrong values, configurations of transformers raise errors of many kinds
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} ({fields['model_type']}) has a wrong value: {reason}") from error


def _check_sizes(name: str, sizes: dict):
    """Checks the sizes in a sub-configuration. `None`: it has no such field. A list has a size for each layer."""
    for field, value in sizes.items():
        for size in value if isinstance(value, (list, tuple)) else [value]:
            if size is not None:
                _check_int(f"{name}.{field}", size, 1, LARGEST_SIZES[field])


def _check_choice(name: str, value, literal):
    if value not in get_args(literal):
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(map(repr, get_args(literal)))}.")


def _check_int(name: str, value, lowest: int, highest: int | None = None):
    if type(value) is not int or value < lowest:
        raise ValueError(f"{name} is {value!r}: give an int of at least {lowest}.")
    if highest is not None and value > highest:
        raise ValueError(f"{name} is {value}: give an int of at most {highest}.")


SQLlavaConfig.register_for_auto_class()

__all__ = ["SQLlavaConfig"]
