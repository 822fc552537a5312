"""Peak memory of the steps on models with random weights against what preflight estimates.

Every case is a project of its own, run with the real commands; the peaks are those that the steps write into their
manifests. `--output` appends them to a file, one JSON object a line: `preflight.jsonl` beside this script holds the
published ones, which docs/memory.md shows and a test compares with today's formulas.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
from common import measured, random_project, sizes

from edgetune.estimate import MEMORY, Plan, Shape

COMMANDS = ("merge", "export", "verify")
SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*SPLIT, "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj")
# Those of the other benchmarks, and a Phi-3 of 0.4 billion parameters for its fused layers.
MODELS = common.MODELS
MODELS["phi3"] = sizes("phi3", 1536, 12, 16, 16, 4096, 32064, tied=False)


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
            found = peaks(project, case)
        print(case.name)
        for step, peak in found["peaks"].items():
            estimated = MEMORY[step](case.plan(found["longest"]))
            print(f"  {step:<7} {estimated / 1e9:6.2f} GB, measured {peak / 1e9:6.2f} GB: x{estimated / peak:.2f}")
        if arguments.output:
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"case": asdict(case), **found}) + "\n")


def prepare(project: Path, case: Case) -> None:
    """Make the project, its base model with random weights, and rows of the wanted length."""
    random_project(project, case.model, prompt_format="phi3")
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


def peaks(project: Path, case: Case) -> dict[str, Any]:
    """Run the steps; return their peaks in bytes and the length of the rows. Raises CalledProcessError.

    Training and merging share a process, as in `edgetune finetune`. The peak of the export has the processes in it
    which quantise.
    """
    results, found = project / "gen-model", {}
    for step in COMMANDS[: COMMANDS.index(case.last) + 1]:
        rows = ["--rows", "2"] if step == "verify" else []
        command = [sys.executable, "-m", "edgetune", step, *rows]
        _, megabytes = measured(command, project, accepted=(0, 3), HF_HUB_OFFLINE="1")  # random weights are rejected
        if step == "export":
            found[step] = round(1e6 * megabytes)
    places = {"train": "adapter/manifest.json", "merge": "merged/manifest.json", "verify": "verify.json"}
    for step, place in places.items():
        if (results / place).is_file():
            found[step] = round(read(results / place)["peak_rss_mb"] * 2**20)
    data = read(results / "data/manifest.json")
    return {"longest": data["metrics"]["sets"]["train"]["longest"], "peaks": found}


def read(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
