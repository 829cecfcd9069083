"""Chat templates: a conversation → the text that the model sees, and which of it is supervised.

tokenizer = load_tokenizer(model_dir)
for text, supervised in chat_segments(row["messages"], tokenizer): ...
"""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import TemplateError

from core.files import read_json


def load_tokenizer(model_dir: str | Path):
    """The model's own tokenizer with its chat template; no code from the directory is run."""
    from transformers import AutoTokenizer

    model_dir = Path(model_dir)
    if not any((model_dir / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        what = "no tokenizer.json" if model_dir.is_dir() else "no such model directory"
        raise ValueError(f"{model_dir}: {what}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    except Exception as e:  # transformers and tokenizers raise a dozen kinds of exceptions
        raise ValueError(f"{model_dir}: its tokenizer does not load ({e}); fetch it again") from e
    older, config = model_dir / "chat_template.json", model_dir / "config.json"
    if tokenizer.chat_template is None and older.is_file():
        tokenizer.chat_template = read_json(older)["chat_template"]
    if tokenizer.chat_template is None:
        raise ValueError(f"{model_dir}: no chat template; start from an instruct model")
    raw = read_json(config) if config.is_file() else {}
    size = raw.get("text_config", raw).get("vocab_size", len(tokenizer))
    if len(tokenizer) > size:
        raise ValueError(
            f"{model_dir}: the tokenizer has {len(tokenizer)} tokens, but config.json a vocab_size "
            f"of {size}: they belong to different models"
        )
    return tokenizer


def with_image_parts(text: str) -> str | list[dict]:
    """ "a <image> b" → [text "a ", image, text " b"]; a text without images stays a string,
    because the templates of text-only models know no parts."""
    if "<image>" not in text:
        return text
    parts = [p for p in re.split("(<image>)", text) if p]
    return [{"type": "image"} if p == "<image>" else {"type": "text", "text": p} for p in parts]


def opens_thought(tokenizer) -> bool:
    """Whether the chat template ends the prompt with <think>, so that completions begin inside."""
    chat = [{"role": "user", "content": "x"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return prompt.rstrip().endswith("<think>")


def chat_message(message: dict, tokenizer) -> dict:
    """A message as the chat template takes it: images as parts, and a thought where it belongs.

    Templates that write <think> themselves (Qwen3 hybrid, Qwen3-VL Thinking) know the field
    reasoning_content: "<think>a</think>b" → content "b", reasoning_content "a". The others
    (Qwen2.5-VL, Qwen3-VL Instruct) get the turn as it stands.
    """
    role, text = message["role"], message["content"]
    thought, closed, answer = text.partition("</think>")
    thought = thought.strip().removeprefix("<think>").strip()
    if role == "assistant" and closed and "reasoning_content" in tokenizer.get_chat_template():
        return {"role": role, "content": answer.strip(), "reasoning_content": thought}
    return {"role": role, "content": with_image_parts(text)}


def chat_segments(messages: list[dict], tokenizer) -> list[tuple[str, bool]]:
    """A conversation as the chat template writes it, cut into (text, supervised) pieces.

    Supervised is what the model itself will write: an assistant turn, thought and answer, and its
    end token, without the line break after it. It is found by rendering prefixes: the text of
    messages[:i] with the assistant header (and <think>, if the template opens it for the model),
    and of messages[:i+1], enclose turn i. Pieces are tokenised separately, so a prompt has the
    same tokens as in generation. Raises ValueError for a template that rewrites earlier turns,
    drops a part of one, opens a thought twice, or does not end a turn.

    [user "Hi", assistant "Yes"] in ChatML (↵ is a line break) →
    ("<|im_start|>user↵Hi<|im_end|>↵<|im_start|>assistant↵", False), ("Yes<|im_end|>", True)
    """

    def render(n: int, header: bool) -> str:
        try:
            options = dict(tokenize=False, add_generation_prompt=header)
            return tokenizer.apply_chat_template(chat[:n], **options)
        except TemplateError as e:
            raise ValueError(f"the chat template refuses the first {n} messages: {e}") from e

    chat = [chat_message(m, tokenizer) for m in messages]
    whole, segments, at = render(len(chat), False), [], 0
    for i, m in enumerate(messages):
        if m["role"] != "assistant":
            continue
        before, after = render(i, True), render(i + 1, False).rstrip()
        reply, thought = after[len(before) :], chat[i].get("reasoning_content")
        parts = [m["content"]] if thought is None else [chat[i]["content"], thought]
        why = ""
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= at):
            why = "is written differently when more follows; or make one row of each assistant turn"
        elif not all(part.strip() in reply for part in parts):
            why = "loses a part of its text"
        elif before.rstrip().endswith("<think>") and "<think>" in reply:
            why = "opens its thought twice"
        elif not reply.endswith(tuple(tokenizer.all_special_tokens)):
            why = "ends without a special token, so the model could not learn to stop"
        if why:
            raise ValueError(f"change the chat template: with it, assistant turn {i} {why}")
        segments += [(whole[at : len(before)], False), (reply, True)]
        at = len(after)
    return [s for s in [*segments, (whole[at:], False)] if s[0]]


def stop_token_ids(tokenizer) -> list[int]:
    """Both end tokens of Qwen models: a sample ending with <|endoftext|> would otherwise run on."""
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    return sorted({*ids, tokenizer.eos_token_id} - {None, tokenizer.unk_token_id})


def banned_token_ids(tokenizer, vocab_size: int) -> list[int]:
    """Ids never to be sampled: vision placeholders (the next forward would look for an image) and
    the vocabulary's padded end."""
    names = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    ids = [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names]
    known = [i for i in ids if i not in (None, tokenizer.unk_token_id)]
    return known + list(range(len(tokenizer), vocab_size))
