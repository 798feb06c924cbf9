"""caption.py's published captioners, beside the numbers in test_parity: layouts of the same weights,
batches, sampling, captions of shards with their scores and rejects, and fine-tuning."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import caption as c
import prepare_data

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
LLAVA, QWEN = FIXTURES / "vlm-llava15", FIXTURES / "vlm-qwen2"


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with data/set: 9 clips of different length in 3 shards, 4 with a caption, a still."""
    folder, rows = tmp_path_factory.mktemp("families"), []
    for i in range(9):
        frames = []
        for t in range(6 + 2 * i):
            frame = np.full((40, 56, 3), 20 + 8 * i, np.uint8)
            frame[10:22, 2 * t:12 + 2 * t] = (230, 50, 20 * i)
            frames.append(frame)
        prepare_data.write_video(folder / "videos" / f"{i}.mp4", frames, 8)
        rows.append({"video": f"{i}.mp4", "split": "test" if i % 4 == 3 else "train"}
                    | ({"caption": f"a red block number {i}"} if i % 2 else {}))
    prepare_data.Image.fromarray(frames[0]).save(folder / "videos" / "still.png")
    (folder / "meta.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    subprocess.run([sys.executable, str(ROOT / "prepare_data.py"), "set", "--videos", "videos",
                    "--meta", "meta.jsonl", "--workers", "2", "--shard_sources", "4",
                    "--min_seconds", "0.3"], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def quick(home, monkeypatch):
    monkeypatch.chdir(home)
    return lambda *args: c.main([str(arg) for arg in args])


def said(home, source):
    return [json.loads(line) for path in sorted(home.glob(f"data/set/*.captions-{source}.jsonl"))
            for line in open(path)]


