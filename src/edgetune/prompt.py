"""Token ids: one object turns a row into what the model is given and what it learns, for every step alike.

Training, evaluation and inference take their token ids from here; the text comes from :mod:`edgetune.contract`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.contract import Contract, Template, Turn
from edgetune.errors import failure

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPECIAL = re.compile(r"<\|[^\s<>|]+\|>|<\uff5c[^\s<>\uff5c]+\uff5c>|</?s>|<(?:bos|eos|start_of_turn|end_of_turn)>")
_FAMILIES = {
    "Phi-3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "ChatML": ("<|im_start|>", "<|im_end|>"),
    "Llama 3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "Gemma": ("<start_of_turn>", "<end_of_turn>"),
    "Mistral": ("[INST]", "[/INST]", "</s>"),
}
"""Special tokens by the name of the prompt format that uses them."""


@dataclass(frozen=True)
class Sample:
    """Token ids of a row, and for each of them 1 where it is learned and 0 where it is given."""

    ids: Sequence[int]
    learned: bytes

    @property
    def prompt_length(self) -> int:
        """How many tokens are given before the first learned one."""
        return self.learned.find(1) if 1 in self.learned else len(self.ids)


def load_tokenizer(folder: Path) -> "Tokenizer":
    """Load a model folder's ``tokenizer.json``, the file that every backend reads."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise failure(f"{path} cannot be read as a tokenizer: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def end_token_ids(folder: Path) -> frozenset[int]:
    """Return the ids that end an answer of the model in ``folder``, as the exported model will know them.

    ``generation_config.json`` wins over ``config.json``, as in transformers and the ONNX builder.
    """
    for name in ("generation_config.json", "config.json"):
        if (ids := _read(folder / name).get("eos_token_id")) is not None:
            return frozenset(number for number in (ids if isinstance(ids, list) else [ids]) if isinstance(number, int))
    return frozenset()


def context_length(folder: Path) -> int | None:
    """Return how many tokens the model in ``folder`` can read; None when it does not say."""
    length = _read(folder / "config.json").get("max_position_embeddings")
    return length if isinstance(length, int) else None


def _read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return content if isinstance(content, dict) else {}


