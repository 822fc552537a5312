"""How much memory, disk and time the steps take, from sizes alone: no weights are read, no torch is imported.

docs/memory.md derives the formulas and shows them against measured peaks; ``tests/benchmarks/preflight.py`` measures.
All amounts are bytes unless a name says otherwise.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgetune.batches import BUDGET
from edgetune.loss import LOGITS_BYTES

Method = Literal["LoRA", "QLoRA", "DoRA", "none"]
Dtype = Literal["bfloat16", "float32"]

SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

LIBRARIES = 650_000_000
"""Python with torch, transformers and PEFT before any weight is loaded."""
FRAGMENTS = {"LoRA": 1.4, "DoRA": 1.4, "QLoRA": 2.2, "none": 1.0}
"""What activations take in the heap: tensors that go leave gaps between those that stay (measured, glibc).

QLoRA makes and drops a float copy of every matrix on the way.
"""
LOGIT_COPIES = 3
"""What a chunk of logits takes in float32: the probabilities, and two gradients (cross entropy's and softmax's)."""
TRAINED_BYTES = 16
"""Per parameter of the adapter: value, gradient, and Adam's two moments, in float32."""
NF4_BYTES = 0.5 + 4 / 64
"""Per weight of a linear layer under QLoRA: four bits, and a float32 scale for every 64 weights."""
LOADED_BYTES = 11
"""Per weight of the layers, where onnxruntime-genai's builder holds the model (measured)."""
LOADED_EMBEDDING_BYTES = 21
"""Per weight of the embedding, together with the output layer (measured)."""
BUILDER = 580_000_000
"""The libraries that the export loads (measured)."""
EMBEDDING_BYTES = 4
"""Per weight of an exported model's embedding."""
MERGE_BYTES = 100_000_000
"""Some rows of a matrix in float32 or float64 and the adapter's two factors of it (measured)."""
GFLOPS = {
    "bfloat16": {"amx_bf16": 150, "avx512_bf16": 60, "bf16": 40, "avx512f": 12, "": 5},
    "float32": {"avx512f": 40, "avx2": 25, "": 10},
}
"""Billions of operations per second and core that matrix products reach in training, best instruction set first."""
EXPORT_SECONDS = 50e-9
"""Per parameter, on two cores (measured: 43e-9 to 66e-9 from half a billion to four)."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a base model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool
    """Whether the output layer is the embedding."""
    dtype: str
    """The type of the published weights."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape | None":
        """Read a config.json; None when it does not name its sizes as the exportable architectures do."""
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        sizes = [config.get(name) for name in names]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            return None
        hidden, layers, heads, intermediate, vocabulary = (int(size or 0) for size in sizes)
        gemma = str(config.get("model_type")).startswith("gemma")  # whose configurations leave out what they share
        return cls(
            hidden,
            layers,
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or hidden // heads,
            intermediate,
            vocabulary,
            bool(config.get("tie_word_embeddings", gemma)),
            str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
        )

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Width of input and output of a layer's matrices, under all the names they go by."""
        query, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
            "qkv_proj": (self.hidden, query + 2 * keys),
            "gate_up_proj": (self.hidden, 2 * self.intermediate),
        }

    @property
    def linear_parameters(self) -> int:
        """Parameters of the layers."""
        fused = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
        sizes = self.linear_layers
        return self.layers * sum(sizes[name][0] * sizes[name][1] for name in fused)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding, and of the output layer where it has its own."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All of them but for norms and biases."""
        return self.linear_parameters + self.embedding_parameters

    @property
    def stored(self) -> int:
        """Size of the published weights."""
        return self.parameters * SIZE.get(self.dtype, 2)


@dataclass(frozen=True)
class Plan:
    """What a workflow file asks for, as far as it takes memory, disk or time."""

    shape: Shape
    method: Method
    dtype: Dtype
    r: int = 0
    targets: tuple[str, ...] = ()
    dropout: bool = False
    batch: int = 1
    accumulation: int = 1
    checkpointing: bool = False
    longest: int = 1
    """Tokens of the longest row of the training data."""
    processes: int = 1
    """How many processes train on this machine, each with a share of the batch."""
    rows: int = 0
    """Rows of the training data; 0: not known."""
    tokens: int = 0
    """Tokens that training reads in all epochs together."""
    learned: int = 0
    """How many of these tokens the loss is taken on."""
    precision: str = "int4"
    block: int = 32
    """Weights that share a scale in int4."""
    streamed: bool = True
    """Whether the export leaves the weights in their files."""

    @property
    def trained(self) -> int:
        """Parameters of the adapter: r times the widths of every matrix it changes (arXiv:2106.09685, section 4)."""
        return self.r * sum(one + other for one, other in self.adapted) * self.shape.layers

    @property
    def adapted(self) -> list[tuple[int, int]]:
        """Width of input and output of the matrices of a layer that get an adapter."""
        known = self.shape.linear_layers
        return [known[name] for name in self.targets if name in known]

    @property
    def weights(self) -> float:
        """The base model in memory while it is trained."""
        shape, size = self.shape, SIZE[self.dtype]
        linear = NF4_BYTES if self.method == "QLoRA" else size
        return shape.linear_parameters * linear + shape.embedding_parameters * size

    @property
    def layer_activations(self) -> float:
        """What the backward pass needs of one layer, per token.

        Both norms keep their input in float32; attention keeps queries, keys, values and its result; the gated MLP
        keeps its two halves and the activated one. Every matrix with LoRA keeps its input in float32, a byte of
        dropout for each number of it, and the r numbers between A and B; with DoRA its output twice as well. Frozen
        matrices keep nothing: only their weights are needed.
        """
        shape, size = self.shape, SIZE[self.dtype]
        attention = 2 * (shape.heads + shape.kv_heads) * shape.head_size
        base = 8 * shape.hidden + size * (attention + 3 * shape.intermediate)
        magnitude = 8 if self.method == "DoRA" else 0
        inputs = 5 if self.dropout else 4
        return base + sum(inputs * one + 4 * self.r + magnitude * other for one, other in self.adapted)


