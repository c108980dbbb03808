"""Texts in the files of a checkpoint that would do something in its card stay texts; damaged records are refused."""

import json
import re

import pytest
import yaml

from sq_llava.checkpoints.card import read_results, render_card
from sq_llava.checkpoints.provenance import read_provenance, write_provenance
from tests import tiny
from tests.limits import limited
from tests.released import edit_json


HOSTILE = "`<script>alert(1)</script>` [click](https://evil.test) ![](https://evil.test/a.png) {{ 7 * 7 }} | x"
HOSTILE += "\n\n# Title\n---\n"
STAGE = {"stage": "align", "data": [{"path": "a.json"}], "rows": 7, "steps": 3, "settings": {}, "versions": {}}
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefghij", "bcdefghijk")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    tiny.save_model(folder)
    return folder


def assert_harmless(text: str) -> None:
    body = text.partition("\n---\n")[2]
    without_code = re.sub(r"```.*?\n```|`[^`\n]*`", "", body, flags=re.DOTALL)
    assert "alert(1)" in body and "49" not in without_code
    assert "<script" not in without_code and "](https://evil" not in without_code
    assert "# Title" not in body.splitlines()
    assert yaml.safe_load(text.split("---\n")[1])["tags"][0] == "sq-llava"


def test_names_in_the_record_and_in_the_scores_are_only_texts_in_the_card(folder, tmp_path):
    stage = {**STAGE, "stage": HOSTILE, "data": [{"path": HOSTILE, "split": HOSTILE}]}
    stage |= {"settings": {HOSTILE: HOSTILE, "eos_token": "<|im_end|>"}, "versions": {HOSTILE: HOSTILE}}
    provenance = {"converted_from": HOSTILE, "converted_kind": HOSTILE, "stages": [stage]}
    write_provenance(folder, provenance)
    edit_json(folder / "processor_config.json", vusr_marker=HOSTILE)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["_name_or_path"] = HOSTILE
    (folder / "config.json").write_text(json.dumps(config))
    results = {
        "results": [{"task": HOSTILE, "metric": HOSTILE, "value": 1, "num": 2}],
        "date": HOSTILE,
        "command": HOSTILE,
    }
    card = str(render_card(folder, "org/name", results=results))
    assert_harmless(card)
    assert "`eos_token: <|im_end|>`" in card


def test_base_of_an_adapter_cannot_add_code_to_the_example_of_its_card(tmp_path):
    tiny.tiny_processor().save_pretrained(tmp_path)
    base = 'x", trust_remote_code=True)\nimport os; os.system("true")  # ' + HOSTILE
    settings = {"base_model_name_or_path": base, "revision": base, "modules_to_save": []}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    card = str(render_card(tmp_path, "."))
    assert "huggingface.co/x" not in card and "\nimport os" not in card
    for snippet in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        compile(snippet, "snippet", "exec")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("stages: 7", "stages is a int, not list"),
        ("stages: [7]", "stages, entry 0 is a int, not dict"),
        ("stages: [{stage: align}]", "stages, entry 0, data is a NoneType, not list"),
        ({"stages": [{**STAGE, "rows": "many"}]}, "stages, entry 0, rows is a str, not int"),
        ({"stages": [{**STAGE, "data": [{"path": 7}]}]}, "stages, entry 0, data, path is a int, not str"),
        ({"stages": [{**STAGE, "settings": {"a": {"b": 1}}}]}, "stages, entry 0, settings, a is a dict, not"),
        ("converted_from: {a: b}", "the content, converted_from is a dict"),
        ("a: [b", "expected ',' or ']'"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("[" * 700, "provenance.yaml"),
        (LAUGHS, "the content, b is a list"),
        ("stages: [{stage: x, settings: {a: *z}}]", "undefined alias"),
        ("a: b\n" * 300_000, "it has more than 1,048,576 bytes"),
        (b"a: \xff", "can't decode"),
    ],
)  # fmt: skip
def test_record_of_another_form_is_refused_in_one_line(tmp_path, content, error):
    content = yaml.safe_dump(content) if isinstance(content, dict) else content
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "provenance.yaml").write_bytes(data)
    with limited(5), pytest.raises(ValueError, match=error) as raised:
        read_provenance(tmp_path)
    assert "\n" not in str(raised.value) and "provenance.yaml" in str(raised.value)


@pytest.mark.parametrize(
    "content", ["[", "7", '"results"', '{"results": [7]}', '{"results": {"a": 1}}', "[" * 100_000]
)
def test_scores_of_another_form_are_refused(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json"):
        read_results(tmp_path / "results.json")