def changed(folder, source, config=None, rename=None, drop=()):
    """Copies a fixture with another config, renamed tensors, or without some."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("io.*"))
    for path in folder.iterdir():
        path.chmod(0o644)
    if config:
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(old | config))
    tensors = load_file(folder / "model.safetensors")
    tensors = {rename(name) if rename else name: t for name, t in tensors.items() if name not in drop}
    save_file(tensors, folder / "model.safetensors")
    return folder


def refused(capsys, *args, call=None):
    with pytest.raises(SystemExit) as left:
        (call or c.main)(*args)
    err = capsys.readouterr().err
    assert left.value.code == 2 and err.count("\n") == 1, err
    return err


# -- folders ---------------------------------------------------------------------------------------

@torch.no_grad()
def answers(model, most=12):
    frame = np.asarray(c.Image.open(LLAVA / "image.png").convert("RGB"))
    text = model.prompt("Describe this image in detail.")
    seen = [model.read(text, [frame])] if model.tower else [model.read(text)]
    request, = model.requests(["a"], seen)
    return next(c.generate(model.decoder, [request], 1, most))[1]


def test_other_layouts_of_the_same_weights(tmp_path):
    """Shards of .bin, transformers 5's names, LLaVA's own layout with its tower in the folder or beside it."""
    wanted = load_file(LLAVA / "io.safetensors")["generated"].tolist()
    model = c.open_vlm(LLAVA)
    assert answers(model) == wanted
    frame = np.zeros((40, 60, 3), np.uint8)              # a question may contain the image token
    assert model.read(model.prompt("is <image> a word?"), [frame])[0].count(-1) == 1
    folder = changed(tmp_path / "bin", LLAVA)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        where.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    assert answers(c.open_vlm(folder)) == wanted

    def new_names(name):
        if name.startswith("language_model.model"):
            return name.replace("language_model.model", "model.language_model")
        return name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"
    assert answers(c.open_vlm(changed(tmp_path / "five", LLAVA, rename=new_names))) == wanted

    def own_names(name):
        for theirs, old in (("language_model.", ""), ("multi_modal_projector.linear_1", "model.mm_projector.0"),
                            ("multi_modal_projector.linear_2", "model.mm_projector.2"),
                            ("vision_tower.", "model.vision_tower.vision_tower.")):
            name = name.replace(theirs, old)
        return name
    config = json.loads((LLAVA / "config.json").read_text())
    own = config["text_config"] | {"model_type": "llava", "mm_vision_tower": "clip", "text_config": None,
                                   "vision_config": None, "mm_projector_type": "mlp2x_gelu"}
    folder = changed(tmp_path / "own", LLAVA, own, own_names)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in own.items() if v is not None}))
    (folder / "clip").mkdir()
    (folder / "clip" / "config.json").write_text(json.dumps({"vision_config": config["vision_config"]}))
    model = c.open_vlm(folder)
    assert model.spec.prompt.startswith("A chat between") and not model.spec.slot
    model.spec.prompt = "USER: \0\n{q} ASSISTANT:"
    assert answers(model) == wanted
    inside = {name: t for name, t in load_file(folder / "model.safetensors").items()}
    save_file({name.replace("model.vision_tower.vision_tower.", ""): t for name, t in inside.items()
               if "vision_tower" in name}, folder / "clip" / "model.safetensors")
    save_file({name: t for name, t in inside.items() if "vision_tower" not in name},
              folder / "model.safetensors")
    model = c.open_vlm(folder)
    model.spec.prompt = "USER: \0\n{q} ASSISTANT:"
    assert answers(model) == wanted


def test_sentencepiece_alone_gives_the_same_ids(tmp_path):
    folder = changed(tmp_path / "pieces", LLAVA)
    whole = c.Tokens(folder)
    (folder / "tokenizer.json").unlink()
    segments = c.Tokens(folder)
    for text in ("USER: <image>\nDescribe, 2024. ASSISTANT:", "a  b", "<pad>é🙂", ""):
        assert whole.encode(text) == segments.encode(text)
        assert whole.decode(whole.encode(text)).strip() == segments.decode(segments.encode(text)).strip() \
            or "<" in text
    assert whole.first == segments.first == [1] and len(whole) == len(segments) == 386
    told = json.loads((folder / "tokenizer_config.json").read_text())
    added = told.pop("added_tokens_decoder")                 # older folders have added_tokens.json
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "added_tokens.json").unlink(missing_ok=True)
    assert len(c.Tokens(folder)) == 384
    (folder / "added_tokens.json").write_text(json.dumps(
        {token["content"]: int(i) for i, token in added.items()}))
    assert c.Tokens(folder).encode("a <image>") == whole.encode("a <image>")
    assert segments.id("<image>") == 384 and segments.id("</s>") == 2 and segments.id("nothing") is None
    (folder / "tokenizer.model").unlink()
    with pytest.raises(SystemExit):
        c.Tokens(folder)


def test_folders_that_are_refused(tmp_path, capsys):
    def line(name, *args, **options):
        return refused(capsys, changed(tmp_path / name, *args, **options), call=c.open_vlm)
    assert "model_type falcon is not supported" in line("kind", QWEN, {"model_type": "falcon"})
    assert "rope_scaling yarn" in line("rope", QWEN, {"rope_scaling": {"type": "yarn", "factor": 2}})
    down = "model.layers.1.mlp.down_proj.weight"
    assert f"{down} is missing" in line("less", QWEN, drop=(down,))
    assert "unexpected" in line("more", QWEN, rename=lambda name: name.replace("norm.", "nrm."))
    assert "is [420, 64], not [421, 64]" in line("size", QWEN, {"vocab_size": 421})
    assert "select strategy full" in line("take", LLAVA, {"vision_feature_select_strategy": "full"})
    assert "kv_heads 3" in line("heads", QWEN, {"num_key_value_heads": 3})
    assert "must be numbers above 0" in line("null", QWEN, {"num_attention_heads": None})
    assert "lm_head.weight is missing" in line(
        "headless", LLAVA, {"tie_word_embeddings": False}, drop=("language_model.lm_head.weight",))
    assert "model.embed_tokens.weight is missing" in line("nothing", QWEN, drop=("model.embed_tokens.weight",
                                                                    "lm_head.weight"))
    assert "has no <image>" in refused(capsys, LLAVA, "cpu", torch.float32, QWEN, call=c.open_vlm)
    folder = changed(tmp_path / "dynamic", QWEN, {
        "rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 40})
    model = c.open_vlm(folder)                               # unscaled positions up to that length
    assert answers(model) == answers(c.open_vlm(QWEN))
    assert "40 positions" in refused(capsys, "", [5] * 41, [], None, [], call=model.request)
    folder = changed(tmp_path / "sizes", QWEN)
    (folder / "config.json").write_text('{"model_type": "qwen2", "hidden_size": 64}')
    assert "layers.0.mlp.up_proj.weight is [96, 64], not [22016, 64]" in refused(capsys, folder, call=c.open_vlm)
    for text in ("{", "[]"):
        (folder / "config.json").write_text(text)
        assert "holds no JSON object" in refused(capsys, folder, call=c.open_vlm)
    folder = changed(tmp_path / "spoilt", QWEN)
    (folder / "tokenizer.json").write_text("{")
    assert "is no tokenizer" in refused(capsys, folder, call=c.open_vlm)
    folder = changed(tmp_path / "torn", QWEN)
    whole = (folder / "model.safetensors").read_bytes()
    for part in (whole[:len(whole) // 2], whole[:4], b""):
        (folder / "model.safetensors").write_bytes(part)
        assert "cannot be read as weights" in refused(capsys, folder, call=c.open_vlm)
    folder = changed(tmp_path / "mute", QWEN)
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json"):
        (folder / name).unlink(missing_ok=True)
    assert "has no tokenizer" in refused(capsys, folder, call=c.open_vlm)
    assert c.open_vlm(folder, tokenizer=QWEN).stop           # another folder's tokenizer


# -- writing ---------------------------------------------------------------------------------------

def requests_of(model, texts):
    return [model.request(text, *model.read(model.prompt(text)), []) for text in texts]


def answers_of(model, request, most=9):
    return next(c.generate(model.decoder, [request], 1, most))[1]


def test_rows_do_not_depend_on_their_batch():
    """Greedy and sampled texts are equal alone, in continuous batches, with and without a shared prefix, and
    recomputed without a cache."""
    model, texts = c.open_vlm(QWEN), [f"{'tell me more ' * i}about {i}" for i in range(7)]
    for how in ({}, {"temperature": 0.7, "top_p": 0.8, "seed": 3}):
        alone = {}
        for request in requests_of(model, texts):
            (_, ids, score), = c.generate(model.decoder, [request], 1, 9, stop={7, 260}, **how)
            alone[request.key] = ids, round(score, 4)
        for batch in (2, 7):
            result = {request.key: (ids, round(score, 4)) for request, ids, score in c.generate(
                model.decoder, requests_of(model, texts), batch, 9, stop={7, 260}, **how)}
            assert result == alone
        assert len({tuple(ids) for ids, _ in alone.values()}) > 1
    shared = list(range(40, 70))                             # and a prompt that is the prefix alone
    texts = [model.request(str(n), ids, [], None, []) for n, ids in enumerate(
        ([*shared, 5, 6], [*shared, 7], shared[:29], shared))]
    alone = [answers_of(model, text) for text in texts]
    result = {request.key: ids for request, ids, _ in c.generate(model.decoder, texts, 2, 9)}
    assert [result[str(n)] for n in range(4)] == alone
    request = requests_of(model, [f"{'tell me more ' * 3}about 3"])[0]
    (_, ids, _), = c.generate(model.decoder, [request], 1, 9)
    for i in range(9):
        whole = torch.tensor([request.ids + ids[:i]])
        h = model.decoder(model.decoder.embed(whole), torch.arange(whole.shape[1]))
        assert model.decoder.logits(h)[0, -1].argmax() == ids[i]


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("lengths", [(5, 40, 17), (38, 40, 37)])
def test_rows_of_other_lengths(window, lengths):
    """An answer does not depend on its batch."""
    torch.manual_seed(0)
    stack = c.TransformerConfig(16, 2, 4, kv_heads=2, causal=True, norm="rms", glu=True, window=window)
    decoder = c.Decoder(stack, 50)
    ids = [torch.randint(50, (n,)).tolist() for n in lengths]
    texts = [c.Request(f"{n}", i, decoder.read(i).detach(), torch.arange(n)) for n, i in
             zip(lengths, ids)]
    alone = {text.key: next(c.generate(decoder, [text], 1, 12)) for text in texts}
    for text, tokens, score in c.generate(decoder, texts, 3, 12):
        _, wanted, mean = alone[text.key]
        assert tokens == wanted and score == pytest.approx(mean, abs=1e-5)


def test_choose():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0, 9.0]]).repeat(2000, 1)
    assert c.choose(logits[:1], None, 0, 1.0, 5)[0].item() == 4
    draws = torch.linspace(0, 0.9999, 2000)
    token, logprob = c.choose(logits, draws, 1.0, 1.0, 4)            # 4: a padding row of the embeddings
    share = torch.bincount(token, minlength=5) / 2000
    torch.testing.assert_close(share[:4], logits[0, :4].softmax(-1), atol=2e-3, rtol=0)
    assert share[4] == 0
    torch.testing.assert_close(logprob[0], logits[0].log_softmax(-1)[token[0]])
    token, _ = c.choose(logits, draws, 1.0, 0.7, 4)                  # 0.64 + 0.24 reach 0.7
    assert set(token.tolist()) == {1, 2}
    token, _ = c.choose(logits, draws, 1.0, 1e-6, 4)
    assert set(token.tolist()) == {1}


def test_stop_marks_and_chat_templates(tmp_path):
    model = c.open_vlm(QWEN)
    assert model.spec.prompt == c.CHATML and model.stop == {406, 408}
    model.spec.stop = ("how",)                                       # a text that is not one token
    request, = requests_of(model, ["x"])
    free = next(c.generate(model.decoder, [request], 1, 40))[1]
    text = model.tokens.decode(free)
    mark = text[4:6]
    model.spec.stop, model.stop = (mark,), set()
    (_, cut, _), = model.write([request], most=40)
    assert cut == text.split(mark)[0].strip()
    config = json.loads((QWEN / "tokenizer_config.json").read_text())
    folder = changed(tmp_path / "inst", QWEN)
    (folder / "tokenizer_config.json").write_text(json.dumps(
        config | {"chat_template": "{{ '<|start_header_id|>user' + messages[0].content }}"}))
    assert c.open_vlm(folder).prompt("q").startswith("<|start_header_id|>user")  # not the vocabulary
    assert c.rewrite(model, "a dog", ["A big dog runs."], most=8)


def test_metrics_words():
    assert c.words_of("The dog's bone isn't “here”, 3.5 m!") == [
        "the", "dog", "'s", "bone", "is", "n't", "here", "3", "5", "m"]
    scores = c.score_captions({"a": "x y", "b": ""}, {"a": ["x y", "z"], "b": ["q"]})
    assert scores["rouge_l_each"] == {"a": 1.0, "b": 0.0} and scores["bleu"][0] > 0


# -- captions of clips -----------------------------------------------------------------------------

def test_frames_by_rule(home):
    folder = home / "data" / "set"
    rows = {row["source"]: row for row in prepare_data.open_dataset(folder)}
    row = rows["8.mp4"]                                              # 22 frames, 8 a second
    for rule, wanted in ((("uniform", 1), [11]), (("uniform", 4), [0, 7, 14, 21]),
                         (("fps", 2.0), [2, 6, 10, 14, 18]), (("fps", 0.1), [21])):
        frames, times = c.pick_frames(rule, folder, row)
        assert [round(at * 8) for at in times] == wanted and len(frames) == len(wanted), rule
    frames, times = c.pick_frames(("key", 3), folder, row)
    assert len(frames) == 3 and times == sorted(times)
    for rule in (("uniform", 1), ("uniform", 8), ("fps", 1.0), ("key", 2)):
        frames, _ = c.pick_frames(rule, folder, rows["still.png"])
        assert len(frames) >= 1 and frames[0].shape == (40, 56, 3)


def test_a_question_may_hold_anything():
    """A NUL in a question, which another model may have written, is removed."""
    model = c.open_vlm(LLAVA)
    ids, pixels, _ = model.read(model.prompt("a \0 b"), [np.zeros((30, 30, 3), np.uint8)])
    assert ids.count(-1) == len(pixels) == 1


@pytest.mark.parametrize("frames, fps, rule, seconds", [
    (13, 8, ["uniform", 8], 2 * 1.5 / 7), (3, 8, ["uniform", 8], 2 * 0.25 / 7),
    (1, 8, ["uniform", 8], 2.0), (1, None, ["uniform", 8], None)])
def test_a_video_is_looked_at(monkeypatch, frames, fps, rule, seconds):
    """Training and captioning read a video with the mean frame distance, a still as an image."""
    class Seer:
        def read(self, prompt, frames, is_video=False, seconds=None):
            return len(frames), is_video, seconds
    monkeypatch.setattr(c, "frames_of", lambda folder, row, at: np.zeros((len(at), 4, 4, 3), np.uint8))
    row = {"frames": frames, "fps": fps}
    (read,), _ = c.frames_for(Seer(), "", True, rule, None, row)
    assert read[:2] == ((1 if frames == 1 else 8), fps is not None)
    assert read[2] == (pytest.approx(seconds) if seconds else None)


def test_captions_summaries_scores_and_rejects(home, quick, tmp_path, monkeypatch):
    clip = clip_folder(tmp_path / "clip")
    head = {"weight": torch.randn(1, 24), "bias": torch.ones(1)}
    torch.save(head, tmp_path / "head.pth")
    options = ["set", "--vlm", LLAVA, "--lm", QWEN, "--frames", "fps:2", "--max_tokens", 8, "--batch",
               3, "--style", "tags", "--source", "both", "--clip", clip, "--aesthetics",
               tmp_path / "head.pth", "--all", "--eval"]
    monkeypatch.setattr(c, "fault", lambda text, style: "length" if "a" in text else None)
    quick(*options)
    folder = home / "data" / "set"
    rows, result = prepare_data.open_dataset(folder), said(home, "both")
    refused_rows = [json.loads(line) for path in folder.glob("*.rejected-captions-both.jsonl")
                    for line in open(path)]
    assert len(result) + len(refused_rows) == len(rows) == 10
    assert all(row["rejected"] == "length" for row in refused_rows)
    for row in result:
        assert set(row["scores"]) == {"logprob", "logprob_frames", "clip", "aesthetic"}
        assert -1 <= row["scores"]["clip"] <= 1 and row["prompt"].startswith("List what this image")
    figures = json.loads((folder / "captions-both.eval.json").read_text())
    assert 0 < figures["clips"] <= 4 and {"bleu_4", "rouge_l", "cider"} <= set(figures)
    sources = {caption["source"] for row in rows for caption in row["captions"]}
    assert sources == {"meta", "both"} and (folder / "captions-both.png").exists()
    # finished shards are skipped; a truncated file is completed to the same bytes
    path = sorted(folder.glob("*.captions-both.jsonl"))[0]
    kept, reject = path.read_bytes(), c.rejected_path(path)
    before = path.stat().st_mtime_ns
    quick(*options)
    assert path.stat().st_mtime_ns == before
    path.unlink()
    lost = reject.read_bytes() if reject.exists() else None
    part, other = (c.part_path(path, c.parse([str(each) for each in (*options, *more)]))
                   for more in ((), ("--seed", 5)))
    part.write_bytes(kept[:len(kept) // 2])
    other.write_bytes(kept.replace(b"caption", b"begun otherwise"))
    quick(*options)
    assert path.read_bytes() == kept and not part.exists() and not other.exists()
    assert lost is None or reject.read_bytes() == lost
    path.unlink()                                            # from here on none is rejected
    monkeypatch.setattr(c, "fault", lambda text, style: None)
    quick(*options)
    assert not reject.exists() and len(path.read_bytes()) > len(kept)


def clip_folder(folder):
    """A small CLIP folder: the fixture's text tower, a vision tower of random weights."""
    text = FIXTURES / "clip-text"
    source = text / "encoder" if (text / "encoder").exists() else text
    shutil.copytree(source, folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    config, tensors = json.loads((folder / "config.json").read_text()), {}
    for name, t in c.read_tensors(source).items():
        tensors[name if name.startswith("text_model.") else f"text_model.{name}"] = t.clone()
    vision = json.loads((LLAVA / "config.json").read_text())["vision_config"]
    for name, t in load_file(LLAVA / "model.safetensors").items():
        if name.startswith("vision_tower."):
            tensors[name.removeprefix("vision_tower.")] = t.float()
    tensors["visual_projection.weight"] = torch.randn(24, 48)
    width = tensors["text_model.final_layer_norm.weight"].shape[0]
    tensors["text_projection.weight"] = torch.randn(24, width)
    tensors["logit_scale"] = torch.tensor(4.6)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(
        {"model_type": "clip", "projection_dim": 24, "text_config": config, "vision_config": vision}))
    return folder


