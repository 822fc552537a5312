"""The prompt contract: what of a row the model is given, and what it has to answer.

With a text template, everything before the last ``{column}`` is the prompt; the rest, up to and including the
end token, is the completion. With chats, the assistant's turns are the completions. No tokenizer is needed
here, so that rows can be checked before a base model is there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import Any, Protocol

from edgetune.errors import Problem, failure, first_line, missing_extra

Turn = tuple[str, str]
"""The text the model is given and the text it has to answer with."""


class Contract(Protocol):
    """What a row must have, and which part of it is the answer."""

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns a row needs."""

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """The columns a question needs."""

    def faults(self, values: Any, *, asking: bool = False) -> list[Problem]:
        """Return what is wrong with a row (with a question, when ``asking``); the problems have no place yet."""

    def exchanges(self, values: Any) -> list[Turn]:
        """Return what tells one question from another, and its answer, without the template's text.

        A chat has one for each answer; two chats that share a question share the first of them.
        """

    def texts(self, values: Any) -> tuple[list[str], list[str]]:
        """Return the row's own texts: those that are given, and those that are learned."""

    def example(self) -> dict[str, Any]:
        """Return a row that is as short as can be."""

    def question(self, text: str | None, given: Mapping[str, str], said: Sequence[Turn] = ()) -> dict[str, Any]:
        """Return the row that asks ``text``, with the columns that are ``given``.

        ``said``: what was asked and answered before; only a conversation goes on from there. Raises EdgetuneError
        when that makes no question.
        """

    def filled(self, text: str) -> dict[str, Any]:
        """Return a question with ``text`` wherever one goes."""

    def shown(self, values: Mapping[str, Any]) -> str:
        """Return a question as it is shown beside its answer."""

    def in_model(self, folder: Path) -> "Format":
        """Return the contract as the model in ``folder`` reads it."""


class Format(Protocol):
    """A contract in the format of a model."""

    def prompt_text(self, row: Mapping[str, Any]) -> str:
        """Return what the model is given."""

    def turns(self, row: Mapping[str, Any]) -> list[Turn]:
        """Return each text to be learned, end token included, with the text before it."""


def lacks(column: str) -> str:
    """Return how a missing column is called in a problem."""
    return f"the column {column!r} is missing"


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

    @cached_property
    def literals(self) -> str:
        """The text around the columns."""
        return " ".join(literal for literal, *_ in Formatter().parse(self.prompt + self.completion))

    def faults(self, values: Any, *, asking: bool = False) -> list[Problem]:
        """Check that every column holds a text, and that the row is no repeated header."""
        columns = self.prompt_columns if asking else self.columns
        if not isinstance(values, dict):
            return [Problem("the row is not a JSON object", hint='write it as {"column": "text", …}')]
        faults = [fault for column in columns if (fault := _text_fault(column, values))]
        if not faults and not asking and all(values[column].strip().lower() == column.lower() for column in columns):
            return [Problem("the row repeats the names of the columns", hint="remove this header row")]
        return faults

    def exchanges(self, values: Any) -> list[Turn]:
        """Return the prompt's columns as one text, and the completion."""
        prompt = [values[column] for column in self.prompt_columns]
        return [(prompt[0] if len(prompt) == 1 else json.dumps(prompt), values[self.completion_column])]

    def texts(self, values: Any) -> tuple[list[str], list[str]]:
        """Return the texts of the prompt's columns, and the completion."""
        return [values[column] for column in self.prompt_columns], [values[self.completion_column]]

    def example(self) -> dict[str, Any]:
        """Return a row of single letters."""
        return dict.fromkeys(self.columns, "a")

    def question(self, text: str | None, given: Mapping[str, str], _said: Sequence[Turn] = ()) -> dict[str, Any]:
        """Put ``text`` into the one prompt column that is not given. Raises EdgetuneError when that does not fit."""
        left = [column for column in self.prompt_columns if column not in given]
        if foreign := [column for column in given if column not in self.prompt_columns]:
            raise failure(f"the prompt has no column {foreign[0]!r}", hint=f"it has: {', '.join(self.prompt_columns)}")
        if text is not None and not left:
            hint = "leave the text out, or one of --set"
            raise failure(f"all columns of the prompt are given ({', '.join(given)}): the text fills none", hint=hint)
        if len(left) > (0 if text is None else 1):
            raise failure(
                f"the prompt is made of the columns {', '.join(self.prompt_columns)}; not filled: {', '.join(left)}",
                hint="a text fills one, --set COLUMN=VALUE another; or use --prompts FILE.jsonl with all of them",
            )
        return {column: given.get(column, text) for column in self.prompt_columns}

    def filled(self, text: str) -> dict[str, Any]:
        """Return a row with ``text`` in every prompt column."""
        return dict.fromkeys(self.prompt_columns, text)

    def shown(self, values: Mapping[str, Any]) -> str:
        """Return the texts of the prompt's columns."""
        return " | ".join(values[column] for column in self.prompt_columns)

    def in_model(self, _folder: Path) -> "Template":
        """Return the template itself, which carries every special token literally."""
        return self

    def prompt_text(self, row: Mapping[str, Any]) -> str:
        """Return what the model is given."""
        return self.prompt.format(**row)

    def completion_text(self, row: Mapping[str, Any]) -> str:
        """Return what the model has to say, end token included."""
        return self.completion.format(**row)

    def turns(self, row: Mapping[str, Any]) -> list[Turn]:
        """Return the one prompt and completion of a row."""
        return [(self.prompt_text(row), self.completion_text(row))]


