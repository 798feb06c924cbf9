"""Published folders of denoisers, autoencoders and schedulers as people have them: the values of the
well-known config.json, shrunk; each precision, naming and way of leaving defaults out; and what is
refused, each in one line."""
import argparse
import copy
import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from test_sample import i2v, tower_by_hand, tower_weights  # noqa: F401

import sample as S
import train_dit as D
import train_vae as V

FIXTURES = Path(__file__).with_name("fixtures")


def refused(capsys, run, *args, **kwargs):
    """The one line, behind status 2, in which a call ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*args, **kwargs)
    message = capsys.readouterr().err.strip()
    lines = [line for line in message.split("\n") if not line.startswith("\rsample:")]
    assert stopped.value.code == 2 and len(lines) == 1, message
    return lines[0]


# ---- denoisers: a plain reference, in diffusers' names

def wan_by_hand(w, config, x, t, text, image=None):
    """[C, T', H', W'] of x [C, T', H', W'], a time of 0 to 1000, text [512, width]."""
    heads, layers, pt, ph, pw = config["num_attention_heads"], config["num_layers"], 1, 2, 2
    linear = lambda name, v: F.linear(v, w[f"{name}.weight"], w.get(f"{name}.bias"))
    plain = lambda v: F.layer_norm(v, v.shape[-1:], eps=1e-6)
    rms = lambda name, v: F.rms_norm(v, v.shape[-1:], w[f"{name}.weight"], 1e-6)
    e = "condition_embedder."
    width = w[f"{e}time_embedder.linear_1.weight"].shape[1]
    angle = t * 10000.0 ** (-torch.arange(width // 2).double() / (width // 2))
    e_t = linear(f"{e}time_embedder.linear_2", F.silu(linear(f"{e}time_embedder.linear_1", torch.cat(
        [angle.cos(), angle.sin()]).float())))
    e0 = linear(f"{e}time_proj", F.silu(e_t)).view(6, -1)
    text = linear(f"{e}text_embedder.linear_2", F.gelu(linear(f"{e}text_embedder.linear_1", text),
                                                       approximate="tanh"))
    if image is not None:
        name = f"{e}image_embedder."
        norm = lambda part, v: F.layer_norm(v, v.shape[-1:], w[f"{name}{part}.weight"], w[f"{name}{part}.bias"])
        image = norm("norm2", linear(f"{name}ff.net.2", F.gelu(linear(f"{name}ff.net.0.proj", norm("norm1", image)))))
    y = F.conv3d(x[None], w["patch_embedding.weight"], w["patch_embedding.bias"], (pt, ph, pw))[0]
    (dim, *grid), y = y.shape, y.flatten(1).mT
    side = 2 * (dim // heads // 6)
    places = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    turn = torch.cat([place.flatten()[:, None] * 10000.0 ** (-2 * torch.arange(n // 2).double() / n)
                      for place, n in zip(places, (dim // heads - 2 * side, side, side))], 1)[:, None]
    turn = torch.polar(torch.ones_like(turn), turn)
    rope = lambda v: torch.view_as_real(torch.view_as_complex(v.double().unflatten(-1, (-1, 2)))
                                        * turn).flatten(-2).float()

    def attend(q, k, v):
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
    for i in range(layers):
        b = f"blocks.{i}."
        shift1, scale1, gate1, shift2, scale2, gate2 = (w[f"{b}scale_shift_table"][0] + e0)
        h = plain(y) * (1 + scale1) + shift1
        q, k = (rms(f"{b}attn1.norm_{p}", linear(f"{b}attn1.to_{p}", h)) for p in "qk")
        q, k = (rope(part.unflatten(-1, (heads, -1))).flatten(1) for part in (q, k))
        y = y + gate1 * linear(f"{b}attn1.to_out.0", attend(q, k, linear(f"{b}attn1.to_v", h)))
        h = F.layer_norm(y, (dim,), w[f"{b}norm2.weight"], w[f"{b}norm2.bias"], 1e-6)
        q = rms(f"{b}attn2.norm_q", linear(f"{b}attn2.to_q", h))
        out = attend(q, rms(f"{b}attn2.norm_k", linear(f"{b}attn2.to_k", text)), linear(f"{b}attn2.to_v", text))
        if image is not None:
            out = out + attend(q, rms(f"{b}attn2.norm_added_k", linear(f"{b}attn2.add_k_proj", image)),
                               linear(f"{b}attn2.add_v_proj", image))
        y = y + linear(f"{b}attn2.to_out.0", out)
        h = plain(y) * (1 + scale2) + shift2
        y = y + gate2 * linear(f"{b}ffn.net.2", F.gelu(linear(f"{b}ffn.net.0.proj", h), approximate="tanh"))
    shift, scale = w["scale_shift_table"][0] + e_t
    y = linear("proj_out", plain(y) * (1 + scale) + shift)
    return y.view(*grid, pt, ph, pw, -1).permute(6, 0, 3, 1, 4, 2, 5).reshape(-1, *x.shape[1:])


def ours(model, x, t, text, image=None):
    row = D.lay_out([tuple(x.shape)], [None], [[]], None, model.patch)
    packed, row.cu_text = D.fill_texts([text])
    if image is not None:
        row.cu_image = torch.tensor([0, len(image)], dtype=torch.int32)
    with torch.no_grad():
        out = model(D.patchify([x], model.patch), t[None], row, packed, image)
    return D.unpatchify(out, [(model.out_channels, *x.shape[1:])], model.patch)[0]


THEIRS = dict(_class_name="WanTransformer3DModel", _diffusers_version="0.33.0.dev0", added_kv_proj_dim=None,
              attention_head_dim=128, cross_attn_norm=True, eps=1e-6, ffn_dim=13824, freq_dim=256,
              image_dim=None, in_channels=16, num_attention_heads=40, num_layers=40, out_channels=16,
              patch_size=[1, 2, 2], qk_norm="rms_norm_across_heads", rope_max_seq_len=1024, text_dim=4096)
OWN = dict(_class_name="WanModel", _diffusers_version="0.33.0", dim=5120, eps=1e-6, ffn_dim=13824,
           freq_dim=256, in_dim=16, model_type="t2v", num_heads=40, num_layers=40, out_dim=16, text_len=512)
HUB = {                 # transformer/config.json, or config.json in Wan's own layout
    "Wan2.1-T2V-1.3B-Diffusers": dict(THEIRS, ffn_dim=8960, num_attention_heads=12, num_layers=30),
    "Wan2.1-T2V-14B-Diffusers": THEIRS,
    "Wan2.1-I2V-14B-480P-Diffusers": dict(THEIRS, added_kv_proj_dim=5120, image_dim=1280, in_channels=36),
    "Wan2.2-TI2V-5B-Diffusers": dict(THEIRS, _diffusers_version="0.35.0.dev0", ffn_dim=14336, in_channels=48,
                                     num_attention_heads=24, num_layers=30, out_channels=48,
                                     pos_embed_seq_len=None),
    "Wan2.1-T2V-1.3B": dict(OWN, _diffusers_version="0.30.0", dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "Wan2.1-T2V-14B": OWN,
    "Wan2.1-I2V-14B-480P": dict(OWN, in_dim=36, model_type="i2v"),
    "Wan2.2-TI2V-5B": dict(OWN, dim=3072, ffn_dim=14336, in_dim=48, model_type="ti2v", num_heads=24,
                           num_layers=30, out_dim=48)}
TINY = {"ffn_dim": 24, "freq_dim": 16, "num_layers": 2}


def shrunk(config):
    """(A published config with its heads, channels and flags, but of heads 6 wide; ours by it)."""
    is_own = config["_class_name"] == "WanModel"
    heads = config["num_heads" if is_own else "num_attention_heads"]
    has_image = config.get("image_dim") or config.get("model_type") == "i2v"
    small = {**config, **{name: value for name, value in TINY.items()}}
    small |= {"dim": 6 * heads} if is_own else {"attention_head_dim": 6, "text_dim": 20}
    if config.get("image_dim"):
        small |= dict(added_kv_proj_dim=6 * heads, image_dim=10)
    torch.manual_seed(0)
    model = D.DiT(config.get("in_dim") or config["in_channels"], 6 * heads, 2, heads, (1, 2, 2),
                  config.get("out_dim") or config["out_channels"], 24, 20, 10 if has_image else 0,
                  positions="index", time_width=16)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return small, model


def written(folder, config, state, name="diffusion_pytorch_model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (save_file if name.endswith("safetensors") else torch.save)(
        {k: v.contiguous() for k, v in state.items()}, folder / name)
    return folder


@pytest.mark.parametrize("name", HUB)
def test_hub_configs_of_wan_equal_the_reference_with_defaults_left_out(name, tmp_path):
    """Whole; without what equals the class's default; and without all but what nothing else tells."""
    config, model = shrunk(HUB[name])
    layout = "wan" if config["_class_name"] == "WanModel" else "diffusers"
    state, usual = D.to_published(model.state_dict(), layout, model), D.CLASSES[config["_class_name"]]
    own, theirs = (D.to_published(model.state_dict(), each, model) for each in ("wan", "diffusers"))
    heads = {key: config[key] for key in ("num_heads", "num_attention_heads") if key in config}
    x, text = torch.randn(model.channels, 2, 4, 6), torch.randn(5, 20)
    image = torch.randn(4, 10) if model.image is not None else None
    wanted = wan_by_hand(theirs, {"num_attention_heads": model.blocks[0].attn.heads, "num_layers": 2},
                         x, 371.0, F.pad(text, (0, 0, 0, 507)), image)
    assert set(own) != set(theirs)
    least = {key: value for key, value in config.items() if usual.get(key) != value}
    for said in (config, least, {"_class_name": config["_class_name"], **heads}):
        result, told, options = D.load_published(written(tmp_path / "it", said, state))
        assert told == layout and options["heads"] == model.blocks[0].attn.heads
        out = ours(result, x, torch.tensor(371.0), text, image)
        assert (out - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("heads", [16, 40])
def test_heads_left_out_are_the_classs_default(heads, tmp_path, capsys):
    model = D.DiT(16, 6 * heads, 1, heads, (1, 2, 2), 16, 24, 20, positions="index", time_width=16)
    for layout, name, usual in (("wan", "WanModel", 16), ("diffusers", "WanTransformer3DModel", 40)):
        folder = written(tmp_path / layout, {"_class_name": name}, D.to_published(
            model.state_dict(), layout, model))
        if heads == usual:
            assert D.load_published(folder)[2]["heads"] == heads
        elif 6 * heads % usual:
            assert f"{usual} heads" in refused(capsys, D.load_published, folder)


# ---- precisions, prefixes, names of files

def wan_fixture():
    folder = FIXTURES / "wan-denoiser-diffusers"
    return json.loads((folder / "config.json").read_text()), load_file(
        folder / "diffusion_pytorch_model.safetensors"), load_file(folder / "io.safetensors")


KEPT = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")      # float32 in diffusers' mix
PRECISIONS = {
    "bf16": lambda n, x: x.bfloat16(), "fp16": lambda n, x: x.half(),
    "mix": lambda n, x: x if any(part in n for part in KEPT) else x.bfloat16(),
    "fp8": lambda n, x: x.to(torch.float8_e4m3fn) if x.dim() > 1 and n.endswith("weight") else x.half(),
    "e5m2": lambda n, x: x.to(torch.float8_e5m2)}


@pytest.mark.parametrize("kind", PRECISIONS)
def test_p05_p01_weights_of_any_precision_are_read_as_float32(kind, tmp_path):
    config, state, io = wan_fixture()
    stored = {name: PRECISIONS[kind](name, x) for name, x in state.items()}
    result, _, _ = D.load_published(written(tmp_path, config, stored))
    back = D.to_published(result.state_dict(), "diffusers", result)
    assert all(x.dtype == torch.float32 for x in result.state_dict().values())
    assert all(torch.equal(back[name], x.float()) for name, x in stored.items())
    exact, _, _ = D.load_published(FIXTURES / "wan-denoiser-diffusers")
    x, t, text = io["x"][0], io["timestep"][0], io["context"][0]
    out, near = (ours(model, x, t, text) for model in (result, exact))
    assert 0 < (out - near).abs().max() < (2.0 if kind == "e5m2" else 0.3) * near.abs().max()
    assert (near - io["out"][0]).abs().max() < 1e-4 * near.abs().max()
    init = SimpleNamespace(init=str(tmp_path), heads=None, model="wan")        # train_dit.py --init
    options, _, weights = D.start_from(init, None)
    model = D.Denoiser(**options)
    model.load_state_dict(weights)
    assert torch.equal(model.dit.embed.weight, result.embed.weight)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "module.", "model.",
                                    "_orig_mod.", "net.", "module._orig_mod.", "transformer.", "ema."])
