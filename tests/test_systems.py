"""Published weights of each system, begun from, trained, sampled and written back, on real files."""
import json
import math
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import caption
import prepare_data
import sample
import train_dit as D
import train_vae

FIXTURES = Path(__file__).with_name("fixtures")
ENCODER = FIXTURES / "t5-v1_1-encoder" / "encoder"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data/set, two classes of captioned videos, and data/stills, both encoded by one
    untrained autoencoder."""
    home = tmp_path_factory.mktemp("systems")
    for label, level in (("bright", 200), ("dark", 60)):
        for i in range(5):
            folder, random = home / "videos" / label, np.random.default_rng(i)
            folder.mkdir(parents=True, exist_ok=True)
            frames = random.integers(level - 40, level + 40, (9, 32, 32, 3), dtype=np.uint8)
            prepare_data.write_video(folder / f"{label}{i}.mp4", frames, 9)
            (folder / f"{label}{i}.txt").write_text(f"a {label} video")
            (home / "pictures" / label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(frames[0]).save(home / "pictures" / label / f"{label}{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for name, folder in (("set", "videos"), ("stills", "pictures")):
            prepare_data.main([name, "--videos", folder, "--format", "folder", "--min_sharpness",
                               "0", "--workers", "1"])
        train_vae.main(["set", "--steps", "1", "--batch", "2"])
        for name in ("set", "stills"):
            train_vae.main([name, "--encode", "--vae", "set-vae"])
    return home


def published(kind, folder):
    """A file or folder of this system for latents of 24 channels, with random weights."""
    torch.manual_seed(0)
    if kind == "uvit":
        network = D.UViT(24, (1, 8, 8), 2, 32, 2, 2, classes=3)
    elif kind == "wan":
        network = D.DiT(24, 48, 1, 2, (1, 2, 2), ffn=64, text_dim=48, positions="index")
    else:
        network = D.DiT(24, 48, 1, 4, (1, 2, 2), out_channels=48, classes=3, own_table=True,
                        positions="sincos", grid=(4, 4))
    for p in network.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    if kind == "uvit":
        torch.save(network.state_dict(), folder / "net.pth")
        return folder / "net.pth"
    state = D.to_published(network.state_dict(), "wan" if kind == "wan" else "dit", network)
    if kind != "wan":
        torch.save(state, folder / "net.pt")
        return folder / "net.pt"
    save_file({name: value.contiguous() for name, value in state.items()},
              folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(
        {"_class_name": "WanModel", "num_heads": 2, "num_layers": 1, "ffn_dim": 64}))
    return folder


@pytest.mark.parametrize("kind", ["dit", "sit", "uvit", "wan"])
def test_a_system_is_begun_from_trained_sampled_and_written_back(kind, home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    path = published(kind, tmp_path)
    name = "stills" if kind == "uvit" else "set"
    common = [name, "--vae", "set-vae", "--model", kind, "--init", str(path), "--heads", "4" if kind != "uvit" else "2",
              "--row_tokens", "64", "--batch_tokens", "64", "--eval_every", "2", "--warmup", "0",
              *(["--text_encoder", str(ENCODER)] if kind == "wan" else [])]
    D.main([*common, "--run", f"{kind}-still", "--steps", "1", "--lr", "0"])
    D.main([name, "--run", f"{kind}-still", "--export", str(tmp_path / "back.safetensors")])
    before, after = D.read_tensors(path), load_file(tmp_path / "back.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    D.main([*common, "--run", f"{kind}-moved", "--steps", "2", "--lr", "0.001", "--optimizer",
            "adamw", "--recompute", "0" if kind == "uvit" else "1"])
    D.main([name, "--run", f"{kind}-moved", "--export", str(tmp_path / "moved.safetensors")])
    moved = load_file(tmp_path / "moved.safetensors")
    assert any(not torch.equal(before[key], moved[key]) for key in before)
    rows = [json.loads(line) for line in open(home / "runs" / f"{kind}-moved" / "log.jsonl")]
    assert np.isfinite(rows[-1]["held_out"]) and rows[-1]["step"] == 2
    prompt = "a dark video" if kind == "wan" else "dark"
    sample.main([f"{kind}-moved", "--prompt", prompt, "--size", "32x32", "--frames",
                 "1" if kind == "uvit" else "5", "--steps", "2"])
    assert list((home / "runs" / f"{kind}-moved" / "samples").glob("*dark-*.json")) or kind == "wan"
    shutil.rmtree(home / "runs" / f"{kind}-still")


def test_lora_learns_additions_and_merges_them(home, tmp_path, monkeypatch):
    """Only matrices of blocks change; a run that was stopped goes on to the same bytes."""
    monkeypatch.chdir(home)
    path = published("dit", tmp_path)
    common = ["set", "--vae", "set-vae", "--model", "dit", "--init", str(path), "--heads", "4",
              "--row_tokens", "64", "--batch_tokens", "64", "--eval_every", "9", "--warmup", "0",
              "--schedule", "constant", "--lora", "2", "--lr", "0.01"]
    for run, stops in (("whole", ["3"]), ("broken", ["1", "3"])):
        for stop in stops:
            D.main([*common, "--run", run, "--steps", stop])
    for name in ("ema", "average", "model", "optimizer"):
        whole, broken = (load_file(home / f"runs/{run}/step-000003/{name}.safetensors")
                         for run in ("whole", "broken"))
        assert set(whole) == set(broken) and all(torch.equal(whole[k], broken[k]) for k in whole)
    D.main(["set", "--run", "whole", "--export", str(tmp_path / "out.safetensors")])
    before, after = D.read_tensors(path), load_file(tmp_path / "out.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("blocks.") and name.endswith(
        "weight")}


def test_wrong_weights_and_labels_are_refused(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home)
    path = published("dit", tmp_path)

    def line(*options):
        with pytest.raises(SystemExit) as stop:
            D.main(["set", "--run", "x", "--steps", "1", "--row_tokens", "64", "--batch_tokens", "64",
                    *options])
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]
    assert "takes its sizes from --init" in line("--model", "dit")
    assert "text_encoder" in line("--model", "wan-1.3b")
    assert "reads an image" in line("--model", "wan-i2v-14b")
    state = D.read_tensors(path)
    torch.save({k: v for k, v in state.items() if k != "blocks.0.attn.proj.bias"}, tmp_path / "a.pt")
    assert "blocks.0.attn.proj.bias" in line("--model", "dit", "--heads", "4", "--init", str(tmp_path / "a.pt"))
    torch.save({**state, "more": torch.ones(1)}, tmp_path / "b.pt")
    assert "hold more" in line("--model", "dit", "--heads", "4", "--init", str(tmp_path / "b.pt"))
    other = D.DiT(4, 48, 1, 4, (1, 2, 2), out_channels=8, classes=3, own_table=True,
                  positions="sincos", grid=(4, 4))
    torch.save(D.to_published(other.state_dict(), "dit", other), tmp_path / "c.pt")
    assert "4 channels" in line("--model", "dit", "--heads", "4", "--init", str(tmp_path / "c.pt"))
    assert "prepare smaller" in line("--model", "uvit", "--heads", "2", "--init",
                                     str(published("uvit", tmp_path)))
    assert "no such file" in line("--model", "dit", "--init", "nosuch.pt")
    latents = next((home / "data/set").glob("*.latents-*"))
    whole = latents.read_bytes()
    for bad in (whole[:len(whole) // 2], whole[:4], b"{}"):
        latents.write_bytes(bad)
        assert "encode again" in (told := line("--vae", "set-vae")) and str(latents.name) in told
    start = 8 + int.from_bytes(whole[:8], "little")                    # 6 A: a flipped bit
    at = start + next(value["data_offsets"][0] for key, value in json.loads(whole[8:start]).items()
                      if ":" not in key and key != "__metadata__")
    latents.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
    assert "is damaged at" in line("--vae", "set-vae")
    with pytest.raises(SystemExit):
        prepare_data.verify(home / "data/set")
    assert "is damaged at" in capsys.readouterr().err
    latents.write_bytes(whole)
    assert "needs --heads" in line("--model", "dit", "--init", str(tmp_path / "c.pt"))


def test_a_run_does_not_go_on_with_another_autoencoders_latents(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setitem(D.MODELS, "sit-tiny", dict(
        kind="sit", dim=24, depth=1, heads=2, patch=(1, 2, 2), own_table=True, positions="sincos",
        classes=3))
    command = ["set", "--vae", "set-vae", "--model", "sit-tiny", "--run", "faithful",
               "--row_tokens", "64", "--batch_tokens", "64", "--steps"]
    D.main([*command, "1"])
    opened = D.load_autoencoder

    def other(name, *device):
        vae, config = opened(name, *device)
        for path in (home / "data/set").glob(f"*.latents-{config['hash']}.*"):
            shutil.copy(path, str(path).replace(config["hash"], "0ther000"))
        return vae, {**config, "hash": "0ther000"}
    monkeypatch.setattr(D, "load_autoencoder", other)
    with pytest.raises(SystemExit) as stop:
        D.main([*command, "2"])
    assert stop.value.code == 2
    assert "start another --run" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(D, "load_autoencoder", opened)
    config = D.read_config(home / "runs/faithful", "denoiser")
    for name in ("data", "split"):                           # as runs before these were
        del config[name]
    train_vae.write_config(home / "runs/faithful", config)
    D.main([*command, "2"])
    assert D.read_log(home / "runs/faithful")[-1]["step"] == 2
    assert "data" not in D.read_config(home / "runs/faithful", "denoiser")


def test_a_finished_run_opens_nothing_and_one_without_a_checkpoint_begins_again(
        home, tmp_path, monkeypatch):
    """Neither its --init nor its text encoder need be there; killed before its first checkpoint it
    begins with its --init once more."""
    monkeypatch.chdir(home)
    path, read, opened = published("wan", tmp_path), D.read_tensors, []
    monkeypatch.setattr(D, "read_tensors", lambda path: opened.append(path) or read(path))
    command = ["set", "--vae", "set-vae", "--model", "wan", "--init", str(path), "--text_encoder",
               str(ENCODER), "--row_tokens", "64", "--batch_tokens", "64", "--run", "done",
               "--steps", "1", "--lr", "0"]
    D.main(command)
    assert opened.count(path) == 1
    shutil.rmtree(home / "runs/done/step-000001")
    D.main(command)
    D.main(["set", "--run", "done", "--export", str(tmp_path / "back.safetensors")])
    before, after = read(path), load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    shutil.rmtree(path)
    monkeypatch.setattr(D, "open_text_encoder", None)
    D.main(command)
    assert opened.count(path) == 2


def test_a_run_shows_how_it_goes_and_its_best_weights_are_sampled(
        home, monkeypatch, capsys):
    """loss.png from the first evaluation on, and again where a finished run has none; what is
    sampled is what had the lowest held-out loss, while training goes on from the last checkpoint."""
    monkeypatch.chdir(home)
    monkeypatch.setitem(D.MODELS, "video-tiny", dict(
        kind="video", dim=24, depth=1, heads=2, patch=(1, 1, 1), rope_base=100.0, text=(16, 1, 2)))
    losses, run, measure = iter([3.0, 1.0, 1.5, 2.0, 2.5]), home / "runs/shown", D.held_out_loss

    def held_out_loss(model, *rest):
        result = measure(model, *rest)                        # also that of zeros, as it is
        return {**result, "held_out": next(losses)} if isinstance(model, torch.nn.Module) else result
    monkeypatch.setattr(D, "held_out_loss", held_out_loss)
    command = ["set", "--vae", "set-vae", "--model", "video-tiny", "--row_tokens", "256",
               "--batch_tokens", "256", "--eval_every", "1", "--save_every", "1", "--keep", "1",
               "--schedule", "constant", "--run", "shown", "--steps"]
    D.main([*command, "1"])
    (run / "loss.png").unlink()
    D.main([*command, "1"])                                  # killed before it drew
    first = (run / "loss.png").read_bytes()
    D.main([*command, "5"])
    log = D.read_log(run)
    assert (run / "loss.png").read_bytes() != first
    assert len({row["held_out_zero"] for row in log}) == 1 and log[0]["held_out_zero"] > 1
    assert "since step 2" in capsys.readouterr().err
    assert D.best_of(run) == {"step": 2, "held_out": 1.0} and [
        path.name for path in run.glob("step-*")] == ["step-000005"]
    last = load_file(run / "step-000005/ema.safetensors")
    best = D.load_denoiser("shown")[0].state_dict()
    assert "has the lowest" in capsys.readouterr().err
    final = D.load_denoiser("shown", which="last")[0].state_dict()
    assert all(torch.equal(final[name], last[name]) for name in last)
    assert any(not torch.equal(best[name], last[name]) for name in last)
    common = ["shown", "--prompt", "dark", "--size", "32x32", "--frames", "5", "--steps", "1"]
    for which, step in (("best", 2), ("last", 5)):
        sample.main([*common, "--checkpoint", which, "--out", str(run / which)])
        facts = json.loads(next((run / which).glob("*.json")).read_text())
        assert facts["weights"] == f"runs/shown/step-{step:06d}"
    assert "--checkpoint last" in facts["command"]
    data = json.loads((run / "config.json").read_text())["data"]
    assert data == {
        "size": [32, 32], "frames": 9, "fps": 9.0, "sizes": [[32, 32, 8]], "frames_range": [9, 9],
        "fps_range": [9.0, 9.0], "side_range": [32, 32], "grid_range": [[3, 4, 4], [3, 4, 4]],
        "text": True, "words": ["a", "bright", "dark", "video"]}


def test_a_run_holds_out_the_same_clips_when_files_are_added(home, tmp_path, monkeypatch):
    """All three that train: their losses before and after are of the same clips, and what came later is
    learnt; a run without a record of its clips makes one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(D.MODELS, "video-tiny", dict(
        kind="video", dim=24, depth=1, heads=2, patch=(1, 1, 1), rope_base=100.0, text=(16, 1, 2)))
    seen = {}
    for module, name, at in ((train_vae, "held_out_bank", 2), (D, "held_out_bank", 0), (caption, "Frames", 1)):
        def spy(*args, whole=getattr(module, name), of=(module.__name__, at), **kw):
            seen[of[0]] = [row if isinstance(row, str) else row["key"] for row in getattr(
                args[of[1]], "keys", args[of[1]])]
            return whole(*args, **kw)
        monkeypatch.setattr(module, name, spy)

    def train(steps, files, *stages):
        for path, name in files:
            shutil.copy(path, f"videos/{name}.mp4")
            shutil.copy(path.with_suffix(".txt"), f"videos/{name}.txt")
        prepare_data.main(["set", "--videos", "videos", "--min_sharpness", "0", "--workers", "1"])
        common = ["set", "--steps", steps, "--eval_every", "1", "--warmup", "0"]
        for stage in stages:
            {"dit": lambda: D.main([*common, "--run", "dit", "--model", "video-tiny", "--row_tokens", "64",
                                    "--batch_tokens", "64"]),
             "vae": lambda: ([path.unlink() for path in Path("data/set").glob("*.latents-*")],   # of use to none
                             train_vae.main([*common, "--batch", "2"])),
             "encode": lambda: train_vae.main(["set", "--encode"]),
             "words": lambda: caption.main([*common, "--train", "--few", "--run", "words", "--batch", "2"])}[stage]()
        return {run: Path("runs", run, "held_out.txt").read_text().split() for run in ("set-vae", "dit", "words")}
    (tmp_path / "videos").mkdir()
    files = [home / f"videos/{label}/{label}{i}.mp4" for label in ("dark", "bright") for i in range(5)]
    drawn = [f"v{i}" for i in range(99) if prepare_data.drawn_split(f"v{i}.mp4") == "val"]
    first = train("1", zip(files, ["a", "b", "c", "d", drawn[0]]), "vae", "encode", "dit", "words")
    before = dict(seen)
    assert all(first.values()) and before["train_dit"] == first["dit"] and len(before["caption"]) == 5
    Path("runs/words/held_out.txt").unlink()                 # a run of before: it makes one, and goes on
    train("1", (), "words")
    assert train("2", zip(files[5:], ["e", "f", "g", "h", drawn[1]]), "encode", "dit", "words", "vae") == first
    assert {name: seen[name] for name in ("train_vae", "train_dit")} == {
        name: before[name] for name in ("train_vae", "train_dit")}
    assert len(seen["caption"]) == 9 and seen["caption"][-1:] == first["words"]


