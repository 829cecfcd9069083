"""Chat data as people have it → the conversation schema: `python -m convert chat FILE --out …`.

ShareGPT           {"conversations": [{"from": "human|gpt", "value"}], "image(s)"?, "system"?}
Alpaca             {"instruction", "input"?, "output", "system"?}
prompt/completion  {"prompt", "completion" or "response"}, texts or lists of messages (TRL)
OpenAI messages    {"messages": [{"role", "content": text or parts}]}, images also as data: URLs

In jsonl, json or parquet. Images go to files beside the jsonl. Images that no `<image>` places
come before the first user turn. Tool calls have no place in the schema: dropped, counted.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from convert.releases import Drop, Row

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}


def turns_of(row: Row) -> list[tuple[str, Any]]:
    """(role, content) of each turn, whatever the format calls them."""
    turns = row.get("conversations") or row.get("messages")
    if not turns and "instruction" in row:
        question = "\n\n".join(t for t in (row["instruction"], row.get("input")) if t)
        rounds = [*(row.get("history") or []), (question, row["output"])]
        return [turn for texts in rounds for turn in zip(("user", "assistant"), texts)]
    if not turns and "prompt" in row:
        reply = row["completion"] if "completion" in row else row["response"]
        sides = (("user", row["prompt"]), ("assistant", reply))
        lists = [[{"role": role, "content": s}] if isinstance(s, str) else s for role, s in sides]
        turns = [turn for side in lists for turn in side or []]
    if not turns:
        fields = ", ".join(map(str, row))[:200]
        raise ValueError(f"not a chat format that is known here (fields: {fields}); see --help")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Drop("turns are not a list of objects")
    if any(turn.get("tool_calls") or turn.get("function_call") for turn in turns):
        raise Drop("tool calls: the schema has no place for them")
    return [(str(t.get("role", t.get("from"))), t.get("content", t.get("value"))) for t in turns]


def text_and_images(content: Any) -> tuple[str, list[Any]]:
    """A message's content as text with `<image>` for each image, and the images; None: an image
    that the row has in its `images`.

    >>> text_and_images([{"type": "image_url", "image_url": {"url": "a.png"}}, {"text": "What?"}])
    ('<image>What?', ['a.png'])
    """
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise Drop("a turn whose content is neither text nor parts", type(content).__name__)
    texts, images = [], []
    for part in content:
        if isinstance(part.get("text"), str):
            if "<image>" in part["text"]:
                raise Drop("literal <image> in a text part")
            texts.append(part["text"])
        elif part.get("type") in ("image", "image_url"):
            values = [part[key] for key in ("image_url", "image", "url", "path") if key in part]
            value = values[0] if values else None
            texts.append("<image>")
            images.append(value.get("url", value) if isinstance(value, dict) else value)
        else:
            raise Drop("a content part that is neither text nor image", str(part.get("type")))
    return "".join(texts), images


def chat(row: Row) -> dict:
    """One row of any of the formats → a row of the conversation schema."""
    messages, images = [], []
    for role, content in turns_of(row):
        role = ROLES.get(role.lower(), role.lower())
        if role not in ("system", "user", "assistant"):
            raise Drop("a turn that is not system, user or assistant", role[:40])
        text, in_parts = text_and_images(content)
        images += in_parts
        if role != "system" or text.strip():
            messages.append({"role": role, "content": text})
    if row.get("system") and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": str(row["system"])})
    given = row.get("images") or row.get("image") or []
    given = given if isinstance(given, list) else [given]
    if images:
        rest = iter(given)
        images = [next(rest, None) if image is None else image for image in images]
    elif given:
        images, users = given, [m for m in messages if m["role"] == "user"]
        if users and not any("<image>" in m["content"] for m in messages):
            users[0]["content"] = "<image>" * len(images) + users[0]["content"]
    made = {"messages": messages}
    if images:
        local = re.compile("(?!data:|https?:)").match
        made["images"] = [Path(i) if isinstance(i, str) and local(i) else i for i in images]
    return made
