"""Chat templates of Qwen2.5-VL and Qwen3: what is trained is exactly what generation sees."""

import json

import numpy as np
import pytest
from tiny import TEMPLATES, make_tiny_tokenizer

import data
from sampler import ForcedExit

THOUGHT, ANSWER = "Two and two.\nThat is four.", "<answer>\n4\n</answer>"
INLINE = f"<think>\n{THOUGHT}\n</think>\n{ANSWER}"
APART = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"  # as Qwen3's own templates write it
TRAINED = {
    "qwen2.5": INLINE,
    "qwen3 instruct": INLINE,
    "qwen3 hybrid": APART,
    "qwen3 thinking": APART.removeprefix("<think>\n"),
}


@pytest.fixture(scope="module", params=TEMPLATES)
def case(request, tmp_path_factory):
    """(template's name, tokenizer)"""
    folder = make_tiny_tokenizer(tmp_path_factory.mktemp("t"), request.param)
    return request.param, data.load_tokenizer(folder)


def encode(tokenizer, *messages):
    roles = ("user", "assistant")
    chat = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
    [(tokens, mask)] = data.encode_conversations([{"messages": chat}], tokenizer, None)
    return tokens, mask


@pytest.mark.parametrize("reply", [INLINE, INLINE.replace("\n", ""), ANSWER], ids=str)
def test_the_supervised_tokens_follow_the_very_prompt_of_generation(case, reply):
    """Other tokens in the prompt, thoughts or answers without a loss, a second <think>."""
    name, tokenizer = case
    tokens, mask = encode(tokenizer, "What is 2 + 2?", reply)
    start, end = np.flatnonzero(mask)[[0, -1]]
    assert mask[start : end + 1].all()
    problem = {"id": "1", "kind": "math", "question": "What is 2 + 2?"}
    assert tokens[:start].tolist() == data.prompt_tokens(problem, tokenizer, None, "plain")
    trained = tokenizer.decode(tokens[start : end + 1])
    whole = tokenizer.decode(tokens)
    assert trained.endswith(ANSWER.replace("\n", "") + "<|im_end|>") or trained.endswith(
        f"{ANSWER}<|im_end|>"
    )
    assert whole.count("<think>") == whole.count("</think>") <= 1
    if reply == INLINE:
        assert trained == TRAINED[name] + "<|im_end|>"


def test_a_thought_that_holds_the_tags_is_kept_or_refused(case):
    """Templates that split at the tags would train on half a thought."""
    name, tokenizer = case
    strange = "<think>\nFirst <think> then.\n</think>\nNo </think> here."
    if name == "qwen3 thinking":
        with pytest.raises(ValueError, match="assistant turn 1 opens its thought twice"):
            encode(tokenizer, "Q", strange)
        return
    tokens, mask = encode(tokenizer, "Q", strange)
    trained = tokenizer.decode(tokens[mask])
    assert "First <think> then." in trained and "No </think> here." in trained


def test_earlier_thoughts_are_kept_or_refused(case):
    """Qwen3 drops the thoughts of earlier turns: a loss on what generation never sees again."""
    name, tokenizer = case
    if name in ("qwen3 hybrid", "qwen3 thinking"):
        with pytest.raises(ValueError, match="make one row of each assistant turn"):
            encode(tokenizer, "Q", INLINE, "And?", INLINE)
    else:
        tokens, mask = encode(tokenizer, "Q", INLINE, "And?", INLINE)
        assert tokenizer.decode(tokens[mask]) == 2 * f"{INLINE}<|im_end|>"


def test_a_template_that_opens_a_thought_twice_is_refused(case):
    name, tokenizer = case
    if name != "qwen3 thinking":
        pytest.skip("its template opens no thought")
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = tokenizer.chat_template.replace("m.reasoning_content", "m.unknown")
    tokenizer.chat_template = tokenizer.chat_template.replace("'</think>' in text", "false")
    with pytest.raises(ValueError, match="assistant turn 1 opens its thought twice"):
        encode(tokenizer, "Q", INLINE)


def test_forced_exit_closes_the_thought_in_one_token(case):
    name, tokenizer = case
    if name == "qwen2.5":
        pytest.skip("there </think> is several tokens")
    exit = ForcedExit.from_tokenizer(tokenizer, 320, budget=8)
    close = tokenizer.convert_tokens_to_ids("</think>")
    assert exit.tokens == [close, *tokenizer.encode("\n")] == [308, *tokenizer.encode("\n")]
    table = exit.close_table
    assert (table[:, close] == len(table) - 1).all()


def test_a_template_that_refuses_a_conversation_is_an_error_with_its_words(case):
    _, tokenizer = case
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = "{{ raise_exception('No user query found.') }}"
    with pytest.raises(ValueError, match="the chat template refuses .*No user query found"):
        encode(tokenizer, "Q", INLINE)


def test_a_missing_directory_is_not_called_one_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such model directory"):
        data.load_tokenizer(tmp_path / "nowhere")


def test_a_foreign_tokenizer_is_an_error_that_names_the_directory(tmp_path):
    """Token ids beyond the embedding: an IndexError in the first step, after all preparation."""
    folder = make_tiny_tokenizer(tmp_path)
    for config in ({"vocab_size": 300}, {"text_config": {"vocab_size": 300}}):
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"{folder}: the tokenizer has 307 tokens.* of 300"):
            data.load_tokenizer(folder)
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=f"{folder}: its tokenizer does not load"):
        data.load_tokenizer(folder)
