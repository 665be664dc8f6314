"""What requests may not ask for, and that all of it is said at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprune_service import policy
from llmprune_service.problems import Problem
from llmprune_service.schemas import JobRequest
from llmprune_service.settings import Settings

HOOK = "https://example.com/hook"
ACCEPTED: list[dict[str, Any]] = [
    {},
    {"model": "demo", "calibration": "stdlib", "eval": ["stdlib", "c4", "wikitext2", "ptb"]},
    {"model": "gpt2", "revision": "refs/pr/1", "device": "cuda", "method": "sparsegpt", "pattern": "2:4"},
    {"model": "HuggingFaceTB/SmolLM2-135M", "revision": "a" * 40, "calibration": "synthetic"},
    {"calibration": "hf:org/name:config:train[:1000]:text", "eval": ["hf:name::validation"]},
    {"skip": ["*" * 200] * 64, "timeout_s": 60, "webhook": {"url": HOOK}, "metadata": {"team": "größe ✓"}},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    *[({"model": model}, "/model") for model in (
        "", ".", "..", "../../etc", "./model", "~/model", "~", "/etc", "/", "a/b/c", "a/../b", "a..b", "a--b/c", "-a/b", "a/-b",
        "org/", "/org", "org//name", "a b", "a\\b", "http://hub/a", "модель/a", "a" * 97, "name\n", "a/b?x", "a%2Fb",
    )],
    *[({"revision": revision}, "/revision") for revision in (
        "", "a..b", "../x", "a b", "a" * 129, "a:b", "main\n", "/etc/passwd", "-x", "é",
    )],
    *[({"calibration": text}, "/calibration") for text in (
        "", "c5", "/etc/passwd", "text.txt", "./text.txt", "~/text.txt", "hf:", "hf:/etc", "hf:./x", "hf:../x", "hf:~/x",
        "hf:org/name/more", "hf:a:b:c:d:e", "hf:a:../x", "https://example.com/text", "file:///etc/passwd",
    )],
    ({"eval": ["stdlib", "synthetic"]}, "/eval/1"),
    ({"eval": ["c4", "c4", "/etc"]}, "/eval/2"),
    ({"eval": ["stdlib"] * 17}, "/eval"),
    *[({"device": device}, "/device") for device in ("cuda:1", "meta", "", "CUDA", "cpu\n")],
    ({"trust_remote_code": True}, "/trust_remote_code"),
    ({"method": "wonda"}, "/method"),
    ({"tasks": ["piqa"], "tasks_path": "/tasks"}, "/tasks_path"),
    ({"tasks": [f"task{number}" for number in range(17)]}, "/tasks"),
    ({"prompt": ["a"] * 17}, "/prompt"),
    ({"prompt": ["a\nb"]}, "/prompt/0"),
    ({"method": "sparsegpt", "refine": "icbs"}, "/method"),
    ({"num_samples": 2**16, "seq_len": 2**11}, "/num_samples"),
    ({"num_samples": 2**16}, "/num_samples"),
    ({"num_samples": 10**4000, "seq_len": 10**4000}, "/num_samples"),
    ({"timeout_s": 8 * 86400}, "/timeout_s"),
    ({"skip": ["*"] * 65}, "/skip"),
    ({"skip": ["*", "a" * 201]}, "/skip/1"),
    ({"skip": ["*\x00"]}, "/skip/0"),
    ({"metadata": {"team": "a\x1b[31m"}}, "/metadata/team"),
    ({"metadata": {"team": "a\u2028b"}}, "/metadata/team"),
    ({"model": "org/name\x00"}, "/model"),
    ({"model": "/" + "a" * 60000}, "/model"),
    *[({"webhook": {"url": url}}, "/webhook/url") for url in (
        "", "http://example.com", "https://user@example.com/", "https://example.com/#x", "https://example.com:22/",
        "https://127.0.0.1/", "https://localhost/", "https://example.com/\r\nX: y",
    )],
]  # fmt: skip


def refusal(settings: Settings, **fields: Any) -> dict[str, str]:
    """Pointer and detail of each error of a request that is refused."""
    with pytest.raises(Problem) as raised:
        policy.check(JobRequest(**fields), settings)
    problem = raised.value
    assert (problem.status, problem.code) == (422, "policy")
    return {error["pointer"]: error["detail"] for error in problem.errors}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Without any root for local paths."""
    return Settings(data_dir=tmp_path / "data")


