"""The calls: every operation that Gale offers, in an order in which each finds what it needs.

Answers are wanted for their shape alone, so a tiny model with random weights gives them.
"""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import numpy as np

from tests.conformance.checker import Checker

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Lima"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
QUESTION = [{"role": "user", "content": "Where does the river go?"}]


def run(checker: Checker, model: str) -> None:
    """Make all the calls."""
    for part in PARTS:
        part(checker, model)


def models(checker: Checker, model: str) -> None:
    checker.call("get /models")
    for name in (model, "gale-moderation"):
        checker.call("get /models/{model}", params={"model": name})


def chat(checker: Checker, model: str) -> None:
    plain = {"model": model, "messages": QUESTION, "max_completion_tokens": 6}
    kinds: list[dict[str, Any]] = [
        {},
        {"n": 2, "logprobs": True, "top_logprobs": 2, "seed": 1, "temperature": 0.5, "top_p": 0.9},
        {"stop": ["."], "frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": {"7": 1}},
        {"tools": [TOOL], "tool_choice": "required", "max_completion_tokens": 60},
        {"response_format": {"type": "json_object"}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},
    ]
    for kind in kinds:
        checker.call("post /chat/completions", json={**plain, **kind})
        streamed = {**plain, **kind, "stream": True, "stream_options": {"include_usage": True}}
        checker.call("post /chat/completions", json=streamed)


def completions(checker: Checker, model: str) -> None:
    plain = {"model": model, "prompt": "The river goes", "max_tokens": 4}
    for kind in ({}, {"logprobs": 2, "n": 2}, {"prompt": ["The wind", "A door"]}):
        checker.call("post /completions", json={**plain, **kind})
    checker.call("post /completions", json={**plain, "echo": True, "logprobs": 2}, departure=_unscored_first_token)


def vectors(checker: Checker, model: str) -> None:
    for kind in ({}, {"input": ["a", "b"]}):
        checker.call("post /embeddings", json={"model": model, "input": "The wind", **kind})
    packed = {"model": model, "input": "The wind", "encoding_format": "base64"}
    checker.call("post /embeddings", json=packed, departure=_packed_vectors)


def moderations(checker: Checker, model: str) -> None:
    parts = [{"type": "text", "text": "The wind"}, {"type": "text", "text": "came"}]
    for given in ("The wind", ["a", "b"], parts):
        checker.call("post /moderations", json={"model": "omni-moderation-latest", "input": given})


def consumption(checker: Checker, model: str) -> None:
    """What the calls before used, and limits on those to come."""
    day = {"start_time": int(time.time()) - 3600, "group_by": ["project_id", "model"]}
    for kind in ("completions", "embeddings", "moderations"):
        checker.call(f"get /organization/usage/{kind}", query={**day, "bucket_width": "1m"})
    checker.call("get /organization/costs", query={**day, "group_by": "line_item"})
    project = {"project_id": "proj_default"}
    checker.call("get /organization/projects/{project_id}/rate_limits", params=project)
    checker.call(
        "post /organization/projects/{project_id}/rate_limits/{rate_limit_id}",
        params={**project, "rate_limit_id": "rl-*"},
        json={"max_requests_per_1_minute": 100_000, "max_requests_per_1_day": 10_000_000},
    )


