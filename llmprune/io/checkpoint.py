"""Writing the result: an ordinary Hugging Face directory, with the report beside the weights.

Everything is written to a temporary directory next to the target, synced, and renamed at the end: a directory of that
name is whole or not there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.errors import DiskFull, OutputError
from llmprune.io.headers import read_header
from llmprune.io.journal import sync_and_hash, sync_directory, write_durably
from llmprune.io.render import render_card, render_html
from llmprune.report import Report
from llmprune.structured.free import CODE, is_free, modeling_code

MANIFEST = "llmprune.json"
_COPIED_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "preprocessor_config.json", "processor_config.json", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip

_LOAD_BEGIN = "\n<!-- llmprune: packed -->\n"
_LOAD_END = "<!-- /llmprune: packed -->\n"
_LOAD = """
## Packed weights

The sparse weights are stored in llmprune's packed format. With llmprune installed:

```python
import llmprune

model = llmprune.load(".")  # this directory, or its id on the hub
```

or `import llmprune` before `AutoModelForCausalLM.from_pretrained(...)`.
`llmprune convert . --to dense` makes ordinary tensors of them.
"""


class _Manifest(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="strings")

    schema_version: int
    fingerprint: dict[str, Any]
    sha256: dict[str, str]
    report: Report


def check_output(out: Path, source: Path | None) -> None:
    """Raise OutputError before any work if ``out`` is the input, inside it, or holds something."""
    if out.name in ("", ".."):
        raise OutputError(f"--out {out} has no name of its own; give the name of a new directory.")
    resolved = out.resolve()
    if source is not None and (resolved == source.resolve() or source.resolve() in resolved.parents):
        raise OutputError(f"--out {out} is the input model itself or lies inside it; choose another directory.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} already exists and is not empty; choose another --out or delete it.")
    if out.is_mount():  # the finished checkpoint takes its place by a rename
        raise OutputError(f"--out {out} is a mount point; choose a directory inside it, such as {out / 'pruned'}.")
    parent = resolved.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"--out {out} cannot be created: {parent} is not a directory.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"--out {out} cannot be created: {parent} is not writable. Choose another --out.")


def check_disk(where: Path, needed_bytes: int) -> None:
    """Raise DiskFull if the file system of ``where`` has less than ``needed_bytes`` left."""
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    if free < needed_bytes:
        raise DiskFull(
            f"{where} has {free / 1e9:.2f} GB free; the checkpoint and the work directory need {needed_bytes / 1e9:.2f} GB. "
            "Free some space or choose another --out."
        )


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn 'no space left' from any layer into DiskFull."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error):
            raise DiskFull(
                f"no space left on the disk of {where}. Free some, then go on with --resume: finished blocks are kept."
            ) from None
        raise


def save_weights(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    source: Path | None,
    code: bool,
    rest: dict[str, Tensor] | None = None,
    shards: Sequence[Path] = (),
) -> None:
    """Write weights, config and tokenizer to ``folder``; what pruning does not change is copied from ``source`` byte for byte.

    Where the config lists the shapes of a sliced model, the code that builds it is written beside it.

    Args:
        code: also copy the modelling code the source ships (it was loaded with remote code allowed); without, what was
            loaded is transformers' own class, and the checkpoint does not refer to code it does not hold.
        rest, shards: of a model whose blocks are on disk the tensors that are in no block, and the blocks' files.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_pretrained(folder, state_dict=rest)
    if shards:
        _add_shards(folder, shards, model.num_parameters())
    readable = (folder / "config.json").stat().st_mode & 0o777
    for file in folder.glob("*.safetensors"):
        file.chmod(readable)  # safetensors leaves 0600 whatever the umask
    if source is not None:
        for pattern in (*_COPIED_FILES, *(("*.py",) if code else ())):
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
        if not code:
            _drop_code(folder)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if is_free(model.config):
        _add_code(model, folder)


