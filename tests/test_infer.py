"""Asking the models of a fine-tuned project: every way to ask, every backend, every option."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import ENVIRONMENT, Sandbox
from edgetune import options
from edgetune.backends import BACKENDS, open_backend
from edgetune.errors import EdgetuneError
from edgetune.generation import Answer, Sampling
from edgetune.onnx_backend import OnnxBackend

CHATTY = Sampling(temperature=4.0, seed=3, max_new_tokens=16)
TONES = {"joy", "sadness", "fear", "surprise"}


def job_of(sandbox: Sandbox) -> Any:
    """Return what a command of this project works with."""
    from edgetune import config
    from edgetune.progress import Progress
    from edgetune.project import Project
    from edgetune.stages import Job

    project = Project(sandbox.root)
    return Job.start(project, config.load(project), Progress(project.events))


@pytest.fixture(scope="module", params=BACKENDS)
def asker(request: pytest.FixtureRequest, tuned: Sandbox) -> Any:
    """Load one of the models, once for the tests that take it."""
    from edgetune.infer import Asker

    asker = Asker.open(job_of(tuned), request.param)
    return SimpleNamespace(backend=asker.backend, name=request.param)


@pytest.fixture(scope="module")
def prompts(tuned: Sandbox) -> list[list[int]]:
    """Return the evaluation phrases as token ids."""
    from edgetune.prompt import Encoder

    encoder = Encoder(job_of(tuned).workflow.contract, tuned.root / "gen-model/merged")
    lines = (tuned.root / "datasets/eval.jsonl").read_text(encoding="utf-8").splitlines()
    return [encoder.prompt_ids(json.loads(line)) for line in lines]


def said(asker: Any, prompts: list[list[int]], sampling: Sampling, **options: Any) -> list[tuple[str, str, int]]:
    """Return text, stop reason and length of the answers, in the order of the prompts."""
    answers = dict(asker.backend.answers(prompts, sampling, **options))
    return [(a.text, a.stop_reason, a.answer_tokens) for _, a in sorted(answers.items())]


def test_answers_of_a_batch_are_those_of_single_prompts(asker: Any, prompts: list[list[int]]) -> None:
    """What a prompt is padded with changes nothing, and the fine-tuned models know their task."""
    some, sampling = prompts[:24], Sampling(max_new_tokens=12)

    together = said(asker, some, sampling)

    assert together == [said(asker, [prompt], sampling)[0] for prompt in some]
    assert asker.name == "base" or {text for text, *_ in together} <= TONES


def test_padding_does_not_count_as_said_before(tuned: Sandbox, tmp_path: Path) -> None:
    """Where the padding is the end token, as in many models, a repetition penalty still lets answers end."""
    folder = tmp_path / "onnx"
    shutil.copytree(tuned.root / "gen-model/onnx", folder)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"] |= {"pad_token_id": 3, "eos_token_id": [3]}
    (folder / "genai_config.json").write_text(json.dumps(config))
    backend = OnnxBackend(folder)
    texts = ("I am so sad", "What a wonderful day it is, and I am so very glad that you came to see me")
    prompts = [encoding.ids for encoding in backend.tokenizer.encode_batch(texts, add_special_tokens=False)]

    answers = dict(backend.answers(prompts, Sampling(max_new_tokens=25, repetition_penalty=20.0)))

    for number, prompt in enumerate(prompts):
        ((_, alone),) = backend.answers([prompt], Sampling(max_new_tokens=25, repetition_penalty=20.0))
        assert (answers[number].text, answers[number].stop_reason) == (alone.text, alone.stop_reason)


def test_seed_fixes_the_answer_whatever_stands_beside_it(asker: Any, prompts: list[list[int]]) -> None:
    """The same seed gives the same answer, alone and in a file; another seed gives others."""
    some = prompts[:2]
    first = said(asker, some, CHATTY)

    assert said(asker, some[1:], CHATTY) == first[1:]
    assert said(asker, some, Sampling(temperature=4.0, seed=4, max_new_tokens=16)) != first


def test_stream_gives_the_answer_piece_by_piece(asker: Any, prompts: list[list[int]]) -> None:
    """The pieces make up the text of the answer, no character is broken, and they come before the end."""
    for prompt in prompts[:2]:
        pieces: list[str] = []
        ((text, _, tokens),) = said(asker, [prompt], CHATTY, on_text=pieces.append)
        assert "".join(pieces) == text == said(asker, [prompt], CHATTY)[0][0]
        assert tokens < 3 or len(pieces) > 1


def test_answers_end_where_the_context_ends(asker: Any, prompts: list[list[int]]) -> None:
    """However many tokens are asked for, prompt and answer stay within the exported model's context."""
    long = (prompts[0][:-3] * 20)[:250]
    sampling = Sampling(temperature=50.0, seed=1, max_new_tokens=10**6)

    ((_, reason, tokens),) = said(asker, [long], sampling)

    assert asker.backend.max_length == 256
    assert (reason, tokens) == ("length", 6)


