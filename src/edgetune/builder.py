"""Run onnxruntime-genai's builder without holding the model in memory.

The builder loads all weights, keeps them in the type that the exported model calculates in, and quantises them at the
end: ten bytes a weight and more (seen in 0.14.1; its graph code is used as it is). Here, the weights stay in their
files until they are needed, and every matrix is quantised as soon as the builder has placed it, in slices. The
quantiser is onnxruntime's, which works on all cores; what it makes goes to a file that the model is written from.
"""

import gc
import math
import mmap
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edgetune.errors import missing_extra
from edgetune.tensors import read_file

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnx_ir as ir
    import torch

_SLICE = 1_000_000  # weights at a time: the quantiser is quicker with them than with more, up to twice


def create(source: Path, folder: Path, work: Path, precision: str, **options: Any) -> None:
    """Make an ONNX model in ``folder`` of the model in ``source``; what is made on the way goes to ``work``.

    Raises what the builder raises, and EdgetuneError when it is not installed.
    """
    with ExitStack() as stack:
        weights = stack.enter_context(_Weights.of(source))
        try:
            from onnxruntime_genai.models import builder
        except ImportError as error:
            raise missing_extra("export", error) from None
        quantiser = _Quantiser(stack.enter_context((work / "quantised").open("w+b")))
        stack.enter_context(_patched(builder.Model, weights, quantiser))
        builder.create_model(str(source), str(source), str(folder), precision, cache_dir=str(work), **options)


@contextmanager
def _patched(model: Any, weights: "_Weights", quantiser: "_Quantiser") -> Iterator[None]:
    """Give the builder's class other ways to load, cast and quantise weights.

    They are methods that its classes for architectures override, too; ``create_model`` has no parameter for a class.
    """
    import onnx_ir as ir

    originals = {
        name: getattr(model, name) for name in ("load_weights", "make_initializer", "make_matmul_float", "to_int4")
    }

    def load_weights(self: Any, input_path: str) -> Any:
        lazy = (
            None if self.quant_type or "adapter_path" in self.extra_options else weights.model(trusted=self.hf_remote)
        )
        return lazy or originals["load_weights"](self, input_path)

    def make_initializer(self: Any, tensor: Any, /, name: str, to: Any = None) -> None:
        if to is None:
            originals["make_initializer"](self, tensor, name)
        else:
            _place(self, _cast(tensor, name, to, weights.release))

    def make_matmul_float(self: Any, matmul: Any, name: str, root_input: str, **options: Any) -> str:
        made: str = originals["make_matmul_float"](self, matmul, name, root_input, **options)
        if _is_quantised(self, name):
            quantiser.quantise(self, self.model.graph.node(name), matmul.weight)
            weights.release()
        return made

    def to_int4(self: Any) -> Any:
        if any(_is_left(self, node) for node in self.model.graph):
            ir.external_data.load_to_model(self.model)  # which does not know where these files are
            return originals["to_int4"](self)
        quantiser.move_to_the_end(self.model.graph)
        return self.model

    replacements = (load_weights, make_initializer, make_matmul_float, to_int4)
    try:
        for function in replacements:
            setattr(model, function.__name__, function)
        yield
    finally:
        for name, original in originals.items():
            setattr(model, name, original)


def _is_quantised(model: Any, name: str) -> bool:
    """Tell whether the builder would quantise this matrix, into operators that hold it row by row."""
    settings = model.quant_attrs
    return (
        model.onnx_dtype.name in ("INT4", "UINT4")
        and not settings["use_qdq"]
        and "MatMul" in settings["int4"]["op_types_to_quantize"]
        and name not in settings["int4"]["nodes_to_exclude"]
    )


def _is_left(model: Any, node: "ir.Node") -> bool:
    """Tell whether the quantiser would change this node of the finished graph."""
    settings = model.quant_attrs["int4"]
    return (
        node.op_type in settings["op_types_to_quantize"]
        and node.name not in settings["nodes_to_exclude"]
        and any(value is not None and value.const_value is not None and value.is_initializer() for value in node.inputs)
    )


def _place(model: Any, tensor: "ir.TensorProtocol") -> Any:
    """Register a tensor as an initializer of the builder's graph, under its name; return the graph's value."""
    value = model.make_value(tensor.name, tensor.dtype, tensor.shape)
    value.const_value = tensor
    model.model.graph.register_initializer(value)
    return value


def _cast(tensor: "torch.Tensor", name: str, to: Any, release: Callable[[], None]) -> "ir.TensorProtocol":
    """Return a tensor of another type that is never in memory as a whole when it is written to a file."""
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype

    dtype = to_torch_dtype(to)

    class Cast(ir.LazyTensor):
        def tofile(self, file: IO[bytes]) -> None:
            for rows in _slices(tensor):
                TorchTensor(rows.detach().to(dtype).contiguous()).tofile(file)
            release()

    return Cast(
        lambda: TorchTensor(tensor.detach().to(dtype), name=name), dtype=to, shape=ir.Shape(tensor.shape), name=name
    )


