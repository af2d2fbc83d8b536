"""Make kubernetes.json and keda.json beside this file: what the manifests are checked against, without descriptions.

    python tests/kubernetes/make_schemas.py KUBERNETES KEDA

Both arguments are checkouts, of the tags in `SOURCES`. Both projects are under the Apache License 2.0, and so are the
files that are made of theirs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
SOURCES = {
    "kubernetes": "https://github.com/kubernetes/kubernetes v1.34.4, api/openapi-spec/swagger.json; Apache-2.0",
    "keda": "https://github.com/kedacore/keda v2.21.0, config/crd/bases and schema/generated; Apache-2.0",
}
KINDS = {
    "Deployment",
    "Namespace",
    "NetworkPolicy",
    "PersistentVolumeClaim",
    "PodDisruptionBudget",
    "Secret",
    "Service",
    "ServiceAccount",
}
SCALERS = {"kafka", "rabbitmq", "redis-streams"}
REFERENCE = "#/definitions/"


def strict(schema: Any) -> Any:
    """The schema without texts for people, and with no members but those that it names."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    # Formats such as `int-or-string` are Kubernetes' own, and mean nothing to a checker of JSON.
    told = {"$ref", "additionalProperties", "enum", "items", "maximum", "minimum", "required", "type"}
    result = {name: strict(value) for name, value in schema.items() if name in told}
    if "properties" in schema:
        result["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    if schema.get("format") == "int-or-string" or schema.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
    return result


def kubernetes(checkout: Path) -> dict[str, Any]:
    definitions = json.loads((checkout / "api/openapi-spec/swagger.json").read_text())["definitions"]
    kinds, wanted = {}, []
    for name, definition in definitions.items():
        for meant in definition.get("x-kubernetes-group-version-kind", []):
            if meant["kind"] in KINDS:
                kinds["/".join(filter(None, (meant["group"], meant["version"], meant["kind"])))] = REFERENCE + name
                wanted.append(name)
    kept: dict[str, Any] = {}
    while wanted:
        name = wanted.pop()
        if name not in kept:
            kept[name] = strict(definitions[name])
            # Numbers with units are strings, or numbers by the kindness of the server.
            if name.endswith((".Quantity", ".IntOrString")):
                kept[name] = {"type": ["integer", "string"]}
            wanted += [part.split('"')[0] for part in json.dumps(kept[name]).split(REFERENCE)[1:]]
    return {"kinds": kinds, "definitions": kept}


def keda(checkout: Path) -> dict[str, Any]:
    kinds = {}
    for kind in ("scaledobjects", "triggerauthentications"):
        crd = yaml.safe_load((checkout / f"config/crd/bases/keda.sh_{kind}.yaml").read_text())["spec"]
        for version in crd["versions"]:
            name = f"{crd['group']}/{version['name']}/{crd['names']['kind']}"
            kinds[name] = strict(version["schema"]["openAPIV3Schema"])
            del kinds[name]["properties"]["metadata"]["type"]  # of any kind: the API server knows it, not the CRD
    scalers = yaml.safe_load((checkout / "schema/generated/scalers-schema.yaml").read_text())["scalers"]
    parameters = {one["type"]: {each.pop("name"): each for each in one["parameters"]} for one in scalers}
    return {"kinds": kinds, "scalers": {name: parameters[name] for name in sorted(SCALERS)}}


def main() -> None:
    for name, made in (("kubernetes", kubernetes(Path(sys.argv[1]))), ("keda", keda(Path(sys.argv[2])))):
        made["source"] = SOURCES[name]
        (HERE / f"{name}.json").write_text(json.dumps(made, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
