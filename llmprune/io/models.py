"""From a name to a model: the bundled one, a local directory, or a hub repository. Safetensors only."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
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
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmprune.devices import is_out_of_memory
from llmprune.errors import (
    CorruptCheckpoint,
    DiskFull,
    GatedModel,
    HubUnreachable,
    ModelNotFound,
    UnsafeModel,
    UnsupportedModel,
    one_line,
)
from llmprune.io.headers import TensorHeader, read_header
from llmprune.io.packed import bytes_when_dense, bytes_when_packed, read_packing
from llmprune.spec import BUNDLED_MODEL, PACKING_METHOD, PruneConfig, describe
from llmprune.structured.free import check_shapes, is_free, pruned_class, shape_errors
from llmprune.structured.modeling import FIELD, reshape_
from llmprune_kernels.legacy import FORMAT as LEGACY_FORMAT

BUNDLED_PATH = Path(__file__).parent.parent / "demo_model"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "LICENSE*", "NOTICE*"]
_READ_IT = "Read it, then allow it with --trust-remote-code."
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


_Kind = TypeVar("_Kind", bound=BaseModel)


class _Facts(BaseModel):
    """What of config.json is judged here; the rest is for transformers to read."""

    model_type: str = ""
    architectures: list[str] | None = None
    auto_map: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    compression_config: dict[str, Any] | None = None

    @property
    def quantization(self) -> dict[str, Any]:
        """Under whichever of the two names, empty where there is none."""
        return self.quantization_config or self.compression_config or {}


class _Index(BaseModel):
    """Which file each tensor of a sharded checkpoint is in."""

    weight_map: dict[str, str] = {}


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

    @property
    def dense_bytes(self) -> int:
        """Size of the weights with the packed ones, if there are any, as ordinary tensors."""
        entry = json.loads((self.path / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
        packed = read_packing(entry, self.name).modules.values() if entry.get("quant_method") == PACKING_METHOD else ()
        return self.weights_bytes + sum(bytes_when_dense(tensor) - bytes_when_packed(tensor) for tensor in packed)

    def bytes_in(self, dtype: str) -> int:
        """Size of the dense weights once they are in a dtype; with ``auto`` they stay in their own."""
        if dtype == "auto":
            return self.dense_bytes
        headers = [tensor for file in self.weight_files for tensor in read_header(file, self.name).values()]
        floats = [tensor for tensor in headers if tensor.dtype in ("F16", "BF16", "F32", "F64")]
        stored = sum(tensor.end - tensor.begin for tensor in floats)
        itemsize: int = getattr(torch, dtype).itemsize
        return self.dense_bytes - stored + sum(tensor.numel for tensor in floats) * itemsize


def resolve(config: PruneConfig) -> Source:
    """Find the model and bring it to disk (hub weights are downloaded, with the hub's own progress bars).

    Raises:
        ModelNotFound, HubUnreachable, GatedModel, UnsafeModel, CorruptCheckpoint, UnsupportedModel, DiskFull.
    """
    path = locate(config)
    load_config(path, config)  # refused before the weights are hashed and the tokenizer is tried
    return Source(config.model, path, _sha256_of(path) if local_directory(config.model) else _commit_of(path))


def locate(config: PruneConfig) -> Path:
    """The directory of a model, downloaded where it is the hub's, its files checked as :func:`resolve` does; what kind of
    model it is, is not judged.
    """
    path = local_directory(config.model) or _download(config)
    check_files(path, config)
    return path


def known_revision(config: PruneConfig) -> str | None:
    """The revision :func:`resolve` would give, as far as this machine knows it without the network; None where it does not.

    Raises ModelNotFound for what can be neither a directory nor a hub ID.
    """
    path = local_directory(config.model)
    if path is not None:
        return _sha256_of(path)
    cached = try_to_load_from_cache(config.model, "config.json", revision=config.revision)
    return _commit_of(Path(cached).parent) if isinstance(cached, str) else None


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


def check_files(path: Path, config: PruneConfig) -> list[TensorHeader]:
    """Refuse a directory that cannot be loaded, or only by executing code from it; returns the headers of its tensors.

    Headers are read, weights are not.
    """
    if not (path / "config.json").is_file():
        raise ModelNotFound(f"{config.model!r} has no config.json: it is not a Hugging Face model directory.")
    _described(_Facts, path / "config.json", config)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        refuse_pickles(config.model, [file.name for file in path.iterdir()])
    headers = [tensor for file in files for tensor in read_header(file, config.model).values()]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = _described(_Index, index, config).weight_map.values()
        missing = sorted(set(shards) - {file.name for file in files})
        if missing:
            raise CorruptCheckpoint(
                f"{config.model!r} lacks {len(missing)} weight shards, e.g. {missing[0]}. Download it again."
            )
    return headers


def refuse_pickles(name: str, files: list[str]) -> None:
    """Raise for a repository without safetensors: UnsafeModel if it has pickles, ModelNotFound if it has no weights."""
    pickles = [file for file in files if file.endswith(_PICKLES)]
    if pickles:
        raise UnsafeModel(
            f"{name!r} has pickle weights only ({pickles[0]}); loading them can execute code. "
            "Convert them to safetensors first."
        )
    raise ModelNotFound(f"{name!r} holds no safetensors weights.")


def quantization_of(path: Path, config: PruneConfig) -> dict[str, Any]:
    """What config.json says of how the weights are stored: empty for ordinary ones."""
    return _described(_Facts, path / "config.json", config).quantization


def load_config(path: Path, config: PruneConfig, *, quantized: bool = False) -> Any:
    """The transformers config of a model directory, checked to be a causal decoder.

    With ``quantized`` the model may be, and the config says nothing of it: the caller reads the weights.

    A model that ships code of its own for a model_type transformers knows is loaded by transformers' class, unless remote
    code is allowed.

    Raises:
        UnsafeModel: it needs remote code and that is not allowed.
        UnsupportedModel: not a causal language model, or a model_type transformers does not know.
    """
    facts = _described(_Facts, path / "config.json", config)
    _judge(facts, config)
    if not quantized:
        _judge_quantization(facts, config)
    try:
        loaded = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except ImportError as error:
        raise UnsupportedModel(f"the code of {config.model!r} does not load here: {one_line(error)}") from None
    except (StrictDataclassError, OSError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(f"config.json of {config.model!r} describes no model ({one_line(error)}). Mend it.") from None
    if quantized:
        for name in ("quantization_config", "compression_config"):
            loaded.__dict__.pop(name, None)
    if is_free(loaded):
        check_shapes(getattr(loaded, FIELD), config.model)
        if not config.trust_remote_code:
            loaded.__dict__.pop("auto_map", None)  # its own code is not needed here
    return loaded


class _MatricesOnMeta(TorchFunctionMode):
    """torch.empty makes matrices on ``meta``: memory that nothing touches takes addresses all the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and len(args[0] if args and not isinstance(args[0], int) else args) > 1:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def empty_weights() -> Iterator[None]:
    """Modules that are made in here have their parameters on ``meta``, and buffers as they are."""
    with init_empty_weights(include_buffers=False), _MatricesOnMeta():
        yield


def build_empty(transformers_config: Any, config: PruneConfig) -> PreTrainedModel:
    """The model of a config with weights on ``meta``: only names and shapes.

    Raises:
        CorruptCheckpoint: the config lists shapes that do not fit the class.
    """
    with shape_errors(transformers_config, config.model):
        with empty_weights():
            model = AutoModelForCausalLM.from_config(transformers_config, trust_remote_code=config.trust_remote_code)
        if is_free(model.config) and not hasattr(model, "stock_class"):  # whose own code has done so
            reshape_(model, getattr(model.config, FIELD))
    model.tie_weights()  # what is shared was taken apart on its way to meta
    return model


def _judge(facts: _Facts, config: PruneConfig) -> None:
    """Refuse a model that is no causal decoder, or needs code that may not be run."""
    auto_map, architectures = facts.auto_map or {}, facts.architectures or []
    remote = "AutoModelForCausalLM" in auto_map
    native = facts.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not config.trust_remote_code:
        if (auto_map and facts.model_type not in CONFIG_MAPPING) or (remote and not native):
            raise UnsafeModel(f"{config.model!r} ships its own modelling code. {_READ_IT}")
        if facts.model_type not in CONFIG_MAPPING:
            raise UnsupportedModel(
                f"transformers does not know model_type {facts.model_type!r} of {config.model!r}. Update transformers."
            )
    known = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _names(names)}
    # Shipped code may call its class as it likes: then that it is for AutoModelForCausalLM says enough.
    causal = native and (not architectures or remote or known.intersection(architectures))
    if not causal and not (remote and config.trust_remote_code):
        raise UnsupportedModel(
            f"{config.model!r} is {architectures or [facts.model_type]}, not a causal language model; llmprune prunes "
            "decoders that AutoModelForCausalLM loads."
        )


