"""What OpenAI has and Gale has not, with what to use instead: the 404 of such a URL says it."""

from __future__ import annotations

import re

_RETIRED = "OpenAI retired it"
# Beginnings of paths below /v1, the longest first where one begins another.
_INSTEAD = {
    "assistants": f"{_RETIRED}; use /v1/responses",
    "threads": f"{_RETIRED}; use /v1/conversations with /v1/responses",
    "edits": f"{_RETIRED}; use /v1/chat/completions",
    "engines": f"{_RETIRED}; use /v1/models",
    "answers": f"{_RETIRED}; use /v1/chat/completions",
    "classifications": f"{_RETIRED}; use /v1/moderations or /v1/decisions",
    "search": f"{_RETIRED}; use /v1/rerank",
    "fine-tunes": f"{_RETIRED}; use /v1/fine_tuning/jobs",
    "fine_tuning/alpha": "a job checks its grader when it is made: use /v1/fine_tuning/jobs",
    "fine_tuning/checkpoints": "checkpoints belong to their project: use /v1/fine_tuning/jobs/{id}/checkpoints",
    "images/variations": "there is no replacement",
    "videos": "there is no replacement",
    "responses/compact": "bring what is still needed as 'input'",
    "projects": "the roles are owner, member and reader, at /v1/organization/projects/{id}/users",
    "audio": "Gale does not speak or listen yet",
    "images": "Gale does not draw yet",
    "realtime": "Gale has no live sessions; use /v1/responses with 'stream': true",
    "containers": "there is no replacement",
    "skills": "there is no replacement",
    "chatkit": "Gale has its own page; programs use /v1/responses",
    "vector_stores": "Gale does not search documents yet; use /v1/embeddings and /v1/rerank",
    "evals": "use `gale eval` on the server's machine",
    "content_provenance_checks": "there is no replacement",
    "organization/certificates": "Gale serves plain HTTP; put TLS and client certificates into a proxy before it",
    "organization/invites": "add people at /v1/organization/users or with `gale admin user`",
    "organization/groups": "give roles at /v1/organization/projects/{id}/users",
    "organization/roles": "the roles are owner, member and reader, at /v1/organization/projects/{id}/users",
    "organization/spend_limit": "use /v1/organization/budgets",
    "organization/spend_alerts": "use /v1/organization/budgets",
    "organization/model_permissions": "give keys of their own models at /v1/organization/projects/{id}/api_keys",
    "organization/hosted_tool_permissions": "Gale calls no tools by itself",
    "organization/data_retention": "what is kept, and for how long, is the server's own setting",
    "organization/usage": "usage is kept for completions, embeddings and moderations",
}


def instead_of(path: str) -> str | None:
    """What to use instead of ``path``; None for what OpenAI does not have either."""
    below = path.removeprefix("/v1/") if path.startswith("/v1/") else ""
    # What a project has is what its organisation has.
    below = re.sub(r"^organization/projects/[^/]+/", "organization/", below)
    for beginning, text in _INSTEAD.items():
        if below == beginning or below.startswith(f"{beginning}/"):
            return text
    return None
