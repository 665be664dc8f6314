"""Asks the hub, without torch, what a model is before anything is queued or a cached copy is used: commit, size, access."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, is_offline_mode, scan_cache_dir, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    CacheNotFound,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of whichever HTTP client the hub library uses
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from llmprune.spec import BUNDLED_MODEL
from llmprune_service.policy import is_local_model
from llmprune_service.problems import Problem
from llmprune_service.settings import GIB, Settings

# What the library downloads: no pickles, no code. Importing it from there would need torch, so a test compares the two.
WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "LICENSE*", "NOTICE*"]
_CONFIG = "config.json"
_TIMEOUT = 10.0


@dataclass(frozen=True)
class Resolved:
    """What a model is.

    Attributes:
        revision: the commit; None for a model that lies on this host's disk.
        weights_bytes: size of its safetensors files.
        files: the files a job reads, sorted.
        gated: who may have it depends on the token: it is gated or private.
    """

    revision: str | None
    weights_bytes: int
    files: tuple[str, ...]
    gated: bool


def resolve(model: str, revision: str | None, *, token: str | None, settings: Settings) -> Resolved:
    """Pin a model's revision, and check that the token may read it and that it can be loaded without executing code.

    With HF_HUB_OFFLINE=1 only the cache of this host is looked at.

    Raises:
        Problem: 422 unsafe_format, gated_model, unknown-model, unknown-revision, model-too-large or hub-offline;
            503 hub-unreachable with Retry-After.
    """
    if is_local_model(model):
        return _local(model)
    if is_offline_mode():
        return _cached(model, revision, settings)
    with _explained(model, revision):
        info = HfApi(endpoint=settings.hf_endpoint, token=token or False).model_info(
            model, revision=revision, files_metadata=True, timeout=_TIMEOUT
        )
    _remember(model, _is_gated(info), settings)
    resolved = _pin(model, info, settings)
    # The hub lists a gated model's files to everybody: whether this token may read them, only a file says.
    with _explained(model, revision):
        url = hf_hub_url(model, _CONFIG, revision=resolved.revision, endpoint=settings.hf_endpoint)
        get_hf_file_metadata(url, token=token or False, timeout=_TIMEOUT, endpoint=settings.hf_endpoint)
    return resolved


def check_access(model: str, revision: str, *, token: str | None, settings: Settings) -> Resolved:
    """Ask again for a pinned revision before a copy in the cache is used: another tenant's token may have fetched it.

    Raises:
        Problem: as :func:`resolve`.
    """
    return resolve(model, revision, token=token, settings=settings)


def check_texts(sources: Iterable[str], settings: Settings) -> None:
    """Refuse data sets that not everybody may have: who fetched one would share it with all jobs of this host.

    With HF_HUB_OFFLINE=1 there is nobody to ask, and nothing but public ones in the cache.

    Raises:
        Problem: 422 gated_dataset or unknown-dataset, 503 hub-unreachable.
    """
    if is_offline_mode():
        return
    for name in sorted({source[3:].partition(":")[0] for source in sources if source.startswith("hf:")}):
        try:
            with _explained(name, None):
                info = HfApi(endpoint=settings.hf_endpoint, token=False).dataset_info(name, timeout=_TIMEOUT)
            gated = bool(info.gated or info.private)
        except Problem as problem:
            if problem.status != 422:
                raise
            detail = f"The hub shows everybody no data set {name!r}. Use a public one, or a file on this host."
            raise _refusal("unknown-dataset", "/calibration", detail) from None
        if gated:
            detail = f"Data set {name!r} is gated; this service fetches public ones only. Use another, or a file on this host."
            raise _refusal("gated_dataset", "/calibration", detail)


def _pin(model: str, info: ModelInfo, settings: Settings) -> Resolved:
    if not info.sha:
        raise _unreachable("what answers is not a hub")
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    resolved = _resolved(model, info.sha, sizes, gated=_is_gated(info))
    total = sum(sizes[file] for file in resolved.files)
    if total > settings.max_download_bytes:
        allowed = settings.max_download_bytes / GIB
        detail = f"{model!r} is a download of {total / GIB:.1f} GiB; this service fetches at most {allowed:g} GiB."
        raise _refusal("model-too-large", "/model", detail)
    return resolved


def _resolved(model: str, revision: str | None, sizes: Mapping[str, int], *, gated: bool) -> Resolved:
    """Refuse what the library cannot load, or only by executing code from it; ``auto_map`` is for the job to judge."""
    files = tuple(filter_repo_objects(sorted(sizes), allow_patterns=WANTED))
    weights = [file for file in files if file.endswith(".safetensors")]
    if not any("/" not in file for file in weights):
        detail = f"{model!r} has no safetensors weights, and other formats can execute code. Convert them first."
        raise _refusal("unsafe_format", "/model", detail)
    if _CONFIG not in files:
        raise _refusal("unknown-model", "/model", f"{model!r} has no config.json: it is not a Hugging Face model.")
    return Resolved(revision, sum(sizes[file] for file in weights), files, gated)


def _is_gated(info: ModelInfo) -> bool:
    return bool(info.gated or info.private)


def _cached(model: str, revision: str | None, settings: Settings) -> Resolved:
    """What an earlier job fetched; nobody can be asked who may have it."""
    if _marker(model, settings).exists():
        detail = f"{model!r} is gated or private, and this service is offline: it cannot ask whether you may have it."
        raise _refusal("gated_model", "/model", detail)
    cache = settings.hub_dir / "hub"
    try:
        commit = revision or _latest(model, cache)
        folder = Path(snapshot_download(model, revision=commit, cache_dir=cache, local_files_only=True, allow_patterns=WANTED))
    except (CacheNotFound, LocalEntryNotFoundError, HFValidationError):
        what = repr(model) if revision is None else f"{model!r} at {revision!r}"
        detail = f"This service is offline and has not fetched {what} before. Use 'demo', or one that it has."
        raise _refusal("hub-offline", "/model", detail) from None
    return _of_folder(model, folder, folder.name)


def _latest(model: str, cache: Path) -> str | None:
    """The commit that was fetched last: jobs fetch commits, so that the cache knows no branch."""
    repos = [repo for repo in scan_cache_dir(cache).repos if repo.repo_id == model and repo.repo_type == "model"]
    revisions = sorted((revision.last_modified, revision.commit_hash) for repo in repos for revision in repo.revisions)
    return revisions[-1][1] if revisions else None


def _local(model: str) -> Resolved:
    folder = Path(str(resources.files("llmprune"))) / "demo_model" if model == BUNDLED_MODEL else Path(model)
    return _of_folder(model, folder, None)


def _of_folder(model: str, folder: Path, revision: str | None) -> Resolved:
    try:
        sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    except OSError:
        raise _refusal("unknown-model", "/model", "The directory of this model cannot be read.") from None
    return _resolved(model, revision, sizes, gated=False)


def _remember(model: str, gated: bool, settings: Settings) -> None:
    """Mark what the cache must not give away while the hub cannot be asked."""
    marker = _marker(model, settings)
    if gated:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    else:
        marker.unlink(missing_ok=True)


def _marker(model: str, settings: Settings) -> Path:
    return settings.hub_dir / "gated" / model.replace("/", "--")


@contextmanager
def _explained(model: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into problems that name the remedy."""
    try:
        yield
    except GatedRepoError:
        raise _gated(model) from None
    except RevisionNotFoundError:
        detail = f"{model!r} has no revision {revision!r}. Use one of its branches, tags or commits."
        raise _refusal("unknown-revision", "/revision", detail) from None
    except (RepositoryNotFoundError, HFValidationError):
        detail = f"The hub has no model {model!r}, or shows it only to tokens that this service was not given for you."
        raise _refusal("unknown-model", "/model", detail) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise _gated(model) from None
        if status < 500 and status not in (408, 429):
            raise _refusal("unknown-model", "/model", f"The hub does not serve {model!r} (status {status}).") from None
        raise _unreachable(f"status {status}") from None
    except (HTTPError, OSError) as error:
        raise _unreachable(type(error).__name__) from None
    except (ValueError, TypeError, KeyError):
        raise _unreachable("what answers is not a hub") from None


def _gated(model: str) -> Problem:
    detail = f"{model!r} is gated: accept its licence on the hub, and have a hub token of yours given to this service."
    return _refusal("gated_model", "/model", detail)


def _unreachable(why: str) -> Problem:
    detail = f"The hub does not answer ({why}). Try again later, or use a model on this host."
    return Problem(503, "hub-unreachable", detail, headers={"Retry-After": "30"})


def _refusal(code: str, pointer: str, detail: str) -> Problem:
    return Problem(422, code, detail, errors=[{"pointer": pointer, "detail": detail}])
