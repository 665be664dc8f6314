"""From documents to token windows, as pure functions: the published protocols, and our own for arbitrary text.

A window is ``seq_len`` consecutive token ids. Every function raises TextTooShort, naming the tokens found and needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import TYPE_CHECKING

from llmprune.errors import ConfigError, TextTooShort

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Windows = list[list[int]]

CHARS_PER_TOKEN = 8
"""More than tokenizers average, so the first guess at the text that n tokens need is nearly always enough."""

SETTLED_TOKENS = 256
"""No cut in the text changes tokens this far before it: merges stop at word boundaries, long before that."""

OVERSAMPLE = 2
"""Of a large text this many times the characters asked for is read; all of it would be minutes of tokenizing."""

SECTION_CHARS = 100_000
"""Where only part of a large text is read, documents are cut at line ends into sections of at most this length."""

BATCH_DOCUMENTS = 1000


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text of any length, with the special tokens the tokenizer adds by default."""
    # verbose=False: a text longer than the model's context is what we want here, not something to warn about.
    ids: list[int] = tokenizer(text, verbose=False, return_attention_mask=False)["input_ids"]
    return ids


def windows_of_documents(
    documents: Sequence[str], tokenizer: Tokenizer, *, num_samples: int, seq_len: int, seed: int, source: str
) -> Windows:
    """Random windows of random documents, the C4 calibration of GPTQ, SparseGPT and Wanda, to the same random stream.

    Documents are drawn until one is longer than ``seq_len`` tokens (one draw each), then the window's start is drawn.
    Unlike the references, which then never return, it raises TextTooShort once every document has been found too short.
    """
    rng = Random(seed)
    too_short: set[int] = set()
    longest = 0
    windows: Windows = []
    while len(windows) < num_samples:
        if len(too_short) == len(documents):
            raise TextTooShort(
                f"no document of {source} has more than {seq_len} tokens: the longest of {len(documents)} has "
                f"{longest}. Use a smaller --seq-len, or a text with longer documents."
            )
        index = rng.randint(0, len(documents) - 1)
        if index in too_short:
            continue
        ids = encode(tokenizer, documents[index])
        if len(ids) <= seq_len:
            too_short.add(index)
            longest = max(longest, len(ids))
            continue
        start = rng.randint(0, len(ids) - seq_len - 1)
        windows.append(ids[start : start + seq_len])
    return windows


def windows_of_text(text: str, tokenizer: Tokenizer, *, num_samples: int, seq_len: int, seed: int, source: str) -> Windows:
    """Random windows, which may overlap, of one text tokenized once: the WikiText-2 and PTB calibration of GPTQ."""
    ids = encode(tokenizer, text)
    if len(ids) <= seq_len:
        raise TextTooShort(
            f"{source} holds {len(ids)} tokens, but calibrating needs more than {seq_len}. "
            "Use a smaller --seq-len, or more text."
        )
    rng = Random(seed)
    starts = [rng.randint(0, len(ids) - seq_len - 1) for _ in range(num_samples)]
    return [ids[start : start + seq_len] for start in starts]