def test_p02_prefixed_names_are_read(prefix, tmp_path):
    config, state, _ = wan_fixture()
    more = {"first_stage_model.a.weight": torch.ones(1)} if "model" in prefix else {}
    result, _, _ = D.load_published(written(tmp_path, config, {
        **{prefix + name: x for name, x in state.items()}, **more}))
    assert torch.equal(result.embed.weight, state["patch_embedding.weight"].flatten(1))
    dit = D.DiT(4, 64, 1, 1, (1, 2, 2), 8, own_table=True, positions="sincos", classes=11, grid=(4, 4))
    dit_state = D.to_published(dit.state_dict(), "dit", dit)
    named = {prefix + name: x for name, x in dit_state.items()}
    for i, file in enumerate((named, {"ema": named, "model": {}, "opt": {}}, {"model": named, "opt": {}},
                              {"state_dict": named}, {"module": named})):
        torch.save(file, tmp_path / "dit.pt")
        assert torch.equal(D.load_published(tmp_path / "dit.pt")[0].embed.bias, dit.embed.bias), i
    vae = load_file(FIXTURES / "sd-vae/vae/diffusion_pytorch_model.safetensors")
    if prefix in ("module.", "model.", "_orig_mod."):
        folder = written(tmp_path / "vae", json.loads((FIXTURES / "sd-vae/vae/config.json").read_text()),
                         {prefix + name: x.half() for name, x in vae.items()})
        assert V.load_autoencoder(folder)[0].to_pixels.weight.dtype == torch.float32


def test_p05_files_of_half_precision_are_read_as_float32(tmp_path):
    dit = D.DiT(4, 64, 1, 1, (1, 2, 2), 8, own_table=True, positions="sincos", classes=11, grid=(4, 4))
    uvit = D.UViT(channels=4, size=(1, 8, 8), patch=2, dim=64, depth=2, heads=1, classes=5)
    for state in (D.to_published(dit.state_dict(), "dit", dit), uvit.state_dict()):
        for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
            torch.save({name: x.to(dtype) for name, x in state.items()}, tmp_path / "net.pt")
            result = D.load_published(tmp_path / "net.pt", 1)[0]
            assert all(x.dtype == torch.float32 for x in result.state_dict().values())


def test_configs_without_a_class_and_folders_without_a_part_say_what_is_missing(tmp_path, capsys):
    """A Wan's keys tell its class; nothing else does. A pointer of Git LFS is no damaged config."""
    config, state, io = wan_fixture()
    nameless = {key: value for key, value in config.items() if key != "_class_name"}
    result, layout, _ = D.load_published(written(tmp_path / "wan", nameless, state))
    assert layout == "diffusers" and torch.equal(result.embed.weight, D.load_published(
        FIXTURES / "wan-denoiser-diffusers")[0].embed.weight)
    told = refused(capsys, D.load_published, written(tmp_path / "bare", {"eps": 1e-6}, state))
    assert 'names no _class_name: fetch the published one, or add "_class_name", one of WanModel' in told
    (tmp_path / "bare/config.json").write_text("version https://git-lfs.github.com/spec/v1\noid")
    assert "is a Git LFS pointer" in refused(capsys, D.load_published, tmp_path / "bare")
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe/model_index.json").write_text('{"_class_name": "WanPipeline"}')
    assert "is a pipeline without its transformer/: fetch that too" in refused(
        capsys, D.load_published, tmp_path / "pipe")
    told = refused(capsys, S.open_text_encoder, tmp_path / "pipe")
    assert "holds no text encoder" in told and "or name another by --text_encoder" in told


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, capsys):
    """Of a Wan, a DiT, a U-ViT's training, both autoencoders."""
    config, state, *_ = wan_fixture()
    places = [(D.load_published, written(tmp_path / "wan", config, state), "blocks.0.ffn.net.0.proj.weight")]
    for kind, name in (("sd-vae/vae", "decoder.conv_in.weight"), ("wan-vae-original", "decoder.conv1.weight")):
        shutil.copytree(FIXTURES / kind, tmp_path / kind)
        places.append((V.load_published, tmp_path / kind, name))
    for name in ("dit", "uvit"):
        folder = FIXTURES / {"dit": "dit-sigma", "uvit": "uvit-class"}[name]
        place = shutil.copytree(folder, tmp_path / name)
        file = next(p for p in place.iterdir() if p.suffix in (".pt", ".pth"))
        places.append((lambda place: D.load_published(place, 2), file,
                       "blocks.0.attn.proj.weight" if name == "dit" else "mid_block.mlp.fc1.weight"))
    for load, place, name in places:
        for value in (float("nan"), float("inf")):
            files = [p for p in place.rglob("*") if p.suffix in (".safetensors", ".pth", ".pt")
                     and p.name != "io.safetensors"] if place.is_dir() else [place]
            path, = files
            result = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
            assert name in result, sorted(result)[:5]
            result = {n: x.clone() for n, x in result.items()}
            result[name].view(-1)[1] = value
            path.unlink()
            (save_file if path.suffix == ".safetensors" else torch.save)(result, path)
            assert f"{name} holds 1 numbers" in refused(capsys, load, place)


