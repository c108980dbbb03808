"""Small tokenizers in the manner of well-known language models, each with a chat template like that model's own."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    set_seed,
)

from tests import tiny


# The pattern with which Llama 3 and Qwen split a text. White space that ends in line breaks is one piece.
SPLIT = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Two line breaks become one token.
LINES = [*tiny.CORPUS, "A line\n\nAnother line\n\n" * 20]


def _byte_level(special_tokens: list[str], bos: str | None = None, **names) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(SPLIT, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, model_max_length=1024, **names)


def llama3() -> PreTrainedTokenizerBase:
    """Llama 3: a base model's end of text, turns that end in another token, and hundreds of reserved tokens."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = _byte_level(special, bos="<|begin_of_text|>", eos_token="<|end_of_text|>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    )
    return tokenizer


def llama31() -> PreTrainedTokenizerBase:
    """Llama 3.1: always a system message, which begins with two dates."""
    tokenizer = llama3()
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% for message in messages %}",
        "{% set has_system = messages[0]['role'] == 'system' %}<|start_header_id|>system<|end_header_id|>\n\n"
        + dates
        + "{{ messages[0]['content'] | trim if has_system else '' }}<|eot_id|>"
        "{% for message in (messages[1:] if has_system else messages) %}",
    )
    return tokenizer


CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' and default_system %}"
    "<|im_start|>system\n{{ default_system }}<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def smollm() -> PreTrainedTokenizerBase:
    """SmolLM2: a system message of its own. The tokens of a turn also stand for begin, end and padding."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _byte_level(special, eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>")
    tokenizer.bos_token = "<|im_start|>"  # which it never writes
    tokenizer.chat_template = "{% set default_system = 'You are a small model.' %}" + CHATML
    return tokenizer


def qwen_base() -> PreTrainedTokenizerBase:
    """A Qwen base model: ChatML, but the tokenizer's end token is that of a document."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _byte_level(special, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def qwen3() -> PreTrainedTokenizerBase:
    """Qwen3: ChatML whose last answer has a thought, and none if `enable_thinking` is false."""
    tokenizer = qwen_base()
    tokenizer.eos_token = "<|im_end|>"
    thought = "<think>\\n\\n</think>\\n\\n"
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if loop.last and message['role'] == 'assistant' %}{{ '" + thought + "' }}{% endif %}"
        "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}{{ '" + thought + "' }}{% endif %}{% endif %}"
    )
    return tokenizer


def smollm3() -> PreTrainedTokenizerBase:
    """SmolLM3: an empty thought in each answer, and a system message with a date, whose turn it leaves open."""
    tokenizer = qwen3()
    thought = "<think>\\n\\n</think>\\n"
    tokenizer.chat_template = (
        "<|im_start|>system\n## Metadata\n\nToday Date: {{ strftime_now('%d %B %Y') }}\nReasoning Mode: "
        "{{ '/think' if enable_thinking is not defined or enable_thinking else '/no_think' }}\n\n"
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}You are a model.{% endif %}\n\n"
        "{% for message in messages if message['role'] != 'system' %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['role'] == 'assistant' %}{{ '" + thought + "' }}{% endif %}{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{{ '" + thought + "' }}{% endif %}"
    )
    return tokenizer


def save_qwen3(folder: Path, base: bool = False) -> Path:
    """
    Writes a small Qwen3 with one matrix for embeddings and head. Its generation config stops at the end of a document
    only. That of a base model has no stop token at all, and its tokenizer ends with a document.
    """
    tokenizer = qwen_base() if base else qwen3()
    fields = {name: value for name, value in tiny.TINY_LLAMA.items() if name != "model_type"}
    set_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**fields, head_dim=16, tie_word_embeddings=True))
    end = None if base else tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.generation_config = GenerationConfig(eos_token_id=end)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gemma() -> PreTrainedTokenizerBase:
    """Gemma: SentencePiece without a space before the text, a line break is a token, system in the first turn."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=[*special, *bytes_], show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    names = {name: f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=1024, **{f"{name}_token": text for name, text in names.items()}
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
        "{% for message in (messages[1:] if system else messages) %}"
        "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
        "{{ system if loop.first else '' }}{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    return tokenizer


# The system message stands before the last question, as in Mistral's tokenizers of version 3.
MISTRAL = (
    "{{ bos_token }}{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for message in (messages[1:] if system else messages) %}{% if message['role'] == 'user' %}"
    "[INST]SPACE{{ system if loop.last else '' }}{{ message['content'] }}[/INST]"
    "{% else %}SPACE{{ message['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)


def mistral() -> PreTrainedTokenizerBase:
    """Mistral 7B v0.3: Llama's tokenizer with tokens for `[INST]` and `[/INST]`."""
    tokenizer = tiny.llama_tokenizer()
    tokenizer.add_tokens(["[INST]", "[/INST]"], special_tokens=True)
    tokenizer.chat_template = MISTRAL.replace("SPACE", "{{ ' ' }}")
    return tokenizer


def tekken() -> PreTrainedTokenizerBase:
    """Mistral Nemo: a byte-level tokenizer, and no space around the markers."""
    tokenizer = _byte_level(
        ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], bos="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = MISTRAL.replace("SPACE", "")
    return tokenizer


def mistral_small() -> PreTrainedTokenizerBase:
    """Mistral Small 3: tokens around the system message."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    tokenizer = _byte_level(special, bos="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}[SYSTEM_PROMPT]{{ message['content'] }}[/SYSTEM_PROMPT]"
        "{% elif message['role'] == 'user' %}[INST]{{ message['content'] }}[/INST]"
        "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


# Name -> how to make the tokenizer, the prompt layout of its model, and the end of a turn.
CHAT_TOKENIZERS = {
    "llama2": (tiny.llama_tokenizer, "vicuna", "</s>"),
    "llama3": (llama3, "llama3", "<|eot_id|>"),
    "llama31": (llama31, "llama3", "<|eot_id|>"),
    "qwen_base": (qwen_base, "chatml", "<|im_end|>"),
    "qwen3": (qwen3, "chatml", "<|im_end|>"),
    "smollm": (smollm, "chatml", "<|im_end|>"),
    "smollm3": (smollm3, "chatml", "<|im_end|>"),
    "gemma": (gemma, "gemma", "<end_of_turn>"),
    "mistral": (mistral, "mistral", "</s>"),
    "tekken": (tekken, "mistral_tekken", "</s>"),
    "mistral_small": (mistral_small, "mistral_v7", "</s>"),
}


def save_chat_model(folder: Path, name: str) -> None:
    """Writes a small language model with one of these tokenizers: a Qwen3, a SmolLM3, or else a Llama."""
    config_class = {"qwen3": Qwen3Config, "smollm3": SmolLM3Config}.get(name, LlamaConfig)
    save_language_model(folder, CHAT_TOKENIZERS[name][0](), config_class)


def save_language_model(
    folder: Path, tokenizer: PreTrainedTokenizerBase, config_class: type[PreTrainedConfig], **fields
) -> None:
    """Writes a small language model of any family. `fields` are those of its configuration."""
    own = {field: value for field, value in tiny.TINY_LLAMA.items() if field != "model_type"}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    config = config_class(**{**own, **ends, **fields})
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
