"""python -m tools.model_card: the card says what the run's own files say."""

import json

import pytest

from tools import model_card


def make_run(folder, architecture="qwen2_5_vl", **config):
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "config.json").write_text(json.dumps({"model_type": architecture}))
    config = {"script": "train_grpo", "model": "Qwen/Some-VL", "data": ["a.jsonl"], **config}
    (folder / "config.json").write_text(json.dumps(config))
    header = {"command": "python train_grpo.py --lr 3e-06", "commit": "abc123", "world_size": 8}
    header |= {"data": {"a.jsonl": "f" * 64}, "versions": {"torch": "2.13.0"}, "device": "H100"}
    (folder / "header.json").write_text(json.dumps(header | {"time": "2026-01-01"}))
    return folder


def make_evaluation(folder, accuracy):
    folder.mkdir()
    one = {"n": 200, "metric": "greedy", "accuracy": accuracy, "low": 0.5, "high": 0.75}
    settings = {"samples": 1, "temperature": 0.0, "max_new_tokens": 4096, "think_budget": 3800}
    result = {"settings": settings, "rules": {}, "sets": {"mmmu": one}}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_a_card_holds_data_settings_results_and_commit(tmp_path, capsys):
    run = make_run(tmp_path / "mine", lr=3e-6, kl_coef=0.0, eval_data=[], compile=False)
    evaluation = make_evaluation(tmp_path / "e", 0.625)
    model_card.main([str(run), "--eval", str(evaluation)])
    text = (run / "final" / "README.md").read_text()
    assert (
        text.startswith("---\nlibrary_name: transformers\n") and "base_model: Qwen/Some-VL" in text
    )
    assert "| mmmu | 200 | 62.5 | 50.0 … 75.0 |" in text
    assert "thoughts ended by force after 3800" in text
    assert "| `a.jsonl` | `ffffffffffffffff` |" in text and "Commit `abc123`, torch 2.13.0" in text
    assert "| `--lr` | `3e-06` |" in text and "| `--kl_coef` | `0.0` |" in text
    assert "eval_data" not in text and "compile" not in text
    assert "python train_grpo.py --lr 3e-06" in text and "8 × H100" in text
    assert f"hf upload YOUR_NAME/mine {run / 'final'} ." in capsys.readouterr().out


def test_a_local_base_is_no_hub_id_and_missing_results_are_said(tmp_path):
    text = model_card.card(make_run(tmp_path / "m", model=str(tmp_path)), [])
    assert "base_model" not in text and "Not evaluated yet" in text


@pytest.mark.parametrize(
    "architecture, task", [("qwen3_vl", "image-text-to-text"), ("qwen3", "text-generation")]
)
def test_the_hub_is_told_whether_the_model_takes_images(tmp_path, architecture, task):
    text = model_card.card(make_run(tmp_path / "m", architecture), [])
    assert f"\npipeline_tag: {task}\n" in text


@pytest.mark.parametrize("gone", ["header.json", "final/config.json"])
def test_a_directory_that_is_no_finished_run_is_one_line(tmp_path, gone, capsys):
    run = make_run(tmp_path / "m")
    (run / gone).unlink()
    with pytest.raises(SystemExit) as e:
        model_card.main([str(run)])
    assert e.value.code == 2 and str(run) in capsys.readouterr().err
    assert not (run / "final" / "README.md").exists()