@pytest.mark.parametrize("made", [
    lambda n: n.replace(".weight", ".base_layer.weight") if "to_q" in n else n,                # PEFT's, wrapped
    lambda n: f"transformer.{n}".replace(".weight", ".lora_A.weight"),                         # diffusers' and PEFT's
    lambda n: f"diffusion_model.{n}".replace(".weight", ".lora_down.weight"),                  # ComfyUI's
    lambda n: "lora_unet_" + n.replace(".", "_") + ".alpha",                                   # kohya's
    lambda n: n.replace(".weight", ".lokr_w1")])
def test_a_lora_in_the_place_of_a_model_is_named(made, tmp_path, capsys):
    """In a folder, in a file of safetensors and of torch, as a denoiser and as an autoencoder."""
    config, state, _ = wan_fixture()
    state = {made(name): x for name, x in state.items()}
    folder = written(tmp_path / "wan", config, state)
    torch.save({"state_dict": state}, tmp_path / "lora.pt")
    for load in (D.load_published, V.load_published, lambda path: S.main([
            str(path), "--prompt", "a", "--device", "cpu", "--out", str(tmp_path / "o")])):
        for path in (tmp_path / "lora.pt", folder / "diffusion_pytorch_model.safetensors"):
            assert "a LoRA that is not merged into its model: merge" in refused(capsys, load, path)
    assert "a LoRA that is not merged into its model: merge" in refused(capsys, D.load_published, folder)
    bare = tmp_path / "bare"
    bare.mkdir()
    save_file({"a": torch.zeros(1)}, bare / "pytorch_lora_weights.safetensors")
    assert "has no config.json" in (told := refused(capsys, D.load_published, bare)) and "a LoRA: merge" in told
    for name, says in (("q4.gguf", "GGUF is quantized"), ("p.pt", "Git LFS pointer")):
        (tmp_path / name).write_bytes(b"GGUF\3" if "gguf" in name else b"version https://git-lfs.github.com/spec/v1\n")
        assert says in refused(capsys, S.main, [str(tmp_path / name), "--prompt", "a", "--out", str(tmp_path / "o")])


def test_names_inside_that_wrappers_make_are_taken_off(tmp_path):
    config, state, _ = wan_fixture()
    result, _, _ = D.load_published(written(tmp_path, config, {
        name.replace("blocks.0.", "blocks.0._orig_mod."): x for name, x in state.items()}))
    assert len(result.blocks) == config["num_layers"]


def test_files_of_every_naming_are_found(tmp_path, capsys):
    """Variants, .bin, shards with an index of each version; full precision goes before half."""
    config, state, _ = wan_fixture()
    halves = dict(list(state.items())[:9]), dict(list(state.items())[9:])
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors",
                 "diffusion_pytorch_model.bf16.safetensors", "diffusion_pytorch_model.fp16.bin",
                 "model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"):
        folder = written(tmp_path / name, config, state, name)
        assert len(D.load_published(folder)[0].state_dict()), name
    for index in ("diffusion_pytorch_model.safetensors.index.json",
                  "diffusion_pytorch_model.safetensors.index.fp16.json",
                  "diffusion_pytorch_model.fp16.safetensors.index.json", "diffusion_pytorch_model.bin.index.json"):
        end = "bin" if "bin" in index else "safetensors"
        names = [f"diffusion_pytorch_model-0000{i}-of-00002.{end}" for i in (1, 2)]
        for name, part in zip(names, halves):
            folder = written(tmp_path / index, config, part, name)
        table = {key: name for name, part in zip(names, halves) for key in part}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": table}))
        assert len(D.load_published(folder)[0].blocks) == 2, index
    written(folder, config, {k: x.half() for k, x in state.items()}, "diffusion_pytorch_model.fp16.safetensors")
    assert V.weight_files(folder)[0].name == "diffusion_pytorch_model.bin.index.json"
    for broken in ("[1]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../x.safetensors"}}',
                   '{"weight_map": {"a": 5}}', f'{{"weight_map": {{"a": "{index}"}}}}', "[" * 99999):
        (folder / index).write_text(broken)
        assert "damaged" in refused(capsys, D.load_published, folder)
    shutil.rmtree(folder)
    folder = written(folder, config, {}, "other.safetensors")
    assert "has no weights" in refused(capsys, D.load_published, folder)


def test_p01_weights_with_scales_are_refused_by_name(tmp_path, capsys):
    config, state, _ = wan_fixture()
    fp8 = {name: x.to(torch.float8_e4m3fn) for name, x in state.items()}
    one = torch.ones(())
    for more in ({"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, {"blocks.0.attn1.to_q.scale_weight": one},
                 {"model.diffusion_model.blocks.0.attn1.to_q.weight_scale": one}, {"proj_out.qweight": one.int()}):
        folder = written(tmp_path, config, {**fp8, **more})
        assert "quantized with scales" in refused(capsys, D.load_published, folder)
    folder = written(tmp_path, config, {**state, "proj_out.weight": state["proj_out.weight"].to(torch.int8)})
    assert "int8" in refused(capsys, D.load_published, folder)
    folder = written(tmp_path, {**config, "quantization_config": {"quant_method": "gguf"}}, state)
    assert "gguf" in refused(capsys, D.load_published, folder)


# ---- autoencoders

SD = dict(_class_name="AutoencoderKL", _diffusers_version="0.4.2", act_fn="silu", in_channels=3, out_channels=3,
          block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4, latent_channels=4,
          layers_per_block=2, norm_num_groups=32, sample_size=256, up_block_types=["UpDecoderBlock2D"] * 4)
SD3 = dict(SD, _diffusers_version="0.29.0.dev0", latent_channels=16, force_upcast=True, scaling_factor=1.5305,
           shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False, latents_mean=None,
           latents_std=None, mid_block_add_attention=True, sample_size=1024)
KL = {"sd-vae-ft-mse": SD, "sdxl-vae": dict(SD, force_upcast=True, scaling_factor=0.13025, sample_size=1024),
      "stable-diffusion-3": SD3, "FLUX.1": dict(SD3, scaling_factor=0.3611, shift_factor=0.1159),
      "playground-v2.5": dict(SD, scaling_factor=0.5, latents_mean=[-1.6574, 1.886, -1.383, 2.5155],
                              latents_std=[8.4927, 5.9022, 6.5498, 5.2299])}


@pytest.mark.parametrize("name", KL)
def test_hub_configs_of_image_autoencoders(name, tmp_path):
    """Latents are scaled as each config says, and what a key left out means is the class's default;
    the moments and pixels are those that a float32 file gives."""
    config = dict(KL[name], block_out_channels=[8, 16, 32, 32], norm_num_groups=4)
    torch.manual_seed(0)
    z, quant = config["latent_channels"], config.get("use_quant_conv", True)
    model = V.Autoencoder(8, (1, 2, 4, 4), ["s"] * 3, 2, z, residual=False, groups=4, quant=quant)
    names = V.published_names(model, "image")
    state = {}
    for own, name in names.items():
        parts = model.state_dict()[own].chunk(3) if ".to_qkv." in name else [model.state_dict()[own]]
        state |= {name.replace("to_qkv", f"to_{p}"): x.clone() for p, x in zip("qkv", parts)}
    folder = written(tmp_path, config, state)
    result, about = V.load_autoencoder(folder)
    video = torch.randn(1, 3, 1, 16, 24)
    mean, _ = model.encode(video)
    assert torch.equal(result.encode(video)[0], mean) and torch.equal(result.decode(mean), model.decode(mean))
    m, s = V.normaliser(about)
    wanted = (mean - (config.get("shift_factor") or 0)) * config.get("scaling_factor", 0.18215)
    if config.get("latents_mean"):
        m0, s0 = (torch.tensor(config[f"latents_{k}"]).view(1, -1, 1, 1, 1) for k in ("mean", "std"))
        wanted = (mean - m0) / s0 * config["scaling_factor"]
    assert torch.allclose((mean - m) / s, wanted, atol=1e-6)
    usual = V.CLASSES["AutoencoderKL"]
    (folder / "config.json").write_text(json.dumps({k: x for k, x in config.items() if usual.get(k) != x}))
    assert V.load_autoencoder(folder)[1] == about


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "fp8"])
def test_hub_configs_of_wans_autoencoder(kind, tmp_path):
    """Wan2.1's config.json, in the version of 0.33 and with all keys of 0.35, against the recorded
    latents; channels' means left out are the class's."""
    vae, about = V.load_autoencoder(FIXTURES / "wan-vae-original")
    io = load_file(FIXTURES / "wan-vae-original/io.safetensors")
    dtype = torch.float8_e4m3fn if kind == "fp8" else getattr(torch, kind)
    names = V.published_names(vae, "diffusers")
    state = {names[own]: x.to(dtype) for own, x in vae.state_dict().items()}
    old = dict(_class_name="AutoencoderKLWan", _diffusers_version="0.33.0.dev0", attn_scales=[], base_dim=3,
               dim_mult=[1, 2, 4, 4], dropout=0.0, latents_mean=about["latents_mean"],
               latents_std=about["latents_std"], num_res_blocks=2, temperal_downsample=[False, True, True], z_dim=16)
    new = dict(old, decoder_base_dim=None, is_residual=False, in_channels=3, out_channels=3, patch_size=None,
               scale_factor_temporal=4, scale_factor_spatial=8, clip_output=True)
    result = [V.load_autoencoder(written(tmp_path, config, state))[1] for config in (
        old, new, {"_class_name": "AutoencoderKLWan", "base_dim": 3})]
    assert result[0] == result[1] == result[2]
    model, _ = V.load_autoencoder(tmp_path)
    mean, std = V.normaliser(about)
    away = ((model.encode(io["video.5"])[0] - mean) / std - io["latents.5"]).abs().max() / io["latents.5"].abs().max()
    assert away < {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01, "fp8": 1.0}[kind]
    run = V.initial_model(SimpleNamespace(init=str(tmp_path)))                         # train_vae.py --init
    assert all(x.dtype == torch.float32 for x in run[1].values())


