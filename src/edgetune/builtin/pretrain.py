"""Make the built-in base model `edgetune/tiny-phi3` from text that `corpus.py` generates.

`python -m edgetune.builtin.pretrain OUT_DIR` reads nothing and writes a Hugging Face model folder: tokenizer,
`config.json`, `generation_config.json` and `model.safetensors` (bfloat16). Two CPU cores are enough; progress goes
to stderr. The same seed gives the same model up to rounding, which depends on the processor and on the number of
threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.builtin.corpus import ASSISTANT, END, END_OF_TEXT, SEED, SPECIAL_TOKENS, documents

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger("pretrain")

VOCABULARY_SIZE = 2304
CONTEXT_LENGTH = 2048
SEQUENCE_LENGTH = 128
BATCH_SIZE = 32
STEPS = 700
WARMUP_STEPS = 50
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
TOKENIZER_DOCUMENTS = 20_000
IGNORED = -100

# Phi-3's own format: a turn ends with <|end|> and a newline, a finished conversation with the end-of-text token.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the corpus; any text can be encoded, special tokens are single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(documents(SEED), TOKENIZER_DOCUMENTS), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> Phi3Config:
    """Return the architecture: Phi-3 with plain rotary embeddings, of about three million parameters."""
    from transformers import Phi3Config

    end_of_text = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    return Phi3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=CONTEXT_LENGTH,
        original_max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and labels, each (BATCH_SIZE, SEQUENCE_LENGTH); every row starts with a document."""
    import torch

    stream = documents(SEED)
    while True:
        ids, labels = [], []
        for _ in range(BATCH_SIZE):
            row: list[int] = []
            target: list[int] = []
            while len(row) < SEQUENCE_LENGTH:
                prompt, rest = (tokenizer.encode(part, add_special_tokens=False) for part in split(next(stream)))
                row += prompt + rest
                # What users write is there to be understood: predicting it would take most of the model's capacity.
                target += [IGNORED] * len(prompt) + rest
            ids.append(row[:SEQUENCE_LENGTH])
            labels.append(target[:SEQUENCE_LENGTH])
        yield torch.tensor(ids), torch.tensor(labels)


def split(document: str) -> tuple[str, str]:
    """Split a chat after the start of the assistant's turn; a story is all answer."""
    head, mark, answer = document.partition(ASSISTANT + "\n")
    return (head + mark, answer) if mark else ("", document)


def train(model: Phi3ForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """Train all weights in float32 with a linear warm-up and a cosine decay."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    kept = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": kept, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, steps)
    model.train()
    started = time.monotonic()
    for step, (ids, labels) in enumerate(itertools.islice(batches(tokenizer), steps), start=1):
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            log.info("step %d of %d, loss %.3f, %.0f s", step, steps, loss.item(), time.monotonic() - started)


def pretrain(folder: Path, steps: int = STEPS) -> None:
    """Train tokenizer and model and write them to `folder`."""
    import torch
    from transformers import GenerationConfig, Phi3ForCausalLM

    torch.manual_seed(SEED)
    tokenizer = train_tokenizer()
    model = Phi3ForCausalLM(model_config(tokenizer))
    log.info("%d tokens, %.2f million parameters", len(tokenizer), model.num_parameters() / 1e6)
    train(model, tokenizer, steps)
    end, end_of_text = (tokenizer.convert_tokens_to_ids(token) for token in (END, END_OF_TEXT))
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text, eos_token_id=[end, end_of_text], pad_token_id=end_of_text
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes its own class name and a list of extra tokens, both unknown to transformers 4.
    described = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    described.pop("extra_special_tokens", None)
    described |= {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": SPECIAL_TOKENS[1:]}
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Pretrain and write the model folder named on the command line."""
    parser = argparse.ArgumentParser(description="Pretrain the built-in base model edgetune/tiny-phi3.")
    parser.add_argument("folder", type=Path, help="where to write the model; made if it does not exist")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps (default: %(default)s)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    pretrain(options.folder, options.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
