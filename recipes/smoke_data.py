"""What the recipes need with SMOKE=1: a tiny model, and a few made-up rows of every data set in its
published form.

    python recipes/smoke_data.py write FOLDER [MODEL]  FOLDER/base and FOLDER/releases/NAME
    python recipes/smoke_data.py teach OUT PROBLEMS    stored samples of eval.py become a teacher's

The rows are the miniature's chains (toy/world.py) in the fields of the real releases, so the same
converters run. The model is the shipped miniature base where there is one, else random weights; for
a MODEL named Qwen3-VL, a random one of that architecture. None can think, hence `teach` for QwQ.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from core.schema import LETTERS  # noqa: E402
from toy import world as toy  # noqa: E402
from toy.model_files import write_model_files  # noqa: E402

ROWS = 3  # of each table
SHIPPED = ROOT / "toy" / "assets"


# ---------------------------------------------------------------------- writing
def write_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_text(path: Path, rows: list, lines: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


# ---------------------------------------------------------------------- rows
class Maker:
    """Random chains as questions with options, and as pictures."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)

    def question(self) -> dict:
        """text, answer, options, letter, picture (png bytes) of one chain; its thought."""
        chain = toy.draw_chain(self.rng, 3)
        options, letter = toy.draw_options(self.rng, chain)
        picture = io.BytesIO()
        toy.draw_line(chain.text, self.rng).save(picture, "PNG")
        return {
            "text": chain.text,
            "answer": str(chain.answer),
            "options": options,
            "letter": letter,
            "picture": picture.getvalue(),
            "thought": toy.think(chain),
        }

    def questions(self) -> list[dict]:
        return [self.question() for _ in range(ROWS)]


def lettered(q: dict, count: int = 4) -> dict[str, str]:
    """Options by letter, filled up to `count`."""
    return dict(
        zip(
            LETTERS, [*q["options"], *(f"{i}mg" for i in range(10, 10 + count - len(q["options"])))]
        )
    )


def embedded(q: dict) -> dict:
    return {"bytes": q["picture"], "path": "x.png"}


def medqa_row(q: dict, count: int) -> dict:
    return {
        "question": q["text"],
        "answer": lettered(q, count)[q["letter"]],
        "options": lettered(q, count),
        "meta_info": "step1",
        "answer_idx": q["letter"],
    }


def write_text_releases(out: Path, make: Maker) -> None:
    """OpenThoughts, Orz, GSM8K, MMLU-Pro, MedQA in both forms."""
    thoughts = [
        {
            "system": "-",
            "conversations": [
                {"from": "user", "value": q["text"]},
                {
                    "from": "assistant",
                    "value": f"<|begin_of_thought|>\n\n{q['thought']}\n\n<|end_of_thought|>\n\n"
                    f"<|begin_of_solution|>\n\n\\boxed{{{q['answer']}}}\n\n<|end_of_solution|>",
                },
            ],
        }
        for _ in range(8)
        for q in make.questions()
    ]
    write_parquet(out / "openthoughts/data/train-00000-of-00001.parquet", thoughts)
    write_text(
        out / "orz57k/orz_math_57k_collected.json",
        [
            [
                {"from": "human", "value": q["text"]},
                {"from": "assistant", "ground_truth": {"value": q["answer"]}},
            ]
            for _ in range(3)
            for q in make.questions()
        ],
        lines=False,
    )
    write_parquet(
        out / "gsm8k/main/test-00000-of-00001.parquet",
        [
            {"question": q["text"], "answer": f"{q['thought']}\n#### {q['answer']}"}
            for q in make.questions()
        ],
    )
    write_parquet(
        out / "mmlu_pro/data/test-00000-of-00001.parquet",
        [
            {
                "question_id": i,
                "question": q["text"],
                "options": q["options"],
                "answer": q["letter"],
                "answer_index": LETTERS.index(q["letter"]),
                "cot_content": "",
                "category": "health" if i % 2 else "math",
                "src": "smoke",
            }
            for i, q in enumerate(make.questions())
        ],
    )
    for name, count in (("medqa", 5), ("medqa_4ops", 4)):
        test, train = (
            "".join(json.dumps(medqa_row(q, count)) + "\n" for q in make.questions())
            for _ in range(2)
        )
        if count == 5:
            write_zip(
                out / name / "data_clean.zip",
                {
                    "data_clean/questions/US/test.jsonl": test.encode(),
                    "data_clean/questions/US/train.jsonl": train.encode(),
                },
            )
        else:
            (out / name).mkdir(parents=True, exist_ok=True)
            (out / name / "phrases_no_exclude_test.jsonl").write_text(test)