def test_sampling_at_its_limits(asker: Any, prompts: list[list[int]]) -> None:
    """Extreme options neither end the program nor the model's ability to answer: each of these is as good as greedy."""
    (greedy,) = said(asker, prompts[:1], Sampling(max_new_tokens=12))

    for chosen in ({"top_k": 1}, {"temperature": 0.001}, {"top_p": 1e-9}, {"top_k": 10**6, "temperature": 0.001}):
        assert said(asker, prompts[:1], Sampling(max_new_tokens=12, **chosen)) == [greedy]


def test_memory_bounds_a_batch_of_the_exported_model(tuned: Sandbox) -> None:
    """The runtime sets memory aside for whole rows: long ones are answered few at a time."""
    backend = OnnxBackend(tuned.root / "gen-model/onnx")
    backend.max_length = 10**6

    ids = [5, 6, 7]
    assert [len(batch) for batch in backend._batches([ids] * 3, Sampling())] == [1, 1, 1]  # noqa: SLF001
    assert [len(batch) for batch in backend._batches([ids] * 20, Sampling(max_new_tokens=9))] == [16, 4]  # noqa: SLF001


def test_every_backend_has_its_own_file_and_the_terminal_stays_clean(project: Sandbox) -> None:
    """``--backend adapter`` writes outputs-adapter.jsonl in the file's order; stderr has the summary alone."""
    result = project.run("infer", "--backend", "adapter", "--prompts", "inferences/prompts.jsonl")

    assert result.returncode == 0
    assert re.fullmatch(
        r"4 answers, 4 ended by themselves, \d+ tokens/s; written to inferences/outputs-adapter.jsonl\n", result.stderr
    )
    lines = (project.root / "inferences/outputs-adapter.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert result.stdout.splitlines() == [f"{record['phrase']} → {record['answer']}" for record in records]
    assert list(records[0]) == ["phrase", "answer", "stop_reason", "prompt_tokens", "answer_tokens", "seconds"]


def test_standard_input_is_a_text_or_a_file_of_prompts(project: Sandbox) -> None:
    """A pipe is one text, ``-`` is the same, and ``--prompts -`` takes rows, whose places are lines of stdin."""
    piped = project.run("infer", stdin="what a wonderful\nday\n")
    dashed = project.run("infer", "--json", "-", "I miss him", stdin="what a wonderful\nday\n")
    rows = project.run("infer", "--prompts", "-", stdin='{"phrase": "I miss him"}\n\n{"phrase": "joy"}\n')
    bad = project.run("infer", "--prompts", "-", stdin='{"phrase": "I miss him"}\n{"phrase": 1}\nno\n')
    empty = project.run("infer", stdin="\n")

    first, second = (json.loads(line) for line in dashed.stdout.splitlines())
    assert (first["phrase"], second["phrase"]) == ("what a wonderful\nday", "I miss him")
    assert piped.stdout == first["answer"] + "\n"
    assert [line.split(" → ")[0] for line in rows.stdout.splitlines()] == ["I miss him", "joy"]
    assert "error: stdin:2: the column" in bad.stderr
    assert "error: stdin:3: not valid JSON" in bad.stderr
    assert (empty.returncode, empty.stdout) == (1, "")
    assert "error: there is nothing on the standard input\nhint: " in empty.stderr


def test_columns_are_filled_by_name(project: Sandbox) -> None:
    """With several prompt columns, ``--set`` fills some and a text the one that is left, in the chat as well."""

    def two_columns(content: Any) -> None:
        for data in content["data_configs"]:
            template = "<|user|>\n{mood} {phrase}<|end|>\n<|assistant|>\n{tone}<|end|>"
            data["pre_process_data_config"].update(text_template=template, text_cols=["mood", "phrase", "tone"])

    project.edit(two_columns)

    asked = project.run("infer", "--json", "--set", "mood=So", "I miss = him")
    whole = project.run("infer", "--json", "--set", "phrase=I miss = him", "--set", "mood=So")
    chat = project.run("infer", "--chat", "--set", "mood=So", stdin="I miss = him")
    lacking = project.run("infer", "I miss him")
    wrong = project.run("infer", "--set", "mode=So", "I miss him")
    twice = project.run("infer", "--set", "mood=a", "--set", "mood=b", "--set", "phrase")

    record, same = json.loads(asked.stdout), json.loads(whole.stdout)
    assert (record["mood"], record["phrase"]) == ("So", "I miss = him")
    assert record | {"seconds": 0} == same | {"seconds": 0}
    assert chat.stdout == record["answer"] + "\n"
    assert "the prompt is made of the columns mood, phrase; not filled: mood, phrase" in lacking.stderr
    assert "the prompt has no column 'mode'\nhint: it has: mood, phrase" in wrong.stderr
    assert "--set gives the column 'mood' twice" in twice.stderr
    assert "--set 'phrase' is not COLUMN=VALUE" in twice.stderr
    assert {lacking.returncode, wrong.returncode, twice.returncode} == {1}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ["--temperature", "0", "a"],
            "'0' is not a temperature from 0.001 to 100; for the likeliest token, leave it out",
        ),
        (["--temperature", "nan", "a"], "is not a temperature"),
        (["--top-p", "1.5", "a"], "'1.5' is not a share above 0, and 1 at most"),
        (["--top-k", "0", "a"], "'0' is not a number of 1 or more"),
        (["--repetition-penalty", "-1", "a"], "'-1' is not a number above 0"),
        (["--seed", str(2**31), "a"], "is not a whole number from 0 to 2147483647"),
        (["--max-new-tokens", "x", "a"], "'x' is not a number of 1 or more"),
        (["--backend", "gguf", "a"], "choose from"),
        (["--chat", "a"], "--chat asks for lines itself: leave out a text"),
        (["--chat", "--prompts", "p.jsonl", "--json"], "leave out --prompts, --json"),
        (["--prompts", "p.jsonl", "--set", "a=b", "a"], "--prompts brings whole rows: leave out a text, --set"),
    ],
)
def test_wrong_options_are_usage_errors(rendered: Sandbox, given: list[str], words: str) -> None:
    """Options that cannot be meant, or exclude each other, end with 2 and say what is possible."""
    result = rendered.run("infer", *given)

    assert result.returncode == 2
    assert words in result.stderr


