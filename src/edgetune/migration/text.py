"""How rows became text, with tokens added and rows joined → a template that carries every special token."""

import re
from string import Formatter
from typing import Any

from edgetune.data_schema import PreProcess
from edgetune.migration.draft import Draft, Old, Part, Section

_SPECIAL: tuple[tuple[str, str, str], ...] = (
    (r"phi-?[34]", "", "<|end|>"),
    (r"phi-?[12]|qwen", "", "<|endoftext|>"),
    (r"smollm2.*instruct", "", "<|im_end|>"),
    (r"smollm", "", "<|endoftext|>"),
    (r"llama-?3.*instruct", "<|begin_of_text|>", "<|eot_id|>"),
    (r"llama-?3", "<|begin_of_text|>", "<|end_of_text|>"),
    (r"gemma.*-it", "<bos>", "<end_of_turn>"),
    (r"gemma", "<bos>", "<eos>"),
    (r"llama|mistral|mixtral|zephyr", "<s>", "</s>"),
)
"""Models by their ids, the token their tokenizers put before a text, and one they stop at."""

_ENDS_SPECIAL = re.compile(r"(<\|[^|<>]+\|>|</s>|<end_of_turn>|<eos>)\s*$")


def pre_process(draft: Draft, given: Section, model: str) -> Part:
    """Return today's ``pre_process_data_config`` for the base model with this id."""
    part = Part(given.place)
    given.carry(part, ("chat_template",))
    if part.get("chat_template"):
        _chat(draft, given, part)
    else:
        _text(draft, given, part, model)
    kind = given.take("dataset_type")
    if kind:
        draft.left_out(kind.place)
    _one_row_each(draft, given, part)
    _lengths(draft, given, part)
    given.carry(part, ("max_samples", "pad_to_max_len"))
    mask = given.take("use_attention_mask")
    if mask and mask.value is True:
        part.put("use_attention_mask", True, mask.place)  # noqa: FBT003 - the value of the key
    elif mask:
        draft.left_out(mask.place)
    for key in ("model_name", "task", "trust_remote_code"):
        if old := given.take(key):
            draft.left_out(old.place, "the base model says so")
    given.leave_rest(PreProcess.model_fields, "edgetune makes texts without it")
    return part


def _chat(draft: Draft, given: Section, part: Part) -> None:
    given.carry(part, ("message_col",))
    for key in ("text_template", "text_cols"):
        if old := given.take(key):
            draft.left_out(old.place, "chat_template takes its place")
    added = given.take("add_special_tokens")
    if added is None or added.value is not False:
        place = added.place if added else given.place
        draft.changed(place, "add_special_tokens", reason="the chat template writes the special tokens")
    part.put("add_special_tokens", False, added.place if added else None)  # noqa: FBT003 - the value of the key


def _text(draft: Draft, given: Section, part: Part, model: str) -> None:
    """Make the template from itself, from pairs of columns, or from columns."""
    columns = given.take("text_cols")
    template = given.take("text_template") or _of_pair(draft, given) or _of_columns(draft, columns)
    if template is None:
        place = given.places.get("text_formatting_func", columns.place if columns else given.place)
        hint = 'write a text_template such as "<|user|>\\n{question}<|end|>\\n<|assistant|>\\n{answer}<|end|>"'
        draft.refused(place, "edgetune learns answers: it needs a column that is asked and one that is answered", hint)
        return
    text = str(template.value)
    if columns and template.place != columns.place and (used := _columns_of(text)):
        names = [columns.value] if isinstance(columns.value, str) else columns.value
        kept = [name for name in names if name in used] if isinstance(names, list) else names
        if kept != names:
            draft.changed(columns.place, "", f"`text_cols: {kept}`", "text_template does not use the others")
        if kept:
            part.put("text_cols", kept, columns.place)
    part.put("text_template", _with_tokens(draft, given, Old(text, template.place), model), template.place)
    part.put("add_special_tokens", False)  # noqa: FBT003 - the value of the key


def _of_pair(draft: Draft, given: Section) -> Old | None:
    """Return the template of a data set of pairs, which had a column for the question and one for the answer."""
    kind = given.places.get("dataset_type")
    if kind is None or draft.at(kind) != "pair":
        return None
    shape = given.take("pair_format")
    if shape and shape.value != "default":
        hint = "write it as text_template: {column} stands for a column of the data"
        draft.refused(shape.place, f"edgetune does not know the format {shape.value!r}", hint)
    asked, answered = given.take("input_col"), given.take("output_col")
    for old in (asked, answered):
        if old:
            draft.changed(old.place, str(old.place[-1]))
    given.take("ignore_source_in_labels")  # as it is today: only answers are learned
    return Old(f"{{{asked.value if asked else 'input'}}}{{{answered.value if answered else 'output'}}}", kind)


def _of_columns(draft: Draft, columns: Old | None) -> Old | None:
    if columns is None or not isinstance(columns.value, list) or len(columns.value) < 2:  # noqa: PLR2004
        return None
    draft.changed(columns.place, "text_cols")
    return Old(" ".join(f"{{{name}}}" for name in columns.value), columns.place)


def _columns_of(text: str) -> set[str]:
    try:
        return {name for _, name, _, _ in Formatter().parse(text) if name}
    except ValueError:
        return set()  # the schema says what is wrong with it


def _with_tokens(draft: Draft, given: Section, template: Old, model: str) -> str:
    """Return the template with the special tokens that Olive added, unless they stand in it or were not wanted."""
    added, text = given.take("add_special_tokens"), template.value
    if added and added.value is False:
        return str(text)
    place = added.place if added else template.place
    draft.changed(place, "add_special_tokens")
    begin, end = next((ends for name, *ends in _SPECIAL if re.search(name, model, re.IGNORECASE)), ("", ""))
    new = ("" if text.startswith(begin) else begin) + text + ("" if _ENDS_SPECIAL.search(text) else end)
    if new != text:
        tokens = " and ".join(token for token in (begin, end) if token and token not in text)
        draft.changed(template.place, "text_template", f"with {tokens}")
    elif not end and not _ENDS_SPECIAL.search(text):
        draft.to_do(template.place, "let it end with the model's end token; `edgetune data` says which it is")
    return str(new)


def _one_row_each(draft: Draft, given: Section, part: Part) -> None:
    old = given.take("strategy", "corpus_strategy")
    if old is None:
        why = "Olive joins rows when nothing is said; edgetune learns the answer of each row"
        draft.changed(given.place, "", "`strategy: line-by-line`", why)
    elif old.value != "line-by-line" or old.place[-1] == "corpus_strategy":
        draft.changed(old.place, str(old.place[-1]))
    part.put("strategy", "line-by-line", old.place if old else None)


def _lengths(draft: Draft, given: Section, part: Part) -> None:
    found = given.take("max_seq_len")
    source, target = given.take("source_max_len"), given.take("target_max_len")
    for old in (source, target):
        if old:
            draft.changed(old.place, str(old.place[-1]))
    if found is None and (source or target):
        first = source or target
        values: list[Any] = [old.value for old in (source, target) if old]
        total = sum(values) if all(isinstance(value, int) for value in values) else values[0]
        found = Old(total, first.place if first else ())
    if found:
        part.put("max_seq_len", found.value, found.place)
