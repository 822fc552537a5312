"""Reading a prompt and answering on a CPU: what the template renders, against llama.cpp and transformers.

All engines have the same random weights and the same threads; each measurement is a process of its own, they take
turns, and the best of the rounds counts. `--grid` compares ways to export and session options instead, on six of the
layers with the vocabulary cut in proportion: speed does not depend on the values, and time grows with the layers.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common

from edgetune import machine

HERE = Path(__file__).parent
LLAMA_TYPES = ("Q4_0", "Q4_K_M")
CASES = ((128, 64), (1024, 64))
SHORT = ((128, 16), (1024, 16))
"""Prompt and answer in tokens; transformers is given the shorter answers, for the time they take."""
ANSWER = (256, 128)
"""What the settings of the grid are compared by: the time of such a prompt with such an answer."""
LAYERS = 6
PACKAGES = ("onnxruntime", "onnxruntime-genai", "transformers", "torch")


@dataclass(frozen=True)
class Setting:
    """A way to export and to run a model."""

    name: str
    builder: dict[str, Any] = field(default_factory=dict)
    """Laid over the ModelBuilder pass that the template renders; None takes a key out."""
    session: dict[str, Any] = field(default_factory=dict)


BLOCKS = tuple(Setting(f"block size {size}", {"int4_block_size": size}) for size in (16, 32, 64, 128, 256))
NOT_SYMMETRIC = tuple(
    Setting(f"block size {size}, not symmetric", {"int4_block_size": size, "int4_is_symmetric": False})
    for size in (32, 64, 128)
)
ALGORITHMS = (
    *(
        Setting(f"{name}, block size 32", {"int4_algo_config": name, "int4_block_size": 32})
        for name in ("rtn", "rtn_last")
    ),
    *(Setting(f"{name}, block size 128", {"int4_algo_config": name, "int4_block_size": 128}) for name in ("rtn_last",)),
    *(
        Setting(
            f"{name}, block size {size}",
            {"int4_algo_config": name, "int4_block_size": size, "int4_is_symmetric": False},
        )
        for size in (32, 128)
        for name in ("k_quant", "k_quant_mixed")
    ),
)
ACCURACY = (Setting("multiply in float32", {"int4_accuracy_level": 1}),)
SESSIONS = (
    Setting("one thread", session={"intra_op_num_threads": 1}),
    Setting("threads not set", session={"intra_op_num_threads": 0}),
    Setting("threads do not spin", session={"session.intra_op.allow_spinning": "0"}),
    Setting("work in smaller pieces", session={"session.dynamic_block_base": "4"}),
    Setting("no arena", session={"enable_cpu_mem_arena": False}),
    Setting("no memory pattern", session={"enable_mem_pattern": False}),
    Setting("basic graph optimisation", session={"graph_optimization_level": "ORT_ENABLE_BASIC"}),
)
GRID = (Setting("as rendered"), *BLOCKS, *NOT_SYMMETRIC, *ALGORITHMS, *ACCURACY, *SESSIONS)


def main() -> None:
    """Print the comparison, and keep it on demand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="1.1B", choices=[n for n, m in common.MODELS.items() if m["model_type"] == "llama"]
    )
    parser.add_argument("--grid", action="store_true", help="compare settings instead of engines")
    names = [setting.name for setting in GRID]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SETTING", help="with --grid")
    parser.add_argument("--rounds", type=int, default=2, help="the best of so many counts")
    parser.add_argument("--save", action="store_true", help="keep the numbers for docs/performance.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        project = prepared(Path(scratch), arguments.model, LAYERS if arguments.grid else None)
        if arguments.grid:
            chosen = [setting for setting in GRID if setting.name in arguments.only]
            numbers: Any = grid(project, arguments.model, chosen, arguments.rounds)
        else:
            numbers = engines(project, arguments.model, arguments.rounds)
    print(table(numbers))
    if arguments.save:
        common.save("inference-grid" if arguments.grid else "inference", numbers, *PACKAGES)


def prepared(scratch: Path, model: str, layers: int | None) -> Path:
    """Return a project without fine-tuning, whose base model has random weights."""
    name, project = model if layers is None else f"{model}-{layers}-layers", scratch / "my-slm"
    if layers is not None:
        whole = common.MODELS[model]
        vocabulary = round(whole["vocab_size"] * layers / whole["num_hidden_layers"] / 32) * 32
        common.MODELS[name] = whole | {"num_hidden_layers": layers, "vocab_size": vocabulary}
    common.random_project(project, name, method="none", prompt_format="phi3")
    return project


def base(project: Path) -> Path:
    """Return the folder of the base model."""
    config = json.loads(_workflow(project).read_text(encoding="utf-8"))
    return (project / "fine-tuning" / str(config["input_model"]["model_path"])).resolve()


def _workflow(project: Path) -> Path:
    return project / "fine-tuning/olive-config.json"


def exported(project: Path, builder: dict[str, Any]) -> Path:
    """Export with these keys of the ModelBuilder pass, and return the model's folder."""
    file = _workflow(project)
    rendered = file.read_text(encoding="utf-8")
    config = json.loads(rendered)
    config["passes"]["builder"]["search"]["max_length"] = 2048
    config["passes"]["builder"] |= builder
    file.write_text(json.dumps(config), encoding="utf-8")
    try:
        common.measured([sys.executable, "-m", "edgetune", "export"], project, HF_HUB_OFFLINE="1")
    finally:
        file.write_text(rendered, encoding="utf-8")
    return project / "gen-model/onnx.candidate"


def asked(
    python: str | Path, engine: str, model: Path, cases: Iterable[tuple[int, int]], **options: Any
) -> dict[str, Any]:
    """Return what one engine prints. Raises CalledProcessError."""
    question = {"engine": engine, "model": str(model), "threads": machine.cores(), "cases": list(cases), **options}
    command = [str(python), str(HERE / "engines.py"), json.dumps(question)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def best(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the shortest times of the rounds, and the largest memory."""
    cases = [
        one | {part: min(r["cases"][at][part] for r in rounds) for part in ("first_s", "rest_s")}
        for at, one in enumerate(rounds[0]["cases"])
    ]
    return {
        "load_s": min(r["load_s"] for r in rounds),
        "peak_mb": max(r["peak_mb"] for r in rounds),
        "cases": cases,
    }


def engines(project: Path, model: str, rounds: int) -> dict[str, Any]:
    """Measure the rendered export and its peers."""
    folder = base(project)
    ours = exported(project, {})
    llama, files = common.peer("llama-cpp"), project.parent / "gguf"
    subprocess.run(
        [str(llama), str(HERE / "gguf_file.py"), str(folder), str(files), *LLAMA_TYPES], check=True, capture_output=True
    )
    found: dict[str, list[dict[str, Any]]] = {}
    for number in range(rounds):
        found.setdefault("edgetune", []).append(asked(sys.executable, "genai", ours, CASES))
        for kind in LLAMA_TYPES:
            found.setdefault(f"llama.cpp {kind}", []).append(asked(llama, "llama", files / f"{kind}.gguf", CASES))
        if number == 0:  # slow enough to be measured once
            for dtype in ("bfloat16", "float32"):
                answer = asked(sys.executable, "torch", folder, SHORT, options={"dtype": dtype})
                found.setdefault(f"transformers {dtype}", []).append(answer)
    size = sum(path.stat().st_size for path in ours.glob("model.onnx*"))
    return {
        "model": model,
        "threads": machine.cores(),
        "onnx_mb": size / 1e6,
        "engines": {name: best(of_engine) for name, of_engine in found.items()},
    }


def grid(project: Path, model: str, settings: list[Setting], rounds: int) -> dict[str, Any]:
    """Measure every setting on some of the layers."""
    kept: dict[str, Path] = {}
    for setting in settings:
        name = json.dumps(setting.builder, sort_keys=True)
        if name not in kept:
            kept[name] = exported(project, setting.builder).rename(project.parent / f"export-{len(kept)}")
    found: dict[str, list[dict[str, Any]]] = {setting.name: [] for setting in settings}
    for _ in range(rounds):
        for setting in settings:
            folder = kept[json.dumps(setting.builder, sort_keys=True)]
            answer = asked(sys.executable, "genai", folder, [ANSWER], repeats=2, options=setting.session)
            found[setting.name].append(answer)
    sizes = {
        setting.name: sum(
            path.stat().st_size for path in kept[json.dumps(setting.builder, sort_keys=True)].glob("model.onnx*")
        )
        for setting in settings
    }
    return {
        "model": model,
        "layers": LAYERS,
        "of_layers": common.MODELS[model]["num_hidden_layers"],
        "threads": machine.cores(),
        "settings": {name: best(measured) | {"mb": sizes[name] / 1e6} for name, measured in found.items()},
    }


def table(numbers: dict[str, Any]) -> str:
    """Return what was compared as Markdown: engines or settings."""
    return settings_table(numbers) if "settings" in numbers else engines_table(numbers)


def engines_table(numbers: dict[str, Any]) -> str:
    """Return the comparison of engines as Markdown; in brackets, how many times edgetune's rate or memory."""
    head = ["engine"]
    for prompt, _ in CASES:
        head += [f"prompt of {prompt:,}: tokens/s", "first token, s", "answer: tokens/s"]
    lines = [_line([*head, "load, s", "peak memory, MB"]), _line(["---"] + ["--:"] * (len(head) + 1))]
    ours = numbers["engines"]["edgetune"]
    for name, engine in numbers["engines"].items():
        cells = [name]
        for case, our in zip(engine["cases"], ours["cases"], strict=True):
            read, answered = case["prompt"] / case["first_s"], (case["tokens"] - 1) / case["rest_s"]
            our_read, our_answered = our["prompt"] / our["first_s"], (our["tokens"] - 1) / our["rest_s"]
            cells += [
                f"{read:.0f} (x{read / our_read:.2f})",
                f"{case['first_s']:.2f}",
                f"{answered:.1f} (x{answered / our_answered:.2f})",
            ]
        memory = f"{engine['peak_mb']:,.0f} (x{engine['peak_mb'] / ours['peak_mb']:.2f})"
        lines.append(_line([*cells, f"{engine['load_s']:.1f}", memory]))
    return "\n".join(lines)


def settings_table(numbers: dict[str, Any]) -> str:
    """Return the settings as Markdown; in brackets, their speed as a share of the best one's."""
    seconds = {
        name: sum(s["cases"][0][part] for part in ("first_s", "rest_s")) for name, s in numbers["settings"].items()
    }
    least, layers = min(seconds.values()), numbers["of_layers"] / numbers["layers"]
    prompt, answer = ANSWER
    lines = [
        _line(["setting", f"prompt of {prompt}, s", f"answer of {answer}, s", "both, s", "of the best", "MB"]),
        _line(["---", *["--:"] * 5]),
    ]
    for name, setting in numbers["settings"].items():
        case = setting["cases"][0]
        cells = [f"{layers * case[part]:.2f}" for part in ("first_s", "rest_s")]
        cells += [f"{layers * seconds[name]:.2f}", f"{least / seconds[name]:.1%}", f"{layers * setting['mb']:,.0f}"]
        lines.append(_line([name, *cells]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