def test_help_names_every_backend() -> None:
    """The command line's own list is that of the backends."""
    assert options._BACKENDS == BACKENDS  # noqa: SLF001


def test_a_model_that_is_not_there_says_what_makes_it(project: Sandbox) -> None:
    """Exported but not verified, refused, incomplete and never made are four different things."""
    models, text = project.root / "gen-model", "I miss him"
    (models / "adapter/adapter_config.json").unlink()
    incomplete = project.run("infer", "--backend", "adapter", text)
    for name in ("onnx.candidate", "onnx.rejected"):
        if (models / name).exists():
            (models / name).rename(models / f"unused-{name}")
    (models / "onnx").rename(models / "onnx.candidate")
    unverified = project.run("infer", text)
    (models / "onnx.candidate").rename(models / "onnx.rejected")
    refused = project.run("infer", text)
    (models / "onnx.rejected").rename(models / "elsewhere")
    missing = project.run("infer", text)

    assert "error: gen-model/adapter: the adapter model has lost adapter_config.json" in incomplete.stderr
    assert "not verified yet\nhint: run `edgetune verify`" in unverified.stderr
    assert "error: gen-model/onnx.rejected: verification refused the exported model" in refused.stderr
    assert "gen-model/verify.json" in refused.stderr
    assert "--backend merged" in refused.stderr
    assert "there is no onnx model yet" in missing.stderr
    assert {result.returncode for result in (incomplete, unverified, refused, missing)} == {1}