def train_memory(plan: Plan) -> float:
    """Return the peak of training: the start of the backward pass through a micro-batch, or loading the weights.

    With gradient checkpointing a layer keeps its input only; one layer at a time is computed again. Weights of the
    dtype they are published in are used as they lie in the file; for another one they are there twice while they are
    cast. Evaluation keeps nothing and needs less. Every process has all of it.
    """
    shape, size = plan.shape, SIZE[plan.dtype]
    rows = -(-plan.batch * plan.accumulation // plan.processes)
    tokens = max(plan.longest, min(min(rows, plan.rows or rows) * plan.longest, BUDGET))
    if plan.checkpointing:
        kept = size * shape.hidden * shape.layers + plan.layer_activations
    else:
        kept = plan.layer_activations * shape.layers
    logits = LOGIT_COPIES * min(max(LOGITS_BYTES, 4 * shape.vocabulary), 4 * shape.vocabulary * tokens)
    read = 0 if plan.dtype == shape.dtype or plan.method == "QLoRA" else shape.stored
    held = TRAINED_BYTES * plan.trained + FRAGMENTS[plan.method] * tokens * kept + logits
    return plan.processes * (LIBRARIES + plan.weights + max(read, held))


def merge_memory(_plan: Plan) -> float:
    """Return the peak of merging: the weights go by some rows at a time, however many there are."""
    return LIBRARIES + MERGE_BYTES


def export_memory(plan: Plan) -> float:
    """Return the peak of the export: when the result is loaded as a check, which leaves the embedding in its file.

    The base model's weights stay in their files, unless the builder or another tool has to load the whole model.
    """
    shape = plan.shape
    embedding = shape.vocabulary * shape.hidden
    if not plan.streamed:
        return LIBRARIES + LOADED_BYTES * shape.linear_parameters + LOADED_EMBEDDING_BYTES * embedding
    return BUILDER + exported_bytes(plan) - EMBEDDING_BYTES * embedding


def verify_memory(plan: Plan) -> float:
    """Return the peak of verification: the merged and the exported model beside each other."""
    return LIBRARIES + SIZE[plan.dtype] * plan.shape.parameters + exported_bytes(plan)


def exported_bytes(plan: Plan) -> float:
    """Return the size of the exported model: the embedding stays float32, the output layer does not."""
    shape = plan.shape
    embedding = shape.vocabulary * shape.hidden
    size = {"int4": 0.5 + 4 / plan.block, "fp32": 4}.get(plan.precision, 2)
    return EMBEDDING_BYTES * embedding + size * (shape.linear_parameters + embedding)


MEMORY = {"train": train_memory, "merge": merge_memory, "export": export_memory, "verify": verify_memory}
"""The peak of every step that loads weights."""

DISK: dict[str, Callable[[Plan], float]] = {
    # The adapter, and while it is trained up to three checkpoints with Adam's moments.
    "train": lambda plan: (4 + 3 * 12) * plan.trained,
    "merge": lambda plan: plan.shape.stored,
    "export": lambda plan: 2 * exported_bytes(plan),  # quantised weights are put aside first
}
"""What every step writes."""


def gflops(dtype: Dtype, features: Container[str]) -> float:
    """Return the rate that a core with these instruction sets reaches."""
    return next(rate for name, rate in GFLOPS[dtype].items() if name in features or not name)


def seconds(plan: Plan, rate: float) -> dict[str, float]:
    """Return the time of the long steps at a rate in GFLOP/s, good to a factor of two or three.

    A forward pass takes 2 operations per parameter of the layers and token, and so does the gradient of the
    activations; that of the weights is needed for the adapter only. With checkpointing the forward pass is made twice.
    The output layer is needed for the learned tokens only.
    """
    shape = plan.shape
    output = 4 * shape.vocabulary * shape.hidden * plan.learned
    operations = (6 if plan.checkpointing else 4) * shape.linear_parameters * plan.tokens + output
    return {"train": operations / (1e9 * rate), "export": EXPORT_SECONDS * plan.shape.parameters}
