"""What a request may ask of this host. Knows nothing of HTTP: the worker checks jobs from the database in the same way."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from llmprune.errors import ConfigError, TextError
from llmprune.io.text import NAMES
from llmprune.io.text_hub import HubSource
from llmprune.methods import method_of
from llmprune.spec import BUNDLED_MODEL, MAX_DEFAULT_SEQ_LEN
from llmprune.sweep_spec import AXES, FIELD_OF
from llmprune_service import net
from llmprune_service.problems import Problem
from llmprune_service.schemas import AutoRequest, JobRequest, ServiceFields, SweepRequest
from llmprune_service.settings import Settings

DEVICES = ("auto", "cpu", "cuda", "mps")
_MAX_STRING = 4096
_MAX_TEXTS = 16
_MAX_GLOBS = 64
_MAX_PROMPTS = 16
_MAX_TASKS = 16
_MAX_GLOB = 200
_HUB_TEXTS = ("c4", "wikitext2", "ptb")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
# No leading slash: offline, the hub's library joins a branch's name to the path of its cache.
_REVISION = re.compile(r"\w[\w./-]{0,127}", re.ASCII)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_PATHS = "an existing path under LLMPRUNE_MODEL_ROOTS"


def check(request: JobRequest, settings: Settings) -> None:
    """Raise Problem 422 with an entry for each field that asks for what this service does not do."""
    found: dict[str, str] = {}
    for pointer, detail in (
        *_strings(request),
        *_model(request, settings),
        *_texts(request, settings),
        *_limits(request, settings),
    ):
        found.setdefault(pointer, detail)
    if found:
        raise refusal(found)


def check_all(request: SweepRequest | AutoRequest, jobs: Iterable[JobRequest], settings: Settings) -> None:
    """As :func:`check` for each job of a request, with all that is wrong with any of them, pointing into the request."""
    found: dict[str, str] = {}
    for job in jobs:
        try:
            check(job, settings)
        except Problem as problem:
            for error in problem.errors:
                found.setdefault(pointer_into(request, error["pointer"]), error["detail"])
    if found:
        raise refusal(found)


def check_auto(request: AutoRequest, settings: Settings) -> None:
    """Raise Problem 422 for a search that tries what this service does not do, or too many kinds of jobs."""
    if request.base.effort is not None:
        raise refusal({"/base/effort": "A search tries methods itself: give the fields that an effort sets, or none."})
    kinds = math.prod(map(len, request.axes().values()))
    if kinds > settings.max_sweep_points:
        detail = f"At most {settings.max_sweep_points} combinations of methods, patterns and allocations, got {kinds}."
        raise refusal({"/methods": detail})
    check_all(request, request.jobs(), settings)


def pointer_into(request: SweepRequest | AutoRequest, pointer: str) -> str:
    """Where a field of a job comes from: an axis, the submission's own fields, or the base."""
    field = pointer.split("/")[1]
    axis = next((axis for axis in AXES if FIELD_OF[axis] == field and getattr(request, axis, None)), None)
    if axis is not None:
        return f"/{axis}"
    return pointer if field in ServiceFields.model_fields else f"/base{pointer}"


def refusal(found: Mapping[str, str]) -> Problem:
    """The answer to a request that is wrong at these pointers, by what is wrong there."""
    errors = [{"pointer": pointer, "detail": detail} for pointer, detail in found.items()]
    return Problem(422, "policy", f"This service does not accept {', '.join(found)}; errors say what it does.", errors=errors)


def is_hub_text(source: str) -> bool:
    """Whether a calibration or evaluation text comes from the hub."""
    return source in _HUB_TEXTS or source.startswith("hf:")


def is_local_model(model: str) -> bool:
    """Whether a model is on this host's disk: the bundled one, or a path."""
    return model == BUNDLED_MODEL or model.startswith("/")


def _strings(request: JobRequest) -> Iterator[tuple[str, str]]:
    for pointer, text in _walk(request.model_dump(), ""):
        if _CONTROL.search(text):
            yield pointer, "Control characters are not accepted."
        elif len(text) > _MAX_STRING:
            yield pointer, f"At most {_MAX_STRING} characters, got {len(text)}."


def _walk(value: Any, pointer: str) -> Iterator[tuple[str, str]]:
    """Every string of a request, with its JSON pointer."""
    if isinstance(value, str):
        yield pointer, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, f"{pointer}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _walk(item, f"{pointer}/{index}")


