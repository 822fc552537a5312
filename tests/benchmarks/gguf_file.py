"""Write a Llama model for llama.cpp: a folder with safetensors in bfloat16 → GGUF in the types asked for.

Runs in the environment of the peer (``peers/llama-cpp.txt``). The file has no vocabulary: it is asked by ids.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf  # type: ignore[import-not-found]
import llama_cpp  # type: ignore[import-not-found]
import numpy as np

TYPES = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def main() -> None:
    """Write ``<output folder>/<type>.gguf`` for each type: arguments are the model, that folder, and the types."""
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    output.mkdir(parents=True, exist_ok=True)
    unquantised = output / "BF16.gguf"
    write(folder, unquantised)
    for name in sys.argv[3:]:
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = TYPES[name]
        target = output / f"{name}.gguf"
        if llama_cpp.llama_model_quantize(bytes(unquantised), bytes(target), parameters):
            raise SystemExit(f"llama.cpp cannot write {target}")
    unquantised.unlink()


def write(folder: Path, file: Path) -> None:
    """Write the weights as they are."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    for name, stored in tensors(folder):
        tensor = stored
        if name.endswith(("q_proj", "k_proj")):
            tensor = for_rotation(stored, heads if name.endswith("q_proj") else kv_heads)
        if tensor.ndim == 1:
            writer.add_tensor(name_of(name), (tensor.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.add_tensor(name_of(name), tensor.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield names without ``.weight``, and bfloat16 as uint16, in the format of safetensors' README."""
    for file in sorted(folder.glob("*.safetensors")):
        content = np.memmap(file, np.uint8, mode="r")
        start = 8 + int(content[:8].view(np.uint64)[0])
        for name, entry in json.loads(bytes(content[8:start])).items():
            if name == "__metadata__":
                continue
            assert entry["dtype"] == "BF16", name
            first, end = (start + offset for offset in entry["data_offsets"])
            yield name.removesuffix(".weight"), content[first:end].view(np.uint16).reshape(entry["shape"])


def for_rotation(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of each head in llama.cpp's order, which rotates neighbours and not the two halves."""
    rows, columns = tensor.shape
    halves = tensor.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def name_of(name: str) -> str:
    """Return the name of a tensor in GGUF."""
    if name in _OTHERS:
        return f"{_OTHERS[name]}.weight"
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_PARTS[part]}.weight"


if __name__ == "__main__":
    main()
