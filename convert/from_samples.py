"""From a teacher's graded samples to conversations: rejection sampling.

    python eval.py --model TEACHER --data FILE --out OUT --prompt_style train --samples 4
    python -m convert from_samples OUT --out traces.jsonl

Kept is what is right and whole: reward 1, ended by itself (neither truncated nor forced to exit),
one closed thought with something in it, and an answer after it. The user turn is the prompt that
the teacher had, so the student learns to think when asked in these words; the assistant turn has
the form of the converted OpenThoughts. The paper kept the correct samples of QwQ-32B; it does not
say how many of a question, nor in which form.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

from convert.conversion import new_file, write_lines
from convert.public import conversation
from core.samples import Sample, read_samples
from rewards import tagged

TAG = re.compile(r"</?(?:think|answer)>")


def as_conversation(sample: Sample, open_thought: bool, folder: Path = Path()) -> dict | str:
    """A sample as a conversation whose images are relative to `folder`, or the reason why not.
    open_thought: the teacher's template ended the prompt inside <think>."""
    if sample.reward < 1:
        return "wrong, or no answer"
    if sample.finish_reason != "stop":
        return "truncated, or forced to exit"
    text = sample.text
    text = ("<think>" if open_thought and "<think>" not in text else "") + text
    whole = re.fullmatch(r"\s*<think>(.*)</think>(.*)", text, re.S)
    if whole is None:
        return "no closed thought"
    thought, reply = whole[1].strip(), whole[2]
    answer = tagged(reply) or sample.answer  # a teacher that doesn't know the tags: as extracted
    if not thought or not answer:
        return "empty thought or answer"
    if TAG.search(thought + answer):
        return "a tag of the format is inside the thought or the answer"
    made = conversation(sample.prompt, answer, thought)
    if sample.images:
        made["images"] = [os.path.relpath(image, folder) for image in sample.images]
    return made


def from_samples(folder: str, out: str) -> str:
    """Write the kept samples of an evaluation to `out`, in order; return how many were kept, and
    how many not for each reason. Raises ValueError when `folder` is no finished evaluation."""
    file, config = Path(folder) / "samples.jsonl", Path(folder) / "config.json"
    if not file.is_file() or not config.is_file():
        raise ValueError(f"{folder}: no samples.jsonl and config.json: not the --out of eval.py")
    open_thought = json.loads(config.read_text(encoding="utf-8")).get("open_thought", False)
    target, counts, problems, kept = new_file(out), Counter(), set(), {}
    for sample in read_samples(file):
        if sample.lenient is None:
            raise ValueError(f"{file}: not graded yet; run the same eval.py to its end")
        made = as_conversation(sample, open_thought, target.parent)
        line = json.dumps(made, ensure_ascii=False)
        if isinstance(made, str) or line in kept:
            counts[made if isinstance(made, str) else "the same as another"] += 1
            continue
        kept[line] = True
        problems.add(sample.id)
    if not kept:
        raise ValueError(f"{file}: nothing to keep ({dict(counts)})")
    write_lines(target, kept)
    said = [f"{out}: {len(kept)} samples of {len(problems)} problems kept"]
    return "\n".join([*said, *(f"  {n} not: {reason}" for reason, n in counts.most_common())])
