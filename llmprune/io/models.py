"""From a name to a model: the bundled one, a local directory, or a hub repository. Safetensors only."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HFValidationError,
    HTTPError,  # of whichever HTTP client the hub library uses
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmprune.errors import (
    CorruptCheckpoint,
    DiskFull,
    GatedModel,
    HubUnreachable,
    ModelNotFound,
    UnsafeModel,
    UnsupportedModel,
)
from llmprune.spec import BUNDLED_MODEL, PruneConfig

BUNDLED_PATH = Path(__file__).parent.parent / "demo_model"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "LICENSE*", "NOTICE*"]
_READ_IT = "Read it, then allow it with --trust-remote-code."
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Source:
    """A model on disk: the name the user gave, the directory, and what pins its content (commit, or sha256 of the weights)."""

    name: str
    path: Path
    revision: str

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted(self.path.glob("*.safetensors"))

    @property
    def weights_bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(file.stat().st_size for file in self.weight_files)


def resolve(config: PruneConfig) -> Source:
    """Find the model and bring it to disk (hub weights are downloaded, with the hub's own progress bars).

    Raises:
        ModelNotFound, HubUnreachable, GatedModel, UnsafeModel, CorruptCheckpoint, UnsupportedModel, DiskFull.
    """
    local = local_directory(config.model)
    path = local or _download(config)
    check_files(path, config)
    load_config(path, config)  # refused before the weights are hashed and the tokenizer is tried
    revision = _commit_of(path) if local is None else _sha256_of(sorted(path.glob("*.safetensors")))
    return Source(config.model, path, revision)


def local_directory(name: str) -> Path | None:
    """The directory a name stands for, or None for a hub ID. Raises ModelNotFound for what can be neither."""
    if name == BUNDLED_MODEL:
        return BUNDLED_PATH
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path.resolve()
    if path.exists() or not _HUB_ID.fullmatch(name) or name.startswith((".", "/", "~")):
        raise ModelNotFound(f"{name!r} is neither a directory nor a hub ID such as HuggingFaceTB/SmolLM2-135M.")
    return None


def check_files(path: Path, config: PruneConfig) -> None:
    """Refuse a directory that cannot be loaded, or only by executing code from it; headers are read, weights are not."""
    if not (path / "config.json").is_file():
        raise ModelNotFound(f"{config.model!r} has no config.json: it is not a Hugging Face model directory.")
    _read_json(path / "config.json", config)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        refuse_pickles(config.model, [file.name for file in path.iterdir()])
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise CorruptCheckpoint(
                f"{file.name} of {config.model!r} is truncated or not safetensors ({_one_line(error)}). Download it again."
            ) from None
    index = path / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted(set(_read_json(index, config).get("weight_map", {}).values()) - {file.name for file in files})
        if missing:
            raise CorruptCheckpoint(
                f"{config.model!r} lacks {len(missing)} weight shards, e.g. {missing[0]}. Download it again."
            )


def refuse_pickles(name: str, files: list[str]) -> None:
    """Raise for a repository without safetensors: UnsafeModel if it has pickles, ModelNotFound if it has no weights."""
    pickles = [file for file in files if file.endswith(_PICKLES)]
    if pickles:
        raise UnsafeModel(
            f"{name!r} has pickle weights only ({pickles[0]}); loading them can execute code. "
            "Convert them to safetensors first."
        )
    raise ModelNotFound(f"{name!r} holds no safetensors weights.")


def load_config(path: Path, config: PruneConfig) -> Any:
    """The transformers config of a model directory, checked to be a causal decoder.

    Raises:
        UnsafeModel: it needs remote code and that is not allowed.
        UnsupportedModel: not a causal language model, or a model_type transformers does not know.
    """
    raw = _read_json(path / "config.json", config)
    model_type = raw.get("model_type", "")
    remote = "AutoModelForCausalLM" in raw.get("auto_map", {})
    if model_type not in CONFIG_MAPPING and not config.trust_remote_code:
        if "auto_map" in raw:
            raise UnsafeModel(f"{config.model!r} ships its own modelling code. {_READ_IT}")
        raise UnsupportedModel(
            f"transformers does not know model_type {model_type!r} of {config.model!r}. Update transformers."
        )
    architectures = raw.get("architectures") or []
    known = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _names(names)}
    causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and (not architectures or known.intersection(architectures))
    if not causal and not (remote and config.trust_remote_code):
        raise UnsupportedModel(
            f"{config.model!r} is {architectures or [model_type]}, not a causal language model; llmprune prunes decoders that "
            "AutoModelForCausalLM loads."
        )
    if quantization := raw.get("quantization_config"):
        how = quantization.get("quant_method", "quantization_config in its config.json")
        raise UnsupportedModel(
            f"{config.model!r} is quantized ({how}); llmprune prunes 16- and 32-bit weights. Give the original."
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except ImportError as error:
        raise UnsupportedModel(f"the code of {config.model!r} does not load here: {_one_line(error)}") from None
    except (StrictDataclassError, OSError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(f"config.json of {config.model!r} describes no model ({_one_line(error)}). Mend it.") from None


def load_model(source: Source, config: PruneConfig, device: torch.device) -> PreTrainedModel:
    """Load the weights onto ``device`` in evaluation mode, in the checkpoint's dtype unless the config names another.

    Raises:
        CorruptCheckpoint: tensors are missing, unreadable or of other shapes: the model would be partly random.
    """
    transformers_config = load_config(source.path, config)
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.path, config=transformers_config, dtype=dtype, device_map={"": device}, use_safetensors=True,
            trust_remote_code=config.trust_remote_code, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except SafetensorError as error:
        raise CorruptCheckpoint(
            f"the weights of {source.name!r} cannot be read ({_one_line(error)}). Download them again."
        ) from None
    if info["mismatched_keys"]:
        name, stored, wanted = min(info["mismatched_keys"], key=str)
        raise CorruptCheckpoint(
            f"{source.name!r} holds {name} of shape {list(stored)} where its config calls for {list(wanted)}. "
            "Download it again."
        )
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise CorruptCheckpoint(
            f"{source.name!r} lacks {len(info['missing_keys'])} tensors its config calls for, e.g. {first}; "
            "the model would be partly random."
        )
    return model.eval()


def load_tokenizer(path: Path, config: PruneConfig) -> PreTrainedTokenizerBase:
    """The model's own tokenizer; raises ModelNotFound where there is none."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise UnsafeModel(f"{config.model!r} ships its own tokenizer code. {_READ_IT}") from None
        raise ModelNotFound(f"{config.model!r} has no tokenizer that loads ({_one_line(error)}). Save one with it.") from None


@contextmanager
def hub_errors(config: PruneConfig) -> Iterator[None]:
    """Turn what huggingface_hub raises into errors that name the remedy."""
    name = config.model
    try:
        yield
    except GatedRepoError:
        raise GatedModel(
            f"{name!r} is gated: accept its licence on the hub, then set HF_TOKEN or run `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise ModelNotFound(f"{name!r} has no revision {config.revision!r}.") from None
    except RepositoryNotFoundError:
        raise ModelNotFound(
            f"the hub has no model {name!r} (or it is private: set HF_TOKEN), and there is no such directory."
        ) from None
    except HFValidationError as error:
        raise ModelNotFound(f"{name!r} is not a hub ID ({_one_line(error)}).") from None
    except NotASafetensorsRepoError:
        raise UnsafeModel(f"{name!r} has no safetensors weights; pickles are refused. Convert them first.") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, OSError, HTTPError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"no space left to download {name!r} to {constants.HF_HUB_CACHE}; free some or set HF_HOME."
            ) from None
        raise HubUnreachable(
            f"{name!r} is not a local directory and the hub cannot be reached ({_one_line(error)}). "
            "Check the network and HF_HUB_OFFLINE, or give a directory."
        ) from None


def _download(config: PruneConfig) -> Path:
    wanted = [*_WANTED, "*.py"] if config.trust_remote_code else _WANTED
    revision = config.revision
    with hub_errors(config):
        if not constants.HF_HUB_OFFLINE:
            info = HfApi().model_info(config.model, revision=revision)
            files = [sibling.rfilename for sibling in info.siblings or []]
            if not any(file.endswith(".safetensors") for file in files):
                refuse_pickles(config.model, files)
            revision = info.sha
        return Path(snapshot_download(config.model, revision=revision, allow_patterns=wanted))


def _commit_of(path: Path) -> str:
    """A snapshot directory is named after its commit."""
    return path.name


def _sha256_of(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _read_json(file: Path, config: PruneConfig) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptCheckpoint(
            f"{file.name} of {config.model!r} is not JSON ({_one_line(error)}). Download it again."
        ) from None
    if not isinstance(content, dict):
        raise CorruptCheckpoint(f"{file.name} of {config.model!r} is not a JSON object. Download it again.")
    return content


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(" .")
