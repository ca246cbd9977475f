"""A tokenizer's chat template: messages become the text that the model has learned to go on from."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from engine.data.conversations import SPEAKERS, Conversation, Unusable
from engine.errors import UserError

_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Those that templates have; some have more, which they name."""
_A_DAY = datetime(2024, 7, 26)  # what Llama 3's own template falls back to


def read_template(path: str) -> str:
    """The template of a file (`data.chat_template`). Raises `UserError` where it is missing or not UTF-8 text."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(f"data.chat_template: {path}: {reason}") from None


def use_template(tokenizer: Any, path: str | None) -> None:
    """Gives mlx-lm's tokenizer the template of a file, instead of its own where it has one; as `read_template`."""
    if path is None:
        return
    template = read_template(path)
    tokenizer.chat_template = template
    tokenizer.has_chat_template = True
    tokenizer._chat_template = None  # one of mlx-lm's own, written in Python


class ChatTemplate:
    """The template of mlx-lm's tokenizer, with a clear line where it refuses a conversation.

    A template that writes today's date is given one day of its own: else the same rows would be others tomorrow.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.has_chat_template:
            raise UserError(
                "data: the tokenizer has no chat template, which messages need; give one as a file in "
                'data.chat_template, or rows of plain text and data.format = "text"'
            )
        self._apply = tokenizer.apply_chat_template
        self._given: dict[str, Any] = {}
        self._source = str(template := tokenizer.chat_template)
        if isinstance(template, str) and _TODAY.search(template):
            self._given["chat_template"] = _TODAY.sub(lambda call: repr(_A_DAY.strftime(call[2])), template)

    def render(self, conversation: Conversation, upto: int | None = None, *, asking: bool = False) -> str:
        """The text of the first `upto` messages, of all by default.

        `asking` adds what an answer begins with. Raises `Unusable` where the template refuses the conversation, and
        `UserError` where it is no template.
        """
        try:
            return self._apply(
                conversation.messages[:upto],
                tools=conversation.tools,
                add_generation_prompt=asking,
                tokenize=False,
                **self._given,
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"data: the chat template is not valid Jinja: line {error.lineno}: {error}") from None
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
            raise Unusable(conversation.origin, "the chat template refuses it", error) from None

    def whole(self, conversation: Conversation) -> str:
        """`render` of all messages, whose roles are looked at first."""
        self._check_roles(conversation)
        try:
            return self.render(conversation)
        except Unusable:  # one without a place for tool calls may stumble over an answer that is nothing else
            messages = [
                {**message, "content": message.get("content") or ""} if message.get("tool_calls") else message
                for message in conversation.messages
            ]
            if messages != conversation.messages:
                filled = replace(conversation, messages=messages)
                self.ignored(filled, self.render(filled))
            raise

    def _check_roles(self, conversation: Conversation) -> None:
        """Raises `Unusable` for a role that neither is common nor named in the template: most would write any."""
        for place, message in enumerate(conversation.messages, start=1):
            role = message["role"]
            if role in _ROLES or re.search(rf"""["']{re.escape(role)}["']""", self._source):
                continue
            close = SPEAKERS.get(role.lower()) or next(iter(difflib.get_close_matches(role.lower(), _ROLES, n=1)), None)
            nearest = f"; did you mean {close!r}?" if close else ""
            known = f"message {place}; known are {', '.join(_ROLES)}{nearest}"
            raise Unusable(conversation.origin, f"the chat template knows no role {role!r}", known)

    def ignored(self, conversation: Conversation, whole: str) -> set[str]:
        """What it writes nothing of: the text, `whole`, is the same without it.

        Raises `Unusable` where nothing is left of an answer.
        """
        found = set()
        if conversation.tools and self._is_without(whole, replace(conversation, tools=None)):
            found.add("tools")
        for place, message in enumerate(conversation.messages):
            if not message.get("tool_calls"):
                continue
            messages = list(conversation.messages)
            messages[place] = {key: value for key, value in message.items() if key != "tool_calls"}
            if self._is_without(whole, replace(conversation, messages=messages)):
                found.add("tool_calls")
                if message["role"] == "assistant" and not (message.get("content") or "").strip():
                    reason = "the chat template has no place for tool_calls: the answer is empty"
                    raise Unusable(conversation.origin, reason, f"message {place + 1}")
        return found

    def _is_without(self, whole: str, less: Conversation) -> bool:
        try:
            return self.render(less) == whole
        except Unusable:
            return False

    def around(self, conversation: Conversation, whole: str, place: int) -> tuple[str, str]:
        """The text before the answer that is message `place`, and the text up to its end.

        The first is the template's prompt for an answer, as far as the whole conversation goes on so too; the second
        may end otherwise than the whole goes on. Raises `UserError` where the template writes the beginning of a
        conversation otherwise than the whole.
        """
        last = place == len(conversation.messages) - 1
        end = whole if last else self.render(conversation, place + 1)
        before = self.render(conversation, place, asking=True)
        told_apart = whole.startswith(before)
        if not told_apart:  # a prompt may hold more, such as the beginning of a thought
            bare, before = self.render(conversation, place), _common(whole, before)
            told_apart = whole.startswith(bare) and len(before) > len(bare)
        if told_apart and not whole.startswith(end):  # what ends here may be closed, as with an end of text
            content = (conversation.messages[place].get("content") or "").strip()
            told_apart = bool(content) and content in _common(whole, end)[len(before) :]
        if not told_apart:
            raise UserError(
                f"{conversation.origin}: the chat template writes the beginning up to message {place + 1} otherwise "
                "than the whole conversation, so that answer cannot be told apart; "
                f'set data.loss_on = "{"all" if last else "last-answer"}"'
            )
        return before, end


def _common(one: str, other: str) -> str:
    """What both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))]
