"""What the study of scenes measures: answers, hallucination, calibration, and the questions that a model asks.

This module is not a benchmark.
"""

import numpy as np
import torch

from benchmarks.scene_models import MARKERS, Arm, Sizes, conversation, text_part
from benchmarks.scene_world import Bits, Fact, Scene, parse
from demo.base_models import END
from processing_sq_llava import VUSR_TOKEN


@torch.no_grad()
def measure_answers(model, processor, corner, scenes, facts: list[list[Fact]], features: torch.Tensor) -> dict:
    """Accuracy, hallucination and calibration on single questions about test pictures."""
    image, half = {"type": "image"}, len(scenes) // 2
    prompts, truth, numbers, kinds = [], [], [], []
    for number, of_picture in enumerate(facts):
        for fact in of_picture:
            question, answer = fact.turns[corner]
            prompts.append(_prompt(processor, [{"role": "user", "content": [image, text_part(question)]}]))
            truth.append(answer)
            numbers.append(number)
            kinds.append(fact.kind)
    words, sure = [], []
    for begin in range(0, len(prompts), 256):
        part = slice(begin, begin + 256)
        inputs = processor.tokenizer.pad({"input_ids": prompts[part]}, padding_side="left", return_tensors="pt")
        last = model(**inputs, pixel_values=features[numbers[part]], logits_to_keep=1, use_cache=False).logits[:, -1]
        probability, best = last.softmax(dim=-1).max(dim=-1)
        words += processor.tokenizer.convert_ids_to_tokens(best.tolist())
        sure += probability.tolist()
    right = np.array([word == answer for word, answer in zip(words, truth)])
    held_out, kinds = np.array(numbers) >= half, np.array(kinds)
    absent = (kinds == "existence") & np.isin(truth, ["no", "0"])
    return {
        "accuracy": right.mean(),
        "accuracy_trained_combinations": right[~held_out].mean(),
        "accuracy_held_out_combinations": right[held_out].mean(),
        "hallucination": 1 - right[absent].mean(),
        "calibration_error": calibration_error(np.array(sure), right),
        **{f"accuracy_{kind}": right[kinds == kind].mean() for kind in sorted(set(kinds))},
    }


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """The expected calibration error: the mean distance of confidence and accuracy in bins of equal width."""
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(
        sum(
            abs(confidence[places == place].mean() - right[places == place].mean()) * (places == place).mean()
            for place in set(places.tolist())
        )
    )


def _prompt(processor, messages: list[dict], ask_with: str | None = None) -> list[int]:
    """Token ids of a conversation, up to the point where the model answers or, after the marker `ask_with`, asks."""
    text = processor.apply_chat_template(messages, add_generation_prompt=ask_with is None) + (ask_with or "")
    ids = np.array(processor.tokenizer(text, add_special_tokens=False).input_ids)
    return ids.repeat(np.where(ids == processor.image_token_id, processor.image_seq_length, 1)).tolist()


@torch.no_grad()
def measure_questions(model, processor, arm: Arm, corner, scenes, facts, features, sizes: Sizes, bits: Bits) -> dict:
    """
    Samples questions after one answered turn, and checks them. The bits of a question are those of its premise, and 0
    if it is not true of the picture. `true_elsewhere` checks the premises on the next picture: what is true by chance.
    """
    marker = VUSR_TOKEN if arm.with_marker else MARKERS["user"]
    tokenizer, number = processor.tokenizer, min(sizes.asked_pictures, len(scenes))
    opening = [conversation([of_picture[0].turns[corner]], {"type": "image"}) for of_picture in facts[:number]]
    prompts = [_prompt(processor, messages, marker) for messages in opening]
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    stops = tokenizer.convert_tokens_to_ids(["?", END, *MARKERS.values()])
    torch.manual_seed(0)
    asked = [[] for _ in range(number)]
    for _ in range(sizes.asked_questions):
        output = model.generate(
            **inputs, pixel_values=features[:number], do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=24, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for questions, text in zip(asked, texts):
            questions.append(text.strip())
    return check_questions(asked, scenes[:number], bits)


def check_questions(asked: list[list[str]], scenes: list[Scene], bits: Bits) -> dict:
    """Shares of the questions about each scene that are well formed, true of it, answerable; and their bits."""
    checks, examples = [], []
    for number, (questions, scene) in enumerate(zip(asked, scenes)):
        elsewhere = scenes[(number + 1) % len(scenes)]
        for text in questions:
            question = parse(text)
            is_true = question is not None and question.premise_is_true(scene)
            told = bits.of_question(question) if is_true else 0.0
            can_answer = is_true and question.answer(scene) is not None
            is_true_elsewhere = question is not None and question.premise_is_true(elsewhere)
            checks.append((question is not None, is_true, can_answer, told, is_true_elsewhere))
            if len(examples) < 12:
                examples.append({"picture": number, "question": text, "premise_is_true": is_true, "bits": told})
    names = ("well_formed", "premise_true", "answerable", "bits", "true_elsewhere")
    means = np.array(checks, dtype=float).mean(axis=0).tolist()
    return dict(zip(names, means)) | {"questions": len(checks), "examples": examples}
