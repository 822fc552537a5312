"""Rows per second and peak memory of training against TRL, stock Olive, and bare matrix products, in one run.

All of them train LoRA (r 16 on the attention layers) on the same rows, in batches of 8, with the loss on completions
(Olive: on everything). Speed is what each trainer says of its own loop, without loading; memory is the peak of the
process. The bare products are those of the frozen matrices (forward, and the gradient of the input) and of the
adapter, for as many tokens as the rows have, without anything between them.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import BUILT_IN, MODELS, measured, peer, random_project, save

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LONGEST = 1024
TEMPLATE = 9  # tokens of the template around both texts

TRL = """
import json, sys
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

model, data, dtype, rows, targets, method, result = sys.argv[1:]
template = "<|user|>\\n{phrase}<|end|>\\n<|assistant|>\\n"
def columns(row):
    return {"prompt": template.format(**row), "completion": row["tone"] + "<|end|>"}
source = load_dataset("json", data_files=data, split="train").select(range(int(rows)))
source = source.map(columns, remove_columns=source.column_names)
options = {"dtype": dtype}
if method == "qlora":
    options["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype))
tokenizer = AutoTokenizer.from_pretrained(model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
tokenizer.eos_token = "<|end|>"
arguments = SFTConfig(
    output_dir=result + ".d", per_device_train_batch_size=8, num_train_epochs=1, max_length=1024, report_to="none",
    gradient_checkpointing=False, train_sampling_strategy="group_by_length", model_init_kwargs=options, use_cpu=True,
    bf16=dtype == "bfloat16", save_strategy="no", disable_tqdm=True, seed=0)
trainer = SFTTrainer(
    model=model, args=arguments, train_dataset=source, processing_class=tokenizer,
    peft_config=LoraConfig(r=16, lora_alpha=16, lora_dropout=0.05, target_modules=json.loads(targets)))
json.dump(trainer.train().metrics, open(result, "w"))
"""

# Olive does not tell how long its training took, so it is asked for where transformers knows it.
OLIVE = """
import json, sys
import transformers

config, result = sys.argv[1:]
train = transformers.Trainer.train
def told(self, *arguments, **named):
    output = train(self, *arguments, **named)
    json.dump(output.metrics, open(result, "w"))
    return output
transformers.Trainer.train = told
from olive.cli.launcher import main
main(["run", "--config", config])
"""

BARE = """
import json, sys, time
import torch

shapes, heads, tokens, positions, dtype = (json.loads(argument) for argument in sys.argv[1:])
dtype = getattr(torch, dtype)

def seconds(rows, width, out, rank=0):
    states, weight, gradient = (torch.randn(*size, dtype=dtype) for size in ((rows, width), (out, width), (rows, out)))
    a, b = torch.randn(rank, width), torch.randn(out, rank)
    best = []
    for _ in range(3):
        started = time.perf_counter()
        states @ weight.T
        gradient @ weight
        if rank:
            inner = states.float() @ a.T
            inner @ b.T
            inner_gradient = gradient.float() @ b
            inner_gradient @ a, inner_gradient.T @ states.float(), gradient.float().T @ inner
        best.append(time.perf_counter() - started)
    return min(best)

layers = sum(count * seconds(tokens, *sizes) for count, sizes in shapes)
print(json.dumps([layers / tokens, seconds(positions, *heads) / positions]))
"""

CURVE = """
import json, sys
import torch, transformers
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from edgetune.batches import BUDGET, IGNORED, Collator, micro_batches
from edgetune.loss import CompletionLoss
from edgetune.prompt import Sample

values, lengths, targets, folder = (json.loads(argument) for argument in sys.argv[1:])
source = torch.Generator().manual_seed(0)
make = lambda prompt, answer: Sample(
    torch.randint(1, 2000, (prompt + answer,), generator=source).tolist(), bytes(prompt) + bytes([1]) * answer)
rows = [make(*pair) for pair in lengths]
collate = Collator(__import__("pathlib").Path(folder))

def curve(step):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(pad_token_id=0, bos_token_id=0, eos_token_id=0, **values)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=targets)).train()
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=2e-4)
    losses = []
    compute = step(model)
    for at in range(50):
        chosen = [rows[(8 * at + row) % len(rows)] for row in range(8)]
        losses.append(compute(collate(chosen)))
        optimizer.step()
        optimizer.zero_grad()
    return losses