def _add_shards(folder: Path, shards: Sequence[Path], num_parameters: int) -> None:
    """Put files of tensors beside the one that was saved, and write the index of them all."""
    names = [f"model-{number:05d}-of-{len(shards) + 1:05d}.safetensors" for number in range(1, len(shards) + 2)]
    (folder / "model.safetensors").rename(folder / names[0])
    for shard, name in zip(shards, names[1:], strict=True):
        try:
            os.link(shard, folder / name)  # the same bytes: they are not written twice
        except OSError:  # a file system without links
            shutil.copyfile(shard, folder / name)
    headers = {name: read_header(folder / name, name) for name in names}
    total_size = sum(one.end - one.begin for tensors in headers.values() for one in tensors.values())
    index = {
        "metadata": {"total_parameters": num_parameters, "total_size": total_size},
        "weight_map": {tensor: name for name, tensors in headers.items() for tensor in tensors},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _add_code(model: PreTrainedModel, folder: Path) -> None:
    """Write the code that builds a model of free widths, and name its class in config.json."""
    text, name = modeling_code(model)
    (folder / f"{CODE}.py").write_text(text, encoding="utf-8")
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["architectures"] = [f"Pruned{name}"]  # what goes by this name alone shall not take it for the stock class
    content["auto_map"] = (content.get("auto_map") or {}) | {"AutoModelForCausalLM": f"{CODE}.{name}"}
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _drop_code(folder: Path) -> None:
    """Take ``auto_map``, which names files of code, out of the two configs that transformers reads it from."""
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if content.pop("auto_map", None):
            file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def finish(folder: Path, out: Path, report: Report, fingerprint: Mapping[str, Any], license: str | None) -> None:
    """Add card, report and manifest to the written weights, sync everything and rename ``folder`` to ``out``."""
    (folder / "README.md").write_text(render_card(report, report.model.name, license), encoding="utf-8")
    (folder / "report.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")
    (folder / "report.html").write_text(render_html(report), encoding="utf-8")
    digests = {file.name: sync_and_hash(file) for file in sorted(folder.iterdir()) if file.is_file()}
    manifest = _Manifest(schema_version=report.schema_version, fingerprint=dict(fingerprint), sha256=digests, report=report)
    write_durably(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
    take_place(folder, out)


def finish_plain(folder: Path, out: Path, *, packed: bool) -> None:
    """Sync a converted directory that llmprune did not prune and rename it to ``out``; its card says how to load it."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    before, _, rest = text.partition(_LOAD_BEGIN)
    plain = before + rest.partition(_LOAD_END)[2]
    if packed or plain != text:
        card.write_text(plain + (f"{_LOAD_BEGIN}{_LOAD}{_LOAD_END}" if packed else ""), encoding="utf-8")
        if not packed and not plain:
            card.unlink()
    for file in sorted(folder.iterdir()):
        sync_and_hash(file)
    take_place(folder, out)


def take_place(folder: Path, out: Path) -> None:
    """Rename a written and synced directory to ``out``, which is not there or empty."""
    sync_directory(folder)
    if out.exists():
        out.rmdir()  # an empty directory, or OSError
    out.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(out)
    sync_directory(out.parent)


def read_manifest(out: Path) -> tuple[dict[str, Any], Report] | None:
    """Fingerprint and report of the finished checkpoint at ``out``; None without one that a journal's run wrote."""
    manifest = read_any_manifest(out)
    return manifest if manifest and "revision" in manifest[0] else None


def read_any_manifest(folder: Path) -> tuple[dict[str, Any], Report] | None:
    """Fingerprint (empty where no journal was kept) and report of a checkpoint; None where there is no manifest that reads."""
    try:
        manifest = _Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return manifest.fingerprint, manifest.report


def weights_bytes(folder: Path) -> int:
    """Size of the safetensors files of a directory."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def license_of(source: Path | None) -> str | None:
    """The licence the source's model card states, or None."""
    card = source / "README.md" if source else None
    if card is None or not card.is_file():
        return None
    for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:60]:
        if line.startswith("license:"):
            return line.split(":", 1)[1].strip() or None
    return None
