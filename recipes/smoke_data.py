"""What the recipes need with SMOKE=1: a tiny model, and a few made-up rows of every data set in its
published form.

    python recipes/smoke_data.py write FOLDER [MODEL]  FOLDER/base and FOLDER/releases/NAME
    python recipes/smoke_data.py teach OUT PROBLEMS    stored samples of eval.py become a teacher's

The rows are the miniature's chains (toy/world.py) in the fields of the real releases, so the same
converters run. The model is the shipped miniature base; for a MODEL named Qwen3-VL, a random one of
that architecture. None can think, hence `teach` for QwQ.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Iterator

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from core.schema import LETTERS  # noqa: E402
from toy import world as toy  # noqa: E402
from toy.base import ASSETS, write_model_files  # noqa: E402

ROWS = 24  # of each table


# ---------------------------------------------------------------------- rows as they are published
def question(rng: np.random.Generator) -> dict:
    """text, answer, thought, options, letter, gold (its text), picture (PNG) of a random chain."""
    chain, file = toy.draw_chain(rng, 3), io.BytesIO()
    options, letter = toy.draw_options(rng, chain)
    toy.draw_line(chain.text, rng).save(file, "PNG")
    made = dict(text=chain.text, answer=str(chain.answer), thought=toy.think(chain))
    made |= dict(options=options, letter=letter, gold=options[LETTERS.index(letter)])
    return made | {"picture": file.getvalue()}


def published(q: dict, i: int) -> Iterator[tuple[str, dict | list | bytes]]:
    """(file, row i of its table, made of one question) for every release, and its image files. A
    file may lie in a zip. Of what has options or a free answer, the first row has the latter."""
    four, five = dict(zip(LETTERS, q["options"])), dict(zip(LETTERS, [*q["options"], "10mg"]))
    picture = {"bytes": q["picture"], "path": "x.png"}

    thought = f"<|begin_of_thought|>\n\n{q['thought']}\n\n<|end_of_thought|>"
    solution = f"<|begin_of_solution|>\n\n\\boxed{{{q['answer']}}}\n\n<|end_of_solution|>"
    reply = {"from": "assistant", "value": f"{thought}\n\n{solution}"}
    turns = [{"from": "user", "value": q["text"]}, reply]
    yield "openthoughts/data/train-0.parquet", dict(system="-", conversations=turns)
    gold = {"from": "assistant", "ground_truth": {"value": q["answer"]}}
    turns = [{"from": "human", "value": q["text"]}, gold]
    yield "orz57k/orz_math_57k_collected.json", turns
    answer = f"{q['thought']}\n#### {q['answer']}"
    yield "gsm8k/main/test-0.parquet", dict(question=q["text"], answer=answer)
    row = dict(question_id=i, question=q["text"], options=q["options"], answer=q["letter"])
    yield "mmlu_pro/data/test-0.parquet", row | {"category": "health" if i % 2 else "math"}

    row = dict(question=q["text"], answer=q["gold"], answer_idx=q["letter"], meta_info="step1")
    for split in ("train", "test"):
        yield f"medqa/data_clean.zip/data_clean/questions/US/{split}.jsonl", row | {"options": five}
    yield "medqa_4ops/phrases_no_exclude_test.jsonl", row | {"options": four}

    row = dict(question="<image 1>", options=str(q["options"]), answer=q["letter"])
    row |= dict(image_1=picture, question_type="multiple-choice")
    for subject in ("Pharmacy", "Math"):
        yield f"mmmu/{subject}/validation-0.parquet", row | {"id": f"validation_{subject}_{i}"}
    id = f"test_{'Math' if i % 2 else 'Pharmacy'}_{i}"
    yield "mmmu_pro/standard (10 options)/test-0.parquet", row | {"id": id}

    options = ", ".join(f"{letter}: {text}" for letter, text in four.items())
    row = dict(index=i, question=f"Which? \nOptions: {options}", answer=q["letter"])
    yield "mmstar/mmstar.parquet", row | dict(image=q["picture"], category="math")
    row = dict(pid=str(i), question="Which?", decoded_image=picture, metadata={"task": "sums"})
    row |= dict(answer_type="integer", unit=None, precision=None)
    choice = dict(question_type="multi_choice", choices=q["options"], answer=q["gold"])
    free = dict(question_type="free_form", choices=None, answer=q["answer"])
    yield "mathvista/data/testmini-0.parquet", row | (choice if i else free)
    row = dict(id=str(i), question="Which? <image1>", decoded_image=picture, subject="sums")
    choice = dict(options=q["options"], answer=q["letter"])
    free = dict(options=[], answer=q["answer"])
    yield "mathvision/data/test-0.parquet", row | (choice if i else free)
    images = [picture] * (1 if i else 2)  # the first problem has two
    row = dict(problem="<image>" * len(images) + "Find x.", answer=q["answer"], images=images)
    for split in ("train", "test"):
        yield f"geometry3k/data/{split}-0.parquet", row

    row = dict(id=f"MM-{i}", question=f"Which?\nAnswer Choices: {five}", options=five)
    row |= dict(label=q["letter"], images=[f"MM-{i}.png"], medical_task="Diagnosis")
    yield "medxpertqa_mm/MM/test.jsonl", row
    yield f"medxpertqa_mm/images.zip/images/MM-{i}.png", q["picture"]
    row = dict(dataset="Chest", question_id=f"chest_{i}", question="Which?", gt_answer=q["gold"])
    row |= dict(image_path=f"Images/Chest/{i}.png", modality_type="CT")
    row |= {f"option_{letter}": text for letter, text in four.items()}
    yield "omnimedvqa/OmniMedVQA.zip/OmniMedVQA/QA_information/Open-access/Chest.json", row
    yield f"omnimedvqa/OmniMedVQA.zip/OmniMedVQA/Images/Chest/{i}.png", q["picture"]
    row = dict(image_id=f"IC{i}", date="20200101", question="Which?", correct_answer=q["letter"])
    row |= {f"option_{letter}": text for letter, text in five.items()}
    yield "nejm/image_challenge.json", row
    yield f"nejm/images/IC{i}.png", q["picture"]


def table_bytes(name: str, rows: list) -> bytes:
    """Rows as a file of the kind that its name says."""
    if name.endswith(".jsonl"):
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if name.endswith(".json"):
        return json.dumps(rows).encode()
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def write_releases(folder: Path) -> None:
    """All files of all releases, and download.json as `python -m convert download` leaves it."""
    rng, files = np.random.default_rng(0), {}
    for i in range(ROWS):
        for name, row in published(question(rng), i):
            files.setdefault(name, []).append(row)
    for name, rows in files.items():
        outer, zipped, inside = name.partition(".zip/")
        content = rows[0] if isinstance(rows[0], bytes) else table_bytes(name, rows)
        file = folder / (f"{outer}.zip" if zipped else name)
        file.parent.mkdir(parents=True, exist_ok=True)
        if zipped:
            with zipfile.ZipFile(file, "a") as archive:
                archive.writestr(inside, content)
        else:
            file.write_bytes(content)
    for release in folder.iterdir():
        if release.name != "nejm":  # that one is the user's own folder
            note = json.dumps({"name": release.name, "hub": "made up"})
            (release / "download.json").write_text(note)


# ---------------------------------------------------------------------- model and teacher
def write_qwen3_vl(folder: Path) -> None:
    """A random Qwen3-VL, tied as the 2B and 4B are, with the miniature's tokenizer."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    write_model_files(folder)
    old = json.loads((folder / "config.json").read_text())
    rope = dict(rope_type="default", rope_theta=5000000, mrope_section=[10, 8, 6])
    text = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, head_dim=48)
    text |= dict(num_attention_heads=4, num_key_value_heads=2, vocab_size=old["vocab_size"])
    text |= dict(rope_parameters=rope, tie_word_embeddings=True)
    vision = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128)
    vision |= dict(deepstack_visual_indexes=[0, 1])
    tokens = {k: v for k, v in old.items() if k.endswith("token_id")}
    sides = dict(text_config=text, vision_config=vision, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**sides, **tokens))
    model.to(torch.bfloat16).save_pretrained(folder)
    images = dict(size={"shortest_edge": 32 * 32, "longest_edge": 80 * 32 * 32}, patch_size=16)
    images |= dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    (folder / "preprocessor_config.json").write_text(json.dumps(images))


