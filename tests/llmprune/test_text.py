"""Calibration and evaluation text: the protocols to the token, every source that works offline, every error."""

import copy
import gzip
import hashlib
import json
import random
import subprocess
import sys
import time
import warnings

import pytest
import torch

from llmprune.errors import ConfigError, NonFiniteError, TextError, TextTooShort, TextUnreachable
from llmprune.io import text, text_hub, text_protocols
from llmprune.io.text import check_source, load_calibration, load_evaluation, sample_synthetic

WORDS = "the model of a small sparse network prunes its weight and then keeps what is left in every row".split()


def prose(num_words, seed=0):
    """Lines of random words, the same for the same seed."""
    rng = random.Random(seed)
    words = [rng.choice(WORDS) for _ in range(num_words)]
    return "\n".join(" ".join(words[start : start + 12]) for start in range(0, num_words, 12))


DOCUMENTS = [prose(length, seed=length) for length in (5, 80, 12, 200, 40, 9, 120, 33, 60, 150)]


def train_tokenizer(*, bos=True, context=64):
    """A byte-level BPE of some 300 tokens that starts texts with <s>, as Llama's does, and has an eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"] if bos else ["</s>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(DOCUMENTS, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>", "eos_token": "</s>"} if bos else {"eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=context, **names)


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer with bos and eos."""
    return train_tokenizer()


@pytest.fixture(scope="module")
def model():
    """A random Llama with two blocks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        vocab_size=330,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    # Far from the uniform distribution a fresh head gives, so that tokens depend on what came before.
    model = AutoModelForCausalLM.from_config(config).eval()
    model.lm_head.weight.data.mul_(50)
    return model


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path, monkeypatch):
    """Keep what datasets prepares out of the user's cache, and its progress bars off the terminal."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def ids_of(tokenizer, string):
    """Tokens with the tokenizer's default special tokens."""
    return tokenizer(string, verbose=False)["input_ids"]


def one_line(error):
    """The message, asserted to be one line."""
    message = str(error.value)
    assert "\n" not in message
    return message


# Protocols


def reference_c4(documents, tokenizer, num_samples, seq_len, seed):
    """The loop of GPTQ, SparseGPT and Wanda with its global random stream, step for step."""
    random.seed(seed)
    samples = []
    for _ in range(num_samples):
        while True:
            i = random.randint(0, len(documents) - 1)
            ids = tokenizer(documents[i], return_tensors="pt", verbose=False).input_ids
            if ids.shape[1] > seq_len:
                break
        i = random.randint(0, ids.shape[1] - seq_len - 1)
        samples.append(ids[:, i : i + seq_len])
    return torch.cat(samples).tolist()


@pytest.mark.parametrize("seed", [0, 1, 2024])
def test_document_windows_follow_the_references_random_stream(tokenizer, seed):
    """The C4 protocol yields the very windows of the reference loop, rejected documents and all."""
    state = random.getstate()
    expected = reference_c4(DOCUMENTS, tokenizer, 40, 90, seed)
    random.setstate(state)
    windows = text_protocols.windows_of_documents(DOCUMENTS, tokenizer, num_samples=40, seq_len=90, seed=seed, source="c4")
    assert windows == expected
    assert random.getstate() == state
    assert len({tuple(window) for window in windows}) > 20


def test_document_windows_golden():
    """Seed 0 draws these documents and starts: pinned, so that our transcription of the loop cannot drift along."""

    class Numbers:
        """One token a word."""

        def __call__(self, document, **_):
            return {"input_ids": [int(word) for word in document.split()]}

    # Document d holds the tokens 100 d, 100 d + 1, ...; every other one is too short.
    documents = [" ".join(str(100 * d + i) for i in range(50 if d % 2 else 4)) for d in range(100)]
    windows = text_protocols.windows_of_documents(documents, Numbers(), num_samples=5, seq_len=4, seed=0, source="c4")
    assert [divmod(window[0], 100) for window in windows] == [(49, 26), (5, 16), (65, 31), (51, 19), (61, 22)]
    assert all(window == list(range(window[0], window[0] + 4)) for window in windows)


def test_document_windows_give_up_when_no_document_is_long_enough(tokenizer):
    """Where the references loop for ever, the error names the longest document and what was needed."""
    longest = max(len(ids_of(tokenizer, document)) for document in DOCUMENTS)
    with pytest.raises(TextTooShort) as error:
        text_protocols.windows_of_documents(DOCUMENTS, tokenizer, num_samples=1, seq_len=longest, seed=0, source="these files")
    message = one_line(error)
    assert f"more than {longest} tokens" in message
    assert f"longest of 10 has {longest}" in message
    assert "--seq-len" in message


