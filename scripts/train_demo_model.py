"""Train the bundled demo model: a small Llama and its tokenizer, on the source of the Python standard library.

    python scripts/train_demo_model.py                # 30 minutes on the CPU, into llmprune/demo_model
    python scripts/train_demo_model.py --resume       # go on after a kill

The learning rate follows the share of `--minutes` (or of `--max-steps`, whichever is further) that is spent, so the
schedule is always completed. Every number in the model card is measured here.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # Spinning threads halve the speed on cores shared with others.

import numpy as np
import torch
import torch.nn.functional as F
from ngram_baseline import IntArray, KneserNey
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from llmprune.io.stdlib_text import stdlib_documents  # noqa: E402  (llmprune need not be installed)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
VOCAB_SIZE = 2048
MAX_POSITIONS = 512
NGRAM_ORDER = 5
WARMUP_SHARE = 0.04
FINAL_LR_SHARE = 0.01


def main() -> None:
    """Train, or go on training, then export, measure and write the model card."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work_dir.mkdir(parents=True, exist_ok=True)

    train_text = stdlib_documents("train")
    held_out_text = "\n\n".join(stdlib_documents("held-out"))
    tokenizer = load_or_train_tokenizer(args.work_dir / "tokenizer.json", train_text, resume=args.resume)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    documents = [np.array([bos, *ids, eos]) for ids in encode(tokenizer, train_text)]
    held_out_T = np.array(encode(tokenizer, [held_out_text])[0])
    num_train_tokens = sum(map(len, documents))
    print(f"{len(documents)} train documents, {num_train_tokens} tokens; {len(held_out_T)} held-out tokens", flush=True)

    run = Run(args, tokenizer, documents, held_out_T)
    if args.resume:
        run.resume()
    run.train()
    if args.output is None:
        return

    export(run.model, tokenizer, args.output)
    exported = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    metrics = {
        "parameters": sum(parameter.numel() for parameter in exported.parameters()),
        "train_documents": len(documents),
        "train_tokens": num_train_tokens,
        "held_out_tokens": len(held_out_T),
        "held_out_bytes_per_token": len(held_out_text.encode()) / len(held_out_T),
        "held_out_sha256": hashlib.sha256(held_out_text.encode()).hexdigest(),
        "tokens_seen": run.progress.tokens,
        "steps": run.progress.step,
        "minutes": run.progress.seconds / 60,
        "loss_256": held_out_loss(exported, held_out_T, seq_len=256),
        "loss_512": held_out_loss(exported, held_out_T, seq_len=512),
        "loss_512_before_cast": held_out_loss(run.model, held_out_T, seq_len=512),
        "loss_ngram": ngram_loss(documents, held_out_T, order=NGRAM_ORDER),
    }
    sample = generate(exported, tokenizer, "def read_lines(path, encoding='utf-8'):\n")
    (args.output / "README.md").write_text(model_card(metrics, exported.config, args, sample), encoding="utf-8")
    print(json.dumps(metrics, indent=2))
    print(sample)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="wall-clock budget that the learning rate follows")
    parser.add_argument("--max-steps", type=int, default=10**9, help="end after this many steps if that comes first")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "llmprune" / "demo_model")
    parser.add_argument("--no-export", dest="output", action="store_const", help="train only, to try settings")
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "llmprune-demo-model")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work-dir")
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon", help="for the matrices of the layers")
    parser.add_argument("--lr", type=float, default=6e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-every", type=int, default=100, help="steps between held-out losses")
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# ---- tokenizer


def load_or_train_tokenizer(path: Path, documents: list[str], *, resume: bool) -> PreTrainedTokenizerFast:
    """The tokenizer of the run that is resumed, or a new byte-level BPE trained on `documents`."""
    if resume and path.exists():
        backend = Tokenizer.from_file(str(path))
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(documents, trainer)
        backend.save(str(path))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    for text, ids in zip(documents, encode(tokenizer, documents), strict=True):
        assert tokenizer.decode(ids) == text, "the tokenizer does not round-trip"
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """The ids of each text, no special tokens added."""
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]


