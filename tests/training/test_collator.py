"""The draw of self-questions, and the batches with their labels."""

import pytest
import torch
from torch.utils.data import DataLoader

from sq_llava.data.self_questions import ANSWER, IGNORE_INDEX, QUESTION, draw_self_questions
from sq_llava.training.collator import SelfQuestioningCollator
from tests import tiny


def conversation(num_turns: int, with_image: bool = True) -> list[dict]:
    messages = []
    for turn in range(num_turns):
        content = [{"type": "text", "text": f"What is it {turn}?"}]
        if turn == 0 and with_image:
            content.insert(0, {"type": "image", "text": None})
        messages += [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": f"A dog {turn}."}]},
        ]
    return messages


def row(row_id: int, num_turns: int, with_image: bool = True) -> dict:
    images = [tiny.picture(row_id)] if with_image else []
    return {"row_id": row_id, "id": str(row_id), "messages": conversation(num_turns, with_image), "images": images}


def drawn_turns(messages: list[dict]) -> list[bool]:
    return [bool(message.get("self_question")) for message in messages if message["role"] == "user"]


def test_first_turn_is_never_a_self_question():
    drawn = draw_self_questions(conversation(4), ratio=1.0, seed=0, epoch=0, row_id=0)
    assert drawn_turns(drawn) == [False, True, True, True]


def test_text_only_conversation_has_no_self_question():
    messages = conversation(4, with_image=False)
    assert draw_self_questions(messages, ratio=1.0, seed=0, epoch=0, row_id=0) == messages


def test_turn_that_shows_an_image_is_no_self_question():
    messages = conversation(3)
    messages[2]["content"].insert(0, {"type": "image", "text": None})
    assert drawn_turns(draw_self_questions(messages, 1.0, 0, 0, 0)) == [False, False, True]


def test_ratio_is_the_share_of_self_questions():
    draws = [d for r in range(2000) for d in drawn_turns(draw_self_questions(conversation(3), 0.3, 7, 0, r))[1:]]
    assert abs(sum(draws) / len(draws) - 0.3) < 0.02


def test_draw_is_new_each_epoch_and_each_seed_but_repeatable():
    def draw(seed, epoch):
        return [drawn_turns(draw_self_questions(conversation(5), 0.5, seed, epoch, r)) for r in range(20)]

    assert draw(0, 0) == draw(0, 0)
    assert draw(0, 0) != draw(0, 1)
    assert draw(0, 0) != draw(1, 0)


@pytest.mark.parametrize("name", tiny.TOKENIZERS)
def test_labels_hold_answers_and_drawn_questions_only(name):
    processor = tiny.tiny_processor(tiny.TOKENIZERS[name](), system_message="Be kind.")
    collator = SelfQuestioningCollator(processor, self_question_ratio=1.0)
    batch = collator([row(0, 3), row(1, 1), row(2, 2, with_image=False)])
    eos = processor.tokenizer.eos_token

    def spoken(index, kind):
        ids = batch["input_ids"][index][batch["turn_kinds"][index] == kind]
        return "".join(processor.decode(ids, skip_special_tokens=False).split())

    assert spoken(0, ANSWER) == f"Adog0.{eos}Adog1.{eos}Adog2.{eos}"
    assert spoken(0, QUESTION) == f"Whatisit1?{eos}Whatisit2?{eos}"
    assert spoken(1, QUESTION) == spoken(2, QUESTION) == ""
    assert spoken(2, ANSWER) == f"Adog0.{eos}Adog1.{eos}"
    labelled = batch["labels"] != IGNORE_INDEX
    assert torch.equal(labelled, batch["turn_kinds"] != 0)
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    assert batch["pixel_values"].shape[0] == 2


def test_stage_one_layout_trains_on_the_caption_alone():
    processor = tiny.tiny_processor()
    batch = SelfQuestioningCollator(processor, plain=True)([row(0, 1)])
    labels = batch["labels"][0]
    assert processor.decode(labels[labels != IGNORE_INDEX]).strip("\n ") == "A dog 0."
    assert "USER" not in processor.decode(batch["input_ids"][0])


def test_long_row_loses_whole_last_turns():
    processor = tiny.tiny_processor(system_message="")
    collator = SelfQuestioningCollator(processor)
    two_turns, three_turns = collator([row(0, 2)]), collator([row(0, 3)])
    length = two_turns["input_ids"].shape[1]
    collator.max_length = three_turns["input_ids"].shape[1] - 1
    assert torch.equal(collator([row(0, 3)])["input_ids"], two_turns["input_ids"])
    collator.max_length = length
    assert torch.equal(collator([row(0, 3)])["labels"], two_turns["labels"])


def test_image_of_a_turn_that_is_cut_off_is_not_opened():
    collator = SelfQuestioningCollator(tiny.tiny_processor(system_message=""))
    long = row(0, 2)
    long["messages"][2]["content"].insert(0, {"type": "image"})
    long["images"].append("missing.png")
    collator.max_length = collator([row(0, 1)])["input_ids"].shape[1]
    batch, alone = collator([long]), collator([row(0, 1)])
    assert all(torch.equal(batch[name], alone[name]) for name in alone) and batch.keys() == alone.keys()


def test_row_without_room_for_its_first_answer_is_refused():
    collator = SelfQuestioningCollator(tiny.tiny_processor(), max_length=20)
    with pytest.raises(ValueError, match=r"Row 5: .* tokens, more than max_length 20"):
        collator([row(5, 1)])


@pytest.mark.parametrize("workers", [{"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}])
def test_workers_draw_the_same_self_questions_in_every_epoch(workers):
    collator = SelfQuestioningCollator(tiny.tiny_processor(system_message=""), seed=3)
    rows = [row(r, 4) for r in range(8)]
    loader = DataLoader(rows, batch_size=4, collate_fn=collator, multiprocessing_context="fork", **workers)
    kinds = {}
    for epoch in (0, 1):
        collator.epoch.fill_(epoch)
        kinds[epoch] = [batch["turn_kinds"] for batch in loader]
        alone = [collator(rows[:4])["turn_kinds"], collator(rows[4:])["turn_kinds"]]
        assert all(torch.equal(*pair) for pair in zip(kinds[epoch], alone))
    assert not torch.equal((kinds[0][0] == QUESTION).sum(1), (kinds[1][0] == QUESTION).sum(1))
