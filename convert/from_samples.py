"""From a teacher's graded samples to conversations: rejection sampling.

    python eval.py --model TEACHER --data FILE --out OUT --prompt_style train --samples 4
    python -m convert from_samples OUT --out traces.jsonl [--most 1]

Kept is what is right and whole: reward 1, ended by itself (neither truncated nor forced to exit),
one closed thought with something in it, and an answer after it. The user turn is the prompt that
the teacher had, so the student learns to think when asked in these words; the assistant turn has
the form of the converted OpenThoughts. The paper kept the correct samples of QwQ-32B; it does not
say how many of a question, nor in which form.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import Counter
from pathlib import Path

from convert.public import conversation
from rewards import tagged

TAG = re.compile(r"</?(?:think|answer)>")


def as_conversation(row: dict, open_thought: bool, folder: Path = Path()) -> dict | str:
    """A row of OUT/samples.jsonl as a conversation whose images are relative to `folder`, or the
    reason why not. open_thought: the teacher's template ended the prompt inside <think>."""
    if row["reward"] < 1:
        return "wrong, or no answer"
    if row["finish_reason"] != "stop":
        return "truncated, or forced to exit"
    text = ("<think>" if open_thought and "<think>" not in row["text"] else "") + row["text"]
    whole = re.fullmatch(r"\s*<think>(.*)</think>(.*)", text, re.S)
    if whole is None:
        return "no closed thought"
    thought, reply = whole[1].strip(), whole[2]
    answer = tagged(reply) or row["answer"]  # a teacher that doesn't know the tags: as extracted
    if not thought or not answer:
        return "empty thought or answer"
    if TAG.search(thought + answer):
        return "a tag of the format is inside the thought or the answer"
    made = conversation(
        row["prompt"], f"<think>\n{thought}\n</think>\n<answer>\n{answer}\n</answer>"
    )
    if row.get("images"):
        made["images"] = [os.path.relpath(image, folder) for image in row["images"]]
    return made


def from_samples(folder: str, out: str, most: int = 0) -> Counter:
    """Write the kept samples of an evaluation to `out`, at most `most` of each problem (0: all), in
    order; return how many were kept, and how many not for each reason. Raises ValueError when
    `folder` is no finished evaluation."""
    file, target = Path(folder) / "samples.jsonl", Path(out)
    if not file.is_file() or not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder}: no samples.jsonl and config.json: not the --out of eval.py")
    if most < 0:
        raise ValueError(f"--most {most}: must be at least 0")
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    counts, kept, seen, lines = Counter(), Counter(), set(), []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        row = json.loads(line)
        if "lenient" not in row:
            raise ValueError(f"{file}:{number}: not graded yet; run the same eval.py to its end")
        made = as_conversation(row, config.get("open_thought", False), target.parent)
        if not isinstance(made, str) and json.dumps(made) in seen:
            made = "the same as another"
        elif not isinstance(made, str) and most and kept[row["id"]] == most:
            made = f"beyond {most} of its problem"
        if isinstance(made, str):
            counts[made] += 1
            continue
        seen.add(json.dumps(made))
        kept[row["id"]] += 1
        lines.append(json.dumps(made, ensure_ascii=False) + "\n")
    if not lines:
        raise ValueError(f"{file}: nothing to keep ({dict(counts)})")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".tmp")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(target)
    return counts + Counter({"kept": len(lines), "problems with a kept sample": len(kept)})


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convert from_samples",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", help="the --out of a finished eval.py")
    parser.add_argument("--out", required=True, help="the jsonl of conversations to write")
    parser.add_argument("--most", type=int, default=0, help="samples of a problem; 0: all")
    args = parser.parse_args(argv)
    try:
        counts = from_samples(args.folder, args.out, args.most)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    kept, problems = counts.pop("kept"), counts.pop("problems with a kept sample")
    print(f"{args.out}: {kept} samples of {problems} problems kept")
    for reason, count in counts.most_common():
        print(f"  {count} not: {reason}")