# ---- training


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Batches:
    """Packed windows in an order that follows from (seed, step) alone: a resumed run sees what it would have seen."""

    def __init__(self, documents: list[IntArray], *, seq_len: int, batch_size: int, seed: int) -> None:
        self.documents, self.seq_len, self.batch_size, self.seed = documents, seq_len, batch_size, seed
        # One window fewer than fit: every epoch drops a random number of leading tokens.
        self.per_epoch = (sum(map(len, documents)) // seq_len - 1) // batch_size
        self.epoch = -1

    def __getitem__(self, step: int) -> torch.Tensor:
        """Token ids of one step, shape (batch_size, seq_len)."""
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.windows = epoch, self._windows(epoch)
        return torch.from_numpy(self.windows[index * self.batch_size : (index + 1) * self.batch_size])

    def _windows(self, epoch: int) -> IntArray:
        random = np.random.default_rng([self.seed, epoch])
        stream = np.concatenate([self.documents[i] for i in random.permutation(len(self.documents))])
        stream = stream[random.integers(self.seq_len) :]
        num_windows = len(stream) // self.seq_len
        windows = stream[: num_windows * self.seq_len].reshape(num_windows, self.seq_len)
        return windows[random.permutation(num_windows)].astype(np.int64)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates (K. Jordan et al., 2024), scaled to AdamW's usual update size.

    `torch.optim.Muon` iterates in bfloat16, which CPUs without matrix units for it emulate; here in float32, the
    matrices of one shape in one batch.
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = torch.stack([self._nesterov(parameter, group["momentum"]) for parameter in parameters])
                scale = 0.2 * math.sqrt(max(shape))  # an orthogonal matrix's elements have RMS 1 / sqrt(max(shape))
                for parameter, update in zip(parameters, orthogonalize(updates), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"] * scale)

    def _nesterov(self, parameter: torch.Tensor, momentum: float) -> torch.Tensor:
        assert parameter.grad is not None
        buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)


def orthogonalize(matrices_NOI: torch.Tensor, num_iterations: int = 5) -> torch.Tensor:
    """U V^T of each matrix's singular value decomposition, roughly: Newton-Schulz, Jordan's coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices_NOI.shape[-2] > matrices_NOI.shape[-1]
    x = matrices_NOI.mT if tall else matrices_NOI
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained demo model: every feature a pruner meets in a large Llama, at a size a CPU trains."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def new_optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """The optimizer of the layers' matrices and the one of everything else; each group keeps its peak as `peak_lr`."""
    matrices, embeddings, vectors = [], [], []
    for name, parameter in model.named_parameters():
        (vectors if parameter.ndim < 2 else embeddings if "embed" in name else matrices).append(parameter)
    groups = [{"params": embeddings, "weight_decay": 0.0}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = []
    if args.optimizer == "muon":
        optimizers.append(Muon(matrices, lr=args.lr, momentum=0.95, weight_decay=args.weight_decay))
    else:
        groups.append({"params": matrices, "weight_decay": args.weight_decay})
    optimizers.append(torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95)))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_share(share_spent: float) -> float:
    """The share of the peak learning rate at a share of the budget: linear warm-up, then a cosine."""
    if share_spent < WARMUP_SHARE:
        return max(share_spent / WARMUP_SHARE, 0.01)
    share = min(1.0, (share_spent - WARMUP_SHARE) / (1 - WARMUP_SHARE))
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * share))


