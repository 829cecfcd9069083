"""Weights in and out against transformers, byte for byte; broken and mistyped model directories."""

import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_model import load, text_stream
from tiny import make_tiny_tokenizer
from tiny_model import make_tiny, make_tiny_qwen2, make_tiny_vl, reference

from core.optim import adamw, guarded_step
from core.weights import INDEX, WeightFiles, export_hf, parameter_name
from model import build_model, check_model_dir, resolve_model_dir


def tensors(folder):
    """{name: tensor} of all safetensors files of a directory."""
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def in_many_files(model_dir, out):
    """A copy of a model directory with the weights in four files and an index."""
    shutil.copytree(model_dir, out)
    (out / "model.safetensors").unlink()
    weights = tensors(model_dir)
    names = {k: f"model-{i % 4 + 1:05d}-of-00004.safetensors" for i, k in enumerate(weights)}
    for name in set(names.values()):
        save_file({k: weights[k] for k in weights if names[k] == name}, out / name)
    size = sum(t.nbytes for t in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (out / INDEX).write_text(json.dumps(index))
    return out


@pytest.fixture(scope="module")
def bf16_dir(tmp_path_factory):
    path = make_tiny_vl(tmp_path_factory.mktemp("bf16"), dtype=torch.bfloat16)
    make_tiny_tokenizer(path)
    (path / "preprocessor_config.json").write_text("{}")
    return path


def test_load_and_export_give_every_byte_back(bf16_dir, world, tmp_path):
    """bf16 → fp32 masters → bf16; also in many files with an index, as the 7B is published."""
    source, many = tensors(bf16_dir), in_many_files(bf16_dir, tmp_path / "source")
    export_hf(build_model(bf16_dir, world), bf16_dir, tmp_path / "one", world)
    export_hf(build_model(many, world), many, tmp_path / "many", world)
    for out in (tmp_path / "one", tmp_path / "many"):
        again = tensors(out)
        assert again.keys() == source.keys()
        assert all(
            torch.equal(again[n], t) and again[n].dtype == t.dtype for n, t in source.items()
        )
        assert {"config.json", "tokenizer.json", "preprocessor_config.json"} <= {
            p.name for p in out.iterdir()
        }
        assert not out.with_name(out.name + ".tmp").exists()
    assert not (tmp_path / "one" / INDEX).exists()
    theirs, ours = (json.loads((d / INDEX).read_text()) for d in (many, tmp_path / "many"))
    assert ours == theirs
    assert WeightFiles(tmp_path / "many").check(build_model(many, world)) is None


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen2", "qwen3"])
def test_what_is_exported_loads_in_transformers_with_our_logits(kind, tied, world, tmp_path):
    """After a step, so that the weights are ours: the source's keys, no tensor missing,
    unknown or made at random, and those that were not trained byte-equal."""
    source = make_tiny(tmp_path / "m", kind, tied=tied)
    model, (tokens, positions, cu) = build_model(source, world), text_stream([12])
    optimizer = adamw(model, lr=1e-2, weight_decay=0.0)
    (-model(tokens, positions, cu, targets=tokens)[0].sum()).backward()
    guarded_step(model, optimizer, lr=1e-2, max_norm=1.0, loss=1.0)
    export_hf(model, source, tmp_path / "out", world)
    theirs = reference(tmp_path / "out")(input_ids=tokens[None]).logits[0]
    assert (model(tokens, positions, cu) - theirs).abs().max() <= 1e-5
    assert (load(source)(tokens, positions, cu) - theirs).abs().max() > 1e-2
    before, after = tensors(source), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]) == (".visual" in f".{key}"), key


@pytest.mark.parametrize(
    "written, published",
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("visual.merger.mlp.0.bias",) * 2,
    ],
)
def test_names_of_every_transformers_version_mean_the_same(written, published):
    assert parameter_name(written) == published


def broken(kind, folder):
    """Break a copy of a model directory in one way."""
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    weights = tensors(folder)
    name = next(n for n in weights if n.endswith("layers.0.mlp.up_proj.weight"))
    if kind == "no weights":
        file.unlink()
    elif kind == "a pickle":
        file.rename(folder / "pytorch_model.bin")
    elif kind == "cut short":
        file.write_bytes(file.read_bytes()[:-1000])
    elif kind == "a parameter less":
        save_file({n: t for n, t in weights.items() if n != name}, file)
    elif kind == "an unknown tensor":
        save_file({**weights, "model.layers.0.self_attn.q_norm.weight": torch.ones(4)}, file)
    elif kind == "another shape":
        save_file({**weights, name: weights[name][1:].contiguous()}, file)
    elif kind == "config.json of another size":
        config["text_config"]["num_hidden_layers"] = 2
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "kind, words",
    [
        ("no weights", "no *.safetensors weights"),
        ("a pickle", "convert pickles"),
        ("cut short", "missing or truncated"),
        ("a parameter less", "1 parameters are missing"),
        ("an unknown tensor", "q_norm.weight; is config.json from another model"),
        ("another shape", "has shape (95, 64)"),
        ("config.json of another size", "not part of this architecture"),
    ],
)
def test_broken_directories_are_named(bf16_dir, tmp_path, kind, words):
    """Each in words that say what to do, from the headers alone; loading it anyway would
    train nonsense."""
    shutil.copytree(bf16_dir, tmp_path / "m")
    check_model_dir(tmp_path / "m")
    broken(kind, tmp_path / "m")
    with pytest.raises(ValueError) as error:
        check_model_dir(tmp_path / "m")
    assert words in str(error.value) and str(tmp_path / "m") in str(error.value)


