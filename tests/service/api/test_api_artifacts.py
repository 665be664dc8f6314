"""Downloads: the right bytes of the right file, whole or in part, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import tracemalloc
from collections.abc import Callable

import pytest
from api_server import Server, Service, problem

CONTENT = bytes(range(256)) * 4096 + b"tail"  # more than a chunk
DIGEST = hashlib.sha256(CONTENT).hexdigest()
ETAG = f'"{DIGEST}"'


@pytest.fixture
def path(service: Service) -> str:
    """The address of a finished job's weights."""
    job_id = service.submit()
    service.succeed(job_id, {"model.safetensors": CONTENT, "config.json": b"{}", "report.html": b"<script>1</script>"})
    return f"/v1/jobs/{job_id}/artifacts/model.safetensors"


def test_files_are_listed_with_their_digests(service: Service, path: str) -> None:
    """Before there are any the list is empty."""
    page = service.get(path.rpartition("/")[0]).json()
    assert [entry["name"] for entry in page["data"]] == ["config.json", "model.safetensors", "report.html"]
    weights = page["data"][1]
    assert (weights["bytes"], weights["sha256"], weights["url"]) == (len(CONTENT), DIGEST, path)
    assert service.get(f"/v1/jobs/{service.submit()}/artifacts").json()["data"] == []


def test_a_whole_file(service: Service, path: str) -> None:
    """Its bytes, with a strong ETag and a digest of the representation, as a download."""
    answer = service.get(path)
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert answer.headers["etag"] == ETAG
    assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()}:"
    assert answer.headers["content-length"] == str(len(CONTENT))
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("range", "first", "past"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=1048570-1048580", 1048570, 1048580),
        ("bytes=1048570-", 1048570, len(CONTENT)),
        ("bytes=-4", len(CONTENT) - 4, len(CONTENT)),
        ("bytes=-99999999", 0, len(CONTENT)),
        ("bytes=5-99999999", 5, len(CONTENT)),
        ("Bytes = 5-6", 5, 7),
    ],
)
def test_a_range(service: Service, path: str, range: str, first: int, past: int) -> None:
    """206 with exactly those bytes."""
    answer = service.get(path, headers={"Range": range})
    assert (answer.status_code, answer.content) == (206, CONTENT[first:past])
    assert answer.headers["content-range"] == f"bytes {first}-{past - 1}/{len(CONTENT)}"
    assert answer.headers["content-length"] == str(past - first)


@pytest.mark.parametrize("range", ["bytes=9-5", "bytes=-", "bytes=a-b", "lines=1-2", "bytes=0-1,5-6", "bytes"])
def test_a_range_that_makes_no_sense_is_ignored(service: Service, path: str, range: str) -> None:
    """All of it is sent, as without."""
    answer = service.get(path, headers={"Range": range})
    assert (answer.status_code, answer.content) == (200, CONTENT)


@pytest.mark.parametrize("range", [f"bytes={len(CONTENT)}-", "bytes=99999999-999999999", "bytes=-0"])
def test_a_range_behind_the_end(service: Service, path: str, range: str) -> None:
    """416 with the size."""
    answer = service.get(path, headers={"Range": range})
    problem(answer, 416, "range")
    assert answer.headers["content-range"] == f"bytes */{len(CONTENT)}"


@pytest.mark.parametrize(("if_range", "status"), [(ETAG, 206), ('"another"', 200), ("Sat, 21 Nov 2026 00:00:00 GMT", 200)])
def test_a_part_is_sent_only_of_the_same_file(service: Service, path: str, if_range: str, status: int) -> None:
    """If-Range: else all of the new one."""
    answer = service.get(path, headers={"Range": "bytes=100-", "If-Range": if_range})
    assert answer.status_code == status
    assert answer.content == (CONTENT[100:] if status == 206 else CONTENT)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_file_one_has_is_not_sent_again(service: Service, path: str, method: str) -> None:
    """If-None-Match, which wins over Range."""
    answer = service.request(method, path, headers={"If-None-Match": ETAG, "Range": "bytes=0-1"})
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", ETAG)


def test_head_says_what_get_would(service: Service, path: str) -> None:
    """All headers, no body."""
    head, get = service.request("HEAD", path), service.get(path)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-length", "etag", "repr-digest", "accept-ranges", "content-disposition", "content-type"):
        assert head.headers[name] == get.headers[name], name


@pytest.mark.parametrize(
    "name", ["missing", "../../admin.key", "..%2f..%2fadmin.key", "%2e%2e/%2e%2e/admin.key", "/etc/passwd", "%00", "a%0d%0ab"]
)
def test_only_names_of_the_list_are_files(service: Service, path: str, name: str) -> None:
    """Whatever a name looks like, it is only looked up."""
    answer = service.get(f"{path.rpartition('/')[0]}/{name}")
    assert answer.status_code == 404
    assert service.settings.key_file.read_text().strip() not in answer.text


def test_a_file_that_somebody_removed_is_not_found(service: Service, path: str) -> None:
    """404, not a broken answer, and no path."""
    _, _, _, job_id, _, name = path.split("/")
    (service.settings.data_dir / "artifacts" / "default" / job_id / "1" / name).unlink()
    assert str(service.settings.data_dir) not in problem(service.get(path), 404)["detail"]


def test_the_report_page_is_sandboxed(service: Service, path: str) -> None:
    """Its own script runs, without an origin and without a network; as an artifact it is a download."""
    job = path.split("/artifacts/")[0]
    page = service.get(f"{job}/report.html")
    assert (page.status_code, page.text) == (200, "<script>1</script>")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts allow-downloads; default-src 'none';")
    assert "allow-same-origin" not in policy and "connect-src" not in policy
    artifact = service.get(f"{job}/artifacts/report.html")
    assert artifact.headers["content-disposition"].startswith("attachment")
    assert "unsafe-inline" not in artifact.headers["content-security-policy"]


def test_a_name_with_strange_characters_is_quoted(service: Service) -> None:
    """In the header of the download and in the list."""
    job_id = service.submit()
    service.succeed(job_id, {'größe "1".txt': b"x"})
    entry = service.get(f"/v1/jobs/{job_id}/artifacts").json()["data"][0]
    answer = service.get(entry["url"])
    assert answer.content == b"x"
    assert answer.headers["content-disposition"] == "attachment; filename*=utf-8''gr%C3%B6%C3%9Fe%20%221%22.txt"


def test_a_broken_download_goes_on_and_memory_stays_flat(make_server: Callable[..., Server]) -> None:
    """64 MiB over a connection that is closed half way: a few chunks are held at a time."""
    server = make_server()
    content = hashlib.sha256(b"seed").digest() * (2 << 20)
    job_id = server.submit()
    server.succeed(job_id, {"model.safetensors": content})
    path = f"/v1/jobs/{job_id}/artifacts/model.safetensors"
    digest, received = hashlib.sha256(), 0
    tracemalloc.start()
    with server.client.stream("GET", path) as response:
        for chunk in response.iter_raw(1 << 16):
            digest.update(chunk)
            received += len(chunk)
            if received > len(content) // 2:
                break
    headers = {"Range": f"bytes={received}-", "If-Range": response.headers["etag"]}
    with server.client.stream("GET", path, headers=headers) as response:
        assert response.status_code == 206
        for chunk in response.iter_raw(1 << 16):
            digest.update(chunk)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f'"{digest.hexdigest()}"' == response.headers["etag"]
    assert peak < 16 << 20
