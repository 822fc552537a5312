"""Data sets: every format gives the same rows, every bad row is told, and what is learned is what was meant."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Sandbox
from dataset_server import COMMIT, DatasetServer
from edgetune.checks.tokens import smallest
from edgetune.contract import Conversation, Template
from edgetune.project import BUILTIN_MODELS
from edgetune.prompt import Encoder, load_tokenizer

MODEL = BUILTIN_MODELS["edgetune/tiny-phi3"]
PHI3 = "<|user|>\n{phrase}<|end|>\n<|assistant|>\n{tone}<|end|>"
ROWS = [
    {"phrase": "I could dance, and sing!", "tone": "joy"},
    {"phrase": 'two\nlines and "quotes"', "tone": "fear"},
    {"phrase": "caf\u00e9 cr\u00e8me", "tone": "sadness"},
]


def use(project: Sandbox, name: str, content: str | bytes, **load: Any) -> Path:
    """Make ``datasets/name`` the only data of the project."""
    path = project.root / "datasets" / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    given = {"data_name": "json", "data_files": f"../datasets/{name}", "split": "train"} | load

    def edit(config: Any) -> None:
        del config["data_configs"][1:]
        config["data_configs"][0]["load_dataset_config"] = given
        config["passes"]["lora"].pop("eval_data_config", None)
        config["passes"]["lora"]["training_args"].pop("eval_strategy", None)

    project.edit(edit)
    return path


def lines(rows: list[Any]) -> str:
    """Write rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def delimited(rows: list[dict[str, str]], delimiter: str = ",") -> str:
    """Write rows as a spreadsheet does."""
    from io import StringIO

    text = StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def parquet(rows: list[dict[str, str]]) -> bytes:
    """Write rows as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return bytes(buffer.getvalue())


def edit_messages(config: Any) -> None:
    """Let the rows be chats."""
    for data in config["data_configs"]:
        process = data["pre_process_data_config"]
        process.pop("text_template")
        process.pop("text_cols")
        process["chat_template"] = True


def labelled(count: int) -> list[dict[str, str]]:
    """Make rows with two labels."""
    return [{"phrase": f"phrase {number}", "tone": ("joy", "fear")[number % 2]} for number in range(count)]


def learned(project: Sandbox) -> list[str]:
    """Return the text that is learned of each sample."""
    result = project.run("data", "--json", "--show", "100")
    assert result.returncode == 0, result.stderr
    samples = json.loads(result.stdout)["samples"]
    return ["".join(token["text"] for token in sample if token["learned"]) for sample in samples]


def errors(result: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the error lines of a failed run."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return [line.removeprefix("error: ") for line in result.stderr.splitlines() if line.startswith("error: ")]


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("name", "content", "load"),
    [
        ("own.jsonl", lines(ROWS), {}),
        ("own.json", json.dumps(ROWS, indent=2), {}),
        ("own.json", json.dumps(ROWS).encode("utf-16"), {"encoding": "utf-16"}),
        ("own.csv", delimited(ROWS[:2]).encode("utf-16-le"), {"data_name": "csv", "encoding": "utf-16-le"}),
        ("own.csv", delimited(ROWS), {"data_name": "csv"}),
        ("own.csv", "\ufeff" + delimited(ROWS), {"data_name": "csv"}),
        ("own.csv", delimited(ROWS).encode("cp1252"), {"data_name": "csv", "encoding": "cp1252"}),
        ("own.tsv", delimited(ROWS, "\t"), {"data_name": "csv", "delimiter": "\t"}),
        ("own.parquet", parquet(ROWS), {"data_name": "parquet"}),
    ],
    ids=["jsonl", "json", "utf-16", "utf-16-le", "csv", "bom", "cp1252", "tsv", "parquet"],
)
def test_every_format_gives_the_same_tokens(fresh: Sandbox, name: str, content: str | bytes, load: Any) -> None:
    """A row is the same row whatever the file looks like."""
    use(fresh, name, content, **load)

    result = fresh.run("data")

    assert result.returncode == 0, result.stderr
    ids = array("I", (fresh.root / "gen-model/data/train.ids").read_bytes())
    samples = Encoder(Template.parse(PHI3), MODEL).encode(ROWS)
    expected = [token for [sample] in samples for token in sample.ids]
    assert len(ids) > len(expected) / 2
    assert ids.tolist() == expected[: len(ids)]


def test_several_files_and_patterns(fresh: Sandbox) -> None:
    """Files of a list come in its order, those of a pattern by name; a slice counts over all of them."""
    for number, row in enumerate(ROWS):
        (fresh.root / f"datasets/part-{number}.jsonl").write_text(lines([row]))

    use(fresh, "none.jsonl", "", data_files=["../datasets/part-2.jsonl", "../datasets/part-0.jsonl"])
    assert learned(fresh) == ["sadness<|end|>", "joy<|end|>"]

    use(fresh, "none.jsonl", "", data_files="../datasets/part-*.jsonl", split="train[1:]")
    assert learned(fresh) == ["fear<|end|>", "sadness<|end|>"]

    use(fresh, "none.jsonl", "", data_files="../datasets/nothing-*.jsonl")
    [error] = errors(fresh.run("data"))
    assert "the data file datasets/nothing-*.jsonl does not exist" in error


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=20)
TEXTS = st.builds(lambda words, mark: f"a{mark.join(words)}b", st.lists(WORDS), st.sampled_from(["\n", '"', ",", ";"]))


@settings(max_examples=20)
@given(st.lists(st.fixed_dictionaries({"phrase": TEXTS, "tone": TEXTS}), min_size=1, max_size=5))
def test_rows_are_those_of_datasets(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]) -> None:
    """Well-formed files are read as the library ``datasets`` reads them for stock Olive."""
    from datasets import Dataset

    from edgetune.data_schema import DataConfig
    from edgetune.rows import read

    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.csv").write_text(delimited(rows), encoding="utf-8", newline="")
    (folder / "rows.json").write_text(lines(rows), encoding="utf-8")
    process = {"text_template": PHI3, "strategy": "line-by-line", "add_special_tokens": False}
    for kind, reader in (("csv", Dataset.from_csv), ("json", Dataset.from_json)):
        load = {"data_name": kind, "data_files": f"rows.{kind}", "split": "train"}
        config = DataConfig.model_validate(
            {
                "name": "x",
                "type": "HuggingfaceContainer",
                "load_dataset_config": load,
                "pre_process_data_config": process,
            }
        )

        ours = [row.values for row in read(config, folder, str)]

        assert ours == reader(str(folder / f"rows.{kind}"), cache_dir=str(folder / "cache")).to_list() == rows


def test_data_set_of_the_hub(fresh: Sandbox, tmp_path: Path) -> None:
    """A Hub id with slices is loaded by its client, with the token of ``.env``; the commit is told for pinning.

    The second run asks nobody, and no file of the project holds the token but ``.env``.
    """
    token = "hf_" + "x" * 20

    def edit(config: Any) -> None:
        for data, split in zip(config["data_configs"], ("train[:80%]", "train[80%:]"), strict=True):
            data["load_dataset_config"] = {"data_name": "acme/tones", "split": split}

    fresh.edit(edit)
    with DatasetServer(delimited(labelled(20)).encode(), token) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": server.url}
        assert fresh.run("download").returncode == 0

        [error] = errors(fresh.run("data", env=environment))
        assert re.match(r"fine-tuning/olive-config.json:\d+: the data set acme/tones could not be loaded", error)

        (fresh.root / ".env").write_text(f"HF_TOKEN={token}\n")
        result = fresh.run("data", env=environment)
        assert result.returncode == 0, result.stderr
        assert "train       16 rows" in result.stdout
        assert f"acme/tones is at {COMMIT}" in result.stderr
        server.requests.clear()
        assert fresh.run("data", env=environment).returncode == 0
        assert server.requests == []
        server.shutdown()
    holders = [path.name for path in fresh.root.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert holders == [".env"]


# ---------------------------------------------------------------- what is wrong with rows


def test_every_bad_row_of_a_csv_is_told_with_its_line(fresh: Sandbox) -> None:
    """Reading goes on after a bad row; lines count quoted newlines; nothing is published."""
    text = 'phrase,tone\n"two\nlines",joy\nshort\nfine,joy\n"a"b,joy\n ,joy\nphrase,Tone\ncaf\u00e9,joy\n'
    use(fresh, "own.csv", text.encode("cp1252"), data_name="csv")

    result = fresh.run("data")

    told = errors(result)
    assert told[0] == "5 of 7 rows cannot be learned from"
    expected = {
        4: "the row does not have 2 fields",
        6: "not valid CSV",
        7: "the column 'phrase' is empty",
        8: "the row repeats the names of the columns",
        9: "not UTF-8 text",
    }
    assert len(told) == 1 + len(expected)
    for line, message in expected.items():
        assert any(error.startswith(f"datasets/own.csv:{line}: {message}") for error in told), line
    assert '"encoding": "cp1252"' in result.stderr
    assert not (fresh.root / "gen-model/data").exists()


@pytest.mark.parametrize(
    ("content", "load", "message", "hint"),
    [
        (delimited(ROWS, ";"), {}, "own.csv:1: the header is a single field", '"delimiter": ";"'),
        (delimited(ROWS, "\t"), {}, "own.csv:1: the header is a single field", '"delimiter": "\\t"'),
        (delimited(ROWS), {"delimiter": ";"}, "own.csv:1: the header is a single field", '"delimiter": ","'),
        (delimited(ROWS).encode("utf-16"), {}, "own.csv:1: not UTF-8 text", '"encoding": "utf-16"'),
        ("phrase,tone,tone\na,b,c\n", {}, "own.csv:1: several columns are called 'tone'", "rename"),
        ("phrase,mood\na,joy\n", {}, "the template names the column 'tone', which datasets/own.csv lacks", "'mood'"),
        ("", {}, "datasets/own.csv: the data set 'train_data' has no rows", "add rows"),
        ('phrase,tone\n"open,joy\nb,joy\n', {}, "own.csv:2: not valid CSV", "quotes"),
    ],
)
def test_unusable_csv(fresh: Sandbox, content: str | bytes, load: Any, message: str, hint: str) -> None:
    """A wrong delimiter, encoding or header is one problem, with the key that solves it."""
    use(fresh, "own.csv", content, data_name="csv", **load)

    result = fresh.run("data")

    assert [error for error in errors(result) if message in error]
    assert hint in result.stderr


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ({"data_name": "tsv"}, "there is no format 'tsv'"),
        ({"data_name": "jsonl"}, "for such files it is 'json'"),
        ({"data_name": "a b"}, "neither a format"),
        ({"delimiter": ";"}, "delimiter: has no meaning for 'json'"),
        ({"subset": "x"}, "subset: is for data sets on the Hub"),
        ({"split": "eval"}, "split: files have one split, called train"),
        ({"split": "train[5]"}, "split: a split is written like"),
        ({"encoding": "latin-99"}, "encoding: there is no encoding 'latin-99'"),
        ({"data_files": []}, "data_files"),
    ],
)
def test_unusable_load_keys(fresh: Sandbox, load: Any, message: str) -> None:
    """A key of ``load_dataset_config`` that cannot work is told at its line."""
    use(fresh, "own.jsonl", lines(ROWS), **load)

    [error] = errors(fresh.run("data"))

    assert message in error
    key = next(iter(load))
    number = int(error.split(":")[1])
    assert f'"{key}"' in fresh.config.read_text().splitlines()[number - 1]


@pytest.mark.parametrize(
    ("content", "load", "message", "hint"),
    [
        (json.dumps(ROWS)[:-1] + ",]", {}, "own.json:1 (row 4): not valid JSON", "what follows"),
        (json.dumps(ROWS)[:-1], {}, "own.json:1 (row 3): not valid JSON: a comma or the closing bracket", ""),
        (json.dumps(ROWS) + "[]", {}, "own.json:1: there is text behind the closing bracket", ""),
        (json.dumps({"data": ROWS}, indent=2), {}, "own.json:1: the file is one JSON object, not rows", "array"),
        (lines(ROWS).encode("utf-16"), {}, "own.json:1: not UTF-8 text", "utf-16"),
        (lines(ROWS), {"encoding": "utf-16"}, "own.json:1: the file is UTF-8 text, not utf-16", ""),
        ('{"phrase": "\u00e9", "tone": "joy"}\n', {"encoding": "cp1252"}, "own.json:1: the file is UTF-8 text", ""),
        (b"\x1f\x8b\x08", {}, "own.json:1: the file is compressed", "unpack"),
        (lines([{"phrase": f"p {n}", "tone": n} for n in range(9)]), {}, "in every row that can be read,", '"1"'),
        ("[\u00a0]", {}, "own.json:1 (row 1): not valid JSON", ""),
        (delimited(ROWS), {"data_name": "csv", "delimiter": "\n"}, "delimiter: a delimiter is one character", ""),
        ('{"phrase": "x", "tone": null}\n', {}, "own.json:1: the column 'tone' is empty", ""),
        ('{"phrase": "x", "tone": "\u200b"}\n', {}, "own.json:1: the column 'tone' is empty", ""),
    ],
)
def test_unusable_json(fresh: Sandbox, content: str | bytes, load: Any, message: str, hint: str) -> None:
    """What is wrong with a whole file is one problem, which ``--max-bad`` does not pass over."""
    use(fresh, "own.json", content, **load)

    result = fresh.run("data", "--max-bad", "2")

    assert [error for error in errors(fresh.run("data")) if message in error]
    assert hint in result.stderr
    assert result.returncode == 1


def test_first_row_nested_too_deeply(fresh: Sandbox) -> None:
    """An abyss on the first line is a bad row like any other."""
    use(fresh, "own.jsonl", '{"phrase": ' + "[" * 9000 + "}\n" + lines(ROWS))

    assert "datasets/own.jsonl:1: not valid JSON: nested too deeply" in errors(fresh.run("data"))


def test_a_bad_file_is_not_a_bad_row(fresh: Sandbox) -> None:
    """``--max-bad 1`` leaves out a row, never a file whose header or quotes are wrong."""
    rows = labelled(20)
    other = fresh.root / "datasets/other.csv"
    for content in (delimited(rows, ";"), delimited(rows).replace("phrase 3", '"phrase 3', 1)):
        use(fresh, "own.csv", delimited(rows), data_name="csv", data_files="../datasets/o*.csv")
        other.write_text(content)

        result = fresh.run("data", "--max-bad", "1")

        assert [error for error in errors(result) if error.startswith("datasets/other.csv:")]
        assert "--max-bad" not in result.stderr


def test_damaged_parquet(fresh: Sandbox) -> None:
    """A Parquet file that is none is an error of that file."""
    use(fresh, "own.parquet", b"PAR1 no", data_name="parquet")

    assert [
        error for error in errors(fresh.run("data")) if error.startswith("datasets/own.parquet:1: not valid Parquet")
    ]


def test_repeated_rows_are_a_warning(fresh: Sandbox) -> None:
    """A row that occurs twice is told and kept."""
    rows = labelled(10)
    use(fresh, "own.jsonl", lines([*rows, rows[3], rows[4]]))

    result = fresh.run("data")

    assert result.returncode == 0, result.stderr
    assert "warning: datasets/own.jsonl:11: 2 rows repeating an earlier one (also 12)" in result.stderr
    assert "train       12 rows" in result.stdout
    assert "2 rows repeating" in fresh.run("data").stderr, "an up-to-date run says so again"


def test_contradictory_labels_are_an_error_and_texts_are_not(fresh: Sandbox) -> None:
    """Two labels for one prompt cannot both be right; two answers in free text can."""
    use(fresh, "own.jsonl", lines([*labelled(10), {"phrase": "phrase 3", "tone": "joy"}]))
    told = errors(fresh.run("data"))
    place = "datasets/own.jsonl:11: the same prompt as datasets/own.jsonl:4, with another completion"
    assert place in told

    texts = [{"phrase": f"question {n // 2}", "tone": f"answer {n}"} for n in range(6)]
    use(fresh, "own.jsonl", lines(texts))
    result = fresh.run("data")
    assert result.returncode == 0, result.stderr
    assert "warning: datasets/own.jsonl:2: 3 rows with the prompt of an earlier one" in result.stderr


def test_evaluation_rows_that_were_trained_on(fresh: Sandbox) -> None:
    """A prompt of the evaluation data that is in the training data is an error of the evaluation row."""
    train = (fresh.root / "datasets/train.jsonl").read_text().splitlines()
    with (fresh.root / "datasets/eval.jsonl").open("a") as file:
        file.write(train[6] + "\n")

    result = fresh.run("data")

    place = "datasets/eval.jsonl:241: the prompt is in the training data too (datasets/train.jsonl:7)"
    assert [error for error in errors(result) if error.startswith(place)]
    assert "--write-split" in result.stderr


def test_one_bad_row_among_leaks_stays_one(fresh: Sandbox) -> None:
    """What is wrong with a few rows is not told of all, even when all others are bad for another reason."""
    train = (fresh.root / "datasets/train.jsonl").read_text()
    (fresh.root / "datasets/eval.jsonl").write_text(train + '{"phrase": "new"}\n')

    told = errors(fresh.run("data"))

    assert "datasets/eval.jsonl:1281: the column 'tone' is missing" not in told, "only the first fifty are printed"
    assert not [error for error in told if "lacks" in error or "every row" in error]


def test_going_on_without_bad_rows(fresh: Sandbox) -> None:
    """``--max-bad`` leaves out up to that many rows and lists them; later steps take what it left."""
    long = {"phrase": "word " * 200, "tone": "joy"}
    use(fresh, "own.jsonl", lines([*labelled(10), long]) + '{"phrase": "x"}\n{"phrase": \n')

    refused = fresh.run("data", "--max-bad", "2")
    assert "3 of 13 rows cannot be learned from" in errors(refused)
    assert "--max-bad 3" in refused.stderr

    result = fresh.run("data", "--max-bad", "3")
    assert result.returncode == 0, result.stderr
    assert "train       10 rows" in result.stdout
    rejected = [json.loads(line) for line in (fresh.root / "gen-model/data/rejected.jsonl").read_text().splitlines()]
    assert sorted(entry["where"] for entry in rejected) == [f"datasets/own.jsonl:{n}" for n in (11, 12, 13)]
    assert rejected[-1]["row"] in (long, '{"phrase": ')

    assert "3 rows left out" in fresh.run("data").stdout
    assert fresh.steps()["data"] == "up to date"
    for command in ("data", "finetune"):
        assert "--max-bad allows 1" in errors(fresh.run(command, "--max-bad", "1"))[0]
    with (fresh.root / "datasets/own.jsonl").open("a") as file:
        file.write("\n\n")
    assert "3 of 13 rows" in errors(fresh.run("finetune"))[0], "edited rows are a new question"
    assert fresh.steps()["data"] == "stale"


def test_no_row_left(fresh: Sandbox) -> None:
    """Leaving out every row is no way to go on."""
    use(fresh, "own.jsonl", '{"phrase": "x", "tone": ""}\n')

    assert errors(fresh.run("data", "--max-bad", "5")) == [
        "datasets/own.jsonl: no row of the data set 'train_data' can be learned from",
        "datasets/own.jsonl:1: the column 'tone' is empty",
    ]


def test_long_rows_are_counted_and_named(fresh: Sandbox) -> None:
    """Rows beyond max_seq_len are never cut: how many there are, which, and what would hold them."""
    use(fresh, "own.jsonl", lines([*labelled(5), {"phrase": "word " * 150, "tone": "joy"}]))

    result = fresh.run("data")

    told = errors(result)
    number = next(n for n, text in enumerate(fresh.config.read_text().splitlines(), 1) if "max_seq_len" in text)
    length = int(told[1].split("longest: ")[1].split()[0])
    assert told[1].startswith(f"fine-tuning/olive-config.json:{number}: max_seq_len 128 is too short for 1 row")
    assert f"datasets/own.jsonl:6: the row has {length} tokens" in told[2]
    fresh.edit(lambda c: c["data_configs"][0]["pre_process_data_config"].update(max_seq_len=length))
    assert fresh.run("data").returncode == 0


def test_special_tokens_in_rows(fresh: Sandbox) -> None:
    """A special token in an answer makes the row bad; in a prompt it may be meant, and is told."""
    use(fresh, "own.jsonl", lines([*labelled(5), {"phrase": "x", "tone": "joy<|end|> and more"}]))
    assert "datasets/own.jsonl:6: the answer contains the special token <|end|>" in errors(fresh.run("data"))

    use(fresh, "own.jsonl", lines([*labelled(5), {"phrase": "x<|end|>\n<|user|>\ny", "tone": "joy"}]))
    result = fresh.run("data")
    assert result.returncode == 0, result.stderr
    assert "warning: datasets/own.jsonl:6: 1 row with a special token in its prompt" in result.stderr


def test_problems_for_machines(fresh: Sandbox) -> None:
    """``--json`` prints the problems as data too."""
    use(fresh, "own.jsonl", lines([*labelled(5), {"phrase": "x"}]))

    result = fresh.run("data", "--json")

    assert result.returncode == 1
    problems = json.loads(result.stdout)["problems"]
    assert [problem["where"] for problem in problems] == ["", "datasets/own.jsonl:6"]
    assert all(problem.keys() == {"message", "where", "hint"} for problem in problems)


def test_broken_rows_need_no_heavy_imports(fresh: Sandbox) -> None:
    """Bad text data is told before torch, transformers, datasets or olive are loaded."""
    assert fresh.run("download").returncode == 0
    use(fresh, "own.jsonl", '{"phrase": "x"}\n')

    result = fresh.command(sys.executable, "-X", "importtime", "-m", "edgetune", "data")

    assert result.returncode == 1
    assert "the column 'tone'" in result.stderr
    imported = {
        line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time")
    }
    assert not imported & {"torch", "transformers", "datasets", "olive", "numpy"}


# ---------------------------------------------------------------- the prompt contract


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["user", "user", "assistant"], "message 2 is from user where assistant is due"),
        (["assistant"], "message 1 is from assistant where user is due"),
        (["system", "user"], "the conversation has no assistant turn"),
        (["user", "assistant", "user"], "the conversation does not end with a turn of the assistant"),
        (["user", "system", "assistant"], "message 2 is from system where assistant is due"),
        (["user", "tool"], "message 2 has the role 'tool'"),
        ([], "the column 'messages' is not a list of messages"),
        (["system"], "the conversation has no assistant turn"),
    ],
)
def test_conversations_out_of_order(roles: list[str], message: str) -> None:
    """Roles take turns, and there is an answer to learn."""
    row = {"messages": [{"role": role, "content": "text"} for role in roles]}

    [fault] = Conversation("messages").faults(row)

    assert fault.message.startswith(message)
    assert fault.hint


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user"}]}, "message 1 has no role and content"),
        ({"messages": ["hello"]}, "message 1 has no role and content"),
        ({"messages": [{"role": "user", "content": " "}]}, "message 1 has no text"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 has no text"),
        ({"messages": "hello"}, "the column 'messages' is not a list"),
        ({}, "the column 'messages' is missing"),
        (["x"], "the row is not a JSON object"),
    ],
)
def test_messages_of_the_wrong_form(row: Any, message: str) -> None:
    """Every message has a role and a text."""
    [fault] = Conversation("messages").faults(row)

    assert fault.message.startswith(message)


def test_tools_beside_a_chat_are_not_passed_over(fresh: Sandbox) -> None:
    """A chat template would write ``tools`` into the prompt; edgetune does not, and says so. Empty ones do no harm."""
    fresh.edit(edit_messages)
    rows = [talk("hello", "hi") | {"tools": tools} for tools in (None, [], "[]", [{"name": "search"}])]
    use(fresh, "train.jsonl", lines(rows))

    result = fresh.run("data")

    assert result.returncode == 1
    assert "datasets/train.jsonl:4: the column 'tools' is not written into chats here\nhint: remove" in result.stderr
    assert "train.jsonl:3" not in result.stderr


def talk(*texts: str, system: str = "") -> dict[str, Any]:
    """Make a conversation, user first."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"messages": messages}


