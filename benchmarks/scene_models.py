"""The models of `python -m benchmarks.scenes`: how they are pretrained and trained on questions.

A vision tower learns what is in each cell of training pictures, and is then frozen: its features are computed once.
A language model learns from written scenes with questions about them (of all corners), and at the same time, with the
projector, from short captions and word lists about training pictures. This base model is the same for all runs. A run
trains projector, prototypes and language model, with the project's own collator, model and loss.

This module is not a benchmark.
"""

import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from benchmarks.scene_world import (
    ATTRIBUTES,
    COLUMNS,
    COMBINATIONS,
    CORNERS,
    FORMS,
    GRID,
    HELD_OUT,
    PICTURE_SIZE,
    ROWS,
    Fact,
    Scene,
    caption,
    draw_facts,
    draw_picture,
    draw_scene,
    word_list,
    write_scene,
)  # fmt: skip
from demo.base_models import BEGIN, END, build_tokenizer
from processing_sq_llava import VUSR_TOKEN
from sq_llava.checkpoints.compose import compose
from sq_llava.checkpoints.load import load_checkpoint
from sq_llava.data.self_questions import ANSWER, NOT_SPOKEN, QUESTION, is_self_question
from sq_llava.training.collator import SelfQuestioningCollator


PATCH_SIZE, WIDTH = 16, 64
MARKERS = {"user": "USER:", "assistant": "ASSISTANT:"}
TURNS = 6
# Comparisons and relations stay at chance at these sizes. Attributes are the kind in which the corners differ most.
KINDS = ("attribute", "attribute", "count", "existence")
LAYOUT = {"prompt_layout": "vicuna", "system_message": "", "image_aspect_ratio": "crop"}


@dataclass(frozen=True)
class Sizes:
    """The sizes of the study, which all runs share."""

    pictures: int = 4000
    test_pictures: int = 400  # with trained combinations of colour and shape; and as many with held-out ones
    test_questions: int = 4  # about each test picture
    tower_steps: int = 4000
    base_steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 2e-3
    asked_pictures: int = 200
    asked_questions: int = 2  # about each of them


# --- Data ---


def draw_pool(number: int, combinations: list[tuple[str, str]], turns: int, seed: int, must_hold_out: bool = False):
    """Draws scenes and facts about each; with `must_hold_out`, only facts about a held-out combination."""
    draw = random.Random(seed)
    scenes, facts = [], []
    while len(scenes) < number:
        scene = draw_scene(draw, combinations)
        found = draw_facts(scene, draw, 4 * turns if must_hold_out else turns, KINDS)
        if must_hold_out:
            found = [fact for fact in found if set(fact.combinations) & set(HELD_OUT)][:turns]
        if len(found) == turns:
            scenes.append(scene)
            facts.append(found)
    return scenes, facts


def test_pool(sizes: Sizes) -> tuple[list[Scene], list[list[Fact]]]:
    """The test pictures: first those with trained combinations, then those with held-out ones."""
    seen = draw_pool(sizes.test_pictures, COMBINATIONS, sizes.test_questions, seed=1)
    held_out = draw_pool(sizes.test_pictures, COMBINATIONS + 4 * HELD_OUT, sizes.test_questions, 2, must_hold_out=True)
    return seen[0] + held_out[0], seen[1] + held_out[1]