def _slices(tensor: "torch.Tensor") -> "list[torch.Tensor]":
    """Cut a tensor along its first dimension, into an even number of rows each but for the last."""
    import torch

    if tensor.numel() <= _SLICE:
        return [tensor]
    rows = max(_SLICE * len(tensor) // tensor.numel(), 2) // 2 * 2
    return list(torch.split(tensor, rows))


@dataclass(frozen=True)
class _Weights:
    """The safetensors files of a model, mapped into memory: pages are read when they are used, and dropped again."""

    source: Path
    maps: list[mmap.mmap] = field(default_factory=list)
    tensors: "dict[str, torch.Tensor]" = field(default_factory=dict)

    @classmethod
    @contextmanager
    def of(cls, source: Path) -> "Iterator[_Weights]":
        """Map the files in a folder."""
        import torch

        weights = cls(source)
        for path in sorted(source.glob("*.safetensors")):
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            weights.maps.append(mapped)
            for name, tensor in read_file(path).items():
                if not tensor.is_readable:
                    continue  # of no use to the builder, or it has to read the file itself
                count = math.prod(tensor.shape)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # nobody writes into it
                    flat = torch.frombuffer(mapped, dtype=tensor.torch_dtype, offset=tensor.start, count=count)
                weights.tensors[name] = flat.view(tensor.shape)
        try:
            yield weights
        finally:
            weights.tensors.clear()
            gc.collect()  # models refer to themselves
            for mapped in weights.maps:
                with suppress(BufferError):
                    mapped.close()

    def release(self) -> None:
        """Drop the pages that were read: the kernel would keep them until memory is short."""
        if sys.platform == "linux":
            for mapped in self.maps:
                mapped.madvise(mmap.MADV_DONTNEED)

    def model(self, *, trusted: bool) -> Any:
        """Return transformers' model on these weights; None when the files name them otherwise than the model."""
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(self.source, local_files_only=True, trust_remote_code=trusted)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
        # Some architectures add 1 to the weights of their norms, which bfloat16 would round.
        known = {name: self.tensors[name] for name in model.state_dict() if name in self.tensors}
        given = {name: tensor.float() if tensor.dim() == 1 else tensor for name, tensor in known.items()}
        missing = model.load_state_dict(given, strict=False, assign=True).missing_keys
        model.tie_weights(missing_keys={*missing})  # with them, it leaves alone what the files tell apart
        return (
            None if any(weight.is_meta for weight in model.parameters()) else model.requires_grad_(requires_grad=False)
        )


@dataclass
class _Quantiser:
    """Quantises matrices into a file."""

    file: IO[bytes]
    made: list[Any] = field(default_factory=list)

    def quantise(self, model: Any, node: "ir.Node", weight: "torch.Tensor") -> None:
        """Make a node of the builder's graph multiply by a quantised matrix; ``weight``: of shape (out, in)."""
        import onnx_ir as ir

        matrix: Any = node.inputs[1]
        arrays: dict[str, list[np.ndarray]] = {}
        for rows in _slices(weight.detach()):
            made, tensors = _quantised(model, str(node.name), matrix.name, rows)
            for name, array in tensors.items():
                arrays.setdefault(name, []).append(array)
        model.model.graph.initializers.pop(matrix.name)
        matrix.const_value = None
        values = {name: _place(model, self._stored(name, parts)) for name, parts in arrays.items()}
        self.made.extend(values.values())
        node.resize_inputs(len(made.input))
        for place, name in enumerate(made.input[1:], start=1):
            node.replace_input_with(place, values[name])
        node.op_type, node.domain, node.name = made.op_type, made.domain, made.name
        numbers = {attribute.name: attribute.i for attribute in made.attribute}
        for name, number in (numbers | {"N": len(weight)}).items():
            node.attributes[name] = ir.AttrInt64(name, number)

    def move_to_the_end(self, graph: "ir.Graph") -> None:
        """Put what was made after the other initializers, where the builder's own way has it."""
        for value in self.made:
            graph.initializers.pop(value.name)
            graph.register_initializer(value)

    def _stored(self, name: str, parts: "list[np.ndarray]") -> "ir.ExternalTensor":
        """Write an array, given in slices, and return it as it lies in the file."""
        import onnx_ir as ir

        start = self.file.seek(0, 2)
        for part in parts:
            self.file.write(part.tobytes())
        self.file.flush()
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        path = Path(self.file.name)
        return ir.ExternalTensor(
            path.name,
            start,
            self.file.tell() - start,
            ir.DataType.from_numpy(parts[0].dtype),
            shape=ir.Shape(shape),
            name=name,
            base_dir=str(path.parent),
        )


def _quantised(
    builder: Any, node: str, name: str, rows: "torch.Tensor"
) -> "tuple[onnx.NodeProto, dict[str, np.ndarray]]":
    """Let onnxruntime quantise some rows of a matrix, of shape (out, in): as the only ones of a model with one node.

    Returns what it makes of the node, and tensors whose first dimension is the output.
    """
    import torch
    from onnx import helper, numpy_helper
    from onnx_ir.tensor_adapters import to_torch_dtype
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    settings, dtype = builder.quant_attrs["int4"], int(builder.io_dtype)
    matrix = rows.t().contiguous().to(to_torch_dtype(builder.io_dtype))  # twice as quick as the other way round
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["A", name], ["Y"], name=node)],
        "one",
        [helper.make_tensor_value_info("A", dtype, ["batch", "length", matrix.shape[0]])],
        [helper.make_tensor_value_info("Y", dtype, ["batch", "length", matrix.shape[1]])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    # In place: as a tensor of its own, it would be copied into the graph and with the graph into the model.
    raw = matrix.view(torch.uint8).numpy().tobytes()
    model.graph.initializer.add(name=name, data_type=dtype, dims=matrix.shape, raw_data=raw)
    quantiser = MatMulNBitsQuantizer(
        model,
        block_size=settings["qdq_block_size"],
        is_symmetric=settings["is_symmetric"],
        accuracy_level=settings["accuracy_level"],
        algo_config=settings["algo_config"],
    )
    quantiser.process()
    done = quantiser.model.model.graph
    [made] = done.node
    return made, {tensor.name: numpy_helper.to_array(tensor) for tensor in done.initializer}
