"""Rows per second and memory of `edgetune data` against `datasets` and a tokenizer used plainly, in one run.

The peer loads the file, fills the template and tokenises prompt and whole text (what is needed to learn answers
only); it checks nothing. Both start from the same CSV file in processes of their own. The last two columns are
edgetune's speed and memory as multiples of the peer's.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import REPOSITORY, measured, save
from copier import run_copy

WORDS = ("the", "market", "rain", "a", "letter", "from", "my", "sister", "came", "late", "again", "and", "we", "waited")
OURS, THEIRS = "edgetune data", "datasets and tokenizer"
PEER = """
import sys
from datasets import load_dataset
from transformers import AutoTokenizer

model, file, template, cache = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
prompt = template.rpartition("{tone}")[0]

def encode(batch):
    rows = [dict(phrase=phrase, tone=tone) for phrase, tone in zip(batch["phrase"], batch["tone"])]
    prompts = tokenizer([prompt.format(**row) for row in rows], add_special_tokens=False)["input_ids"]
    whole = tokenizer([template.format(**row) for row in rows], add_special_tokens=False)["input_ids"]
    return {"input_ids": whole, "prompt_length": [len(ids) for ids in prompts]}

data = load_dataset("csv", data_files=file, split="train", cache_dir=cache)
data = data.map(encode, batched=True, remove_columns=data.column_names)
print(len(data))
"""


def main() -> None:
    """Print a table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="up to 1,000,000 and more"
    )
    parser.add_argument("--peer-rows", type=int, default=100_000, help="the most rows that the peer is asked for")
    parser.add_argument("--save", action="store_true", help="keep the numbers for docs/performance.md")
    arguments = parser.parse_args()
    numbers = []
    for rows in arguments.rows:
        numbers.append({"rows": rows, "ways": measure(rows, with_peer=rows <= arguments.peer_rows)})
        print(table(numbers[-1:]), flush=True)
    if arguments.save:
        save("data", numbers, "datasets", "transformers", "tokenizers")


def measure(rows: int, *, with_peer: bool) -> dict[str, dict[str, float]]:
    """Return seconds and peak memory (MB) by way for a data set of so many rows."""
    with tempfile.TemporaryDirectory() as scratch:
        project = Path(scratch) / "my-slm"
        run_copy(str(REPOSITORY), project, defaults=True, quiet=True, vcs_ref="HEAD")
        template, file = configure(project, rows)
        subprocess.run([sys.executable, "-m", "edgetune", "download"], cwd=project, check=True, capture_output=True)
        found = {OURS: measured([sys.executable, "-m", "edgetune", "data", "--show", "0"], project)}
        model = project / "model-cache/edgetune/tiny-phi3"
        peer = [sys.executable, "-c", PEER, str(model), str(file), template, f"{scratch}/cache"]
        if with_peer:
            found[THEIRS] = measured(peer, project)
    return {way: {"seconds": seconds, "peak_mb": peak} for way, (seconds, peak) in found.items()}


def table(numbers: list[dict[str, Any]]) -> str:
    """Return the numbers as Markdown."""
    lines = [
        "| rows | | seconds | rows/s | peak memory | speed | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in numbers:
        rows, ours = entry["rows"], entry["ways"][OURS]
        for way, one in entry["ways"].items():
            ratios = f"{one['seconds'] / ours['seconds']:.2f} | {ours['peak_mb'] / one['peak_mb']:.2f}"
            rate, ratios = f"{rows / one['seconds']:,.0f}", ratios if way != OURS else " | "
            lines.append(f"| {rows:,} | {way} | {one['seconds']:.1f} | {rate} | {one['peak_mb']:,.0f} MB | {ratios} |")
    return "\n".join(lines)


def configure(project: Path, rows: int) -> tuple[str, Path]:
    """Write the rows and point the project at them; return its template and the file."""
    source, file = random.Random(0), project / "datasets/rows.csv"
    with file.open("w", newline="", encoding="utf-8") as target:
        writer = csv.writer(target)
        writer.writerow(["phrase", "tone"])
        for number in range(rows):
            writer.writerow([f"{' '.join(source.choices(WORDS, k=8))} {number}", source.choice(["joy", "fear"])])
    path = project / "fine-tuning/olive-config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["data_configs"][1], config["passes"]["lora"]["eval_data_config"]
    config["data_configs"][0]["load_dataset_config"] |= {"data_name": "csv", "data_files": "../datasets/rows.csv"}
    path.write_text(json.dumps(config), encoding="utf-8")
    return config["data_configs"][0]["pre_process_data_config"]["text_template"], file


if __name__ == "__main__":
    main()
