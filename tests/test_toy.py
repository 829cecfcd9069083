"""The miniature: its problems are right, its splits disjoint, its files readable by the scripts."""

import json
import shutil
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from sympy.combinatorics import Permutation, PermutationGroup

import data
import rewards
from core import schema
from core.images import ImageConfig, load_image, preprocess_image
from core.options import parse_config
from toy import base, table, world
from toy.base import ASSETS, write_model_files


@pytest.fixture(scope="module")
def world_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    sizes = {"conversations": 300, "problems": 100, "test": 20}
    world.write_data(world.DataConfig(out=str(out), images=True, **sizes))
    write_model_files(out / "model_files")
    return out


def solve(line: str) -> int:
    """An independent solver: read the line in either format, follow the names from the question."""
    line = line.replace(" ", "").replace(":", "=").replace(",", ";")
    *statements, asked = line.split(";")
    right = dict(s.split("=") for s in statements)

    def value(name: str) -> int:
        if right[name].isdigit():
            return int(right[name])
        before, operation = right[name]
        return world.OPERATIONS[operation][value(before)]

    return value(asked.rstrip("?"))


@pytest.mark.parametrize("format", [world.PLAIN, world.WARD])
def test_answers_are_right(format):
    """A wrong gold answer would cap every accuracy and teach the wrong thing."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        chain = world.draw_chain(rng, int(rng.integers(1, 9)), format)
        assert solve(chain.text) == chain.answer


def test_operations_generate_a_group_that_is_not_solvable():
    """That makes long chains serial (Barrington 1989); operations that commute would be a sum."""
    group = PermutationGroup([Permutation(p) for p in world.OPERATIONS.values()])
    assert group.degree == 10 and not group.is_solvable and group.order() >= 1_814_400  # A10


def test_thoughts_are_right_to_the_last_step():
    """A teacher with a wrong step, or an answer that its thought does not reach, would be a cap."""
    rng = np.random.default_rng(1)
    for _ in range(300):
        chain = world.draw_chain(rng, int(rng.choice(world.SIZES)))
        first, *steps = world.think(chain).split(";")
        value = int(first.split("=")[1])
        assert first == f"{chain.names[0]}={chain.values[0]}"
        for name, step in zip(chain.names[1:], steps, strict=True):
            shown, (before, operation), after = step.split("=")
            assert shown == name and int(before) == value
            value = world.OPERATIONS[operation][value]
            assert int(after) == value
        assert value == chain.answer


def test_the_wards_options_cannot_be_guessed_without_the_operations():
    """Options that a shortcut solves measure the shortcut. The solver learns from 20,000 problems
    which answers follow the first digit and the number of statements, and takes the likeliest."""
    rng = np.random.default_rng(3)
    seen: dict = defaultdict(Counter)
    for _ in range(20_000):
        chain = world.draw_chain(rng, int(rng.choice(world.WARD_SIZES)), world.WARD)
        seen[chain.values[0], chain.size][chain.answer] += 1
    right, letters = [], Counter()
    for _ in range(4_000):
        chain = world.draw_chain(rng, int(rng.choice(world.WARD_SIZES)), world.WARD)
        options, letter = world.draw_options(rng, chain)
        likeliest = max(options, key=lambda o: seen[chain.values[0], chain.size][int(o)])
        right.append(likeliest == str(chain.answer))
        letters[letter] += 1
    assert np.mean(right) == pytest.approx(0.25, abs=0.03)  # standard error 0.007
    assert max(letters.values()) < 0.28 * 4_000


def test_train_and_test_share_no_question(world_dir):
    """A test question that training saw would be remembered, not reasoned about; in either form."""
    files = {f.stem: f.read_text().splitlines() for f in world_dir.glob("*.jsonl")}
    rows = {name: [json.loads(x) for x in lines] for name, lines in files.items()}
    tests = {r["meta"]["line"] for name in rows if name.startswith("test_") for r in rows[name]}
    assert len(tests) > 50
    trained = {row["meta"]["line"] for row in rows["rl"]}
    for row in rows["sft"] + rows["sft_direct"]:
        asked = row["messages"][0]["content"]
        if not asked.startswith("Work out"):
            trained.add(question_line(asked))
    # another spacing is no other question
    trained, tests = ({x.replace(" ", "") for x in s} for s in (trained, tests))
    assert len(trained) > 200 and not tests & trained
    assert all(world.is_test(t) for t in tests) and not any(world.is_test(t) for t in trained)


def question_line(prompt: str) -> str:
    """The line of a text prompt: from its first statement up to the "?" that ends it."""
    start = min(prompt.index(f"={d};") - 1 for d in "0123456789" if f"={d};" in prompt)
    return prompt[start : prompt.index("?", start) + 1]


def test_same_seed_same_files_and_another_seed_others(tmp_path):
    """Files that differ from run to run make runs incomparable; so does a seed without effect."""
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out, sizes = tmp_path / name, {"conversations": 20, "problems": 20, "test": 3}
        world.write_data(world.DataConfig(out=str(out), seed=seed, **sizes))
        files = (f for f in sorted(out.rglob("*")) if f.is_file())
        made.append({f.relative_to(out).as_posix(): f.read_bytes() for f in files})
    assert made[0] == made[1]
    assert made[0]["sft.jsonl"] != made[2]["sft.jsonl"]
    assert made[0]["test_image.jsonl"] != made[2]["test_image.jsonl"]
    assert made[0]["img/image-0.png"] != made[2]["img/image-0.png"]


def test_files_pass_the_check_of_the_real_scripts(world_dir):
    """The miniature must go through the code that the 7B goes through, with nothing skipped."""
    for name in ("sft", "sft_direct", "sft_images"):
        rows, faults = schema.load_conversations(world_dir / f"{name}.jsonl")
        assert len(rows) == 300 and not faults
        shown = sum(bool(r.get("images")) for r in rows)
        # the method's own data are text only
        assert 60 < shown < 160 if name == "sft_images" else shown == 0
    for task in world.TASKS:
        rows, faults = schema.load_problems(world_dir / f"test_{task}.jsonl")
        assert len(rows) == 20 and not faults
        assert all(bool(r.get("images")) == task.endswith("image") for r in rows)
        for row in rows:
            assert rewards.reward(row, f"<think>x</think>{world.final_answer(row)}").score == 1.0


def test_text_and_image_sets_hold_the_same_chains(world_dir):
    """The comparison text against image is one of form only if the problems are the same."""
    for domain in ("", "ward_", "hard_"):
        text, image = (
            [
                json.loads(x)["meta"]["line"]
                for x in (world_dir / f"test_{domain}{form}.jsonl").open()
            ]
            for form in ("text", "image")
        )
        assert text == image


def test_tokenizer_gives_every_text_back_and_keeps_common_strings_whole():
    """A tokenizer that loses a space or a byte breaks answers; split tags cost most of the time."""
    tokenizer = data.load_tokenizer(ASSETS)
    for text in (
        "a=9;k=a-3;k?",
        "<think>a=9;k=9#=8</think><answer>B: 6</answer>",
        "naïve ☃ \n\t tab  two",
        "Options:\n\nA: x",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("<think></think><answer></answer>")) == 4
    problem = {"id": "x", "task": "t", "kind": "math", "question": "a=9;a?", "answer": "9"}
    assert len(data.render_problem(problem, tokenizer, None, style="train").tokens) == 11 + len(
        "a=9;a?"
    )


def test_template_writes_what_the_published_one_writes():
    """A student who reads the prompts must see the real format: system turn, turns, image."""
    tokenizer = data.load_tokenizer(ASSETS)
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "this"},
        {"role": "user", "content": "why?"},
    ]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what?<|im_end|>\n"
        "<|im_start|>assistant\nthis<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    with_system = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be."}, chat[2]], tokenize=False
    )
    assert with_system == "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n"


def test_one_vision_token_a_glyph(world_dir):
    """Resizing or a grid that misses the cells would blur glyphs over tokens."""
    images = ImageConfig.from_dir(world_dir / "model_files")
    for task in ("image", "ward_image", "hard_image"):
        for line in (world_dir / f"test_{task}.jsonl").read_text().splitlines():
            row = json.loads(line)
            picture = load_image(world_dir / row["images"][0])
            _, grid = preprocess_image(picture, images)
            assert grid == (1, 2, 2 * len(row["meta"]["line"])) and picture.size == (
                28 * len(row["meta"]["line"]),
                28,
            )


def test_glyphs_differ():
    """Two characters with one picture could not be told apart by any model."""
    characters = world.NAMES + "0123456789=:,;?" + "".join(world.OPERATIONS)
    pictures = {world.draw_glyph(c).tobytes() for c in characters}
    assert len(pictures) == len(characters)


def test_transformers_loads_tokenizer_config_and_model(world_dir):
    """The files must be a real Hugging Face directory, not only one that our loader understands."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(world_dir / "model_files")
    config = transformers.AutoConfig.from_pretrained(world_dir / "model_files")
    assert (
        config.model_type == "qwen2_5_vl"
        and config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    count = sum(p.numel() for p in model.parameters())
    assert 0.8e6 < count < 1.5e6
    processor = transformers.Qwen2VLImageProcessor.from_pretrained(world_dir / "model_files")
    assert processor.patch_size == 14 and processor.merge_size == 2
    from model import Model, ModelConfig

    ours = Model(ModelConfig.from_dir(world_dir / "model_files"), with_vision=True)
    assert sum(p.numel() for p in ours.parameters()) == count


def test_base_batch_aligns_each_vision_token_with_its_character(tmp_path):
    """Labels off by one token would align every glyph with its neighbour, unseen in the loss."""
    write_model_files(tmp_path)
    tokenizer, images = data.load_tokenizer(tmp_path), ImageConfig.from_dir(tmp_path)
    config = base.BaseConfig(out="-", rows=8)
    batch, ids = base.make_batch(np.random.default_rng(0), config, tokenizer, images)
    assert (
        int(batch.grid_thw.prod(1).sum()) // 4
        == len(ids)
        == int(
            (
                batch.tokens
                == batch.tokens.new_tensor(tokenizer.convert_tokens_to_ids("<|image_pad|>"))
            ).sum()
        )
    )
    lengths = (batch.grid_thw[:, 2] // 2).tolist()
    lines = [tokenizer.decode(part) for part in torch.split(ids, lengths)]
    for line in lines:
        assert solve(line) in range(10) if line.endswith("?") else line[1] in world.OPERATIONS
    # an exact match of vision tokens and embeddings has no squared error; a shifted one has
    embedding = torch.randn(len(tokenizer), 16)
    exact, right = base.alignment_loss(embedding[ids], embedding, ids)
    shifted, wrong = base.alignment_loss(embedding[ids.roll(1)], embedding, ids)
    assert right == 1.0 and wrong < 0.5 and exact < shifted


def test_table_reads_what_eval_writes_and_ends_with_one_json_line(tmp_path, capsys):
    """The demo's last line is read by machines; a blind evaluation has image sets only."""
    shares = {"n": 4, "accuracy": 0.5, "low": 0.1, "high": 0.9}
    metrics = {**shares, "truncated": 0.25, "unparsed": 0.0, "tokens_mean": 3.0}
    voted = {**metrics, "pass": {"8": 0.75}, "maj": {"8": 0.25}}

    def write(folder, name, tasks, figures, budgets, right=10):
        (folder / f"eval-{name}").mkdir(parents=True)
        result = {"sets": dict.fromkeys(tasks, figures), "budgets": budgets}
        result |= {"settings": {}, "rules": {}}
        (folder / f"eval-{name}" / "result.json").write_text(json.dumps(result))
        samples = ({"task": t, "reward": float(i < right)} for t in tasks for i in range(20))
        (folder / f"eval-{name}" / "samples.jsonl").write_text(
            "".join(json.dumps(sample) + "\n" for sample in samples)
        )

    one, other = tmp_path / "one", tmp_path / "other"
    exits = {"64": dict.fromkeys(world.TASKS, {**shares, "accuracy": 0.75})}
    write(one, "sft", world.TASKS, metrics, exits)
    write(one, "blind", ("image",), metrics, {})
    write(one, "grpo", ("image",), metrics, {}, right=15)
    write(one, "sft-votes", ("text",), voted, {})
    table.show_table(table.TableConfig(out=[str(one)]))
    *story, line = capsys.readouterr().out.splitlines()
    last = json.loads(line)
    expected = {**metrics, "exit_accuracy": 0.75, "exit_low": 0.1, "exit_high": 0.9}
    assert last["sft"]["text"] == expected and last["blind"] == {"image": metrics}
    assert last["sft-votes"]["text"] == {**metrics, "pass@8": 0.75, "maj@8": 0.25}
    told = next(x for x in story if x.startswith("SFT on text, with thoughts"))
    assert told.split()[-4:] == ["50.0"] * 4
    # 5 of 20 questions are right only after GRPO: mean 0.25, SE sqrt(0.25 × 0.75 / 19), t 2.093
    told = next(x for x in story if x.startswith("What GRPO gains"))
    assert told.rstrip().endswith("+25.0 (4.2 … 45.8)") and told.count("+25.0") == 1
    write(other, "sft", ("text",), {**metrics, "accuracy": 0.7}, exits)
    table.show_table(table.TableConfig(out=[str(one), str(other)]))  # only what both folders have
    pooled = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(pooled) == ["sft"] and list(pooled["sft"]) == ["text"]
    row = pooled["sft"]["text"]
    assert row["each"] == [0.5, 0.7] and row["n"] == 8 and row["accuracy"] == pytest.approx(0.6)
    assert 0.27 < row["low"] < 0.6 < row["high"] < 0.87  # narrower than one seed's
    with pytest.raises(ValueError, match="demo.sh"):
        table.show_table(table.TableConfig(out=[str(tmp_path / "nothing")]))


def test_same_vision_sees_one_changed_bit(tmp_path):
    """The claim that training left the tower alone is worth nothing if the test cannot fail."""
    from safetensors.torch import save_file

    tower = {"visual.a": torch.randn(3, 4).to(torch.bfloat16), "model.b": torch.zeros(2)}
    changed = {"visual.a": tower["visual.a"].clone(), "model.b": torch.ones(2)}
    for name, weights in (("base", tower), ("same", changed)):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    assert table.same_vision(tmp_path / "base", tmp_path / "same")
    changed["visual.a"].view(torch.int16)[1, 2] ^= 1
    save_file(changed, tmp_path / "same" / "model.safetensors")
    assert not table.same_vision(tmp_path / "base", tmp_path / "same")


def test_answers_without_thoughts_stand_beside_the_same_questions(world_dir):
    """A control on other questions would compare data sets, not thoughts."""
    with_thoughts, without = (
        [
            [m["content"] for m in json.loads(x)["messages"]]
            for x in (world_dir / f"{name}.jsonl").open()
        ]
        for name in ("sft", "sft_direct")
    )
    assert [row[0] for row in with_thoughts] == [row[0] for row in without]
    assert [row[1].rpartition("</think>\n")[2] for row in with_thoughts] == [
        row[1] for row in without
    ]


def test_without_alignment_the_goal_is_a_rotation_and_no_word():
    """The ablation is one of alignment alone if the goal is as easy to tell apart but no word."""
    words = torch.randn(50, 16)
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.embed_tokens = torch.nn.Embedding.from_pretrained(words)
    same, other = (base.goal(model, base.BaseConfig(out="-", align=a)) for a in (True, False))
    assert torch.equal(same, words) and (other - words).norm() > words.norm()
    torch.testing.assert_close(other @ other.T, words @ words.T, atol=1e-4, rtol=1e-4)


def test_image_form_of_the_conversations_says_the_same(world_dir):
    """The control with images must ask the same questions, with the same thoughts and answers."""
    text, images = (
        [json.loads(x) for x in (world_dir / f"{name}.jsonl").open()]
        for name in ("sft", "sft_images")
    )
    for one, other in zip(text, images):
        (asked, reply), (shown, same) = (
            [m["content"] for m in row["messages"]] for row in (one, other)
        )
        assert reply == same
        if other.get("images"):
            before, after = shown.split("<image>")
            assert asked.startswith(before) and asked.endswith(after)
            line = asked[len(before) : len(asked) - len(after)]
            width = load_image(world_dir / other["images"][0]).width
            assert solve(line) in range(10) and width == world.CELL * len(line)
        else:
            assert asked == shown


@pytest.mark.parametrize("command", ["data", "base"])
def test_a_folder_of_something_else_is_refused_untouched(command, tmp_path):
    """`toy base --out toy/assets` copied a file onto itself; `toy data` wrote between its files."""
    out = tmp_path / "assets"
    shutil.copytree(ASSETS, out)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    make, settings = {
        "data": (world.write_data, world.DataConfig(out=str(out), conversations=1)),
        "base": (base.make_base, base.BaseConfig(out=str(out), steps=1, align_steps=1)),
    }[command]
    with pytest.raises(ValueError, match="assets: holds other files .*name a new directory"):
        make(settings)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before


@pytest.mark.parametrize(
    "config, flag",
    [
        *((base.BaseConfig, f"--{f} 0") for f in ("steps", "align_steps", "rows")),
        *((world.DataConfig, f) for f in ("--conversations -5", "--problems 0", "--test 0")),
    ],
)
def test_sizes_out_of_range_are_refused(config, flag, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse_config(config, "", ["--out", str(tmp_path / "o"), *flag.split()])
    assert end.value.code == 2 and flag.split()[0] in capsys.readouterr().err
