"""The built-in tone dataset and base model: reproducible, complete, small, and apart from what judges them."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from edgetune.builtin import corpus, story_lines, tones
from edgetune.builtin.tone_templates import PATTERNS, SHARED
from edgetune.builtin.vocabulary import TONES

ROOT = Path(__file__).parents[1]
DATASETS = ROOT / "template" / "{% if dataset == 'tone' %}datasets{% endif %}"
MODEL = ROOT / "src" / "edgetune" / "builtin" / "tiny-phi3"
DOCUMENTS = 30_000


def read_rows(name: str) -> list[dict[str, str]]:
    """Read a dataset of the template."""
    return [json.loads(line) for line in (DATASETS / name).read_text(encoding="utf-8").splitlines()]


def plain(text: str) -> str:
    """Reduce a text to its lower-case words, so that punctuation cannot hide a match."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


@pytest.fixture(scope="module")
def pretraining() -> list[str]:
    """Return the first documents of the real pretraining text, reduced to words."""
    return [plain(text) for text in itertools.islice(corpus.documents(), DOCUMENTS)]


def test_shipped_datasets_are_what_the_generator_writes(tmp_path: Path) -> None:
    """Running the generator again gives the template's files, byte for byte."""
    assert tones.main([str(tmp_path)]) == 0

    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATASETS / name).read_bytes()


@pytest.mark.parametrize(("name", "least"), [("train.jsonl", 1200), ("eval.jsonl", 200)])
def test_datasets_are_large_balanced_and_without_duplicates(name: str, least: int) -> None:
    """Both files have enough rows, the four tones equally often, and no phrase twice."""
    rows = read_rows(name)

    counts = Counter(row["tone"] for row in rows)
    assert len(rows) >= least
    assert set(counts) == {"joy", "sadness", "fear", "surprise"}
    assert len(set(counts.values())) == 1
    assert len({plain(row["phrase"]) for row in rows}) == len(rows)
    assert all(list(row) == ["phrase", "tone"] for row in rows)
    assert all(4 <= len(row["phrase"].split()) <= 20 for row in rows)


def test_no_phrase_contains_the_name_of_a_tone() -> None:
    """The label has to be understood, not copied from the phrase."""
    phrases = [plain(row["phrase"]) for name in ("train.jsonl", "eval.jsonl") for row in read_rows(name)]

    assert [phrase for phrase in phrases if set(TONES) & set(phrase.split())] == []


def test_evaluation_rows_share_neither_phrase_nor_combination_with_training() -> None:
    """No evaluation phrase and no evaluation pair of template and subject is trained on."""
    training, evaluation = tones.tone_rows()

    assert not {plain(row.phrase) for row in training} & {plain(row.phrase) for row in evaluation}
    pairs = {(row.template, row.subject) for row in training}
    assert [row for row in evaluation if (row.template, row.subject) in pairs] == []


def test_rows_are_made_of_their_template_and_subject() -> None:
    """What a row says about its origin is true: the disjointness of combinations rests on it."""
    for row in itertools.chain(*tones.tone_rows()):
        fixed = re.split(r"\{\w+\}", row.template)
        assert row.template in PATTERNS[TONES.index(row.tone)]
        assert all(part.lower() in row.phrase.lower() for part in (*fixed, row.subject))


def test_shared_templates_occur_with_every_tone() -> None:
    """A shared template alone tells nothing about the tone."""
    training, _ = tones.tone_rows()

    seen = {(row.template, row.tone) for row in training}
    assert [(template, tone) for template in SHARED for tone in TONES if (template, tone) not in seen] == []


def test_pretraining_text_contains_no_evaluation_phrase(pretraining: list[str]) -> None:
    """None of the evaluation phrases occurs in the generated pretraining text."""
    text = "\n".join(pretraining)

    assert [row["phrase"] for row in read_rows("eval.jsonl") if plain(row["phrase"]) in text] == []


def test_pretraining_text_names_tones_only_in_word_tasks(pretraining: list[str]) -> None:
    """A document with the name of a tone is a task about words: no phrase is ever paired with its label."""
    named = [text for text in pretraining if set(TONES) & set(text.split())]

    tasks = r"repeat the word|say|copy|just answer|spell|give me the (first|second|third) one"
    assert named
    assert [text for text in named if not re.search(rf"\b({tasks})\b", text)] == []
    assert max(len(text.split()) for text in named) <= 25
    told = [line for row in (*story_lines.TOLD, *story_lines.WRITTEN, *story_lines.REPLIES) for line in row]
    assert [
        line for line in (*told, *story_lines.PLAIN, *story_lines.FRAMES) if set(TONES) & set(plain(line).split())
    ] == []


def test_corpus_is_the_same_for_the_same_seed() -> None:
    """The pretraining text depends on the seed alone."""
    first, again, other = (list(itertools.islice(corpus.documents(seed), 500)) for seed in (1, 1, 2))

    assert first == again
    assert first != other


def test_weights_are_small() -> None:
    """The shipped weights stay below ten megabytes."""
    assert 1_000_000 < (MODEL / "model.safetensors").stat().st_size <= 10_000_000


def test_special_tokens_are_single_tokens_and_any_text_survives() -> None:
    """The tokenizer keeps the turn marks whole and gives any text back unchanged."""
    transformers = pytest.importorskip("transformers", reason="needs the train extra")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)

    for token in corpus.SPECIAL_TOKENS:
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    text = "<|user|>\nNaïve 東京 🙂\t  x_1<|end|>\n<|assistant|>\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert rendered == "<|user|>\nHi<|end|>\n<|assistant|>\nYes.<|end|>\n<|endoftext|>"


def test_answers_end_at_the_end_tokens() -> None:
    """The generation config lists the ids of the end-of-turn and the end-of-text token."""
    transformers = pytest.importorskip("transformers", reason="needs the train extra")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)

    ends = json.loads((MODEL / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|end|>", "<|endoftext|>"]


def test_model_loads_and_answers_a_small_task() -> None:
    """The shipped model is a Phi-3 in bfloat16 which answers briefly and stops."""
    transformers = pytest.importorskip("transformers", reason="needs the train extra")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")

    prompt = "<|user|>\nWhat is the opposite of hot?<|end|>\n<|assistant|>\n"
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]

    assert type(model).__name__ == "Phi3ForCausalLM"
    assert str(model.dtype) == "torch.bfloat16"
    assert tokenizer.decode(answer) == "cold<|end|>"