class Run:
    """One training run: its model, optimizers and progress, and the checkpoint that holds them."""

    def __init__(
        self,
        args: argparse.Namespace,
        tokenizer: PreTrainedTokenizerFast,
        documents: list[IntArray],
        held_out_T: IntArray,
    ) -> None:
        self.args, self.tokenizer = args, tokenizer
        self.batches = Batches(documents, seq_len=args.seq_len, batch_size=args.batch_size, seed=args.seed)
        every = max(1, len(held_out_T) // args.seq_len // 32)  # 32 windows spread over all files: a quick estimate
        num_windows = len(held_out_T) // args.seq_len
        windows = held_out_T[: num_windows * args.seq_len].reshape(num_windows, args.seq_len)
        self.quick_held_out_T = windows[::every].reshape(-1)
        self.model = new_model(tokenizer)
        self.optimizers = new_optimizers(self.model, args)
        self.progress = Progress()
        self.checkpoint_path = args.work_dir / "checkpoint.pt"

    def share_spent(self) -> float:
        """How much of the budget is gone, 0 to 1."""
        return max(self.progress.seconds / 60 / self.args.minutes, self.progress.step / self.args.max_steps)

    def train(self) -> None:
        """Take steps until the budget is spent."""
        now = last_print = last_save = time.perf_counter()
        started = now - self.progress.seconds
        tokens_at_print = self.progress.tokens
        while self.share_spent() < 1:
            loss, grad_norm = self._step()
            now = time.perf_counter()
            self.progress.seconds = now - started
            if self.progress.step % self.args.eval_every == 0 or self.share_spent() >= 1:
                rate = (self.progress.tokens - tokens_at_print) / (now - last_print)
                held_out = held_out_loss(self.model, self.quick_held_out_T, seq_len=self.args.seq_len)
                print(
                    f"step {self.progress.step:5d}  {self.progress.seconds / 60:5.1f} min  "
                    f"{self.progress.tokens / 1e6:5.2f} M tokens  {rate:5.0f} tokens/s  norm {grad_norm:5.2f}  "
                    f"train {loss:.3f}  held-out {held_out:.3f} (perplexity {math.exp(held_out):.2f})",
                    flush=True,
                )
                tokens_at_print, last_print = self.progress.tokens, time.perf_counter()
            if now - last_save > 60 * self.args.checkpoint_minutes:
                self.save()
                last_save = time.perf_counter()
        self.save()

    def _step(self) -> tuple[float, float]:
        self.model.train()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_share(self.share_spent())
        input_ids = self.batches[self.progress.step]
        loss = self.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.progress.step += 1
        self.progress.tokens += input_ids.numel()
        return loss.item(), grad_norm.item()

    def save(self) -> None:
        """Write the checkpoint, and the model as it is to the output directory."""
        state = {
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        temporary = self.checkpoint_path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint_path)
        if self.args.output is not None:
            export(self.model, self.tokenizer, self.args.output)

    def resume(self) -> None:
        """Take up the checkpoint."""
        state = torch.load(self.checkpoint_path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        self.progress = Progress(**state["progress"])


# ---- measuring


@torch.inference_mode()
def held_out_loss(model: Any, tokens_T: IntArray, *, seq_len: int, batch_size: int = 8) -> float:
    """Mean cross-entropy in nats over non-overlapping windows of seq_len - 1 targets, the remainder dropped."""
    model.eval()
    num_windows = len(tokens_T) // seq_len
    windows = torch.from_numpy(tokens_T[: num_windows * seq_len].reshape(num_windows, seq_len).astype(np.int64))
    total = 0.0
    for input_ids in windows.split(batch_size):
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum").item()
    return total / (num_windows * (seq_len - 1))


def ngram_loss(documents: list[IntArray], held_out_T: IntArray, *, order: int) -> float:
    """The n-gram model's mean cross-entropy in nats on the held-out tokens, no context cut at a window's start."""
    baseline = KneserNey(np.concatenate(documents), order=order, vocab_size=VOCAB_SIZE)
    return float(-np.log(baseline.probabilities(held_out_T)).mean())


def generate(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """A sampled continuation of `prompt`, prompt included."""
    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=96, do_sample=True, temperature=0.6, top_p=0.9)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


# ---- export


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write a Hugging Face directory with float16 weights, replacing each file whole: readers never see half of one."""
    output.mkdir(parents=True, exist_ok=True)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".demo_model-") as temporary:
        copy.half().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        # The class name that every version of transformers knows; version 5 alone knows the one it writes.
        path = Path(temporary, "tokenizer_config.json")
        config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        path.write_text(json.dumps(config, indent=2) + "\n")
        for file in Path(temporary).iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner reads
            file.replace(output / file.name)


def model_card(metrics: dict[str, Any], config: LlamaConfig, args: argparse.Namespace, sample: str) -> str:
    """The model card, README.md."""
    nats_to_bits_per_byte = 1 / math.log(2) / metrics["held_out_bytes_per_token"]
    scores = {
        name: f"{math.exp(metrics[f'loss_{name}']):.3f} | {metrics[f'loss_{name}'] * nats_to_bits_per_byte:.3f}"
        for name in ("256", "512", "ngram")
    }
    optimizer = {"muon": "Muon (layers' matrices) and AdamW (embeddings, norms)", "adamw": "AdamW"}[args.optimizer]
    python = ".".join(platform.python_version_tuple()[:2])
    return f"""---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language: code
library_name: transformers
pipeline_tag: text-generation
tags: [python, llama, pruning, demo]
---

# llmprune demo model

A {metrics["parameters"] / 1e6:.2f} M parameter Llama that has read the Python standard library. It is a toy: it exists
so that pruning can be shown and tested without a download, on a model that has learnt something and can lose it.

## Architecture

`LlamaForCausalLM`: {config.num_hidden_layers} layers, hidden size {config.hidden_size}, intermediate size
{config.intermediate_size}, {config.num_attention_heads} query and {config.num_key_value_heads} key/value heads of
{config.head_dim} dimensions, {config.max_position_embeddings} positions, input
and output embeddings tied. Weights are stored in float16.

The tokenizer is a byte-level BPE of {config.vocab_size} tokens trained on the same text; it reproduces any text
exactly. It adds no special tokens by itself. Training documents began with `{BOS}` and ended with `{EOS}`.

## Data

The `*.py` files of the standard library of CPython {python}, without tests, generated tables and the packages that
Linux distributions split off (`llmprune/io/stdlib_text.py` says which). One file in twenty, chosen by a hash of its
path, is held out: {metrics["train_documents"]} files and {metrics["train_tokens"]:,} tokens to train on,
{metrics["held_out_tokens"]:,} tokens held out. The SHA-256 of the held-out text (files joined by two line ends) is
`{metrics["held_out_sha256"]}`; other Python versions have other text and give slightly other numbers.

## Training

`scripts/train_demo_model.py --minutes {args.minutes:g} --optimizer {args.optimizer} --lr {args.lr:g}`:
{metrics["tokens_seen"] / 1e6:.2f} M tokens ({metrics["tokens_seen"] / metrics["train_tokens"]:.1f} epochs) in
{metrics["steps"]} steps of {args.batch_size * args.seq_len} tokens; {metrics["minutes"]:.0f} minutes of wall time on
{args.threads} CPU cores, in float32. {optimizer}; peak learning rate {args.lr:g}, warm-up and
cosine; seed {args.seed}.

## Held-out perplexity

| Model | Perplexity per token | Bits per byte |
|---|---|---|
| This model, windows of 512 tokens | {scores["512"]} |
| This model, windows of 256 tokens | {scores["256"]} |
| {NGRAM_ORDER}-gram, modified Kneser-Ney, same train text | {scores["ngram"]} |

Protocol of GPTQ: held-out files joined by two line ends, tokenized once, non-overlapping windows, the remainder
dropped, mean cross-entropy over all but each window's first token, in float32 arithmetic. The n-gram model's context is
never cut at a window's start. Bits per byte count the UTF-8 bytes of the held-out text. Before the cast to
float16 the model's perplexity in windows of 512 was {math.exp(metrics["loss_512_before_cast"]):.3f}.

## A sample

Temperature 0.6, top-p 0.9; the first line is the prompt.

```python
{sample.strip()}
```

## Limits

It writes text that looks like Python and seldom is. It knows nothing else, follows no instructions, and repeats phrases
of its training text. Results of pruning it show that a method works and how methods compare on it; they do not carry
over to large models, whose weights and activations are distributed differently.

## Licence

The training text is part of CPython, Copyright (c) 2001 onwards Python Software Foundation, All Rights Reserved, under
the PSF License Agreement, version 2 (PSF-2.0); the weights are offered under the same licence.
"""


if __name__ == "__main__":
    main()