def published(name, layer):
    """One of torch's encoder layers under SigLIP's names."""
    result, state = {}, layer.state_dict()
    for kind in ("weight", "bias"):
        for part, each in zip("qkv", state[f"self_attn.in_proj_{kind}"].chunk(3)):
            result[f"{name}.self_attn.{part}_proj.{kind}"] = each
        for theirs, ours in (("self_attn.out_proj", "self_attn.out_proj"), ("linear1", "mlp.fc1"),
                             ("linear2", "mlp.fc2"), ("norm1", "layer_norm1"), ("norm2", "layer_norm2")):
            result[f"{name}.{ours}.{kind}"] = state[f"{theirs}.{kind}"]
    return result


def test_siglip_scores_as_torchs_own_layers_do(tmp_path):
    """Random weights, compared with nn.TransformerEncoderLayer and nn.MultiheadAttention."""
    torch.manual_seed(0)
    D, gelu, tensors = 32, torch.nn.GELU("tanh"), {}
    sight, text = ([torch.nn.TransformerEncoderLayer(D, 4, 64, 0, gelu, 1e-6, True, True).eval()
                    for _ in range(2)] for _ in range(2))
    for part, layers in ("vision_model", sight), ("text_model", text):
        for i, layer in enumerate(layers):
            for weight in layer.parameters():
                torch.nn.init.normal_(weight, std=0.3)
            tensors |= published(f"{part}.encoder.layers.{i}", layer)
    patch, probe = torch.nn.Conv2d(3, D, 7, 7), torch.randn(1, 1, D)
    reader, fc1, fc2 = torch.nn.MultiheadAttention(D, 4, batch_first=True), *(
        torch.nn.Linear(*shape) for shape in ((D, 64), (64, D)))
    said, words = torch.nn.Linear(D, D), torch.randn(386, D)
    places, order = torch.randn(16, D), torch.randn(12, D)
    norms = [torch.nn.LayerNorm(D, eps=1e-6) for _ in range(3)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    for name, module in {
            "vision_model.embeddings.patch_embedding": patch, "vision_model.head.attention": reader,
            "vision_model.head.mlp.fc1": fc1, "vision_model.head.mlp.fc2": fc2, "text_model.head": said,
            "vision_model.post_layernorm": norms[0], "vision_model.head.layernorm": norms[1],
            "text_model.final_layer_norm": norms[2]}.items():
        tensors |= {f"{name}.{key}": t for key, t in module.state_dict().items()}
    tensors |= {"vision_model.head.probe": probe, "text_model.embeddings.token_embedding.weight": words,
                "vision_model.embeddings.position_embedding.weight": places,
                "text_model.embeddings.position_embedding.weight": order,
                "logit_scale": torch.ones(1), "logit_bias": torch.ones(1)}
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "model.safetensors")
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "siglip", "vision_config": sizes | {"image_size": 28, "patch_size": 7},
        "text_config": sizes | {"vocab_size": 386, "max_position_embeddings": 12}}))
    shutil.copy(LLAVA / "tokenizer.model", tmp_path / "spiece.model")
    scorer = c.Scorer(c.argparse.Namespace(clip=tmp_path, aesthetics=None), None, [], torch.device("cpu"))
    ids, mask = scorer.text.ids(["A red, moving Block!"])
    assert torch.equal(ids, scorer.text.ids(["a red moving block"])[0]) and ids[0, -1] == 2
    assert ids.shape == (1, 12) and mask.sum() <= 12
    frames = np.random.default_rng(0).integers(0, 255, (3, 40, 60, 3), np.uint8)
    with torch.no_grad():
        x = patch(torch.stack([c.squash(f, 28, c.HALF)[0][0] for f in frames])).flatten(2).mT + places
        for layer in sight:
            x = layer(x)
        x = norms[0](x)
        x = reader(probe.expand(3, 1, D), x, x)[0]
        x = (x + fc2(gelu(fc1(norms[1](x)))))[:, 0]
        y = words[ids] + order
        for layer in text:
            y = layer(y)
        y = said(norms[2](y)[:, -1])
        wanted = torch.cosine_similarity(x, y).mean().item()
    assert scorer.score(frames, "A red, moving Block!")["clip"] == pytest.approx(wanted, abs=1e-5)


