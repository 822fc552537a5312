"""The architecture matrix: small random models through the whole way, and the table of it in docs/architectures.md.

Each model has the configuration file of a published one, with every kind of layer and every feature, at a few
dozen numbers where that one has thousands. ``make matrix`` writes the table anew.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from copier import run_copy
from safetensors.torch import load_file

from edgetune import config, workflow
from edgetune.checks.conversion import compare_conversion
from edgetune.errors import EdgetuneError
from edgetune.generation import Backend, Sampling
from edgetune.onnx_backend import OnnxBackend
from edgetune.progress import Progress
from edgetune.project import BUILTIN_MODELS, Project
from edgetune.stages import Job
from edgetune.torch_backend import open_model

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "architectures.md"
BEGIN, END = "<!-- make matrix: from here -->\n", "<!-- make matrix: to here -->\n"
METHODS = ("LoRA", "QLoRA")
PACKAGES = ("torch", "transformers", "peft", "onnxruntime", "onnxruntime-genai")

SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
CONTEXT, WINDOW, ORIGINAL = 512, 96, 96  # positions: of the model, of a sliding window, before stretching
LENGTHS = 48, 90, 300  # tokens of the texts that are compared and continued: within, up to, and beyond these

SMALL = {
    "vocab_size": 2304,  # that of the built-in tokenizer
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    # Wide enough for attention to matter: with the usual 0.02, a wrong position encoding would hardly show.
    "initializer_range": 0.1,
    "torch_dtype": "bfloat16",
}
_SHORT_FACTORS, _LONG_FACTORS = [[start + step * i for i in range(24)] for start, step in ((1.0, 0.05), (1.2, 2.0))]


@dataclass(frozen=True)
class Case:
    """A small model like a published one."""

    name: str
    like: str
    features: str
    config: dict[str, Any]
    modules: tuple[str, ...] = SPLIT
    note: str = ""


def _longrope(kind: str, count: int) -> dict[str, Any]:
    return {
        "original_max_position_embeddings": ORIGINAL,
        "sliding_window": 262144,
        "rope_theta": 10000.0,
        "rope_scaling": {
            kind: "longrope",
            "short_factor": _SHORT_FACTORS[:count],
            "long_factor": _LONG_FACTORS[:count],
        },
    }


CASES = (
    Case(
        "phi3",
        "Phi-3-mini-4k",
        "fused matrices, sliding window",
        {"model_type": "phi3", "num_key_value_heads": 4, "sliding_window": WINDOW}
        | {"original_max_position_embeddings": CONTEXT, "rope_theta": 10000.0, "rope_scaling": None},
        FUSED,
    ),
    Case(
        "phi3-longrope",
        "Phi-3.5-mini",
        "fused matrices, LongRoPE beyond its original length",
        {"model_type": "phi3", "num_key_value_heads": 4, **_longrope("type", 16)},
        FUSED,
    ),
    Case(
        "phi3-longrope-partial",
        "Phi-4-mini",
        "LongRoPE on three quarters of each head, grouped queries, tied embeddings",
        {"model_type": "phi3", "hidden_size": 256, "partial_rotary_factor": 0.75, "tie_word_embeddings": True}
        | _longrope("type", 24),
        FUSED,
    ),
    Case(
        "phi3-longrope-saved",
        "Phi-4-mini, saved by transformers 5",
        "the same with `rope_parameters`",
        {"model_type": "phi3", "hidden_size": 256, "tie_word_embeddings": True, "sliding_window": 262144}
        | {"original_max_position_embeddings": ORIGINAL}
        | {"rope_parameters": _longrope("rope_type", 24)["rope_scaling"]
           | {"partial_rotary_factor": 0.75, "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL}},
        FUSED,
        "repaired: the builder fails",
    ),
    Case("llama", "TinyLlama", "untied embeddings", {"model_type": "llama", "rope_theta": 10000.0}),
    Case(
        "llama-tied",
        "SmolLM2",
        "tied embeddings",
        {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 100000, "num_attention_heads": 8},
    ),
    Case(
        "llama3-rope",
        "Llama-3.2-1B",
        "stretched positions beyond their original length, tied embeddings, head size of its own",
        {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 64, "rope_theta": 500000.0}
        | {"rope_scaling": {"factor": 4.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
           | {"original_max_position_embeddings": ORIGINAL}},
    ),
    Case(
        "qwen2",
        "Qwen2.5-0.5B",
        "biases, tied embeddings, window switched off",
        {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1000000.0, "sliding_window": WINDOW}
        | {"use_sliding_window": False, "max_window_layers": 1},
    ),
    Case(
        "qwen2-window",
        "Qwen2 with `use_sliding_window`",
        "biases, untied embeddings, sliding window in some layers",
        {"model_type": "qwen2", "rope_theta": 1000000.0, "sliding_window": WINDOW}
        | {"use_sliding_window": True, "max_window_layers": 1},
        note="repaired: the builder gives all layers the window",
    ),
    Case(
        "qwen3",
        "Qwen3-0.6B",
        "normalised queries and keys, head size of its own, tied embeddings",
        {"model_type": "qwen3", "head_dim": 48, "tie_word_embeddings": True, "rope_theta": 1000000},
    ),
    Case(
        "mistral",
        "Mistral-7B",
        "sliding window, untied embeddings",
        {"model_type": "mistral", "sliding_window": WINDOW, "rope_theta": 10000.0},
    ),
    Case(
        "gemma2",
        "Gemma-2-2b",
        "sliding window in every other layer, soft caps, tied embeddings",
        {"model_type": "gemma2", "head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 32}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_size": 160},
        note="repaired: the builder gives the window to the other layers",
    ),
    Case(
        "gemma3",
        "Gemma-3-1b",
        "five layers with a sliding window and one without, two frequencies, tied embeddings",
        {"model_type": "gemma3_text", "num_hidden_layers": 7, "head_dim": 32, "num_key_value_heads": 1}
        | {"rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None, "sliding_window": WINDOW}
        | {"sliding_window_pattern": 6, "query_pre_attn_scalar": 32, "hidden_size": 160},
        note="repaired: the builder fails",
    ),
    Case(
        "smollm3",
        "SmolLM3-3B",
        "every fourth layer without positions, tied embeddings",
        {"model_type": "smollm3", "num_hidden_layers": 5, "tie_word_embeddings": True, "rope_theta": 5000000.0}
        | {"no_rope_layers": [1, 1, 1, 0, 1], "no_rope_layer_interval": 4, "use_sliding_window": False},
        note="repaired: the builder fails",
    ),
    Case(
        "granite",
        "Granite-3.3-2b",
        "multipliers, tied embeddings",
        {"model_type": "granite", "embedding_multiplier": 12.0, "attention_multiplier": 0.03125}
        | {"residual_multiplier": 0.22, "logits_scaling": 8.0, "tie_word_embeddings": True, "rope_theta": 10000000.0},
    ),
    Case(
        "phi",
        "Phi-2",
        "layer norms and biases, 0.4 of each head rotated",
        {"model_type": "phi", "hidden_size": 320, "num_key_value_heads": 4, "partial_rotary_factor": 0.4},
        ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
        "repaired: the builder rotates whole heads, and takes another epsilon",
    ),
    Case(
        "nemotron",
        "Nemotron-Mini-4B",
        "layer norms, half of each head rotated",
        {"model_type": "nemotron", "partial_rotary_factor": 0.5},
        ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
        "repaired: the builder rotates whole heads, and takes another epsilon",
    ),
    Case(
        "gemma",
        "Gemma-2b",
        "one key and value head, tied embeddings",
        {"model_type": "gemma", "head_dim": 32, "num_key_value_heads": 1, "hidden_size": 160}
        | {"hidden_act": "gelu_pytorch_tanh"},
    ),
    Case(
        "ernie4_5",
        "ERNIE-4.5-0.3B",
        "tied embeddings, head size of its own",
        {"model_type": "ernie4_5", "head_dim": 64, "tie_word_embeddings": True, "rope_theta": 500000.0},
    ),
    Case(
        "hunyuan",
        "Hunyuan-0.5B",
        "norms after the rotation, stretched positions",
        {"model_type": "hunyuan_v1_dense", "head_dim": 32, "tie_word_embeddings": True, "rope_theta": 10000.0}
        | {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1}
           | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        note="repaired: the builder fails",
    ),
    Case(
        "lfm2",
        "LFM2-350M",
        "layers of convolution and of attention, tied embeddings",
        {"model_type": "lfm2", "num_hidden_layers": 3, "layer_types": ["conv", "conv", "full_attention"]}
        | {"conv_L_cache": 3, "conv_bias": False, "block_ff_dim": 192, "block_auto_adjust_ff_dim": False},
        ("q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"),
    ),
    Case("olmo", "OLMo-1B", "norms without weights", {"model_type": "olmo", "num_key_value_heads": 4}),
    Case(
        "gpt_oss",
        "gpt-oss-20b",
        "experts, sinks, YaRN",
        {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64},
    ),
    Case(
        "qwen2-yarn",
        "Qwen2.5 with YaRN",
        "stretched positions",
        {"model_type": "qwen2"}
        | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}},
    ),
)  # fmt: skip


def random_model(content: dict[str, Any], folder: Path) -> Path:
    """Write a model with random weights and just this configuration file, and the built-in tokenizer."""
    folder.mkdir(parents=True)
    path = folder / "config.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    model = random_weights(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    path.write_text(json.dumps(content | {"architectures": [type(model).__name__]}), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(BUILTIN_MODELS["edgetune/tiny-phi3"] / name, folder / name)
    return folder


def random_weights(folder: Path) -> Any:
    """Return a model as the folder's config.json describes it."""
    import transformers

    settings = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    for weight in model.parameters():
        if weight.ndim == 1:  # norms and biases would begin as ones and zeros, where mistakes do not show
            weight.data += 0.2 * torch.randn_like(weight)
    return model


