"""Pretrains the demo's two base models from scratch and saves them as ordinary transformers folders.

`python -m demo.run` calls this module. It writes what a real training downloads from the Hub:

    clip/     CLIPModel, image processor and tokenizer, like `openai/clip-vit-large-patch14-336`
    llama/    LlamaForCausalLM and tokenizer, like `lmsys/vicuna-7b-v1.5`

(`demo/blip2.py` makes a third model, for MiniGPT-4.)

The base models know nothing about SQ-LLaVA: `<image>` and `[vusr]` are not in the vocabulary, and the LLM has never
seen an image. Like a real LLM, it has learned from text alone to answer questions about the text before them; see
`draw_text`.
"""

import random
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from demo.data import image_root
from sq_llava.evaluation.easy_vqa import COLOURS, SHAPES, answer_question, question_kind, words_of


UNKNOWN, PADDING, BEGIN, END = "<unk>", "<pad>", "<s>", "</s>"
IMAGE_SIZE, PATCH_SIZE = 64, 8
WORDS_PER_LIST, TURNS_PER_CONVERSATION = 16, 6
CAPTIONS = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]


def build_tokenizer(texts: list[str], adds_end: bool) -> PreTrainedTokenizerFast:
    """Builds a word-level tokenizer. Question marks and newlines are separate words.

    Args:
        texts: Texts whose words make up the vocabulary, together with the role names.
        adds_end: Add `</s>` after a text, as CLIP needs. `<s>` is always added before it.
    """
    word = Regex(r"\n|\?|[^\s?]+")
    words = sorted({match for text in texts for match in text.replace("?", " ?").split()})
    # CLIP's text tower takes its output at `</s>`. But with eos_token_id=2, as in early checkpoints, it takes the
    # output at the highest token id. So `</s>` must not have the id 2.
    vocabulary = [UNKNOWN, PADDING, BEGIN, END, "\n", "USER:", "ASSISTANT:", *words]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(word, behavior="removed", invert=True)
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins words with spaces, without one before "?"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}" if adds_end else f"{BEGIN} $A",
        special_tokens=[(BEGIN, vocabulary.index(BEGIN)), (END, vocabulary.index(END))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=UNKNOWN, pad_token=PADDING, bos_token=BEGIN, eos_token=END
    )


def train(
    model: nn.Module,
    compute_loss,
    num_steps: int,
    learning_rate: float,
    betas: tuple[float, float],
    description: str,
) -> None:
    """Trains all of `model` with AdamW, a short warm-up and a cosine decay.

    Args:
        model: The model; it is changed in place.
        compute_loss: Function without arguments that returns the loss of a new batch. Called once per step.
        num_steps: Number of optimizer steps.
        learning_rate: Peak learning rate.
        betas: AdamW's betas.
        description: Label of the progress bar.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=betas, weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(
        optimizer, num_warmup_steps=num_steps // 20, num_training_steps=num_steps
    )
    progress = tqdm(range(num_steps), desc=description, unit="step")
    for step in progress:
        loss = compute_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def build_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 8,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision_config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    return CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=64))


def embed_captions(model: CLIPModel, caption_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.normalize(model.get_text_features(**caption_inputs).pooler_output, dim=-1)


def embed_images(model: CLIPModel, pixel_values: torch.Tensor) -> torch.Tensor:
    return F.normalize(model.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1)


def caption_numbers(rows: list[dict]) -> torch.Tensor:
    """The index in `CAPTIONS` of each row's caption: [num_rows]."""
    return torch.tensor([CAPTIONS.index(row["conversations"][1]["value"]) for row in rows])