REFUSED = [         # autoencoder or denoiser, what its config.json says beside, what the line must hold
    ("kl", dict(_class_name="AutoencoderTiny"), "AutoencoderTiny"), ("kl", dict(
        _class_name="AsymmetricAutoencoderKL"), "AsymmetricAutoencoderKL, which is not read here: Auto"),
    *(("kl", dict(_class_name=f"AutoencoderKL{name}"), f"AutoencoderKL{name}") for name in (
        "LTXVideo", "CogVideoX", "HunyuanVideo", "Flux2", "Mochi")),
    ("kl", dict(quantization_config={"quant_method": "bitsandbytes"}), "bitsandbytes"),
    ("kl", dict(block_out_channels=[8, 12, 32]), "only multiples of the first"),
    ("kl", dict(block_out_channels=[8, 8, 16, 10**6]), "is missing"), ("kl", dict(
        block_out_channels=[], down_block_types=[], up_block_types=[]), "levels"),
    ("kl", dict(scaling_factor=0.0), "scaling_factor"),
    ("kl", dict(layers_per_block=10**6), "do not belong together"),
    ("kl", dict(layers_per_block=10**12), "a whole number"),
    ("kl", dict(block_out_channels=[8] * 10**5), "a list"), ("kl", dict(norm_num_groups=3), "does not divide"),
    ("kl", dict(act_fn="relu"), "act_fn"), ("kl", dict(mid_block_add_attention=False), "mid_block_add_attention"),
    ("kl", dict(latent_channels="four"), 'latent_channels is "four"'), ("kl", dict(scaling_factor=True), "a number"),
    ("kl", dict(in_channels=4), "in_channels"), ("kl", dict(use_post_quant_conv=False), "use_quant_conv true and"),
    ("kl", dict(use_quant_conv=False), "use_quant_conv false and use_post_quant_conv true"),
    ("kl", dict(down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]), "down_block_types"),
    ("wan", dict(_class_name="WanVACETransformer3DModel"), "WanVACETransformer3DModel"),
    ("wan", dict(_class_name=["x"]), "names no _class_name"), ("wan", dict(num_layers=10**6), "the weights have 2"),
    ("wan", dict(num_layers=10**12), "a whole number"), ("wan", dict(ffn_dim=7), "ffn_dim is 7"),
    ("wan", dict(patch_size=[1, 1, 1]), "patch_size"), ("wan", dict(patch_size=2), "a list"),
    ("wan", dict(num_attention_heads=3), "heads"), ("wan", dict(attention_head_dim=16), "heads of 16"),
    ("wan", dict(num_attention_heads=64, attention_head_dim=1), "even width"), ("wan", dict(eps=1e-5), "eps"),
    ("wan", dict(cross_attn_norm=False), "cross_attn_norm"), ("wan", dict(in_channels=5), "in_channels is 5"),
    ("kl", dict(mid_block_add_attention=None), "mid_block_add_attention false"),       # null is false
    ("kl", dict(use_quant_conv=None, use_post_quant_conv=None), "quant_conv.bias is not"),
    ("wan", dict(cross_attn_norm=None), "cross_attn_norm False"), ("wan", dict(num_layers="2.5"), '"2.5"'),
    ("wan", dict(eps="nan"), "eps"), ("wan", dict(num_layers="inf"), "a whole number"),
    ("wan", dict(quantization_config={"quant_method": "torchao"}), "torchao")]


@pytest.mark.parametrize("what, more, told", REFUSED, ids=lambda value: None if isinstance(value, dict) else value)
def test_what_a_config_says_and_is_not_read_is_refused_by_name(what, more, told, tmp_path, capsys):
    source, load = {"kl": (FIXTURES / "sd-vae/vae", V.load_autoencoder),
                    "wan": (FIXTURES / "wan-denoiser-diffusers", D.load_published)}[what]
    shutil.copytree(source, tmp_path / "it")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "it/config.json").write_text(json.dumps({**config, **more}))
    assert told in refused(capsys, load, tmp_path / "it")


@pytest.mark.parametrize("what, more", [
    ("kl", dict(act_fn="swish")), ("kl", dict(act_fn="SiLU")), ("kl", dict(act_fn=None, in_channels=None)),
    ("kl", dict(latent_channels="4", layers_per_block="2", scaling_factor="1.8215e-1", norm_num_groups=4.0)),
    ("kl", dict(use_quant_conv="true", use_post_quant_conv=1, mid_block_add_attention="True")),
    ("wan", dict(num_layers="2", eps="1e-06", patch_size=["1", 2.0, 2], cross_attn_norm="true", image_dim=None)),
    ("wan", dict(eps=None, freq_dim=None, rope_max_seq_len=None))])
def test_numbers_as_texts_nulls_and_synonyms_are_read(what, more, tmp_path):
    source, load = {"kl": (FIXTURES / "sd-vae/vae", V.load_autoencoder),
                    "wan": (FIXTURES / "wan-denoiser-diffusers", D.load_published)}[what]
    config = json.loads((source / "config.json").read_text())
    shutil.copytree(source, tmp_path / "it")
    (tmp_path / "it/config.json").write_text(json.dumps({**config, **more}))
    assert load(tmp_path / "it")[1:] == load(source)[1:]


def test_damaged_configs_end_in_one_line(tmp_path, capsys):
    """Each key of a denoiser's and of both autoencoders' config.json with each kind of value, and
    files of all kinds: loaded or refused, never a traceback."""
    vae, about = V.load_autoencoder(FIXTURES / "wan-vae-original")
    names = V.published_names(vae, "diffusers")
    wan = written(tmp_path / "wan", {"_class_name": "AutoencoderKLWan", "base_dim": 3, "z_dim": 16, **{
        key: V.CLASSES["AutoencoderKLWan"][key] for key in ("dim_mult", "num_res_blocks", "temperal_downsample",
                                                            "latents_mean", "attn_scales", "patch_size")}},
        {names[own]: x for own, x in vae.state_dict().items()})
    values = [None, "x", -1, 0, 3, 10**6, 1e30, True, [], [1], ["a"], [[1]], {"a": 1}, [10**6] * 5]
    n, counts = 0, {}
    for folder, load in ((FIXTURES / "sd-vae/vae", V.load_autoencoder), (wan, V.load_autoencoder),
                         (FIXTURES / "wan-denoiser-diffusers", D.load_published)):
        place = tmp_path / f"it{n}"
        shutil.copytree(folder, place)
        text = (folder / "config.json").read_text()
        config = json.loads(text)
        changed = [json.dumps({**config, key: value}) for i, key in enumerate(config)
                   for value in values[i % 5::5]]
        files = [text.encode()[:50], b"", b'{"a": "\xff"}', b"[1]", b"5", b"[" * 99999, b"{}", b"null"]
        for each in (*map(str.encode, changed), *files):
            (place / "config.json").write_bytes(each)
            n += 1
            try:
                load(place)
            except SystemExit as stopped:
                counts[stopped.code] = counts.get(stopped.code, 0) + 1
                assert capsys.readouterr().err.count("\n") == 1, each
    assert set(counts) == {2} and 60 < counts[2] < n
    config = json.loads((wan / "config.json").read_text())
    (wan / "config.json").write_text(json.dumps({**config, "base_dim": 2**20, "dim_mult": [1, 2, 4, 2**20]}))
    assert "channels" in refused(capsys, V.load_autoencoder, wan)
    (wan / "config.json").write_text("\ufeff" + json.dumps(config), encoding="utf-8")         # a BOM
    assert V.load_autoencoder(wan)[1]["hash"] == about["hash"]


def test_a_narrow_dit_is_asked_for_its_heads(tmp_path, capsys):
    for dim, told in ((48, 0), (96, 0), (96, 7), (64, 0)):
        model = D.DiT(4, dim, 1, 1, (1, 2, 2), 8, own_table=True, positions="sincos", classes=11, grid=(4, 4))
        torch.save(D.to_published(model.state_dict(), "dit", model), tmp_path / "dit.pt")
        if dim == 64:
            assert D.load_published(tmp_path / "dit.pt")[2]["heads"] == 1
        else:
            assert "--heads" in refused(capsys, D.load_published, tmp_path / "dit.pt", told or None)


# ---- training checkpoints of DiT and SiT: what their options say

