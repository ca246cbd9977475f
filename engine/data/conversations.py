"""What a row means: plain text, or messages. Every format ends as one of the two."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from engine.data.rows import Row, what_is_wrong
from engine.errors import UserError
from engine.profile_lora import ChatData


@dataclass(frozen=True)
class PlainText:
    """`answer_from`: the character that the answer begins at; 0 where all of it is learned."""

    text: str
    origin: str
    answer_from: int = 0


@dataclass(frozen=True)
class Conversation:
    """Messages with `role` and `content`, and the tools that they may call, as chat templates take them."""

    messages: list[dict[str, Any]]
    origin: str
    tools: list[Any] | None = None


class Unusable(UserError):
    """A row that cannot be learned from, for what it says and not for want of its keys."""

    def __init__(self, origin: str, reason: str, detail: object = None) -> None:
        super().__init__(f"{origin}: {reason}{f' ({detail})' if detail else ''}; mend the row or take it out")
        self.reason = reason
        self.origin = origin


@dataclass
class LeftOut:
    """Rows that are not learned, by their reason: where each came from.

    An unusable row of the user's own is an error; those of others' data, which cannot be mended, are left out.
    """

    lenient: bool
    origins: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, reason: str, origin: str) -> None:
        self.origins[reason].append(origin)

    def judge(self, error: Unusable) -> None:
        if not self.lenient:
            raise error
        self.add(error.reason, error.origin)


Given = TypeVar("Given")
Made = TypeVar("Made")

SPEAKERS = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Names that data sets have for roles, and the role that each of them is."""
_SHAREGPT = "conversations"
_OASST = ("message_id", "parent_id", "role", "text")
_ALPACA = ("instruction", "output")
_INSTRUCTION = re.compile(r"(?:</s>)?\s*(?:<s>)?\s*\[INST\]")
_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>(.*)", re.DOTALL)
_EMPTY = "the answer is empty"


def keys_of(data: ChatData) -> set[str]:
    """All keys that a row of any format may be read by."""
    own = {data.text_key, data.messages_key, data.prompt_key, data.completion_key}
    return own | {*_OASST, *_ALPACA, _SHAREGPT} | {"system", "tools", "input", "rank", "deleted"}


def format_of(row: Row, data: ChatData) -> str:
    """The format that is asked for, or the one that the keys of the first row say.

    Raises `UserError` where they say none.
    """
    if data.format != "auto":
        return data.format
    keys = row.values
    if data.prompt_key in keys and data.completion_key in keys:
        return "completion"
    if _is_sharegpt(keys.get(data.messages_key)) or _is_sharegpt(keys.get(_SHAREGPT)):
        return "sharegpt"
    if data.messages_key in keys:
        return "messages"
    if all(key in keys for key in ("message_id", "role", "text")):
        return "oasst"
    if all(key in keys for key in _ALPACA):
        return "alpaca"
    if data.text_key in keys:
        text = keys[data.text_key]
        return "llama2" if isinstance(text, str) and re.match(r"\s*(<s>)?\s*\[INST\]", text) else "text"
    if isinstance(keys.get(_SHAREGPT), list):
        raise UserError(
            f"{row.origin}: {_SHAREGPT!r} holds no messages with from and value (ShareGPT); "
            f'where they have role and content, set data.messages_key = "{_SHAREGPT}"'
        )
    raise UserError(
        f"{row.origin}: its keys ({_listed(keys)}) say no format; a row has text, messages, prompt and completion, "
        "or instruction and output; other names are given in data.text_key and its like"
    )


def conversations(
    rows: Iterable[Row], data: ChatData, format: str, left_out: LeftOut
) -> list[PlainText] | list[Conversation]:
    """What the rows mean in a format. Raises `UserError` with file and line for a row that is not of it."""
    if format == "text":
        return _each(rows, lambda row: _plain(row, data), left_out)
    if format == "oasst":
        read = _trees(rows, left_out)
    else:
        read = _each(rows, lambda row: _READERS[format](row, data), left_out)
    return _each(read, lambda conversation: _with_answers(conversation, data), left_out)


