"""What onnxruntime-genai's builder makes of each architecture: what is exported, what is repaired, what is refused.

Refusals come from config.json alone, before weights are fetched. Repairs are edits: of the config.json that the
builder reads, in a scratch folder, and of attributes in the graph that it wrote.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import failure
from edgetune.stages import Job, read_json, write_json

if TYPE_CHECKING:
    from onnx import NodeProto
    from transformers import PreTrainedConfig

EXPORTABLE = frozenset({
    "Ernie4_5ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "GraniteForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "Lfm2ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "NemotronForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
})  # fmt: skip
"""Text-generation architectures that transformers and onnxruntime-genai's builder know, and that come out right."""

NEEDS_REMOTE_CODE = frozenset({
    "ChatGLMForConditionalGeneration",
    "ChatGLMModel",
    "InternLM2ForCausalLM",
    "Phi3SmallForCausalLM",
})  # fmt: skip
"""Architectures that the builder knows and transformers does not: their repositories bring the code."""

UNEXPORTABLE = {
    "gpt_oss": "comes out of onnxruntime-genai 0.14.1 with other answers, without any error",
    "olmo": "comes out of onnxruntime-genai 0.14.1 with other answers, without any error",
}
"""Model types that the builder knows, but that would fail after hours of training, or worse, not fail."""

BUILDERS_BLOCK = 32
"""The block size of int4 unless the pass has one."""
_GEMMA3_PATTERN = 6  # the builder takes every sixth layer of Gemma 3 for one that sees the whole text
_FULL, _SLIDING = "full_attention", "sliding_attention"
_HEAD_STEP = 16
_LAYER = re.compile(r"/layers\.(\d+)/attn/GroupQueryAttention$")


def refusal(config: dict[str, Any]) -> str | None:
    """Return why a model with this config.json cannot be exported faithfully; None when it can, or is not known."""
    kind = config.get("model_type")
    if kind in UNEXPORTABLE:
        return f"({kind}) {UNEXPORTABLE[kind]}"
    scaling = [entry for entry in _rope_scalings(config) if entry.get("rope_type", entry.get("type")) == "yarn"]
    # What early revisions of Phi-3 call yarn is LongRoPE.
    if kind != "phi3" and any("beta_fast" not in entry or entry.get("truncate", True) for entry in scaling):
        return "stretches its positions with YaRN, which onnxruntime-genai 0.14.1 calculates otherwise"
    if kind == "gemma3_text" and not _has_usual_layers(config):
        return "has other layers than the published Gemma 3, which onnxruntime-genai 0.14.1 takes no notice of"
    size, rotated = _head_sizes(config)
    if size % _HEAD_STEP or rotated % _HEAD_STEP:
        return (
            f"rotates {rotated} of {size} numbers of each attention head: ONNX Runtime takes multiples of {_HEAD_STEP}"
        )
    return None


def largest_block(config: dict[str, Any], block: int) -> int:
    """Return the block size, or the builder's own where rows of the embedding would end with a part of a block.

    Embeddings that are also the output layer lie in blocks under every int4 algorithm but the default one.
    """
    size = config.get("hidden_size")
    return block if not isinstance(size, int) or size % block == 0 else min(block, BUILDERS_BLOCK)