def draw_images(pixel_values: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws a batch: its indices [batch_size] and its images. Half are mirrored, because there are few images."""
    batch = torch.randint(len(pixel_values), (batch_size,), device=pixel_values.device)
    images = pixel_values[batch]
    is_mirrored = torch.rand(batch_size, 1, 1, 1, device=pixel_values.device) < 0.5
    return batch, torch.where(is_mirrored, images.flip(-1), images)


def load_images(image_processor: CLIPImageProcessor, rows: list[dict]) -> torch.Tensor:
    images = [Image.open(image_root() / row["image"]) for row in rows]
    return image_processor(images=images, return_tensors="pt").pixel_values


def contrastive_loss(logits: torch.Tensor, caption_of_image: torch.Tensor) -> torch.Tensor:
    """CLIP's loss for batches in which several images share a caption: all of them are its positives.

    Args:
        logits: [num_images, num_captions], for all captions.
        caption_of_image: [num_images], the index of each image's caption.
    """
    to_captions = F.cross_entropy(logits, caption_of_image)
    is_pair = F.one_hot(caption_of_image, logits.shape[1]).to(logits.dtype)  # [num_images, num_captions]
    images_of_caption = is_pair.sum(dim=0)
    log_probabilities = (logits.log_softmax(dim=0) * is_pair).sum(dim=0) / images_of_caption.clamp(min=1)
    to_images = -log_probabilities.sum() / (images_of_caption > 0).sum()
    return (to_captions + to_images) / 2


def pretrain_clip(
    train_rows: list[dict],
    holdout_rows: list[dict],
    tokenizer: PreTrainedTokenizerFast,
    output_dir: str | Path,
    seed: int = 0,
    num_steps: int = 900,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    device: str = "cpu",
) -> float:
    """Trains a CLIP on images and captions, and saves it with its image processor and tokenizer.

    Args:
        train_rows: Caption rows, as in `stage1_train.json`.
        holdout_rows: Caption rows of other images, for the zero-shot accuracy.
        tokenizer: Tokenizer that adds `</s>`.
        output_dir: Folder to save to.
        seed: Random seed for the weights and the batches.
        num_steps: Number of optimizer steps.
        batch_size: Number of images per step.
        learning_rate: Peak learning rate.
        device: Device to train on.

    Returns:
        The share of held-out images that are closer to their own caption than to any other.
    """
    set_seed(seed)
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    model = build_clip(tokenizer).to(device)
    caption_inputs = tokenizer(CAPTIONS, return_tensors="pt", return_token_type_ids=False).to(device)
    pixel_values = load_images(image_processor, train_rows).to(device)
    caption_of_image = caption_numbers(train_rows).to(device)

    def compute_loss() -> torch.Tensor:
        batch, images = draw_images(pixel_values, batch_size)
        similarities = embed_images(model, images) @ embed_captions(model, caption_inputs).T
        return contrastive_loss(model.logit_scale.exp() * similarities, caption_of_image[batch])

    train(model, compute_loss, num_steps, learning_rate, betas=(0.9, 0.98), description="CLIP")
    for part in (model, image_processor, tokenizer):
        part.save_pretrained(output_dir)
    guesses = guess_captions(model, caption_inputs, load_images(image_processor, holdout_rows).to(device))
    return (guesses.cpu() == caption_numbers(holdout_rows)).double().mean().item()


@torch.no_grad()
def guess_captions(model: CLIPModel, caption_inputs: dict, pixel_values: torch.Tensor) -> torch.Tensor:
    """The index of the caption that is closest to each image: [num_images]."""
    text_embeddings = embed_captions(model, caption_inputs)
    distances = torch.cdist(text_embeddings, text_embeddings) + torch.eye(len(CAPTIONS), device=pixel_values.device)
    assert distances.min() > 1e-3, "two captions have the same text embedding"
    return (embed_images(model, pixel_values) @ text_embeddings.T).argmax(dim=-1)


def draw_scene(colour: str, shape: str, draw: random.Random) -> str:
    """Draws a caption's words in random order and number. They take the place of an image's tokens."""
    words = [colour, shape, *draw.choices(["a", colour, shape], weights=[2, 1, 1], k=draw.randint(2, 22))]
    draw.shuffle(words)
    return " ".join(words)


def draw_question(questions_of_kind: dict[str, list[str]], colour: str, shape: str, draw: random.Random) -> str:
    """Draws a question that fits the scene. All kinds are equally frequent.

    Three in ten yes/no questions are about something that is there. In easy-VQA there are fewer, but they teach the
    model to look at the scene. With five in ten, "yes" and "no" would be equally likely after "is there" and "is
    there not", and the model would learn negation late.
    """
    kind = draw.choice(sorted(questions_of_kind))
    is_about_scene = draw.random() < 0.3
    while True:
        question = draw.choice(questions_of_kind[kind])
        if answer_question(question, colour, shape) is None:
            continue
        if not kind.startswith("yes/no") or is_about_scene == bool(words_of(question) & {colour, shape}):
            return question


def draw_text(
    questions_of_kind: dict[str, list[str]], question_weight: float, draw: random.Random
) -> list[tuple[str, float]]:
    """Draws a text for the LLM's pretraining, as pairs of a segment and its loss weight.

    There are three kinds of text. In each, a scene stands where the demo's prompts have their image tokens:

        red a circle red a\\na red circle\\n                                                         caption
        USER: red a circle red a\\nblue? no circle? yes ...                                         word list
        USER: red a circle red a\\nis there a circle? ASSISTANT: yes</s>USER: what color ...        conversation

    The word lists teach the yes/no rules early: with them, the LLM looks for a question's word in the scene after 300
    steps; with captions and conversations alone, it does not even after 600.
    """
    colour, shape = draw.choice(COLOURS), draw.choice(SHAPES)
    scene = draw_scene(colour, shape, draw)
    sort = draw.choices(["caption", "word list", "conversation"], weights=[0.1, 0.4, 0.5])[0]
    if sort == "caption":
        return [(scene, 0.0), (f"a {colour} {shape}\n", 1.0)]
    segments = [("USER:", 0.0), (scene, 0.0), ("\n", 0.0)]
    if sort == "word list":
        for _ in range(WORDS_PER_LIST):
            word = draw.choice((colour, shape)) if draw.random() < 0.4 else draw.choice((*COLOURS, *SHAPES))
            segments += [(f"{word}?", 0.0), ("yes" if word in (colour, shape) else "no", 1.0)]
        return segments
    for turn in range(TURNS_PER_CONVERSATION):
        question = draw_question(questions_of_kind, colour, shape, draw)
        segments += [("USER:", 0.0)] if turn else []
        segments += [(question, question_weight), ("ASSISTANT:", 0.0)]
        segments += [(answer_question(question, colour, shape) + END, 1.0)]
    return segments


def weighted_loss(logits: torch.Tensor, input_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted mean of the cross-entropy of each next token.

    Args:
        logits: [batch, tokens, vocabulary]
        input_ids: [batch, tokens]
        weights: [batch, tokens], the weight of each token in the mean
    """
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()


def build_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=3,  # of size 32
        num_key_value_heads=3,
        max_position_embeddings=512,
        initializer_range=0.1,  # about 1 / sqrt(hidden_size): from the usual 0.02, such a small model learns slowly
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class TextBatches:
    """Batches of texts from `draw_text`, with a random seed."""

    def __init__(self, questions: list[str], tokenizer: PreTrainedTokenizerFast, question_weight: float, seed: int):
        self.tokenizer, self.question_weight, self.generator = tokenizer, question_weight, random.Random(seed)
        self.encode = cache(lambda text: tokenizer(text, add_special_tokens=False).input_ids)
        self.questions_of_kind: dict[str, list[str]] = {}
        for question in sorted(set(questions)):
            self.questions_of_kind.setdefault(question_kind(question), []).append(question)

    def draw(self, num_texts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the token ids and the loss weight of each token, both [num_texts, tokens]."""
        rows, row_weights = [], []
        for _ in range(num_texts):
            ids, weights = [self.tokenizer.bos_token_id], [0.0]
            for text, weight in draw_text(self.questions_of_kind, self.question_weight, self.generator):
                ids += self.encode(text)
                weights += [weight] * len(self.encode(text))
            rows.append(torch.tensor(ids))
            row_weights.append(torch.tensor(weights))
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return input_ids, nn.utils.rnn.pad_sequence(row_weights, batch_first=True)


def pretrain_llama(
    questions: list[str],
    tokenizer: PreTrainedTokenizerFast,
    output_dir: str | Path,
    seed: int = 0,
    num_steps: int = 600,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    question_weight: float = 0.1,
    device: str = "cpu",
) -> float:
    """Trains a Llama on texts about invented scenes and saves it with its tokenizer.

    Args:
        questions: Questions of the training data. Only their wording is used; the answers follow from each scene.
        tokenizer: Tokenizer that does not add `</s>`.
        output_dir: Folder to save to.
        seed: Random seed for the weights and the texts.
        num_steps: Number of optimizer steps.
        batch_size: Number of texts per step.
        learning_rate: Peak learning rate.
        question_weight: Loss weight of the tokens of a question; those of an answer have weight 1.
        device: Device to train on.

    Returns:
        The share of questions about new scenes whose answer is the most likely next word.
    """
    set_seed(seed)
    texts = TextBatches(questions, tokenizer, question_weight, seed)
    model = build_llama(tokenizer).to(device)

    def compute_loss() -> torch.Tensor:
        input_ids, weights = (tensor.to(device) for tensor in texts.draw(batch_size))
        return weighted_loss(model(input_ids=input_ids).logits, input_ids, weights)

    train(model, compute_loss, num_steps, learning_rate, betas=(0.9, 0.95), description="LLM")
    for part in (model, tokenizer):
        part.save_pretrained(output_dir)
    input_ids = texts.draw(256)[0].to(device)
    with torch.no_grad():
        guesses = model(input_ids=input_ids).logits[:, :-1].argmax(dim=-1)
    is_answer = input_ids[:, :-1] == tokenizer.convert_tokens_to_ids("ASSISTANT:")
    return (guesses == input_ids[:, 1:])[is_answer].float().mean().item()
