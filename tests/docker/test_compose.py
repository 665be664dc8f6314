"""compose.yaml and compose.gpu.yaml: they fit the Dockerfile and the settings, and give no container more than it needs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from dockerfile import ROOT, TARGETS, read

from llmprune_service.settings import Settings

DOCKERFILE = read()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
GPU: dict[str, Any] = yaml.safe_load((ROOT / "compose.gpu.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCS = (ROOT / "docs" / "docker.md").read_text()
SETTINGS = {f"LLMPRUNE_{name.upper()}" for name in Settings.model_fields}


def _seconds(duration: str) -> float:
    return float(duration[:-1]) * {"s": 1, "m": 60, "h": 3600}[duration[-1]]


def _default(value: str) -> str:
    """A value as it is where the environment says nothing."""
    return re.sub(r"\$\{\w+:-([^}]+)\}", r"\1", value)


def _has_healthcheck(service: dict[str, Any]) -> bool:
    built = "build" in service and DOCKERFILE.last(service["build"]["target"], "HEALTHCHECK").rest != "NONE"
    return built or "test" in service.get("healthcheck", {})


def test_the_services_are_database_web_and_worker() -> None:
    """Both targets are built, each for the service of its name."""
    assert SERVICES.keys() == {"db", "web", "worker"}
    assert tuple(SERVICES[name]["build"]["target"] for name in TARGETS) == TARGETS


def test_build_arguments_are_those_of_the_dockerfile() -> None:
    """Each is declared there, has its default, and reaches the stage of the target."""
    declared = DOCKERFILE.arguments | dict(
        step.rest.split("=") for step in DOCKERFILE.chain("worker-packages") if step.keyword == "ARG"
    )
    assert _default(SERVICES["web"]["build"]["args"]["PYTHON_IMAGE"]) == declared["PYTHON_IMAGE"]
    arguments = SERVICES["worker"]["build"]["args"]
    assert {name: _default(value) for name, value in arguments.items()} == declared


def test_the_gpu_file_only_adds_to_the_worker() -> None:
    """The CUDA build under a name of its own, and every GPU."""
    assert GPU.keys() == {"services"}
    assert GPU["services"].keys() == {"worker"}
    worker = GPU["services"]["worker"]
    assert worker["build"] == {"args": {"TORCH": "gpu"}}
    assert worker["image"] != SERVICES["worker"]["image"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "deploy" not in SERVICES["worker"]


def test_volumes_are_declared_and_used() -> None:
    """The data of web and worker is one volume, that of PostgreSQL another; nothing of the host is mounted."""
    used = {name: [volume.split(":") for volume in service["volumes"]] for name, service in SERVICES.items()}
    assert used["web"] == used["worker"] == [["data", "/data"]]
    assert {source for volumes in used.values() for source, _ in volumes} == COMPOSE["volumes"].keys()


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_watched_and_waits_for_healthy_ones(name: str) -> None:
    """By its own healthcheck or its image's; what it depends on exists and has one too."""
    service = SERVICES[name]
    assert _has_healthcheck(service)
    for other, how in service.get("depends_on", {}).items():
        assert how == {"condition": "service_healthy"}
        assert _has_healthcheck(SERVICES[other])


def test_both_wait_for_the_database_only() -> None:
    """Whichever comes first migrates it, and either can be restarted without the other."""
    assert SERVICES["web"]["depends_on"].keys() == SERVICES["worker"]["depends_on"].keys() == {"db"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_has_no_privileges(name: str) -> None:
    """Read-only root, no capability, no way to more, nothing shared with the host, and back after a crash."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert "/tmp" in service["tmpfs"]
    assert not service.keys() & {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc", "userns_mode"}
    assert _seconds(service["stop_grace_period"]) >= 30


def test_only_web_is_reachable_and_from_this_host_only() -> None:
    """The database has no port outside its network."""
    assert SERVICES["web"]["ports"] == ["127.0.0.1:8000:8000"]
    assert not any("ports" in service for name, service in SERVICES.items() if name != "web")
    assert DOCKERFILE.last("web", "EXPOSE").rest == "8000"


def test_the_worker_has_time_to_finish_its_block() -> None:
    """Docker kills later than the worker itself gives up waiting."""
    default = Settings.model_fields["drain_seconds"].default
    assert _seconds(SERVICES["worker"]["stop_grace_period"]) >= 2 * default


def test_passwords_come_from_outside() -> None:
    """Without POSTGRES_PASSWORD nothing starts, and no other value is a secret."""
    text = (ROOT / "compose.yaml").read_text()
    assert len(re.findall(r"\$\{POSTGRES_PASSWORD:\?[^}]+\}", text)) == 2
    values = {key: value for service in SERVICES.values() for key, value in service["environment"].items()}
    for key, value in values.items():
        assert "${POSTGRES_PASSWORD:?" in value or not re.search("PASSWORD|TOKEN|KEY|SECRET|URL", key), key


def test_every_setting_named_is_one_of_the_service() -> None:
    """In the compose files and in the guide."""
    named = set(re.findall(r"\bLLMPRUNE_[A-Z_]+\b", (ROOT / "compose.yaml").read_text() + DOCS))
    assert "LLMPRUNE_DATABASE_URL" in named
    assert named <= SETTINGS


def test_images_have_a_version() -> None:
    """None is whatever is newest."""
    for service in (*SERVICES.values(), GPU["services"]["worker"]):
        name, _, tag = _default(service["image"]).partition(":")
        assert name and tag not in ("", "latest")


WORDS = ["TORCH", "POSTGRES_PASSWORD", "POSTGRES_IMAGE", "compose.gpu.yaml", "llmprune.env", "admin.key", "10001"]


@pytest.mark.parametrize("word", [*WORDS, *DOCKERFILE.arguments, *(f"--target {target}" for target in TARGETS)])
def test_the_guide_explains(word: str) -> None:
    """Every argument, file and number a user has to know."""
    assert word in DOCS
