"""caption.py: the text networks, invariants of the captioner, and complete runs on small generated
videos: training, resuming, the files written, the inputs refused."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import sums_as_they_are
from safetensors.torch import load_file, save_file

import caption as c
import prepare_data

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(size=32, frames=4, t_patch=4, patch=8, channels=32, blocks=1, width=64, heads=4,
            tower_depth=1, depth=2)
PLACES = {"red": (230, 50, 40), "blue": (60, 90, 250)}
WAYS = {"left": (-1, 0), "down": (0, 1)}


def run(folder, *args):
    """Starts caption.py in a process, from `folder`, with this process's number of threads."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "caption.py"), *args], cwd=folder, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})


def quick(folder, *args, monkeypatch):
    """Runs caption.py in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setitem(c.MODELS, "captioner-xs", TINY)
    c.main([str(arg) for arg in args])


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with data/set: 96 clips of a moving block, a third without a caption, one file in six in
    the test split; and a still image."""
    folder = tmp_path_factory.mktemp("caption")
    random, rows = np.random.default_rng(0), []
    for i in range(96):
        colour, way = list(PLACES)[i % 2], list(WAYS)[i // 2 % 2]
        side, frames = (32, 40) if i % 3 else (40, 32), []
        start, step = random.uniform(10, 22, 2), np.array(WAYS[way])
        for t in range(9):
            frame = np.full((*side, 3), 20 + i % 7, np.uint8)
            x, y = (start + (2 * t - 8) * step).astype(int)
            frame[max(0, y - 4):y + 4, max(0, x - 4):x + 4] = PLACES[colour]
            frames.append(frame)
        prepare_data.write_video(folder / "videos" / f"{i:03d}.mp4", frames, 8)
        row = {"video": f"{i:03d}.mp4", "split": "test" if i // 4 % 6 == 5 else "train"}
        rows.append(row | ({"caption": f"a {colour} block goes {way}"} if i // 8 % 3 else {}))
    prepare_data.Image.fromarray(frames[0]).save(folder / "videos" / "still.png")
    (folder / "meta.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    subprocess.run([sys.executable, str(ROOT / "prepare_data.py"), "set", "--videos", "videos", "--meta",
                    "meta.jsonl", "--workers", "2", "--shard_sources", "40", "--near", "0"], cwd=folder,
                   check=True, capture_output=True)
    return folder


# -- text ------------------------------------------------------------------------------------------

TEXTS = ["a kite over the sea", "Ein grünes Boot 🙂", "<eos><eos> <pad>", "a kite, a kite"] * 5


def test_tokenizer_is_deterministic_and_loses_nothing(tmp_path):
    tokenizer = c.train_tokenizer(TEXTS, 300)
    assert tokenizer.to_str() == c.train_tokenizer(iter(TEXTS[::-1]), 300).to_str()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = c.open_tokenizer(tmp_path / "tokenizer.json")
    assert [tokenizer.id_to_token(i) for i in range(3)] == c.SPECIAL
    assert tokenizer.get_vocab_size() <= 300
    for text in [*TEXTS[:4], "", "日本語\n\t<bos> \0 x  y\r\n", "\u0301e\u2028", "\U0010ffff"]:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text and not {0, 1, 2} & set(ids)
    with pytest.raises(ValueError, match="at least 259"):
        c.train_tokenizer(TEXTS, 258)
    assert c.encode(tokenizer, "a kite", 99)[::len(c.encode(tokenizer, "a kite", 99)) - 1] == [1, 2]
    assert len(c.encode(tokenizer, "a kite over the sea", 3)) == 4


def test_text_tower_packed_equals_each_text_alone():
    torch.manual_seed(0)
    tower = c.TextTower(50, 32, 2, 4)
    texts = [torch.randint(3, 50, (n,)) for n in (1, 7, 97, 3)]
    cu_seqlens = torch.tensor([0, 1, 8, 105, 108], dtype=torch.int32)
    packed = tower(torch.cat([*texts, torch.zeros(5, dtype=torch.long)]), cu_seqlens)    # padding at the end
    assert packed.shape == (113, 32)
    for i, ids in enumerate(texts):
        alone = tower(ids, torch.tensor([0, len(ids)], dtype=torch.int32))
        torch.testing.assert_close(packed[cu_seqlens[i]:cu_seqlens[i + 1]], alone, atol=2e-5, rtol=1e-4)
    packed[:108].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any()
               for name, p in tower.named_parameters() if ".k.bias" not in name)
    assert not tower.embed.weight.grad[0].any()          # of the padding


def test_layer_flags():
    """Each option of TransformerConfig keeps the shape, and a causal layer does not attend to later tokens."""
    torch.manual_seed(0)
    for kv_heads, norm, glu, act, head in ((0, "ln", False, "gelu", 0), (2, "rms", True, "silu", 6),
                                           (1, "ln", True, "quick_gelu", 10)):
        stack = c.TransformerConfig(32, 1, 4, kv_heads=kv_heads, norm=norm, glu=glu, causal=True, act=act,
                        head=head, bias=glu, scale=1.0 if head else None)
        layer, x = c.Layer(stack), torch.randn(2, 6, 32)
        turn = c.rotary(torch.arange(6), stack)
        y = layer(x, turn)
        x[:, 4:] = 0
        assert torch.allclose(layer(x, turn)[:, :4], y[:, :4], atol=1e-6)
        assert y.shape == (2, 6, 32) and not torch.allclose(layer(x, turn)[:, 4:], y[:, 4:])
    with pytest.raises(ValueError, match="kv_heads 3"):
        c.TransformerConfig(32, 1, 4, kv_heads=3)
    with pytest.raises(ValueError, match="activation relu6"):
        c.TransformerConfig(32, 1, 4, act="relu6")


# -- published text encoders: the numbers are test_parity's ----------------------------------------

FIXTURES = ROOT / "tests" / "fixtures"
TEXTS = ["a red dog", "", "a small grey cat runs across the street in the rain"]


def published(folder, name, tensors=None, config=None, **files):
    """Copies a fixture's folder, with other weights (one dict per file) or another config."""
    source = FIXTURES / name
    shutil.copytree(source / "encoder" if (source / "encoder").exists() else source, folder)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None or files:
        (folder / "model.safetensors").unlink()
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    for path, part in files.items():
        (save_file if path.endswith("safetensors") else torch.save)(part, folder / path)
    return folder


def refusal(capsys, *args, **options):
    with pytest.raises(SystemExit) as stop:
        c.open_text_encoder(*args, **options)
    assert stop.value.code == 2
    return capsys.readouterr().err


def agree(a, b):
    assert a.hash == b.hash                              # equal weights have equal names
    assert all(map(torch.equal, a.encode(TEXTS, 20), b.encode(TEXTS, 20)))


def test_layouts_of_weights_agree(tmp_path):
    """One file, shards of both formats, a file with the whole model, and Wan's own layout."""
    plain = published(tmp_path / "plain", "t5-v1_1-encoder")
    tensors, encoder = load_file(plain / "model.safetensors"), c.open_text_encoder(plain)
    names = sorted(tensors)
    for kind, stem in ((".safetensors", "model"), (".bin", "pytorch_model")):
        parts = {f"{stem}-{i}-of-2{kind}": {n: tensors[n] for n in names[i::2]} for i in (0, 1)}
        parts[f"{stem}-0-of-2{kind}"]["decoder.final_layer_norm.weight"] = torch.ones(48)
        folder = published(tmp_path / stem, "t5-v1_1-encoder", **parts)
        (folder / f"{stem}{kind}.index.json").write_text(json.dumps(
            {"weight_map": {n: path for path, part in parts.items() for n in part}}))
        agree(c.open_text_encoder(folder), encoder)

    plain = published(tmp_path / "clip", "clip-text")
    tensors, encoder = load_file(plain / "model.safetensors"), c.open_text_encoder(plain)
    config = json.loads((plain / "config.json").read_text())
    whole = published(
        tmp_path / "whole", "clip-text", config={"model_type": "clip", "text_config": config},
        tensors={**tensors, "logit_scale": torch.ones(()), "vision_model.x": torch.ones(1)})
    agree(c.open_text_encoder(whole), encoder)
    assert [x.shape for x in encoder.encode(TEXTS)] == [(20, 48)] * 3        # padding included

    plain = published(tmp_path / "umt5", "wan-umt5")
    wan, encoder = tmp_path / "wan", c.open_text_encoder(plain)
    shutil.copytree(plain, wan / "google" / "umt5-xxl")
    renamed = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        for ours, theirs in (("shared", "token_embedding"), ("encoder.final_layer_norm", "norm"),
                             ("encoder.block", "blocks"), (".layer.0.SelfAttention", ".attn"),
                             (".attn.relative_attention_bias", ".pos_embedding.embedding"),
                             (".layer.0.layer_norm", ".norm1"), (".layer.1.layer_norm", ".norm2"),
                             (".layer.1.DenseReluDense", ".ffn"), ("wi_0", "gate.0"),
                             ("wi_1", "fc1"), ("wo.", "fc2.")):
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    torch.save(renamed, wan / c.WAN_T5)
    (tmp_path / "pipeline").mkdir()
    shutil.move(plain, tmp_path / "pipeline" / "text_encoder")
    shutil.copytree(wan / "google" / "umt5-xxl", tmp_path / "pipeline" / "tokenizer")
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    wan, pipeline = c.open_text_encoder(wan), c.open_text_encoder(tmp_path / "pipeline")
    agree(wan, pipeline)
    curly = [f"\u201c{text}\u201d  &amp; \u2026" for text in TEXTS]   # Wan's clean their prompts
    assert all(map(torch.equal, wan.encode(curly),
                   encoder.encode([f'"{text}" & \u2026' for text in TEXTS])))
    assert [len(x) for x in wan.encode(curly)] == wan.ids(curly)[1].sum(1).tolist()


@pytest.mark.parametrize("folder, name", [("clip-text", "7c0ad9b3"), ("t5-v1_1-encoder", "03110841")])
def test_encoded_texts_keep_their_names(folder, name):
    """The hash in the names of encoded captions does not change with new fields of TransformerConfig."""
    assert c.open_text_encoder(ROOT / "tests" / "fixtures" / folder / "encoder").hash == name


def test_text_encoder_refusals(tmp_path, capsys):
    tensors = load_file(FIXTURES / "wan-umt5" / "model.safetensors")
    lost = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    some = {name: x for name, x in tensors.items() if name != lost}
    some |= {"extra.weight": torch.ones(1), "shared.weight": torch.ones(9, 32)}
    error = refusal(capsys, published(tmp_path / "some", "wan-umt5", tensors=some))
    assert f"{lost} is missing" in error and "extra.weight is unexpected" in error
    assert "shared.weight is [9, 32], not [512, 32]" in error
    assert "neither config.json nor text_encoder/ nor models_t5" in refusal(capsys, tmp_path)
    assert "float16" in refusal(capsys, FIXTURES / "wan-umt5", dtype=torch.float16)
    bert = published(tmp_path / "bert", "wan-umt5", config={"model_type": "bert"})
    assert "model_type bert" in refusal(capsys, bert)
    (bert / "config.json").write_text('{"model_type": "umt5", "feed_forward_proj": "gated-gelu"}')
    assert "shared.weight is [512, 32], not [250112, 512]" in refusal(capsys, bert)   # its class's
    bare = published(tmp_path / "bare", "wan-umt5")
    for name, wanted in (("spiece.model", ""), ("tokenizer.json", "spiece.model"),
                         ("model.safetensors", "no weights")):
        (bare / name).unlink()
        assert not wanted or wanted in refusal(capsys, bare)
    torch.save({"shared.weight": Path("x")}, bare / "pytorch_model.bin")
    assert "shared.weight is no tensor" in refusal(capsys, bare)
    torch.save({"shared.weight": Fraction(1, 2)}, bare / "pytorch_model.bin")
    assert "holds more than weights: fractions.Fraction" in refusal(capsys, bare)


def test_encoded_captions(tmp_path, capsys):
    """A shard's file has each caption once, and the prompts; it is rewritten only if a text is missing."""
    encoder = c.open_text_encoder(FIXTURES / "wan-umt5")
    rows = [{"shard": f"shard-0000{i // 2}", "captions": [{"text": t} for t in (TEXTS[0], t)]}
            for i, t in enumerate(["one", "two", "three", "__metadata__"])]
    c.encode_captions(tmp_path, rows, encoder, 12, negative="ugly")
    paths = [c.text_path(tmp_path, f"shard-0000{i}", encoder.hash) for i in (0, 1)]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    c.encode_captions(tmp_path, rows, encoder, 12, negative="ugly")
    assert before == [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    texts = c.TextEmbeddings(tmp_path, ["shard-00001", "shard-00000"], encoder.hash)
    assert sorted(texts.locations) == sorted(["", "ugly", TEXTS[0], "one", "two", "three",
                                           "__metadata__"])
    for text in texts.locations:
        torch.testing.assert_close(texts[text], encoder.encode([text], 12)[0], atol=2e-5, rtol=0)
    paths[0].unlink()
    c.encode_captions(tmp_path, [*rows, {**rows[3], "captions": [{"text": "four"}]}], encoder, 12,
                      negative="ugly")
    assert paths[0].read_bytes() == before[0][0] and paths[1].read_bytes() != before[1][0]
    texts = c.TextEmbeddings(tmp_path, ["shard-00001"], encoder.hash)
    assert {"four", "three", "ugly"} <= set(texts.locations)
    with pytest.raises(SystemExit):
        c.encode_captions(tmp_path, rows, encoder, 24)
    assert "at most 12 tokens, not 24" in capsys.readouterr().err


# -- the captioner ---------------------------------------------------------------------------------

def fresh(seed=0):
    torch.manual_seed(seed)
    model = c.Captioner(**TINY, vocab=60)
    torch.nn.init.normal_(model.decoder.head.weight)     # initially zero: equal logits
    return model.eval()


def test_initial_values_follow_the_table():
    torch.manual_seed(0)
    model = c.Captioner(**{**TINY, "width": 128}, vocab=300)
    rows = re.findall(r"(.+?)\s+\| (normal|zero)\s+\|(.*)\n", c.initialise.__doc__)
    assert len(rows) == 5
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, torch.nn.Embedding):
            wanted = 1.0
        elif not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            continue
        else:
            fan_in = module.weight[0].numel()
            wanted = 0.0 if last in ("head", "words") else fan_in**-0.5
            if last in ("out", "down"):
                wanted = (2 * 3 * fan_in)**-0.5
        assert module.weight.std().item() == pytest.approx(wanted, rel=0.1), name
    assert model.tower.position.std().item() == pytest.approx(0.02, rel=0.1)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_cache_equals_full_forward_and_batch_does_not_matter():
    model, x = fresh(), torch.randn(5, 4, 3, 32, 32)
    most = 12
    with torch.no_grad():
        rows = model.generate(x, most)
        for i, (ids, score) in enumerate(rows):
            read = torch.tensor([[c.BOS, *ids]])
            logits = model(x[i:i + 1], read)[0][0].log_softmax(-1)
            best = logits.max(-1)
            said = (ids + [c.EOS])[:most]
            assert best.indices[:len(said)].tolist() == said
            assert best.values[:len(said)].mean().item() == pytest.approx(score, abs=1e-4)
            assert model.generate(x[i:i + 1], most)[0][0] == ids
    assert len({tuple(ids) for ids, _ in rows}) > 1


def test_a_view_of_each_clip():
    assert c.spread(4, 10).tolist() == [0, 3, 6, 9] and c.spread(4, 1).tolist() == [0] * 4
    wide = np.full((20, 60, 3), 200, np.uint8)
    square = c.letterbox(wide, 48)
    assert square.shape == (48, 48, 3) and (square[16:32] == 200).all() and not square[:16].any()
    views = torch.randint(0, 255, (2, 4, 32, 32, 3), dtype=torch.uint8)
    torch.testing.assert_close(c.augment(views, torch.zeros(2, 8)), c.to_input(views), atol=1e-4, rtol=0)
    moved = c.augment(views, torch.tensor([[0, 0.5, 0, 0, 0, 0, 0, 0.0]] * 2))
    torch.testing.assert_close(moved[..., :24], c.to_input(views)[..., 8:], atol=1e-4, rtol=0)


def test_what_moves_in_another_clip_is_laid_over(home, monkeypatch):
    """--paste adds the block without its background, not on the borders, joins the captions, applies to the
    given share of clips, and leaves the other draws unchanged."""
    monkeypatch.chdir(home)
    folder = prepare_data.dataset_dir("set")
    rows = [row for row in prepare_data.open_dataset(folder) if row["captions"]][:24]
    frames, said, (rows, others) = c.Frames(folder, rows, 32, 4), [], (rows[:12], rows[12:])

    def drawn(share):
        said.clear()
        args = SimpleNamespace(seed=0, paste=share)
        return c.draw_batch(rows, frames, lambda text: said.append(text) or [1, 2], args, 0, others)
    plain, before = drawn(0), list(said)
    pasted = drawn(1)
    assert all(text.endswith(f" and {old}") for text, old in zip(said, before))
    assert torch.equal(plain.jitter, pasted.jitter) and torch.equal(plain.noise, pasted.noise)
    changed = (plain.frames.int() - pasted.frames.int()).abs().amax(-1) > 0     # [B, n, S, S]
    share = changed.float().mean((1, 2, 3))
    assert 0.01 < share.min() and share.max() < 0.2, share           # blocks of 8 x 8 px of 32 x 32
    assert pasted.frames[changed].amax(-1).min() > 60               # bright as a block is
    assert not pasted.frames[:, :, 0].any() or plain.frames[:, :, 0].any()
    assert torch.equal(drawn(0.5).jitter, plain.jitter)
    assert 2 <= sum(text not in before for text in said) <= 10


# -- runs ------------------------------------------------------------------------------------------

def test_it_learns_and_captions(home, monkeypatch, capsys):
    """After training, 90% of the captions are right; the files are complete."""
    options = ["--steps", 120, "--batch", 16, "--save_every", 50, "--warmup", 20, "--eval_every", 120,
               "--max_tokens", 24]
    quick(home, "set", "--train", "--few", "--run", "learnt", *options, monkeypatch=monkeypatch)
    folder, data = home / "runs" / "learnt", home / "data" / "set"
    config = json.loads((folder / "config.json").read_text())
    assert config["kind"] == "captioner" and config["model"] == TINY
    log = [json.loads(line) for line in open(folder / "log.jsonl")]
    assert log[-1]["step"] == 120 and log[-1]["held_out"] < 0.2
    # the loss of guessing by word frequency is beside it
    assert "held-out loss" in (said := capsys.readouterr().err) and "no better" not in said
    assert 1.5 < log[-1]["held_out_by_frequency"] < 3
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-000100", "step-000120"]
    with c.Image.open(folder / "samples" / "step-000120.png") as sheet:
        assert sheet.size[0] > 200
    quick(home, "set", "--vlm", "learnt", monkeypatch=monkeypatch)
    rows = {row["key"]: row for row in prepare_data.open_dataset(data)}
    files = sorted(data.glob("shard-*.captions-learnt.jsonl"))
    said = [json.loads(line) for path in files for line in open(path)]
    assert len(files) == 3 and (data / "captions-learnt.png").exists()
    assert {row["key"] for row in said} == {key for key, row in rows.items() if not any(
        caption["source"] == "meta" for caption in row["captions"])}
    assert all(int(path.with_name(f"{path.name}.crc").read_text()) == zlib.crc32(path.read_bytes())
               for path in files)
    right = 0
    for row in said:
        assert set(row) == {"key", "caption", "prompt", "scores"} and row["prompt"] == ""
        assert row["scores"]["logprob"] < 0
        number = Path(rows[row["key"]]["source"]).stem
        if number != "still":
            i = int(number)
            right += row["caption"] == f"a {list(PLACES)[i % 2]} block goes {list(WAYS)[i // 2 % 2]}"
    assert right >= 0.9 * (len(said) - 1), [row["caption"] for row in said]
    # finished shards are skipped; generated captions are not the clips' own
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    quick(home, "set", "--vlm", "learnt", monkeypatch=monkeypatch)
    quick(home, "set", "--train", "--run", "learnt", *options, monkeypatch=monkeypatch)
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    own = c.own_captions(data, list(rows.values()))
    assert sum(bool(row["captions"]) for row in own) == len(rows) - len(said)
    # a .part file truncated anywhere is completed to the same bytes
    again = ["set", "--vlm", "learnt", "--batch", "3"]
    path, part = files[1], c.part_path(files[1], c.parse(again))
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        part.write_bytes(whole[:cut])
        keys = [json.loads(line)["key"] for line in whole.splitlines()]
        kept, n = c.resume(part, keys, 3), whole[:cut].count(b"\n")
        assert kept == (n if n == len(keys) else n - n % 3)
        assert part.read_bytes() == b"".join(whole.splitlines(keepends=True)[:kept])
    for cut in (len(whole) // 2, len(whole)):
        path.unlink()
        part.write_bytes(whole[:cut])
        quick(home, *again, monkeypatch=monkeypatch)
        assert path.read_bytes() == whole and not part.exists()
    part.write_text('{"key": "of other clips"}\n')
    path.unlink()
    with open(part, "a") as file:                            # another process writes it
        assert prepare_data.is_sole(file)
        with pytest.raises(SystemExit):
            quick(home, *again, "--all", monkeypatch=monkeypatch)
        assert "another process" in capsys.readouterr().err and not path.exists()
    quick(home, *again, "--all", monkeypatch=monkeypatch)
    assert sum(len(open(path).readlines()) for path in files) == len(rows)


def test_training_resumes_bit_for_bit_after_kill(home, monkeypatch, capsys):
    """After kill -9 the same command gives the losses and weights of an uninterrupted run."""
    monkeypatch.chdir(home)
    options = ["set", "--train", "--few", "--steps", "9", "--batch", "4", "--save_every", "3", "--eval_every",
               "5", "--log_every", "1", "--max_tokens", "16"]
    broken = run(home, *options, "--run", "broken")
    until = time.time() + 60
    while not (home / "runs/broken/step-000003/state.json").exists() and time.time() < until:
        time.sleep(0.01)
    broken.send_signal(signal.SIGKILL)
    broken.communicate()
    assert broken.returncode == -signal.SIGKILL and not (home / "runs/broken/step-000009").exists()
    for name in ("broken", "whole"):
        c.main([*options, "--run", name])
    clocks = "seconds", "step_s", "peak_mib"
    logs = [[{k: v for k, v in json.loads(line).items() if k not in clocks}
             for line in open(home / "runs" / name / "log.jsonl")] for name in ("broken", "whole")]
    assert logs[0] == logs[1] and [row["step"] for row in logs[0]] == list(range(1, 10))
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(home / "runs" / name / "step-000009" / file) for name in ("broken", "whole"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert all((home / f"runs/{name}/tokenizer.json").exists() for name in ("broken", "whole"))
    capsys.readouterr()
    assert "--lr" in refused(home, monkeypatch, capsys, *options, "--lr", 0.1, "--run", "whole")


def refused(home, monkeypatch, capsys, *args):
    monkeypatch.chdir(home)
    with pytest.raises(SystemExit) as left:
        c.main([str(arg) for arg in args])
    err = capsys.readouterr().err
    assert left.value.code == 2 and err.count("\n") == 1, err
    return err


def test_wrong_input_is_one_line(home, monkeypatch, capsys, tmp_path):
    def line(*args):
        return refused(home, monkeypatch, capsys, *args)
    assert "does not exist" in line("nothing", "--train")
    assert "not finished" in line(tmp_path, "--train")
    assert "is no run" in line("set", "--vlm", "nobody")
    assert "--steps: 0 is out of range" in line("set", "--train", "--steps", 0)
    assert "--vocab" in line("set", "--train", "--vocab", 100)
    assert "invalid choice" in line("set", "--train", "--model", "huge")
    assert "goes with" in line("set", "--run", "x")
    for name, change in (("other", {"kind": "vae"}), ("newer", {"format": 99})):
        folder = home / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(
            {"kind": "captioner", "format": 1, "args": {}, "model": TINY} | change))
    assert "kind 'vae'" in line("set", "--vlm", "other")
    assert "format 99" in line("set", "--vlm", "newer")
    assert "kind 'vae'" in line("set", "--train", "--run", "other")
    (home / "runs" / "other" / "config.json").write_text(json.dumps(
        {"kind": "captioner", "format": 1, "args": {"steps": 5}, "model": TINY}))
    assert "not finished training" in line("set", "--vlm", "other")
    assert "takes no --lm" in line("set", "--vlm", "other", "--lm", tmp_path)
    rows = prepare_data.open_dataset(home / "data" / "set")
    (tmp_path / "all").write_text("\n".join(row["key"] for row in rows if row["split"] == "train"))
    assert "no captioned clip" in line("set", "--train", "--skip_clips", tmp_path / "all")
    few = line("set", "--train", "--run", "few")
    assert "captioned clips are too few" in few and "--vlm DIR" in few and "--few" in few
    assert not (home / "runs" / "few").exists()
    assert "--few goes with --train" in line("set", "--few")
    none = line("set")
    assert "no captioner has been trained (runs/set-captioner)" in none and "--vlm DIR" in none
    mine = [row for row in c.own_captions(home / "data" / "set", rows) if row["captions"]]
    monkeypatch.setattr(c, "open_dataset", lambda folder: mine)
    c.main(["set"])                                  # no error
    assert "nothing to do" in capsys.readouterr().err


def test_captions_that_it_is_not_sure_of_are_rejected(home, monkeypatch, capsys):
    """A captioner trained on shuffled captions is recognized by its held-out clips. The printed command
    removes its captions."""
    def swapped(folder):
        rows = prepare_data.open_dataset(folder)
        mine = [row for row in rows if row["captions"]]
        order = np.random.default_rng(0).permutation(len(mine))
        captions = [mine[i]["captions"] for i in order]
        for row, other in zip(mine, captions):
            row["captions"] = other
        return rows
    monkeypatch.setattr(c, "open_dataset", swapped)
    quick(home, "set", "--train", "--few", "--run", "lies", "--steps", 80, "--batch", 16, "--warmup", 10,
          "--max_tokens", 24, monkeypatch=monkeypatch)
    log = [json.loads(line) for line in open(home / "runs" / "lies" / "log.jsonl")]
    assert log[-1]["temperature"] in c.TEMPERATURES
    monkeypatch.setattr(c, "open_dataset", prepare_data.open_dataset)
    capsys.readouterr()
    quick(home, "set", "--vlm", "lies", monkeypatch=monkeypatch)
    said, data = capsys.readouterr().err, home / "data" / "set"
    rejected = [row for path in data.glob("shard-*.rejected-captions-lies.jsonl")
                for row in prepare_data.read_rows(path)]
    kept = [row for path in data.glob("shard-*.captions-lies.jsonl")
            for row in prepare_data.read_rows(path)]
    assert len(rejected) > 9 * len(kept) and f"{len(rejected)} unsure" in said
    assert all(row["rejected"] == "unsure" and row["scores"]["sure"] < 0.75 for row in rejected)
    assert all(row["scores"]["sure"] >= 0.75 for row in kept)
    others = sorted(path for path in data.iterdir() if "captions-lies" not in path.name)
    back = re.search(r"remove these captions: (rm .*)", said)[1]
    subprocess.run(back, shell=True, cwd=home, check=True)
    assert not list(data.glob("shard-*captions-lies*"))
    assert others == sorted(path for path in data.iterdir() if path.suffix != ".png"
                            or "lies" not in path.name)
    assert "lies" not in {caption["source"] for row in prepare_data.open_dataset(data)
                          for caption in row["captions"]}
    quick(home, "set", "--vlm", "lies", "--sure", 0, monkeypatch=monkeypatch)
    assert not list(data.glob("shard-*.rejected-captions-lies*"))
    subprocess.run(back, shell=True, cwd=home, check=True)


def test_certainty_is_the_probability_of_the_tokens_that_need_the_clip():
    model, x = fresh(), torch.randn(2, 4, 3, 32, 32)
    ids, others = torch.tensor([[1, 7, 9, 2], [1, 7, 2, 0]]), torch.randn(2, 3, 4, 3, 32, 32)
    result = c.certainty(model, x, others, ids, 2.0)
    for i, wanted in enumerate(([7, 9, 2], [7, 2])):
        def logprobs(clip):
            logits = model(clip[None], torch.tensor([[1, *wanted[:-1]]]))[0][0] / 2
            return logits.log_softmax(-1).gather(1, torch.tensor(wanted)[:, None])[:, 0].detach()
        weights = 0.01 - torch.stack([logprobs(other) for other in others[i]]).mean(0)
        sure = (weights * logprobs(x[i])).sum() / weights.sum()
        assert result[i].item() == pytest.approx(sure.exp().item(), rel=1e-4)
    assert c.run_temperature(Path("no such run")) == 1.0


def test_guessing_by_frequency(capsys):
    """Counts 3 and 1, each plus one, and one for unseen tokens: 4/7, 2/7, 1/7."""
    loss = c.frequency_loss([[5, 5], [5, 6]], [[5, 6, 9, 9]])
    assert loss == pytest.approx(-np.log([4 / 7, 2 / 7, 1 / 7, 1 / 7]).mean())
    assert c.report("run", 7, 1.0, 2.0) == {"held_out": 1.0, "held_out_by_frequency": 2.0}
    assert "step 7: held-out loss 1.000" in (said := capsys.readouterr().err)
    assert said.count("\n") == 1 and "2.000" in said
    c.report("run", 7, 2.0, 2.0)
    assert "no better than guessing" in capsys.readouterr().err

def test_what_is_damaged_is_named_in_one_line(home, monkeypatch, capsys, tmp_path):
    """A clip with wrong bytes or without its end; a damaged checkpoint; a folder without write permission."""
    data = tmp_path / "data" / "set"
    shutil.copytree(home / "data" / "set", data, ignore=shutil.ignore_patterns("*captions-*"))
    quick(tmp_path, "set", "--train", "--few", "--run", "short", "--steps", 1, "--batch", 2, "--warmup",
          0, monkeypatch=monkeypatch)
    def line(*args):
        return refused(tmp_path, monkeypatch, capsys, *args)
    rows = [row for row in prepare_data.open_dataset(data) if not row["captions"] and row["fps"]]
    tar = data / f"{rows[0]['shard']}.tar"
    whole = tar.read_bytes()
    for start in (0, rows[0]["length"] // 3):
        tar.write_bytes(whole)
        with open(tar, "r+b") as file:
            file.seek(rows[0]["offset"] + start)
            file.write(b"\0" * (rows[0]["length"] - start))
        sums_as_they_are(data)
        capsys.readouterr()
        c.main(["set", "--vlm", "short"])                # the other clips get captions
        err = capsys.readouterr().err
        said, = re.findall(r"\S+\.tar: the clip .*", err)                          # beside the bar
        assert said.startswith(f"data/set/{tar.name}") and rows[0]["key"] in said
        assert "1 cannot be read" in err and "set/shard-*.rejected-captions-short" not in said
        lost = [row for path in data.glob("*.rejected-captions-short.jsonl") for row in
                c.read_rows(path) if row["rejected"] == "cannot be read"]
        assert [row["key"] for row in lost] == [rows[0]["key"]]
        for path in data.glob("*captions-short*"):
            path.unlink()
    tar.write_bytes(whole)
    sums_as_they_are(data)
    with monkeypatch.context() as patch:                 # root may write anywhere
        patch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        assert "data/set cannot be written to" in line("set", "--vlm", "short")
    model = tmp_path / "runs" / "short" / "step-000001" / "model.safetensors"
    os.truncate(model, model.stat().st_size // 2)
    assert "step-000001/model.safetensors" in line("set", "--vlm", "short")


@pytest.mark.parametrize("name", ["vlm-llava15", "vlm-qwen2", "wan-umt5"])
def test_configs_of_any_value_end_in_one_line(tmp_path, capsys, name):
    """A wrong value of any key of config.json is accepted, or refused in one line."""
    shutil.copytree(FIXTURES / name, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config, refused = json.loads(path.read_text()), 0
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part, key in [(part, key) for part in parts for key in part]:
        old = part[key]
        for value in ("x", [], {"a": 1}):
            part[key] = value
            path.write_text(json.dumps(config))
            try:
                (c.open_text_encoder if name == "wan-umt5" else c.open_vlm)(tmp_path / "model")
            except SystemExit as end:
                assert end.code == 2 and capsys.readouterr().err.count("\n") == 1
                refused += 1
        part[key] = old
    assert refused > 20


@pytest.mark.parametrize("text, says", [(None, "missing"), ("{", "no tokenizer")])
def test_a_tokenizer_that_is_lost_or_torn_ends_in_one_line(tmp_path, capsys, text, says):
    path = tmp_path / "tokenizer.json"
    if text:
        path.write_text(text)
    with pytest.raises(SystemExit) as end:
        c.open_tokenizer(path)
    assert end.value.code == 2 and says in capsys.readouterr().err


def test_captions_of_another_model_or_other_options_are_not_taken_for_these(tmp_path, capsys):
    """A second call with another --prompt or model of that name said that all was done."""
    for name in "ab":
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model/config.json").write_text(json.dumps({"model_type": name}))
    call = lambda *options: (lambda args: c.refuse_other_options(tmp_path, "model-long", args, args.vlm))(
        c.parse(["set", "--vlm", str(tmp_path / "a/model"), *options]))
    call()
    call("--prompt", "what?")                                    # nothing is there yet
    call()
    (tmp_path / "shard-00000.captions-model-long.jsonl").write_text("")
    call("--device", "cpu", "--batch", "3")
    for name, options in (("prompt", ["--prompt", "what?"]), ("vlm", ["--vlm", str(tmp_path / "b/model")])):
        with pytest.raises(SystemExit):
            call(*options)
        assert f"were made with --{name}" in (said := capsys.readouterr().err) and "--source" in said