def plain(model):
    def compute(batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        return loss.item()
    return compute

def ours(model):
    loss = CompletionLoss(model)
    def compute(batch):
        count, total = int((batch["labels"][:, 1:] != IGNORED).sum()), 0.0
        for group in micro_batches(batch, budget=BUDGET, rows=8):
            part = loss.part(model, group, count)
            part.backward()
            total += part.item()
        return total
    return compute

one, other = curve(plain), curve(ours)
print(max(abs(a - b) / a for a, b in zip(one, other)))
"""


def main() -> None:
    """Train with each of them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="135M", help="docs/performance.md has 0.5B")
    parser.add_argument("--answers", choices=("short", "long"), default="short", help="long: as long as the prompts")
    parser.add_argument("--method", choices=("lora", "qlora"), default="lora")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--trl-rows", type=int, default=8, help="in bfloat16; 0: leave it out")
    parser.add_argument("--trl-float32-rows", type=int, default=8, help="0: leave it out")
    parser.add_argument("--olive-rows", type=int, default=8, help="with --method lora; 0: leave it out")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        numbers = compared(Path(scratch), arguments)
    print(table(numbers))
    if arguments.save:
        kind = f"{arguments.model}-{arguments.method}-{arguments.answers}".replace(".", "_")
        save(f"training-{kind}", numbers, "torch", "transformers", "peft")


