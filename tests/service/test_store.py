"""The artifact store: one directory of this host, or any store fsspec knows by URL."""

from __future__ import annotations

import hashlib
from pathlib import Path
from uuid import uuid4

import pytest

from llmprune_service.settings import Settings
from llmprune_service.store import Store, link_or_copy, size_of

JOB = {"tenant": "acme", "job_id": "job_1"}


@pytest.fixture(params=["directory", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store in a directory, and one of objects."""
    url = None if request.param == "directory" else f"memory://{uuid4().hex}"
    return Store(Settings(data_dir=tmp_path / "data", store_url=url))


@pytest.fixture
def checkpoint(tmp_path: Path) -> dict[str, bytes]:
    """Three files on disk."""
    files = {"model.safetensors": bytes(range(256)) * 100, "config.json": b"{}", "report.html": b"<p>"}
    (tmp_path / "checkpoint").mkdir()
    for name, content in files.items():
        (tmp_path / "checkpoint" / name).write_bytes(content)
    return files


def _digests(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def test_what_is_put_can_be_opened_at_any_offset(store: Store, checkpoint: dict[str, bytes], tmp_path: Path) -> None:
    """Names, sizes, digests and media types are those of the files."""
    artifacts = store.put(tmp_path / "checkpoint", _digests(checkpoint), attempt=2, **JOB)
    assert {artifact.name: artifact.bytes for artifact in artifacts} == {name: len(data) for name, data in checkpoint.items()}
    for artifact in artifacts:
        with store.open(artifact.path) as file:
            file.seek(1)
            assert file.read() == checkpoint[artifact.name][1:]
    assert {artifact.media_type for artifact in artifacts} == {"application/octet-stream", "application/json", "text/html"}
    assert store.size("acme", "job_1") == sum(map(len, checkpoint.values()))


def test_attempts_do_not_touch_each_other(store: Store, checkpoint: dict[str, bytes], tmp_path: Path) -> None:
    """A worker thought dead may still write: under its own number."""
    folder = tmp_path / "checkpoint"
    first = store.put(folder, _digests(checkpoint), attempt=1, **JOB)
    (folder / "report.html").unlink()  # links share their content: what another attempt writes is a new file
    (folder / "report.html").write_bytes(b"<p>other")
    store.put(folder, _digests(checkpoint), attempt=2, **JOB)
    for artifact in first:
        with store.open(artifact.path) as file:
            assert file.read() == checkpoint[artifact.name]


def test_a_deleted_job_is_gone_and_its_neighbour_stays(store: Store, checkpoint: dict[str, bytes], tmp_path: Path) -> None:
    """Deleting twice is deleting once."""
    gone = store.put(tmp_path / "checkpoint", _digests(checkpoint), attempt=1, **JOB)
    kept = store.put(tmp_path / "checkpoint", _digests(checkpoint), attempt=1, tenant="acme", job_id="job_2")
    store.delete("acme", "job_1")
    store.delete("acme", "job_1")
    with pytest.raises(FileNotFoundError):
        store.open(gone[0].path)
    with store.open(kept[0].path) as file:
        assert file.read()


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", ""])
def test_paths_stay_inside(store: Store, path: str) -> None:
    """Whatever a row of the database says."""
    with pytest.raises(ValueError, match="no path in the store"):
        store.open(path)


def test_only_a_store_of_files_has_local_paths(store: Store, checkpoint: dict[str, bytes], tmp_path: Path) -> None:
    """The web process sends files from disk where it can."""
    artifact = store.put(tmp_path / "checkpoint", _digests(checkpoint), attempt=1, **JOB)[0]
    path = store.local_path(artifact.path)
    assert (path is not None) is store.is_local
    assert path is None or path.read_bytes() == checkpoint[artifact.name]


def test_whole_records_of_a_journal_move_to_another_host(tmp_path: Path) -> None:
    """A record whose files were deleted while it was copied does not count, unless a later one is there."""
    store = Store(Settings(data_dir=tmp_path / "data", store_url=f"memory://{uuid4().hex}"))
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (here / "run.json").write_text("{}")
    for block in range(3):
        record = here / f"block-{block:05d}"
        record.mkdir()
        for name in ("weights.safetensors", "hidden-00000.safetensors"):
            (record / name).write_text(f"{name} {block}")
        (record / "record.json").write_text('{"sha256": {"weights.safetensors": "", "hidden-00000.safetensors": ""}}')
    journal = {**JOB, "generation": 1}
    assert store.push_record(here / "run.json", **journal)
    (here / "block-00002" / "hidden-00000.safetensors").unlink()  # the next block is there: it is needed no more
    pushed = [store.push_record(record, whole=True, **journal) for record in sorted(here.glob("block-*"))]
    assert pushed == [True, True, False]
    store.drop_from_record("block-00000", "hidden-*", **journal)

    store.pull_journal(there, **journal)
    found = sorted(str(file.relative_to(there)) for file in there.rglob("*") if file.is_file())
    assert found == [
        "block-00000/record.json", "block-00000/weights.safetensors", "block-00001/hidden-00000.safetensors",
        "block-00001/record.json", "block-00001/weights.safetensors", "run.json",
    ]  # fmt: skip
    assert (there / "block-00001" / "weights.safetensors").read_text() == "weights.safetensors 1"
    assert store.push_record(here / "block-00002", **journal)
    store.pull_journal(there, **journal)
    assert sorted(file.name for file in (there / "block-00002").iterdir()) == ["record.json", "weights.safetensors"]
    store.pull_journal(tmp_path / "other", **JOB, generation=2)
    assert not (tmp_path / "other").exists()


def test_a_link_where_there_can_be_one(tmp_path: Path) -> None:
    """Moving a checkpoint into a store on the same file system costs no space."""
    (tmp_path / "a").write_bytes(b"x" * 1000)
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").stat().st_ino == (tmp_path / "b").stat().st_ino
    assert size_of(tmp_path) == 2000