def _judge_quantization(facts: _Facts, config: PruneConfig) -> None:
    """Refuse weights that are stored in a way which cannot be read, or by another version of llmprune."""
    entry = facts.quantization
    if not entry:
        return
    how = entry.get("quant_method", "quantization_config in its config.json")
    if how == PACKING_METHOD:
        read_packing(entry, config.model)
        return
    sparsity = entry.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") == LEGACY_FORMAT:
        raise UnsupportedModel(
            f"{config.model!r} is stored as {LEGACY_FORMAT}, which nothing loads any more. "
            f"Convert it first: llmprune convert {config.model} --to dense."
        )
    raise UnsupportedModel(f"{config.model!r} is quantized ({how}); llmprune prunes 16- and 32-bit weights. Give the original.")


def load_model(source: Source, config: PruneConfig, device: torch.device, *, packed: bool = False) -> PreTrainedModel:
    """Load the weights onto ``device`` in evaluation mode, in the checkpoint's dtype unless the config names another.

    The layers of a packed checkpoint become ordinary ones; with ``packed`` they stay packed.

    Raises:
        CorruptCheckpoint: tensors are missing, unreadable or of other shapes: the model would be partly random.
    """
    transformers_config, loader = load_config(source.path, config), AutoModelForCausalLM
    if is_free(transformers_config):
        empty = build_empty(copy.deepcopy(transformers_config), config)
        if not hasattr(empty, "stock_class"):
            loader, transformers_config = pruned_class(type(empty)), empty.config
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        model, info = loader.from_pretrained(
            source.path, config=transformers_config, dtype=dtype, device_map={"": device}, use_safetensors=True,
            trust_remote_code=config.trust_remote_code, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except SafetensorError as error:
        if is_out_of_memory(error):
            raise
        raise CorruptCheckpoint(
            f"the weights of {source.name!r} cannot be read ({one_line(error)}). Download them again."
        ) from None
    if loader is not AutoModelForCausalLM:
        model.__class__ = loader.stock_class  # the other was there for its constructor
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
    if not packed and getattr(model, "hf_quantizer", None) is not None:
        model.dequantize()
    return model.eval()


def load_tokenizer(path: Path, config: PruneConfig) -> PreTrainedTokenizerBase:
    """The model's own tokenizer; raises ModelNotFound where there is none."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a dozen unrelated types, and of tokenizers Exception itself
        if is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise UnsafeModel(f"{config.model!r} ships its own tokenizer code. {_READ_IT}") from None
        raise ModelNotFound(f"{config.model!r} has no tokenizer that loads ({one_line(error)}). Save one with it.") from None


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
        raise ModelNotFound(f"{name!r} is not a hub ID ({one_line(error)}).") from None
    except NotASafetensorsRepoError:
        raise UnsafeModel(f"{name!r} has no safetensors weights; pickles are refused. Convert them first.") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, OSError, HTTPError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"no space left to download {name!r} to {constants.HF_HUB_CACHE}; free some or set HF_HOME."
            ) from None
        raise HubUnreachable(
            f"{name!r} is not a local directory and the hub cannot be reached ({one_line(error)}). "
            "Check the network and HF_HUB_OFFLINE, or give a directory."
        ) from None


def _download(config: PruneConfig) -> Path:
    wanted = [*_WANTED, "*.py"] if config.trust_remote_code else _WANTED
    with hub_errors(config):
        if not constants.HF_HUB_OFFLINE:
            info = HfApi().model_info(config.model, revision=config.revision)
            files = [sibling.rfilename for sibling in info.siblings or []]
            if not any(file.endswith(".safetensors") for file in files):
                refuse_pickles(config.model, files)
        # By the name that was asked for, not by info.sha: only then does the cache remember it, and a run offline find it.
        return Path(snapshot_download(config.model, revision=config.revision, allow_patterns=wanted))


def _commit_of(path: Path) -> str:
    """A snapshot directory is named after its commit."""
    return path.name


def _sha256_of(path: Path) -> str:
    """Digest of a directory's weights."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _described(kind: type[_Kind], file: Path, config: PruneConfig) -> _Kind:
    """What a JSON file of the model says, or CorruptCheckpoint."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise CorruptCheckpoint(f"{file.name} of {config.model!r} is not a JSON object. Download it again.")
        return kind.model_validate(content)
    except ValidationError as error:
        raise CorruptCheckpoint(
            f"{file.name} of {config.model!r} is not in order ({describe(error)[:200]}). Download it again."
        ) from None
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"{file.name} of {config.model!r} is not JSON ({one_line(error)}). Download it again."
        ) from None