def test_chats_learn_the_assistants_turns(fresh: Sandbox) -> None:
    """With ``messages``, all of the assistant's turns and their end tokens are learned, and nothing else."""
    use(fresh, "own.jsonl", lines([talk("a", "b", "c", "d", system="be short"), talk("e", "f")]))
    fresh.edit(edit_messages)

    assert learned(fresh) == ["b<|end|>d<|end|>", "f<|end|>"]


@settings(max_examples=30)
@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=6), st.text())
def test_answers_in_a_chat_follow_the_ids_given_at_inference(texts: list[str], system: str) -> None:
    """For any conversation, each answer is learned behind exactly the ids the model is asked with."""
    row = talk(*texts[: len(texts) // 2 * 2], system=system.strip())
    encoder = Encoder(Conversation("messages"), MODEL)

    [samples] = encoder.encode([row])

    starts = [(s, i) for s in samples for i in range(1, len(s.ids)) if s.learned[i] and not s.learned[i - 1]]
    asked = [n for n, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    assert len(starts) == len(asked)
    for (sample, start), number in zip(starts, asked, strict=True):
        assert sample.ids[:start] == encoder.prompt_ids({"messages": row["messages"][:number]})
    assert all(sample.ids[-1] in encoder.end_ids and sample.learned[-1] for sample in samples)


def test_template_that_rewrites_earlier_answers() -> None:
    """Where a chat template shows earlier answers in another form, each answer is a sample of its own."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{{ m.content if loop.last or m.role == 'user' else m.content | upper }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    encoder = Encoder(Conversation("messages", template), MODEL)

    [samples] = encoder.encode([talk("a", "b", "c", "d")])

    texts = [encoder.tokenizer.decode(list(s.ids), skip_special_tokens=False).replace("<|end|>", "/") for s in samples]
    assert texts == ["<|user|>a/<|assistant|>b/", "<|user|>a/<|assistant|>B/<|user|>c/<|assistant|>d/"]


def test_template_of_another_family(fresh: Sandbox) -> None:
    """A ChatML template for a Phi-3 model is an error that names the model's own format."""

    def edit(config: Any) -> None:
        for data in config["data_configs"]:
            data["pre_process_data_config"]["text_template"] = (
                "<|im_start|>user\n{phrase}<|im_end|>\n<|im_start|>assistant\n{tone}<|im_end|>"
            )

    fresh.edit(edit)

    result = fresh.run("data")

    told = errors(result)
    assert [error.rpartition(" ")[2] for error in told] == ["<|im_start|>", "<|im_end|>"]
    assert "this model's prompt format is Phi-3" in result.stderr


@pytest.fixture
def beginning_model(tmp_path: Path) -> Path:
    """Return a model folder whose tokenizer puts ``<|endoftext|>`` before every text, as Llama's does with its own."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(MODEL)
    begin = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", begin)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    return tmp_path


def test_token_that_begins_a_text(beginning_model: Path) -> None:
    """A text starts with the model's first token once: missing is noticed, and so is doubled."""
    without, once, twice = (Encoder(Template.parse("<|endoftext|>" * n + PHI3), beginning_model) for n in range(3))

    assert without.lacks_begin() == "<|endoftext|>"
    assert once.lacks_begin() == ""
    faults = [encoder.format_fault()[0] for encoder in (without, once, twice)]
    assert faults == ["", "", "the text begins with <|endoftext|> twice"]


def test_columns_without_a_template(fresh: Sandbox) -> None:
    """Plain columns are joined as Olive does, and then lack the end token: told with the remedy."""
    use(fresh, "own.jsonl", lines(ROWS))
    fresh.edit(lambda c: c["data_configs"][0]["pre_process_data_config"].pop("text_template"))

    result = fresh.run("data")

    [error] = errors(result)
    assert "completions do not end with a token that stops the model" in error
    assert "<|end|>" in result.stderr


def test_chats_leak_by_any_of_their_questions(fresh: Sandbox) -> None:
    """A conversation that begins as one of the training data is a leak, however it goes on."""
    fresh.edit(edit_messages)
    for name, chats in (("train", [talk("a", "b")]), ("eval", [talk("a", "b", "c", "d")])):
        (fresh.root / f"datasets/{name}.jsonl").write_text(lines(chats))

    assert [error for error in errors(fresh.run("data")) if error.startswith("datasets/eval.jsonl:1: the prompt is in")]


def test_broken_chats_need_no_heavy_imports(fresh: Sandbox) -> None:
    """Bad chats are told without transformers, which only writes the good ones."""
    assert fresh.run("download").returncode == 0
    use(fresh, "own.jsonl", lines([talk("a", "b"), talk("a")]))
    fresh.edit(edit_messages)

    result = fresh.command(sys.executable, "-X", "importtime", "-m", "edgetune", "data")

    assert "the conversation has no assistant turn" in result.stderr
    assert not re.search(r"\| +(torch|transformers|datasets)$", result.stderr, re.MULTILINE)


def test_json_on_an_output_without_unicode(fresh: Sandbox) -> None:
    """``--json`` is JSON on a console of any encoding."""
    use(fresh, "own.jsonl", lines([{"phrase": "caf\u00e9 \U0001f600", "tone": "joy"}]))

    result = fresh.run("data", "--json", env={"PYTHONIOENCODING": "ascii"})

    tokens = json.loads(result.stdout)["samples"][0]
    assert "\U0001f600" in "".join(token["text"] for token in tokens)


def test_samples_are_shown_token_by_token(fresh: Sandbox) -> None:
    """Without colours, brackets tell what is given, what is learned, and which tokens are special."""
    use(fresh, "own.jsonl", lines([{"phrase": "joy joy", "tone": "joy"}] * 2))

    output = fresh.run("data", "--show", "1").stdout

    assert "({<|user|>})(\\n)" in output
    assert output.rstrip().endswith("({<|assistant|>})(\\n)[joy][{<|end|>}]")
    assert "\x1b" not in output


def test_numbers_for_machines(fresh: Sandbox) -> None:
    """The JSON has rows, tokens, a histogram that adds up, and the balance of labels."""
    found = json.loads(fresh.run("data", "--json").stdout)

    train = found["sets"]["train"]
    assert train["labels"] == dict.fromkeys(train["labels"], 320)
    assert sum(count for *_, count in train["histogram"]) == train["rows"] == 1280
    assert max(high for _, high, _ in train["histogram"]) == train["longest"]


# ---------------------------------------------------------------- splitting


def rows_of(path: Path) -> list[Any]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_write_split_keeps_prompts_together(fresh: Sandbox) -> None:
    """Rows with the same prompt go to the same side; nothing is lost; the config points at the two files."""
    rows = [{"phrase": f"phrase {n // 2}", "tone": "joy", "note": str(n)} for n in range(100)]
    use(fresh, "own.csv", delimited(rows), data_name="csv")
    before = fresh.config.read_text().splitlines()

    result = fresh.run("data", "--write-split", "0.2")

    assert result.returncode == 0, result.stderr
    train, held_out = (rows_of(fresh.root / f"datasets/{name}.jsonl") for name in ("train", "eval"))
    assert sorted(train + held_out, key=lambda row: int(row["note"])) == rows
    assert len(held_out) == 20
    assert {row["phrase"] for row in train}.isdisjoint(row["phrase"] for row in held_out)
    config = json.loads(fresh.config.read_text())
    assert [data["load_dataset_config"]["data_files"] for data in config["data_configs"]] == [
        "../datasets/train.jsonl",
        "../datasets/eval.jsonl",
    ]
    assert config["passes"]["lora"]["eval_data_config"] == config["data_configs"][1]["name"]
    changed = [line for line in before if line not in fresh.config.read_text().splitlines()]
    assert len(changed) <= 3, "the rest of the file is left as it was"
    assert "eval        20 rows" in result.stdout


def test_split_is_repeatable_and_keeps_what_it_replaces(fresh: Sandbox, tmp_path: Path) -> None:
    """The same rows are split the same way on every machine, and replaced files are kept."""
    splits, other = [], Sandbox(shutil.copytree(fresh.root, tmp_path / "other"))
    for project in (fresh, other):
        original = (project.root / "datasets/eval.jsonl").read_bytes()
        assert project.run("data", "--write-split", "0.25").returncode == 0
        splits.append((project.root / "datasets/eval.jsonl").read_bytes())
        assert (project.root / "datasets/eval.before-split-1.jsonl").read_bytes() == original
    assert splits[0] == splits[1]


def test_split_heals_a_leak(fresh: Sandbox) -> None:
    """Rows that stand on both sides end on one; two slices of one file are split as a whole."""
    rows = labelled(20)
    use(fresh, "own.jsonl", lines([*rows, *rows[:5]]))
    config = json.loads(fresh.config.read_text())
    data = config["data_configs"][0]
    config["data_configs"].append(json.loads(json.dumps(data)) | {"name": "held_out"})
    data["load_dataset_config"]["split"] = "train[:80%]"
    config["data_configs"][1]["load_dataset_config"]["split"] = "train[80%:]"
    config["passes"]["lora"]["eval_data_config"] = "held_out"
    fresh.config.write_text(json.dumps(config, indent=2))
    (fresh.root / "datasets/train.jsonl").unlink()
    (fresh.root / "datasets/eval.jsonl").unlink()
    assert fresh.run("data").returncode == 1

    result = fresh.run("data", "--write-split", "0.2")

    assert result.returncode == 0, result.stderr
    assert "train       20 rows" in result.stdout


@pytest.mark.parametrize(
    "load",
    [
        {"data_files": "../datasets/own.json"},
        {"data_files": "../datasets/own.json", "split": "train[:50%]"},
        {"data_files": ["../datasets/own.json", "../datasets/own.json"]},
    ],
)
def test_split_takes_every_row_once(fresh: Sandbox, load: Any) -> None:
    """Rows on one line, slices that leave some out, files named twice: each row is in one of the new files."""
    rows = [{"phrase": f"phrase {n}", "tone": "joy"} for n in range(40)]
    use(fresh, "own.json", json.dumps(rows), **load)
    fresh.edit(lambda c: c["data_configs"][0]["pre_process_data_config"].update(max_samples=5))

    assert fresh.run("data", "--write-split", "0.25").returncode == 0

    train, held_out = (rows_of(fresh.root / f"datasets/{name}.jsonl") for name in ("train", "eval"))
    assert len(held_out) == 10
    assert sorted(train + held_out, key=lambda row: int(row["phrase"].split()[1])) == rows


def test_split_does_not_depend_on_order(fresh: Sandbox) -> None:
    """Splitting again what was split changes nothing: a row's side depends on its prompt alone."""
    use(fresh, "own.jsonl", lines(labelled(60)))
    sides = []
    for _ in range(2):
        assert fresh.run("data", "--write-split", "0.3").returncode == 0
        sides.append({row["phrase"] for row in rows_of(fresh.root / "datasets/eval.jsonl")})
    assert sides[0] == sides[1]


def test_split_of_one_large_group(fresh: Sandbox) -> None:
    """A prompt that most rows have does not become the evaluation data."""
    rows = [{"phrase": f"phrase {max(n, 90)}", "tone": "joy"} for n in range(100)]
    use(fresh, "own.jsonl", lines(rows))

    assert fresh.run("data", "--write-split", "0.1").returncode == 0

    assert 1 <= len(rows_of(fresh.root / "datasets/eval.jsonl")) <= 10


def use_one_set_for_both(config: Any) -> None:
    """Evaluate on the training data."""
    config["passes"]["lora"]["eval_data_config"] = config["data_configs"][0]["name"]


def evaluate_nothing(config: Any) -> None:
    """Write the absence of evaluation data out."""
    config["passes"]["lora"]["eval_data_config"] = None


@pytest.mark.parametrize("edit", [use_one_set_for_both, evaluate_nothing])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_split_leaves_a_valid_config(fresh: Sandbox, edit: Callable[[Any], None], newline: str) -> None:
    """Whatever the file said of evaluation data, it is valid afterwards, keeps its line ends, and names both files."""
    use(fresh, "own.jsonl", lines(labelled(20)))
    fresh.edit(edit)
    fresh.config.write_text(fresh.config.read_text(), encoding="utf-8-sig", newline=newline)

    result = fresh.run("data", "--write-split", "0.2")

    assert result.returncode == 0, result.stderr
    written = fresh.config.read_bytes()
    assert written.count(b"\r\n") == (written.count(b"\n") if newline == "\r\n" else 0)
    assert written.startswith(b"\xef\xbb\xbf")
    config = json.loads(written.decode("utf-8-sig"))
    files = {data["name"]: data["load_dataset_config"]["data_files"] for data in config["data_configs"]}
    step = config["passes"]["lora"]
    assert files[step["train_data_config"]] == "../datasets/train.jsonl"
    assert files[step["eval_data_config"]] == "../datasets/eval.jsonl"


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_split_that_is_killed(fresh: Sandbox, moved: int) -> None:
    """Between any two of its files, a split is as if never begun, or the next command finishes it."""
    use(fresh, "own.jsonl", lines(labelled(20)))
    before = fresh.config.read_text()
    dying = f"""
import os, signal, sys
from pathlib import Path
from edgetune.cli import main

replace, left = Path.replace, [{moved}]

def replace_or_die(path, target):
    if Path(target).parent.name in ("datasets", "fine-tuning"):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
    return replace(path, target)

Path.replace = replace_or_die
sys.exit(main())
"""

    killed = fresh.command(sys.executable, "-c", dying, "data", "--write-split", "0.2")
    result = fresh.run("status")

    assert (killed.returncode, result.returncode) == (-signal.SIGKILL, 0)
    assert ("the split that was interrupted is finished" in result.stderr) == (moved > 0)
    if moved:
        sizes = [len(rows_of(fresh.root / f"datasets/{name}.jsonl")) for name in ("train", "eval")]
        assert sizes == [16, 4]
        assert not list(fresh.root.rglob("*.split")) + list(fresh.root.rglob("*.jsonl.tmp"))
    assert (fresh.config.read_text() == before) == (moved == 0)
    assert fresh.run("data", "--write-split", "0.2").returncode == 0


def test_split_changes_nothing_when_it_cannot_work(fresh: Sandbox) -> None:
    """Bad rows, a single prompt: an error, and every file as it was."""

    def files() -> dict[str, bytes]:
        folders = ("datasets", "fine-tuning")
        return {str(p): p.read_bytes() for folder in folders for p in (fresh.root / folder).iterdir()}

    cases = [
        (lines([*labelled(4), {"phrase": "x"}]), "datasets/own.jsonl:5: the column 'tone' is missing"),
        (lines(labelled(1) * 3), "there are no two different prompts"),
    ]
    for content, message in cases:
        use(fresh, "own.jsonl", content)
        before = files()
        assert [error for error in errors(fresh.run("data", "--write-split", "0.5")) if error.startswith(message)]
        assert files() == before


# ---------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    "secret", ["hf_" + "abcdefgh" * 4, "https://me:secret@example.invalid/x", "DefaultEndpoints;AccountKey=abc"]
)
def test_a_secret_in_the_config_is_refused_and_not_repeated(fresh: Sandbox, secret: str) -> None:
    """The workflow file goes into version control: a token there is an error that does not print it."""
    fresh.edit(lambda c: c.update(workflow_id=secret))

    for arguments in (("status",), ("finetune", "--engine", "olive")):
        result = fresh.run(*arguments)
        [error] = errors(result)
        assert "looks like" in error
        assert secret not in result.stdout + result.stderr
        assert ".env" in result.stderr


def give_load_kwargs(kwargs: dict[str, Any], config: Any) -> None:
    """Set the arguments the base model is loaded with."""
    config["input_model"]["load_kwargs"] = kwargs


def test_remote_code_needs_a_commit(fresh: Sandbox) -> None:
    """``trust_remote_code`` is accepted with a 40-digit revision only."""
    for revision, ok in ((None, False), ("main", False), ("a" * 40, True)):
        kwargs = {"trust_remote_code": True} | ({"revision": revision} if revision else {})
        fresh.edit(partial(give_load_kwargs, kwargs))
        result = fresh.run("status")
        assert (result.returncode == 0) == ok
        assert ok or "needs a 40-digit revision" in result.stderr


def test_conflicting_contracts(fresh: Sandbox) -> None:
    """A text template beside a chat template would be ignored: refused."""
    fresh.edit(lambda c: c["data_configs"][0]["pre_process_data_config"].update(chat_template=True))

    assert "text_template: has no effect beside chat_template" in errors(fresh.run("status"))[0]


# ---------------------------------------------------------------- what later steps make of it


@pytest.mark.slow
def test_a_tokenizer_that_onnx_runtime_reads_differently(fresh: Sandbox, tmp_path: Path) -> None:
    """Verification compares token ids on texts the data may lack, and names the smallest that differs.

    ONNX Runtime's tokenizer overlooks this model's lower-casing. Without evaluation data, training says so.
    """
    base = shutil.copytree(MODEL, tmp_path / "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    (base / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": {"type": "Lowercase"}}))
    use(fresh, "own.jsonl", lines(labelled(8)))
    fresh.edit(lambda c: c["input_model"].update(model_path="../model-cache/acme/lower"))
    fresh.edit(lambda c: c["passes"]["lora"]["training_args"].update(max_steps=1))
    assert fresh.run("download", "--from", str(base)).returncode == 0

    result = fresh.run("finetune")

    assert result.returncode == 3
    assert "the tokenizer of onnxruntime-genai reads 'C' differently" in result.stderr
    assert "no evaluation data" in result.stderr
    assert not (fresh.root / "gen-model/onnx").exists()


@given(st.text(min_size=1), st.sampled_from("a\u00e4\n\u4e2d"))
def test_smallest_text_that_differs(text: str, needle: str) -> None:
    """Whatever makes two tokenizers differ, only that is left of the text."""
    assert smallest(text + needle + text, lambda part: needle in part) == needle