def administration(checker: Checker, model: str) -> None:
    key = {"key_id": checker.call("post /organization/admin_api_keys", json={"name": "second"})["id"]}
    checker.call("get /organization/admin_api_keys")
    checker.call("get /organization/admin_api_keys/{key_id}", params=key)
    checker.call("delete /organization/admin_api_keys/{key_id}", params=key)
    user = {"user_id": checker.call("get /organization/users")["data"][0]["id"]}
    checker.call("get /organization/users/{user_id}", params=user)
    checker.call("post /organization/users/{user_id}", params=user, json={"role": "owner"})
    project = {"project_id": checker.call("post /organization/projects", json={"name": "p"})["id"]}
    one = "/organization/projects/{project_id}"
    checker.call("get /organization/projects")
    checker.call(f"get {one}", params=project)
    checker.call(f"post {one}", params=project, json={"name": "q"})
    member = {**project, **user}
    checker.call(f"post {one}/users", params=project, json={**user, "role": "member"})
    checker.call(f"get {one}/users", params=project)
    checker.call(f"get {one}/users/{{user_id}}", params=member)
    checker.call(f"post {one}/users/{{user_id}}", params=member, json={"role": "owner"})
    checker.call(f"delete {one}/users/{{user_id}}", params=member)
    made = checker.call(f"post {one}/service_accounts", params=project, json={"name": "robot"})
    account = {**project, "service_account_id": made["id"]}
    checker.call(f"get {one}/service_accounts", params=project)
    checker.call(f"get {one}/service_accounts/{{service_account_id}}", params=account)
    checker.call(f"post {one}/service_accounts/{{service_account_id}}", params=account, json={"name": "r"})
    checker.call(f"post {one}/service_accounts/{{service_account_id}}/api_keys", params=account, json={"name": "k"})
    keys = checker.call(f"get {one}/api_keys", params=project)["data"]
    key = {**project, "api_key_id": keys[0]["id"]}
    checker.call(f"get {one}/api_keys/{{api_key_id}}", params=key)
    checker.call(f"delete {one}/api_keys/{{api_key_id}}", params=key)
    checker.call(f"delete {one}/service_accounts/{{service_account_id}}", params=account)
    checker.call(f"post {one}/archive", params=project)
    checker.call("get /organization/audit_logs", departure=_own_events)


def _own_events(answer: Any) -> None:
    """What was done to fine-tuning jobs stands in the audit log, of which types the document does not know."""
    for event in answer["data"]:
        if event["type"].startswith(("fine_tuning_job.", "fine_tuned_model.")):
            event["type"] = "resource.deleted"


def _unscored_first_token(answer: Any) -> None:
    """The first token of an echoed prompt has no score: null, which the document does not allow."""
    for choice in answer["choices"]:
        for name in ("token_logprobs", "top_logprobs"):
            assert choice["logprobs"][name].pop(0) is None


def _packed_vectors(answer: Any) -> None:
    """With base64 a vector is a string, of which the document does not speak."""
    for row in answer["data"]:
        row["embedding"] = np.frombuffer(base64.b64decode(row["embedding"]), "<f4").tolist()


def responses(checker: Checker, model: str) -> None:
    function = {"type": "function", **TOOL["function"], "strict": True}
    plain = {"model": model, "input": "Where does the river go?", "max_output_tokens": 16}
    first = checker.call("post /responses", json=plain)
    output = {"type": "function_call_output", "call_id": "call_1", "output": "Rain"}
    call = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city": "Oslo"}'}
    kinds: list[dict[str, Any]] = [
        {"previous_response_id": first["id"], "instructions": "Be brief.", "metadata": {"a": "b"}},
        {"tools": [function], "tool_choice": "required", "max_output_tokens": 60},
        {"tools": [function], "input": [{"role": "user", "content": "Oslo?"}, call, output]},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "temperature": 0.5},
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}}},
    ]
    for kind in kinds:
        checker.call("post /responses", json={**plain, **kind})
        checker.call("post /responses", json={**plain, **kind, "stream": True})
    one = {"response_id": first["id"]}
    checker.call("get /responses/{response_id}", params=one)
    checker.call("get /responses/{response_id}/input_items", params=one)
    checker.call("post /responses/input_tokens", json={"model": model, "input": "Where does the river go?"})
    background = checker.call("post /responses", json={**plain, "background": True, "max_output_tokens": 500})
    checker.call("post /responses/{response_id}/cancel", params={"response_id": background["id"]})
    checker.call("delete /responses/{response_id}", params=one)


def conversations(checker: Checker, model: str) -> None:
    message = {"type": "message", "role": "user", "content": "Hello"}
    one = {"conversation_id": checker.call("post /conversations", json={"items": [message]})["id"]}
    checker.call("get /conversations/{conversation_id}", params=one)
    checker.call("post /conversations/{conversation_id}", params=one, json={"metadata": {"a": "b"}})
    checker.call("post /conversations/{conversation_id}/items", params=one, json={"items": [message]})
    body = {"model": model, "input": "And?", "conversation": one["conversation_id"], "max_output_tokens": 16}
    checker.call("post /responses", json=body)
    items = checker.call("get /conversations/{conversation_id}/items", params=one)["data"]
    item = {**one, "item_id": items[0]["id"]}
    checker.call("get /conversations/{conversation_id}/items/{item_id}", params=item)
    checker.call("delete /conversations/{conversation_id}/items/{item_id}", params=item)
    checker.call("delete /conversations/{conversation_id}", params=one)