def write(folder: Path, model: str = "") -> None:
    """Everything; the model last, so that a folder with a model is whole."""
    top = folder / "releases"
    shutil.rmtree(top, ignore_errors=True)
    write_releases(top)
    aside = folder / "base.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    write_qwen3_vl(aside) if "Qwen3-VL" in model else shutil.copytree(ASSETS, aside)
    aside.rename(folder / "base")
    print(f"{folder}: base and {len(list(top.iterdir()))} releases of {ROWS} rows")


def teach(out: Path, problems: Path) -> None:
    """Rewrite the stored samples as a teacher would have written them; grade them by the rule."""
    import rewards

    by_id = {p["id"]: p for p in map(json.loads, problems.read_text().splitlines())}
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        problem = by_id[row["id"]]
        thought = f"<think>{problem['question']} (sample {row['sample']})</think>"
        row["text"] = thought + toy.final_answer(problem)
        row["finish_reason"] = "stop"
        reward = rewards.reward(problem, row["text"], "stop")
        row.update(reward=reward.score, answer=reward.answer, status=reward.status)
    (out / "samples.jsonl").write_bytes(table_bytes("samples.jsonl", rows))
    right = sum(row["reward"] for row in rows)
    print(f"{out}: {len(rows)} samples rewritten, {right:.0f} of them right")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    command, folder, *rest = sys.argv[1:]
    write(Path(folder), *rest) if command == "write" else teach(Path(folder), Path(*rest))