def lengths(count: int, answers: str) -> list[tuple[int, int]]:
    """Return tokens of prompt and completion: log-normal, seed 0."""
    source, found = random.Random(0), []
    for _ in range(count):
        prompt = round(source.lognormvariate(math.log(180), 0.6))
        completion = prompt if answers == "long" else round(source.lognormvariate(math.log(24), 0.8))
        completion = min(max(completion, 2), LONGEST // 2)
        found.append((min(max(prompt, TEMPLATE), LONGEST - completion), completion))
    return found


def compared(scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all of them; return their numbers. Those of another number of rows are of the first of the same rows."""
    rows = lengths(arguments.rows, arguments.answers)
    project = prepared(scratch / "my-slm", arguments, rows)
    runs = {"edgetune": edgetune(project, arguments.rows)}
    dtype = runs["edgetune"].pop("dtype")
    for kind, count in (("bfloat16", arguments.trl_rows), ("float32", arguments.trl_float32_rows)):
        if count:
            runs[f"TRL, {kind}"] = trl(project, scratch, arguments, kind, count)
    if arguments.olive_rows and arguments.method == "lora":
        runs["Olive, bfloat16"] = olive(project, scratch, arguments.olive_rows)
    dtypes = dict.fromkeys([dtype, *(name.partition(", ")[2] for name in runs if name != "edgetune")])
    per_second = {kind: bare(arguments.model, rows, kind) for kind in dtypes}
    return {
        "model": arguments.model,
        "method": arguments.method,
        "answers": arguments.answers,
        "dtype": dtype,
        "runs": runs,
        "bare": per_second,
        "curve": curve(rows),
    }


def prepared(project: Path, arguments: argparse.Namespace, rows: list[tuple[int, int]]) -> Path:
    """Make the project with a random base model and the rows."""
    random_project(project, arguments.model, prompt_format="phi3", method=arguments.method)
    lines = [
        json.dumps({"phrase": " ".join(["the"] * max(prompt - TEMPLATE, 1)), "tone": " ".join(["the"] * completion)})
        for prompt, completion in rows
    ]
    (project / "datasets/train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return project


def configured(project: Path, name: str, rows: int, **settings: Any) -> Path:
    """Write the workflow file for so many of the rows."""
    path = project / "fine-tuning/olive-config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    step = next(iter(config["passes"]))
    tuning = config["passes"][step]
    config["data_configs"] = config["data_configs"][:1]
    source = {"data_name": "json", "data_files": "../datasets/train.jsonl", "split": f"train[:{rows}]"}
    config["data_configs"][0]["load_dataset_config"] = source
    config["data_configs"][0]["pre_process_data_config"]["max_seq_len"] = LONGEST
    for key in ("eval_data_config", "torch_dtype"):
        tuning.pop(key, None)
    tuning |= {"r": 16, "alpha": 16, "lora_dropout": 0.05, "target_modules": TARGETS, **settings.pop("tuning", {})}
    tuning["training_args"] = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "seed": 0, **settings}
    if name != path.name:
        config["passes"] = {step: tuning}
    path = path.with_name(name)
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def edgetune(project: Path, rows: int) -> dict[str, Any]:
    """Train with edgetune, which chooses its dtype itself."""
    configured(project, "olive-config.json", rows, save_strategy="no")
    _, peak = measured([sys.executable, "-m", "edgetune", "train"], project, HF_HUB_OFFLINE="1")
    found = json.loads((project / "gen-model/adapter/manifest.json").read_text(encoding="utf-8"))["metrics"]
    return {"rows": rows, "samples": found["rows_per_second"], "peak": peak, "dtype": found["torch_dtype"]}


def trl(project: Path, scratch: Path, arguments: argparse.Namespace, dtype: str, rows: int) -> dict[str, Any]:
    """Train with TRL's SFTTrainer."""
    model, result = project / "model-cache/random" / arguments.model, scratch / f"trl-{dtype}.json"
    data = project / "datasets/train.jsonl"
    given = [str(model), str(data), dtype, str(rows), json.dumps(TARGETS), arguments.method, str(result)]
    _, peak = measured([str(peer("trl")), "-c", TRL, *given], scratch, HF_HUB_OFFLINE="1")
    return {"rows": rows, "samples": samples_per_second(result), "peak": peak}


def olive(project: Path, scratch: Path, rows: int) -> dict[str, Any]:
    """Train with Olive's own pass."""
    config = configured(project, "olive-only.json", rows, tuning={"torch_dtype": "bfloat16"})
    result = scratch / "olive.json"
    command = [str(peer("olive")), "-c", OLIVE, config.name, str(result)]
    _, peak = measured(command, config.parent, HF_HUB_OFFLINE="1", OLIVE_DISABLE_TELEMETRY="1")
    return {"rows": rows, "samples": samples_per_second(result), "peak": peak}


def samples_per_second(result: Path) -> float:
    """Return what transformers' Trainer said of its run."""
    return float(json.loads(result.read_text(encoding="utf-8"))["train_samples_per_second"])


def bare(model: str, rows: list[tuple[int, int]], dtype: str) -> float:
    """Return the rows per second of the matrix products alone, in pieces of 512 tokens and 64 positions."""
    sizes = MODELS[model]
    hidden, middle, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    head = hidden // sizes["num_attention_heads"]
    keys = head * sizes["num_key_value_heads"]
    shapes = [(2, (hidden, hidden, 16)), (2, (hidden, keys, 16)), (2, (hidden, middle)), (1, (middle, hidden))]
    counted = [(layers * count, shape) for count, shape in shapes]
    given = [json.dumps(value) for value in (counted, (hidden, sizes["vocab_size"]), 512, 64, dtype)]
    said = subprocess.run([sys.executable, "-c", BARE, *given], check=True, capture_output=True, text=True).stdout
    token, position = json.loads(said)
    seconds = sum((prompt + completion) * token + completion * position for prompt, completion in rows)
    return float(len(rows) / seconds)


def curve(rows: list[tuple[int, int]]) -> float:
    """Return how far the losses of 50 steps are from those of full logits and padded batches, at most."""
    small = MODELS["135M"] | {"hidden_size": 144, "num_hidden_layers": 2, "intermediate_size": 384, "vocab_size": 4096}
    given = [json.dumps(value) for value in (small, [(p // 4 + 2, c // 4 + 2) for p, c in rows], TARGETS)]
    command = [sys.executable, "-c", CURVE, *given, json.dumps(str(BUILT_IN))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def table(numbers: dict[str, Any]) -> str:
    """Return the numbers as Markdown; ratios are edgetune's to the peer's."""
    ours = numbers["runs"]["edgetune"]
    head = "| trained by | rows | samples/s | edgetune is faster | peak memory | edgetune's peak |"
    lines = [head, "|---|--:|--:|--:|--:|--:|"]
    for name, run in numbers["runs"].items():
        title = f"edgetune, {numbers['dtype']}" if run is ours else name
        speed, memory = ours["samples"] / run["samples"], ours["peak"] / run["peak"]
        ratios = (f"x{speed:.2f}", f"x{memory:.2f}") if run is not ours else ("", "")
        peak = f"{run['peak'] / 1000:.1f} GB"
        lines.append(f"| {title} | {run['rows']} | {run['samples']:.3f} | {ratios[0]} | {peak} | {ratios[1]} |")
    for dtype, rate in numbers["bare"].items():
        lines.append(f"| bare products, {dtype} | | {rate:.3f} | x{ours['samples'] / rate:.2f} | | |")
    differs = (
        f"Losses of 50 steps differ from those of padded batches and full logits by {numbers['curve']:.0e} at most"
    )
    return "\n".join(lines) + f"\n\n{differs} (a small model, float32)."


if __name__ == "__main__":
    main()