def trained(home, args, name="0400000.pt", out=8, wrap=lambda x: x):
    """A file as DiT's and SiT's train.py write it; its network. The average is the one to take."""
    torch.manual_seed(0)
    model = D.DiT(4, 64, 1, 1, (1, 2, 2), out, own_table=True, positions="sincos", classes=11, grid=(2, 2))
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    state = D.to_published(model.state_dict(), "dit", model)
    home.mkdir(parents=True, exist_ok=True)
    torch.save({"model": {name: 9 + x for name, x in state.items()}, "ema": state, "args": wrap(args),
                "opt": {"state": {}, "param_groups": [{"lr": np.float64(1e-4)}]}}, home / name)
    return home / name, model


def followed(model, how, noise, times, label):
    """SiT's ODE in its own time, from noise at times[0] up, by Euler, written out."""
    paths = {"linear": lambda t: (t, 1 - t, 1, -1),
             "gvp": lambda t: (math.sin(math.pi * t / 2), math.cos(math.pi * t / 2),
                               math.pi / 2 * math.cos(math.pi * t / 2), -math.pi / 2 * math.sin(math.pi * t / 2))}
    x = noise
    for now, after in zip(times, times[1:]):
        row = D.lay_out([tuple(x.shape)], [None], [label], None, model.patch, kind="sit")
        with torch.no_grad():
            out = model(D.patchify([x], model.patch), torch.tensor([now]), row, None)
        m = D.unpatchify(out, [(8, *x.shape[1:])], model.patch)[0][:4]
        a, s, da, ds = paths[how.path](now)
        eps = m if how.prediction == "noise" else -s * m
        x = x + (after - now) * (m if how.prediction == "velocity" else da * (x - s * eps) / a + ds * eps)
    return x


NAMESPACE = lambda args: SimpleNamespace(**args)
WAYS = {"Namespace": lambda args: argparse.Namespace(**args), "dict": dict, "SimpleNamespace": NAMESPACE,
        "nested": lambda args: {"model": {"model_type": args.pop("model")}, "transport": args}}


@pytest.mark.parametrize("way, prediction, path", [
    ("Namespace", "velocity", "Linear"), ("dict", "noise", "GVP"), ("SimpleNamespace", "score", "Linear"),
    ("nested", "velocity", "GVP")])
