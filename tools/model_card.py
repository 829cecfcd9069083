"""A model card from a run, and the command that puts OUT/final on the Hugging Face hub.

    python -m tools.model_card runs/grpo --eval runs/eval/grpo_greedy runs/eval/grpo_avg5

Writes OUT/final/README.md: base model, data with hashes, settings, results with their 95%
intervals, commit and versions. Everything comes from the run's own files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from core.config import ARCHITECTURES
from core.files import read_json
from core.options import exit_on_value_error
from scoring.tables import markdown, percent, read_result, span

STAGES = {"train_sft": "supervised fine-tuning", "train_grpo": "GRPO"}
HIDDEN = {"script", "out", "model", "data", "report_to"}  # elsewhere, or of no effect


def results(evaluations: list[Path]) -> list[str]:
    """A table of each evaluation's sets; how it was sampled stands above it."""
    parts = []
    for folder in evaluations:
        result = read_result(folder)
        s, sets = result["settings"], result["sets"]
        how = f"{s['samples']} sample(s) a question at temperature {s['temperature']}; "
        how += f"at most {s['max_new_tokens']} tokens"
        if s.get("think_budget"):
            how += f"; thoughts ended by force after {s['think_budget']}"
        rows = [[n, str(m["n"]), percent(m["accuracy"]), span(m)] for n, m in sets.items()]
        metric = next(iter(sets.values()))["metric"]
        head = ["set", "questions", f"accuracy, % ({metric})", "95% interval"]
        parts += [f"{how}.", markdown(head, rows)]
    return parts or ["Not evaluated yet: pass `--eval` with the --out of eval.py."]


def card(out: Path, evaluations: list[Path]) -> str:
    """The text of README.md. Raises ValueError where `out` is no finished training run."""
    if not (out / "header.json").is_file() or not (out / "final" / "config.json").is_file():
        raise ValueError(f"{out}: not the --out of a training run that has ended")
    files = ("config.json", "header.json", "final/config.json")
    config, header, model = (read_json(out / file) for file in files)
    base, images = config["model"], ARCHITECTURES[model["model_type"]].images
    task = "image-text-to-text" if images else "text-generation"
    hub = f"base_model: {base}\n" * (base.count("/") == 1 and not Path(base).exists())
    rows = [[f"`{name}`", f"`{digest[:16]}`"] for name, digest in header["data"].items()]
    settings = [
        [f"`--{k}`", f"`{v if isinstance(v, str) else json.dumps(v)}`"]
        for k, v in config.items()
        if k not in HIDDEN and v not in ("", None, []) and v is not False  # 0 says something
    ]
    machine = f"{header['world_size']} × {header['device']}"
    versions = ", ".join(f"{k} {v}" for k, v in header["versions"].items() if v)
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\n{hub}tags: [reasoning]\n---",
        f"# {out.name}",
        f"`{base}` after {STAGES[config['script']]} with `{config['script']}.py`.",
        "## Results",
        *results(evaluations),
        "## Data",
        markdown(["file", "sha256"], rows),
        "## Settings",
        markdown(["flag", "value"], settings),
        "## Reproduce",
        f"```bash\n{header['command']}\n```",
        f"Commit `{header['commit']}`, {versions}; {machine}; {header['time']}.",
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m tools.model_card", None, __doc__, formatter_class=raw
    )
    parser.add_argument("out", type=Path, help="--out of a finished training run")
    parser.add_argument("--eval", type=Path, nargs="+", default=[], help="--out of its evaluations")
    args = parser.parse_args(argv)
    with exit_on_value_error():
        file = args.out / "final" / "README.md"
        file.write_text(card(args.out, args.eval), encoding="utf-8")
    print(f"{file} written; read it, then:")
    print(f"hf upload YOUR_NAME/{args.out.name} {args.out / 'final'} .")


if __name__ == "__main__":
    main()