@pytest.mark.parametrize("word, says", [
    ("DiT-XL/2", "--model DiT-XL/2: did you mean dit-xl-2?"), ("video_b", "--model video_b: did you mean video-b?")])
def test_an_unknown_model_is_refused_with_the_nearest_name(word, says, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    with pytest.raises(SystemExit) as stop:
        D.main(["set", "--model", word])
    assert stop.value.code == 2 and capsys.readouterr().err.splitlines()[-1].endswith(says)


def test_a_run_of_ones_own_has_no_published_layout_to_export(home, tmp_path, monkeypatch, capsys):
    """In one line, which says that its own files are safetensors; nothing is written."""
    monkeypatch.chdir(home)
    monkeypatch.setitem(D.MODELS, "video-tiny", dict(
        kind="video", dim=24, depth=1, heads=2, patch=(1, 1, 1), rope_base=100.0, text=(16, 1, 2)))
    D.main(["set", "--vae", "set-vae", "--model", "video-tiny", "--row_tokens", "64", "--batch_tokens", "64",
            "--run", "own", "--steps", "1", "--eval_every", "1"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        D.main(["set", "--run", "own", "--export", str(tmp_path / "own.safetensors")])
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "own did not begin with published weights" in line and "safetensors too" in line
    assert not (tmp_path / "own.safetensors").exists()


def test_runs_are_compared_in_a_table_and_a_picture(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    for run, options, losses in (("one", {"seed": 0}, [2, 1, 3]), ("two", {"seed": 1}, [2, 1.5])):
        (home / "runs" / run).mkdir()
        train_vae.write_config(home / "runs" / run, {
            "format": 1, "kind": "denoiser", "model": {}, "vae": {"hash": "aa"},
            "args": {"batch_tokens": 1000, **options}})
        train_vae.write_rows(home / "runs" / run / "log.jsonl", [
            {"step": 100 * i + 100, "loss": loss, "held_out": loss, "fullness": 0.5, "step_s": 0.6,
             "held_out_zero": 2.0} for i, loss in enumerate(losses)])
    D.main(["compare", "one", "two"])
    out, err = capsys.readouterr()
    head, *rows = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    assert head == ["run", "steps", "tokens", "time", "best held out", "at step", "last",
                    "constant"]
    assert rows == [["one", "300", "0.15M", "3.0 min", "1.0000", "200", "3.0000", "2.0000"],
                    ["two", "200", "0.10M", "2.0 min", "1.5000", "200", "1.5000", "2.0000"]]
    assert "differ in --seed" in err and Image.open(home / "runs/compare.png").size == (860, 500)
    for line, names in (("usage", []), ("no run", ["one", "three"])):
        with pytest.raises(SystemExit) as stop:
            D.main(["compare", *names])
        assert stop.value.code == 2 and line in capsys.readouterr().err
    with open(home / "runs/two/log.jsonl", "a") as file:
        file.write("{\"step\": 300, \n")
    for text, line in ((None, "line 3 is damaged"), ('{"format": 1, "kind": "denoiser"}', "and args")):
        if text:
            (home / "runs/two/config.json").write_text(text)
        with pytest.raises(SystemExit) as stop:
            D.main(["compare", "two"])
        assert stop.value.code == 2 and line in capsys.readouterr().err


def test_small_data_and_missing_captions_are_said(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    command = ["set", "--vae", "set-vae", "--run", "small", "--model", "video-xxs", "--estimate"]
    D.main([*command, "--row_tokens", "64", "--batch_tokens", "64", "--steps", "40"])
    err = capsys.readouterr().err
    assert "holds 1.0 clips on average: for four take --row_tokens 256 --batch_tokens 256" in err
    assert "all 8 clips fill 8 rows, and 40 steps show each 5 times" in err
    assert "without text" not in err
    opened = D.open_dataset
    monkeypatch.setattr(D, "open_dataset", lambda folder: [
        {**row, "captions": []} for row in opened(folder)])
    D.main([*command, "--row_tokens", "256", "--batch_tokens", "256"])
    err = capsys.readouterr().err
    assert "trains without text" in err and "on average" not in err
    D.main([*command[:-1], "--row_tokens", "256", "--batch_tokens", "256", "--steps", "1"])
    data = json.loads((home / "runs/small/config.json").read_text())["data"]
    assert data["text"] is False and data["words"] == []


def test_an_estimate_of_a_step_is_timed_with_what_follows_its_rows(home, monkeypatch, capsys):
    """Two rows of 0.2 s, then 0.5 s of optimizer; and the run's last line counts what was held before."""
    monkeypatch.chdir(home)
    taken = []
    monkeypatch.setattr(D, "add_gradients", lambda *at: time.sleep(0.2))
    monkeypatch.setattr(D, "take_step", lambda *at: taken.append(time.sleep(0.5)))
    D.main(["set", "--vae", "set-vae", "--run", "planned", "--model", "video-xxs", "--estimate", "--device", "cpu",
            "--row_tokens", "256", "--batch_tokens", "512", "--steps", "40"])
    out = capsys.readouterr().out
    seconds = float(re.search(r"^a step +([\d.]+) s: ", out, re.M)[1])
    assert 0.9 <= seconds < 2.0 and 2 <= len(taken) <= 6 and "as steps were timed" in out
    assert re.search(r"beside \d{3,} MiB of libraries", out)


def test_an_estimate_encodes_no_captions(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home)
    for path in (home / "data/set").glob("*.text-*"):
        path.unlink()
    D.main(["set", "--vae", "set-vae", "--model", "wan", "--init", str(published("wan", tmp_path)),
            "--text_encoder", str(ENCODER), "--row_tokens", "64", "--batch_tokens", "64", "--run",
            "planned", "--estimate"])
    assert "80 GB hold" in capsys.readouterr().out
    assert not list((home / "data/set").glob("*.text-*")) and not (home / "runs/planned").exists()
    encoder = D.open_text_encoder(ENCODER)
    for text in ("", "a dark video"):
        assert len(D.CountedTexts(encoder)[text]) == len(encoder.encode([text])[0])


def test_a_published_file_is_read_once(tmp_path, monkeypatch):
    read, opened = D.read_tensors, []
    monkeypatch.setattr(D, "read_tensors", lambda path: opened.append(path) or read(path))
    assert D.load_published(published("uvit", tmp_path), 2)[1] == "uvit"
    assert D.load_published(FIXTURES / "videogpt-gpt-sparse" / "gpt.ckpt")[1] == "gpt"
    assert len(opened) == 2


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++") and not torch.cuda.is_available(),
                    reason="no C++ compiler for torch.compile")
def test_compiled_blocks_train_as_the_others(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setitem(D.MODELS, "sit-tiny", dict(
        kind="sit", dim=24, depth=1, heads=2, patch=(1, 2, 2), own_table=True, positions="sincos",
        classes=3))
    losses = []
    for run, more in (("eager", []), ("compiled", ["--compile"])):
        D.main(["set", "--vae", "set-vae", "--model", "sit-tiny", "--run", run, "--steps", "3",
                "--row_tokens", "64", "--batch_tokens", "64", "--log_every", "1", *more])
        losses.append([row["loss"] for row in D.read_log(home / "runs" / run)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 3


# -- VideoGPT's prior ------------------------------------------------------------------------------


class Levels(torch.nn.Module):
    """Stands for a VQ autoencoder: a code is the nearest of K levels of grey of a block of pixels,
    and a latent frame covers one frame, then four."""
    stride, time_stride, n_codes, z_dim = 8, 4, 6, 3

    def __init__(self):
        super().__init__()
        self.bottleneck = torch.nn.Module()
        self.bottleneck.codebook = torch.linspace(-1, 1, 6)[:, None] * torch.ones(3)

    def encode_codes(self, video):
        first, rest = video[:, :, :1], video[:, :, 1:]
        cells = [F.avg_pool3d(part.mean(1, keepdim=True), (frames, 8, 8))
                 for part, frames in ((first, 1), (rest, 4)) if part.shape[2]]
        return (torch.cat(cells, 2)[:, 0] * 2.5 + 2.5).round().long().clamp(0, 5)

    def decode_codes(self, codes):
        grey = self.bottleneck.codebook[codes].movedim(-1, 1)                       # [B, 3, T', H', W']
        return F.interpolate(torch.cat([grey[:, :, :1], grey[:, :, 1:].repeat_interleave(
            4, 2)], 2), scale_factor=(1, 8, 8))


CONFIG = {"hash": "c0de0001"}
CODES = ["--vae", "levels", "--row_tokens", "96", "--batch_tokens", "192", "--eval_every", "12",
         "--log_every", "1", "--warmup", "0", "--lr", "0.01", "--steps", "4", "--device", "cpu"]
TINY = dict(kind="gpt", dim=24, depth=2, heads=2, dropout=0.1, attn_dropout=0.1)


@pytest.fixture
def coded(home, monkeypatch):
    """data/set with codes of `Levels` for every clip: 32 codes each, or some other shape."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(D, "load_autoencoder", lambda name, device="cpu": (Levels(), CONFIG))
    for name, more in (("tiny", dict(text=(16, 1, 2))), ("tiny-none", dict(sparse=True)),
                       ("tiny-class", dict(classes=9))):
        monkeypatch.setitem(D.MODELS, f"gpt-{name}", {**TINY, **more})
    train, held_out = train_vae.split_rows(prepare_data.open_dataset(home / "data/set"), "set")
    tensors, about = {}, {}
    for i, row in enumerate([*train, *held_out]):
        video = train_vae.to_tensor(prepare_data.read_clip(home / "data/set", row))[None]
        codes = Levels().encode_codes(video)[0].int()                    # [3, 4, 4]
        wide = F.pad(codes[:2], (1, 1), value=5)
        tensors[row["key"]] = {0: codes, 1: codes[:2, :3].clone(), 2: wide}.get(i, codes[:2])
        about[row["key"]] = {"clip": row["key"], "first_frame": 0, "frames": 9, "fps": 9.0,
                             "crop": [0, 0, 32, 32]}
    header = {"format": 1, "autoencoder": "c0de0001", "codes": 6, "stride": 8, "time_stride": 4,
              "max_cells": 2048, "clips": about, "alone": {}}
    save_file(tensors, train_vae.latents_path(home / "data/set", "shard-00000", "c0de0001"),
              {"nanosora": json.dumps(header)})
    return home


@pytest.mark.parametrize("name", ["tiny", "tiny-none", "tiny-class"])
def test_a_prior_of_codes_learns_samples_and_goes_on(name, coded, capsys):
    """Told a caption, nothing or a class; with dropout, a run that was stopped goes on to the same
    bytes."""
    common = ["set", *CODES, "--model", f"gpt-{name}", "--lr", "0.02", "--drop", "0.3"]
    for run, stops in ((f"{name}-whole", ["12"]), (f"{name}-broken", ["3", "12"])):
        for stop in stops:
            D.main([*common, "--run", run, "--steps", stop, "--schedule", "constant"])
    train, _ = train_vae.split_rows(prepare_data.open_dataset(coded / "data/set"), "set")
    assert (f"1 of {len(train)} clips are left out, smaller than codes of 2x4x4: {train[1]['key']}"
            in capsys.readouterr().err)
    for file in ("model", "ema", "optimizer"):
        whole, broken = (load_file(coded / f"runs/{name}-{end}/step-000012/{file}.safetensors")
                         for end in ("whole", "broken"))
        assert set(whole) == set(broken) and all(torch.equal(whole[k], broken[k]) for k in whole)
    rows = [json.loads(line) for line in open(coded / f"runs/{name}-whole/log.jsonl")]
    assert rows[0]["loss"] == pytest.approx(math.log(6), abs=1e-5)       # its head begins at zero
    assert rows[-1]["held_out"] < 0.9 * math.log(6) and rows[-1]["fullness"] == 1
    assert rows[-1]["bits_per_dim"] == pytest.approx(rows[-1]["held_out"] / math.log(2))
    assert list(rows[-1]["held_out_by_shape"]) == ["2x4x4"]
    assert np.mean(rows[-1]["loss_by_t"]) == pytest.approx(rows[-1]["loss"], rel=1e-5)
    assert (coded / f"runs/{name}-whole/samples/step-000012.png").exists()
    model, read, config = D.load_denoiser(f"{name}-whole")
    assert torch.equal(model.dit.codebook, Levels().bottleneck.codebook)
    prompt = {"tiny": "a dark video", "tiny-none": "", "tiny-class": "dark"}[name]
    videos = D.sample_codes(model, Levels(), [read(prompt)] * 2, torch.rand(2, 32))
    assert [video.shape for video in videos] == [(5, 32, 32, 3)] * 2 and videos[0].std() >= 0


def test_codes_are_cropped_to_one_shape(coded):
    rows, _ = train_vae.split_rows(prepare_data.open_dataset(coded / "data/set"), "set")
    clips = D.Clips(coded / "data/set", rows, CONFIG, (1, 1, 1), 96)
    whole = clips.files[clips.keys[0]].get_tensor
    keys = [row["key"] for row in rows]
    assert clips.keys == sorted([keys[0], *keys[2:]])
    assert torch.equal(clips.latent(keys[0], 0, 0), whole(keys[0])[:2].long())
    assert torch.equal(clips.latent(keys[2], 0, 0), whole(keys[2])[:, :, 1:5].long())
    small = D.Clips(coded / "data/set", rows, CONFIG, (1, 1, 1), 96, shape=[1, 2, 2])
    assert len(small.keys) == len(rows)
    assert torch.equal(small.latent(keys[1], 0, 0), whole(keys[1])[:1, :2, 1:3].long())


def test_a_published_prior_is_begun_from_and_written_back(coded, tmp_path, monkeypatch):
    """Bit for bit where nothing was trained, with the VQ-VAE that its file holds."""
    path = FIXTURES / "videogpt-gpt-class" / "gpt.ckpt"
    network, options, vqvae = D.load_gpt(path)
    vae = Levels()
    vae.bottleneck.codebook = network.codebook
    vae.decode_codes = lambda codes: torch.zeros(len(codes), 3, 5, 32, 32)
    monkeypatch.setattr(D, "load_autoencoder", lambda name, device="cpu": (vae, CONFIG))
    tensors = {key: torch.randint(len(vae.bottleneck.codebook), options["shape"], dtype=torch.int32)
               for key in (row["key"] for row in prepare_data.open_dataset(coded / "data/set"))}
    where = train_vae.latents_path(coded / "data/set", "shard-00000", "c0de0001")
    header = json.dumps(train_vae.read_header(where))
    save_file(tensors, where, {"nanosora": header})
    common = ["set", *CODES[:2], "--model", "gpt", "--init", str(path), "--eval_every", "9",
              "--warmup", "0", "--row_tokens", "256", "--batch_tokens", "256"]
    D.main([*common, "--run", "still", "--steps", "1", "--lr", "0"])
    D.main([*common[:4], "gpt", "--init", "still", *common[7:], "--run", "still2", "--steps", "1", "--lr", "0"])
    before = D.read_tensors(path)["state_dict"]
    for run in ("still", "still2"):
        D.main(["set", "--run", run, "--export", str(tmp_path / "back.safetensors")])
        after = load_file(tmp_path / "back.safetensors")
        changed = {k for k in before if k not in after or not torch.equal(before[k], after[k])}
        # another table of classes: the two that the data has
        assert set(before) == set(after) and all(k.endswith((".w.weight", ".wb.weight"))
                                                 for k in changed)
    vae.bottleneck.codebook = network.codebook + 1
    with pytest.raises(SystemExit):
        D.main([*common, "--run", "other", "--steps", "1"])


def test_codes_and_latents_are_not_mistaken(home, coded, capsys, monkeypatch):
    def line(*options):
        with pytest.raises(SystemExit) as stop:
            D.main(["set", *CODES, "--run", "x", *options])
        assert stop.value.code == 2 and not (coded / "runs/x").exists()
        return capsys.readouterr().err.splitlines()[-1]
    assert "--bottleneck vq" in line("--model", "video-xs")
    assert "--given" in line("--model", "gpt-tiny", "--given", "0.5")
    assert "all clips are smaller" in line("--model", "gpt-tiny", "--shape", "9x9x9")
    assert "blocks of 32 codes" in line("--model", "gpt-tiny-none", "--shape", "2x4x3")
    assert "--shape is not for --model video-xs" in line("--shape", "2x4x3")
    assert "such as 4x32x32" in line("--shape", "2x4")
    monkeypatch.undo()
    monkeypatch.chdir(home)
    assert "--bottleneck vq" in line("--model", "gpt-xs", "--vae", "set-vae")


def test_dropout_of_a_row_is_its_own_whatever_shares_the_step(coded):
    """Gradients of two rows are those of each alone, as on two ranks."""
    rows = prepare_data.open_dataset(coded / "data/set")
    clips = D.Clips(coded / "data/set", rows, CONFIG, (1, 1, 1), 96)
    clips.read_as("gpt")
    model = D.Denoiser(**TINY, shape=(2, 4, 4), codes=6, code_dim=3)
    model.dit.codebook.copy_(Levels().bottleneck.codebook)
    torch.nn.init.normal_(model.dit.fc_out.weight)
    loaded = [D.load_row(clips, clips.keys[i:i + 3], 0, 0, 0.0, [0.5] * 3) for i in (0, 3)]
    args = D.parse_options(["set", "--model", "gpt-xs", "--row_tokens", "96",
                            "--batch_tokens", "96"])

    def gradient(*picked):
        model.zero_grad()
        figures = D.add_gradients(model, 7, [loaded[i] for i in picked], [[32] * 3] * 2, args, "cpu")
        return torch.cat([p.grad.flatten() for p in model.parameters()]), figures["loss"]
    both, one, two = gradient(0, 1), gradient(0), gradient(1)
    torch.testing.assert_close(both[0], one[0] + two[0])
    torch.testing.assert_close(both[1], one[1] + two[1])
    assert not torch.allclose(gradient(0)[0], D.copy.deepcopy(gradient(1)[0]))
    model.eval()
    assert not torch.allclose(gradient(0)[0], one[0])        # there was dropout


def test_what_a_prior_costs_is_what_torch_counts():
    """FLOPs but for those of the scores; bytes within a quarter."""
    options = dict(TINY, shape=(2, 4, 8), codes=50, code_dim=3, dim=96, dropout=0.0)
    model, codes = D.Denoiser(**options), torch.randint(50, (3, 2, 4, 8))
    saved, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x            # alive: no address comes twice
        return x
    with FlopCounterMode(display=False) as counter, \
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.dit.eval().losses(codes)
    result = sum(x.untyped_storage().nbytes() for at, x in saved.items() if at not in own)
    assert D.saved_bytes(options, 192, 0, "torch", "fp32") == pytest.approx(result, rel=0.25)
    seen = 4 * 96 * 3 * 64 * 65 // 2 * 2                     # torch counts no fused attention
    assert D.step_flops(options, [64] * 3, [0] * 3) / 3 - seen == (
        counter.get_total_flops() + 2 * 3 * 3 * 96)          # nor is the last code read