def _model(request: JobRequest, settings: Settings) -> Iterator[tuple[str, str]]:
    # A relative name is a hub id, whatever lies in some current directory; so jobs run in a directory without subdirectories
    # of the client's naming, as the library itself would take "models/x" for a directory where there is one.
    model = request.model
    if model.startswith("/"):
        allowed = _is_under_roots(model, settings, os.path.isdir)
    else:
        allowed = model == BUNDLED_MODEL or _is_hub_id(model)
    if not allowed:
        yield "/model", f"Use {BUNDLED_MODEL!r}, a hub ID such as HuggingFaceTB/SmolLM2-135M, or {_PATHS}."
    if request.revision is not None and (not _REVISION.fullmatch(request.revision) or ".." in request.revision):
        yield "/revision", "Use a branch, tag or commit: at most 128 letters, digits and . _ / -, without '..'."
    if request.trust_remote_code:
        yield "/trust_remote_code", "Code that comes with a model is never run here. Leave it out, or prune that model locally."
    try:
        method_of(request)
    except ConfigError as error:
        yield "/method", str(error)
    if request.device not in DEVICES:
        yield "/device", f"Use one of {', '.join(DEVICES)}; which card it is, the worker decides."


def _texts(request: JobRequest, settings: Settings) -> Iterator[tuple[str, str]]:
    if request.calibration is not None:
        yield from _text(request.calibration, "/calibration", NAMES, settings)
    texts = request.eval or ()
    if len(texts) > _MAX_TEXTS:
        yield "/eval", f"At most {_MAX_TEXTS} texts, got {len(texts)}."
    names = tuple(name for name in NAMES if name != "synthetic")  # the model's own text cannot evaluate it
    for index, text in enumerate(texts[:_MAX_TEXTS]):
        yield from _text(text, f"/eval/{index}", names, settings)


def _text(source: str, pointer: str, names: tuple[str, ...], settings: Settings) -> Iterator[tuple[str, str]]:
    allowed = source in names or _is_dataset(source) or _is_under_roots(source, settings, os.path.exists)
    if not allowed:
        yield pointer, f"Use {', '.join(names)}, hf:NAME[:CONFIG][:SPLIT][:COLUMN] of the hub, or {_PATHS}."


def _limits(request: JobRequest, settings: Settings) -> Iterator[tuple[str, str]]:
    if request.num_samples * (request.seq_len or MAX_DEFAULT_SEQ_LEN) > settings.max_calibration_tokens:
        yield "/num_samples", f"num_samples * seq_len is at most {settings.max_calibration_tokens} here. Lower one of them."
    if request.timeout_s is not None and request.timeout_s > settings.max_timeout_s:
        yield "/timeout_s", f"At most {settings.max_timeout_s} seconds."
    if len(request.skip) > _MAX_GLOBS:
        yield "/skip", f"At most {_MAX_GLOBS} globs, got {len(request.skip)}."
    if request.tasks_path is not None:
        yield "/tasks_path", "Tasks may bring code, and none of a client's runs here. Name tasks of lm-evaluation-harness."
    if len(request.tasks) > _MAX_TASKS:
        yield "/tasks", f"At most {_MAX_TASKS} tasks, got {len(request.tasks)}."
    if len(request.prompt or ()) > _MAX_PROMPTS:
        yield "/prompt", f"At most {_MAX_PROMPTS} prompts, got {len(request.prompt or ())}."
    for index, glob in enumerate(request.skip[:_MAX_GLOBS]):
        if len(glob) > _MAX_GLOB:
            yield f"/skip/{index}", f"At most {_MAX_GLOB} characters, got {len(glob)}."
    if request.webhook is not None:
        try:
            net.check_url(request.webhook.url, settings)
        except net.Refused as refusal:
            yield "/webhook/url", str(refusal)


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and ".." not in name and "--" not in name


def _is_dataset(source: str) -> bool:
    """Of the hub, never a local directory; its name is judged before the library looks whether it is one."""
    if not source.startswith("hf:") or not _is_hub_id(source[3:].partition(":")[0]):
        return False
    try:
        config = HubSource.parse(source).config
    except TextError:
        return False
    return not set(config) & set("/\\")


def _is_under_roots(path: str, settings: Settings, exists: Callable[[str], bool]) -> bool:
    """What is not there and what lies outside answer the same, so that nothing can be probed."""
    if not path.startswith("/") or _CONTROL.search(path):
        return False
    real = os.path.realpath(path)
    roots = [os.path.realpath(root) for root in settings.model_roots]
    return any(os.path.commonpath((real, root)) == root for root in roots) and exists(real)
