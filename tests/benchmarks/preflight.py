"""Peak memory of the steps on models with random weights against what preflight estimates.

Every case is a project of its own, run with the real commands; the peaks are those that the steps write into their
manifests. `--output` appends them to a file, one JSON object a line: `preflight.jsonl` beside this script holds the
published ones, which docs/memory.md shows and a test compares with today's formulas.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from copier import run_copy

from edgetune.estimate import MEMORY, Plan, Shape

REPOSITORY = Path(__file__).parents[2]
BUILT_IN = REPOSITORY / "src/edgetune/builtin/tiny-phi3"
FOLDERS = {"train": "adapter", "merge": "merged", "export": "onnx.candidate"}
SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*SPLIT, "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj")
WRITE_MODEL = """
import json, sys
import torch, transformers

values = json.loads(sys.argv[1])
torch.set_default_dtype(torch.bfloat16)
config = transformers.AutoConfig.for_model(pad_token_id=0, bos_token_id=0, eos_token_id=0, **values)
transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(sys.argv[2])
"""


def sizes(kind: str, *numbers: int, tied: bool) -> dict[str, Any]:
    """Return a configuration from hidden size, layers, heads, key-value heads, intermediate size and vocabulary."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    config = dict(zip((*names, "vocab_size"), numbers, strict=True))
    return {"model_type": kind, "tie_word_embeddings": tied, "max_position_embeddings": 4096, **config}


# The sizes of SmolLM2, Qwen2.5 and TinyLlama; the last is a Phi-3 of 0.4 billion parameters, for its fused layers.
MODELS = {
    "135M": sizes("llama", 576, 30, 9, 3, 1536, 49152, tied=True),
    "360M": sizes("llama", 960, 32, 15, 5, 2560, 49152, tied=True),
    "0.5B": sizes("qwen2", 896, 24, 14, 2, 4864, 151936, tied=True),
    "1.1B": sizes("llama", 2048, 22, 32, 4, 5632, 32000, tied=False),
    "phi3": sizes("phi3", 1536, 12, 16, 16, 4096, 32064, tied=False),
}


@dataclass(frozen=True)
class Case:
    """One measurement: two steps of training, and the steps after it up to ``last``."""

    model: str
    dtype: str
    batch: int
    length: int
    checkpointing: bool = False
    targets: tuple[str, ...] = SPLIT
    r: int = 64
    last: str = "merge"

    @property
    def name(self) -> str:
        """What tells it from the others."""
        layers = {len(ALL): "all layers"}.get(len(self.targets), "attention")
        saving = ", checkpointing" if self.checkpointing else ""
        return f"{self.model} {self.dtype}, {self.batch} x {self.length}{saving}, {layers}, r {self.r}"

    def plan(self, longest: int) -> Plan:
        """Return it as preflight sees it; ``longest``: the real length of the rows."""
        shape = Shape.of(MODELS[self.model] | {"dtype": "bfloat16"})
        assert shape is not None
        return Plan(
            shape,
            method="LoRA",
            dtype="float32" if self.dtype == "float32" else "bfloat16",
            r=self.r,
            targets=tuple(self.targets),
            dropout=True,
            batch=self.batch,
            accumulation=1,
            checkpointing=self.checkpointing,
            longest=longest,
        )


CASES = (
    Case("135M", "bfloat16", 8, 128, last="verify"),
    Case("135M", "float32", 4, 256),
    Case("135M", "bfloat16", 2, 256, checkpointing=True),
    Case("360M", "bfloat16", 1, 256, targets=ALL, last="export"),
    Case("360M", "float32", 2, 256, checkpointing=True),
    Case("0.5B", "bfloat16", 1, 256, last="export"),
    Case("0.5B", "float32", 1, 512, r=16),
    Case("phi3", "float32", 1, 512, targets=FUSED, last="export"),
    Case("1.1B", "float32", 1, 256, checkpointing=True),
    Case("1.1B", "bfloat16", 1, 128, last="export"),
)


def main() -> None:
    """Print estimate, measurement and their ratio for each step of each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="135M", help="a part of the names of the cases; the largest takes 12 GB")
    parser.add_argument("--output", type=Path, help="append the numbers to this file")
    arguments = parser.parse_args()
    for case in (case for case in CASES if arguments.only in case.name):
        with tempfile.TemporaryDirectory() as scratch:
            project = Path(scratch) / "my-slm"
            prepare(project, case)
            found = measured(project, case)
        print(case.name)
        for step, peak in found["peaks"].items():
            estimated = MEMORY[step](case.plan(found["longest"]))
            print(f"  {step:<7} {estimated / 1e9:6.2f} GB, measured {peak / 1e9:6.2f} GB: x{estimated / peak:.2f}")
        if arguments.output:
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"case": asdict(case), **found}) + "\n")


def prepare(project: Path, case: Case) -> None:
    """Make the project, its base model with random weights, and rows of the wanted length."""
    answers = {"base_model": "custom", "custom_model": f"random/{case.model}", "prompt_format": "phi3"}
    run_copy(str(REPOSITORY), project, data=answers, defaults=True, quiet=True, vcs_ref="HEAD")
    folder = project / "model-cache/random" / case.model
    command = [sys.executable, "-c", WRITE_MODEL, json.dumps(MODELS[case.model]), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((BUILT_IN / name).read_bytes())
    row = {"phrase": " ".join(["the"] * (case.length - 16)), "tone": "joy"}
    (project / "datasets/train.jsonl").write_text((json.dumps(row) + "\n") * case.batch, encoding="utf-8")
    path = project / "fine-tuning/olive-config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    tuning = config["passes"]["lora"]
    del config["data_configs"][1], tuning["eval_data_config"]
    source = {"data_name": "json", "data_files": "../datasets/train.jsonl", "split": "train"}
    config["data_configs"][0]["load_dataset_config"] = source
    tuning |= {"torch_dtype": case.dtype, "target_modules": list(case.targets), "r": case.r}
    tuning["training_args"] |= {
        "max_steps": 2,
        "per_device_train_batch_size": case.batch,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": case.checkpointing,
    }
    path.write_text(json.dumps(config), encoding="utf-8")


def measured(project: Path, case: Case) -> dict[str, Any]:
    """Run the steps; return their peaks in bytes and the length of the rows. Raises CalledProcessError."""
    rows = ["--rows", "2"] if case.last == "verify" else []
    command = [sys.executable, "-m", "edgetune", case.last, *rows]
    run = subprocess.run(
        command, cwd=project, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    if run.returncode not in (0, 3):  # random weights do not pass verification
        sys.stderr.write(run.stderr)
        run.check_returncode()
    results = project / "gen-model"
    data = read(results / "data/manifest.json")
    places = {step: results / name / "manifest.json" for step, name in FOLDERS.items()}
    if case.last == "verify":
        places |= {"export": results / "onnx.rejected/manifest.json", "verify": results / "verify.json"}
    peaks = {step: round(read(path)["peak_rss_mb"] * 2**20) for step, path in places.items() if path.is_file()}
    return {"longest": data["metrics"]["sets"]["train"]["longest"], "peaks": peaks}


def read(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