def test_a_stale_head_of_a_tied_model_is_not_exported(world, tmp_path):
    """transformers prefers a head that the files hold to the embedding, so it would undo the
    training. In a file of its own, as in Qwen3-1.7B, it leaves a single shard, which transformers
    finds by the index only."""
    from transformers import Qwen2ForCausalLM

    source = make_tiny_qwen2(tmp_path / "m", tied=True)
    weights = tensors(source)
    (source / "model.safetensors").unlink()
    stale = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    save_file(weights, source / first, metadata={"format": "pt"})
    save_file(stale, source / second, metadata={"format": "pt"})
    names = dict.fromkeys(weights, first) | dict.fromkeys(stale, second)
    (source / INDEX).write_text(json.dumps({"weight_map": names}))
    model, (tokens, positions, cu) = build_model(source, world), text_stream([12])
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    export_hf(model, source, tmp_path / "out", world)
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path / "out")(input_ids=tokens[None]).logits[0]
    assert (model(tokens, positions, cu) - theirs).abs().max() <= 1e-4


def test_an_export_to_a_full_disk_says_so_and_leaves_no_model(
    bf16_dir, world, tmp_path, monkeypatch
):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device")

    model = build_model(bf16_dir, world)
    monkeypatch.setattr("core.weights.save_file", full)
    with pytest.raises(ValueError, match="safetensors: I/O error: No space left .* make room"):
        export_hf(model, bf16_dir, tmp_path / "out", world)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "model", "a/b/c"])
def test_a_mistyped_directory_is_not_looked_for_in_the_hub(world, name):
    with pytest.raises(ValueError, match="no such directory"):
        resolve_model_dir(name, world)


def test_a_hub_id_beside_a_directory_named_like_its_owner_is_downloaded(
    world, tmp_path, monkeypatch
):
    """With a folder Qwen/ of models, MODEL=Qwen/Qwen3-VL-4B-Instruct was refused as a mistyped
    directory; one that is neither here nor there is still named as such."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **k: f"cache/{name}")
    assert str(resolve_model_dir("Qwen/Qwen3", world)) == "cache/Qwen/Qwen3"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: 1 / 0)
    with pytest.raises(ValueError, match="no such directory, and the hub does not give it"):
        resolve_model_dir("Qwen/typo", world)


def test_a_run_or_a_checkpoint_for_a_model_is_told_where_the_model_is(world, tmp_path):
    """--model OUT said `model_type None`, --model OUT/checkpoints/step_N `config.json: not
    found`."""
    (tmp_path / "final").mkdir()
    for file in ("config.json", "final/config.json"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match="a run directory; its model is .*/final"):
        resolve_model_dir(str(tmp_path), world)
    assert resolve_model_dir(str(tmp_path / "final"), world) == tmp_path / "final"
    (tmp_path / "step_4").mkdir()
    (tmp_path / "step_4" / "complete.json").write_text("{}")
    with pytest.raises(ValueError, match="tools.export .*step_4 --out DIR"):
        resolve_model_dir(str(tmp_path / "step_4"), world)


@pytest.mark.parametrize(
    "files, words",
    [
        ([], "an empty directory; a model directory has config.json, "),
        (["notes.txt"], "no config.json; a model directory has"),
        (["a.gguf"], "a.gguf is not supported; fetch the weights as published"),
        (["Qwen2.5-7B/config.json"], "no model, but .*/Qwen2.5-7B may be one"),
        (["snapshots/0123/config.json"], "no model, but .*/snapshots/0123 may be one"),  # hub cache
        (["step_2/complete.json"], "checkpoints, .* tools.export .*/step_2 --out DIR"),
        (["config.json", "checkpoints/step_2/complete.json"], "tools.export .*/step_2 --out DIR"),
        (["adapter_config.json"], "a LoRA adapter: train with --model Qwen/Base --adapter"),
    ],
)
def test_what_a_directory_is_instead_of_a_model_is_said_first(world, tmp_path, files, words):
    """Each said that tokenizer.json or *.safetensors is missing: true, and no help."""
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text('{"base_model_name_or_path": "Qwen/Base"}')
    with pytest.raises(ValueError, match=words):
        resolve_model_dir(str(tmp_path), world)
    for file in files:
        with pytest.raises(ValueError, match="a file; name a directory"):
            resolve_model_dir(str(tmp_path / file), world)


def test_a_stale_file_beside_the_weights_is_refused(bf16_dir, tmp_path):
    """Left over from another download, its tensors would silently take the place of the new."""
    shutil.copytree(bf16_dir, tmp_path / "m")
    save_file({"model.norm.weight": torch.zeros(64)}, tmp_path / "m" / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors: holds model.norm.weight, as model.s"):
        WeightFiles(tmp_path / "m")