def test_faults_and_tidy():
    good = "A red block slides to the right over a grey floor, slowly, in soft light."
    assert c.fault(good, "long") is None and c.fault(good, "short") is None
    assert c.fault("Một khối màu đỏ trượt sang phải trên nền xám, chậm rãi.", "short") is None
    for text, reason in (("", "empty"), ("...!", "empty"), ("I'm sorry, I cannot see this.", "refusal"),
                         ("a red block moves " * 9, "repeated"), ("Well done.", "length"),
                         ("aaaaaaaaaaaaaaaaaaaa one two three four five six seven", "repeated"),
                         ("红色的方块 在 灰色 的 地面 上 慢慢 地 向 右 滑动 着", "language")):
        assert c.fault(text, "long") == reason, text
    assert c.tidy("The image shows a dog.\n It runs.") == "A dog. It runs."
    assert c.tidy("This video clip") == "This video clip"


def test_wrong_input_is_one_line(home, quick, monkeypatch, capsys, tmp_path):
    def line(*args):
        return refused(capsys, *args, call=quick)
    assert "give --lm DIR" in line("set", "--vlm", LLAVA, "--frames", "uniform:4")
    assert "language model alone" in line("set", "--vlm", QWEN)
    assert "is a captioner" in line("set", "--vlm", LLAVA, "--lm", LLAVA)
    for tune in ("connector", "lora", "all"):
        assert "language model alone" in line("set", "--train", "--init", QWEN, "--tune", tune, "--run",
                                              f"blind-{tune}")
    assert not list((home / "runs").glob("blind-*"))
    assert "none of uniform:8" in line("set", "--vlm", LLAVA, "--frames", "all")
    assert "none of uniform:8" in line("set", "--vlm", LLAVA, "--frames", "fps:0")
    assert "config.json is missing" in line("set", "--vlm", LLAVA, "--lm", tmp_path / "no")
    assert "--top_p" in line("set", "--vlm", LLAVA, "--top_p", 0)
    for options, says in (("--eval", "--all"), ("--aesthetics x", "--clip"), ("--summary x", "--lm"),
                          ("--init x", "--train")):
        assert f"goes with {says}" in line("set", "--vlm", LLAVA, *options.split())
    assert "may hold only" in line("set", "--vlm", LLAVA, "--source", "a/b")
    assert "own captions" in line("set", "--vlm", LLAVA, "--source", "meta")
    assert "leave --frames out" in line("set", "--train", "--init", LLAVA, "--frames", "uniform:4")
    for text, says in ((b" \n", "holds no text"), (b"\xe9", "no text in UTF-8"), (None, "is missing")):
        path = tmp_path / "ask.txt"
        path.unlink(missing_ok=True)
        if text:
            path.write_bytes(text)
        assert says in line("set", "--vlm", LLAVA, "--prompt", path)
    assert c.text_option("问" * 200) == "问" * 200           # longer than a file name
    assert "is no CLIP" in line("set", "--vlm", LLAVA, "--clip", QWEN)
    torch.save({"weight": torch.randn(1, 9), "bias": torch.ones(1)}, tmp_path / "head.pth")
    assert "[1, 24]" in line("set", "--vlm", LLAVA, "--clip", clip_folder(tmp_path / "clip"),
                             "--aesthetics", tmp_path / "head.pth")