@pytest.fixture
def rooted(tmp_path: Path) -> Settings:
    """With a root that holds a model, a text, and links inside and outside."""
    root, outside = tmp_path / "root", tmp_path / "root-outside"
    for folder in (root / "org" / "model", outside / "model"):
        folder.mkdir(parents=True)
    (root / "text.txt").write_text("text")
    (root / "inside").symlink_to(root / "org")
    (root / "escape").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    (tmp_path / "alias").symlink_to(root)
    return Settings(data_dir=tmp_path / "data", model_roots=(tmp_path / "alias",))


@pytest.mark.parametrize("fields", ACCEPTED, ids=str)
def test_what_the_service_does(settings: Settings, fields: dict[str, Any]) -> None:
    """Passes."""
    policy.check(JobRequest(**fields), settings)


@pytest.mark.parametrize(("fields", "pointer"), REFUSED, ids=lambda value: str(value)[:80].encode("unicode_escape").decode())
def test_what_it_does_not(settings: Settings, fields: dict[str, Any], pointer: str) -> None:
    """Is refused, naming that field alone and a remedy."""
    errors = refusal(settings, **fields)
    assert list(errors) == [pointer]
    assert errors[pointer].endswith(".")
    assert errors[pointer][0].isupper() or pointer in ("/method", "/num_samples")


def test_all_fields_are_named_at_once(settings: Settings) -> None:
    """Nobody has to find the errors one by one."""
    fields = {"model": "../x", "device": "cuda:0", "trust_remote_code": True, "timeout_s": 10**9, "skip": ["\n"], "eval": ["x"]}
    assert sorted(refusal(settings, **fields)) == [
        "/device",
        "/eval/0",
        "/model",
        "/skip/0",
        "/timeout_s",
        "/trust_remote_code",
    ]


def test_paths_under_a_root(rooted: Settings, tmp_path: Path) -> None:
    """Are accepted, through links too as long as they stay inside."""
    root = tmp_path / "root"
    for model in (root / "org" / "model", root / "inside" / "model", tmp_path / "alias" / "org" / "model", root):
        policy.check(JobRequest(model=str(model), calibration=str(root / "text.txt"), eval=(str(root),)), rooted)


@pytest.mark.parametrize(
    "path", ["escape/model", "escape", "../root-outside/model", "org/../../root-outside", "loop", "none", "a\x00b"]
)
def test_paths_out_of_a_root(rooted: Settings, tmp_path: Path, path: str) -> None:
    """Are refused in the same words whether they exist or not."""
    missing = refusal(rooted, model="/does/not/exist", calibration="/does/not/exist")
    found = refusal(rooted, model=f"{tmp_path}/root/{path}", calibration=f"{tmp_path}/root/{path}")
    if "\x00" not in path:
        assert found == missing
    assert list(found) == ["/model", "/calibration"] and str(tmp_path) not in str(found)


def test_a_file_is_no_model(rooted: Settings, tmp_path: Path) -> None:
    """A model is a directory."""
    assert list(refusal(rooted, model=str(tmp_path / "root" / "text.txt"))) == ["/model"]


def test_directories_of_the_server_are_not_seen(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative name is a hub id even where the server's current directory has one of that name."""
    (tmp_path / "models" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    policy.check(JobRequest(model="models/x", calibration="hf:models/x"), settings)
    assert not policy.is_local_model("models/x") and policy.is_hub_text("hf:models/x")
    assert list(refusal(settings, model="./models", calibration="models/x")) == ["/model", "/calibration"]


@given(name=st.text(alphabet=st.sampled_from("aA0._-/~\\: \n\x00é"), max_size=12))
def test_no_accepted_name_leads_anywhere(name: str) -> None:
    """Whatever is accepted without roots is a name of at most two parts, and neither a path nor a URL."""
    settings = Settings(data_dir=Path("/nonexistent"))
    fields = {"model": name, "revision": name, "calibration": f"hf:{name}"}
    refused = set()
    try:
        policy.check(JobRequest(**fields), settings)
    except Problem as problem:
        refused = {error["pointer"] for error in problem.errors}
    if "/model" not in refused:
        assert not {"..", "--"} & {name[i : i + 2] for i in range(len(name))}
        assert name[0].isalnum() and name.count("/") <= 1 and name.isascii() and name.isprintable()
    if "/revision" not in refused:
        assert not name.startswith(("/", "-", ".")) and ".." not in name and name.isascii() and name.isprintable()
    if "/calibration" not in refused:
        assert name[0].isalnum() and ".." not in name.partition(":")[0] and name.isprintable()


def test_texts_of_the_hub() -> None:
    """Jobs with them have something to fetch."""
    found = {text for text in ("c4", "wikitext2", "ptb", "stdlib", "synthetic", "hf:a", "/hf:a") if policy.is_hub_text(text)}
    assert found == {"c4", "wikitext2", "ptb", "hf:a"}
