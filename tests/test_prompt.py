"""The prompt contract: what is prompt, what is completion, and which token ids the model is trained on."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.contract import Template
from edgetune.project import BUILTIN_MODELS
from edgetune.prompt import Encoder

MODEL = BUILTIN_MODELS["edgetune/tiny-phi3"]
PHI3 = "<|user|>\n{question}<|end|>\n<|assistant|>\n{best answer}<|end|>"


def test_last_column_is_the_completion() -> None:
    """Everything before the last column is the prompt; column names may have spaces."""
    template = Template.parse(PHI3)

    row = {"question": "why {so}?", "best answer": "be{cause}"}
    assert template.prompt_text(row) == "<|user|>\nwhy {so}?<|end|>\n<|assistant|>\n"
    assert template.completion_text(row) == "be{cause}<|end|>"
    assert template.columns == ("question", "best answer")


@pytest.mark.parametrize("text", ["no column", "{only}", "{a} {b!r}", "{a} {b:>3}", "{} {b}", "{a} {b", "}{a}{b}"])
def test_unusable_templates_are_refused(text: str) -> None:
    """A template without two plainly named columns is refused with a sentence."""
    with pytest.raises(ValueError, match=r".{10}"):
        Template.parse(text)


@given(st.text(), st.text(), st.text(), st.text())
def test_prompt_and_completion_make_up_the_formatted_text(lead: str, middle: str, first: str, last: str) -> None:
    """For any literal text and any values, prompt + completion is what ``str.format`` gives."""
    literal = [text.replace("{", "{{").replace("}", "}}") for text in (lead, middle)]
    text = f"{literal[0]}{{a}}{literal[1]}{{b}}<|end|>"

    template = Template.parse(text)

    row = {"a": first, "b": last}
    assert template.prompt_text(row) + template.completion_text(row) == text.format(**row)


@given(st.text(), st.text(min_size=1))
def test_training_ids_start_with_the_ids_given_at_inference(question: str, answer: str) -> None:
    """For any texts, the trained row begins with exactly the prompt's own ids and decodes to the whole text."""
    encoder = Encoder(Template.parse(PHI3), MODEL)
    row = {"question": question, "best answer": answer}

    [[sample]] = encoder.encode([row])

    assert sample.ids[: sample.prompt_length] == encoder.prompt_ids(row)
    template = Template.parse(PHI3)
    text = template.prompt_text(row) + template.completion_text(row)
    assert encoder.tokenizer.decode(sample.ids, skip_special_tokens=False) == text
    assert sample.ids[-1] in encoder.end_ids


def test_white_space_behind_the_end_token_is_not_trained_on() -> None:
    """The completion ends with the end token even if the template goes on with a newline."""
    encoder = Encoder(Template.parse(PHI3 + "\n"), MODEL)

    [[sample]] = encoder.encode([{"question": "a", "best answer": "b"}])

    assert sample.ids[-1] == encoder.tokenizer.token_to_id("<|end|>")


def test_missing_end_token_is_noticed() -> None:
    """Without an end token in the template the sample does not end, and the right tokens are named."""
    encoder = Encoder(Template.parse(PHI3.removesuffix("<|end|>")), MODEL)

    fault, hint = encoder.format_fault()

    assert fault == "completions do not end with a token that stops the model"
    assert "<|end|>" in hint


def test_text_behind_the_end_token_is_noticed() -> None:
    """A template that goes on behind the end token would teach what the model never gets to say."""
    encoder = Encoder(Template.parse(PHI3 + " Thanks."), MODEL)

    assert encoder.format_fault()[0] == "the answer goes on behind <|end|>, where the model stops"


def test_model_folder_tells_its_end_tokens(tmp_path: Path) -> None:
    """``config.json`` counts only where ``generation_config.json`` says nothing."""
    from edgetune.prompt import end_token_ids

    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert end_token_ids(tmp_path) == {7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert end_token_ids(tmp_path) == {1, 2}