def test_sits_own_checkpoint_is_sampled_as_it_was_trained(way, prediction, path, tmp_path):
    said = dict(model="SiT-XL/2", path_type=path, prediction=prediction, loss_weight=None, image_size=32,
                data_path=Path("/data"), results_dir=Path("results"), cfg_scale=np.float64(4.0))
    file, model = trained(tmp_path, said, wrap=WAYS[way])
    args = S.parse_options([str(file), "--prompt", "3", "--vae", str(FIXTURES / "sd-vae/vae"), "--steps", "4",
                            "--sampler", "euler", "--cfg", "1", "--device", "cpu"])
    sampler = S.open_sampler(args, torch.device("cpu"))
    how = sampler.part("denoiser").objective
    assert sampler.kind == "sit" and (how.prediction, how.path) == (prediction, path.lower())
    request = S.request_of(args, {"prompt": "3"})
    timeline, = sampler([request])
    noise = V.gaussians("sample", request["seed"], 0, ["3"], [(4, 1, 4, 4)])[0]
    ends = (0.0, 1.0) if prediction == "velocity" else (1e-3, 1 - 1e-3)
    wanted = followed(model, how, noise, np.linspace(*ends, 5).tolist(), 3)
    assert (timeline.segments[0].latents - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("said, name, kind", [
    (dict(model="DiT-XL/2"), "SiT/last.pt", "dit"), (dict(model="SiT-B-4"), "DiT.pt", "sit"),
    (dict(path_type="VP"), "ema.pt", "sit"), (None, "003-SiT-XL-2-Linear-velocity-None/checkpoints/0400000.pt", "sit"),
    (None, "SiT/000-DiT-XL-2/checkpoints/0400000.pt", "dit"), (None, "my_sit.pt", "sit"), (None, "visit.pt", "")])
def test_a_checkpoints_kind_is_that_of_what_is_nearest(said, name, kind, tmp_path, capsys):
    file, _ = trained((tmp_path / name).parent, said, Path(name).name)
    V.say_once.cache_clear()
    capsys.readouterr()
    result = D.load_published(file)[0].trained
    assert result["kind"] == (kind or "dit") and result["is_said"] == bool(said)
    assert ("does not say whether" in capsys.readouterr().err) == (not kind)
    if "checkpoints" in name:                # the training's folder stands for its last checkpoint
        trained(file.parent, {"model": "SiT-S/2", "path_type": "GVP"}, "1000000.pt")
        assert D.load_published(file.parents[1])[0].trained["path"] == "gvp"


def test_what_a_training_says_and_is_not_read_is_refused_by_name(tmp_path, capsys):
    for said, told in ((dict(model="Latte-XL/2"), "model Latte-XL/2"), (dict(model="LightningDiT-XL/1"), "Lightning"),
                       (dict(model="SiT-XL/2", prediction="v"), "prediction v"), (dict(path_type="cosine"), "cosine"),
                       (dict(model="DiT-S/4", noise_schedule="squaredcos_cap_v2"), "noise_schedule"),
                       (dict(model="DiT-S/4", predict_xstart=True), "predict_xstart True")):
        assert told in refused(capsys, D.load_published, trained(tmp_path, said, wrap=NAMESPACE)[0])
    V.say_once.cache_clear()
    D.load_published(trained(tmp_path, dict(model="DiT-S/2", image_size=256, learn_sigma=False))[0])
    told = capsys.readouterr().err
    assert "image_size 256" in told and "those of 32 px" in told and "learn_sigma False" in told
    file, _ = trained(tmp_path, dict(model="SiT-S/2", path_type="GVP", prediction="noise",
                                     loss_weight="likelihood"))
    init = SimpleNamespace(init=str(file), heads=None, model="dit", objective="noise", path="gvp", weighting="none")
    for name, wrong, right in (("model", "dit", "sit"), ("objective", "velocity", "noise"), ("path", "linear", "gvp")):
        setattr(init, name, wrong)
        assert f"give --{name} {right}" in refused(capsys, D.start_from, init, None)
        setattr(init, name, right)
    assert D.start_from(init, None)[0]["kind"] == "sit"
    assert "--weighting likelihood" in capsys.readouterr().err


def test_uvits_of_a_training_are_read_and_of_pixels_refused(tmp_path, capsys):
    """The average inside a checkpoint or a training's folder; without classes; pixels by name."""
    for channels, classes, name in ((4, 5, "ckpts/500.ckpt"), (4, 0, "ckpts/1000.ckpt"), (3, 5, "pixels")):
        net = D.UViT(channels=channels, size=(1, 4, 4), patch=2, dim=64, depth=2, heads=1, classes=classes)
        (tmp_path / name).mkdir(parents=True)
        torch.save(net.state_dict(), tmp_path / name / "nnet_ema.pth")
    assert not D.load_published(tmp_path)[2]["classes"]              # the last one
    torch.save({"nnet_ema": net.state_dict(), "nnet": {}, "step": 9}, tmp_path / "all.pth")
    assert torch.equal(D.load_published(tmp_path / "all.pth")[0].pos_embed, net.pos_embed)
    run = lambda path, prompt: S.main([str(path), "--prompt", prompt, "--vae", str(FIXTURES / "sd-vae/vae"), "--steps",
                                       "3", "--device", "cpu", "--out", str(tmp_path / "o")])
    run(tmp_path, "")
    assert len(list((tmp_path / "o").glob("*.json"))) == 1
    assert "no class" in refused(capsys, run, tmp_path, "3")
    assert "of pixels" in refused(capsys, run, tmp_path / "pixels", "3")


# ---- schedulers

UNIPC = dict(_class_name="UniPCMultistepScheduler", _diffusers_version="0.33.0.dev0", beta_end=0.02,
             beta_schedule="linear", beta_start=0.0001, disable_corrector=[], dynamic_thresholding_ratio=0.995,
             final_sigmas_type="zero", flow_shift=3.0, lower_order_final=True, num_train_timesteps=1000,
             predict_x0=True, prediction_type="flow_prediction", rescale_betas_zero_snr=False,
             sample_max_value=1.0, solver_order=2, solver_p=None, solver_type="bh2", steps_offset=0,
             thresholding=False, timestep_spacing="linspace", trained_betas=None, use_beta_sigmas=False,
             use_exponential_sigmas=False, use_flow_sigmas=True, use_karras_sigmas=False)
EULER = dict(_class_name="FlowMatchEulerDiscreteScheduler", _diffusers_version="0.35.0", num_train_timesteps=1000,
             shift=5.0, use_dynamic_shifting=False)
DPM = dict(_class_name="DPMSolverMultistepScheduler", use_flow_sigmas=True, prediction_type="flow_prediction",
           flow_shift=3.0)


def planned(home, config, n, *more):
    """(args, the times and what the network is told at each, of a folder with this scheduler)."""
    (home / "scheduler").mkdir(exist_ok=True)
    (home / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    args = S.parse_options([str(home), "--prompt", "x", "--steps", str(n), *more])
    about = {"kind": "wan", "layout": "diffusers", **S.read_scheduler(home, args.sampler, args.shift)}
    S.resolve(args, about, D.Objective(), 8)
    told = []

    def read(x, t, at):
        told.append(1000 * float(torch.as_tensor(t, dtype=torch.float32)))
        return x, x, x, None
    list(S.trajectory(args, D.Objective(), read, torch.ones(1, 1), None, 1.0, args.shift, None))
    return args, S.flow_points(args, D.Objective(), args.shift).numpy(), told


def test_the_scheduler_of_a_folder_is_read_whole(tmp_path):
    """Its class is the sampler, its shift the shift; absent keys are the class's defaults."""
    shifted = lambda s, shift: shift * s / (1 + (shift - 1) * s)
    for n, shift in ((2, 3.0), (7, 1.0), (20, 5.0)):
        args, times, told = planned(tmp_path, {**UNIPC, "flow_shift": shift}, n)
        wanted = shifted(np.linspace(1, 0.001, n + 1)[:-1], shift)
        assert args.sampler == "unipc" and args.shift == shift and np.allclose(times[:-1], wanted, atol=2e-6)
        args, times, told = planned(tmp_path, {**EULER, "shift": shift}, n)
        wanted = shifted(np.linspace(1, float(shifted(0.001, shift)), n), shift)
        assert args.sampler == "euler" and args.shift == shift
        assert np.allclose(times, [*wanted, 0]) and np.allclose(told, 1000 * wanted, atol=1e-3)
        args, times, _ = planned(tmp_path, {**DPM, "flow_shift": shift}, n)
        assert args.sampler == "dpm++" and np.allclose(times[:-1], shifted(np.linspace(0.999, 0, n + 1)[:-1], shift))
    kept = {key: UNIPC[key] for key in ("_class_name", "use_flow_sigmas", "prediction_type")}
    assert planned(tmp_path, kept, 4)[0].shift == 1.0                       # UniPC's own default
    args, times, _ = planned(tmp_path, UNIPC, 6, "--sampler", "euler")
    assert args.shift == 3.0 and times[-2] == pytest.approx(shifted(shifted(0.001, 3.0), 3.0), rel=1e-5)
    assert planned(tmp_path, UNIPC, 6, "--shift", "8")[0].shift == 8.0
    assert planned(tmp_path, {**UNIPC, "solver_order": 1}, 6)[0].rules["solver"]["order"] == 1
    _, times, _ = planned(tmp_path, {**UNIPC, "final_sigmas_type": "sigma_min"}, 6)
    assert times[-1] == times[-2] > 0
    _, times, _ = planned(tmp_path, {**EULER, "shift_terminal": 0.1}, 6)
    assert times[-2] == pytest.approx(0.1) and times[0] == 1 and times[-1] == 0
    _, times, _ = planned(tmp_path, {**EULER, "use_karras_sigmas": True}, 6)
    assert np.allclose(np.diff(times[:-1] ** (1 / 7), 2), 0, atol=1e-9) and times[0] == 1
    _, times, _ = planned(tmp_path, {**EULER, "use_exponential_sigmas": True}, 6)
    assert np.allclose(np.diff(np.log(times[:-1]), 2), 0, atol=1e-9)


@pytest.mark.parametrize("config, more, told", [
    (EULER, dict(use_dynamic_shifting=True), "use_dynamic_shifting"), (EULER, dict(use_beta_sigmas=True), "beta"),
    (EULER, dict(stochastic_sampling=True), "stochastic_sampling"), (EULER, dict(shift="a"), "a number"),
    (EULER, dict(shift=0), "a shift of 0"), (EULER, dict(num_train_timesteps=500), "num_train_timesteps"),
    (UNIPC, dict(solver_order=4), "solver_order 4"), (UNIPC, dict(prediction_type="epsilon"), "epsilon"),
    (UNIPC, dict(prediction_type=None), "epsilon"), (UNIPC, dict(use_flow_sigmas=None), "use_flow_sigmas"),
    (UNIPC, dict(use_karras_sigmas=True), "use_karras_sigmas"), (UNIPC, dict(thresholding=True), "thresholding"),
    (UNIPC, dict(predict_x0=False), "predict_x0"), (UNIPC, dict(final_sigmas_type="x"), "final_sigmas_type"),
    (DPM, dict(algorithm_type="sde-dpmsolver++"), "sde-dpmsolver++"), (DPM, dict(solver_order=3), "solver_order"),
    (UNIPC, dict(_class_name="DDIMScheduler"), "DDIMScheduler"), (UNIPC, dict(_class_name=None), "_class_name")])
def test_what_a_scheduler_says_and_is_not_read_is_refused_by_name(config, more, told, tmp_path, capsys):
    assert told in refused(capsys, planned, tmp_path, {**config, **more}, 4)
    if "solver_order" in more:               # another sampler than the folder's takes the shift alone
        assert planned(tmp_path, {**config, **more}, 4, "--sampler", "euler")[0].shift == config["flow_shift"]


def test_a_scheduler_that_is_not_needed_is_not_read(tmp_path, capsys):
    """Where sampler and shift are told; else the line says what to tell. Texts, nulls as in configs."""
    for config in (dict(_class_name="LCMScheduler"), dict(beta_start=5), dict(_class_name=3)):
        V.say_once.cache_clear()
        capsys.readouterr()
        args, times, _ = planned(tmp_path, config, 4, "--sampler", "euler", "--shift", "3")
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "--sampler and --shift" in told and args.shift == 3.0
        assert np.array_equal(times, planned(tmp_path, EULER, 4, "--shift", "3")[1])
        for more in ((), ("--sampler", "unipc"), ("--shift", "2")):
            assert ("LCM" if "LCM" in str(config) else "_class_name") in refused(capsys, planned, tmp_path, config, 4, *more)
    assert "both --sampler and --shift" in refused(capsys, planned, tmp_path, dict(_class_name="LCMScheduler"), 4)
    wanted = planned(tmp_path, UNIPC, 4)[1]
    texts = {**UNIPC, "flow_shift": "3.0", "solver_order": "2", "predict_x0": "true", "thresholding": None}
    assert np.array_equal(planned(tmp_path, texts, 4)[1], wanted)
    for key in ("lower_order_final", "predict_x0", "use_flow_sigmas"):
        assert key in refused(capsys, planned, tmp_path, {**UNIPC, key: None}, 4)


@pytest.mark.parametrize("name", ["WanDMDPipeline", "WanVACEPipeline", "LTXPipeline", 5])
def test_pipelines_of_other_classes_are_refused_by_name(name, tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    assert f"is a {name}" in refused(capsys, planned, tmp_path, UNIPC, 4)


def test_time_steps_are_whole_where_the_published_ones_are(tmp_path):
    """The network's times of every number of steps, to the last one, in both layouts."""
    for n in range(1, 101):
        for shift in (1.0, 3.0, 5.0):
            _, _, told = planned(tmp_path, {**UNIPC, "flow_shift": shift}, n) if n in (30, 50, 99) else (0, 0, None)
            s = np.linspace(1, 1 / 1000, n + 1)[:-1]
            s = shift * s / (1 + (shift - 1) * s)
            s[0] = min(s[0], 1 - 1e-6)
            args = SimpleNamespace(grid=("diffusers", "unipc"), steps=n, rules={}, ends=(1, 0), sampler="unipc")
            result = torch.floor(1000 * S.flow_points(args, D.Objective(), shift))[:-1]
            assert result.tolist() == (s * 1000).astype(np.int64).tolist(), (n, shift)
            assert told is None or np.allclose(told, result, atol=1e-3)
            args.grid, args.sampler = ("diffusers", "dpm++"), "dpm++"
            s = 1 - np.linspace(1, 1 / 1000, n + 1)
            s = np.flip(shift * s / (1 + (shift - 1) * s))[:-1]
            result = torch.floor(1000 * S.flow_points(args, D.Objective(), shift))[:-1]
            assert result.tolist() == (s * 1000).astype(np.int64).tolist(), (n, shift)


@pytest.mark.parametrize("path", ["ddpm", "sd"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_ddim_goes_by_diffusers_grid(spacing, path):
    """Against DDIM written out: where it stands, and a whole stride of 1000 // n to where it goes."""
    betas = np.linspace(1e-4, 0.02, 1000) if path == "ddpm" else np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    bars, off = np.cumprod(1 - betas), int(path == "sd")
    predicted = lambda x, t: 0.4 * x + math.cos(0.003 * t)
    for n in (1, 4, 7, 16, 30, 250):
        steps = {"linspace": np.linspace(0, 999, n).round()[::-1], "leading": np.arange(n)[::-1] * (1000 // n) + 1,
                 "trailing": (1000 - np.arange(n) * (1000 / n)).round() - 1}[spacing].astype(int)
        x = 1.0
        for t in steps:
            before = t - 1000 // n
            a, b = bars[t], bars[before] if before >= 0 else 1.0
            eps = predicted(x, t)
            x = b**0.5 * (x - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b) ** 0.5 * eps
        args = S.parse_options(["x", "--prompt", "", "--sampler", "ddim", "--steps", str(n), "--spacing", spacing])
        told = []

        def read(x, t, at):
            told.append(1000 * float(t) - off)
            eps = 0.4 * x + math.cos(0.003 * told[-1])
            return None, (x - at[1] * eps) / at[0], eps, None
        *_, result = S.trajectory(args, D.Objective("noise", path), read, torch.ones(1, 1).double(), None, 1.0, 1.0, None)
        assert np.allclose(told, steps, atol=1e-3) and result.item() == pytest.approx(x, rel=1e-4), (n, spacing)


def test_a_fixed_variance_is_the_large_one():
    """DiT's FIXED_LARGE: the noise that a step adds has the deviation of beta's root."""
    tables = D.ddpm_tables("linear", "10")
    predict = lambda x, i: (torch.zeros_like(x), x, None)
    ones, zeros = (list(S.ddpm(predict, torch.zeros(1), tables, lambda i, k=k: torch.full((1,), k))) for k in (1.0, 0.0))
    assert zeros[0].item() == 0
    assert ones[0].item() == pytest.approx(tables["betas"][-1].item() ** 0.5, rel=1e-5)


def test_a_dit_without_learned_variance_is_sampled(tmp_path):
    model = D.DiT(4, 64, 1, 1, (1, 2, 2), 4, own_table=True, positions="sincos", classes=11, grid=(2, 2))
    for p in model.parameters():
        p.data.add_(0.05)
    torch.save(D.to_published(model.state_dict(), "dit", model), tmp_path / "DiT.pt")
    S.main([str(tmp_path / "DiT.pt"), "--prompt", "3", "--vae", str(FIXTURES / "sd-vae/vae"), "--steps", "3",
            "--device", "cpu", "--out", str(tmp_path / "o")])
    assert len(list((tmp_path / "o").glob("*.json"))) == 1


@pytest.mark.parametrize("order, kind", list(itertools.product((1, 2, 3), ("bh1", "bh2"))))
def test_unipc_of_each_order_meets_the_exact_end(order, kind):
    """Of a Gaussian's flow, whose end is known: higher orders come nearer, and more steps too."""
    def error(n):
        t = D.flow_grid(n, 1.0, 0.999, 0.05)[:-1]                       # from 0.999 down, not to 0
        alpha, sigma = 1 - t, t
        deviation = lambda i: (0.25 * alpha[i] ** 2 + sigma[i] ** 2).sqrt()
        predict = lambda x, i: (0.25 * alpha[i] / deviation(i) ** 2 * x, None)
        *_, x = S.unipc(predict, deviation(0) * torch.ones(1).double(), alpha, sigma, order, kind)
        return abs(x.item() - deviation(-1).item())
    assert error(41) < 0.6 * error(21) and error(41) < {1: 0.01, 2: 0.002, 3: 0.001}[order]


# ---- whole folders

def sampled(folder, out, *more):
    S.main([str(folder), "--prompt", "a", "--size", "32x32", "--frames", "1", "--steps", "1", "--device", "cpu",
            "--text_encoder", str(FIXTURES / "wan-umt5"), "--out", str(out), "--format", "png", *more])


def turned(folder, place, change):
    """A copy of a folder with its weights changed."""
    shutil.copytree(folder, place)
    for path in [*place.rglob("*.safetensors"), *place.rglob("*.pth")]:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
        state = {name: change(x) for name, x in copy.deepcopy(state).items()}
        path.unlink()
        (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    return place


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_p05_half_folders_are_sampled_at_both_dtypes_and_the_picture_is_seen_whole(
        layout, i2v, tmp_path, monkeypatch):
    """All parts in bfloat16. CLIP is given the picture itself, not what the video is of it."""
    folder, seen, read = turned(i2v / layout, tmp_path / "half", lambda x: x.bfloat16()), [], S.open_image_encoder

    def look(*at):
        def see(picture):
            seen.append(picture)
            return read(*at)(picture)
        return see
    monkeypatch.setattr(S, "open_image_encoder", look)
    for dtype in ("fp32", "bf16"):
        sampled(folder, tmp_path / dtype, "--image", str(i2v / "picture.png"), "--dtype", dtype)
        assert len(list((tmp_path / dtype).glob("*.json"))) == 1
    whole = np.asarray(Image.open(i2v / "picture.png"))
    assert len(seen) == 2 and all(np.array_equal(picture, whole) for picture in seen)


def test_the_first_frame_is_scaled_as_each_published_code_does():
    picture = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    x = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    result = S.as_frame(picture, 32, 48, 16, "wan")                     # nearly its shape: all of it
    assert torch.allclose(result[:, 0], F.interpolate(x, (32, 48), mode="bicubic")[0], atol=1e-6)
    result = S.as_frame(picture, 32, 48, 16, "diffusers")
    pil = np.array(Image.fromarray(picture).resize((48, 32), Image.Resampling.LANCZOS))
    assert torch.allclose(result, V.to_tensor(pil[None]))
    for layout in ("wan", "diffusers"):                                # another shape: cut, not bent
        wide = np.tile(picture[:, :1], (1, 200, 1))
        wide[:, 60:140] = np.arange(80, dtype=np.uint8)[None, :, None]
        result = S.as_frame(wide, 48, 48, 16, layout)
        assert result.shape == (3, 1, 48, 48) and (result[0, 0, 20].diff() > -0.02).all()
        same = S.as_frame(picture, 50, 70, 16, layout)
        assert torch.allclose(same, V.to_tensor(picture[None]), atol=1e-5)


def test_folders_that_are_not_read_yet_end_in_one_line(i2v, tmp_path, capsys):
    """A14B in both layouts, not by one expert; FLF2V; Fun-Control; VACE."""
    def line(change, layout="diffusers", load=None):
        place = tmp_path / "it"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(i2v / layout, place)
        change(place)
        return refused(capsys, load or (lambda place: sampled(place, tmp_path / "o", "--image", str(
            i2v / "picture.png"))), place)

    def own_experts(place):
        (place / "high_noise_model").mkdir()
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            (place / name).rename(place / "high_noise_model" / name)
        shutil.copytree(place / "high_noise_model", place / "low_noise_model")

    def index(**about):
        return lambda place: (place / "model_index.json").write_text(json.dumps(about))
    for load in (None, D.load_published):
        assert "two networks" in line(lambda place: shutil.copytree(
            place / "transformer", place / "transformer_2"), load=load)
        assert "two networks" in line(own_experts, "wan", load)
        assert "two networks" in line(index(transformer_2=["diffusers", "WanTransformer3DModel"]), load=load)
    assert "WanDMDPipeline" in line(index(_class_name="WanDMDPipeline"))
    assert "no JSON object" in line(lambda place: (place / "model_index.json").write_text("[1"))

    def other(channels, tokens=0, **more):
        def change(place):
            network = D.DiT(channels, 48, 1, 2, (1, 2, 2), 16, 64, 32, 160, tokens, positions="index")
            written(place, {"_class_name": "WanModel", "num_heads": 2, **more},
                    D.to_published(network.state_dict(), "wan", network))
        return change
    assert "Fun-Control" in line(other(48), "wan") and "FLF2V" in line(other(36, 10, model_type="flf2v"), "wan")
    for broken in ("[", "{}", '{"hidden_size": "a"}', '{"hidden_size": 160, "patch_size": 0}'):
        told = line(lambda place: (place / "image_encoder/config.json").write_text(broken))
        assert "image_encoder" in told, (broken, told)
    assert "VaceWanModel" in line(other(36, _class_name="VaceWanModel"), "wan")
    index(transformer_2=[None, None], boundary_ratio=0.9)(tmp_path / "it")     # a 2.1 converted again
    shutil.rmtree(tmp_path / "it")
    shutil.copytree(i2v / "diffusers", tmp_path / "it")
    index(transformer_2=[None, None], boundary_ratio=0.9, _class_name="WanImageToVideoPipeline")(tmp_path / "it")
    sampled(tmp_path / "it", tmp_path / "o", "--image", str(i2v / "picture.png"))


def test_the_shift_of_a_folder_without_a_scheduler_is_said(i2v, tmp_path, capsys):
    """By layout, kind and size, as published; a scheduler or --shift ends the guess."""
    wanted = {("diffusers", "wan"): (3.0, 5.0), ("diffusers", "i2v"): (3.0, 5.0), ("diffusers", "ti2v"): (5.0, 5.0),
              ("wan", "wan"): (5.0, 5.0), ("wan", "i2v"): (3.0, 5.0), ("wan", "ti2v"): (5.0, 5.0)}
    for (layout, kind), shifts in wanted.items():
        for size, shift in zip(("480x832", "1280x720"), shifts):
            V.say_once.cache_clear()
            args = S.parse_options(["x", "--prompt", "a", "--size", size])
            assert S.usual_shift(args, tmp_path, kind, layout) == shift
            said = capsys.readouterr().err
            assert f"{shift:g} is assumed" in said and "--shift" in said and said.count("\n") == 1
    assert S.usual_shift(S.parse_options(["x", "--prompt", "a"]), tmp_path, "wan", "diffusers") == 3.0
    for layout, word in (("diffusers", "has no scheduler/"), ("wan", "Wan's own code")):
        for more, shift in ((("--shift", "7"), 7.0), ((), 3.0)):
            V.say_once.cache_clear()
            capsys.readouterr()
            out = tmp_path / f"{layout}{shift}"
            sampled(i2v / layout, out, "--image", str(i2v / "picture.png"), *more)
            assert (word in capsys.readouterr().err) == (not more)
            assert [json.loads(path.read_text())["how"]["shift"] for path in out.glob("*.json")] == [shift]


def test_an_i2v_without_its_image_encoder_says_where_to_get_it(i2v, tmp_path, capsys):
    for layout, part in (("diffusers", "image_encoder"), ("wan", S.WAN_CLIP)):
        place = tmp_path / layout
        shutil.copytree(i2v / layout, place)
        (place / part).rename(tmp_path / part)
        run = lambda: sampled(place, tmp_path / "o", "--image", str(i2v / "picture.png"))
        told = refused(capsys, run)
        assert "put image_encoder/ of Wan-AI/Wan2.1-I2V-14B-480P-Diffusers" in told and S.WAN_CLIP in told
        (tmp_path / part).rename(place / part)                             # as told
        run()


def test_parts_that_do_not_belong_together_end_in_one_line(i2v, tmp_path, capsys):
    """An encoder of another width, an autoencoder of other channels; a superscript is no class."""
    place = i2v / "diffusers"
    told = refused(capsys, lambda place: sampled(place, tmp_path / "o", "--image", str(
        i2v / "picture.png"), "--text_encoder", str(FIXTURES / "clip-text/encoder")), place)
    assert "makes embeddings" in told and "reads 32" in told and "--text_encoder" in told
    with pytest.raises(SystemExit) as stop:
        S.class_number("\u00b2", 10)
    assert stop.value.code == 2 and "0 to 9" in capsys.readouterr().err


def test_what_an_image_encoder_lacks_is_named_as_its_file_names_it(i2v, tmp_path, capsys):
    for layout, file, drop, says in (
            ("diffusers", "image_encoder/model.safetensors", "class_embedding", "embeddings.class_embedding is missing"),
            ("diffusers", "image_encoder/model.safetensors", "pre_layrnorm", "pre_layrnorm.weight is missing"),
            ("diffusers", "image_encoder/model.safetensors", "position_embedding", "position_embedding.weight is missing"),
            ("diffusers", "image_encoder/model.safetensors", "layers.0.mlp.fc1", "layers.0.mlp.fc1.weight is missing"),
            ("wan", S.WAN_CLIP, "visual.cls_embedding", "visual.cls_embedding is missing"),
            ("wan", S.WAN_CLIP, "visual.pre_norm", "visual.pre_norm.weight is missing")):
        place = shutil.copytree(i2v / layout, tmp_path / "it")
        path = place / file
        result = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        result = {name: x.clone() for name, x in result.items() if drop not in name}
        (save_file if path.suffix == ".safetensors" else torch.save)(result, path)
        told = refused(capsys, S.open_image_encoder, place, "cpu")
        assert says in told and "tower." not in told, told
        shutil.rmtree(place)


def test_the_image_encoder_of_a_folder_is_read_as_it_is(i2v, tmp_path, capsys):
    """Prefixes, half of a whole CLIP, its own pictures; what does not fit is refused by name."""
    place, picture = tmp_path / "it", np.random.default_rng(1).integers(0, 255, (12, 8, 3), dtype=np.uint8)
    wanted = S.open_image_encoder(i2v / "diffusers", "cpu")(picture)

    def folder(config=None, name=lambda name: name, more={}, processor=None, beside=None):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(i2v / "diffusers", place)
        state, at = load_file(i2v / "diffusers/image_encoder/model.safetensors"), place / "image_encoder"
        save_file({name(key): x for key, x in state.items()} | more, at / "model.safetensors")
        known = json.loads((at / "config.json").read_text())
        (at / "config.json").write_text(json.dumps(config(known) if config else known))
        for each, told in (("image_encoder", processor), ("image_processor", beside)):
            if told:
                (place / each).mkdir(exist_ok=True)
                (place / each / "preprocessor_config.json").write_text(json.dumps(told))
        return place
    text = {f"{name}.weight": torch.ones(2, 2) for name in (
        "text_model.embeddings.token_embedding", "text_model.final_layer_norm", "text_projection", "visual_projection")}
    whole = lambda c: {"model_type": "clip", "vision_config": {**c, "model_type": "clip_vision_model"},
                       "text_config": {"hidden_size": 7}, "projection_dim": 5, "hidden_size": 99}
    for prefix in ("", "module.", "image_encoder.", "clip.", "_orig_mod."):
        for strip in (False, True):
            named = lambda name: prefix + (name.removeprefix("vision_model.") if strip else name)
            result = S.open_image_encoder(folder(name=named), "cpu")(picture)
            assert torch.equal(result, wanted), (prefix, strip)
        folder(whole, lambda name: prefix + name, {prefix + name: x for name, x in text.items()}
               | {prefix + "logit_scale": torch.ones(())})
        assert torch.equal(S.open_image_encoder(place, "cpu")(picture), wanted)
    usual = dict(do_resize=True, size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_center_crop=True,
                 resample=3, rescale_factor=1 / 255)
    assert torch.equal(S.open_image_encoder(folder(beside=usual), "cpu")(picture), wanted)
    mean, std = (torch.tensor(each) for each in S.CLIP_MEAN)
    for where in ("processor", "beside"):                     # another mean is another picture
        told = usual | dict(image_mean=[0.5] * 3, image_std=[0.25] * 3)
        result = S.open_image_encoder(folder(**{where: told}), "cpu")(picture)
        cut = S.crop(picture, 8)[0][0] * std.view(3, 1, 1) + mean.view(3, 1, 1)
        assert torch.allclose(result, tower_by_hand(tower_weights(), (cut[None] - 0.5) / 0.25)[0], atol=1e-4)
        assert (result - wanted).abs().max() > 0.01
    for more, told in ((dict(beside=usual | dict(resample=2)), "resample 2"), (
            dict(processor=usual | dict(size={"shortest_edge": 9})), "size"), (
            dict(config=lambda c: c | {"quantization_config": {"quant_method": "awq"}}), "awq"), (
            dict(config=lambda c: whole(c | {"quantization_config": {"quant_method": "gptq"}})), "gptq"), (
            dict(config=lambda c: c | {"model_type": "siglip_vision_model"}), "siglip_vision_model"), (
            dict(config=lambda c: c | {"hidden_act": "relu6"}), "relu6"), (
            dict(name=lambda name: name.replace("class_embedding", "cls")), "embeddings.cls is unexpected")):
        assert told in refused(capsys, S.open_image_encoder, folder(**more), "cpu")


def test_misfits_are_said_before_anything_is_sampled_or_large_is_read(i2v, tmp_path, capsys, monkeypatch):
    """No bar and no encoder is there yet: widths of text and image encoders, in both layouts, classes
    of a whole file of prompts."""
    def never(*_, **__):
        raise AssertionError
    monkeypatch.setattr(S.Sampler, "progress", never)
    monkeypatch.setattr(S, "open_text_encoder", never)
    run = lambda *more: sampled(*more, "--image", str(i2v / "picture.png"))
    for layout in ("wan", "diffusers"):
        shutil.copytree(i2v / layout, tmp_path / layout)
        told = refused(capsys, run, i2v / layout, tmp_path / "o", "--text_encoder", str(FIXTURES / "clip-text/encoder"))
        assert "reads 32" in told
        where = tmp_path / layout / ("" if layout == "wan" else "transformer")
        network = D.DiT(36, 48, 1, 2, (1, 2, 2), 16, 64, 32, 96, positions="index")
        save_file({name: x.contiguous() for name, x in D.to_published(
            network.state_dict(), layout, network).items()}, where / "diffusion_pytorch_model.safetensors")
        told = refused(capsys, run, tmp_path / layout, tmp_path / "o")
        assert "tokens 160 wide" in told and "reads 96" in told
    file, _ = trained(tmp_path, {"model": "SiT-S/2"})
    (tmp_path / "prompts.txt").write_text("3\n4\n11\n")
    told = refused(capsys, S.main, [str(file), "--prompts", str(tmp_path / "prompts.txt"), "--vae", str(
        FIXTURES / "sd-vae/vae"), "--device", "cpu", "--batch", "1", "--out", str(tmp_path / "o")])
    assert "'11' is no class" in told and not list((tmp_path / "o").glob("*"))


def test_weights_in_safetensors_come_before_older_ones(tmp_path):
    """A stale .bin beside shards; a tensor without a place in an AutoencoderKL."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"old")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert V.weight_files(tmp_path)[0].name == "model.safetensors.index.json"
    config = {"block_out_channels": [32], "layers_per_block": 1, "latent_channels": 4,
              "norm_num_groups": 8, "use_quant_conv": True, "scaling_factor": 1.0,
              "latents_mean": [], "latents_std": [], "shift_factor": 0.0}
    assert V.image_options({"logvar": torch.zeros(())}, config)[0]["z_dim"] == 4