def test_damaged_weights_are_an_error_with_a_way_out(project: Sandbox) -> None:
    """A file that cannot be loaded is no traceback."""
    weights = project.root / "gen-model/merged/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    with pytest.raises(EdgetuneError, match="merged cannot be loaded: SafetensorError"):
        open_backend(job_of(project), "merged")


def test_only_what_a_model_depends_on_makes_it_old(project: Sandbox) -> None:
    """Another block size outdates the exported model alone; other data outdate all but the base model."""
    from edgetune.infer import stale

    project.edit(lambda c: c["passes"]["builder"].update(int4_block_size=64))
    assert [name for name in BACKENDS if stale(job_of(project), name)] == ["onnx"]

    path = project.root / "datasets" / "train.jsonl"
    path.write_text(path.read_text() + '{"phrase": "so it goes, alas", "tone": "sadness"}\n')
    assert [name for name in BACKENDS if stale(job_of(project), name)] == ["adapter", "merged", "onnx"]
    result = project.run("infer", "what a wonderful day")
    assert result.returncode == 0
    assert "warning: the onnx model is older than the project (data: changed: files" in result.stderr


def test_interrupted_answers_leave_the_earlier_file(project: Sandbox) -> None:
    """Ctrl-C in the middle of a file exits 130; answers so far were printed, the file of an earlier run stays."""
    output = project.root / "inferences/outputs-onnx.jsonl"
    output.write_text("earlier")
    rows = project.root / "datasets/eval.jsonl"
    rows.write_text(rows.read_text() * 50)
    with subprocess.Popen(
        [sys.executable, "-m", "edgetune", "infer", "--prompts", "datasets/eval.jsonl"],
        cwd=project.root,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert " → " in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "Traceback" not in errors
    assert output.read_text() == "earlier"


@pytest.mark.parametrize(("prompts", "message"), [('{"phrase": 3}\n', ":1: "), ('{"a": "b"}\nnope\n', ":2: ")])
def test_bad_prompts_name_their_lines(tuned: Sandbox, tmp_path: Path, prompts: str, message: str) -> None:
    """A prompts file with bad rows is refused with the line of each."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(prompts)

    result = tuned.run("infer", "--prompts", str(path))

    assert result.returncode == 1
    assert f"error: {path}{message}" in result.stderr


def test_texts_that_ask_nothing(tuned: Sandbox) -> None:
    """An empty text, or one in another encoding, is refused before the model is loaded; a column's name is a text."""
    for text in ("", "  ", b"caf\xe9".decode("utf-8", "surrogateescape")):
        result = tuned.run("infer", text)
        assert result.returncode == 1
        assert "error: text:1: the " in result.stderr
        assert "Traceback" not in result.stderr
    assert tuned.run("infer", "phrase").returncode == 0


def test_infer_limits_and_records(tuned: Sandbox) -> None:
    """``--json`` tells token counts and the reason of the end; a limit is such a reason, and the summary tells it."""
    result = tuned.run("infer", "--json", "--max-new-tokens", "1", "what a wonderful day")

    record = json.loads(result.stdout)
    assert record["phrase"] == "what a wonderful day"
    assert (record["answer_tokens"], record["stop_reason"]) == (1, "length")
    assert "1 answer, 0 ended by itself, 1 cut at the limit of length, " in result.stderr


def test_columns_with_the_name_of_a_field_are_kept() -> None:
    """A row that brings its own ``answer`` has it beside the model's."""
    from edgetune.infer import as_record

    record = as_record({"question": "a", "answer": "b"}, Answer("c", "stop", 1, 1, 0.1))

    assert (record["question"], record["given_answer"], record["answer"]) == ("a", "b", "c")


def test_too_long_prompts_are_refused_before_the_first_answer(tuned: Sandbox, tmp_path: Path) -> None:
    """Prompts that leave no room for an answer are errors with their lines, told before any answer."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"phrase": text}) + "\n" for text in ("short", "word " * 400, "word " * 500)))

    result = tuned.run("infer", "--prompts", str(path), "--output", str(tmp_path / "out.jsonl"))

    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("search.max_length") == 2
    assert f"error: {path}:2: the prompt has" in result.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_chat_answers_lines_and_knows_its_commands(tuned: Sandbox) -> None:
    """Answers go to stdout, everything else to stderr; what follows /quit is not read."""
    lines = ["I miss him", "", "/help", "/reset", "/nonsense", " /nonsense", "x" * 999, "/quit", "I miss him"]
    result = tuned.run("infer", "--chat", stdin="\n".join(lines))

    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 2
    assert "every line is a question of its own" in result.stderr
    assert "/quit    leave" in result.stderr
    assert "there is no command /nonsense" in result.stderr
    assert "error: the prompt has" in result.stderr


def test_chat_of_chats_remembers(project: Sandbox) -> None:
    """With a chat template the conversation goes on until it no longer fits; /reset starts anew; --set has no place."""

    def chats(content: Any) -> None:
        for data in content["data_configs"]:
            settings = data["pre_process_data_config"]
            del settings["text_template"], settings["text_cols"]
            settings.update(chat_template=True, message_col="messages")

    project.edit(chats)
    line = "I am so very happy to be here with all of you today. " * 6

    result = project.run("infer", "--chat", "--max-new-tokens", "9", stdin="\n".join([line] * 4 + ["/reset", line]))
    refused = project.run("infer", "--chat", "--set", "phrase=a")

    assert result.returncode == 0
    assert 2 <= len(result.stdout.splitlines()) < 5
    assert "\nhint: /reset forgets the conversation\n" in result.stderr
    assert result.stderr.rstrip().endswith("forgotten")
    assert "chats, which have no columns for --set to fill" in refused.stderr


def test_ctrl_c_stops_an_answer_and_sigterm_the_chat(project: Sandbox) -> None:
    """Ctrl-C ends the answer, then, at the prompt, only gives a hint; SIGTERM ends the program."""
    path = project.root / "gen-model/onnx/genai_config.json"
    path.write_text(path.read_text().replace('"max_length": 256', '"max_length": 2048'))  # an answer of seconds
    options = ["--chat", "--temperature", "100", "--seed", "3"]
    with subprocess.Popen(
        [sys.executable, "-m", "edgetune", "infer", *options],
        cwd=project.root,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write("I miss him\n")
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        seen = []
        while "(stopped)\n" not in seen:
            seen.append(process.stderr.readline())
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        while "(/quit, Ctrl-D or Ctrl-C again to leave)\n" not in seen:
            seen.append(process.stderr.readline())
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "Traceback" not in "".join([*seen, errors])