def test_text_windows_follow_the_references_random_stream(tokenizer):
    """The WikiText-2 protocol: one tokenization, starts by randint(0, N - seq_len - 1)."""
    joined = "\n\n".join(DOCUMENTS)
    ids = ids_of(tokenizer, joined)
    rng = random.Random(7)
    starts = [rng.randint(0, len(ids) - 32 - 1) for _ in range(9)]
    windows = text_protocols.windows_of_text(joined, tokenizer, num_samples=9, seq_len=32, seed=7, source="x")
    assert windows == [ids[start : start + 32] for start in starts]


def test_text_windows_need_one_token_more_than_a_window(tokenizer):
    """A text of exactly seq_len tokens leaves the reference nothing to draw from."""
    ids = ids_of(tokenizer, DOCUMENTS[1])
    arguments = {"num_samples": 1, "seed": 0, "source": "wikitext2"}
    assert text_protocols.windows_of_text(DOCUMENTS[1], tokenizer, seq_len=len(ids) - 1, **arguments) == [ids[:-1]]
    with pytest.raises(TextTooShort, match=f"wikitext2 holds {len(ids)} tokens.*more than {len(ids)}"):
        text_protocols.windows_of_text(DOCUMENTS[1], tokenizer, seq_len=len(ids), **arguments)


def test_stream_windows_are_distinct_parts_of_the_stream(tokenizer):
    """Every document, ended by eos, is one stream; all windows together are the stream without its remainder."""
    stream = [token for document in DOCUMENTS for token in [*ids_of(tokenizer, document), tokenizer.eos_token_id]]
    cut = [stream[start : start + 64] for start in range(0, len(stream) - 63, 64)]
    drawn, note = text_protocols.windows_of_stream(DOCUMENTS, tokenizer, num_samples=len(cut), seq_len=64, seed=3, source="x")
    assert sorted(drawn) == sorted(cut)
    assert drawn == [cut[index] for index in random.Random(3).sample(range(len(cut)), len(cut))]
    assert note == ""


def test_stream_skips_blank_documents_and_does_not_double_eos(tokenizer):
    """Blank lines are no documents, and a document that ends with the eos token keeps the one it has."""
    documents = ["", " \n", "a small model</s>", "a row"]
    expected = [*ids_of(tokenizer, "a small model"), 1, *ids_of(tokenizer, "a row"), 1]
    length = len(expected)
    drawn, _ = text_protocols.windows_of_stream(documents, tokenizer, num_samples=1, seq_len=length, seed=0, source="x")
    assert drawn == [expected]


def test_stream_without_eos_joins_documents_directly():
    """A tokenizer without an eos token adds nothing between documents."""
    bare = train_tokenizer(bos=False)
    bare.eos_token = None
    expected = ids_of(bare, "a row") + ids_of(bare, "the model")
    drawn, _ = text_protocols.windows_of_stream(
        ["a row", "the model"], bare, num_samples=1, seq_len=len(expected), seed=0, source="x"
    )
    assert drawn == [expected]


def test_stream_too_short_names_tokens_found_and_needed(tokenizer):
    """The error counts the stream and the samples."""
    found = len(ids_of(tokenizer, DOCUMENTS[1])) + 1
    with pytest.raises(TextTooShort) as error:
        text_protocols.windows_of_stream([DOCUMENTS[1]], tokenizer, num_samples=100, seq_len=64, seed=0, source="notes.txt")
    message = one_line(error)
    assert f"notes.txt holds {found} tokens, but 100 samples of 64 need 6400" in message
    assert "--num-samples" in message


def test_a_large_text_is_read_in_part_and_the_note_says_so(tokenizer):
    """Of a text far larger than needed only random sections are tokenized, and all parts of it can be drawn."""
    big = "\n".join(f"row {number} of the model" for number in range(100_000))
    sets = [
        text_protocols.windows_of_stream([big, "a row"], tokenizer, num_samples=4, seq_len=64, seed=seed, source="x")
        for seed in (0, 0, 1)
    ]
    assert sets[0] == sets[1]
    assert sets[0] != sets[2]
    sections = list(text_protocols._sections(big))
    assert f"a random 1 of {len(sections) + 1} documents" in sets[0][1]
    assert "".join(sections) == big
    assert all(section.endswith("\n") and len(section) <= 100_000 for section in sections[:-1])


def test_a_long_line_is_cut_where_no_line_end_is():
    """Sections never exceed their limit, lines or not."""
    line = "x" * 250_001
    assert [len(section) for section in text_protocols._sections(line)] == [100_000, 100_000, 50_001]