# -- fine-tuning -----------------------------------------------------------------------------------

@pytest.mark.parametrize("tune", ["connector", "lora", "all"])
def test_a_published_captioner_learns(home, quick, tune):
    """The loss falls, only the weights of --tune change, a killed run resumes bit for bit."""
    options = ["set", "--train", "--init", LLAVA, "--tune", tune, "--steps", 6, "--batch", 2, "--lr",
               0.003, "--warmup", 1, "--save_every", 2, "--eval_every", 3, "--log_every", 1,
               "--style", "tags", "--frames", "uniform:1", "--run"]
    rates = dict(connector=1e-3, lora=2e-4, all=2e-5)        # unless --lr is given
    assert c.parse(["set", "--train", "--init", "x", "--tune", tune]).lr == rates[tune]
    assert all(re.fullmatch(c.TUNED[how], "tower.merge.0.weight") for how in ("connector", "all"))
    assert not re.fullmatch(c.TUNED["all"], "tower.layers.0.q.weight")
    if tune == "lora":
        process = subprocess.Popen([sys.executable, str(ROOT / "caption.py"), *map(str, options),
                                    "broken-lora"], cwd=home, stderr=subprocess.DEVNULL,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        until = time.time() + 120
        while not (home / "runs/broken-lora/step-000002").exists() and time.time() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        quick(*options, "broken-lora")
    quick(*options, f"whole-{tune}")
    quick(*options, f"whole-{tune}")                         # finished: nothing to do
    log = [json.loads(line) for line in open(home / f"runs/whole-{tune}/log.jsonl")]
    assert log[-1]["held_out"] < log[2]["held_out"] and len(log) == 6
    learnt = load_file(home / f"runs/whole-{tune}/step-000006/model.safetensors")
    if tune == "lora":
        other = load_file(home / "runs/broken-lora/step-000006/model.safetensors")
        assert learnt.keys() == other.keys() and all(torch.equal(learnt[k], other[k]) for k in learnt)
        assert {name.split(".")[-2] for name in learnt} == {"up", "down"}
    if tune == "connector":
        assert all(name.startswith("connector.") for name in learnt) and len(learnt) == 4
    model = c.open_captioner(home / "runs" / f"whole-{tune}", "cpu", torch.float32)
    before = c.open_vlm(LLAVA).state_dict()
    after = {name.replace(".base.", "."): t for name, t in model.state_dict().items()}
    different = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert different == (set(learnt) if tune != "lora" else set())
    if tune == "lora":
        quick("set", "--vlm", "whole-lora", "--max_tokens", 6, "--style", "tags")
        assert (home / "data" / "set" / "captions-whole-lora-tags.png").exists()


# -- ranks -----------------------------------------------------------------------------------------

def on_ranks(home, world, *args):
    """Runs caption.py on `world` ranks as torchrun does; all must succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = dict(os.environ, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", WORLD_SIZE=str(world),
                   MASTER_PORT=str(free.getsockname()[1]))
    processes = [subprocess.Popen(
        [sys.executable, str(ROOT / "caption.py"), *map(str, args)], cwd=home, text=True,
        stderr=subprocess.PIPE, env=dict(env, RANK=str(rank), LOCAL_RANK=str(rank)))
        for rank in range(world)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == world * [0], errors


@pytest.mark.slow
def test_two_ranks_caption_and_teach_as_one(home):
    """Captions and losses do not depend on the number of ranks."""
    for world in (1, 2):
        on_ranks(home, world, "set", "--vlm", LLAVA, "--lm", QWEN, "--all", "--frames", "uniform:2",
                 "--max_tokens", 6, "--source", f"on{world}")
        on_ranks(home, world, "set", "--train", "--init", LLAVA, "--tune", "connector", "--steps",
                 4, "--warmup", 1, "--batch", 2, "--log_every", 1, "--eval_every", 2, "--run", f"on{world}")
    files = [sorted(home.glob(f"data/set/*captions-on{world}.jsonl")) for world in (1, 2)]
    assert len(files[0]) >= 3
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    logs = [[json.loads(line) for line in open(home / f"runs/on{world}/log.jsonl")] for world in (1, 2)]
    for one, two in zip(*logs):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
