"""Chat data as people have it → the conversation schema: `python -m convert chat FILE --out …`.

ShareGPT           {"conversations": [{"from": "human|gpt", "value"}], "image(s)"?, "system"?}
Alpaca             {"instruction", "input"?, "output", "history"?, "system"?}
prompt/completion  {"prompt", "completion" or "response"}, texts or lists of messages (TRL)
OpenAI messages    {"messages": [{"role", "content": text or parts}]}, images also as data: URLs

In jsonl, json, csv or parquet. Images go to files beside the jsonl. An image that no `<image>`
places comes before the first user turn. Tool calls have no place in the schema: dropped, counted.
"""

from __future__ import annotations

import json
from typing import Any

from convert.releases import Context, Drop, Row
from core.formats import chat_format

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ROLES |= {"model": "assistant", "developer": "system"}


def text_and_images(content: Any) -> tuple[str, list[Any]]:
    """A message's content as text with `<image>` for each image, and the images.

    >>> text_and_images([{"type": "image_url", "image_url": {"url": "a.png"}}, {"text": "What?"}])
    ('<image>What?', ['a.png'])
    """
    if content is None:
        raise Drop("a turn without content (a tool call?)")
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise Drop("content is neither text nor a list of parts", type(content).__name__)
    texts, images = [], []
    for part in content:
        if isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str)):
            text = part if isinstance(part, str) else part["text"]
            if "<image>" in text:
                raise Drop("literal <image> in a text part")
            texts.append(text)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("image", "image_url", "input_image"):
            raise Drop("a content part that is neither text nor image", str(kind or part)[:40])
        value = part.get("image_url") or part.get("image") or part.get("url") or part.get("path")
        if isinstance(value, dict) and "url" in value:
            value = value["url"]
        texts.append("<image>")
        images.append(value)  # None: it is in the row's `images`
    return "".join(texts), images


def turns_of(row: Row) -> list[tuple[str, Any]]:
    """(role, content) of each turn, whatever the format calls them."""
    name = chat_format(row)
    if name == "Alpaca":
        question = "\n\n".join(t for t in (row["instruction"], row.get("input")) if t)
        before = [
            turn for pair in row.get("history") or [] for turn in zip(("user", "assistant"), pair)
        ]
        return [*before, ("user", question), ("assistant", row["output"])]
    if name == "prompt/completion":
        reply = row["completion"] if "completion" in row else row["response"]
        sides = (("user", row["prompt"]), ("assistant", reply))
        lists = [[{"role": role, "content": s}] if isinstance(s, str) else s for role, s in sides]
        turns = [turn for side in lists for turn in side or []]
    else:
        turns = row.get("conversations") or row.get("conversation") or row["messages"]
    if isinstance(turns, str):  # a list written as JSON into a column of text
        turns = json.loads(turns)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Drop("turns are not a list of objects")
    if any(turn.get("tool_calls") or turn.get("function_call") for turn in turns):
        raise Drop("tool calls: the schema has no place for them")
    return [(str(t.get("role", t.get("from"))), t.get("content", t.get("value"))) for t in turns]


def chat(row: Row, i: int, ctx: Context) -> dict:
    """One row of any of the formats → a row of the conversation schema."""
    if not {"conversations", "conversation", "messages", "instruction", "prompt"} & row.keys():
        fields = ", ".join(map(str, row))[:200]
        raise ValueError(f"not a chat format that is known here (fields: {fields}); see --help")
    messages, images = [], []
    for role, content in turns_of(row):
        role = ROLES.get(role.lower(), role.lower())
        if role not in ("system", "user", "assistant"):
            raise Drop("a turn that is not system, user or assistant", role[:40])
        text, here = text_and_images(content)
        images += here
        if role == "system" and not text.strip():
            continue
        messages.append({"role": role, "content": text})
    if row.get("system") and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": str(row["system"])})
    given = row.get("images") or row.get("image") or []
    given = given if isinstance(given, list) else [given]
    if images and any(image is None for image in images):
        rest = iter(given)
        images = [next(rest, None) if image is None else image for image in images]
    elif given:
        images = given
        if images and not any("<image>" in m["content"] for m in messages):
            first = next((m for m in messages if m["role"] == "user"), None)
            if first is None:
                raise Drop("images without a user turn")
            first["content"] = "<image>" * len(images) + first["content"]
    made = {"messages": messages}
    if images:
        made["images"] = [ctx.image(on_disk(image, ctx)) for image in images]
    return made


def on_disk(image: Any, ctx: Context) -> Any:
    """The bytes of a path, absolute or relative to the user's file; anything else as it is."""
    if isinstance(image, str) and not image.startswith("data:") and len(image) < 1000:
        for root in ctx.source.roots:
            if (root / image).is_file():
                return (root / image).read_bytes()
    return image
