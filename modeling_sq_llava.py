"""SQ-LLaVA: vision tower -> prototype extractor or Q-Former -> projector -> causal language model.

*SQ-LLaVA: Self-Questioning for Large Vision-Language Assistant*, ECCV 2024, https://arxiv.org/abs/2403.11299.

    >>> from transformers import AutoModel
    >>> model = AutoModel.from_pretrained("org/sq-llava-7b", trust_remote_code=True)

Shape suffixes: B images, N vision tokens, D vision width, K prototypes, H language model width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    Blip2VisionModel,
    Cache,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    SuppressTokensLogitsProcessor,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import can_return_tuple, torch_compilable_check


# In a Hub repository this file is part of a package, in a source checkout it is a top-level module.
try:
    from .configuration_sq_llava import SQLlavaConfig
except ImportError:
    from configuration_sq_llava import SQLlavaConfig


# The name of the key-value cache in outputs and keywords: `past_key_values` up to transformers 5.23, then `cache`.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


@dataclass
class SQLlavaModelOutputWithPast(MoeModelOutputWithPast):
    """
    The language model's output: `last_hidden_state`, the cache, `hidden_states`, `attentions` and, for a mixture of
    experts, `router_logits`.

    image_outputs (`BaseModelOutputWithPooling`, *optional*): The output of [`SQLlavaModel.get_image_features`].
    """

    image_outputs: BaseModelOutputWithPooling | None = None

    @property
    def image_hidden_states(self) -> torch.Tensor | None:
        """The image tokens `(num_images, image_seq_length, hidden_size)`, after the projector."""
        return None if self.image_outputs is None else self.image_outputs.pooler_output


@dataclass
class SQLlavaCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """
    loss (`torch.Tensor` of shape `()`, *optional*, returned when `labels` is given):
        Mean next-token cross entropy over the labelled tokens. If a mixture of experts returns its router logits,
        `router_aux_loss_coef * aux_loss` is added.
    logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`):
        Scores of the next token before the softmax.
    aux_loss (`torch.Tensor` of shape `()`, *optional*): The load-balancing loss of a mixture of experts.
    The other fields are those of [`SQLlavaModelOutputWithPast`].
    """

    image_outputs: BaseModelOutputWithPooling | None = None

    image_hidden_states = SQLlavaModelOutputWithPast.image_hidden_states


class UpcastLinear(nn.Module):
    """
    A linear layer that computes in the precision of its input, so that bfloat16 weights can cluster in float32. Not an
    `nn.Linear`: vLLM and quantizers would replace it with a layer that loses the upcast.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        linear = nn.Linear(in_features, out_features)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, self.weight.to(inputs.dtype), self.bias.to(inputs.dtype))


def _at_least_float32(features: torch.Tensor) -> torch.Tensor:
    # In half precision, nearly all prototypes of a new extractor have the same score, so rounding would decide.
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _cosine(prototypes_BKD: torch.Tensor, tokens_BND: torch.Tensor) -> torch.Tensor:
    # The token norms divide the [B, K, N] result, because it is smaller than the [B, N, D] of normalised tokens.
    norm_BN = torch.linalg.vector_norm(tokens_BND, dim=-1).clamp_min(1e-12)
    return F.normalize(prototypes_BKD, dim=-1) @ tokens_BND.mT / norm_BN.unsqueeze(1)


class SQLlavaPaperPrototypeExtractor(nn.Module):
    r"""The prototype extractor of the paper (section 3.2): K learned prototypes, refined by T EM iterations.

        E-step   M(t)   = softmax(q(C(t)) k(Z)^T / sqrt(D))        [B, K, N]
        M-step   C(t+1) = (M(t) v(Z)) / (mass of M(t))             [B, K, D]
        spread   Z     <- Z + z((1/K) cos(C, Z)^T C)               [B, N, D]

    The paper gives neither the axis of the softmax nor a temperature. We read it as EM: the softmax runs over the K
    prototypes, so each token spreads a mass of 1 over them. Each new prototype is divided by the mass that it got, so
    it is a weighted mean of values. The scores are scaled by 1/sqrt(D), as in attention.
    """

    def __init__(self, config: SQLlavaConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        self.num_iterations = config.num_prototype_iterations
        self.prototypes = nn.Parameter(torch.empty(config.num_prototypes, width))
        self.q = UpcastLinear(width, width)
        self.k = UpcastLinear(width, width)
        self.v = UpcastLinear(width, width)
        self.z = UpcastLinear(width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` of shape `(B, N, D)`): Vision features, any floating dtype.

        Returns:
            `torch.Tensor` of shape `(B, N, D)` and the dtype of `features`. Computed in float32 or better.
        """
        with torch.autocast(features.device.type, enabled=False):
            tokens_BND = _at_least_float32(features)
            prototypes_BKD, _ = self._cluster(tokens_BND)
            context_BND = _cosine(prototypes_BKD, tokens_BND).mT @ (prototypes_BKD / prototypes_BKD.shape[1])
            return (tokens_BND + self.z(context_BND)).to(features.dtype)

    def assignment(self, features: torch.Tensor) -> torch.Tensor:
        """
        Computes what each prototype sees: the soft assignment of the last E-step. The final prototypes are the means
        of the values with these weights. (The cosine in the spread step is not a share: it can be negative.)

        Args:
            features (`torch.Tensor` of shape `(B, N, D)`): Vision features, any floating dtype.

        Returns:
            `torch.Tensor` of shape `(B, K, N)`, float32 or better: the share of token n that belongs to prototype k.
            The shares of a token add up to 1.
        """
        with torch.autocast(features.device.type, enabled=False):
            return self._cluster(_at_least_float32(features))[1].exp()

    def _cluster(self, tokens_BND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys_BND, values_BND = self.k(tokens_BND), self.v(tokens_BND)
        prototypes = self.prototypes.to(tokens_BND.dtype)  # [K, D]; after the first iteration [B, K, D]
        for _ in range(self.num_iterations):
            queries = self.q(prototypes) * tokens_BND.shape[-1] ** -0.5
            log_assignment_BKN = (queries @ keys_BND.mT).log_softmax(dim=1)
            # The softmax over the tokens divides by the mass. The mass of a prototype far from all tokens is too small
            # for a float: a division by it would give gradients that are not finite.
            prototypes = log_assignment_BKN.softmax(dim=-1) @ values_BND
        return prototypes, log_assignment_BKN


class SQLlavaReleasedPrototypeExtractor(nn.Module):
    r"""The prototype extractor of the authors' code, with the quirks that the released checkpoints need.

        value = v(x),  feature = f(x),  C = pool_K(x),  Cf = pool_K(feature)           pool: adaptive average over N
        T times:  C <- c(C);  S = softmax_K((C / |C|_D) (value / |value|_N)^T);  C <- S feature
        w       = sigmoid(beta + alpha cos(C, x)), kept only for the best prototype of each token
        y       = x + w A[best],   A = (sum of w feature over the members + Cf) / (members + 1)

    The members of a prototype are the tokens whose best prototype it is. The quirks: the values are normalised over
    the tokens, not over the channels; the M-step does not divide by the mass; `c` is applied again in each iteration.
    The authors' code builds `[B, K, N, D]` tensors for the last two lines. Each token has only one best prototype, so
    this class adds and reads rows instead.
    """

    def __init__(self, config: SQLlavaConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        self.num_prototypes = config.num_prototypes
        self.num_iterations = config.num_prototype_iterations
        self.c = UpcastLinear(width, width)
        self.v = UpcastLinear(width, width)
        self.f = UpcastLinear(width, width)
        self.sim_alpha = nn.Parameter(torch.ones(1, 1, 1))
        self.sim_beta = nn.Parameter(torch.zeros(1, 1, 1))
        # Released checkpoints hold a layer norm that the authors' forward pass never applies.
        self.register_load_state_dict_pre_hook(_drop_unused_layer_norm)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` of shape `(B, N, D)`): Vision features, any floating dtype.

        Returns:
            `torch.Tensor` of shape `(B, N, D)` and the dtype of `features`. Computed in float32 or better.
        """
        with torch.autocast(features.device.type, enabled=False):
            tokens_BND = _at_least_float32(features)
            feature_BND = self.f(tokens_BND)
            weight_BN1, best_BN = self._assign(tokens_BND, self._cluster(tokens_BND, feature_BND))

            # The prototypes of all images form one list of B * K rows. Each token adds to its row, then reads it.
            first_row_B1 = self.num_prototypes * torch.arange(best_BN.shape[0], device=best_BN.device).unsqueeze(1)
            row = (first_row_B1 + best_BN).flatten()  # [B * N]
            aggregate = self._pool(feature_BND).flatten(0, 1)  # [B * K, D]
            aggregate = aggregate.index_add(0, row, (weight_BN1 * feature_BND).flatten(0, 1))
            members = torch.zeros_like(aggregate[:, 0]).index_add(0, row, torch.ones_like(weight_BN1).flatten())
            aggregate = aggregate / (members + 1).unsqueeze(1)
            return (tokens_BND + weight_BN1 * aggregate.index_select(0, row).view_as(tokens_BND)).to(features.dtype)

    def assignment(self, features: torch.Tensor) -> torch.Tensor:
        """
        Computes what each prototype sees: its members, with their weights.

        Args:
            features (`torch.Tensor` of shape `(B, N, D)`): Vision features, any floating dtype.

        Returns:
            `torch.Tensor` of shape `(B, K, N)`, float32 or better: `w` for the best prototype of each token, else 0.
        """
        with torch.autocast(features.device.type, enabled=False):
            tokens_BND = _at_least_float32(features)
            weight_BN1, best_BN = self._assign(tokens_BND, self._cluster(tokens_BND, self.f(tokens_BND)))
            assignment_BNK = weight_BN1.new_zeros(*best_BN.shape, self.num_prototypes)
            return assignment_BNK.scatter(2, best_BN.unsqueeze(-1), weight_BN1).mT

    def _cluster(self, tokens_BND: torch.Tensor, feature_BND: torch.Tensor) -> torch.Tensor:
        value_BND = self.v(tokens_BND)
        # The norm of the values divides the prototypes, not the values, because there are fewer prototypes.
        norm_B1D = value_BND.square().sum(dim=1, keepdim=True).clamp_min(1e-24).sqrt()
        prototypes_BKD = self._pool(tokens_BND)
        for _ in range(self.num_iterations):
            prototypes_BKD = self.c(prototypes_BKD)
            assignment_BKN = (F.normalize(prototypes_BKD, dim=-1) / norm_B1D @ value_BND.mT).softmax(dim=1)
            prototypes_BKD = assignment_BKN @ feature_BND
        return prototypes_BKD

    def _assign(self, tokens_BND: torch.Tensor, prototypes_BKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cosine_BKN = _cosine(prototypes_BKD, tokens_BND)
        alpha, beta = self.sim_alpha.to(cosine_BKN.dtype), self.sim_beta.to(cosine_BKN.dtype)
        weight_BN, best_BN = torch.sigmoid(beta + alpha * cosine_BKN).max(dim=1)
        return weight_BN.unsqueeze(-1), best_BN

    def _pool(self, tokens_BND: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool1d(tokens_BND.mT, self.num_prototypes).mT


def _drop_unused_layer_norm(module, state_dict, prefix, *args):
    state_dict.pop(f"{prefix}ln_1.weight", None)
    state_dict.pop(f"{prefix}ln_1.bias", None)


PROTOTYPE_EXTRACTORS = {
    "paper": SQLlavaPaperPrototypeExtractor,
    "released": SQLlavaReleasedPrototypeExtractor,
}


class SQLlavaQFormer(nn.Module):
    """
    BLIP-2's Q-Former (https://arxiv.org/abs/2301.12597): learned queries read the vision features by cross-attention.
    The names `query_tokens` and `qformer` are those of BLIP-2's checkpoints.
    """

    def __init__(self, config: SQLlavaConfig):
        super().__init__()
        width = config.qformer_config.hidden_size
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, width))
        # Always SDPA: the towers may use FlashAttention, which the Q-Former does not support.
        self.qformer = AutoModel.from_config(
            config.qformer_config, attn_implementation="sdpa", trust_remote_code=False
        )

    def train(self, mode: bool = True):
        # The Q-Former is frozen, as in MiniGPT-4. Dropout would only add noise to the projector's input.
        return super().train(False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` of shape `(B, N, D)`): Vision features, any floating dtype.

        Returns:
            `torch.Tensor` of shape `(B, num_query_tokens, width of the Q-Former)`.
        """
        queries = self.query_tokens.expand(features.shape[0], -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=features, return_dict=True).last_hidden_state


class SQLlavaMultiModalProjector(nn.Module):
    """Maps features `(B, N, D)` to image tokens `(B, N, H)` by two linear layers (`"mlp2x"`) or one (`"linear"`)."""

    def __init__(self, config: SQLlavaConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear((config.qformer_config or config.vision_config).hidden_size, width)
        if config.projector_type == "mlp2x":
            self.act = ACT2FN[config.projector_hidden_act]
            self.linear_2 = nn.Linear(width, width)
        else:
            self.act = self.linear_2 = nn.Identity()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        # In training, this module may be in float32 inside a bfloat16 model.
        features = features.to(self.linear_1.weight.dtype)
        return self.linear_2(self.act(self.linear_1(features)))


class SQLlavaPreTrainedModel(PreTrainedModel):
    config: SQLlavaConfig
    config_class = SQLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = [CACHE_NAME]
    _no_split_modules = [
        "SQLlavaPaperPrototypeExtractor",
        "SQLlavaReleasedPrototypeExtractor",
        "SQLlavaQFormer",
        "SQLlavaMultiModalProjector",
    ]
    # transformers tells quantizers to skip these modules; a quantization error here would be in every image token. A
    # model loaded in float16 has them in float32. Each has two names: in a model with a head and in one without.
    _keep_in_fp32_modules = ["model.multi_modal_projector", "multi_modal_projector", "model.resampler", "resampler"]
    _keys_to_ignore_on_load_unexpected = [r"prototype_extractor\.ln_1\."]

    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, UpcastLinear):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, SQLlavaPaperPrototypeExtractor):
            init.normal_(module.prototypes, mean=0.0, std=1.0)
        elif isinstance(module, SQLlavaQFormer):
            init.normal_(module.query_tokens, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, SQLlavaReleasedPrototypeExtractor):
            init.ones_(module.sim_alpha)
            init.zeros_(module.sim_beta)


def _the_one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names for the same thing: give only one of them.")
    return past_key_values if cache is None else cache


class SQLlavaModel(SQLlavaPreTrainedModel):
    """The model without the language modelling head."""

    def __init__(self, config: SQLlavaConfig):
        super().__init__(config)
        if config.vision_config.model_type == "blip_2_vision_model":  # AutoModel does not know this one
            self.vision_tower = Blip2VisionModel._from_config(config.vision_config)
        else:
            self.vision_tower = AutoModel.from_config(config.vision_config, trust_remote_code=False)
        if config.prototype_variant == "none":
            self.prototype_extractor = nn.Identity()
        else:
            self.prototype_extractor = PROTOTYPE_EXTRACTORS[config.prototype_variant](config)
        self.resampler = nn.Identity() if config.resampler is None else SQLlavaQFormer(config)
        self.multi_modal_projector = SQLlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
        self.post_init()

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Runs the vision tower up to `config.vision_feature_layer`. Later layers and a pooling head are not run.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, channels, height, width)`): Processed images.

        Returns:
            `torch.Tensor` of shape `(B, N, D)`.
        """
        return self._run_vision_tower(pixel_values)[0]

    def _run_vision_tower(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """Returns the vision features and, on demand, the outputs of the embeddings and of each layer that is run."""
        tower = self.vision_tower
        patch_weight = tower.embeddings.patch_embedding.weight
        # Offloaded weights are on the meta device; their hooks move the inputs.
        device = pixel_values.device if patch_weight.device.type == "meta" else patch_weight.device
        pixel_values = pixel_values.to(device=device, dtype=patch_weight.dtype)
        if self.config.vision_config.model_type == "blip_2_vision_model":
            # All layers, the final norm, and the CLS token.
            outputs = tower(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
            return outputs.last_hidden_state, outputs.hidden_states
        hidden_states = tower.embeddings(pixel_values)
        if self.config.vision_config.model_type == "clip_vision_model":
            hidden_states = tower.pre_layrnorm(hidden_states)
        all_hidden_states = (hidden_states,) if output_hidden_states else None
        for layer in tower.encoder.layers[: self.config.num_vision_layers_used]:
            hidden_states = layer(hidden_states, None)
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
        if self.config.vision_feature_select_strategy == "default":
            hidden_states = hidden_states[:, 1:]
        return hidden_states, all_hidden_states

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPooling | None:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`): Processed images.
            output_hidden_states (`bool`, *optional*):
                Also return the outputs of the vision tower's embeddings and of each layer that is run.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` `(num_images, N, D)`, the vision features;
            `pooler_output` `(num_images, image_seq_length, H)`, the image tokens that replace the placeholders;
            `hidden_states`, on demand, `(num_images, N or N + 1, D)` each. `None` if `pixel_values` is `None`, as in
            `generate(pixel_values=None)`.

        Raises:
            ValueError: for `output_attentions`, because the vision tower returns no attention weights here.
        """
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions is True: the vision tower returns no attention weights. Remove it.")
        if pixel_values is None:
            return None
        hidden_states = None
        if output_hidden_states:
            vision_features, hidden_states = self._run_vision_tower(pixel_values, output_hidden_states=True)
        else:
            vision_features = self.get_vision_features(pixel_values)
        image_tokens = self.multi_modal_projector(self.resampler(self.prototype_extractor(vision_features)))
        return BaseModelOutputWithPooling(
            last_hidden_state=vision_features, pooler_output=image_tokens, hidden_states=hidden_states
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_indices: torch.LongTensor | None = None,
        positions_to_keep: torch.BoolTensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple | SQLlavaModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Token ids, with `config.image_seq_length` placeholders `config.image_token_id` for each image.
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*):
                All images of the batch, in the order of their placeholders.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": output of get_image_features}` in place of `pixel_values`, for images already encoded.
            image_indices (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                For each image of the text, its index in `pixel_values`. An image that is shown several times is then
                encoded once. Only for a forward pass; `generate` does not support it.
            positions_to_keep (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Mask of the positions to return, for example those with a label. `last_hidden_state` then has the shape
                `(num_kept, hidden_size)`, row by row, and the head runs on these positions only.
            cache, past_key_values ([`Cache`], *optional*):
                Two names for the key-value cache; the second is that of transformers up to 5.23.
            The other arguments are those of the language model.

        Returns:
            [`SQLlavaModelOutputWithPast`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: if the numbers of placeholders and image features differ; if not exactly one of `input_ids` and
                `inputs_embeds` is given; if both `pixel_values` and `mm_encoder_outputs`, or both names of the cache,
                are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        cache = _the_one_cache(cache, past_key_values)
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if image_outputs is not None:
                raise ValueError("Give pixel_values or mm_encoder_outputs, not both.")
            image_outputs = self.get_image_features(pixel_values, return_dict=True)
        nothing = None
        if image_outputs is None and self.training and torch.is_grad_enabled() and cache is None:
            # Before the embeddings are looked up, as the images are: sharded processes gather weights in one order.
            nothing = self._vision_side_weighted_by_zero()

        placeholders = self._find_placeholders(input_ids, inputs_embeds, needed=image_outputs is not None)
        if inputs_embeds is None:
            # The placeholder's id may lie outside the language model's vocabulary.
            text_ids = input_ids if placeholders is None else input_ids.masked_fill(placeholders, 0)
            inputs_embeds = self.get_input_embeddings()(text_ids)

        if image_outputs is not None:
            image_tokens = image_outputs.pooler_output
            inputs_embeds = self._insert_images(inputs_embeds, placeholders, image_tokens, image_indices)
        elif nothing is not None:
            inputs_embeds = inputs_embeds + nothing.to(inputs_embeds)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        states = dict(outputs)
        hidden_states = states.pop("last_hidden_state")
        return SQLlavaModelOutputWithPast(
            last_hidden_state=hidden_states if positions_to_keep is None else hidden_states[positions_to_keep],
            image_outputs=image_outputs,
            **states,
        )

    def _find_placeholders(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, needed: bool
    ) -> torch.BoolTensor | None:
        """The mask of the image placeholders `(batch_size, sequence_length)`, or `None` if it is not needed."""
        image_token_id = self.config.image_token_id
        if input_ids is None:
            if not needed:
                return None
            if image_token_id >= self.config.text_config.vocab_size:
                raise ValueError(
                    f"The image token {image_token_id} is outside of the vocabulary, so it cannot be found in "
                    "inputs_embeds. Give input_ids."
                )
            image_token_id = torch.full((), image_token_id, dtype=torch.long, device=inputs_embeds.device)
            return (inputs_embeds == self.get_input_embeddings()(image_token_id)).all(dim=-1)
        placeholders = input_ids == image_token_id
        # A single generated token is not checked: the check would synchronize with the device at every step.
        if not needed and input_ids.shape[1] > 1:
            num_placeholders = placeholders.sum()
            torch_compilable_check(
                num_placeholders == 0,
                lambda: (
                    "Image features and image tokens do not match: the text has "
                    f"{int(num_placeholders)} image tokens, but no pixel_values were given (0 features)."
                ),
            )
        return placeholders

    def _insert_images(
        self,
        inputs_embeds: torch.Tensor,
        placeholders: torch.BoolTensor,
        image_tokens: torch.Tensor | list[torch.Tensor],
        image_indices: torch.LongTensor | None,
    ) -> torch.Tensor:
        """The embeddings `(batch_size, sequence_length, hidden_size)` with the image tokens at the placeholders."""
        if not isinstance(image_tokens, torch.Tensor):  # a list of one tensor per image
            image_tokens = torch.stack(tuple(image_tokens))
        image_tokens = image_tokens.to(inputs_embeds)
        if image_indices is not None:
            image_tokens = image_tokens[image_indices]
        num_placeholders, num_features = placeholders.sum(), image_tokens.shape[:-1].numel()
        torch_compilable_check(
            num_placeholders == num_features,
            lambda: (
                "Image features and image tokens do not match: the text has "
                f"{int(num_placeholders)} image tokens, the images have {num_features} features. "
                f"The text needs {self.config.image_seq_length} image tokens per image."
            ),
        )
        return inputs_embeds.masked_scatter(placeholders.unsqueeze(-1), image_tokens)

    def _vision_side_weighted_by_zero(self) -> torch.Tensor:
        # A process with a text-only micro-batch must still give every trained weight a gradient. Otherwise the other
        # processes wait for it forever (DDP, FSDP, ZeRO): https://github.com/deepspeedai/DeepSpeed/issues/7170.
        side = self.config.vision_config.image_size
        channels = self.vision_tower.embeddings.patch_embedding.in_channels
        blank_image = torch.zeros(1, channels, side, side, device=self.device)
        return self.get_image_features(blank_image, return_dict=True).pooler_output.mean() * 0.0


class SQLlavaSuppressTokens(SuppressTokensLogitsProcessor):
    """Same as its parent, but finds the suppressed tokens in the vocabulary once, not at every step."""

    is_suppressed: torch.BoolTensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.is_suppressed is None:
            vocabulary = torch.arange(scores.shape[-1], device=scores.device)
            self.is_suppressed = torch.isin(vocabulary, self.suppress_tokens.to(scores.device))
        return scores.masked_fill(self.is_suppressed, -torch.inf)


class SQLlavaForConditionalGeneration(SQLlavaPreTrainedModel, GenerationMixin):
    """The whole model. `generate` makes answers and, after the vusr marker, questions."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: SQLlavaConfig):
        super().__init__(config)
        text_config = config.text_config
        self.model = SQLlavaModel(config)
        # Phi-1 and Phi-2 have a bias here, no other family does.
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=text_config.model_type == "phi")
        self._tied_weights_keys = {"lm_head.weight": f"{self.input_embeddings_path}.weight"}
        self.post_init()
        # The markers are only input. A generated <image> would have no pixels; prompt lookup decoding, which copies
        # draft tokens from the prompt, would propose one.
        markers = [config.image_token_id, config.vusr_token_id]
        self.generation_config.suppress_tokens = [token_id for token_id in markers if token_id is not None]

    @property
    def input_embeddings_path(self) -> str:
        """Where the embeddings are: `model.language_model.embed_tokens`, or another name in families such as GPT-2."""
        embeddings = self.get_input_embeddings()
        return next(name for name, module in self.named_modules() if module is embeddings)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> tuple | BaseModelOutputWithPooling:
        """See [`SQLlavaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.FloatTensor | None = None,  # explicit, because `generate` inspects this signature
        is_first_iteration: bool = False,
        **kwargs,
    ):
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if inputs.get("input_ids") is None:
            return inputs
        is_draft = not is_first_iteration and inputs["input_ids"].shape[1] > 1
        if is_draft and not {"mm_encoder_outputs", "pixel_values"} & inputs.keys():
            # In assisted decoding, the assistant model gets no images: transformers passes them only to the first pass
            # of the main model. The assistant reads token 0 in their place, which does not change the result.
            inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == self.config.image_token_id, 0)
        return inputs

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        for index, processor in enumerate(processors):
            if type(processor) is SuppressTokensLogitsProcessor:
                processors[index] = SQLlavaSuppressTokens(processor.suppress_tokens.tolist())
        return processors

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple | SQLlavaCausalLMOutputWithPast:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The token ids `input_ids`, with -100 where there is no loss. The model shifts them by one position.
            logits_to_keep (`int` or `torch.Tensor`, *optional*):
                Compute logits only for this number of last positions, or for these positions; 0 for all.
            The other arguments are those of [`SQLlavaModel.forward`].

        Returns:
            [`SQLlavaCausalLMOutputWithPast`], or a tuple with `return_dict=False`.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=_the_one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[..., kept, :])
        softcapping = getattr(self.config.text_config, "final_logit_softcapping", None)  # Gemma 2 and 3
        if softcapping is not None:
            logits = softcapping * torch.tanh(logits / softcapping)

        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        aux_loss = self._router_loss(outputs.router_logits, attention_mask)
        if loss is not None and aux_loss is not None:
            loss = loss + self.config.text_config.router_aux_loss_coef * aux_loss.to(loss.device)
        states = dict(outputs)
        del states["last_hidden_state"]
        return SQLlavaCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **states)

    def _router_loss(
        self, router_logits: tuple[torch.Tensor, ...] | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """
        The load-balancing loss of the language model's experts (https://arxiv.org/abs/2101.03961), with the function
        that transformers uses for all families. `None` for families that balance their experts in another way
        (DeepSeek) or whose configuration does not name the number of experts (Llama 4).
        """
        text_config = self.config.text_config
        needed = [getattr(text_config, name, None) for name in ("router_aux_loss_coef", "num_experts")]
        if router_logits is None or None in needed:
            return None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            # With a cache, the mask covers more positions than were routed.
            sequence_length = router_logits[0].shape[0] // attention_mask.shape[0]
            attention_mask = attention_mask[:, -sequence_length:]
        else:
            attention_mask = None
        return load_balancing_loss_func(
            router_logits, text_config.num_experts, text_config.num_experts_per_tok, attention_mask
        )


class SQLlavaAutoModel(SQLlavaModel):
    """
    The class behind `AutoModel`. `AutoModel.from_pretrained` returns a [`SQLlavaForConditionalGeneration`], because
    users expect to generate. `AutoModel.from_config` returns a [`SQLlavaModel`] without a head, because inference
    engines (vLLM) add their own.
    """

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return SQLlavaForConditionalGeneration.from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        return SQLlavaModel._from_config(config, **kwargs)


SQLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "SQLlavaAutoModel",
    "SQLlavaForConditionalGeneration",
    "SQLlavaModel",
    "SQLlavaPreTrainedModel",
]
