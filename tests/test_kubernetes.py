"""deploy/kubernetes as kustomize builds it: what Kubernetes and KEDA would say to it, and what we promise of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import ROOT, absent

from safelight import __version__, settings
from safelight.brokers import kafka, rabbitmq, redis
from safelight.gateway.app import LONGEST_TIMEOUT
from safelight.gateway.run import DRAIN_DELAY_SECONDS

Manifest = dict[str, Any]

TREE = ROOT / "deploy" / "kubernetes"
KUSTOMIZE = Path.home() / ".cache" / "safelight" / "bin" / "kustomize"  # where .ci/run puts one
KUBERNETES, KEDA = (
    json.loads((ROOT / "tests" / "kubernetes" / f"{name}.json").read_text()) for name in ("kubernetes", "keda")
)
# What a user puts together: a broker, and what scales the workers by its backlog.
OVERLAYS: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "images": ("components/images",),
    "valkey scaled": ("scalers/redis",),
    "redis": ("components/redis", "scalers/redis"),
    "rabbitmq": ("components/rabbitmq", "scalers/rabbitmq"),
    "kafka": ("components/kafka", "scalers/kafka"),
}
MEGABYTE = settings.MEGABYTE


def _command() -> list[str]:
    if KUSTOMIZE.exists():
        return [str(KUSTOMIZE), "build"]
    commands = [each for each in (["kustomize", "build"], ["kubectl", "kustomize"]) if shutil.which(each[0])]
    if not commands:
        absent("kustomize is not installed", "see .ci/run")
    return commands[0]


def _build(overlay: Path, kustomization: str) -> list[Manifest]:
    command = _command()
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(kustomization)
    ended = subprocess.run([*command, str(overlay)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "deprecated" not in ended.stderr
    return list(yaml.safe_load_all(ended.stdout))


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Manifest]]:
    """The manifests of an overlay of that name, each built once."""
    folder, built = tmp_path_factory.mktemp("overlays"), dict[str, list[Manifest]]()
    shutil.copytree(TREE, folder / "kubernetes")

    def build(name: str) -> list[Manifest]:
        if name not in built:
            components = [f"../kubernetes/{part}" for part in OVERLAYS[name]]
            wanted = {"kind": "Kustomization", "resources": ["../kubernetes"], "components": components}
            built[name] = _build(folder / name.replace(" ", "-"), json.dumps(wanted))
        return deepcopy(built[name])

    return build


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest, build: Callable[[str], list[Manifest]]) -> list[Manifest]:
    return build(request.param)


def _of_kind(manifests: list[Manifest], kind: str) -> dict[str, Manifest]:
    return {one["metadata"]["name"]: one for one in manifests if one["kind"] == kind}


def _pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The specification of each deployment's pods, by their component."""
    deployments = _of_kind(manifests, "Deployment").values()
    templates = [one["spec"]["template"] for one in deployments]
    return {one["metadata"]["labels"]["app.kubernetes.io/component"]: one["spec"] for one in templates}


def _container(pod: Manifest) -> Manifest:
    [container] = pod["containers"]
    return dict(container)


# What is wrong with manifests.


def _wrong(manifests: list[Manifest]) -> list[str]:
    """What the API servers would refuse, or drop without a word."""
    return [wrong for one in manifests for wrong in (*_wrong_shape(one), *_wrong_triggers(one, manifests))]


def _wrong_shape(manifest: Manifest) -> Iterator[str]:
    name = f"{manifest['apiVersion']}/{manifest['kind']}"
    if name in KUBERNETES["kinds"]:
        schema = {"$ref": KUBERNETES["kinds"][name], "definitions": KUBERNETES["definitions"]}
    elif name in KEDA["kinds"]:
        schema = KEDA["kinds"][name]
    else:
        yield f"{name} is no kind"
        return
    for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest):
        yield f"{name} {manifest['metadata'].get('name')} {error.json_path}: {error.message}"


def _wrong_triggers(scaler: Manifest, manifests: list[Manifest]) -> Iterator[str]:
    """KEDA's schema of its kinds leaves a trigger's metadata open; what each scaler reads it tells in another file."""
    authentications = _of_kind(manifests, "TriggerAuthentication")
    for trigger in scaler["spec"].get("triggers", []) if scaler["kind"] == "ScaledObject" else []:
        known = KEDA["scalers"][trigger["type"]]
        references = authentications[trigger["authenticationRef"]["name"]]["spec"]["secretTargetRef"]
        read = [(each["parameter"], "triggerAuthenticationVariableReadable") for each in references]
        for name, value in trigger["metadata"].items():
            if name not in known and name.endswith("FromEnv"):
                read.append((name.removesuffix("FromEnv"), "envVariableReadable"))
                continue
            read.append((name, "metadataVariableReadable"))
            if value not in known.get(name, {}).get("allowedValue", [value]):
                yield f"{trigger['type']}: {name} cannot be {value}"
        yield from (
            f"{trigger['type']} does not read {name} there" for name, by in read if by not in known.get(name, {})
        )


