"""Give an exported model inputs for the matrices of a LoRA adapter, beside each matrix that the adapter changes.

Their default is an adapter of rank 0, which changes nothing; the rank is open, so that adapters of other ranks fit. The
names and shapes are those of Olive's ``convert-adapters``: what ``ExtractAdapters`` makes for the adapter of one model
is bound to the names that the builder gives its nodes. The builder's own way, ``adapter_path``, would load the whole
model, quantise the adapter's matrices, and repeat A for each part of a fused matrix.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import EdgetuneError, failure

if TYPE_CHECKING:
    import onnx

    from edgetune.merge import Adapter

_QKV = ("attn/q_proj", "attn/k_proj", "attn/v_proj")
_PRODUCTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "qkv_proj": (("attn/qkv_proj",), _QKV),
    **{name: ((f"attn/{name}",),) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    "dense": (("attn/o_proj",),),
    "out_proj": (("attn/o_proj",),),
    "gate_up_proj": (("mlp/gate_proj", "mlp/up_proj"),),
    **{name: ((f"mlp/{name}",),) for name in ("gate_proj", "up_proj", "down_proj", "fc1", "fc2")},
}
"""What the builder calls the products with a module's matrix: one, or one for each part of a fused matrix."""

MODULES = tuple(_PRODUCTS)
"""The modules that an adapter beside an exported model can change."""

_MODULE = re.compile(r"\blayers\.(\d+)\.\w+\.(\w+)\.weight$")
_RANK = "lora_r"


def input_names(name: str) -> tuple[str, str]:
    """Return the inputs for A and B beside the base model's tensor of this name."""
    module = name.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def builder_options(names: Iterable[str]) -> dict[str, Any]:
    """Return what the builder has to be told: it joins the matrices of queries, keys and values otherwise."""
    separate = {f"{product.rpartition('/')[2]}.weight" for product in _QKV}
    return {"disable_qkv_fusion": True} if any(name.rpartition("self_attn.")[2] in separate for name in names) else {}


def add_inputs(path: Path, adapter: "Adapter", names: Iterable[str]) -> None:
    """Give the ONNX model at ``path`` inputs for what the adapter does to these tensors of the base model.

    Raises EdgetuneError when there is no product with such a tensor, or the adapter's matrices do not fit it.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph = _Graph(model.graph)
    for name in names:
        graph.add(name, adapter)
    graph.finish()
    onnx.save(model, path)


class _Graph:
    """A graph that nodes are put into."""

    def __init__(self, graph: "onnx.GraphProto") -> None:
        self.graph = graph
        self.order = {node.output[0]: at for at, node in enumerate(graph.node)}
        self.types = {value.name: value.type.tensor_type for value in graph.value_info}
        self.before: dict[int, list[onnx.NodeProto]] = {}
        self.after: dict[int, list[onnx.NodeProto]] = {}

    def add(self, name: str, adapter: "Adapter") -> None:
        """Add x·A·B to the product of x with a tensor, or its parts to those of the tensor's parts."""
        from onnx import helper

        outputs = self._products(name)
        widths = [self.types[output].shape.dim[-1].dim_value for output in outputs]
        a, b = input_names(name)
        update = adapter[name]
        if sum(widths) != len(update.b):
            raise _unfit(name, f"its matrices have {len(update.b)} rows, the exported ones {sum(widths)}")
        self._input(a, outputs[0], (update.a.shape[1], _RANK))
        self._input(b, outputs[0], (_RANK, len(update.b)))
        first = min(self.order[output] for output in outputs)
        stem = f"/{name.removesuffix('.weight').replace('.', '/')}/lora"
        nodes = [
            helper.make_node("MatMul", [self.graph.node[first].input[0], a], [f"{stem}_A"], name=f"{stem}_A/MatMul"),
            helper.make_node("MatMul", [f"{stem}_A", b], [f"{stem}_B"], name=f"{stem}_B/MatMul"),
        ]
        parts = [f"{stem}_B"]
        if len(outputs) > 1:
            parts = [f"{stem}_{at}" for at in range(len(outputs))]
            sizes = helper.make_tensor(f"{stem}/sizes", 7, [len(widths)], widths)  # 7: int64
            self.graph.initializer.append(sizes)
            nodes.append(helper.make_node("Split", [f"{stem}_B", sizes.name], parts, name=f"{stem}/Split", axis=-1))
        self.before.setdefault(first, []).extend(nodes)
        for output, part in zip(outputs, parts, strict=True):
            at = self.order[output]
            self.graph.node[at].output[0] = f"{output}/base"
            add = helper.make_node("Add", [f"{output}/base", part], [output], name=f"{output}/lora/Add")
            self.after.setdefault(at, []).append(add)

    def finish(self) -> None:
        """Put the new nodes where they belong: a node comes after those that it reads."""
        nodes = [
            node
            for at, given in enumerate(list(self.graph.node))
            for node in (*self.before.get(at, ()), given, *self.after.get(at, ()))
        ]
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def _products(self, name: str) -> tuple[str, ...]:
        found = _MODULE.search(name)
        for products in _PRODUCTS.get(found[2], ()) if found else ():
            outputs = tuple(f"/model/layers.{found[1]}/{product}/MatMul/output_0" for product in products)  # type: ignore[index]
            if all(output in self.order and output in self.types for output in outputs):
                return outputs
        raise _unfit(name, "onnxruntime-genai's builder makes no product of its own with it")

    def _input(self, name: str, like: str, shape: tuple[int | str, ...]) -> None:
        """Add an input whose default has no elements."""
        from onnx import helper

        kind = self.types[like].elem_type
        self.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
        empty = [0 if size == _RANK else size for size in shape]
        self.graph.initializer.append(helper.make_tensor(name, kind, empty, b"", raw=True))


def _unfit(name: str, why: str) -> EdgetuneError:
    hint = "merge it: add a MergeAdapterWeights pass before ModelBuilder, or leave the module out of target_modules"
    return failure(f"the adapter cannot stay beside the exported model: {name}: {why}", hint=hint)


def inputs_of(path: Path) -> "Iterator[tuple[str, tuple[int, ...], int]]":
    """Yield name, shape (0 for the rank) and type of each input for an adapter that the model at ``path`` has."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    for value in graph.input:
        if value.name.endswith((".lora_A.weight", ".lora_B.weight")):
            tensor = value.type.tensor_type
            yield value.name, tuple(dim.dim_value for dim in tensor.shape.dim), tensor.elem_type
