"""Detailed descriptions of images, by a model of this library or by a model on a server; and the repair of texts.

    prompts = Prompts.read(PROMPTS / "curate")
    describer = LocalDescriber("runs/demo/model", DescribeSettings(), prompts, Path("descriptions.jsonl"))
    describer.describe_all({"17.png": Path("images/17.png")}).results["17.png"].text

If a description is short, or a server cut it off, the model is told once to continue, and the two texts are joined. A
local model's own tokenizer counts the length. A server may count a model's reasoning too, so the length of its text is
estimated: 4 tokens for 3 English words.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sq_llava.data.images import chat_part, open_image
from sq_llava.evaluation.results import hash_of_model
from sq_llava.generation.prompt_files import read_instructions, read_prompt_file
from sq_llava.generation.settings import DescribeSettings
from sq_llava.generation.text_rules import count_words
from sq_llava.inference.assistant import Assistant, load
from sq_llava.llm_client.asking import Asked, ask_all
from sq_llava.llm_client.client import ChatClient, ChatRequest, Journal, Messages, NotAsked, UnusableAnswer
from sq_llava.llm_client.replies import CUT_OFF
from sq_llava.resumable.resume import in_batches, work_in_batches
from sq_llava.resumable.run_note import RunNote
from sq_llava.stopping import INTERRUPTED


@dataclass(frozen=True)
class Prompts:
    """The texts of `describe.txt`, `continue.txt` and `repair.txt`, and the lines of `instructions.txt`."""

    describe: str
    go_on: str
    repair: str
    instructions: Sequence[str]

    @classmethod
    def read(cls, folder: Path) -> "Prompts":
        """
        Raises:
            ValueError: If a file is missing or empty.
        """
        names = ("describe.txt", "continue.txt", "repair.txt")
        texts = [read_prompt_file(folder / name, "curate").strip() for name in names]
        return cls(*texts, read_instructions(folder / "instructions.txt", "curate"))


@dataclass(frozen=True)
class Description:
    """The description, and its continuation if the model was told to continue."""

    first: str
    more: str | None = None

    @property
    def text(self) -> str:
        return " ".join(part.strip() for part in (self.first, self.more or "") if part.strip())


class ServerDescriber:
    """
    A model on a server that describes images.

    Args:
        client (`ChatClient`): Sends the requests and keeps the answers.
        prompts (`Prompts`): The prompts for describing and continuing.
        short (`int`): Maximum number of tokens of a description that is continued.
    """

    def __init__(self, client: ChatClient, prompts: Prompts, short: int):
        self.client = client
        self.prompts = prompts
        self.short = short
        self.name, self.hash = client.settings.model, None
        self.longest = 2 * client.settings.max_tokens

    def describe_all(self, images: Mapping[str, Path], note: RunNote | None = None) -> Asked:
        """Describes all images, which must open. The note of the run is written before the first description."""
        self.client.before_answer = None if note is None else note.write
        return ask_all(self.client, images, self._describe, "Describing")

    def kept(self, image: Path) -> Description | None:
        """The description of an earlier run, if it is complete."""
        try:
            return self._describe(image)
        except (NotAsked, UnusableAnswer):
            return None

    def requests_left(self, image: Path) -> Iterator[ChatRequest]:
        """All requests that an image may still need. The client must have `reads_only`."""
        try:
            self._describe(image)
        except UnusableAnswer:
            return
        except NotAsked as missing:
            yield missing.request
            messages = self._messages(image)
            if self.client.journal.get(self.client.request(messages).key) is None:
                yield self.client.request(_told_to_go_on(messages, "text" * self.short, self.prompts))

    def _describe(self, image: Path) -> Description:
        messages = self._messages(image)
        try:
            first = next(self.client.answers(messages, handled=[CUT_OFF]))
            if count_words(first) * 4 > self.short * 3:
                return Description(first)
        except UnusableAnswer as error:
            if error.fault != CUT_OFF or not error.text:
                raise
            first = error.text
        return Description(first, next(self.client.answers(_told_to_go_on(messages, first, self.prompts))))

    def _messages(self, image: Path) -> Messages:
        return [{"role": "user", "content": [chat_part(image), {"type": "text", "text": self.prompts.describe}]}]


class LocalDescriber:
    """
    A model of this library that describes images. The model is loaded only if a description is missing. The key of a
    description is a hash of the image file, the model's weights, the prompts and the settings.

    Args:
        model (`str`): Folder or Hub id.
        settings (`DescribeSettings`): Lengths, batch size, device and dtype.
        prompts (`Prompts`): The prompts for describing and continuing.
        journal_path (`Path`): File of the descriptions.
    """

    def __init__(self, model: str, settings: DescribeSettings, prompts: Prompts, journal_path: Path):
        self.model = model
        self.settings = settings
        self.prompts = prompts
        # Another process may be writing it: `describe_all` reads it again under the lock of the folder.
        self.journal = Journal(journal_path, reads_only=True)
        self.name, self.hash = model, hash_of_model(model)
        self.longest = 2 * settings.max_new_tokens
        self._depends_on = [self.hash, prompts.describe, prompts.go_on, settings.short, settings.max_new_tokens]

    def describe_all(self, images: Mapping[str, Path], note: RunNote | None = None) -> Asked:
        """Describes all images, which must open. The note of the run is written before the first description."""
        self.journal = Journal(self.journal.path)
        rest = {id: path for id, path in images.items() if self.kept(path) is None}
        failures: dict[str, str] = {}
        stopped = None
        if rest:
            try:
                self._describe(rest, failures, note)
            except KeyboardInterrupt:
                stopped = INTERRUPTED
        results = {id: said for id, path in images.items() if (said := self.kept(path)) is not None}
        return Asked(results, failures, len(images) - len(results) - len(failures), stopped)

    def kept(self, image: Path) -> Description | None:
        """The description of an earlier run."""
        line = self.journal.get(self._key(image))
        return None if line is None else Description(line["first"], line["more"])

    def requests_left(self, image: Path) -> Iterator[ChatRequest]:
        """No requests: a local model costs nothing."""
        return iter(())

    def _describe(self, images: Mapping[str, Path], failures: dict[str, str], note: RunNote | None) -> None:
        assistant = load(self.model, self.settings.device, self.settings.dtype)
        batches = in_batches(list(images.items()), self.settings.batch_size)
        for outcomes in work_in_batches(batches, partial(self._describe_batch, assistant), "Describing"):
            for (id, path), said, error in outcomes:
                if error is None:
                    if note is not None:
                        note.write()
                    self.journal.add({"key": self._key(path), "id": id, **asdict(said)})
                else:
                    failures[id] = error

    def _describe_batch(self, assistant: Assistant, batch: Sequence[tuple[str, Path]]) -> list[Description]:
        opened = [open_image(path) for _, path in batch]
        prompt, limit = self.prompts.describe, self.settings.max_new_tokens
        said = [Description(text) for text in assistant.answer_batch([(each, prompt) for each in opened], limit)]
        tokenizer = assistant.processor.tokenizer
        lengths = [len(tokenizer(each.first, add_special_tokens=False).input_ids) for each in said]
        short = [place for place, length in enumerate(lengths) if length <= self.settings.short]
        if not short:
            return said
        first = [{"role": "user", "content": prompt}]
        talks = [(opened[place], _told_to_go_on(first, said[place].first, self.prompts)) for place in short]
        for place, more in zip(short, assistant.answer_batch(talks, limit)):
            said[place] = replace(said[place], more=more)
        return said

    def _key(self, image: Path) -> str:
        content = hashlib.sha256(image.read_bytes()).hexdigest()
        return hashlib.sha256(json.dumps([content, *self._depends_on]).encode()).hexdigest()


class Repairer:
    """A language model on a server that repairs texts without seeing the images."""

    def __init__(self, client: ChatClient, prompts: Prompts):
        self.client = client
        self.prompts = prompts

    def repair(self, text: str) -> str:
        """The repaired text. An empty text is not sent."""
        return next(self.client.answers(self._messages(text))) if text else ""

    def requests_left(self, text: str) -> Iterator[ChatRequest]:
        """The requests that a text still needs. The client must have `reads_only`."""
        try:
            self.repair(text)
        except UnusableAnswer:
            return
        except NotAsked as missing:
            yield missing.request

    def _messages(self, text: str) -> Messages:
        return [{"role": "system", "content": self.prompts.repair}, {"role": "user", "content": text}]


def _told_to_go_on(messages: Messages, first: str, prompts: Prompts) -> list[dict[str, Any]]:
    return [*messages, {"role": "assistant", "content": first}, {"role": "user", "content": prompts.go_on}]