class Encoder:
    """A contract together with a model's tokenizer and end tokens."""

    def __init__(self, contract: Contract, model_folder: Path) -> None:
        self.contract = contract
        self.format = contract.in_model(model_folder)
        self.tokenizer = load_tokenizer(model_folder)
        self.end_ids = end_token_ids(model_folder)
        self.context = context_length(model_folder)

    def texts_to_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise without adding anything: the text carries every special token literally."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def prompt_ids(self, row: Mapping[str, Any]) -> list[int]:
        """Return the ids generation starts from."""
        return self.texts_to_ids([self.format.prompt_text(row)])[0]

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[list[Sample]]:
        """Tokenise rows for training: one sample a row, or one an answer where an answer changes what is before it.

        (Some chat templates leave the reasoning out of all answers but the last.)
        """
        turns = [self.format.turns(row) for row in rows]
        samples = iter(self._encode_turns([turn for of_row in turns for turn in of_row]))
        return [_joined([next(samples) for _ in of_row]) for of_row in turns]

    def _encode_turns(self, turns: Sequence[Turn]) -> list[Sample]:
        prompt_ids = self.texts_to_ids([prompt for prompt, _ in turns])
        whole_ids = self.texts_to_ids([prompt + completion for prompt, completion in turns])
        return [
            self._sample(prompt, whole, completion)
            for prompt, whole, (_, completion) in zip(prompt_ids, whole_ids, turns, strict=True)
        ]

    def _sample(self, prompt: list[int], whole: list[int], completion: str) -> Sample:
        if whole[: len(prompt)] != prompt:
            # A token straddles the border. At inference the model is given the prompt's own ids, so they
            # are what it must be trained on.
            whole = prompt + self.texts_to_ids([completion])[0]
        ids = self._up_to_end_token(whole, len(prompt))
        return Sample(ids, bytes(len(prompt)) + b"\1" * (len(ids) - len(prompt)))

    def _up_to_end_token(self, ids: list[int], prompt_length: int) -> list[int]:
        """Cut what a template writes behind the end token; text behind it stays, to be told by :meth:`format_fault`."""
        for at in range(prompt_length, len(ids) - 1):
            if ids[at] in self.end_ids:
                rest = [token for token in ids[at + 1 :] if token not in self.end_ids]
                return ids if self.tokenizer.decode(rest).strip() else ids[: at + 1]
        return ids

    def format_fault(self) -> tuple[str, str]:
        """Return what is wrong with the format itself, as the shortest row shows it, and the remedy; or empty texts."""
        sample = self.encode([self.contract.example()])[0][-1]
        ids, start = sample.ids, sample.prompt_length
        if len(ids) > 1 and ids[0] == ids[1] == self.begin_id:
            return f"the text begins with {self.tokenizer.id_to_token(ids[0])} twice", "write it once"
        if at := next((i for i in range(start, len(ids) - 1) if ids[i] in self.end_ids), None):
            token = self.tokenizer.id_to_token(ids[at])
            return f"the answer goes on behind {token}, where the model stops", f"let it end with {token}"
        if ids[-1] in self.end_ids:
            return "", ""
        ends = " or ".join(self.tokenizer.id_to_token(i) or f"id {i}" for i in sorted(self.end_ids))
        hint = f"let text_template end with {ends or 'an end token (this model defines none)'}"
        return "completions do not end with a token that stops the model", hint

    def special_token(self, texts: Sequence[str]) -> str:
        """Return a special token that stands literally in one of these texts; empty when there is none."""
        return next((found[0] for text in texts if (found := self._special.search(text))), "")

    @cached_property
    def _special(self) -> re.Pattern[str]:
        added = self.tokenizer.get_added_tokens_decoder().items()
        names = [token.content for number, token in added if token.special or number in self.end_ids]
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    @cached_property
    def begin_id(self) -> int | None:
        """The token the tokenizer itself puts before a text; None when it puts none."""
        bare, whole = (self.tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
        return int(whole[0]) if whole[:1] != bare[:1] else None

    def foreign_tokens(self) -> list[str]:
        """Return the special tokens of a text template that this tokenizer does not know as single tokens."""
        text = self.contract.literals if isinstance(self.contract, Template) else ""
        return [name for name in dict.fromkeys(_SPECIAL.findall(text)) if not self._is_token(name)]

    def prompt_format(self) -> str:
        """Say which prompt format the model was made for, as far as its special tokens tell."""
        for name, tokens in _FAMILIES.items():
            if all(map(self._is_token, tokens)):
                return f"this model's prompt format is {name}: {' '.join(tokens)}"
        added = [token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]
        return f"this model's special tokens are: {' '.join(added[:20]) or 'none'}"

    def lacks_begin(self) -> str:
        """Return the token that a text template ought to begin with and does not; empty when all is well."""
        token = "" if self.begin_id is None else str(self.tokenizer.id_to_token(self.begin_id))
        contract = self.contract
        return token if isinstance(contract, Template) and not contract.prompt.startswith(token) else ""

    def _is_token(self, text: str) -> bool:
        return [self.tokenizer.token_to_id(text)] == self.tokenizer.encode(text, add_special_tokens=False).ids


def _joined(samples: list[Sample]) -> list[Sample]:
    """Make one sample of the answers of a conversation if each is given just what it would be given at inference."""
    last = samples[-1]
    if any(last.ids[: len(sample.ids)] != sample.ids for sample in samples):
        return samples
    learned = bytearray(last.learned)
    for sample in samples[:-1]:
        learned[sample.prompt_length : len(sample.ids)] = sample.learned[sample.prompt_length :]
    return [Sample(last.ids, bytes(learned))]
