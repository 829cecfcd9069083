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
from functools import partial
from pathlib import Path
from typing import Iterator

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from core.schema import LETTERS  # noqa: E402
from toy import world as toy  # noqa: E402
from toy.model_files import write_model_files  # noqa: E402

ROWS = 3  # of each table
SHIPPED = ROOT / "toy" / "assets"


# ---------------------------------------------------------------------- rows as they are published
class Maker:
    """Random chains as questions with options, and as pictures."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def question(self) -> dict:
        """text, answer, options, letter, gold (its text), picture of one chain; its thought."""
        chain = toy.draw_chain(self.rng, 3)
        options, letter = toy.draw_options(self.rng, chain)
        file = io.BytesIO()
        toy.draw_line(chain.text, self.rng).save(file, "PNG")
        picture, gold = {"bytes": file.getvalue(), "path": "x.png"}, options[LETTERS.index(letter)]
        said = dict(text=chain.text, answer=str(chain.answer), thought=toy.think(chain))
        return said | dict(options=options, letter=letter, gold=gold, picture=picture)

    def rows(self, form, times: int = 1) -> list:
        """form(question, number) of ROWS questions, or that many times as many."""
        return [form(self.question(), i) for i in range(ROWS * times)]


def lettered(q: dict, count: int = 4) -> dict[str, str]:
    """Options by letter, filled up to `count`."""
    more = [f"{i}mg" for i in range(10, 10 + count - len(q["options"]))]
    return dict(zip(LETTERS, [*q["options"], *more]))


def openthoughts(q: dict, i: int) -> dict:
    thought, solution = f"\n\n{q['thought']}\n\n", f"\n\n\\boxed{{{q['answer']}}}\n\n"
    trace = f"<|begin_of_thought|>{thought}<|end_of_thought|>\n\n"
    trace += f"<|begin_of_solution|>{solution}<|end_of_solution|>"
    turns = [{"from": "user", "value": q["text"]}, {"from": "assistant", "value": trace}]
    return {"system": "-", "conversations": turns}


def orz57k(q: dict, i: int) -> list[dict]:
    gold = {"from": "assistant", "ground_truth": {"value": q["answer"]}}
    return [{"from": "human", "value": q["text"]}, gold]


def gsm8k(q: dict, i: int) -> dict:
    return {"question": q["text"], "answer": f"{q['thought']}\n#### {q['answer']}"}


def mmlu_pro(q: dict, i: int) -> dict:
    row = dict(question_id=i, question=q["text"], options=q["options"], answer=q["letter"])
    return row | dict(category="health" if i % 2 else "math")


def medqa(q: dict, i: int, count: int) -> dict:
    row = dict(question=q["text"], answer=q["gold"], options=lettered(q, count))
    return row | dict(answer_idx=q["letter"], meta_info="step1")


def mmmu(q: dict, i: int, id: str) -> dict:
    row = dict(id=f"{id}{i}", question="<image 1>", options=str(q["options"]), answer=q["letter"])
    return row | dict(image_1=q["picture"], question_type="multiple-choice")


def mmstar(q: dict, i: int) -> dict:
    options = ", ".join(f"{k}: {v}" for k, v in lettered(q).items())
    row = dict(index=i, question=f"Which? \nOptions: {options}", answer=q["letter"])
    return row | dict(image=q["picture"]["bytes"], category="math")


def mathvista(q: dict, i: int) -> dict:
    row = dict(pid=str(i), question="Which?", unit=None, precision=None, metadata={"task": "sums"})
    row |= dict(decoded_image=q["picture"], question_type="free_form", answer_type="integer")
    row |= dict(choices=None, answer=q["answer"])
    choice = dict(choices=q["options"], answer=q["gold"], question_type="multi_choice")
    return row | choice if i else row


def mathvision(q: dict, i: int) -> dict:
    row = dict(id=str(i), question="Which? <image1>", decoded_image=q["picture"], subject="sums")
    return row | dict(options=q["options"] if i else [], answer=q["letter"] if i else q["answer"])


def geometry3k(q: dict, i: int) -> dict:
    images = [q["picture"]] * (1 if i else 2)  # the first problem has two
    problem = "<image>" * len(images) + "Find x."
    return {"problem": problem, "answer": q["answer"], "images": images}


def medxpertqa(q: dict, i: int) -> dict:
    options = lettered(q, 5)
    row = dict(id=f"MM-{i}", question=f"Which?\nAnswer Choices: {options}", options=options)
    return row | dict(label=q["letter"], images=[f"MM-{i}.png"], medical_task="Diagnosis")


def omnimedvqa(q: dict, i: int) -> dict:
    row = dict(dataset="Chest", question_id=f"chest_{i}", question="Which?", gt_answer=q["gold"])
    row |= dict(image_path=f"Images/Chest/{i}.png", modality_type="CT")
    return row | {f"option_{k}": v for k, v in lettered(q).items()}


def nejm(q: dict, i: int) -> dict:
    row = dict(image_id=f"IC{i}", date=f"2020010{i + 1}", question="Which?")
    options = {f"option_{k}": v for k, v in lettered(q, 5).items()}
    return row | dict(correct_answer=q["letter"]) | options


def releases(make: Maker) -> Iterator[tuple[str, list | bytes | dict]]:
    """(file, content) of every release: rows of a table, bytes of an image, members of a zip."""
    yield "openthoughts/data/train-0.parquet", make.rows(openthoughts, 8)
    yield "orz57k/orz_math_57k_collected.json", make.rows(orz57k, 3)
    yield "gsm8k/main/test-0.parquet", make.rows(gsm8k)
    yield "mmlu_pro/data/test-0.parquet", make.rows(mmlu_pro)
    files = [f"data_clean/questions/US/{split}.jsonl" for split in ("train", "test")]
    yield "medqa/data_clean.zip", {file: make.rows(partial(medqa, count=5)) for file in files}
    yield "medqa_4ops/phrases_no_exclude_test.jsonl", make.rows(partial(medqa, count=4))
    for subject in ("Pharmacy", "Math"):
        rows = make.rows(partial(mmmu, id=f"validation_{subject}_"))
        yield f"mmmu/{subject}/validation-0.parquet", rows
    rows = make.rows(partial(mmmu, id="test_Pharmacy_")) + make.rows(partial(mmmu, id="test_Math_"))
    yield "mmmu_pro/standard (10 options)/test-0.parquet", rows
    yield "mmstar/mmstar.parquet", make.rows(mmstar)
    yield "mathvista/data/testmini-0.parquet", make.rows(mathvista)
    yield "mathvision/data/test-0.parquet", make.rows(mathvision)
    for split in ("train", "test"):
        yield f"geometry3k/data/{split}-0.parquet", make.rows(geometry3k)
    pictures = [make.question()["picture"]["bytes"] for _ in range(ROWS)]
    yield "medxpertqa_mm/MM/test.jsonl", make.rows(medxpertqa)
    images = {f"images/MM-{i}.png": picture for i, picture in enumerate(pictures)}
    yield "medxpertqa_mm/images.zip", images
    members = {f"OmniMedVQA/Images/Chest/{i}.png": picture for i, picture in enumerate(pictures)}
    members["OmniMedVQA/QA_information/Open-access/Chest.json"] = make.rows(omnimedvqa)
    yield "omnimedvqa/OmniMedVQA.zip", members
    yield "nejm/image_challenge.json", make.rows(nejm)
    for i, picture in enumerate(pictures):
        yield f"nejm/images/IC{i}.png", picture


def file_bytes(name: str, content: list | bytes | dict) -> bytes:
    """The content as a file of the kind that its name says."""
    if isinstance(content, bytes):
        return content
    if name.endswith(".jsonl"):
        return "".join(json.dumps(row) + "\n" for row in content).encode()
    if name.endswith(".json"):
        return json.dumps(content).encode()
    file = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(file, "w") as archive:
            for member, inside in content.items():
                archive.writestr(member, file_bytes(member, inside))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), file)
    return file.getvalue()


# ---------------------------------------------------------------------- model and teacher
def write_qwen3_vl(folder: Path) -> None:
    """A random Qwen3-VL, tied as the 2B and 4B are, with the miniature's tokenizer."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    write_model_files(folder)
    old = json.loads((folder / "config.json").read_text())
    sizes = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size".split()
    text = {k: old[k] for k in (*sizes, "num_key_value_heads", "rms_norm_eps")} | dict(head_dim=48)
    rope = dict(rope_type="default", rope_theta=5000000, mrope_section=[10, 8, 6])
    text |= dict(rope_parameters=rope, tie_word_embeddings=True)
    vision = {k: old["vision_config"][k] for k in ("depth", "hidden_size", "num_heads")}
    vision |= dict(intermediate_size=128, out_hidden_size=old["hidden_size"])
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
    for name, content in releases(Maker()):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(file_bytes(name, content))
    for release in top.iterdir():
        if release.name != "nejm":  # that one is the user's own folder
            note = json.dumps({"name": release.name, "hub": "made up"})
            (release / "download.json").write_text(note)
    aside = folder / "base.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    write_qwen3_vl(aside) if "Qwen3-VL" in model else shutil.copytree(SHIPPED, aside)
    aside.rename(folder / "base")
    print(f"{folder}: base and {len(list(top.iterdir()))} releases of {ROWS} rows and more")


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
    (out / "samples.jsonl").write_bytes(file_bytes("samples.jsonl", rows))
    right = sum(row["reward"] for row in rows)
    print(f"{out}: {len(rows)} samples rewritten, {right:.0f} of them right")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    command, folder, *rest = sys.argv[1:]
    write(Path(folder), *rest) if command == "write" else teach(Path(folder), Path(*rest))