def test_large_lazy_columns_are_drawn_by_row(tokenizer):
    """Rows of a column that is not in memory are drawn one by one, not all read."""

    class Column(tuple):
        reads = 0

        def __getitem__(self, index):
            Column.reads += 1
            return tuple.__getitem__(self, index)

    rows = Column(DOCUMENTS * 50)
    windows, note = text_protocols.windows_of_stream(rows, tokenizer, num_samples=2, seq_len=32, seed=0, source="x")
    assert len(windows) == 2
    assert 0 < Column.reads < 20
    assert f"a random {Column.reads} of 500 documents" in note


def test_consecutive_windows_are_the_joined_text_without_its_remainder(tokenizer):
    """The perplexity protocol: joined, tokenized once with the default special tokens, floor(N / seq_len) windows."""
    ids = ids_of(tokenizer, "\n\n".join(DOCUMENTS))
    windows = text_protocols.consecutive_windows(DOCUMENTS, "\n\n", tokenizer, seq_len=50, max_tokens=None, source="x")
    assert len(windows) == len(ids) // 50 > 10
    assert sum(windows, []) == ids[: len(ids) // 50 * 50]
    assert windows[0][0] == tokenizer.bos_token_id


def test_evaluation_shorter_than_a_window_is_refused(tokenizer):
    """One token less than a window is too short, exactly a window is not."""
    ids = ids_of(tokenizer, DOCUMENTS[1])
    arguments = {"max_tokens": None, "source": "notes.txt"}
    documents = [DOCUMENTS[1]]
    assert text_protocols.consecutive_windows(documents, "", tokenizer, seq_len=len(ids), **arguments) == [ids]
    with pytest.raises(TextTooShort, match=f"notes.txt holds {len(ids)} tokens.*at least {len(ids) + 1}"):
        text_protocols.consecutive_windows(documents, "", tokenizer, seq_len=len(ids) + 1, **arguments)


def test_max_tokens_below_a_window_is_a_config_error(tokenizer):
    """A limit that leaves no window is refused, with both numbers."""
    with pytest.raises(ConfigError, match="at most 63 evaluation tokens do not fill one window of 64"):
        text_protocols.consecutive_windows(DOCUMENTS, "", tokenizer, seq_len=64, max_tokens=63, source="x")


def sentencepiece_like():
    """A BPE without pre-tokenizer, as Llama 2's: merges are not confined to words."""
    from tokenizers import Tokenizer, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.train_from_iterator(DOCUMENTS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@pytest.mark.parametrize("make", [train_tokenizer, sentencepiece_like])
@pytest.mark.parametrize("separator", ["\n\n", " ", ""])
def test_reading_less_text_does_not_change_the_first_tokens(make, separator, monkeypatch):
    """max_tokens tokenizes a part of the text, to the same tokens, even if the first guess is too little."""
    tokenizer = make()
    documents = DOCUMENTS * 20
    whole = ids_of(tokenizer, separator.join(documents))
    for num_tokens in (2, 100, 1000, 3001, len(whole) - 1, len(whole), len(whole) + 5):
        first = text_protocols.encode_joined(documents, separator, tokenizer, max_tokens=num_tokens)
        assert first == whole[:num_tokens]
    monkeypatch.setattr(text_protocols, "CHARS_PER_TOKEN", 1)
    assert text_protocols.encode_joined(documents, separator, tokenizer, max_tokens=3001) == whole[:3001]


def test_max_tokens_leaves_the_rest_of_the_text_unread(tokenizer):
    """Only the documents the tokens come from are touched."""

    def documents():
        yield from DOCUMENTS * 20
        raise AssertionError("read to the end")

    class Lazy:
        def __iter__(self):
            return documents()

    assert len(text_protocols.encode_joined(Lazy(), "\n\n", tokenizer, max_tokens=500)) == 500


def test_long_texts_are_tokenized_without_warning(tokenizer, caplog):
    """A text longer than the model's context is what is wanted here, not worth a warning."""
    assert tokenizer.model_max_length == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(text_protocols.encode(tokenizer, DOCUMENTS[3])) > 64
    assert not caplog.records


# Files


def test_a_text_file_is_one_document(tokenizer, tmp_path):
    """A .txt file evaluates as its own tokens; the report says what was done to it."""
    path = tmp_path / "notes.txt"
    path.write_text(DOCUMENTS[3])
    token_set = load_evaluation(str(path), tokenizer, seq_len=40)
    ids = ids_of(tokenizer, DOCUMENTS[3])
    assert token_set.ids_NS.dtype == torch.int64
    assert token_set.ids_NS.tolist() == [ids[start : start + 40] for start in range(0, len(ids) - 39, 40)]
    report = token_set.report
    assert (report.source, report.split, report.seq_len) == (str(path), "all", 40)
    assert report.num_sequences == len(ids) // 40
    assert report.description == (f"1 document of {path}: joined by '\\n\\n', tokenized once, non-overlapping windows.")


def test_line_ends_and_byte_order_marks_do_not_matter(tmp_path):
    """Windows' line ends and a BOM give the same documents."""
    path = tmp_path / "a.utf8"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert text.text_files.read_documents(path) == ["one\ntwo\n"]


@pytest.mark.parametrize(
    "record",
    [{"text": "x", "other": "y"}, {"id": 3, "content": "x"}, {"id": 3, "body": "x"}],
    ids=lambda r: list(r)[-1],
)
def test_json_lines_column(tmp_path, record):
    """text, else content, else the only string field; blank lines and U+2028 in strings do not matter."""
    path = tmp_path / "a.jsonl"
    second = {name: "é\u2028x" if value == "x" else value for name, value in record.items()}
    path.write_text(f"{json.dumps(record)}\n\n{json.dumps(second, ensure_ascii=False)}\n", encoding="utf-8")
    assert text.text_files.read_documents(path) == ["x", "é\u2028x"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "ok"', "a.jsonl:2: not valid JSON"),
        ('["ok"]', "a.jsonl:2: expected a JSON object"),
        ('{"body": "ok"}', "a.jsonl:2: no string in field 'text'"),
        ('{"text": null}', "a.jsonl:2: no string in field 'text'"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, expected):
    """The error points at file and line."""
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(TextError) as error:
        text.text_files.read_documents(path)
    assert expected in one_line(error)


@pytest.mark.parametrize("record", [{"question": "a", "answer": "b"}, {"id": 3}])
def test_json_lines_without_a_clear_column_name_their_fields(tmp_path, record):
    """Two string fields or none: the fields are listed."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(TextError, match=f"of all: {', '.join(record)}. Name one of them 'text'"):
        text.text_files.read_documents(path)


def write_parquet(path, columns):
    """A Parquet file with the given columns."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_parquet_column(tmp_path):
    """The text column is found among others, and nulls are left out."""
    write_parquet(tmp_path / "a.parquet", {"id": [1, 2, 3], "title": ["a", "b", "c"], "text": ["x", None, "z"]})
    assert text.text_files.read_documents(tmp_path / "a.parquet") == ["x", "z"]


def test_parquet_errors(tmp_path):
    """No clear column names them all; a truncated file is no traceback."""
    write_parquet(tmp_path / "a.parquet", {"q": ["a"], "a": ["b"]})
    with pytest.raises(TextError, match="string columns are q, a, of all: q, a"):
        text.text_files.read_documents(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(TextError, match="b.parquet is no readable Parquet") as error:
        text.text_files.read_documents(tmp_path / "b.parquet")
    one_line(error)


def test_a_directory_is_read_sorted_recursively_without_hidden_files(tmp_path):
    """Every kind of file, by path; .git, .DS_Store and the like are no text."""
    (tmp_path / "b.txt").write_text("three")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_text("two")
    (tmp_path / "a" / "y.jsonl").write_text('{"text": "one"}')
    write_parquet(tmp_path / "c" / "d.parquet", {"text": ["four", "five"]})
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "a" / ".DS_Store").write_bytes(b"\xff")
    assert text.text_files.read_documents(tmp_path) == ["one", "two", "three", "four", "five"]


def test_files_that_are_no_text_are_named(tmp_path):
    """Not UTF-8: the byte and where; .json: what to do instead."""
    (tmp_path / "image.png").write_bytes(b"PNG\xff\x00")
    with pytest.raises(TextError) as error:
        text.text_files.read_documents(tmp_path)
    assert "image.png is not UTF-8 text (byte 0xff at offset 3)" in one_line(error)
    (tmp_path / "image.png").rename(tmp_path / "a.json")
    with pytest.raises(TextError, match="a.json: .json files are not read. Write one JSON object per line"):
        text.text_files.read_documents(tmp_path)


def test_files_calibrate_as_one_stream(tokenizer, tmp_path):
    """A path calibrates by distinct windows of its documents' stream."""
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": document}) for document in DOCUMENTS))
    token_set = load_calibration(str(path), tokenizer, num_samples=5, seq_len=64, seed=1)
    expected, _ = text_protocols.windows_of_stream(DOCUMENTS, tokenizer, num_samples=5, seq_len=64, seed=1, source="x")
    assert token_set.ids_NS.tolist() == expected
    assert token_set.report.description == (
        f"10 documents of {path}: 5 distinct random windows, in the order drawn, of the documents as one token stream, "
        "each ended by </s>, seed 1."
    )


def test_sha256_is_that_of_little_endian_int64(tokenizer, tmp_path):
    """Anyone can recompute the digest from the ids; it is stable, and another seed has another."""
    path = tmp_path / "a.txt"
    path.write_text("\n".join(DOCUMENTS))
    token_sets = [load_calibration(str(path), tokenizer, num_samples=3, seq_len=32, seed=seed) for seed in (0, 0, 1)]
    raw = b"".join(token.to_bytes(8, "little") for row in token_sets[0].ids_NS.tolist() for token in row)
    digests = [token_set.report.sha256 for token_set in token_sets]
    assert digests[0] == digests[1] == hashlib.sha256(raw).hexdigest()
    assert digests[2] != digests[0]


# Names


@pytest.mark.parametrize("source", ["c4", "wikitext2", "ptb", "stdlib", "synthetic", "hf:user/name", "hf:x::train[:9]:c"])
def test_known_names_pass(source):
    """Names are checked without reading or reaching anything."""
    check_source(source)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("wikitext", "Did you mean 'wikitext2'?"),
        ("C4", "Did you mean 'c4'?"),
        ("stdlb", "Did you mean 'stdlib'?"),
        ("qqq", "known texts are c4, wikitext2, ptb, stdlib, synthetic, hf:NAME"),
        ("", "text '' is unknown"),
        ("notes.txt", "no file or directory 'notes.txt'"),
        ("/no/such/place", "no file or directory '/no/such/place'"),
        ("user/name", "Did you mean the hub's dataset 'hf:user/name'?"),
        ("hf:", "'hf:' is not hf:NAME[:CONFIG][:SPLIT][:COLUMN]"),
        ("hf:a:b:c:d:e", "is not hf:NAME[:CONFIG][:SPLIT][:COLUMN]"),
        ("hf:/no/such/place", "is no directory and no dataset name"),
    ],
)
def test_unknown_names_are_refused(source, expected):
    """The message lists what is known and guesses what was meant."""
    with pytest.raises(TextError) as error:
        check_source(source)
    assert expected in one_line(error)


def test_an_empty_directory_is_refused(tmp_path):
    """A directory without a file that is not hidden holds no text."""
    (tmp_path / ".hidden").write_text("x")
    with pytest.raises(TextError, match="holds no text"):
        check_source(str(tmp_path))


def test_names_win_over_files_and_home_is_expanded(tmp_path, monkeypatch):
    """A file called c4 needs ./c4; ~ is the home directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "stdlib").write_text("x")
    assert text._load("stdlib", evaluation=True).split == "held-out"
    assert text._load("./stdlib", evaluation=True).documents == ["x"]
    check_source("~/stdlib")


def test_checking_a_source_imports_neither_torch_nor_datasets():
    """The service's web process validates names without either."""
    code = (
        "import sys; from llmprune.io.text import check_source; check_source('c4'); check_source('hf:a/b');"
        "assert not {'torch', 'datasets', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# The standard library


def test_stdlib_calibrates_as_c4_does(tokenizer, monkeypatch):
    """Random windows of random train documents, by the reference's stream."""
    monkeypatch.setattr(text, "stdlib_documents", lambda split: {"train": DOCUMENTS}[split])
    token_set = load_calibration("stdlib", tokenizer, num_samples=6, seq_len=90, seed=5)
    assert token_set.ids_NS.tolist() == reference_c4(DOCUMENTS, tokenizer, 6, 90, 5)
    assert token_set.report.split == "train"
    assert "a random window of each of 6 random documents longer than 90 tokens, seed 5." in token_set.report.description


def test_stdlib_evaluates_on_its_held_out_files(tokenizer):
    """The real files of this Python: windows of the held-out split, cut to max_tokens."""
    token_set = load_evaluation("stdlib", tokenizer, seq_len=128, max_tokens=1000)
    assert token_set.ids_NS.shape == (7, 128)
    assert token_set.report.split == "held-out"
    assert token_set.report.num_tokens == 896
    assert "of the first 1000 tokens" in token_set.report.description


def test_a_python_without_source_is_a_text_error(tokenizer, monkeypatch):
    """A stripped Python has no standard library to read."""

    def missing(split):
        raise FileNotFoundError("no source files")

    monkeypatch.setattr(text, "stdlib_documents", missing)
    with pytest.raises(TextError, match="no source files"):
        load_evaluation("stdlib", tokenizer, seq_len=8)


# Datasets


@pytest.mark.parametrize("source", ["c4", "wikitext2", "ptb", "hf:roneneldan/TinyStories"])
@pytest.mark.parametrize("evaluation", [False, True])
def test_offline_the_hub_fails_fast_with_a_remedy(tokenizer, source, evaluation):
    """The real loading code, up to the network: a quick TextError that names what works without it."""
    started = time.perf_counter()
    with pytest.raises(TextUnreachable) as error:
        if evaluation:
            load_evaluation(source, tokenizer, seq_len=8)
        else:
            load_calibration(source, tokenizer, num_samples=1, seq_len=8, seed=0)
    assert time.perf_counter() - started < 10
    message = one_line(error)
    assert "cannot reach the Hugging Face hub" in message
    assert "local file, 'stdlib' or 'synthetic'" in message
    assert "HF_HUB_OFFLINE" in message


@pytest.fixture
def folder(tmp_path):
    """A local data set with train and validation splits and three columns."""
    directory = tmp_path / "data set"
    rows = {"id": list(range(10)), "title": ["t"] * 10, "text": DOCUMENTS}
    write_parquet(directory / "train-00000-of-00001.parquet", rows)
    write_parquet(directory / "validation-00000-of-00001.parquet", {**rows, "text": [*DOCUMENTS[1:], None]})
    return directory


def test_a_dataset_calibrates_from_its_train_split(tokenizer, folder):
    """datasets.load_dataset for real, on a local directory: the stream protocol on column text of split train."""
    token_set = load_calibration(f"hf:{folder}", tokenizer, num_samples=5, seq_len=64, seed=1)
    expected, _ = text_protocols.windows_of_stream(DOCUMENTS, tokenizer, num_samples=5, seq_len=64, seed=1, source="x")
    assert token_set.ids_NS.tolist() == expected
    assert token_set.report.split == "train"
    assert token_set.report.source == f"hf:{folder}"


def test_a_dataset_without_test_split_evaluates_on_validation_and_says_so(tokenizer, folder):
    """The fallback is in the report; nulls are left out."""
    token_set = load_evaluation(f"hf:{folder}", tokenizer, seq_len=64)
    ids = ids_of(tokenizer, "\n\n".join(DOCUMENTS[1:]))
    assert token_set.ids_NS.flatten().tolist() == ids[: len(ids) // 64 * 64]
    assert token_set.report.split == "validation"
    assert "the dataset has no test split, so validation was used" in token_set.report.description


def test_split_and_column_can_be_named(tokenizer, folder):
    """Empty parts take their defaults, and a split may be a slice."""
    documents, split, note = text_hub.read_dataset(text_hub.HubSource.parse(f"hf:{folder}::train[2:5]:title"), evaluation=True)
    assert (list(documents), split, note) == (["t"] * 3, "train[2:5]", "")


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("::test", "has no split test; it has train, validation. Name one: hf:NAME[:CONFIG][:SPLIT][:COLUMN]"),
        (":::body", "has no text column 'body': string columns are title, text, of all: id, title, text"),
        (":::id", "has no text column 'id'"),
        ("::train[x]", "Unrecognized instruction format"),
    ],
)
def test_a_wrong_part_of_a_dataset_name_is_explained(tokenizer, folder, rest, expected):
    """Splits and columns that exist are listed."""
    with pytest.raises(TextError) as error:
        load_calibration(f"hf:{folder}{rest}", tokenizer, num_samples=1, seq_len=8, seed=0)
    assert expected in one_line(error)


def test_an_ambiguous_column_lists_the_columns(tokenizer, tmp_path):
    """Two string columns and neither text nor content: the user has to say."""
    write_parquet(tmp_path / "qa" / "train.parquet", {"question": ["a"], "answer": ["b"]})
    with pytest.raises(TextError, match="string columns are question, answer"):
        load_calibration(f"hf:{tmp_path / 'qa'}", tokenizer, num_samples=1, seq_len=8, seed=0)


def test_an_unknown_configuration_lists_the_known_ones(tokenizer, folder):
    """datasets knows the configurations from the card; its message is passed on in one line."""
    configs = "".join(f"- config_name: {name}\n  data_files: {name}*.parquet\n" for name in ("train", "validation"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for config, expected in (("other", "'other' not found"), ("", "Config name is missing")):
        with pytest.raises(TextError, match=f"{expected}.*'train', 'validation'") as error:
            load_calibration(f"hf:{folder}:{config}", tokenizer, num_samples=1, seq_len=8, seed=0)
        assert "Example of usage" not in one_line(error)
    assert load_calibration(f"hf:{folder}:validation", tokenizer, num_samples=1, seq_len=8, seed=0)


def test_an_enormous_dataset_is_refused_before_it_is_downloaded(tokenizer, folder):
    """A slip such as hf:allenai/c4 would fill the disk; the card's download size stops it."""
    (folder / "README.md").write_text("---\ndataset_info:\n  download_size: 305000000000\n---\n")
    with pytest.raises(TextError, match="305 GB"):
        load_calibration(f"hf:{folder}", tokenizer, num_samples=1, seq_len=8, seed=0)


@pytest.mark.parametrize(
    ("source", "evaluation", "folder_name", "ref", "file", "column"),
    [
        ("c4", False, "allenai--c4", "main", "en/c4-train.00000-of-01024.json.gz", "text"),
        ("c4", True, "allenai--c4", "main", "en/c4-validation.00000-of-00008.json.gz", "text"),
        *(
            ("ptb", split == "test", "ptb-text-only--ptb_text_only", "refs/convert/parquet", file, "sentence")
            for split, file in ((split, f"penn_treebank/{split}/0000.parquet") for split in ("train", "test"))
        ),
    ],
)
def test_files_downloaded_before_are_found_offline(
    tokenizer, tmp_path, monkeypatch, source, evaluation, folder_name, ref, file, column
):
    """C4 and PTB, read for real from a hub cache laid out as huggingface_hub does."""
    repository = tmp_path / "hub" / f"datasets--{folder_name}"
    path = repository / "snapshots" / "abc123" / file
    path.parent.mkdir(parents=True)
    if path.suffix == ".gz":
        lines = [json.dumps({"text": document, "timestamp": "2019", "url": "u"}) for document in DOCUMENTS]
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    else:
        write_parquet(path, {column: DOCUMENTS})
    (repository / "refs" / ref).parent.mkdir(parents=True)
    (repository / "refs" / ref).write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert list(text._load(source, evaluation=evaluation).documents) == DOCUMENTS
    if not evaluation:
        load_calibration(source, tokenizer, num_samples=2, seq_len=90, seed=0)


def test_a_dataset_prepared_before_is_found_offline(tmp_path):
    """A hub dataset in datasets' cache, here moved there from a local one, loads without the hub."""
    write_parquet(tmp_path / "name" / "train.parquet", {"text": DOCUMENTS})
    text_hub.read_dataset(text_hub.HubSource(str(tmp_path / "name")), evaluation=False)
    (tmp_path / "cache" / "name").rename(tmp_path / "cache" / "user___name")
    documents, split, _ = text_hub.read_dataset(text_hub.HubSource("user/name"), evaluation=False)
    assert (list(documents), split) == (DOCUMENTS, "train")


def test_other_failures_of_datasets_are_explained(monkeypatch):
    """Not found or gated, a loading script, and anything else: one line and a remedy each."""
    from datasets.exceptions import DatasetNotFoundError

    cases = {
        DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."): "hf auth login",
        RuntimeError("Dataset scripts are no longer supported, but found b.py"): "pass the path instead",
        ValueError("something\nelse"): "cannot read dataset a/b: something else. The syntax is",
    }
    for failure, expected in cases.items():
        with pytest.raises(TextError) as error, text_hub._explained("a/b"):
            raise failure
        assert expected in one_line(error)


@pytest.mark.parametrize(
    ("source", "split_calibration", "split_evaluation", "separator"),
    [("c4", "train", "validation", " "), ("wikitext2", "train", "test", "\n\n"), ("ptb", "train", "test", " ")],
)
def test_the_fields_sources_apply_the_fields_protocols(
    tokenizer, monkeypatch, source, split_calibration, split_evaluation, separator
):
    """With the documents replaced, each name draws and joins as its reference does, from the right split."""
    asked = []

    def read(split):
        asked.append(split)
        return DOCUMENTS

    monkeypatch.setattr(text_hub, f"read_{source}", read)
    calibration = load_calibration(source, tokenizer, num_samples=4, seq_len=90, seed=0)
    evaluation = load_evaluation(source, tokenizer, seq_len=90)
    assert asked == [split_calibration, split_evaluation]
    assert [calibration.report.split, evaluation.report.split] == asked
    joined = ids_of(tokenizer, separator.join(DOCUMENTS))
    assert evaluation.ids_NS.flatten().tolist() == joined[: len(joined) // 90 * 90]
    if source == "c4":
        expected = reference_c4(DOCUMENTS, tokenizer, 4, 90, 0)
    else:
        rng = random.Random(0)
        starts = [rng.randint(0, len(joined) - 90 - 1) for _ in range(4)]
        expected = [joined[start : start + 90] for start in starts]
    assert calibration.ids_NS.tolist() == expected


def test_c4_evaluates_on_256_windows_of_1100_documents(tokenizer, monkeypatch):
    """The field's C4 text is cut to 256 windows, and to the first 1100 documents before."""
    documents = [f"row {number} of the model" for number in range(1200)]
    monkeypatch.setattr(text_hub, "read_c4", lambda split: documents)
    ids = ids_of(tokenizer, " ".join(documents[:1100]))
    assert load_evaluation("c4", tokenizer, seq_len=8).ids_NS.flatten().tolist() == ids[: 256 * 8]
    long = load_evaluation("c4", tokenizer, seq_len=100)
    assert long.ids_NS.flatten().tolist() == ids[: len(ids) // 100 * 100]
    assert load_evaluation("c4", tokenizer, seq_len=8, max_tokens=90).ids_NS.shape == (11, 8)


# Synthetic


def test_synthetic_text_is_deterministic_and_depends_on_the_seed(model, tokenizer):
    """The same seed gives the same bytes whatever the global generator; another seed another text."""
    how = {"num_samples": 5, "seq_len": 12}
    first = load_calibration("synthetic", tokenizer, seed=0, model=model, **how)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = sample_synthetic(model, tokenizer, seed=0, **how)
    assert torch.equal(before, torch.get_rng_state())
    assert first.report == again.report
    assert torch.equal(first.ids_NS, again.ids_NS)
    assert first.ids_NS.shape == (5, 12)
    assert first.ids_NS.dtype == torch.int64
    assert (first.ids_NS[:, 0] == tokenizer.bos_token_id).all()
    assert len(first.ids_NS.unique(dim=0)) == 5
    assert not torch.equal(first.ids_NS, sample_synthetic(model, tokenizer, seed=1, **how).ids_NS)
    assert (first.report.split, first.report.source) == ("generated", "synthetic")
    assert "from <s> on, not stopping at end tokens, seed 0" in first.report.description


def test_synthetic_text_does_not_depend_on_batch_size_or_cache(model, tokenizer):
    """A model without a KV cache is fed its whole sequence, to the same text."""

    class Cacheless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model
            self.get_input_embeddings = model.get_input_embeddings

        def forward(self, input_ids, use_cache):
            return type("Output", (), {"logits": self.inner(input_ids=input_ids, use_cache=False).logits})

    how = {"num_samples": 5, "seq_len": 12, "seed": 3}
    expected = sample_synthetic(model, tokenizer, **how).ids_NS
    assert torch.equal(expected, sample_synthetic(model, tokenizer, batch_size=2, **how).ids_NS)
    assert torch.equal(expected, sample_synthetic(Cacheless(), tokenizer, **how).ids_NS)


def test_synthetic_text_follows_the_models_distribution():
    """Inverting the cumulative distribution draws each token by its probability, impossible ones never."""
    from llmprune.io.text_synthetic import _draw

    logits_V = torch.tensor([float("-inf"), 0.0, 1.0, float("-inf"), 2.0, float("-inf")])
    uniform_N1 = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = _draw(logits_V.expand(20_000, -1), uniform_N1)
    share_V = torch.bincount(drawn.flatten(), minlength=6) / 20_000
    assert torch.equal(share_V == 0, logits_V == float("-inf"))
    assert torch.allclose(share_V, logits_V.softmax(-1), atol=0.02)


def test_synthetic_text_starts_with_a_random_ordinary_token_where_there_is_no_bos(model):
    """Tokenizers without bos, such as Qwen's, start every sample differently and never with a special token."""
    bare = train_tokenizer(bos=False)
    token_set = sample_synthetic(model, bare, num_samples=50, seq_len=2, seed=0)
    starts = set(token_set.ids_NS[:, 0].tolist())
    assert len(starts) > 30
    assert not starts & set(bare.all_special_ids)
    assert "from a random token on" in token_set.report.description


def test_synthetic_text_leaves_the_model_as_it_was(model, tokenizer):
    """Dropout is off while sampling, and the training flag is put back."""
    model.train()
    try:
        sample_synthetic(model, tokenizer, num_samples=1, seq_len=3, seed=0)
        assert model.training
    finally:
        model.eval()


def test_synthetic_text_of_a_broken_model_is_an_error(model, tokenizer):
    """NaN logits have no distribution to draw from."""
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN or inf"):
        sample_synthetic(broken, tokenizer, num_samples=1, seq_len=3, seed=0)


def test_synthetic_needs_the_model_and_does_not_evaluate(tokenizer):
    """Both misuses are refused with a remedy, the second already by name."""
    with pytest.raises(TextError, match="pass model="):
        load_calibration("synthetic", tokenizer, num_samples=1, seq_len=8, seed=0)
    for refuse in (
        lambda: load_evaluation("synthetic", tokenizer, seq_len=8),
        lambda: check_source("synthetic", evaluation=True),
    ):
        with pytest.raises(TextError, match="calibration only. Evaluate on stdlib"):
            refuse()
