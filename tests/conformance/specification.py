"""OpenAI's OpenAPI document, cut down to what Gale is measured against.

``python -m tests.conformance.specification openapi.json`` makes ``specification.json.gz`` from the published document
(github.com/openai/openai-openapi, MIT licence): the requests and answers of the operations in ``SCOPE``, without their
prose, and the bare names of all others.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

EXTRACT = Path(__file__).parent / "specification.json.gz"
METHODS = ("get", "post", "delete", "put", "patch")
# Beginnings of the paths whose answers are compared.
SCOPE = (
    "/batches",
    "/chat/completions",
    "/completions",
    "/conversations",
    "/embeddings",
    "/files",
    "/fine_tuning/jobs",
    "/models",
    "/moderations",
    "/organization",
    "/responses",
    "/uploads",
)
_PROSE = ("description", "example", "examples", "title", "x-oaiMeta", "x-oaiExpandable", "externalDocs", "deprecated")


def extract(document: dict[str, Any]) -> dict[str, Any]:
    """The operations in scope as ``{"post /files": {"request", "responses"}}``, the schemas they use, all names."""
    operations: dict[str, Any] = {}
    names: list[str] = []
    for path, item in document["paths"].items():
        if "?" in path:  # the same again under a query
            continue
        for method in METHODS:
            if method not in item:
                continue
            names.append(f"{method} {path}")
            if path.startswith(SCOPE):
                operations[names[-1]] = _operation(item[method])
    schemas: dict[str, Any] = {}
    waiting = [operations]
    while waiting:
        for name in _references(waiting.pop()):
            if name not in schemas:
                schemas[name] = _without_prose(document["components"]["schemas"][name])
                waiting.append(schemas[name])
    return {
        "version": document["info"]["version"],
        "operations": operations,
        "schemas": dict(sorted(schemas.items())),
        "names": names,
    }


def _operation(operation: dict[str, Any]) -> dict[str, Any]:
    request = operation.get("requestBody", {}).get("content", {})
    responses = {
        f"{status} {media.partition(';')[0]}": _without_prose(content.get("schema", {}))
        for status, response in operation["responses"].items()
        for media, content in response.get("content", {}).items()
    }
    return {
        "request": {media: _without_prose(content.get("schema", {})) for media, content in request.items()},
        "query": [each["name"] for each in operation.get("parameters", []) if each.get("in") == "query"],
        "responses": responses,
    }


def _without_prose(value: Any, *, in_properties: bool = False) -> Any:
    """``value`` without descriptions; names under "properties" are no keywords and stay."""
    if isinstance(value, list):
        return [_without_prose(each) for each in value]
    if not isinstance(value, dict):
        return value
    kept = {
        key: _without_prose(each, in_properties=key == "properties" and not in_properties)
        for key, each in value.items()
        if in_properties or (key not in _PROSE and not key.startswith("x-"))
    }
    if in_properties:
        return kept
    # Words of OpenAPI 3.0 that the document, which is 3.1, still uses.
    for word, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(kept.get(exclusive), bool):
            limit = kept.pop(word)
            kept[exclusive if kept.pop(exclusive) else word] = limit
    if kept.pop("nullable", False):
        return {"anyOf": [kept, {"type": "null"}]}
    return kept


def _references(value: Any) -> set[str]:
    found: set[str] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            if isinstance(item.get("$ref"), str):
                found.add(item["$ref"].rpartition("/")[2])
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return found


def load() -> dict[str, Any]:
    """The extract that is kept beside this file."""
    extracted: dict[str, Any] = json.loads(gzip.decompress(EXTRACT.read_bytes()))
    return extracted


if __name__ == "__main__":
    text = json.dumps(extract(json.loads(Path(sys.argv[1]).read_text())), separators=(",", ":"), sort_keys=True)
    EXTRACT.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{EXTRACT}: {len(text):,} characters, {EXTRACT.stat().st_size:,} bytes")