def windows_of_stream(
    documents: Sequence[str], tokenizer: Tokenizer, *, num_samples: int, seq_len: int, seed: int, source: str
) -> tuple[Windows, str]:
    """Distinct windows, in the order drawn, of the documents as one token stream; and a note on what was not read.

    Every document is followed by the tokenizer's eos token, if it has one. The stream is cut into non-overlapping
    windows and ``num_samples`` of them are drawn without replacement.
    """
    rng = Random(seed)
    documents, note = _thin(documents, OVERSAMPLE * CHARS_PER_TOKEN * num_samples * seq_len, rng)
    ids = [token for document in _encode_ended(tokenizer, documents) for token in document]
    if len(ids) < num_samples * seq_len:
        raise TextTooShort(
            f"{source} holds {len(ids)} tokens, but {num_samples} samples of {seq_len} need {num_samples * seq_len}. "
            "Use fewer --num-samples, a smaller --seq-len, or more text."
        )
    chosen = rng.sample(range(len(ids) // seq_len), num_samples)
    return [ids[index * seq_len : (index + 1) * seq_len] for index in chosen], note


def consecutive_windows(
    documents: Sequence[str], separator: str, tokenizer: Tokenizer, *, seq_len: int, max_tokens: int | None, source: str
) -> Windows:
    """Non-overlapping windows of the joined documents, tokenized once, remainder dropped: the field's perplexity text.

    ``max_tokens`` keeps the first windows only, and reads no more text than they take.
    """
    if max_tokens is not None and max_tokens < seq_len:
        raise ConfigError(
            f"at most {max_tokens} evaluation tokens do not fill one window of {seq_len}. "
            "Raise --max-eval-tokens or use a smaller --seq-len."
        )
    ids = encode_joined(documents, separator, tokenizer, max_tokens=max_tokens)
    if len(ids) < seq_len:
        raise TextTooShort(
            f"{source} holds {len(ids)} tokens, but evaluating needs at least {seq_len}. Use a smaller --seq-len, or more text."
        )
    return [ids[start : start + seq_len] for start in range(0, len(ids) - seq_len + 1, seq_len)]


def encode_joined(documents: Sequence[str], separator: str, tokenizer: Tokenizer, *, max_tokens: int | None) -> list[int]:
    """The first ``max_tokens`` tokens of the joined documents, from as little of the text as settles them."""
    if max_tokens is None:
        return encode(tokenizer, separator.join(documents))
    max_chars = CHARS_PER_TOKEN * (max_tokens + SETTLED_TOKENS)
    while True:
        text = _join(documents, separator, max_chars)
        ids = encode(tokenizer, text)
        if len(text) <= max_chars or len(ids) >= max_tokens + SETTLED_TOKENS:
            return ids[:max_tokens]
        max_chars *= 2


def _join(documents: Sequence[str], separator: str, max_chars: int) -> str:
    """The joined documents; cut to ``max_chars + 1`` characters where they are longer."""
    taken: list[str] = []
    num_chars = 0
    for document in documents:
        taken.append(document)
        num_chars += len(document) + len(separator)
        if num_chars - len(separator) > max_chars:
            break
    return separator.join(taken)[: max_chars + 1]


def _thin(documents: Sequence[str], max_chars: int, rng: Random) -> tuple[Sequence[str], str]:
    """The documents as they are where they are short enough, else random sections of them; and a note saying so."""
    if _fits(documents, max_chars):
        return documents, ""
    # A list is in memory, and cutting it first makes every part of it equally likely; a column of a hub dataset is not,
    # and its rows are drawn whole rather than all read.
    pool = [section for text in documents for section in _sections(text)] if isinstance(documents, list) else documents
    taken: list[str] = []
    num_chars = 0
    for index in rng.sample(range(len(pool)), len(pool)):
        taken.append(pool[index])
        num_chars += len(taken[-1])
        if num_chars >= max_chars:
            break
    return taken, f"; of this large text a random {len(taken)} of {len(pool)} documents or sections of them were read"


def _fits(documents: Sequence[str], max_chars: int) -> bool:
    for document in documents:
        max_chars -= len(document)
        if max_chars < 0:
            return False
    return True


def _sections(text: str) -> Iterator[str]:
    """Cut at the last line end within SECTION_CHARS, or right there in a longer line."""
    start = 0
    while len(text) - start > SECTION_CHARS:
        end = text.rfind("\n", start, start + SECTION_CHARS) + 1 or start + SECTION_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


def _encode_ended(tokenizer: Tokenizer, documents: Sequence[str]) -> Iterator[list[int]]:
    """Token ids of every document that is not blank, each ending with the eos token where there is one."""
    eos = tokenizer.eos_token_id
    written = [document for document in documents if document.strip()]
    for start in range(0, len(written), BATCH_DOCUMENTS):
        batch = written[start : start + BATCH_DOCUMENTS]
        for ids in tokenizer(batch, verbose=False, return_attention_mask=False)["input_ids"]:
            yield ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