def write_image_releases(out: Path, make: Maker) -> None:
    """MMMU, MMMU-Pro, MMStar, MathVista, MathVision."""
    for subject in ("Pharmacy", "Math"):
        write_parquet(
            out / f"mmmu/{subject}/validation-00000-of-00001.parquet",
            [
                {
                    "id": f"validation_{subject}_{i}",
                    "question": "<image 1>",
                    "options": str(q["options"]),
                    "image_1": embedded(q),
                    "answer": q["letter"],
                    "question_type": "multiple-choice",
                    "topic_difficulty": "Easy",
                }
                for i, q in enumerate(make.questions())
            ],
        )
    write_parquet(
        out / "mmmu_pro/standard (10 options)/test-00000-of-00001.parquet",
        [
            {
                "id": f"test_{subject}_{i}",
                "question": "<image 1>",
                "options": str(q["options"]),
                "image_1": embedded(q),
                "answer": q["letter"],
                "subject": subject,
                "topic_difficulty": "Easy",
            }
            for subject in ("Pharmacy", "Math")
            for i, q in enumerate(make.questions())
        ],
    )
    write_parquet(
        out / "mmstar/mmstar.parquet",
        [
            {
                "index": i,
                "question": "Which? \nOptions: "
                + ", ".join(f"{k}: {v}" for k, v in lettered(q).items()),
                "image": q["picture"],
                "answer": q["letter"],
                "category": "math",
                "l2_category": "sums",
            }
            for i, q in enumerate(make.questions())
        ],
    )
    write_parquet(
        out / "mathvista/data/testmini-00000-of-00001.parquet",
        [
            {
                "pid": str(i),
                "question": "Which?",
                "choices": q["options"] if i else None,
                "unit": None,
                "precision": None,
                "answer": q["options"][LETTERS.index(q["letter"])] if i else q["answer"],
                "question_type": "multi_choice" if i else "free_form",
                "answer_type": "text" if i else "integer",
                "decoded_image": embedded(q),
                "image": "images/x.png",
                "metadata": {"task": "sums", "language": "english"},
            }
            for i, q in enumerate(make.questions())
        ],
    )
    write_parquet(
        out / "mathvision/data/test-00000-of-00001.parquet",
        [
            {
                "id": str(i),
                "question": "Which? <image1>",
                "options": q["options"] if i else [],
                "answer": q["letter"] if i else q["answer"],
                "decoded_image": embedded(q),
                "image": "images/x.jpg",
                "level": 1,
                "subject": "arithmetic",
            }
            for i, q in enumerate(make.questions())
        ],
    )


def write_geometry_release(out: Path, make: Maker) -> None:
    """Geometry3K; the first problem has two images."""
    for split in ("train", "test"):
        rows = []
        for i, q in enumerate(make.questions()):
            count = 1 if i else 2
            row = {"problem": "<image>" * count + "Find x.", "answer": q["answer"]}
            rows.append(row | {"images": [embedded(q)] * count})
        write_parquet(out / f"geometry3k/data/{split}-00000-of-00001.parquet", rows)


def write_medical_releases(out: Path, make: Maker) -> None:
    """MedXpertQA-MM, OmniMedVQA, NEJM."""
    chosen = make.questions()
    rows = [
        {
            "id": f"MM-{i}",
            "question": f"Which? Answer Choices: {lettered(q, 5)}",
            "options": lettered(q, 5),
            "label": q["letter"],
            "images": [f"MM-{i}.png"],
            "medical_task": "Diagnosis",
        }
        for i, q in enumerate(chosen)
    ]
    write_text(out / "medxpertqa_mm/MM/test.jsonl", rows)
    write_zip(
        out / "medxpertqa_mm/images.zip",
        {f"images/MM-{i}.png": q["picture"] for i, q in enumerate(chosen)},
    )
    chosen = make.questions()
    rows = [
        {
            "dataset": "Chest",
            "question_id": f"chest_{i}",
            "question_type": "Modality",
            "question": "Which?",
            "gt_answer": q["options"][LETTERS.index(q["letter"])],
            "image_path": f"Images/Chest/{i}.png",
            "modality_type": "CT",
            **{f"option_{k}": v for k, v in lettered(q).items()},
        }
        for i, q in enumerate(chosen)
    ]
    write_zip(
        out / "omnimedvqa/OmniMedVQA.zip",
        {
            "OmniMedVQA/QA_information/Open-access/Chest.json": json.dumps(rows).encode(),
            **{f"OmniMedVQA/Images/Chest/{i}.png": q["picture"] for i, q in enumerate(chosen)},
        },
    )
    chosen = make.questions()
    write_text(
        out / "nejm/image_challenge.json",
        [
            {
                "image_id": f"IC{i}",
                "date": f"2020010{i + 1}",
                "question": "Which?",
                "correct_answer": q["letter"],
                **{f"option_{k}": v for k, v in lettered(q, 5).items()},
            }
            for i, q in enumerate(chosen)
        ],
        lines=False,
    )
    (out / "nejm/images").mkdir()
    for i, q in enumerate(chosen):
        (out / f"nejm/images/IC{i}.png").write_bytes(q["picture"])