def _each(given: Iterable[Given], make: Callable[[Given], Made], left_out: LeftOut) -> list[Made]:
    made = []
    for entry in given:
        try:
            made.append(make(entry))
        except Unusable as error:
            left_out.judge(error)
    return made


def _plain(row: Row, data: ChatData) -> PlainText:
    text = _text(row, data.text_key)
    if not text.strip():
        raise Unusable(row.origin, "the text is empty")
    if data.loss_on == "all":
        return PlainText(text, row.origin)
    marker = data.answer_after
    if not marker:
        raise UserError(f'{row.origin}: is plain text; loss_on = "{data.loss_on}" then needs data.answer_after')
    place = text.rfind(marker) if data.loss_on == "last-answer" else text.find(marker)
    if place < 0:
        raise UserError(f"{row.origin}: has no {marker!r} (data.answer_after), so it is not said where its answer is")
    start = place + len(marker)
    if not text[start:].strip():
        raise Unusable(row.origin, _EMPTY)
    return PlainText(text, row.origin, answer_from=start)


def _with_answers(conversation: Conversation, data: ChatData) -> Conversation:
    """Checks that every answer says something, and that there is one where it alone is learned."""
    messages, origin = conversation.messages, conversation.origin
    answers = [message for message in messages if message["role"] == "assistant"]
    for message in answers:
        if not (message.get("content") or "").strip() and not message.get("tool_calls"):
            raise Unusable(origin, _EMPTY)
    if data.loss_on != "all":
        if not answers:
            raise Unusable(origin, "there is no answer (no message of the role assistant)")
        if data.loss_on == "last-answer" and messages[-1] is not answers[-1]:
            raise Unusable(origin, "the last message is not the assistant's")
        if messages[0] is answers[0 if data.loss_on == "answers" else -1]:
            raise Unusable(origin, "it begins with an answer, before anything was asked")
    return conversation


def _of_messages(row: Row, data: ChatData) -> Conversation:
    key = data.messages_key
    messages = _value(row, key)
    if not isinstance(messages, list):
        raise UserError(f"{row.origin}: {key!r} is {type(messages).__name__}, not a list of messages")
    if not messages:
        raise Unusable(row.origin, "there are no messages")
    for place, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f'{row.origin}: message {place} should be {{"role": "…", "content": "…"}}')
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            if content is None and "content" in message and message["role"] == "assistant":
                raise Unusable(row.origin, _EMPTY)
            what = "missing" if content is None else f"{type(content).__name__}, not a string"
            raise UserError(f"{row.origin}: message {place}: its content is {what}")
    return Conversation(messages, row.origin, _tools(row))


def _is_sharegpt(messages: Any) -> bool:
    return isinstance(messages, list) and bool(messages) and isinstance(messages[0], dict) and "from" in messages[0]


def _of_sharegpt(row: Row, data: ChatData) -> Conversation:
    """Messages with `from` and `value`, under `conversations` or the profile's key; `system` may be beside them."""
    key = data.messages_key if data.messages_key in row.values else _SHAREGPT
    given = _value(row, key)
    if not isinstance(given, list):
        raise UserError(f"{row.origin}: {key!r} is {type(given).__name__}, not a list of messages")
    if not given:
        raise Unusable(row.origin, "there are no messages")
    messages = []
    if row.values.get("system") is not None and _text(row, "system").strip():
        messages.append({"role": "system", "content": row.values["system"]})
    for place, message in enumerate(given, start=1):
        if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
            raise UserError(f'{row.origin}: message {place} should be {{"from": "…", "value": "…"}}')
        speaker, content = message["from"], message["value"]
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            known = f"message {place}; known are {', '.join(SPEAKERS)}"
            raise Unusable(row.origin, f"from = {speaker!r} is no speaker that is known", known)
        if not isinstance(content, str):
            raise UserError(f"{row.origin}: message {place}: its value is {type(content).__name__}, not a string")
        messages.append({"role": SPEAKERS[speaker], "content": content})
    return Conversation(messages, row.origin, _tools(row))


def _of_completion(row: Row, data: ChatData) -> Conversation:
    return _asked(row, _text(row, data.prompt_key), _text(row, data.completion_key))


