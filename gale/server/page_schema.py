"""What the chat page sends and receives: bodies in, dictionaries out. Times are whole seconds since 1970."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from gale.platform.conversations import Conversation, StoredMessage

MOST_TITLE_CHARACTERS = 200


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class NewConversation(_Body):
    """Nothing to say about a new conversation yet."""


class ConversationChange(_Body):
    """A new name, another branch on show, or both."""

    title: Annotated[Text, Field(max_length=MOST_TITLE_CHARACTERS)] | None = None
    leaf_id: str | None = None


class NewTurn(_Body):
    """A question (``parent_id`` null: the first; absent: after what is on show), or a message to answer again."""

    content: Text | None = None
    parent_id: str | None = None
    regenerate: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> NewTurn:
        if (self.content is None) == (self.regenerate is None):
            raise ValueError("give either 'content' or 'regenerate'")
        return self

    @property
    def after_leaf(self) -> bool:
        """Whether the question continues whatever is on show."""
        return "parent_id" not in self.model_fields_set


def conversation_json(conversation: Conversation) -> dict[str, Any]:
    """A conversation without messages."""
    return {
        "id": conversation.id,
        "title": conversation.title,
        "created_at": conversation.created_at // 1_000_000,
        "updated_at": conversation.updated_at // 1_000_000,
        "leaf_id": conversation.leaf_id,
    }


def message_json(message: StoredMessage, status: str | None = None) -> dict[str, Any]:
    """A message; ``status`` overrides the stored one."""
    return {
        "id": message.id,
        "parent_id": message.parent_id,
        "role": message.role,
        "content": message.content,
        "status": status or message.status,
        "model": message.model,
        "created_at": message.created_at // 1_000_000,
    }
