"""No parameter of OpenAI's is silently ignored: each is one of ours, or refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import httpx2

from tests.conformance.checker import Checker

# Values that ask for something, where the schema alone does not tell one.
PROBES: dict[str, Any] = {
    "best_of": 2,
    "audio": {"voice": "alloy", "format": "wav"},
    "function_call": {"name": "weather"},
    "functions": [{"name": "weather"}],
    "modalities": ["text", "audio"],
    "prediction": {"type": "content", "content": "x"},
    "truncation": "auto",
    "web_search_options": {},
}


@dataclass(slots=True)
class Parameters:
    """What became of one operation's parameters."""

    ours: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def probe(checker: Checker, http: httpx2.Client) -> dict[str, Parameters]:
    """Sort the parameters of every operation that was called with a JSON body; sends those that are not ours."""
    document = http.get("/openapi.json").json()
    found: dict[str, Parameters] = {}
    for operation, (params, body) in checker.bodies.items():
        method, path = operation.split(" ")
        specified = _properties(checker.specification["operations"][operation]["request"], checker.specification)
        ours = _own_properties(document, f"/v1{path}", method)
        parameters = found[operation] = Parameters()
        for name, schema in sorted(specified.items()):
            if name in ours:
                parameters.ours.append(name)
                continue
            value = PROBES[name] if name in PROBES else _example(schema)
            response = http.request(method.upper(), "/v1" + path.format(**params), json={**body, name: value})
            error = response.json().get("error") if response.status_code == 400 else None
            refused = error is not None and str(error["param"]).startswith(name)
            (parameters.refused if refused else parameters.ignored).append(name)
    return found


def _properties(request: dict[str, Any], specification: dict[str, Any]) -> dict[str, Any]:
    """All properties of a request's JSON object, those of its parts included."""
    properties: dict[str, Any] = {}
    waiting = [request.get("application/json", {})]
    while waiting:
        schema = waiting.pop()
        if "$ref" in schema:
            waiting.append(specification["schemas"][schema["$ref"].rpartition("/")[2]])
        properties |= schema.get("properties", {})
        waiting += [part for key in ("allOf", "anyOf", "oneOf") for part in schema.get(key, [])]
    return properties


def _own_properties(document: dict[str, Any], path: str, method: str) -> set[str]:
    """The fields that our own document names for the operation, whatever its path's parameters are called."""
    shape = [part if not part.startswith("{") else "{}" for part in path.split("/")]
    for own_path, item in document["paths"].items():
        own_shape = [part if not part.startswith("{") else "{}" for part in own_path.split("/")]
        if own_shape == shape and method in item:
            content = item[method].get("requestBody", {}).get("content", {}).get("application/json", {})
            return set(content.get("schema", {}).get("properties", {}))
    return set()


def _example(schema: dict[str, Any]) -> Any:
    """Some value that the schema's type allows."""
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return _example(next((part for part in schema[key] if part != {"type": "null"}), {}))
    if "enum" in schema:
        return schema["enum"][-1]
    match schema.get("type"):
        case "boolean":
            return True
        case "integer" | "number":
            return 1
        case "array":
            return [_example(schema.get("items", {}))]
        case "object":
            return {"a": "b"}
        case _:
            return "a"
