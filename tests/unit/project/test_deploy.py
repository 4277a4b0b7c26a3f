"""Compose, Kubernetes and the image say the same as the code: services, commands, ports, settings, addresses."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

import pytest
from pydantic import TypeAdapter

from libs.common.config import Peer, Settings, Site
from tests.unit.project.reality import ROOT, service_names, setting_names

Manifests = dict[tuple[str, str], dict[str, Any]]
KEYS = {
    "build",
    "image",
    "command",
    "entrypoint",
    "environment",
    "env_file",
    "ports",
    "volumes",
    "networks",
    "depends_on",
    "healthcheck",
    "restart",
    "read_only",
    "tmpfs",
    "init",
    "cap_drop",
    "security_opt",
    "stop_grace_period",
    "hostname",
}
SERVERS = {"rabbitmq", "mongodb", "minio"}
PASSWORD = re.compile(r"PASS|SECRET|ACCESS_KEY|REPLICA_KEY|_URL$")


def _settings_of(environment: dict[str, str]) -> Settings:
    """What the code makes of an environment, with nothing else around it."""
    values = {name.removeprefix("SAGITTAL_").lower(): value for name, value in environment.items()}
    for name, adapter in (("peers", TypeAdapter(tuple[Peer, ...])), ("sites", TypeAdapter(tuple[Site, ...]))):
        if name in values:
            values[name] = adapter.validate_json(values[name])  # type: ignore[assignment]
    return Settings.model_validate({k: v for k, v in values.items() if k in Settings.model_fields})


def _filled_in(value: str) -> str:
    """A value of the compose file as it is when only what must be set is set."""
    value = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
    return re.sub(r"\$\{\w+:\?[^}]*\}", "filledin", value)


def _has_dimse(name: str) -> bool:
    return (ROOT / "services" / name / "scp.py").exists() or (ROOT / "services" / name / "scp").is_dir()


def test_every_service_folder_is_composed() -> None:
    from cli.composition import SERVICES

    assert sorted(SERVICES) == service_names()


def test_compose_has_the_services_and_their_servers_and_nothing_else(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == set(service_names()) | SERVERS


@pytest.mark.parametrize("name", service_names())
def test_compose_service_fits_the_code(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert service["command"] == ["run", name]
    assert set(service["environment"]) <= setting_names()
    settings = _settings_of({k: _filled_in(v) for k, v in service["environment"].items()})
    assert (settings.bus, settings.objects, settings.host) == ("rabbitmq", "s3", "0.0.0.0")
    assert settings.mongo_url and settings.rabbitmq_url and settings.s3_url
    assert f"http://127.0.0.1:{settings.http_port}/readyz" in " ".join(service["healthcheck"]["test"])
    inside = [int(port.rpartition(":")[2]) for port in service.get("ports", [])]
    assert inside == ([settings.dimse_port] if _has_dimse(name) else [])
    assert {server for server, how in service["depends_on"].items() if how["condition"] == "service_healthy"} == SERVERS


def test_compose_publishes_no_port_twice(compose: dict[str, Any]) -> None:
    outside = [p.split(":")[0] for s in compose["services"].values() for p in s.get("ports", [])]
    assert len(outside) == len(set(outside))


def test_compose_is_whole(compose: dict[str, Any]) -> None:
    """Only keys that the Compose specification has, and only networks, volumes and services that are declared."""
    assert set(compose) <= {"name", "services", "networks", "volumes"} | {k for k in compose if k.startswith("x-")}
    for name, service in compose["services"].items():
        assert set(service) <= KEYS, name
        assert service["restart"] == "unless-stopped", name
        assert set(service["healthcheck"]) <= {"test", "interval", "timeout", "retries", "start_period"}, name
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert set(service["networks"]) <= set(compose["networks"]), name
        assert set(service.get("depends_on", {})) <= set(compose["services"]), name
        for volume in service["volumes"]:
            assert volume.split(":")[0] in compose["volumes"], f"{name}: {volume}"


def test_compose_has_no_default_passwords(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for key, value in service["environment"].items():
            if PASSWORD.search(key) and key != "SAGITTAL_S3_URL":
                assert ":?" in value and ".env.example" in value, f"{name}: {key} has no ${{...:?what to do}}"


def test_compose_addresses_are_its_own_servers(compose: dict[str, Any]) -> None:
    environment = compose["services"]["ingest"]["environment"]
    hosts = {re.sub(r"\$\{[^}]*\}", "", environment[f"SAGITTAL_{kind}_URL"]) for kind in ("MONGO", "RABBITMQ", "S3")}
    assert {urlsplit(url).hostname for url in hosts} == SERVERS


def test_manifests_have_every_service(manifests: Manifests) -> None:
    assert {name for kind, name in manifests if kind == "Deployment"} == set(service_names())
    assert {name for kind, name in manifests if kind == "Service"} == set(service_names())
    assert not [name for kind, name in manifests if kind == "Secret"], "secrets are referenced, never written down"


@pytest.mark.parametrize("name", service_names())
def test_manifest_fits_the_code(manifests: Manifests, compose: dict[str, Any], name: str) -> None:
    pod = manifests["Deployment", name]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == compose["services"][name]["command"] == ["run", name]
    assert container["image"] == compose["services"][name]["image"]
    settings = _settings_of(manifests["ConfigMap", "sagittal"]["data"])
    expected = {"http": settings.http_port} | ({"dimse": settings.dimse_port} if _has_dimse(name) else {})
    assert {p["name"]: p["containerPort"] for p in container["ports"]} == expected
    service = manifests["Service", name]["spec"]
    assert {p["name"]: p["port"] for p in service["ports"]} == expected
    assert all(p["targetPort"] == p["name"] for p in service["ports"])
    assert (
        service["selector"].items() <= manifests["Deployment", name]["spec"]["template"]["metadata"]["labels"].items()
    )
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
    assert pod["terminationGracePeriodSeconds"] > settings.drain_seconds


@pytest.mark.parametrize("name", service_names())
def test_manifest_is_locked_down(manifests: Manifests, name: str) -> None:
    pod = manifests["Deployment", name]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["resources"]["requests"] and container["resources"]["limits"]
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    data = manifests["ConfigMap", "sagittal"]["data"]
    assert {data["TMPDIR"], data["SAGITTAL_DATA"]} <= mounted, "what is written must be on a volume"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_manifests_name_real_settings(manifests: Manifests, compose: dict[str, Any]) -> None:
    """ConfigMap and Secret together tell the services what compose tells them."""
    given = set(manifests["ConfigMap", "sagittal"]["data"])
    text = (ROOT / "deploy/k8s/base/configmap.yaml").read_text()
    secret = set(re.findall(r"SAGITTAL_\w+", text.split("apiVersion")[0]))
    assert given - {"TMPDIR"} <= setting_names()
    assert secret <= setting_names()
    assert set(compose["services"]["ingest"]["environment"]) <= given | secret
    for _kind, deployment in ((k, m) for (k, _), m in manifests.items() if k == "Deployment"):
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        sources = [next(iter(source.values()))["name"] for source in container["envFrom"]]
        assert sources == ["sagittal", "sagittal"]


def test_image_runs_as_nobody_special_and_serves_the_default_ports(manifests: Manifests) -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    user = next(line.split()[1] for line in reversed(lines) if line.startswith("USER "))
    pod = manifests["Deployment", "ingest"]["spec"]["template"]["spec"]["securityContext"]
    assert user == f"{pod['runAsUser']}:{pod['runAsGroup']}" and not user.startswith("0")
    assert lines.index(f"USER {user}") < next(i for i, line in enumerate(lines) if line.startswith("ENTRYPOINT"))
    fields = Settings.model_fields
    assert f"EXPOSE {fields['dimse_port'].default} {fields['http_port'].default}" in lines
    assert 'ENTRYPOINT ["sagittal"]' in lines


def test_image_gets_every_package_and_no_data() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    dockerfile = (ROOT / "Dockerfile").read_text()
    for folder in ("cli", "libs", "services"):
        assert f"!{folder}" in ignored and f"COPY {folder} {folder}" in dockerfile
