"""A tiny language to test on: prose of a few words, a tokenizer for it, and models of its vocabulary saved to disk."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from families import FAMILIES, _fill_weights_

WORDS = ("the", "model", "of", "a", "small", "sparse", "network", "prunes", "its", "weight", "and", "then", "keeps", "what")
VOCAB_SIZE = 128
QUICK: dict[str, Any] = {"num_samples": 4, "seq_len": 32, "max_eval_tokens": 512, "latency": False, "prompt": ()}
"""Overrides of PruneConfig that keep a job on a tiny model under a second."""


def prose(num_words: int, seed: int = 0) -> str:
    """Lines of words, each after the first one of the two that may follow its predecessor; the same for the same seed."""
    rng = random.Random(seed)
    words, position = [], 0
    for _ in range(num_words):
        position = (3 * position + rng.randrange(2)) % len(WORDS)
        words.append(WORDS[position])
    return "\n".join(" ".join(words[start : start + 12]) for start in range(0, num_words, 12))


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly VOCAB_SIZE tokens for the letters of the prose."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False)
    core.train_from_iterator([prose(400)], trainer)
    core.add_special_tokens([f"<unused{number}>" for number in range(core.get_vocab_size(), VOCAB_SIZE)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **names)


def make_model(
    model_type: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A tiny model of random weights; ``changes`` replace fields of its family's config."""
    config = AutoConfig.for_model(model_type, **(FAMILIES[model_type] | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        _fill_weights_(model)
    return model.eval()


def save(model: PreTrainedModel, directory: Path) -> Path:
    """Write model and tokenizer as a Hugging Face directory and return it."""
    model.save_pretrained(directory)
    train_tokenizer().save_pretrained(directory)
    return directory


def train_(model: PreTrainedModel, num_steps: int = 80) -> PreTrainedModel:
    """Teach the model the prose, in place: enough for a perplexity far below that of random weights."""
    ids = torch.tensor(train_tokenizer()(prose(4000, seed=3))["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        starts = torch.randint(len(ids) - 32, (16,), generator=generator)
        batch = torch.stack([ids[start : start + 32] for start in starts.tolist()])
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model.eval()