def test_kubernetes_and_keda_take_every_manifest(manifests: list[Manifest]) -> None:
    assert _wrong(manifests) == []
    names = [(one["kind"], one["metadata"]["name"]) for one in manifests]
    assert len(names) == len(set(names))
    namespaces = {one["metadata"].get("namespace") for one in manifests if one["kind"] != "Namespace"}
    assert namespaces == {"safelight"}


def test_the_overlay_that_the_page_shows(tmp_path: Path) -> None:
    shutil.copytree(TREE, tmp_path / "kubernetes")
    lines = (TREE / "kustomization.yaml").read_text().splitlines()
    shown = "\n".join(line.removeprefix("#   ") for line in lines if line.startswith("#   "))
    here = re.sub(r"https://HOST/safelight//deploy/kubernetes(\S*)\?ref=v[0-9.]+", r"../kubernetes\1", shown)
    manifests = _build(tmp_path / "overlay", here)
    assert _wrong(manifests) == []
    images = {_container(pod)["image"] for pod in _pods(manifests).values()}
    assert images == {f"registry.example.com/safelight-{part}:{__version__}" for part in ("gateway", "worker")}


MISTAKES: dict[str, Callable[[dict[str, Manifest]], Any]] = {
    "an unknown field": lambda kinds: kinds["Deployment"]["spec"]["template"]["spec"].update(enableServiceLink=False),
    "an unknown field deep inside": lambda kinds: _container(kinds["Deployment"]["spec"]["template"]["spec"])[
        "livenessProbe"
    ].update(timeout=5),
    "a wrong type": lambda kinds: kinds["Service"]["spec"]["ports"][0].update(port="8080"),
    "a missing field": lambda kinds: kinds["Deployment"]["spec"].pop("selector"),
    "an unknown kind": lambda kinds: kinds["NetworkPolicy"].update(apiVersion="networking.k8s.io/v1beta1"),
    "an unknown field of KEDA's": lambda kinds: kinds["ScaledObject"]["spec"].update(minReplicas=1),
    "an unknown parameter": lambda kinds: kinds["ScaledObject"]["spec"]["triggers"][0]["metadata"].update(length="5"),
    "an impossible value": lambda kinds: kinds["ScaledObject"]["spec"]["triggers"][0]["metadata"].update(
        offsetResetPolicy="first"
    ),
    "a number for a string": lambda kinds: kinds["ScaledObject"]["spec"]["triggers"][0]["metadata"].update(
        lagThreshold=10
    ),
    "a secret that is not read": lambda kinds: kinds["TriggerAuthentication"]["spec"]["secretTargetRef"][0].update(
        parameter="bootstrapServers"
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_they_would_refuse_a_mistake(mistake: str, build: Callable[[str], list[Manifest]]) -> None:
    manifests = build("kafka")
    MISTAKES[mistake]({one["kind"]: one for one in manifests})
    assert len(_wrong(manifests)) == 1


# What we promise of pods.


def test_pods_are_restricted(manifests: list[Manifest]) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, and a root that nobody writes to."""
    [namespace] = _of_kind(manifests, "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in _pods(manifests).values():
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == 10001  # as the Dockerfile's USER
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert _container(pod)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        assert {"name": "tmp", "mountPath": "/tmp"} in _container(pod)["volumeMounts"]
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC", "initContainers"}
    assert "USER 10001:10001" in (ROOT / "Dockerfile").read_text()


def test_pods_know_nothing_of_the_cluster(manifests: list[Manifest]) -> None:
    accounts = _of_kind(manifests, "ServiceAccount")
    assert {pod["serviceAccountName"] for pod in _pods(manifests).values()} == accounts.keys()
    assert not any(account["automountServiceAccountToken"] for account in accounts.values())
    for pod in _pods(manifests).values():
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False


def test_pods_are_bounded_and_watched(manifests: list[Manifest]) -> None:
    for pod in _pods(manifests).values():
        container = _container(pod)
        for kind in ("requests", "limits"):
            assert container["resources"][kind].keys() == {"cpu", "memory"}
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
    gateway, worker = (_container(_pods(manifests)[name]) for name in ("gateway", "worker"))
    paths = [gateway[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
    assert paths == ["/livez", "/readyz", "/livez"]
    memory = worker["resources"]["limits"]["memory"]
    assert int(memory.removesuffix("Mi")) * MEGABYTE > settings.Worker.child_memory  # so that a child meets its own


def test_pods_have_the_time_to_drain(manifests: list[Manifest]) -> None:
    pods, worker = _pods(manifests), settings.Worker
    assert 'ENTRYPOINT ["tini", "--",' in (ROOT / "Dockerfile").read_text()  # process 1 could lose a SIGTERM
    assert pods["gateway"]["terminationGracePeriodSeconds"] > DRAIN_DELAY_SECONDS + LONGEST_TIMEOUT
    assert pods["worker"]["terminationGracePeriodSeconds"] > worker.attempts * worker.work_limit


def test_what_matters_comes_before_what_goes(manifests: list[Manifest]) -> None:
    for part in ("gateway", "worker"):
        deployment = _of_kind(manifests, "Deployment")[f"safelight-{part}"]["spec"]
        labels = deployment["template"]["metadata"]["labels"]
        assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
        budget = _of_kind(manifests, "PodDisruptionBudget")[f"safelight-{part}"]["spec"]
        spread = _pods(manifests)[part]["topologySpreadConstraints"]
        for selector in (deployment["selector"], budget["selector"], *(each["labelSelector"] for each in spread)):
            assert selector["matchLabels"] == labels


def test_the_worker_is_judged_by_its_beat(build: Callable[[str], list[Manifest]], tmp_path: Path) -> None:
    container, beat = _container(_pods(build("as it is"))["worker"]), tmp_path / "beat"
    [file] = [each["value"] for each in container["env"] if each["name"] == "SAFELIGHT_BEAT_FILE"]
    *shell, line = container["livenessProbe"]["exec"]["command"]

    def lives() -> bool:
        return subprocess.run([*shell, line.replace(file, str(beat))], check=False, capture_output=True).returncode == 0

    assert not lives()
    beat.touch()
    assert lives()
    os.utime(beat, (beat.stat().st_mtime - 60,) * 2)
    assert not lives()


# Names that must agree with the code.


def test_variables_are_settings(manifests: list[Manifest]) -> None:
    known = settings.environment(
        settings.Broker(broker="x"), settings.Gateway(drain_delay=1), settings.Worker(imports=("x",), beat_file="x")
    )
    for part, pod in _pods(manifests).items():
        container = _container(pod)
        names = {each["name"] for each in container.get("env", [])} - {"KEDA_SERVERS"}
        assert names <= known.keys()
        assert ("SAFELIGHT_BROKER" in names) == (part != "broker")
        values = {each["name"]: each.get("value") for each in container.get("env", [])}
        mounts = [each["mountPath"] for each in container["volumeMounts"]]
        assert values.get("SAFELIGHT_STORE", "/tmp") in mounts
        assert values.get("SAFELIGHT_BEAT_FILE", "/tmp/beat").startswith("/tmp/")


def test_ports_and_images_are_ours(manifests: list[Manifest]) -> None:
    gateway, worker = (_container(_pods(manifests)[name]) for name in ("gateway", "worker"))
    assert gateway["ports"] == [{"name": "http", "containerPort": settings.Broker.port}]
    assert _of_kind(manifests, "Service")["safelight"]["spec"]["ports"][0]["port"] == settings.Broker.port
    assert [gateway["image"], worker["image"]] == [f"safelight-{part}:{__version__}" for part in ("gateway", "worker")]


def _trigger(manifests: list[Manifest]) -> dict[str, str]:
    [scaler] = _of_kind(manifests, "ScaledObject").values()
    assert scaler["spec"]["scaleTargetRef"] == {"name": "safelight-worker"}
    assert scaler["spec"]["minReplicaCount"] == 1
    assert "replicas" not in _of_kind(manifests, "Deployment")["safelight-worker"]["spec"]
    return dict(scaler["spec"]["triggers"][0]["metadata"])


@pytest.mark.parametrize("overlay", ["valkey scaled", "redis"])
def test_redis_is_asked_for_the_stream_of_jobs(overlay: str, build: Callable[[str], list[Manifest]]) -> None:
    asked = _trigger(build(overlay))
    assert asked["stream"].encode() == redis.JOBS
    assert "consumerGroup" not in asked  # with it KEDA asks for something else than the length


def test_rabbitmq_is_asked_for_the_queue_of_jobs(build: Callable[[str], list[Manifest]]) -> None:
    assert _trigger(build("rabbitmq"))["queueName"] == rabbitmq.JOBS


def test_kafka_is_asked_for_the_lag_of_the_workers(build: Callable[[str], list[Manifest]]) -> None:
    manifests, options = build("kafka"), kafka._Options("kafka://host:9092")
    asked = _trigger(manifests)
    assert asked["topic"] == options.topic(kafka.JOBS)
    assert asked["consumerGroup"] == options.consumer["group.id"]
    assert asked["offsetResetPolicy"] == options.consumer["auto.offset.reset"]
    [scaler] = _of_kind(manifests, "ScaledObject").values()
    assert scaler["spec"]["maxReplicaCount"] == kafka.PARTITIONS
    variables = [each["name"] for each in _container(_pods(manifests)["worker"])["env"]]
    assert asked["bootstrapServersFromEnv"] in variables


# Who reaches whom.

OURS = {
    part: {"app.kubernetes.io/name": "safelight", "app.kubernetes.io/component": part}
    for part in ("gateway", "worker", "broker")
}
# Namespace and labels; None is an address outside the cluster.
PLACES: dict[str, tuple[str, dict[str, str]] | None] = {
    **{part: ("safelight", labels) for part, labels in OURS.items()},
    "neighbour": ("safelight", {"app.kubernetes.io/name": "other"}),
    "dns": ("kube-system", {"k8s-app": "kube-dns"}),
    "keda": ("keda", {"app.kubernetes.io/name": "keda-operator"}),
    "cluster": ("default", {}),
    "world": None,
}
NAMED = {"http": 8080, "broker": 6379}
BROKER_PORTS = {"redis": (6379, 6380), "rabbitmq": (5672, 5671), "kafka": (9092, 9093)}
PORTS = {*NAMED.values(), 53, 80, 443, 6443, 9000}.union(*BROKER_PORTS.values())


def _selects(selector: Manifest, labels: dict[str, str]) -> bool:
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions)
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )


def _is_peer(peer: Manifest, place: str) -> bool:
    if (found := PLACES[place]) is None:
        return False
    namespace, labels = found
    if "namespaceSelector" in peer:
        if not _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace}):
            return False
    elif namespace != "safelight":
        return False
    return _selects(peer.get("podSelector", {}), labels)


def _passes(policies: list[Manifest], direction: str, place: str, other: str, port: int) -> bool:
    """Whether policies let `place` be connected by (Ingress) or to (Egress) `other`."""
    if (found := PLACES[place]) is None or found[0] != "safelight":
        return True
    mine = [each["spec"] for each in policies if _selects(each["spec"]["podSelector"], found[1])]
    mine = [each for each in mine if direction in each["policyTypes"]]
    side = {"Ingress": "from", "Egress": "to"}[direction]
    return not mine or any(
        port in [NAMED.get(each["port"], each["port"]) for each in rule["ports"]]
        and (side not in rule or any(_is_peer(peer, other) for peer in rule[side]))
        for each in mine
        for rule in each.get(direction.lower(), [])
    )


def test_nobody_reaches_more_than_is_needed(manifests: list[Manifest], request: pytest.FixtureRequest) -> None:
    policies = list(_of_kind(manifests, "NetworkPolicy").values())
    reached = {
        (one, other, port)
        for one in PLACES
        for other in PLACES
        for port in PORTS
        if {one, other} & OURS.keys()
        and _passes(policies, "Egress", one, other, port)
        and _passes(policies, "Ingress", other, one, port)
    }
    name = request.node.callspec.params["manifests"]
    wanted = {(one, "dns", 53) for one in ("gateway", "worker")}
    wanted |= {(one, "gateway", 8080) for one in PLACES.keys() - OURS.keys()}
    if name in BROKER_PORTS:  # one of the user's own, wherever it is
        elsewhere = PLACES.keys() - OURS.keys()
        wanted |= {(one, to, port) for one in ("gateway", "worker") for to in elsewhere for port in BROKER_PORTS[name]}
        reached = {each for each in reached if "broker" not in each}  # there is none in the cluster
    else:
        wanted |= {(one, "broker", 6379) for one in ("gateway", "worker")}
    if name == "valkey scaled":
        wanted |= {("keda", "broker", 6379)}
    assert reached == wanted