def pixels_of(scenes: list[Scene]) -> torch.Tensor:
    size = {"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False, crop_size=size)
    return processor(images=[draw_picture(scene) for scene in scenes], return_tensors="pt").pixel_values


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def conversation(turns: list[tuple[str, str]], opening: dict) -> list[dict]:
    """Messages of questions and answers. `opening` stands before the first question: an image or a written scene."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        before = [opening] if number == 0 else []
        messages.append({"role": "user", "content": [*before, text_part(question)]})
        messages.append({"role": "assistant", "content": [text_part(answer)]})
    return messages


def rows_of(facts: list[list[Fact]], corner: tuple[str, str]) -> list[dict]:
    """The training rows: one conversation about each picture."""
    image = {"type": "image"}
    return [
        {"row_id": n, "messages": conversation([fact.turns[corner] for fact in of_picture], image), "images": [n]}
        for n, of_picture in enumerate(facts)
    ]


@dataclass
class FeatureCollator(SelfQuestioningCollator):
    """
    The project's collator, with the frozen tower's features in the place of pixels.

    Args:
        features: `(num_pictures, N, D)`. The `images` of a row are indices of these.
        with_marker: If `False`, a drawn turn stays a turn of the user, and its question is in the loss all the same.
            This is instruction modelling (https://arxiv.org/abs/2405.14394) on exactly the drawn turns.
    """

    features: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    with_marker: bool = True
    _known: dict[str, np.ndarray] = field(default_factory=dict)

    def _tokenize(self, messages, row):
        """The same tokens as the chat template writes, put together from those of each text: 30 times faster."""
        if self.plain:
            return super()._tokenize(messages, row)
        ids, spoken = [self._ids(BEGIN)], [False]
        for message in messages:
            is_spoken = message["role"] == "assistant" or message.get("self_question", False)
            begin = VUSR_TOKEN if message.get("self_question") else MARKERS[message["role"]]
            parts = [self._ids("<image>\n" if p["type"] == "image" else p["text"]) for p in message["content"]]
            parts += [self._ids(END)] if is_spoken else []
            ids += [self._ids(begin), *parts]
            spoken += [False] + [is_spoken] * len(parts)
        ids, spoken = np.concatenate(ids), np.repeat(spoken, [len(part) for part in ids])
        sizes = np.where(ids == self.processor.image_token_id, self.processor.image_seq_length, 1)
        return ids.repeat(sizes), spoken.repeat(sizes)

    def _ids(self, text: str) -> np.ndarray:
        if text not in self._known:
            self._known[text] = np.array(self.processor.tokenizer(text, add_special_tokens=False).input_ids)
        return self._known[text]

    def _pixels(self, rows, images_of_rows):
        indices = [image for images in images_of_rows for image in images]
        return {"pixel_values": self.features[indices]} if indices else {}

    def _sample(self, row):
        if self.with_marker:
            return super()._sample(row)
        ratio, self.self_question_ratio = self.self_question_ratio, 0.0
        try:
            ids, kinds, images = super()._sample(row)
        finally:
            self.self_question_ratio = ratio
        user, assistant = self.processor.tokenizer.convert_tokens_to_ids(list(MARKERS.values()))
        kinds = kinds.copy()
        for turn, (begin, end) in enumerate(zip(np.flatnonzero(ids == user), np.flatnonzero(ids == assistant))):
            if turn and is_self_question(ratio, self.seed, int(self.epoch), row["row_id"], turn):
                kinds[begin + 1 : end] = QUESTION
        return ids, kinds, images


# --- Base models ---


def train_tower(sizes: Sizes, folder: Path) -> float:
    """Trains a vision tower to say for each cell which size, colour and shape it holds. Returns the test accuracy."""
    set_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=4,
        image_size=PICTURE_SIZE, patch_size=PATCH_SIZE,
    )  # fmt: skip
    tower = CLIPVisionModel(config)
    heads = nn.Linear(WIDTH, sum(1 + len(values) for values in ATTRIBUTES.values()))
    weights = _overlaps()
    scenes, _ = draw_pool(2 * sizes.pictures, COMBINATIONS, 0, seed=3)
    pixels, targets = pixels_of(scenes), _cell_targets(scenes)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98))
    scheduler = get_cosine_schedule_with_warmup(optimizer, sizes.tower_steps // 20, sizes.tower_steps)

    def scores(pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cells = weights @ tower(pixel_values=pixel_values).last_hidden_state[:, 1:]  # [B, cells, D]
        return heads(cells).split([1 + len(values) for values in ATTRIBUTES.values()], dim=-1)

    for _ in range(sizes.tower_steps):
        batch = torch.randint(len(pixels), (64,))
        losses = [F.cross_entropy(s.flatten(0, 1), t[batch].flatten()) for s, t in zip(scores(pixels[batch]), targets)]
        sum(losses).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    tower.eval().save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": PICTURE_SIZE}, crop_size={"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    ).save_pretrained(folder)
    test, _ = test_pool(sizes)
    with torch.no_grad():
        guesses = [s.argmax(dim=-1) for s in scores(pixels_of(test))]
    truth = _cell_targets(test)
    right = torch.stack([guess == target for guess, target in zip(guesses, truth)]).all(dim=0)
    return right[truth[0] > 0].float().mean().item()


def _overlaps() -> torch.Tensor:
    """The share of each cell that each patch covers: [cells, patches]."""
    side, cell = PICTURE_SIZE // PATCH_SIZE, PICTURE_SIZE / GRID
    line = torch.zeros(GRID, side)
    for number in range(GRID):
        for patch in range(side):
            begin, end = max(number * cell, patch * PATCH_SIZE), min((number + 1) * cell, (patch + 1) * PATCH_SIZE)
            line[number, patch] = max(0, end - begin) / cell
    return torch.einsum("rp,cq->rcpq", line, line).reshape(GRID**2, side**2)


def _cell_targets(scenes: list[Scene]) -> list[torch.Tensor]:
    """For each attribute, its number in each cell, and 0 in empty cells: [scenes, cells]."""
    targets = [torch.zeros(len(scenes), GRID**2, dtype=torch.long) for _ in ATTRIBUTES]
    for number, scene in enumerate(scenes):
        for thing in scene:
            for target, (name, values) in zip(targets, ATTRIBUTES.items()):
                target[number, GRID * thing.row + thing.column] = 1 + values.index(getattr(thing, name))
    return targets


def compose_base(tower: Path, folder: Path, prototype_variant: str):
    """A new language model and connector on the tower."""
    set_seed(0)
    forms = " ".join(form.replace("{}", " ") for form, *_ in FORMS.values())
    values = [*ROWS, *COLUMNS, *(value for values in ATTRIBUTES.values() for value in values)]
    words = "a and the thing first second third last of yes no larger smaller equal than left right above below"
    attributes = "size color shape 0 1 2 3 4 5 6"
    tokenizer = build_tokenizer([forms, " ".join(values), words, attributes], adds_end=False)
    ids = dict(zip(("bos_token_id", "eos_token_id"), tokenizer.convert_tokens_to_ids([BEGIN, END])))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id, **ids,
    )  # fmt: skip
    for part in (LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(folder / "llama")
    settings = {"prototype_variant": prototype_variant, "num_prototypes": 8, "vision_feature_layer": -1}
    return compose(str(tower), str(folder / "llama"), processor_kwargs=LAYOUT, **settings)


def on_features(model):
    """The model, with features of the frozen tower as its `pixel_values`."""
    run_tower = model.model.get_vision_features
    # Batches without a picture run the vision side on a blank image, which has four dimensions.
    model.model.get_vision_features = lambda inputs: run_tower(inputs) if inputs.ndim == 4 else inputs
    model.model.vision_tower.requires_grad_(False)
    return model


@torch.no_grad()
def features_of(model, scenes: list[Scene]) -> torch.Tensor:
    """The tower's features [scenes, N, D]."""
    return torch.cat([model.model.get_vision_features(pixels) for pixels in pixels_of(scenes).split(500)])


def train_base(
    sizes: Sizes,
    tower: Path,
    folder: Path,
    prototype_variant: str,
    scenes: list[Scene],
    facts: list,
    test: list[Scene],
) -> dict[str, float]:
    """Trains the base model on captions and word lists of training pictures, and on written scenes."""
    model, processor = compose_base(tower, folder, prototype_variant)
    features = features_of(model, scenes)
    torch.save(features, folder / "train.pt")
    torch.save(features_of(model, test), folder / "test.pt")
    draw = random.Random(0)
    texts = FeatureCollator(processor, self_question_ratio=0.0)
    pictures = FeatureCollator(processor, plain=True, features=features)
    yes_no = torch.tensor(processor.tokenizer.convert_tokens_to_ids(["yes", "no"]))
    on_features(model)
    train = Steps(model, sizes.base_steps, 3e-3)
    losses = {}
    for step in range(sizes.base_steps):
        chosen = draw.sample(range(len(scenes)), sizes.batch_size)
        split = len(chosen) // 4
        # As in the pretraining of a language model, all words are in the loss; but answers count more.
        batch = texts([_written_row(facts[n], scenes[n], draw) for n in chosen[:split]])
        weights = torch.where(batch.pop("turn_kinds") == ANSWER, 1.0, 0.1) * batch["attention_mask"]
        text_loss = weighted_loss(model, batch, weights)
        batch = pictures([_picture_row(n, scenes[n], draw) for n in chosen[split:]])
        weights = torch.where(torch.isin(batch["input_ids"], yes_no), 1.0, 0.2) * (batch.pop("turn_kinds") == ANSWER)
        picture_loss = weighted_loss(model, batch, weights)
        train.step(text_loss + picture_loss)
        for name, loss in (("text", text_loss), ("picture", picture_loss)):
            losses[name] = 0.95 * losses.get(name, loss.item()) + 0.05 * loss.item()
        if step % 100 == 0:
            print(f"Base model, step {step}: {losses}", flush=True)
    del model.model.get_vision_features
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return losses


def _written_row(facts: list[Fact], scene: Scene, draw: random.Random) -> dict:
    corner = draw.choice(CORNERS)
    turns = [fact.turns[corner] for fact in draw.sample(facts, 4)]
    return {"row_id": 0, "messages": conversation(turns, text_part(f"{write_scene(scene)}\n")), "images": []}


def _picture_row(number: int, scene: Scene, draw: random.Random) -> dict:
    written = f"{caption(scene, draw)} {word_list(scene, draw)}"
    return {"row_id": 0, "messages": conversation([("", written)], {"type": "image"}), "images": [number]}


# --- Training ---


class Steps:
    """The optimizer of a run: AdamW with a short warm-up and a cosine decay."""

    def __init__(self, model, num_steps: int, learning_rate: float):
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.scheduler = get_cosine_schedule_with_warmup(self.optimizer, num_steps // 20, num_steps)

    def step(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.scheduler.step()


def weighted_loss(model, batch: dict[str, torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """The weighted mean of the tokens' losses, as in `SQLlavaTrainer`. `weights`: `(batch_size, sequence_length)`."""
    labels, weights = batch["input_ids"][:, 1:], weights[:, 1:]
    kept = weights > 0
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in batch}
    logits = model(**inputs, positions_to_keep=F.pad(kept, (0, 1)), use_cache=False).logits
    losses = F.cross_entropy(logits, labels[kept], reduction="none")
    return (losses * weights[kept]).sum() / weights[kept].sum()


@dataclass(frozen=True)
class Arm:
    """How a run treats the users' questions. `with_marker`: as `FeatureCollator`'s."""

    label: str
    ratio: float = 0.0
    question_loss_weight: float = 1.0
    with_marker: bool = True
    prototype_variant: str = "none"


def train_run(
    base: Path, arm: Arm, corner: tuple[str, str], pictures: int, steps: int, seed: int, sizes: Sizes, facts: list
):
    """
    Trains a run from the base model.

    Returns:
        The model, its processor, and what it cost: tokens with loss of both kinds, the last loss, seconds.
    """
    set_seed(seed)
    model, processor = load_checkpoint(str(base))
    on_features(model).train()
    rows, features = rows_of(facts, corner), torch.load(base / "train.pt", weights_only=True)
    draw = random.Random(seed)
    rows = draw.sample(rows, pictures)
    collator = FeatureCollator(
        processor, self_question_ratio=arm.ratio, seed=seed, features=features, with_marker=arm.with_marker
    )
    train = Steps(model, steps, sizes.learning_rate)
    cost, order, start = {"answer_tokens": 0, "question_tokens": 0}, [], time.process_time()
    losses = []
    for _ in range(steps):
        if len(order) < sizes.batch_size:
            order += draw.sample(range(pictures), pictures)
            collator.epoch += 1
        batch = collator([rows[n] for n in order[: sizes.batch_size]])
        del order[: sizes.batch_size]
        kinds = batch.pop("turn_kinds")
        cost["answer_tokens"] += int((kinds == ANSWER).sum())
        cost["question_tokens"] += int((kinds == QUESTION).sum())
        weights = torch.where(kinds == QUESTION, arm.question_loss_weight, (kinds != NOT_SPOKEN).float())
        loss = weighted_loss(model, batch, weights)
        train.step(loss)
        losses.append(loss.item())
    last = losses[-20:]
    cost |= {"last_loss": sum(last) / len(last), "training_seconds": time.process_time() - start}
    return model.eval(), processor, cost
