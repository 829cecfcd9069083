"""A tiny byte-level tokenizer with Qwen's special tokens and Qwen2.5-VL's chat template, made
on the spot.

307 tokens: 256 bytes, 44 merges, then the special tokens with the ids that tiny_model.py names.
"""

from pathlib import Path

SPECIAL = [
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_start|>",
]  # ids 300 … 306
MERGES = """Ġ t|Ġ a|h e|i n|r e|o n|e r|Ġt he|n d|i s|o u|Ġ =|Ġ +|Ġ s|a n|Ġ w|i n g|o r
Ġa nd|Ċ Ċ|e s|a t|e n
Ġ o|Ġo f|Ġ c|i t|s t|l l|Ġ b|Ġ m|Ġ f|Ġ p|Ġ d|Ġ I|Ġ 1|Ġ 2|u s|e d|a l|s w|t h
an sw|answ er""".replace("\n", "|").split("|")
PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for m in messages -%}
{%- if loop.first and m.role != 'system' -%}
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif -%}
{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.content is string -%}{{ m.content }}
{%- else -%}
{%- for part in m.content -%}
{%- if part.type == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' -%}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""


# Qwen3's templates in other words. All keep an instruct turn as it is; these two write the
# last turn's thought
# themselves and leave out earlier ones, and `thinking` opens it in the prompt too.
HYBRID = """\
{%- set last = namespace(user=-1) -%}
{%- for m in messages if m.role == 'user' -%}{%- set last.user = messages.index(m) -%}{%- endfor -%}
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' -%}
{%- set thought, text = '', m.content -%}
{%- if m.reasoning_content is string -%}{%- set thought = m.reasoning_content -%}
{%- elif '</think>' in text -%}
{%- set thought = text.split('</think>')[0].split('<think>')[-1] -%}
{%- set text = text.split('</think>')[-1] -%}
{%- endif -%}
{%- if loop.index0 > last.user -%}
{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}
{%- else -%}{{ text.lstrip('\n') }}{%- endif -%}
{%- elif m.content is string -%}{{ m.content }}
{%- else -%}
{%- for part in m.content -%}
{%- if part.type == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
SYSTEM = """\
{%- if loop.first and m.role != 'system' -%}
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif -%}
"""
TEMPLATES = {
    "qwen2.5": CHAT_TEMPLATE,
    "qwen3 instruct": CHAT_TEMPLATE.replace(SYSTEM, ""),
    "qwen3 hybrid": HYBRID,
    "qwen3 thinking": HYBRID.replace(
        "assistant\n' }}{%- endif", "assistant\n<think>\n' }}{%- endif"
    ),
}


def make_tiny_tokenizer(path: str | Path, template: str = "qwen2.5") -> Path:
    """Write the tokenizer's files into the directory `path` (which may hold a model) and
    return it. Qwen3's have <think> and </think>, 307 and 308, which are no special tokens."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )
    from transformers import PreTrainedTokenizerFast

    merges = [tuple("".join(p.split(" ")) for p in m.rsplit(" ", 1)) for m in MERGES]
    vocab = {t: i for i, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    assert len(vocab) == 300
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
        clean_up_tokenization_spaces=False,
    )
    if template != "qwen2.5":
        fast.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    fast.chat_template = TEMPLATES[template]
    fast.save_pretrained(path)
    return Path(path)
