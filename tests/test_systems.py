"""Published weights of each system, begun from, trained, sampled and written back, on real files."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import prepare_data
import sample
import train_dit as D
import train_vae

ENCODER = Path(__file__).with_name("fixtures") / "t5-v1_1-encoder" / "encoder"


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
    state = D.read_tensors(path)
    torch.save({k: v for k, v in state.items() if k != "blocks.0.attn.proj.bias"}, tmp_path / "a.pt")
    assert "blocks.0.attn.proj.bias" in line("--model", "dit", "--init", str(tmp_path / "a.pt"))
    torch.save({**state, "more": torch.ones(1)}, tmp_path / "b.pt")
    assert "hold more" in line("--model", "dit", "--init", str(tmp_path / "b.pt"))
    other = D.DiT(4, 48, 1, 4, (1, 2, 2), out_channels=8, classes=3, own_table=True,
                  positions="sincos", grid=(4, 4))
    torch.save(D.to_published(other.state_dict(), "dit", other), tmp_path / "c.pt")
    assert "4 channels" in line("--model", "dit", "--init", str(tmp_path / "c.pt"))
    assert "prepare smaller" in line("--model", "uvit", "--heads", "2", "--init",
                                     str(published("uvit", tmp_path)))
