"""The description of the API is held against the code, and real answers against the description."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from conftest import TEST_IMAGE

from safelight import __version__, formats, settings
from safelight.errors import ConfigurationError, MalformedMessageError, SafelightError
from safelight.gateway import app as module
from safelight.gateway.app import App
from safelight.gateway.request import REQUEST_ID
from safelight.gateway.store import NAME

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import System

DOCUMENT: Any = json.loads(resources.files("safelight.gateway").joinpath("openapi.json").read_text("utf-8"))
QUERY = DOCUMENT["paths"]["/query"]["post"]
NEVER_SENT = (ConfigurationError, MalformedMessageError)


def _followed(node: Any) -> Any:
    while isinstance(node, dict) and "$ref" in node:
        pointer = node["$ref"].removeprefix("#/").split("/")
        node = DOCUMENT
        for step in pointer:
            node = node[step]
    return node


def _fits(value: Any, schema: Any) -> bool:
    """JSON Schema, as much of it as the document uses."""
    schema = _followed(schema)
    kinds = {"object": dict, "string": str, "array": list, "number": (int, float), "integer": int}
    return (
        isinstance(value, kinds.get(schema.get("type", ""), object))
        and ("const" not in schema or value == schema["const"])
        and ("enum" not in schema or value in schema["enum"])
        and ("pattern" not in schema or bool(re.search(schema["pattern"], value)))
        and all(name in value for name in schema.get("required", ()))
        and all(_fits(value[name], inner) for name, inner in schema.get("properties", {}).items() if name in value)
        and all(_fits(value, inner) for inner in schema.get("allOf", ()))
    )


def _check(answer: httpx.Response) -> None:
    """This answer is one of those that the document lists for its route."""
    request = answer.request
    path = re.sub(r"^/images/.*", "/images/{name}", request.url.path)
    operation = DOCUMENT["paths"].get(path, {}).get(request.method.lower(), {"responses": {}})
    listed = operation["responses"] if str(answer.status_code) in operation["responses"] else {}
    response = _followed(
        listed.get(str(answer.status_code)) or DOCUMENT["components"]["responses"][str(answer.status_code)]
    )
    for name, header in response["headers"].items():
        assert name in answer.headers or not _followed(header).get("required")
    if answer.status_code == 304:
        assert answer.content == b""
        return
    media_type = answer.headers["content-type"].partition(";")[0]
    assert media_type in response["content"]
    value = answer.json() if media_type == "application/json" else answer.text
    assert _fits(value, response["content"][media_type]["schema"])


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for inner in node.values():
            yield from _references(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from _references(inner)


def _errors(root: type[SafelightError] = SafelightError) -> Iterator[type[SafelightError]]:
    yield root
    for child in root.__subclasses__():
        yield from _errors(child)


def _codes(response: Any) -> set[str]:
    [_, own] = _followed(response)["content"]["application/json"]["schema"]["allOf"]
    return set(own["properties"]["error"]["enum"])


def test_every_reference_leads_somewhere() -> None:
    assert all(_followed({"$ref": reference}) for reference in _references(DOCUMENT))


def test_the_document_is_of_this_version() -> None:
    assert (DOCUMENT["openapi"], DOCUMENT["info"]["version"]) == ("3.1.0", __version__)


def test_every_route_is_described_and_nothing_else() -> None:
    nothing: Any = None
    app = App(settings.Gateway(), dispatch=nothing, workers=nothing, admission=nothing, store=nothing, metrics=nothing)
    served = {
        ("/images/{name}" if path == module.IMAGES else path, method) for path, (method, _) in app._routes.items()
    }
    described = {(path, method.upper()) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert served == described


def test_every_code_is_described_with_its_status() -> None:
    described = {
        (code, int(status))
        for status, response in DOCUMENT["components"]["responses"].items()
        for code in _codes(response)
    }
    assert described == {(error.code, error.status) for error in _errors() if error not in NEVER_SENT} - {
        ("internal", 503)
    }
    listed = DOCUMENT["components"]["schemas"]["Failure"]["properties"]["error"]["enum"]
    assert sorted(listed) == sorted(code for code, _ in described)


def test_query_lists_every_failure_but_those_of_another_address_or_method() -> None:
    failures = set(DOCUMENT["components"]["responses"])
    assert set(QUERY["responses"]) == failures - {"404", "405"} | {"200"}


def test_parameters_have_the_bounds_of_the_code() -> None:
    operations, timeout, request_id, _ = (parameter["schema"] for parameter in QUERY["parameters"])
    assert ",".join(operations["default"]) == module.DEFAULT_OPERATIONS
    assert (operations["maxItems"], operations["items"]["maxLength"]) == (module.MAX_OPERATIONS, module.MAX_NAME)
    assert (timeout["default"], timeout["maximum"]) == (module.DEFAULT_TIMEOUT, module.LONGEST_TIMEOUT)
    assert request_id["pattern"] == f"^{REQUEST_ID.pattern}$"
    name = DOCUMENT["paths"]["/images/{name}"]["get"]["parameters"][0]["schema"]["pattern"]
    assert name == f"^{NAME.pattern}$"


def test_every_format_that_is_taken_is_described() -> None:
    taken = {found.media_type for found in formats.FORMATS}
    assert set(QUERY["requestBody"]["content"]) == taken | {"multipart/form-data"}
    assert set(QUERY["responses"]["200"]["content"]) == taken | {"application/json"}


def test_the_gateway_serves_it(shared_system: System) -> None:
    answer = shared_system.client.get("/openapi.json")
    assert answer.json() == DOCUMENT
    _check(answer)


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/images/none.jpg", "/elsewhere", "/query"])
def test_what_is_got_is_as_described(path: str, shared_system: System) -> None:
    _check(shared_system.client.get(path))


def test_success_is_as_described(shared_system: System, image: bytes) -> None:
    answer = shared_system.post(image)
    _check(answer)
    _check(shared_system.post(image, accept="image/*"))
    path = answer.headers["link"].partition(">")[0][1:]
    served = shared_system.client.get(path)
    _check(served)
    _check(shared_system.client.get(path, headers={"If-None-Match": served.headers["etag"]}))


@pytest.mark.parametrize(
    ("image", "query", "accept"),
    [
        (b"", "", "*/*"),
        (b"text", "", "*/*"),
        (TEST_IMAGE.read_bytes()[:1_000], "", "*/*"),
        (b"x", "?timeout=0", "*/*"),
        (b"x", "?operations=", "*/*"),
        (b"x", "", "text/html"),
        (TEST_IMAGE.read_bytes(), "?timeout=0.0001", "*/*"),
    ],
)
def test_failures_are_as_described(image: bytes, query: str, accept: str, shared_system: System) -> None:
    answer = shared_system.post(image, query, accept=accept)
    assert answer.status_code >= 400
    _check(answer)