def _head_sizes(config: dict[str, Any]) -> tuple[int, int]:
    """Return how many numbers an attention head has, and how many of them its positions rotate; 0 if not known."""
    size, width, heads = (config.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads"))
    if not size and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        size = width // heads
    if not isinstance(size, int):
        return 0, 0
    shares = [entry.get("partial_rotary_factor") for entry in (config, *_rope_scalings(config))]
    return size, int(size * next((share for share in shares if isinstance(share, float)), 1))


def _rope_scalings(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what config.json says of positions, for the whole model or by kind of layer."""
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(entry := config.get(name), dict):
            yield from (entry, *(value for value in entry.values() if isinstance(value, dict)))


def _has_usual_layers(config: dict[str, Any]) -> bool:
    """Tell whether Gemma 3's layers alternate as the builder assumes, with positions that are not stretched."""
    pattern = config.get("sliding_window_pattern") or _GEMMA3_PATTERN
    if kinds := config.get("layer_types"):
        usual = [_FULL if layer % _GEMMA3_PATTERN == _GEMMA3_PATTERN - 1 else _SLIDING for layer in range(len(kinds))]
        if kinds != usual:
            return False
    elif pattern != _GEMMA3_PATTERN:
        return False
    return all(entry.get("rope_type", entry.get("type", "default")) == "default" for entry in _rope_scalings(config))


def builder_input(source: Path, work: Path) -> Path:
    """Return a folder with the model as the builder can read it: ``source``, or ``work`` with links and an edited file.

    The builder reads names that transformers 4 gave to settings of config.json. transformers 5 moves some of them into
    ``rope_parameters`` and drops the old name even where the file has it.
    """
    from transformers import AutoConfig

    content = read_json(source / "config.json") or {}
    kind = content.get("model_type")
    edited = dict(content)
    if kind in _EDITS:
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        edited |= _EDITS[kind](content, config)
    if edited == content:
        return source
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    work.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.name != "config.json":
            _link(work / path.name, path.resolve())
    write_json(work / "config.json", edited)
    return work


def _link(path: Path, target: Path) -> None:
    """Make the weights appear in another folder; Windows allows symbolic links to few users."""
    try:
        path.symlink_to(target)
    except OSError:
        try:
            path.hardlink_to(target)
        except OSError:
            shutil.copyfile(target, path)


def _phi3(content: dict[str, Any], config: "PreTrainedConfig") -> dict[str, Any]:
    """Name the kind of scaling ``type`` as well, and the rotated share outside of it."""
    name = "rope_scaling" if content.get("rope_scaling") else "rope_parameters"
    rope = config.rope_parameters
    return {
        name: {**(content.get(name) or {}), "type": rope["rope_type"]},
        "partial_rotary_factor": rope["partial_rotary_factor"],
    }


def _with_old_names(config: "PreTrainedConfig", **values: Any) -> dict[str, Any]:
    """Return entries of config.json that give a configuration attributes which transformers drops by name.

    ``attribute_map`` makes an attribute an alias of another, which transformers knows nothing of and keeps.
    """
    aliases = {name: f"builder_{name}" for name in values}
    return {
        "attribute_map": {**type(config).attribute_map, **aliases},
        **{aliases[name]: value for name, value in values.items()},
    }


def _partial_rotary(_content: dict[str, Any], config: "PreTrainedConfig") -> dict[str, Any]:
    """Without the names, the builder silently rotates whole heads, and takes 1e-6 for the epsilon of layer norms."""
    epsilon = config.layer_norm_eps if config.model_type == "phi" else config.norm_eps
    rotated = config.rope_parameters["partial_rotary_factor"]
    return _with_old_names(config, partial_rotary_factor=rotated) | {"rms_norm_eps": epsilon}


def _gemma3(_content: dict[str, Any], config: "PreTrainedConfig") -> dict[str, Any]:
    """Without the names, the builder fails for the one frequency and takes 10,000 for the other."""
    rope = config.rope_parameters
    return _with_old_names(
        config, rope_theta=rope[_FULL]["rope_theta"], rope_local_base_freq=rope[_SLIDING]["rope_theta"]
    )


def _hunyuan(_content: dict[str, Any], config: "PreTrainedConfig") -> dict[str, Any]:
    return _with_old_names(config, rope_theta=config.rope_parameters["rope_theta"])


def _smollm3(_content: dict[str, Any], config: "PreTrainedConfig") -> dict[str, Any]:
    """Give all layers a position encoding, which :func:`repair` takes away again.

    For a layer without one, the builder makes nodes that need an input it has removed before (KeyError).
    """
    return {"no_rope_layers": [1] * config.num_hidden_layers}


_EDITS = {
    "gemma3_text": _gemma3,
    "hunyuan_v1_dense": _hunyuan,
    "nemotron": _partial_rotary,
    "phi": _partial_rotary,
    "phi3": _phi3,
    "smollm3": _smollm3,
}


def repair(job: Job, source: Path, exported: Path) -> None:
    """Correct which layers of an exported model see only a window, and which know no positions.

    The builder has the layers of Gemma 2 the wrong way round and gives all layers of Qwen 2 the same window. Only
    attributes of the graph change, no weight. Raises EdgetuneError when such a layer has no node that takes them.
    """
    import onnx

    wanted = _attention(source, trusted=job.workflow.trusts_code)
    path = exported / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    nodes = {int(found[1]): node for node in model.graph.node if (found := _LAYER.search(node.name))}
    lost = [layer for layer, attributes in wanted.items() if layer not in nodes and attributes != {_WINDOW: _NONE}]
    if lost:
        raise failure(
            f"the builder cannot give layer {lost[0]} its sliding window, or take away its positions",
            where=job.workflow.where_in_pass("ModelBuilder", "precision"),
            hint="use int4, or fp16 on a GPU: there it attends with GroupQueryAttention, which can",
        )
    changed = [_set(nodes[layer], attributes) for layer, attributes in wanted.items() if layer in nodes]
    if any(changed):
        path.write_bytes(model.SerializeToString())


_WINDOW, _NONE = "local_window_size", -1  # an attribute of GroupQueryAttention, and its default


def _attention(source: Path, *, trusted: bool) -> dict[int, dict[str, int]]:
    """Return which attributes the attention of each layer must have; nothing where transformers names no kinds."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=trusted)
    with_positions = getattr(config, "no_rope_layers", None)  # 0 for a layer without them
    return {
        layer: {_WINDOW: config.sliding_window if kind == _SLIDING else _NONE}
        | ({"do_rotary": 0} if with_positions and not with_positions[layer] else {})
        for layer, kind in enumerate(getattr(config, "layer_types", None) or ())
        if kind in (_FULL, _SLIDING)
    }


def _set(node: "NodeProto", attributes: dict[str, int]) -> bool:
    """Give a node these attributes; tell whether any of them was another."""
    from onnx import helper

    present = {attribute.name: attribute.i for attribute in node.attribute}
    if {_WINDOW: _NONE, **present}.items() >= attributes.items():
        return False
    kept = [attribute for attribute in node.attribute if attribute.name not in attributes]
    del node.attribute[:]
    node.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in attributes.items())])
    return True
