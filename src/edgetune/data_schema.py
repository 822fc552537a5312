"""The keys of a data config that the native engine honours: where rows come from and how they become text."""

import re
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from edgetune.contract import Contract, Conversation, Template


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]
"""A text or several, as Olive takes them."""


class Strict(BaseModel):
    """A part of the workflow file: keys that nothing would honour are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class WrongKeyError(ValueError):
    """What several keys together show to be wrong with one of them."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


FILE_FORMATS = ("json", "csv", "parquet")
"""What ``data_name`` says of files; anything else is the id of a data set on the Hub."""

_NOT_A_FORMAT = {"jsonl": "json", "ndjson": "json", "tsv": "csv", "excel": "csv", "text": "json", "txt": "json"}
"""Names people try, and the format to use."""

_KEYS_OF_FORMATS = {
    "data_files": FILE_FORMATS,
    "delimiter": ("csv",),
    "encoding": ("json", "csv"),
}


class LoadDataset(Strict):
    """Arguments of ``datasets.load_dataset``. Olive's default split, ``validation``, fits no file."""

    data_name: str
    data_files: Texts | None = None
    split: str
    subset: str | None = None
    revision: str | None = None
    delimiter: str = ","
    encoding: str = "utf-8"

    @property
    def is_hub(self) -> bool:
        """Whether the rows come from the Hub rather than from files."""
        return self.data_name not in FILE_FORMATS

    @property
    def whole(self) -> "LoadDataset":
        """The same without the slice."""
        return self.model_copy(update={"split": self.split.partition("[")[0]})

    @field_validator("data_files", mode="before")
    @classmethod
    def _are_files_of_this_machine(cls, value: Any) -> Any:
        if isinstance(value, dict):
            raise ValueError('write a file, or a list of files; the part for training is then called "split": "train"')  # noqa: TRY004 - pydantic turns only ValueError into a problem
        names = _as_list(value)
        if isinstance(names, list) and any("://" in str(name) for name in names):
            raise ValueError("addresses are not fetched: download the file into datasets/ first")
        return value

    @field_validator("data_name")
    @classmethod
    def _is_a_format_or_an_id(cls, value: str) -> str:
        if value in _NOT_A_FORMAT:
            more = ' and "delimiter": "\\t"' if value == "tsv" else ""
            raise ValueError(f"there is no format {value!r}; for such files it is {_NOT_A_FORMAT[value]!r}{more}")
        if value not in FILE_FORMATS and value.lower() in FILE_FORMATS:
            raise ValueError(f"formats are written in small letters: {value.lower()!r}")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", value):
            raise ValueError(f"neither a format ({', '.join(FILE_FORMATS)}) nor the id of a data set on the Hub")
        return value

    @field_validator("split")
    @classmethod
    def _is_one_split(cls, value: str) -> str:
        if not re.fullmatch(r"\w[\w.-]*(\[(-?\d+%?)?:(-?\d+%?)?\])?", value):
            raise ValueError("a split is written like train, train[:90%] or train[100:]")
        return value

    @field_validator("delimiter")
    @classmethod
    def _is_one_mark(cls, value: str) -> str:
        if len(value) != 1 or value in '\r\n"\0':
            raise ValueError("a delimiter is one character, such as ; or | or \\t, and neither a quote nor a line end")
        return value

    @field_validator("encoding")
    @classmethod
    def _is_an_encoding(cls, value: str) -> str:
        try:
            "a".encode(value).decode(value, errors="surrogateescape")
        except (LookupError, UnicodeError):
            raise ValueError(f"there is no encoding {value!r}; common ones are utf-8, utf-16 and cp1252") from None
        return value

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Self:
        if not self.is_hub and not self.data_files:
            raise WrongKeyError("data_files", f"missing or empty: which {self.data_name} files?")
        if not self.is_hub and not re.match(r"train(\[|$)", self.split):
            raise WrongKeyError("split", "files have one split, called train; a part of it is written train[:90%]")
        for key in sorted(self.model_fields_set):
            if self.data_name not in _KEYS_OF_FORMATS.get(key, (self.data_name,)):
                raise WrongKeyError(key, f"has no meaning for {self.data_name!r}, only for {_KEYS_OF_FORMATS[key]}")
            if key in ("subset", "revision") and not self.is_hub:
                raise WrongKeyError(key, "is for data sets on the Hub, not for files")
        return self


class PreProcess(Strict):
    """How rows become text. Olive's own defaults join rows and add special tokens, so both must be set."""

    text_template: str | None = None
    text_cols: Texts = ("text",)
    chat_template: bool | str | None = None
    message_col: str = "messages"
    strategy: Literal["line-by-line"]
    add_special_tokens: Literal[False]
    max_seq_len: Annotated[int, Field(ge=2)] = 1024
    max_samples: Annotated[int, Field(ge=1)] | None = None
    # These two change only time and memory; the native engine pads each batch to its longest row.
    pad_to_max_len: bool = True
    use_attention_mask: bool = True

    @property
    def contract_key(self) -> str:
        """The key that holds the prompt contract."""
        return "chat_template" if self.chat_template else "text_template" if self.text_template else "text_cols"

    @cached_property
    def contract(self) -> Contract:
        """The prompt contract. Columns without a template are joined by spaces, as Olive does."""
        if self.chat_template:
            return Conversation(self.message_col, self.chat_template if isinstance(self.chat_template, str) else None)
        return Template.parse(self.text_template or " ".join(f"{{{column}}}" for column in self.text_cols))

    @model_validator(mode="after")
    def _has_one_usable_contract(self) -> Self:
        unused = ("text_template", "text_cols") if self.chat_template else ("message_col",)
        for key in unused:
            if key in self.model_fields_set:
                raise WrongKeyError(key, f"has no effect {'beside' if self.chat_template else 'without'} chat_template")
        try:
            _ = self.contract
        except ValueError as error:
            raise WrongKeyError(self.contract_key, str(error)) from None
        return self


class DataConfig(Strict):
    """A named data set."""

    name: str
    type: Literal["HuggingfaceContainer"]
    load_dataset_config: LoadDataset
    pre_process_data_config: PreProcess

    @field_validator("name")
    @classmethod
    def _is_a_name_for_olive(cls, value: str) -> str:
        if not re.fullmatch("[A-Za-z0-9_]+", value):
            raise ValueError("a data set is named with letters, digits and _ only")
        return value

    @property
    def contract(self) -> Contract:
        """The prompt contract of this data."""
        return self.pre_process_data_config.contract