def _of_alpaca(row: Row, data: ChatData) -> Conversation:
    instruction = _text(row, "instruction")
    more = _text(row, "input") if row.values.get("input") is not None else ""
    return _asked(row, f"{instruction}\n\n{more}" if more.strip() else instruction, _text(row, "output"))


def _asked(row: Row, question: str, answer: str) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(messages, row.origin, _tools(row))


def _of_llama2(row: Row, data: ChatData) -> Conversation:
    """`<s>[INST] <<SYS>>…<</SYS>> question [/INST] answer </s><s>[INST] …`, as Llama 2's template wrote it."""
    before, *turns = _INSTRUCTION.split(_text(row, data.text_key))
    if before.strip() or not turns:
        raise Unusable(row.origin, "does not begin with [INST], as <s>[INST] question [/INST] answer </s> does")
    messages: list[dict[str, Any]] = []
    for turn in turns:
        question, closed, answer = turn.partition("[/INST]")
        if not closed:
            raise Unusable(row.origin, "an [INST] has no [/INST] between question and answer")
        if not messages and (system := _SYSTEM.fullmatch(question)):
            messages.append({"role": "system", "content": system[1].strip()})
            question = system[2]
        messages.append({"role": "user", "content": question.strip()})
        messages.append({"role": "assistant", "content": answer.strip().removesuffix("</s>").strip()})
    return Conversation(messages, row.origin)


_READERS: Mapping[str, Callable[[Row, ChatData], Conversation]] = {
    "messages": _of_messages,
    "sharegpt": _of_sharegpt,
    "completion": _of_completion,
    "alpaca": _of_alpaca,
    "llama2": _of_llama2,
}
_ROLES = {"prompter": "user", "assistant": "assistant"}


def _trees(rows: Iterable[Row], left_out: LeftOut) -> list[Conversation]:
    """Of each tree of OpenAssistant's messages the best path: at every message its best-ranked reply, up to an answer.

    Rank 0 is the best; replies without one come after those with; equals in the order of the file. Deleted messages
    are not there. A message whose parent is not among the rows is unreachable, and belongs to no conversation.
    """
    replies: dict[str | None, list[Row]] = defaultdict(list)
    seen: set[str] = set()
    for row in rows:
        _text(row, "text")
        name, parent = _text(row, "message_id"), row.values.get("parent_id")
        if name in seen:
            raise UserError(f"{row.origin}: message_id {name!r} is there twice")
        if parent is not None and not isinstance(parent, str):
            raise UserError(f"{row.origin}: 'parent_id' is {type(parent).__name__}, not a string")
        if _text(row, "role") not in _ROLES:
            raise UserError(f"{row.origin}: role is {row.values['role']!r}, not {' or '.join(_ROLES)}")
        seen.add(name)
        if not row.values.get("deleted"):
            replies[parent].append(row)

    found = []
    for root in replies[None]:
        path = [root]
        while following := replies.get(path[-1].values["message_id"]):
            path.append(min(following, key=_rank))
        while path and path[-1].values["role"] != "assistant":
            path.pop()
        if path:
            messages = [{"role": _ROLES[row.values["role"]], "content": row.values["text"]} for row in path]
            found.append(Conversation(messages, root.origin))
        else:
            left_out.add("nobody answered", root.origin)
    return found


def _rank(row: Row) -> float:
    rank = row.values.get("rank")
    return rank if isinstance(rank, int | float) else float("inf")


def _tools(row: Row) -> list[Any] | None:
    tools = row.values.get("tools")
    if isinstance(tools, str):  # tables without nested columns hold them so
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise UserError(f"{row.origin}: 'tools' is not valid JSON ({what_is_wrong(error)})") from None
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{row.origin}: 'tools' is {type(tools).__name__}, not a list of tools")
    return tools or None


def _value(row: Row, key: str) -> Any:
    if key not in row.values:
        raise UserError(f"{row.origin}: has no key {key!r}; its keys are {_listed(row.values)}")
    return row.values[key]


def _text(row: Row, key: str) -> str:
    value = _value(row, key)
    if value is None:
        raise Unusable(row.origin, f"{key!r} is null")
    if not isinstance(value, str):
        raise UserError(f"{row.origin}: {key!r} is {type(value).__name__}, not a string")
    return value


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(list(keys)[:12]) or "none"
