"""Calls a live server and holds its answers against OpenAI's schemas."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
from jsonschema_rs import Draft202012Validator

from tests.conformance.specification import load

MOST_PROBLEMS = 3


@dataclass(slots=True)
class Checked:
    """One operation: how many answers were compared, and what did not fit."""

    operation: str
    answers: int = 0
    problems: list[str] = field(default_factory=list)


class Checker:
    """A client that notes how each operation's answers fit the specification."""

    def __init__(self, http: httpx2.Client) -> None:
        self.specification = load()
        self.checked: dict[str, Checked] = {}
        # The first body sent to each operation, with its path's parameters.
        self.bodies: dict[str, tuple[dict[str, str], dict[str, Any]]] = {}
        self._http = http
        self._validators: dict[str, Draft202012Validator] = {}

    def call(
        self,
        operation: str,
        *,
        json: Any = None,
        files: Any = None,
        data: Any = None,
        params: dict[str, str] | None = None,
        query: Any = None,
        headers: dict[str, str] | None = None,
        departure: Callable[[Any], None] | None = None,
    ) -> Any:
        """Do ``operation`` ("post /files") with ``params`` for its path. Returns what it answered, whatever it was.

        Anything but a success is a problem of that operation, as is an answer that its schema refuses. A ``departure``
        takes out of the answer what OpenAI's own service does unlike its document.
        """
        method, path = operation.split(" ")
        url = "/v1" + path.format(**params or {})
        if json is not None:
            self.bodies.setdefault(operation, (params or {}, json))
        body = {"json": json} if json is not None else {"files": files, "data": data} if files is not None else {}
        response = self._http.request(method.upper(), url, params=query, headers=headers, **body)
        media = response.headers.get("content-type", "").partition(";")[0]
        if response.status_code != 200:
            self._note(operation, [f"answered {response.status_code}: {response.text[:300]}"])
            return response.json() if media == "application/json" else response.text
        if media == "text/event-stream":
            events = [
                line.removeprefix("data: ")
                for line in response.text.splitlines()
                if line.startswith("data: ") and line != "data: [DONE]"
            ]
            found = [_parse(event) for event in events]
            problems = [problem for event in found for problem in self._problems(operation, media, event)]
            self._note(operation, problems)
            return found
        if media != "application/json":
            self._note(operation, [])
            return response.content
        answer = response.json()
        if departure is not None:
            departure(answer)
        self._note(operation, self._problems(operation, media, answer))
        return answer

    def wait(self, path: str, until: Callable[[Any], bool]) -> Any:
        """What ``path`` answers once it is so; nothing of it is compared."""
        deadline = time.monotonic() + 300
        while not until(answer := self._http.get(f"/v1{path}").json()):
            assert time.monotonic() < deadline, answer
            time.sleep(0.2)
        return answer

    def _problems(self, operation: str, media: str, answer: Any) -> list[str]:
        key = f"{operation} {media}"
        if key not in self._validators:
            schema = self.specification["operations"][operation]["responses"].get(f"200 {media}", {})
            self._validators[key] = Draft202012Validator(
                {**schema, "components": {"schemas": self.specification["schemas"]}}
            )
        return [
            f"{'/'.join(map(str, error.instance_path)) or 'the whole'}: {error.message[:300]}"
            for error in self._validators[key].iter_errors(answer)
        ]

    def _note(self, operation: str, problems: list[str]) -> None:
        checked = self.checked.setdefault(operation, Checked(operation))
        checked.answers += 1
        checked.problems += problems[: MOST_PROBLEMS - len(checked.problems)]


def _parse(text: str) -> Any:
    return json.loads(text)