def files(checker: Checker, model: str) -> None:
    one = {"file_id": upload(checker, [{"custom_id": "1"}], "user_data")}
    checker.call("get /files")
    checker.call("get /files/{file_id}", params=one)
    checker.call("get /files/{file_id}/content", params=one)
    checker.call("delete /files/{file_id}", params=one)


def uploads(checker: Checker, model: str) -> None:
    about = {"filename": "a.jsonl", "purpose": "user_data", "bytes": 4, "mime_type": "text/jsonl"}
    one = {"upload_id": checker.call("post /uploads", json=about)["id"]}
    part = checker.call("post /uploads/{upload_id}/parts", params=one, files={"data": ("part", b"{}\n\n")})
    checker.call("post /uploads/{upload_id}/complete", params=one, json={"part_ids": [part["id"]]})
    other = {"upload_id": checker.call("post /uploads", json=about)["id"]}
    checker.call("post /uploads/{upload_id}/cancel", params=other)


def batches(checker: Checker, model: str) -> None:
    body = {"model": model, "messages": QUESTION, "max_tokens": 2}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    asked = {"input_file_id": upload(checker, [line], "batch"), "endpoint": line["url"], "completion_window": "24h"}
    one = {"batch_id": checker.call("post /batches", json=asked)["id"]}
    checker.call("get /batches")
    checker.call("get /batches/{batch_id}", params=one)
    many = {**asked, "input_file_id": upload(checker, [{**line, "custom_id": str(n)} for n in range(500)], "batch")}
    other = {"batch_id": checker.call("post /batches", json=many)["id"]}
    checker.call("post /batches/{batch_id}/cancel", params=other)


def _paused(answer: Any) -> None:
    """A paused job is paused, of which state the document does not know."""
    assert answer["status"] == "paused"
    answer["status"] = "queued"


def fine_tuning(checker: Checker, model: str) -> None:
    row = {"messages": [*QUESTION, {"role": "assistant", "content": "To the sea."}]}
    file = upload(checker, [row] * 10, "fine-tune")
    knobs = {"n_epochs": 50, "batch_size": 1, "learning_rate_multiplier": 0.5}
    body = {
        "model": model,
        "training_file": file,
        "validation_file": file,
        "method": {"type": "supervised", "supervised": {"hyperparameters": knobs}},
        "suffix": "sea",
        "seed": 1,
        "metadata": {"a": "b"},
    }
    one = {"fine_tuning_job_id": checker.call("post /fine_tuning/jobs", json=body)["id"]}
    checker.call("post /fine_tuning/jobs/{fine_tuning_job_id}/pause", params=one, departure=_paused)
    checker.call("post /fine_tuning/jobs/{fine_tuning_job_id}/resume", params=one)
    checker.call("get /fine_tuning/jobs/{fine_tuning_job_id}", params=one)
    checker.call("get /fine_tuning/jobs/{fine_tuning_job_id}/events", params=one)
    checker.call("get /fine_tuning/jobs/{fine_tuning_job_id}/checkpoints", params=one)
    checker.call("post /fine_tuning/jobs/{fine_tuning_job_id}/pause", params=one, departure=_paused)
    checker.call("post /fine_tuning/jobs/{fine_tuning_job_id}/resume", params=one)
    checker.call("post /fine_tuning/jobs/{fine_tuning_job_id}/cancel", params=one)
    checker.call("get /fine_tuning/jobs")
    short = {**body, "method": {"type": "supervised", "supervised": {"hyperparameters": {**knobs, "n_epochs": 1}}}}
    short_id = checker.call("post /fine_tuning/jobs", json=short)["id"]
    done = checker.wait(f"/fine_tuning/jobs/{short_id}", lambda job: job["finished_at"] is not None)
    checker.call("delete /models/{model}", params={"model": done["fine_tuned_model"]})


def upload(checker: Checker, rows: list[dict[str, Any]], purpose: str) -> str:
    content = "\n".join(map(json.dumps, rows)).encode()
    made = checker.call("post /files", files={"file": ("rows.jsonl", content)}, data={"purpose": purpose})
    return str(made["id"])


PARTS = (
    models,
    chat,
    completions,
    vectors,
    moderations,
    responses,
    conversations,
    files,
    uploads,
    batches,
    fine_tuning,
    consumption,
    administration,
)
