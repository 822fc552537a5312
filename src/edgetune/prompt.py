"""The prompt contract: one object says what the model sees of a row and what it has to answer.

Everything before the last ``{column}`` of the text template is the prompt; the rest, up to and including
the end token, is the completion. Training, evaluation and inference take their token ids from here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

from edgetune.errors import failure

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Template:
    """A text template split at its last column."""

    prompt: str
    completion: str
    prompt_columns: tuple[str, ...]
    completion_column: str

    @classmethod
    def parse(cls, text: str) -> "Template":
        """Split ``text``. Raises ValueError with a sentence for the user when it is not a usable template."""
        parts = list(Formatter().parse(text))
        columns = [name for _, name, _, _ in parts if name is not None]
        if any(spec or conversion for _, _, spec, conversion in parts):
            raise ValueError("columns are inserted as they are: write {column} without ':' or '!'")
        if not all(columns):
            raise ValueError("every {} needs the name of a column inside; a literal brace is written twice")
        if bad := [name for name in columns if name is not None and (set(name) & set(".[]") or name.isdigit())]:
            raise ValueError(f"a column cannot be called {bad[0]!r} here: no dots, brackets or bare numbers")
        if len(columns) < 2:  # noqa: PLR2004
            raise ValueError("needs at least two columns: the last is the completion, the others make the prompt")
        split = max(i for i, part in enumerate(parts) if part[1] is not None)
        escaped = [
            literal.replace("{", "{{").replace("}", "}}") + ("" if name is None else "{" + name + "}")
            for literal, name, _, _ in parts
        ]
        lead = escaped[split].removesuffix("{" + columns[-1] + "}")
        return cls(
            prompt="".join(escaped[:split]) + lead,
            completion="{" + columns[-1] + "}" + "".join(escaped[split + 1 :]),
            prompt_columns=tuple(dict.fromkeys(columns[:-1])),
            completion_column=columns[-1],
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns a row needs, the completion last."""
        return (*self.prompt_columns, self.completion_column)

    def prompt_text(self, row: Mapping[str, str]) -> str:
        """Return what the model is given."""
        return self.prompt.format(**row)

    def completion_text(self, row: Mapping[str, str]) -> str:
        """Return what the model has to say, end token included."""
        return self.completion.format(**row)


@dataclass(frozen=True)
class Sample:
    """Token ids of one row; the first ``prompt_length`` of them are the prompt."""

    ids: Sequence[int]
    prompt_length: int


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
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        ids = content.get("eos_token_id") if isinstance(content, dict) else None
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()


class Encoder:
    """A template together with a model's tokenizer and end tokens."""

    def __init__(self, template: Template, model_folder: Path) -> None:
        self.template = template
        self.tokenizer = load_tokenizer(model_folder)
        self.end_ids = end_token_ids(model_folder)

    def texts_to_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise without adding anything: the template carries every special token literally."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def prompt_ids(self, row: Mapping[str, str]) -> list[int]:
        """Return the ids generation starts from."""
        return self.texts_to_ids([self.template.prompt_text(row)])[0]

    def encode(self, rows: Sequence[Mapping[str, str]]) -> list[Sample]:
        """Tokenise rows for training."""
        prompts = [self.template.prompt_text(row) for row in rows]
        completions = [self.template.completion_text(row) for row in rows]
        prompt_ids = self.texts_to_ids(prompts)
        whole_ids = self.texts_to_ids([p + c for p, c in zip(prompts, completions, strict=True)])
        return [
            self._sample(prompt, whole, completion)
            for prompt, whole, completion in zip(prompt_ids, whole_ids, completions, strict=True)
        ]

    def _sample(self, prompt: list[int], whole: list[int], completion: str) -> Sample:
        if whole[: len(prompt)] != prompt:
            # A token straddles the border. At inference the model is given the prompt's own ids, so they
            # are what it must be trained on.
            whole = prompt + self.texts_to_ids([completion])[0]
        return Sample(self._up_to_end_token(whole, len(prompt)), len(prompt))

    def _up_to_end_token(self, ids: list[int], prompt_length: int) -> list[int]:
        ends = [i for i in range(prompt_length, len(ids)) if ids[i] in self.end_ids]
        if ends and not self.tokenizer.decode(ids[ends[-1] + 1 :], skip_special_tokens=False).strip():
            return ids[: ends[-1] + 1]
        return ids

    def ends(self, sample: Sample) -> bool:
        """Tell whether the completion ends with a token that stops generation."""
        return len(sample.ids) > sample.prompt_length and sample.ids[-1] in self.end_ids

    def end_tokens(self) -> list[str]:
        """Return the end tokens as text."""
        return [self.tokenizer.id_to_token(i) or f"id {i}" for i in sorted(self.end_ids)]
