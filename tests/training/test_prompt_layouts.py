"""A language model with its own chat format, from its parts to answers: trained, merged, loaded again."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from processing_sq_llava import SYSTEM_MESSAGE
from sq_llava.checkpoints.compose import compose
from sq_llava.checkpoints.inspection import inspect
from sq_llava.checkpoints.load import load_checkpoint, merge_adapter
from sq_llava.inference.assistant import Assistant
from tests import runs, tiny
from tests.assistants import HISTORIES, assert_batch_equals_one_by_one, assert_converses_as_without_a_cache
from tests.chat_tokenizers import save_qwen3
from tests.checkpoints.test_chat_templates import TEMPLATE


END, DOCUMENT_END = "<|im_end|>", "<|endoftext|>"


def recorded(function, calls: list):
    def call(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return call


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    root = runs.make_parts(tmp_path_factory.mktemp("parts"))
    save_qwen3(root / "qwen3")
    return root


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory):
    """The trainer of a stage 2 from new parts, with the paper's system message and the data check."""
    settings = {"text_model_name_or_path": parts / "qwen3", "system_message": "paper", "doctor": "sample"}
    settings |= {"train_sampling_strategy": "group_by_length", "self_question_ratio": 1.0}
    return runs.train(parts, tmp_path_factory.mktemp("stage2") / "run", **settings)


@pytest.fixture(scope="module")
def assistant(trained, tmp_path_factory) -> Assistant:
    merged = tmp_path_factory.mktemp("merged")
    merge_adapter(trained.args.output_dir, str(merged))
    assert inspect(merged).sound and inspect(merged).markers["prompt_layout"] == "chatml"
    return Assistant(*load_checkpoint(str(merged)))


pytestmark = pytest.mark.slow


def test_stage_two_is_trained_on_answers_and_questions_of_the_models_own_layout(trained):
    batch = trained.data_collator([trained.train_dataset[1]])
    tokenizer = trained.processing_class.tokenizer
    text = tokenizer.decode(batch["input_ids"][0])
    exchange = f"What is this?{END}\n<|im_start|>assistant\n<think>\n\n</think>\n\nA dog 1.{END}\n"
    assert text.startswith(f"<|im_start|>system\n{SYSTEM_MESSAGE}{END}\n<|im_start|>user\n<image>")
    assert text.endswith(f"{exchange}<|im_start|>[vusr]\n{exchange}<|im_start|>[vusr]\n{exchange}")
    labels = batch["labels"][0]
    spoken = tokenizer.decode(labels[labels != -100])
    assert spoken == f"A dog 1.{END}" + f"What is this?{END}A dog 1.{END}" * 2


def test_merged_model_stops_at_the_delimiter_and_at_the_language_models_own_end(assistant):
    tokenizer, model = assistant.processor.tokenizer, assistant.model
    ends = tokenizer.convert_tokens_to_ids([END, DOCUMENT_END])
    assert model.generation_config.eos_token_id == ends
    for end in ends:

        def force(input_ids, scores, end=end):
            token = end if input_ids.shape[1] == 4 + 3 else 9
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(token), 0.0)

        output = model.generate(torch.tensor([[9, 8, 7, 6]]), max_new_tokens=8, logits_processor=[force])
        assert output[0].tolist() == [9, 8, 7, 6, 9, 9, 9, end]


def test_base_model_stops_at_the_delimiter_and_where_its_tokenizer_ends(parts, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", recorded(AutoTokenizer.from_pretrained, loaded))
    model, processor = compose(str(parts / "clip"), str(save_qwen3(tmp_path, base=True)), prototype_variant="none")
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids([END, DOCUMENT_END])
    assert len(loaded) == 1  # the tokenizer is loaded once


def test_merged_model_answers_in_batches_asks_and_converses_as_without_a_cache(assistant):
    image, history = tiny.picture(), HISTORIES[0]
    requests = [(image, "What is it?"), (None, "Hello."), (image, [*history, {"role": "user", "content": "Where?"}])]
    assert_batch_equals_one_by_one(assistant, requests, max_new_tokens=6)
    assert_converses_as_without_a_cache(assistant, image, history, num_turns=2)


def test_resumed_run_keeps_its_layout_with_the_recipes_system_message(parts, tmp_path):
    settings = {"text_model_name_or_path": parts / "qwen3", "prompt_layout": "chatml", "system_message": "Be brief."}
    runs.train(parts, tmp_path, **settings, max_steps=1, save_steps=1)
    resumed = runs.train(parts, tmp_path, **settings, max_steps=2, resume=True)
    assert resumed.state.global_step == 2 and resumed.processing_class.system_message == "Be brief."


def test_second_stage_keeps_the_layout_of_the_first(trained, parts, tmp_path):
    again = runs.train(parts, tmp_path / "run", Path(trained.args.output_dir), max_steps=1, prompt_layout="auto")
    processor, first = again.processing_class, trained.processing_class
    assert (processor.turn_format, processor.thought) == (first.turn_format, first.thought)
    assert processor.tokenizer.eos_token == END


def test_users_template_is_trained_with_and_saved(parts, tmp_path):
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    settings = {"chat_template_path": tmp_path / "mine.jinja", "self_question_ratio": 1.0, "max_steps": 1}
    settings |= {"train_sampling_strategy": "group_by_length"}
    trainer = runs.train(parts, tmp_path / "run", **settings)
    batch = trainer.data_collator([trainer.train_dataset[1]])
    tokenizer = trainer.processing_class.tokenizer
    assert tokenizer.decode(batch["input_ids"][0]).endswith("[vusr]What is this?</s>A:A dog 1.</s>")
    _, processor = load_checkpoint(str(tmp_path / "run"), trust_chat_template=True)
    assert processor.chat_template == TEMPLATE


def test_users_template_that_the_stage_cannot_use_is_refused(parts, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(TEMPLATE.replace("if plain", "if false"))
    with pytest.raises(ValueError, match="cannot use the chat template: it does not know plain=True"):
        runs.train(parts, tmp_path / "run", stage="align", chat_template_path=file)
    for wrong, error in (
        ({"chat_template_path": parts / "llama"}, "give a Jinja file .* prompt_layout auto does that"),
        ({"chat_template_path": file, "prompt_layout": "chatml"}, "and prompt_layout is 'chatml': remove one"),
    ):
        with pytest.raises(ValueError, match=error):
            runs.train(parts, tmp_path / "run", **wrong)