# ---------------------------------------------------------------------- model and teacher
def write_base(out: Path) -> None:
    """The shipped miniature base, or random weights in the same architecture."""
    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    if list(SHIPPED.glob("*.safetensors")):
        shutil.copytree(SHIPPED, aside)
        aside.rename(out)
        return
    write_model_files(aside)
    write_random_weights(aside)
    aside.rename(out)


def write_random_weights(folder: Path, prefixes: dict[str, str] | None = None) -> None:
    """Weights for the config.json of a directory; prefixes: names of ours → keys in the file."""
    import torch
    from safetensors.torch import save_file

    from model import Model, ModelConfig

    torch.manual_seed(0)
    model, tensors = Model(ModelConfig.from_dir(folder), with_vision=True), {}
    for name, p in model.named_parameters():
        first = name.split(".")[0]
        key = name.replace(first, (prefixes or {}).get(first, first), 1)
        tensors[key] = p.detach().to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_qwen3_vl(out: Path) -> None:
    """A random Qwen3-VL, tied as the 2B and 4B are, with the miniature's tokenizer."""
    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    write_model_files(aside)
    old = json.loads((aside / "config.json").read_text())
    tower = {
        k: old["vision_config"][k] for k in ("depth", "hidden_size", "num_heads", "in_channels")
    }
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        **{k: v for k, v in old.items() if k.endswith("token_id")},
        "text_config": {
            "model_type": "qwen3_vl_text",
            **{k: old[k] for k in (*sizes, "num_key_value_heads", "vocab_size", "rms_norm_eps")},
            "head_dim": 48,
            "rope_theta": 5000000,
            "rope_scaling": {"rope_type": "default", "mrope_section": [10, 8, 6]},
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            **tower,
            "intermediate_size": 128,
            "out_hidden_size": old["hidden_size"],
            "hidden_act": "gelu_pytorch_tanh",
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [0, 1],
        },
    }
    images = {
        "size": {"shortest_edge": 32 * 32, "longest_edge": 80 * 32 * 32},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
    }
    (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (aside / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
    write_random_weights(aside, {"model": "model.language_model", "visual": "model.visual"})
    aside.rename(out)


def write(folder: Path, model: str = "") -> None:
    """Everything; the model last, so that a folder with a model is whole."""
    releases, make = folder / "releases", Maker()
    shutil.rmtree(releases, ignore_errors=True)
    write_text_releases(releases, make)
    write_image_releases(releases, make)
    write_geometry_release(releases, make)
    write_medical_releases(releases, make)
    for release in releases.iterdir():
        if release.name != "nejm":  # that one is the user's own folder
            (release / "download.json").write_text(
                json.dumps({"name": release.name, "hub": "made up"})
            )
    (write_qwen3_vl if "Qwen3-VL" in model else write_base)(folder / "base")
    print(f"{folder}: base and {len(list(releases.iterdir()))} releases of {ROWS} rows and more")


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
    write_text(out / "samples.jsonl", rows)
    right = sum(row["reward"] for row in rows)
    print(f"{out}: {len(rows)} samples rewritten, {right:.0f} of them right")


def main(argv: list[str]) -> None:
    if len(argv) in (2, 3) and argv[0] == "write":
        write(Path(argv[1]), *argv[2:])
    elif len(argv) == 3 and argv[0] == "teach":
        teach(Path(argv[1]), Path(argv[2]))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