@dataclass
class Row:
    """What came out for one architecture."""

    case: Case
    refused: str = ""
    trained: dict[str, int] = field(default_factory=dict)
    """Layers that were changed, by module."""
    difference: float = 0.0
    """Largest difference of logits in fp32, as a share of the largest logit."""
    same_answers: bool = True
    """Whether fp32 ONNX and transformers continue texts alike."""
    int4: float = 0.0
    """Mean correlation of int4's logits with those of the merged model; random weights hardly prefer any token."""

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the table that are the same on every machine."""
        modules = ", ".join(f"`{name}`" for name in self.case.modules)
        facts = self.case.name, self.case.like, self.case.features
        return (*facts, "refused", "", self.refused) if self.refused else (*facts, "ok", modules, self.case.note)

    def line(self) -> str:
        """Return the row of the table."""
        *start, result, modules, note = self.cells()
        measured = (f"{self.difference:.0e}", f"{self.int4:.2f}") if not self.refused else ("", "")
        return _line((*start, result, *measured, modules, note))


def run(case: Case, root: Path, method: str = "LoRA") -> Row:
    """Take a random model through a fresh project in ``root``: download, training, merge, export twice, answers."""
    row, model = Row(case), random_model(SMALL | case.config, root.parent / "published" / case.name)
    project = Project(root)
    _configure(project, case, method)
    try:
        workflow.run(_job(project), "download", source=model)
    except EdgetuneError as error:
        row.refused = error.problems[0].message.partition(case.name + " ")[2]
        return row
    workflow.run(_job(project), "export")
    row.trained = _changed(project.stage_folder("train"))
    merged, exported = project.stage_folder("merge"), project.stage_folder("export")
    job = _job(project)
    reference = open_model(job, merged, "float32")
    row.difference, _ = compare(reference, OnnxBackend(exported))
    row.same_answers = _answers(reference) == _answers(OnnxBackend(exported))
    with job.progress.running("verify", project.log("verify")):
        row.difference = max(row.difference, compare_conversion(job, merged, root / "prefix").difference)
    _edit(project, lambda content: content["passes"]["builder"].update(precision="int4", int4_block_size=32))
    workflow.run(_job(project), "export")
    _, row.int4 = compare(reference, OnnxBackend(exported))
    return row


def _configure(project: Project, case: Case, method: str) -> None:
    def change(content: Any) -> None:
        content["input_model"]["model_path"] = f"../model-cache/acme/{case.name}"
        for data in content["data_configs"]:
            data["load_dataset_config"]["split"] = "train[:32]"
        tuning = content["passes"].pop("lora")
        tuning |= {"type": method, "r": 8, "alpha": 16, "target_modules": list(case.modules), "torch_dtype": "float32"}
        tuning["training_args"] |= {"max_steps": 4, "per_device_train_batch_size": 4, "eval_strategy": "no"}
        builder = {"type": "ModelBuilder", "precision": "fp32", "search": {"max_length": CONTEXT}}
        content["passes"] = {"tuning": tuning} | content["passes"] | {"builder": builder}

    _edit(project, change)


def _edit(project: Project, change: Any) -> None:
    content = json.loads(project.config.read_text(encoding="utf-8"))
    change(content)
    project.config.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _job(project: Project) -> Job:
    return Job.start(project, config.load(project), Progress(project.events))


def _changed(adapter: Path) -> dict[str, int]:
    """Return in how many layers each module has an adapter that was trained: its B was zero before."""
    found: dict[str, int] = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        if name.endswith(".lora_B.weight") and tensor.any():
            module = name.removesuffix(".lora_B.weight").rpartition(".")[2]
            found[module] = found.get(module, 0) + 1
    return found


def _texts() -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(0)
    for length in LENGTHS:
        yield torch.randint(4, SMALL["vocab_size"], (length,), generator=generator).tolist()  # type: ignore[call-overload]


def compare(reference: Backend, exported: Backend) -> tuple[float, float]:
    """Return the largest difference of logits as a share of the largest, and their mean correlation."""
    differences, correlations = [], []
    for ids in _texts():
        one, other = (torch.from_numpy(backend.logits(ids, 1)) for backend in (reference, exported))
        differences.append(float((one - other).abs().max() / one.abs().max()))
        one, other = (logits - logits.mean(-1, keepdim=True) for logits in (one, other))
        correlations.append(torch.cosine_similarity(one, other, dim=-1))
    return max(differences), float(torch.cat(correlations).mean())


def _answers(backend: Backend) -> list[str]:
    """Continue each text by a few tokens, one after the other: what is remembered must be right as well."""
    prompts = list(_texts())
    return [answer.text for _, answer in sorted(backend.answers(prompts, Sampling(max_new_tokens=12)))]


@cache
def versions() -> dict[str, str]:
    """Return the versions of the tested set."""
    lines = (REPOSITORY / "src/edgetune/constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name: pins[name] for name in PACKAGES}


def table(rows: list[Row]) -> str:
    """Return the generated part of the page."""
    heads = ("architecture", "like", "what it covers", "result", "fp32", "int4", "trained in every layer", "note")
    said = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [f"With {said}:", "", _line(heads), "|---" * len(heads) + "|", *map(Row.line, rows)]
    return "".join(f"{line}\n" for line in lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    """Run the matrix and write the table."""
    with tempfile.TemporaryDirectory() as name:
        rendered = Path(name) / "rendered"
        run_copy(str(REPOSITORY), rendered, defaults=True, quiet=True, vcs_ref="HEAD")
        rows = [run(case, Path(shutil.copytree(rendered, Path(name) / case.name))) for case in CASES]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + table(rows) + "\n" + END + rest.partition(END)[2], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