_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def _text_fault(column: str, values: Mapping[str, Any]) -> Problem | None:
    if column not in values:
        return Problem(lacks(column), hint="complete the row or remove it")
    value = values[column]
    if value is None or (isinstance(value, str) and not shows(value)):
        return Problem(f"the column {column!r} is empty", hint="complete the row or remove it")
    if isinstance(value, str):
        return None
    kind = _KINDS.get(type(value), f"a {type(value).__name__}")
    hint = 'make texts of them, such as "1" instead of 1; a label is clearest as a word'
    return Problem(f"the column {column!r} is {kind}, not a text", hint=hint)


def shows(text: str) -> bool:
    """Tell whether a text has anything to be seen: neither white space nor characters without width."""
    return bool(text.strip()) and (text.isascii() or any(c.isprintable() and not c.isspace() for c in text))


_BESIDE_MESSAGES = ("tools", "documents")
"""What transformers hands to a chat template beside the messages, out of columns with these names. Not so here."""


@dataclass(frozen=True)
class Conversation:
    """Rows with a list of messages in one column, written in the chat template of the model or in the given one."""

    column: str
    chat_template: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The column with the messages."""
        return (self.column,)

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """The column with the messages; a question's last one is the user's."""
        return (self.column,)

    def faults(self, values: Any, *, asking: bool = False) -> list[Problem]:
        """Check the form and order of messages, that there is something to learn, and that nothing is left out."""
        if not isinstance(values, dict):
            return [Problem("the row is not a JSON object", hint=f'write it as {{"{self.column}": […]}}')]
        messages = values.get(self.column)
        if messages is None:
            return [Problem(lacks(self.column), hint="complete the row or remove it")]
        hint = 'messages are [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'
        if not isinstance(messages, list) or not messages:
            return [Problem(f"the column {self.column!r} is not a list of messages", hint=hint)]
        faults = [
            Problem(f"message {number} {fault}", hint=hint)
            for number, message in enumerate(messages, start=1)
            if (fault := _message_fault(message))
        ]
        faults += [
            Problem(f"the column {name!r} is not written into chats here", hint="remove it, or rows that need it")
            for name in _BESIDE_MESSAGES
            if name != self.column and values.get(name) not in (None, "", "[]", [], {})
        ]
        return faults or _order_faults([message["role"] for message in messages], asking=asking)

    def exchanges(self, values: Any) -> list[Turn]:
        """Return for each answer all messages before it as JSON, and its text."""
        said = [(message["role"], message["content"]) for message in values[self.column]]
        return [(json.dumps(said[:at]), text) for at, (role, text) in enumerate(said) if role == "assistant"]

    def texts(self, values: Any) -> tuple[list[str], list[str]]:
        """Return what the others say, and what the assistant says."""
        said = [(message["role"] == "assistant", message["content"]) for message in values[self.column]]
        return [text for own, text in said if not own], [text for own, text in said if own]

    def example(self) -> dict[str, Any]:
        """Return a conversation of single letters."""
        return {self.column: [{"role": role, "content": "a"} for role in ("user", "assistant")]}

    def question(self, text: str | None, given: Mapping[str, str], said: Sequence[Turn] = ()) -> dict[str, Any]:
        """Return the conversation so far with ``text`` at its end. Raises EdgetuneError when columns are given."""
        if given or text is None:
            message = "the rows of this project are chats, which have no columns for --set to fill"
            raise failure(message, hint="give a text, or use --prompts with a list of messages on each line")
        turns = [*(part for turn in said for part in zip(("user", "assistant"), turn, strict=True)), ("user", text)]
        return {self.column: [{"role": role, "content": content} for role, content in turns]}

    def filled(self, text: str) -> dict[str, Any]:
        """Return a conversation that begins with ``text``."""
        return {self.column: [{"role": "user", "content": text}]}

    def shown(self, values: Mapping[str, Any]) -> str:
        """Return what was said last."""
        return str(values[self.column][-1]["content"])

    def in_model(self, folder: Path) -> "_Chat":
        """Return the conversation in the chat template. Raises EdgetuneError when the model has none."""
        return _Chat(self, folder)


def _message_fault(message: Any) -> str:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        return "has no role and content"
    if message["role"] not in ("system", "user", "assistant"):
        return f"has the role {message['role']!r}, which is none of system, user, assistant"
    content = message["content"]
    return "" if isinstance(content, str) and shows(content) else "has no text"


def _order_faults(roles: list[str], *, asking: bool) -> list[Problem]:
    """Return the first place where the turns are not: system (or not), then user and assistant in turn."""
    turns = roles[1:] if roles[0] == "system" else roles
    for number, role in enumerate(turns, start=1 + len(roles) - len(turns)):
        expected = ("user", "assistant")[(number - 1 - len(roles) + len(turns)) % 2]
        if role != expected:
            message = f"message {number} is from {role} where {expected} is due"
            return [Problem(message, hint="after an optional system message, user and assistant take turns")]
    last = "user" if asking else "assistant"
    if "assistant" not in turns and not asking:
        return [Problem("the conversation has no assistant turn: there is nothing to learn", hint="remove the row")]
    if turns[-1:] != [last]:
        hint = "remove what follows the last answer" if last == "assistant" else "end with the user's question"
        return [Problem(f"the conversation does not end with a turn of the {last}", hint=hint)]
    return []


class _Chat:
    """Conversations as transformers writes them in a model's chat template."""

    def __init__(self, contract: Conversation, folder: Path) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise missing_extra("train", error) from None
        self.column = contract.column
        self.template = contract.chat_template
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if self.template is None and not self.tokenizer.chat_template:
            raise failure(
                f"the model in {folder.name} has no chat template",
                hint='choose an instruct model, or give one as "chat_template": "…" in pre_process_data_config',
            )

    def prompt_text(self, row: Mapping[str, Any]) -> str:
        """Return the conversation up to where the assistant answers."""
        return self._text(row[self.column], asking=True)

    def turns(self, row: Mapping[str, Any]) -> list[Turn]:
        """Return a turn for each answer. Raises EdgetuneError when the chat template does not put it last."""
        messages, turns = row[self.column], []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._text(messages[:number], asking=True)
                whole = self._text(messages[: number + 1], asking=False)
                if not whole.startswith(prompt):
                    raise failure(
                        "the chat template does not continue its own generation prompt with the answer",
                        hint="use text_template instead, or another chat_template",
                    )
                turns.append((prompt, whole[len(prompt) :]))
        return turns

    def _text(self, messages: list[dict[str, str]], *, asking: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asking, chat_template=self.template
            )
        except Exception as error:
            hint = "it may not know system messages; use text_template, or another chat_template"
            raise failure(f"the chat template refuses a conversation: {first_line(error)}", hint=hint) from error
        return str(text)
