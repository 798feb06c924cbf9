"""caption.py's published folders as they lie on the hub: their config.json with what each version of
transformers leaves out, their names of tensors, their precisions, their chat templates. Sizes are
small and weights random, or, where shapes alone are asked, as published and on the meta device. The
numbers are those of the plain float64 reference below."""
import contextlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from test_families import refused

import caption as c
import train_dit as D
import train_vae as V

ROOT = Path(__file__).resolve().parents[1]
MARKS = ["<s>", "</s>", "<pad>", "<unk>", "<image>", "<video>", "<|image_pad|>", "<|video_pad|>",
         "<|vision_start|>", "<|vision_end|>", "<|startoftext|>", "<|endoftext|>"]


# -- plain reference, by the published names -------------------------------------------------------

def rms(x, w, eps):
    return x / (x.pow(2).mean(-1, True) + eps).sqrt() * w


def ln(x, W, name, eps):
    return F.layer_norm(x, x.shape[-1:], W[f"{name}.weight"], W[f"{name}.bias"], eps)


def lin(x, W, name):
    return x @ W[f"{name}.weight"].T + W.get(f"{name}.bias", 0)


def attend(q, k, v, seen, scale):
    """Attention of [n, A, E] head by head, with grouped keys; seen(i, j): whether i attends to j."""
    n, A, _ = q.shape
    mask = torch.tensor([[seen(i, j) for j in range(n)] for i in range(n)])
    out = []
    for a in range(A):
        b = a * k.shape[1] // A
        scores = (q[:, a] @ k[:, b].T * scale).masked_fill(~mask, -math.inf)
        out.append(scores.softmax(-1) @ v[:, b])
    return torch.stack(out, 1).flatten(1)


def turned(x, angles):
    """Rotates [n, A, E] by [n, E / 2]; feature i is paired with i + E / 2."""
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def speeds_of(E, theta, rope):
    speeds = []
    for i in range(E // 2):
        s = theta ** (-2 * i / E)
        law = rope.get("rope_type", rope.get("type", "default"))
        if law == "linear":
            s /= rope["factor"]
        elif law == "llama3":
            length, wave = rope["original_max_position_embeddings"], 2 * math.pi / s
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            if wave > length / low:
                s /= rope["factor"]
            elif wave > length / high:
                part = (length / wave - low) / (high - low)
                s = (1 - part) * s / rope["factor"] + part * s
        speeds.append(s)
    return torch.tensor(speeds, dtype=torch.float64)


def lm(W, t, x, places):
    """Logits [n, vocab] of token embeddings x [n, D] at positions [3, n], weights by model.layers' names."""
    A, KV = t["num_attention_heads"], t.get("num_key_value_heads") or t["num_attention_heads"]
    E, rope = t.get("head_dim") or t["hidden_size"] // A, t.get("rope") or {}
    speeds = speeds_of(E, t.get("rope_theta", 1e4), rope)
    axes = [i for i, n in enumerate(rope.get("mrope_section", [E // 2])) for _ in range(n)]
    angles = torch.stack([places[axis].double() * s for axis, s in zip(axes, speeds)], 1)
    window, eps = t.get("sliding_window") or 10**9, t.get("rms_norm_eps", 1e-6)
    for i in range(t["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h = rms(x, W[p + "input_layernorm.weight"], eps)
        q, k, v = (lin(h, W, f"{p}self_attn.{n}_proj").unflatten(-1, (-1, E)) for n in "qkv")
        if f"{p}self_attn.q_norm.weight" in W:
            q, k = (rms(y, W[f"{p}self_attn.{n}_norm.weight"], eps) for y, n in ((q, "q"), (k, "k")))
        o = attend(turned(q, angles), turned(k, angles), v,
                   lambda i, j: i - window < j <= i, E ** -0.5)
        assert k.shape[1] == KV
        x = x + lin(o, W, p + "self_attn.o_proj")
        h = rms(x, W[p + "post_attention_layernorm.weight"], eps)
        x = x + lin(F.silu(lin(h, W, p + "mlp.gate_proj")) * lin(h, W, p + "mlp.up_proj"), W,
                    p + "mlp.down_proj")
    head = W.get("lm_head.weight", W["model.embed_tokens.weight"])
    return rms(x, W["model.norm.weight"], eps) @ head.T


def vit(W, v, pixels, depth, p="", act=lambda x: x * (1.702 * x).sigmoid(), eps=1e-5):
    """CLIP's or SigLIP's tokens [N, D] of an image [3, H, W] after `depth` layers."""
    patch = W[f"{p}embeddings.patch_embedding.weight"]
    x = F.conv2d(pixels[None], patch, W.get(f"{p}embeddings.patch_embedding.bias"),
                 stride=patch.shape[-1])[0].flatten(1).T
    if f"{p}embeddings.class_embedding" in W:
        x = torch.cat([W[f"{p}embeddings.class_embedding"][None], x])
    x = x + W[f"{p}embeddings.position_embedding.weight"]
    if f"{p}pre_layrnorm.weight" in W:
        x = ln(x, W, f"{p}pre_layrnorm", eps)
    return blocks(W, v, x, depth, f"{p}encoder.", act, eps, lambda i, j: True)


def blocks(W, v, x, depth, p, act, eps, seen):
    for i in range(depth):
        q, A = f"{p}layers.{i}.", v["num_attention_heads"]
        h = ln(x, W, f"{q}layer_norm1", eps)
        parts = [lin(h, W, f"{q}self_attn.{n}_proj").unflatten(-1, (A, -1)) for n in "qkv"]
        x = x + lin(attend(*parts, seen, parts[0].shape[-1] ** -0.5), W, f"{q}self_attn.out_proj")
        x = x + lin(act(lin(ln(x, W, f"{q}layer_norm2", eps), W, f"{q}mlp.fc1")), W, f"{q}mlp.fc2")
    return x


def qwen_sight(W, v, rows, grid, is_new):
    """The visual tokens [L / 4, D] of Qwen2-VL or 2.5; keys missing in v have the class's defaults."""
    t, h, w = grid
    A, p = v["num_heads"], v.get("patch_size", 14)
    norm = (lambda x, n: rms(x, W[f"{n}.weight"], 1e-6)) if is_new else (
        lambda x, n: ln(x, W, n, 1e-6))
    x = rows @ W["visual.patch_embed.proj.weight"].flatten(1).T
    at = [(pair, 2 * y + dy, 2 * z + dz) for pair in range(t) for y in range(h // 2)
          for z in range(w // 2) for dy in (0, 1) for dz in (0, 1)]      # of each row
    E = x.shape[1] // A
    speeds = torch.tensor([1e4 ** (-2 * i / (E // 2)) for i in range(E // 4)], dtype=torch.float64)
    angles = torch.stack([torch.cat([y * speeds, z * speeds]) for _, y, z in at])
    side = v.get("window_size", 112) // p
    for i in range(v["depth"]):
        q, whole = f"visual.blocks.{i}.", not is_new or i in v.get("fullatt_block_indexes",
                                                                   (7, 15, 23, 31))

        def seen(a, b):
            (s, y, z), (u, yy, zz) = at[a], at[b]
            return s == u and (whole or (y // side, z // side) == (yy // side, zz // side))
        parts = lin(norm(x, f"{q}norm1"), W, f"{q}attn.qkv").unflatten(-1, (3, A, E)).unbind(1)
        x = x + lin(attend(turned(parts[0], angles), turned(parts[1], angles), parts[2], seen,
                           E ** -0.5), W, f"{q}attn.proj")
        y = norm(x, f"{q}norm2")
        if is_new:
            y = F.silu(lin(y, W, f"{q}mlp.gate_proj")) * lin(y, W, f"{q}mlp.up_proj")
            x = x + lin(y, W, f"{q}mlp.down_proj")
        else:
            y = lin(y, W, f"{q}mlp.fc1")
            x = x + lin(y * (1.702 * y).sigmoid(), W, f"{q}mlp.fc2")
    y = norm(x, "visual.merger.ln_q").view(len(x) // 4, -1)
    return lin(F.gelu(lin(y, W, "visual.merger.mlp.0")), W, "visual.merger.mlp.2")


# -- folders ---------------------------------------------------------------------------------------

def weights(shapes, seed=0):
    """{name: float32} of {name: shape}, about as large as a trained model's."""
    r = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=r) * (
        0.1 if len(shape) < 2 else 1 if "embed_tokens" in name else math.prod(shape[1:]) ** -0.5)
        + (len(shape) == 1 and name.endswith("weight")) for name, shape in shapes.items()}


def lm_shapes(t, bias=False, qk=False, head=True):
    D, A, ffn = t["hidden_size"], t["num_attention_heads"], t["intermediate_size"]
    KV, E = t.get("num_key_value_heads") or A, t.get("head_dim") or D // A
    result = {"model.embed_tokens.weight": (t["vocab_size"], D), "model.norm.weight": (D,)}
    result |= {"lm_head.weight": (t["vocab_size"], D)} if head else {}
    for i in range(t["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for n, out in ("q", A), ("k", KV), ("v", KV):
            result[f"{p}self_attn.{n}_proj.weight"] = out * E, D
            if bias:
                result[f"{p}self_attn.{n}_proj.bias"] = out * E,
        result |= {f"{p}self_attn.o_proj.weight": (D, A * E), f"{p}mlp.gate_proj.weight": (ffn, D),
                  f"{p}mlp.up_proj.weight": (ffn, D), f"{p}mlp.down_proj.weight": (D, ffn),
                  f"{p}input_layernorm.weight": (D,), f"{p}post_attention_layernorm.weight": (D,)}
        result |= {f"{p}self_attn.{n}_norm.weight": (E,) for n in "qk"} if qk else {}
    return result


def layer_shapes(p, D, ffn, depth):
    result = {}
    for i in range(depth):
        for n, out, into in (("layer_norm1", D, 0), ("layer_norm2", D, 0), ("mlp.fc1", ffn, D),
                             ("mlp.fc2", D, ffn), *((f"self_attn.{n}_proj", D, D)
                                                    for n in ("q", "k", "v", "out"))):
            result[f"{p}layers.{i}.{n}.weight"] = (out, into) if into else (out,)
            result[f"{p}layers.{i}.{n}.bias"] = (out,)
    return result


def vit_shapes(v, p="", is_siglip=False, image=224):
    D, patch = v["hidden_size"], v.get("patch_size", 32)
    n = (v.get("image_size", image) // patch) ** 2
    result = {f"{p}embeddings.patch_embedding.weight": (D, 3, patch, patch),
             f"{p}embeddings.position_embedding.weight": (n + (not is_siglip), D),
             f"{p}post_layernorm.weight": (D,), f"{p}post_layernorm.bias": (D,)}
    result |= {f"{p}embeddings.patch_embedding.bias": (D,)} if is_siglip else {
        f"{p}embeddings.class_embedding": (D,), f"{p}pre_layrnorm.weight": (D,),
        f"{p}pre_layrnorm.bias": (D,)}
    return result | layer_shapes(f"{p}encoder.", D, v["intermediate_size"], v["num_hidden_layers"])


def folder_of(folder, config, tensors, tokenizer=True, **files):
    """Writes a folder; files: {name with __ for a dot: JSON, or text}."""
    folder.mkdir(parents=True)
    if tensors is not None:
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    if tokenizer:
        letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        table = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate(letters)}, []))
        table.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
        table.decoder = tokenizers.decoders.ByteLevel()
        table.add_special_tokens(MARKS)
        table.save(str(folder / "tokenizer.json"))
    for name, said in {"config__json": config, **files}.items():
        text = said if isinstance(said, str) else json.dumps(said)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def double(tensors):
    return {name: t.double() for name, t in tensors.items()}


def near(ours, wanted, atol=2e-4):
    torch.testing.assert_close(ours.double(), wanted, atol=atol, rtol=0)


@torch.no_grad()
def logits_of(model, request):
    h = model.decoder(request.x[None], request.positions[..., None, :])
    return model.decoder.logits(h)[0]


# -- configs with absent keys ----------------------------------------------------------------------

CLIP_L = dict(hidden_size=1024, intermediate_size=4096, model_type="clip_vision_model",
              num_attention_heads=16, num_hidden_layers=24, patch_size=14, projection_dim=768)
VICUNA = dict(_name_or_path="lmsys/vicuna-7b-v1.5", model_type="llama", rms_norm_eps=1e-5,
              max_position_embeddings=4096, torch_dtype="float16", vocab_size=32064)
QWEN_7B = dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, rms_norm_eps=1e-6,
               num_hidden_layers=28, num_key_value_heads=4, vocab_size=152064)
MROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}
OLD_V = dict(hidden_size=3584, model_type="qwen2_vl", in_chans=3, spatial_patch_size=14)
HUB = {     # config.json of well-known checkpoints, their number of weights, a fact of the ModelSpec
    "llava-1.5-7b-hf": (dict(model_type="llava", architectures=["LlavaForConditionalGeneration"],
        text_config=VICUNA, vision_config=CLIP_L | {"image_size": 336}, image_token_index=32000,
        vision_feature_layer=-2, vision_feature_select_strategy="default", torch_dtype="float16"),
        7063427072 - 12596224 - 2048, "stack.eps == 1e-5"),              # less what -2 never asks
    "Video-LLaVA-7B-hf": (dict(model_type="video_llava", text_config=VICUNA, vision_config=CLIP_L,
        video_token_index=32001, vision_feature_layer=-2),               # a second tower, of 224 px
        7063427072 - 12596224 - 2048 - (577 - 257) * 1024 + 290581504,
        "picture.keywords['size'] == 224"),
    "Qwen2-VL-7B-Instruct, 4.45": (dict(model_type="qwen2_vl", **QWEN_7B, rope_theta=1e6,
        rope_scaling=MROPE, vision_config=OLD_V | dict(depth=32, embed_dim=1280, mlp_ratio=4,
        num_heads=16, patch_size=14, spatial_merge_size=2, temporal_patch_size=2)), 8291375616,
        "stack.rope == 1e6"),
    "Qwen2-VL-7B-Instruct, 4.49": (dict(model_type="qwen2_vl", **QWEN_7B, rope_scaling=dict(
        MROPE, type="default", rope_type="default"), vision_config=OLD_V), 8291375616,
        "stack.rope == 1e6 and stack.sections == (16, 24, 24)"),
    "Qwen2-VL-7B-Instruct, 5.24": (dict(model_type="qwen2_vl", dtype="bfloat16", text_config=dict(
        QWEN_7B, model_type="qwen2_vl_text", layer_types=["full_attention"] * 28, rope_parameters=dict(
            mrope_section=[16, 24, 24], rope_theta=1e6, rope_type="default"))), 8291375616,
        "stack.rope == 1e6 and tower.args[0].act == 'quick_gelu'"),
    "Qwen2.5-VL-7B-Instruct, 4.49": (dict(model_type="qwen2_5_vl", **QWEN_7B, rope_scaling=MROPE,
        vision_config=dict(hidden_size=1280, model_type="qwen2_5_vl", tokens_per_second=2)), 8292166656,
        "rate == 2 and tower.args[3:] == (112, (7, 15, 23, 31))"),
    "Qwen2.5-VL-3B-Instruct": (dict(model_type="qwen2_5_vl", hidden_size=2048, num_attention_heads=16,
        intermediate_size=11008, num_hidden_layers=36, num_key_value_heads=2, vocab_size=151936,
        rms_norm_eps=1e-6, tie_word_embeddings=True, vision_config=dict(hidden_size=1280,
        out_hidden_size=2048)), 3754622976 + 151936 * 2048, "rate == 4 and stack.rope == 1e6"),
    "Mistral-7B-v0.1, re-saved": (dict(model_type="mistral", rms_norm_eps=1e-5), 7241732096,
        "stack.window == 4096"),
    "Mistral-7B-Instruct-v0.2": (dict(model_type="mistral", rope_theta=1e6, sliding_window=None),
        7241732096, "stack.window == 0"),
    "Qwen2.5-7B-Instruct": (dict(model_type="qwen2", **QWEN_7B, rope_theta=1e6), 7615616512,
        "stack.qkv_bias"),
    "Qwen3-8B": (dict(model_type="qwen3", intermediate_size=12288, num_hidden_layers=36,
        num_key_value_heads=8), 8190735360, "stack.head == 128"),
    "Llama-3.1-8B-Instruct": (dict(model_type="llama", intermediate_size=14336, vocab_size=128256,
        num_key_value_heads=8, rope_theta=5e5, rope_scaling=dict(factor=8.0, low_freq_factor=1.0,
        high_freq_factor=4.0, original_max_position_embeddings=8192, rope_type="llama3")), 8030261248,
        "stack.scaling == (8.0, 1.0, 4.0, 8192)"),
    "vicuna-7b-v1.5-16k": (dict(model_type="llama", rope_scaling=dict(factor=4.0, type="linear")),
        6738415616, "stack.scaling == (4.0,)"),
    "internlm2-chat-7b": (dict(model_type="internlm2", bias=False, intermediate_size=14336,
        num_key_value_heads=8, vocab_size=92544, rope_theta=1e6), 7737708544, "stack.eps == 1e-6")}


@pytest.mark.parametrize("name", HUB)
def test_well_known_configs_have_their_published_sizes(name, tmp_path):
    config, n, fact = HUB[name]
    kind, _ = c.kind_of(config)
    with torch.device("meta"):
        spec = c.FAMILIES[kind](c.DEFAULTS.get(kind, {}) | config, {}, tmp_path)
        model = c.VLM(spec)
    assert sum(p.numel() for p in model.parameters()) == n
    assert eval(fact, vars(spec)), fact


@pytest.mark.parametrize("config, n", [
    (dict(model_type="t5", d_model=4096, d_ff=10240, num_layers=24, num_heads=64,
          feed_forward_proj="gated-gelu"), 4762310656),                  # t5-v1_1-xxl's encoder
    (dict(model_type="umt5", d_model=4096, d_ff=10240, num_layers=24, num_heads=64,
          vocab_size=256384), 5680910336),                               # umt5-xxl's
    (dict(model_type="clip_text_model", hidden_size=768, intermediate_size=3072,
          num_attention_heads=12), 123060480),                           # Stable Diffusion 1.5's
    (dict(model_type="clip", text_config={}, text_config_dict=dict(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12)), 123060480)])
def test_well_known_text_encoders_have_their_published_sizes(config, n):
    model, _ = c.make_text_encoder(config)
    assert sum(p.numel() for p in model.parameters()) == n and model.end in (49407, None)


TINY = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=270)
IDS = [5, 99, 31, 7, 200, 31, 64, 12, 3, 250, 18, 77]


@pytest.mark.parametrize("name, config, more", [
    ("llama", dict(model_type="llama", num_key_value_heads=None), {}),
    ("llama, linear", dict(model_type="llama", rope_scaling={"type": "linear", "factor": 4.0}), {}),
    ("llama, linear in 5", dict(model_type="llama", rope_parameters=dict(
        rope_type="linear", factor=4.0, rope_theta=5e5)), {}),
    ("llama, llama3", dict(model_type="llama", rope_theta=5e5, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16)), {}),
    ("mistral", dict(model_type="mistral", head_dim=12, sliding_window=5), {}),
    ("qwen2", dict(model_type="qwen2", tie_word_embeddings=True, sliding_window=3), dict(
        bias=True, head=False)),
    ("qwen3", dict(model_type="qwen3"), dict(qk=True))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_p05_language_models_in_every_precision(name, config, more, dtype, tmp_path):
    """Equal to the reference, for float32, bfloat16 and float16; names with module. and _orig_mod."""
    t = TINY | config
    said = {key: v for key, v in t.items() if v is not None}
    if name == "qwen3":
        t = t | {"head_dim": 128}                                        # its class's, not 32 / 4
    tensors = {key: w.to(dtype) for key, w in weights(lm_shapes(t, **more)).items()}
    before = {torch.bfloat16: "module.", torch.float16: "_orig_mod."}.get(dtype, "")
    model = c.open_vlm(folder_of(tmp_path / "m", said, {before + key: w for key, w in tensors.items()}))
    W = double(tensors)
    rope = t.get("rope_parameters") or t.get("rope_scaling") or {}
    t = t | {"rope": rope, "rope_theta": rope.get("rope_theta", t.get("rope_theta", 1e4))}
    t |= {} if t["model_type"] == "mistral" else {"sliding_window": None}
    wanted = lm(W, t, W["model.embed_tokens.weight"][IDS], torch.arange(len(IDS)).expand(3, -1))
    near(logits_of(model, model.request("a", IDS, [], None, [])), wanted)
    half = c.open_vlm(tmp_path / "m", dtype=torch.bfloat16)              # as on a GPU
    got = logits_of(half, half.request("a", IDS, [], None, []))
    assert got.dtype in (torch.bfloat16, torch.float32)
    near(got, wanted, atol=0.15 * float(wanted.std()) + 0.05)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_p01_plain_float8_is_read_and_scales_are_refused(dtype, tmp_path, capsys):
    tensors = {n: w.to(dtype) for n, w in weights(lm_shapes(TINY)).items()}
    config, W = TINY | {"model_type": "llama"}, double(tensors)
    model = c.open_vlm(folder_of(tmp_path / "m", config, tensors))
    near(logits_of(model, model.request("a", IDS, [], None, [])), lm(
        W, TINY, W["model.embed_tokens.weight"][IDS], torch.arange(len(IDS)).expand(3, -1)))
    scale = {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}
    folder = folder_of(tmp_path / "s", config, tensors | scale)
    assert "quantized with scales are not read" in refused(capsys, folder, call=c.open_vlm)


def test_internlm2_whose_config_does_not_say_bias(tmp_path, capsys):
    """InternLM2's class has biases, which are zero if the file has none; others are refused by name."""
    t = TINY | {"model_type": "internlm2"}
    tensors = weights(lm_shapes(TINY))
    named = {"model.tok_embeddings.weight": tensors["model.embed_tokens.weight"],
             "model.norm.weight": tensors["model.norm.weight"], "output.weight": tensors["lm_head.weight"]}
    for i in range(2):
        p = f"model.layers.{i}."
        q, k, v = (tensors[f"{p}self_attn.{n}_proj.weight"].unflatten(0, (2, -1, 8)) for n in "qkv")
        named[f"{p}attention.wqkv.weight"] = torch.cat([q, k, v], 1).flatten(0, 2)
        for n, theirs in (("self_attn.o_proj", "attention.wo"), ("mlp.gate_proj", "feed_forward.w1"),
                          ("mlp.up_proj", "feed_forward.w3"), ("mlp.down_proj", "feed_forward.w2"),
                          ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm")):
            named[f"{p}{theirs}.weight"] = tensors[f"{p}{n}.weight"]
    model, W = c.open_vlm(folder_of(tmp_path / "m", t, named)), double(tensors)
    near(logits_of(model, model.request("a", IDS, [], None, [])), lm(
        W, TINY, W["model.embed_tokens.weight"][IDS], torch.arange(len(IDS)).expand(3, -1)))
    named["model.layers.0.attention.wqkv.bias"] = torch.ones(64)
    assert "bias is True, which is not supported for a internlm2" in refused(
        capsys, folder_of(tmp_path / "b", t, named), call=c.open_vlm)


def picture(model, is_video=False, frames=1, q="dog", shape=(30, 44)):
    r = np.random.default_rng(0)
    seen = [r.integers(0, 255, (*shape, 3), np.uint8) for _ in range(frames)]
    read = model.read("\0" + q, seen, is_video)
    return model.requests(["a"], [read])[0], read[1]


def llava_names(kind, name):
    """A tensor of 4.36's LLaVA under the names of another version."""
    if kind == "4.52 in memory":                                         # also what it may save
        name = name.replace("language_model.model.", "model.language_model.")
        name = name.replace("language_model.lm_head", "lm_head")
        return name if name.startswith(("model.language", "lm_head")) else f"model.{name}"
    if kind == "5.24":
        return name.replace("_tower.vision_model.", "_tower.")
    if kind == "own":
        for theirs, own in (("language_model.", ""), ("multi_modal_projector.linear_1", "model.mm_projector.0"),
                            ("multi_modal_projector.linear_2", "model.mm_projector.2"),
                            ("vision_tower.", "model.vision_tower.vision_tower.")):
            name = name.replace(theirs, own)
    return name


def llava_parts(towers, image, text=None):
    v = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=3,
             patch_size=14, model_type="clip_vision_model")
    text = TINY | {"model_type": "llama"} | (text or {})
    shapes = {f"language_model.{n}": s for n, s in lm_shapes(text).items()}
    for tower in towers:
        shapes |= vit_shapes(v | {"image_size": image}, f"{tower}.vision_model.")
    for i, wide in (1, 16), (2, 32):
        shapes |= {f"multi_modal_projector.linear_{i}.weight": (32, wide),
                   f"multi_modal_projector.linear_{i}.bias": (32,)}
    return text, v, weights(shapes)


def llava_wanted(W, t, v, pixels, ids, tower, keep_cls, mark):
    language = {n.removeprefix("language_model."): w for n, w in W.items()}
    rows = []
    for each in pixels:
        seen = vit(W, v, each.double(), v["num_hidden_layers"] - 1, f"{tower}.vision_model.")
        seen = F.gelu(lin(seen if keep_cls else seen[1:], W, "multi_modal_projector.linear_1"))
        rows.append(lin(seen, W, "multi_modal_projector.linear_2"))
    x = language["model.embed_tokens.weight"][[max(i, 0) for i in ids]].clone()
    x[torch.tensor(ids) < 0] = torch.cat(rows)
    return lm(language, t, x, torch.arange(len(ids)).expand(3, -1))


@pytest.mark.parametrize("naming", ["4.36", "4.52 in memory", "5.24", "own"])
def test_v01_llava_of_every_naming(naming, tmp_path):
    """The names of several versions of transformers; LLaVA's own layout, also llava_llama, with the tower
    beside the folder under the last part of its name."""
    text, v, tensors = llava_parts(["vision_tower"], 28)
    named = {llava_names(naming, n): w.half() for n, w in tensors.items()}
    config = dict(model_type="llava", text_config=text, vision_config=v | {"image_size": 28})
    if naming == "own":
        inside = "model.vision_tower.vision_tower."
        folder_of(tmp_path / "clip-vit", v | {"image_size": 28}, {
            n.removeprefix(inside): w for n, w in named.items() if n.startswith(inside)}, False)
        named = {n: w for n, w in named.items() if not n.startswith(inside)}
        config = text | dict(
            model_type="llava_llama", architectures=["LlavaLlamaForCausalLM"], image_aspect_ratio="pad",
            mm_vision_tower="openai/clip-vit", mm_projector_type="mlp2x_gelu", mm_hidden_size=16,
            mm_vision_select_layer=-2, mm_vision_select_feature="patch", mm_use_im_start_end=False)
    model = c.open_vlm(folder_of(tmp_path / "m", config, named))
    request, pixels = picture(model)
    ids = [-1 if seen else i for i, seen in zip(request.ids, request.image.tolist())]
    assert ids.count(-1) == 4
    near(logits_of(model, request), llava_wanted(double({n: w.half() for n, w in tensors.items()}), text,
                                                 v, pixels, ids, "vision_tower", False, "<image>"))
    assert model.prompt("Q").endswith("USER: \0\nQ ASSISTANT:")


@pytest.mark.parametrize("naming", ["4.36", "5.24"])
def test_video_llava_without_image_size(naming, tmp_path):
    """Video-LLaVA-7B-hf has no vision_config: CLIP's 224 px; videos keep the class token."""
    text, v, tensors = llava_parts(["image_tower", "video_tower"], 224)
    named = {llava_names(naming, n): w.bfloat16() for n, w in tensors.items()}
    model = c.open_vlm(folder_of(tmp_path / "m", dict(
        model_type="video_llava", text_config=text, vision_config=v), named))
    W = double({n: w.bfloat16() for n, w in tensors.items()})
    for is_video, n in (False, 256), (True, 2 * 257):
        request, pixels = picture(model, is_video, 1 + is_video)
        ids = [-1 if seen else i for i, seen in zip(request.ids, request.image.tolist())]
        assert ids.count(-1) == n
        with torch.no_grad():
            near(model.features(pixels, is_video)[0], llava_features(W, v, pixels[0], is_video))


def llava_features(W, v, pixels, is_video):
    tower = "video_tower" if is_video else "image_tower"
    seen = vit(W, v, pixels.double(), v["num_hidden_layers"] - 1, f"{tower}.vision_model.")
    seen = lin(seen if is_video else seen[1:], W, "multi_modal_projector.linear_1")
    return lin(F.gelu(seen), W, "multi_modal_projector.linear_2")


def qwen_parts(is_new):
    v = dict(depth=2, num_heads=2) | (dict(hidden_size=32, intermediate_size=24, out_hidden_size=32)
                                      if is_new else dict(embed_dim=32, mlp_ratio=2, hidden_size=32))
    shapes = lm_shapes(TINY, bias=True)
    ffn = 24 if is_new else 64
    layers = [("attn.qkv", 96, 32), ("attn.proj", 32, 32), *(
        [("mlp.gate_proj", ffn, 32), ("mlp.up_proj", ffn, 32), ("mlp.down_proj", 32, ffn)]
        if is_new else [("mlp.fc1", ffn, 32), ("mlp.fc2", 32, ffn)])]
    shapes |= {"visual.patch_embed.proj.weight": (32, 3, 2, 14, 14), "visual.merger.ln_q.weight": (32,)}
    parts = [(f"visual.blocks.{i}.{n}", *size) for i in range(2) for n, *size in layers]
    for name, out, into in [*parts, ("visual.merger.mlp.0", 128, 128), ("visual.merger.mlp.2", 32, 128)]:
        shapes |= {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    norms = ["visual.merger.ln_q", *(f"visual.blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2))]
    for name in norms:
        shapes |= {f"{name}.weight": (32,)} | ({} if is_new else {f"{name}.bias": (32,)})
    return v, weights(shapes)


@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.parametrize("version", ["4.45", "4.49", "4.52", "5.24"])
def test_v02_qwen_vl_of_every_version(is_new, version, tmp_path):
    """Flat or nested configs, image sizes in preprocessor_config.json or processor_config.json, all keys
    (4.45) or without defaults; an image, and a video with two seconds between temporal positions."""
    v, tensors = qwen_parts(is_new)
    kind = "qwen2_5_vl" if is_new else "qwen2_vl"
    full = dict(patch_size=14, spatial_merge_size=2, temporal_patch_size=2, in_chans=3) | (dict(
        window_size=112, fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=4, hidden_act="silu")
        if is_new else dict(hidden_act="quick_gelu"))
    rope, size = {"mrope_section": [2, 1, 1]}, {"shortest_edge": 3136, "longest_edge": 28 * 28 * 16}
    text = TINY | {"rms_norm_eps": 1e-5}
    files = dict(preprocessor_config__json=dict(min_pixels=3136, max_pixels=28 * 28 * 16))
    video = {"size": {"shortest_edge": 3136, "longest_edge": 28 * 28 * 7}}
    config = {"4.45": text | dict(vision_config=v | full, rope_theta=1e6, rope_scaling=rope | {"type": "mrope"}),
              "4.49": TINY | dict(vision_config=v, rope_scaling=rope | {"rope_type": "default", "type": "default"}),
              "4.52": dict(text_config=TINY | dict(rope_scaling=rope | {"type": "mrope"}, rope_theta=1e6),
                           vision_config=v),
              "5.24": dict(text_config=TINY | dict(rope_parameters=rope | dict(
                  rope_type="default", rope_theta=1e6)), vision_config=v)}[version]
    if version in ("4.52", "5.24"):
        files = dict(processor_config__json={"image_processor": {"size": size}})
        files |= dict(video_preprocessor_config__json=video) if version == "4.52" else {}
        files["processor_config__json"] |= {"video_processor": video} if version == "5.24" else {}
    named = {n.replace("model.", "model.language_model.", 1).replace("visual.", "model.visual.", 1)
             if version == "4.52" else n: w.bfloat16() for n, w in tensors.items()}
    model = c.open_vlm(folder_of(tmp_path / "m", dict(config, model_type=kind), named, **files))
    W = double({n: w.bfloat16() for n, w in tensors.items()})
    for is_video, frames in ((False, 1), (True, 4)):
        read = model.read("\0dog", [np.random.default_rng(i).integers(0, 255, (150, 260, 3), np.uint8)
                                    for i in range(frames)], is_video, 0.5)
        request, = model.requests(["a"], [read])
        (rows, grid), = read[1]
        assert grid == ((2, 4, 6) if is_video and version >= "4.52" else (frames // 2 or 1, 6, 10))
        t, h, w = grid
        per = 4 * 0.5 if is_new and is_video else 1
        places = [(int(k * per), y, z) for k in range(t) for y in range(h // 2) for z in range(w // 2)]
        places = [(0, 0, 0)] + [tuple(1 + a for a in at) for at in places]
        seen = torch.tensor(request.ids) < 0
        first = int(seen.nonzero()[0])
        after = 1 + max(max(at) for at in places)
        places += [(after + i,) * 3 for i in range(len(request.ids) - first - len(places) + 1)]
        x = W["model.embed_tokens.weight"][[max(i, 0) for i in request.ids]].clone()
        x[seen] = qwen_sight(W, v, rows.double(), grid, is_new)
        wanted = lm(W, TINY | dict(rope=rope, rope_theta=1e6, rms_norm_eps=1e-5), x, torch.tensor(places).T)
        near(logits_of(model, request), wanted, 1e-3)


def test_a_picture_has_at_most_what_its_class_says(tmp_path):
    """Without both files: at most 1,003,520 px, Qwen2VLImageProcessor's default, and at least 3,136."""
    v, tensors = qwen_parts(False)
    model = c.open_vlm(folder_of(tmp_path / "m", TINY | dict(
        model_type="qwen2_vl", vision_config=v, rope_scaling={"mrope_section": [2, 1, 1]}), tensors))
    assert model.spec.picture.keywords == dict(patch=14, least=3136, most=1003520, video=None,
                                               mean_std=c.CLIP_MEAN)


def test_pictures_as_the_folder_says(tmp_path, capsys):
    """The folder's mean and standard deviation, LlavaImageProcessor's padding; other resizing is refused."""
    text, v, tensors = llava_parts(["vision_tower"], 28, {"num_hidden_layers": 1})
    config, frame = dict(model_type="llava", text_config=text, vision_config=v | {"image_size": 28}), np.full(
        (20, 40, 3), 200, np.uint8)
    usual = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_center_crop=True,
                 resample=3, image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.25, 0.25])
    for i, (more, says) in enumerate([
            ({}, None), ({"do_pad": True}, None), ({"resample": 2}, "has resample 2, supported is 3"),
            ({"do_center_crop": False}, "has do_center_crop False"), ({"size": {"shortest_edge": 32}},
                                                                       "has size {'shortest_edge': 32}")]):
        name = ("preprocessor_config__json", "processor_config__json")[i % 2]
        folder = folder_of(tmp_path / str(i), config, tensors, **{
            name: {"image_processor": usual | more} if i % 2 else usual | more})
        if says:
            assert says in refused(capsys, folder, call=c.open_vlm)
            continue
        picture, = c.open_vlm(folder).spec.picture(frame)[0]
        assert float(picture[0, 14, 14]) == pytest.approx((200 / 255 - 0.5) / 0.25)
        assert (float(picture[0, 0, 14]) == pytest.approx((127 / 255 - 0.5) / 0.25)) == bool(more)


# -- chat templates and tokenizers -----------------------------------------------------------------

def turns(user, answer="{{ m['content'] + eos_token }}", before="", after=""):
    """A chat template: the texts around a user's turn and an assistant's."""
    return (before + "{% for m in messages %}{% if m['role'] == 'user' %}" + user
            + "{% elif m['role'] == 'assistant' %}" + answer + "{% endif %}{% endfor %}"
            + "{% if add_generation_prompt %}" + after + "{% endif %}")


ZEPHYR = ("{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + "
          "message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
          "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and "
          "add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")
QWEN2 = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
         "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
         "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN25 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- endif %}
    {{- "\n\n# Tools\n\n{\"name\": <function-name>}" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
QWEN_VL = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}{% if loop.first and "
    "message['role'] != 'system' %}<|im_start|>system\nYou are a terse assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or "
    "'image' in content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|>"
    "<|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA2 = ("{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message "
          "= messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = SAYS %}"
          "{% endif %}{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}"
          "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
          "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
          "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' "
          "%}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
LLAMA3 = ("{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
          "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
          "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
          "{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")
LLAMA32 = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
SMALL = r"""{%- set today = strftime_now("%Y-%m-%d") %}
{%- set default_system_message = "You are Small, last taught on 2023-10-01.\nToday is " + today + "." %}

{{- bos_token }}

{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = default_system_message %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}

{#- It's a turn each: '{{' #}
{%- for message in loop_messages if message.role != 'tool' %}
    {%- if message['role'] == 'user' %}
        {%- if message['content'] is string %}
            {{- '[INST]' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST]' }}{{- (message['content'] | selectattr('type', 'eq', 'text') | list)[0].text ~ '[/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""
CURIOUS = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
           "detailed, and polite answers to the user's questions. ")
VICUNA_TURNS = turns("{{ 'USER: ' + m['content'] + ' ' }}", "{{ 'ASSISTANT: ' + m['content'] + eos_token }}",
                     '{{ "' + CURIOUS + '" }}', "{{ 'ASSISTANT:' }}")
TRL = turns("USER: {% for item in m['content'] %}{% if item['type'] == 'text' %}{{ item['text'] }}{% elif "
            "item['type'] == 'image' %}<image>\n{% endif %}{% endfor %} ",
            "{% for item in m['content'] %}ASSISTANT: {{ item['text'] }}{{ eos_token }}{% endfor %}", CURIOUS,
            "ASSISTANT: ")
HF = ("{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
      "{% endif %}{# Render all images first #}{% for content in message['content'] | selectattr('type', "
      "'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% for content in "
      "message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
      "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
INST = "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
PHI = "{{'<|user|>' + '\n' + m['content'] + '<|end|>' + '\n'}}"
GEMMA = turns("{{ '<start_of_turn>user\n' + (m.content | trim) + '<end_of_turn>\n' }}",
              "{{ '<start_of_turn>model\n' + m.content + '<end_of_turn>\n' }}", "{{ bos_token }}",
              "{{ '<start_of_turn>model\n' }}")
MACRO = ("{%- macro say(who, what='?') -%}\n  <{{ who }}>{{ what|upper if who == 'bot' else what }}\n{%- endmacro -%}"
         "{% for m in messages %}{% set text %}{{ m.content }}{% endset %}{{ say(m.role, text) }}|{% endfor %}"
         "{{ say('bot') -}}\n\n  {%- if messages|length > 1 or messages[-1].tool_calls is defined %}!{% endif %}")
HELPFUL = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
BY_QWEN = HELPFUL.replace("You are", "You are Qwen, created by Alibaba Cloud. You are")
ASK, ASKED_3 = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", (
    "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
TEMPLATES = {   # template, the result of transformers 5.24 for one turn, and the end of an answer
    "mistral": (turns(INST, before="{{ bos_token }}"), "[INST] Q [/INST]", "</s>"),
    "mistral v3": (turns('{{- "[INST] " + m["content"] + "[/INST]" }}', before="{{- bos_token }}"),
                   "[INST] Q[/INST]", "</s>"),
    "nemo": (turns('{{- "[INST]" + m.content + "[/INST]" }}'), "[INST]Q[/INST]", "</s>"),
    "small": (SMALL, "[SYSTEM_PROMPT]You are Small, last taught on 2023-10-01.\nToday is 2024-07-26."
              "[/SYSTEM_PROMPT][INST]Q[/INST]", "</s>"),
    "llama 2": (LLAMA2.replace("SAYS", "false"), "[INST] Q [/INST]", "</s>"),
    "llama 2, default": (LLAMA2.replace("SAYS", "'Be honest.'"),
                         "[INST] <<SYS>>\nBe honest.\n<</SYS>>\n\nQ [/INST]", "</s>"),
    "llama 3": (LLAMA3, ASKED_3, "<|eot_id|>"),
    "llama 3.2": (LLAMA32, "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
                  "Today Date: 26 Jul 2024\n\n<|eot_id|>" + ASKED_3, "<|eot_id|>"),
    "zephyr": (ZEPHYR, "<|user|>\nQ</s>\n<|assistant|>\n", "</s>"),
    "qwen2": (QWEN2, HELPFUL + ASK, "<|im_end|>"), "qwen2.5": (QWEN25.split("    {%- if enable_thinking")[0] +
                                                            "{%- endif %}\n", BY_QWEN + ASK, "<|im_end|>"),
    "qwen3": (QWEN25, BY_QWEN + ASK + "<think>\n\n</think>\n\n", "<|im_end|>"),
    "vicuna": (VICUNA_TURNS, CURIOUS + "USER: Q ASSISTANT:", "</s>"),
    "gemma": (GEMMA, "<start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>"),
    "phi": (turns(PHI, "{{ m['content'] + '<|end|>\n' }}", after="{{ '<|assistant|>\n' }}"),
            "<|user|>\nQ<|end|>\n<|assistant|>\n", "<|end|>"),
    "macro": (MACRO, "<user>Q|<bot>?", None),
    "parts alone": (TRL, CURIOUS + "USER: Q ASSISTANT: ", "</s>"),
    "an import": ("{% import 'x' as y %}{{ messages[0].content }}", None, "its grammar is not supported"),
    "an empty tag": ("{% %}{{ messages[0].content }}", None, "its tag {% %} is not supported"),
    "a filter": ("{{ messages[0].content | indent(4) }}", None, "'indent' is not supported"),
    "a system's part is missing": ("{{ messages[0].content + notes }}", None, "str and Undefined do not add up"),
    "it refuses": ("{{ raise_exception('a system message is needed') }}", None, "it says: a system message is"),
    "no question": ("{{ '[INST]' }}", None, "it leaves out the question"),
    "endless": ("{% for a in range(999) %}{% for b in range(999) %}{{ b }}{% endfor %}{% endfor %}", None,
                "it takes too many steps"),
    "huge": ("{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
             None, "it makes too long a text"),
    "python": ("{{ messages.__class__.__mro__ }}{{ messages[0].content }}", None, "__mro__ is not defined"),
    "a method": ("{{ '{:9}'.format(1) }}{{ messages[0].content }}", None, "'format') is not supported"),
    "none": ("", None, "missing")}
WAYS = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json", "processor_config.json")


def told(way, template):
    """The files of a chat template in one of four layouts."""
    listed = [{"name": "tool_use", "template": "?"}, {"name": "default", "template": template}]
    said = {"chat_template": listed if way.startswith("tok") else template}
    return {way.replace(".", "__"): template if way.endswith("jinja") else said} if template else {}


@pytest.mark.parametrize("name", TEMPLATES)
def test_v04_chat_templates_wherever_they_lie(name, tmp_path, capsys):
    """Rendered as transformers does for one turn without a system message, with the template's default one;
    unsupported syntax is refused by name."""
    template, asked, end = TEMPLATES[name]
    tensors = weights(lm_shapes(TINY))
    for i, way in enumerate(WAYS):
        folder = folder_of(tmp_path / str(i), TINY | {"model_type": "llama"}, tensors, **told(way, template))
        (folder / "special_tokens_map.json").write_text(json.dumps(
            {"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
        model = c.open_vlm(folder)
        if asked:
            assert model.prompt("Q") == asked and model.spec.stop == ((end,) if end else ()), way
            is_told = "the date: 26 Jul 2024" in capsys.readouterr().err
            assert is_told == ("strftime_now" in template)
            assert model.tokens.first == [model.tokens.id("<s>")] * ("bos_token" in template)
        else:
            err = refused(capsys, "Q", call=model.prompt)
            assert "give --template NAME, one of chatml, llama3" in err and end in err
            assert name == "none" or "is not supported" in err
    model = c.open_vlm(folder, template="llama2")
    assert model.prompt("Q") == "[INST] Q [/INST]" and model.spec.stop == ("</s>",)


def test_v04_a_captioner_with_a_template_of_its_own(tmp_path, capsys):
    """LLaVA in transformers' layout, fine-tuned with TRL or with a language model's template; Qwen2-VL."""
    text, v, tensors = llava_parts(["vision_tower"], 28, {"num_hidden_layers": 1})
    llava = dict(model_type="llava", text_config=text, vision_config=v | {"image_size": 28}), tensors
    v, tensors = qwen_parts(False)
    qwen = TINY | dict(model_type="qwen2_vl", vision_config=v, rope_scaling={"mrope_section": [2, 1, 1]}), tensors
    for i, (model, template, wanted) in enumerate([
            (llava, "", "USER: \0\nQ ASSISTANT:"), (llava, HF, "USER: \0\nQ ASSISTANT:"),
            (llava, TRL, CURIOUS + "USER: \0\nQ ASSISTANT: "),
            (llava, VICUNA_TURNS, CURIOUS + "USER: \0\nQ ASSISTANT:"),
            (llava, QWEN2, HELPFUL + ASK.replace("Q", "\0\nQ")), (qwen, "", HELPFUL + ASK.replace("Q", "\0Q")),
            (qwen, QWEN_VL, HELPFUL.replace("helpful", "terse") + ASK.replace("Q", "\0Q")),
            (qwen, QWEN2, HELPFUL + ASK.replace("Q", "\0Q")),
            (llava, "{{ '<start_of_turn>' }}", None), (qwen, "{{ '[INST]' }}", None)]):
        config, tensors = model
        folder = folder_of(tmp_path / str(i), config, tensors, **told("chat_template.json", template))
        (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
        model = c.open_vlm(folder)
        if wanted:
            assert model.prompt("Q") == wanted
            ids = model.read(wanted, [np.zeros((28, 28, 3), np.uint8)])[0]
            assert ids.count(-1) == 1
        else:
            assert "is not supported" in refused(capsys, "Q", call=model.prompt)
            gap = "\n" * (config["model_type"] == "llava")
            assert c.open_vlm(folder, template="mistral").prompt("Q") == f"[INST] \0{gap}Q [/INST]"


def test_v04_templates_of_other_folders_and_forms(tmp_path, capsys):
    """The model's own template comes before that of --tokenizer; LLaVA's own layout keeps the prompt of its
    code, and says that its template is not used."""
    tensors, config = weights(lm_shapes(TINY)), TINY | {"model_type": "llama"}
    other = folder_of(tmp_path / "t", config, None, **told("chat_template.jinja", GEMMA))
    for way, wanted in ("chat_template.jinja", TEMPLATES["qwen2"][1]), ("", TEMPLATES["gemma"][1]):
        folder = folder_of(tmp_path / f"m{way}", config, tensors, **told(way, QWEN2 if way else ""))
        assert c.open_vlm(folder, tokenizer=other).prompt("Q") == wanted
    text, v, tensors = llava_parts(["vision_tower"], 28)
    config = text | dict(model_type="llava", mm_vision_tower="clip", mm_projector_type="mlp2x_gelu",
                         mm_vision_select_layer=-2)
    for template in ("", VICUNA_TURNS):
        folder = folder_of(tmp_path / f"own{len(template)}", config, {
            llava_names("own", n): w for n, w in tensors.items()}, **told("chat_template.jinja", template))
        folder_of(folder / "clip", v | {"image_size": 28}, None, False)
        assert c.open_vlm(folder).prompt("Q") == c.VICUNA + "USER: \0\nQ ASSISTANT:"
        assert ("its chat template is not used" in capsys.readouterr().err) == bool(template)


@pytest.mark.parametrize("add_bos, add_eos", [(True, True), (True, False), (False, True), (False, False)])
def test_v05_no_end_stands_before_a_prompt(add_bos, add_eos, tmp_path):
    """add_eos_token adds </s> to a text; with add_bos_token false Llama's class adds no <s>, whatever
    tokenizer.json has."""
    folder = folder_of(tmp_path / "m", {}, None)
    table = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    begin, end = (table.token_to_id(mark) for mark in ("<s>", "</s>"))
    table.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A" + " </s>" * add_eos, special_tokens=[("<s>", begin), ("</s>", end)])
    table.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        add_bos_token=add_bos, add_eos_token=add_eos, tokenizer_class="LlamaTokenizer")))
    tokens = c.Tokens(folder)
    assert tokens.first == [begin] * add_bos and end not in tokens.encode("a dog")


def test_tokenizers_of_vocab_and_merges(tmp_path):
    """vocab.json of Stable Diffusion's and old Qwen2 folders gives the ids of tokenizer.json."""
    for name in ("clip-text/encoder", "vlm-qwen2"):
        source, folder = ROOT / "tests" / "fixtures" / name, tmp_path / name
        folder.mkdir(parents=True)
        for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            (folder / file).write_bytes((source / file).read_bytes())
        whole, pairs = c.Tokens(source), c.Tokens(folder)
        for text in ("A red dog's ball,  it isn't 2024!", "é 问 🙂\n\n x", "<|endoftext|> a", ""):
            assert pairs.encode(text) == whole.encode(text), (name, text)
        assert pairs.id("<|endoftext|>") == whole.id("<|endoftext|>") and len(pairs) == len(whole)
        about = json.loads((folder / "tokenizer_config.json").read_text())        # as of 4.33
        added = about.pop("added_tokens_decoder", {})
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
        (folder / "added_tokens.json").write_text(json.dumps(
            {token["content"]: int(i) for i, token in added.items()}))
        old = c.Tokens(folder)
        assert [old.id(token["content"]) for token in added.values()] == [*map(int, added)]
        assert old.encode("<|endoftext|> a") == whole.encode("<|endoftext|> a")


def test_slow_llama_tokenizers_by_what_legacy_says(tmp_path):
    """Equal to transformers: the slow class of 4.48.3 for legacy true, 5.24.0 for false; without the key, by
    the version that saved the folder."""
    lines = ["the quick brown fox jumps over the lazy dog", "a dog runs", "a cat sits on the mat", "hello world",
             "user asks: describe the picture in detail", "assistant: the picture shows a dog and a cat"] * 20
    file, out = tmp_path / "tokenizer.model", io.BytesIO()
    c.sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=340, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, remove_extra_whitespaces=False, normalization_rule_name="identity",
        hard_vocab_limit=False, num_threads=1, minloglevel=2)
    file.write_bytes(out.getvalue())
    pieces = c.sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    image = pieces.get_piece_size()
    wanted = {      # text: pieces with legacy, without
        "a dog": ("▁a ▁dog",) * 2, "<s>a dog": ("<s> ▁a ▁dog", "<s> a ▁dog"),
        "the cat</s>a dog runs": ("▁the ▁cat </s> ▁a ▁dog ▁ ru ns", "▁the ▁cat </s> a ▁dog ▁ ru ns"),
        "the cat <image>the dog": ("▁the ▁cat ▁ <image> ▁the ▁dog", "▁the ▁cat ▁ <image> t he ▁dog"),
        "<image>\nthe cat": ("<image> ▁ <0x0A> t he ▁cat", "<image> <0x0A> t he ▁cat"),
        "</s></s>hello": ("</s> </s> ▁ he llo", "</s> </s> he llo"), "": ("", ""),
        " a  dog": ("▁ ▁a ▁ ▁dog", "▁a ▁ ▁dog"), "\n\nhello": ("▁ <0x0A> <0x0A> he llo",) * 2,
        "a dog</s> runs <image>  x": ("▁a ▁dog </s> ▁ ▁ ru ns ▁ <image> ▁ ▁ ▁ x",
                                      "▁a ▁dog </s> ▁ ru ns ▁ <image> ▁ ▁ x")}
    for name, said, by, is_new in (
            ("LlamaTokenizer", True, "5.24.0", 0), ("LlamaTokenizer", False, "4.48.3", 1),
            ("LlamaTokenizerFast", False, None, 1), ("LlamaTokenizer", None, "4.31.0", 0),
            ("LlamaTokenizer", None, None, 0), ("LlamaTokenizer", None, "5.24.0", 1), ("Other", False, "5.24.0", 0)):
        told = dict(tokenizer_class=name, added_tokens_decoder={str(image): {"content": "<image>"}})
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(told | ({} if said is None else {"legacy": said})))
        (tmp_path / "config.json").write_text(json.dumps({"transformers_version": by}))
        tokens = c.Tokens(tmp_path)
        for text, both in wanted.items():
            result = [pieces.id_to_piece(i) if i < image else "<image>" for i in tokens.encode(text)]
            assert " ".join(result) == both[is_new], (text, said, by)
        assert tokens.decode(tokens.encode("a dog")) == "a dog" and tokens.first == [1]


def test_a_template_says_the_beginning_that_its_tokenizer_leaves_out(tmp_path):
    """As Llama 3's first tokenizers did; and an empty thought only where the template thinks."""
    tensors = weights(lm_shapes(TINY))
    for text, wants in (("{{ bos_token }}" + QWEN2, 1), (QWEN2, 0)):
        folder = folder_of(tmp_path / str(wants), TINY | {"model_type": "llama"}, tensors,
                           **told("chat_template.jinja", text))
        path = folder / "tokenizer_config.json"
        about = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(about | {"bos_token": {"content": "<s>"}}))
        table = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(table | {"post_processor": None}))
        model = c.open_vlm(folder)
        assert model.tokens.first == [model.tokens.id("<s>")] * wants


def test_a_prompt_that_is_not_known_is_refused_before_work(tmp_path, capsys):
    folder = folder_of(tmp_path / "m", TINY | {"model_type": "llama"}, weights(lm_shapes(TINY)))
    text, v, tensors = llava_parts(["vision_tower"], 28, {"num_hidden_layers": 1})
    vlm = c.open_vlm(folder_of(tmp_path / "v", dict(
        model_type="llava", text_config=text, vision_config=v | {"image_size": 28}), tensors))
    args = SimpleNamespace(frames=None, prompt=None, style="long", train=False)
    assert "give --template NAME" in refused(capsys, vlm, "v", args, c.open_vlm(folder), call=c.sampling_rules)
    assert c.sampling_rules(vlm, "v", args, c.open_vlm(folder, template="vicuna"))[1] == ["uniform", 4]
    assert "--template goes with" in refused(capsys, ["set", "--template", "vicuna"], call=c.parse)


# -- text encoders, CLIP and SigLIP ----------------------------------------------------------------

CLIP_TEXT = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                 vocab_size=270, max_position_embeddings=24)


def text_shapes(t):
    D = t["hidden_size"]
    return {"text_model.embeddings.token_embedding.weight": (t["vocab_size"], D),
            "text_model.embeddings.position_embedding.weight": (t["max_position_embeddings"], D),
            "text_model.final_layer_norm.weight": (D,), "text_model.final_layer_norm.bias": (D,),
            } | layer_shapes("text_model.encoder.", D, t["intermediate_size"], t["num_hidden_layers"])


@pytest.mark.parametrize("naming", ["4.36", "5.24", "module.", "whole"])
def test_v02_clip_text_of_every_naming(naming, tmp_path):
    """Names with text_model. or (transformers 5) without; no hidden_act: quick_gelu."""
    tensors, config = weights(text_shapes(CLIP_TEXT)), CLIP_TEXT | {"model_type": "clip_text_model"}
    named = {{"5.24": n.removeprefix("text_model."), "module.": f"module.{n}"}.get(naming, n): w.half()
             for n, w in tensors.items()}
    if naming == "whole":
        config = dict(model_type="clip", text_config=CLIP_TEXT, projection_dim=8)
    encoder = c.open_text_encoder(folder_of(tmp_path / "m", config, named))
    W = double({n: w.half() for n, w in tensors.items()})
    ids, mask = encoder.ids(["a dog"])
    x = W["text_model.embeddings.token_embedding.weight"][ids[0]]
    x = x + W["text_model.embeddings.position_embedding.weight"]
    x = blocks(W, CLIP_TEXT, x, 2, "text_model.encoder.", lambda y: y * (1.702 * y).sigmoid(), 1e-5,
               lambda i, j: j <= i)
    with torch.no_grad():
        near(encoder(ids, mask)[0][0], ln(x, W, "text_model.final_layer_norm", 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_siglip_whose_pictures_are_no_multiple_of_its_patches(dtype, tmp_path, capsys):
    """As in so400m-patch14-384, partial patches are dropped. A Gemma tokenizer identifies SigLIP 2."""
    t, v = CLIP_TEXT | {"max_position_embeddings": 24}, dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=38,
        patch_size=14)
    shapes = text_shapes(t) | vit_shapes(v, "vision_model.", True) | {
        "text_model.head.weight": (16, 16), "text_model.head.bias": (16,), "logit_scale": (1,),
        "vision_model.head.probe": (1, 1, 16), "vision_model.head.attention.in_proj_weight": (48, 16),
        "vision_model.head.attention.in_proj_bias": (48,), "vision_model.head.attention.out_proj.weight":
        (16, 16), "vision_model.head.attention.out_proj.bias": (16,), "logit_bias": (1,),
        "vision_model.head.layernorm.weight": (16,), "vision_model.head.layernorm.bias": (16,),
        "vision_model.head.mlp.fc1.weight": (24, 16), "vision_model.head.mlp.fc1.bias": (24,),
        "vision_model.head.mlp.fc2.weight": (16, 24), "vision_model.head.mlp.fc2.bias": (16,)}
    tensors = {n: w.to(dtype) for n, w in weights(shapes).items()}
    config = dict(model_type="siglip", text_config=t, vision_config=v)
    folder = folder_of(tmp_path / "m", config, tensors)
    scorer = c.Scorer(SimpleNamespace(clip=str(folder), aesthetics=None), folder, [], torch.device("cpu"))
    frame = np.random.default_rng(0).integers(0, 255, (50, 40, 3), np.uint8)
    pixels, W = scorer.picture(frame, 38)[0][0], double(tensors)
    act = lambda y: F.gelu(y, approximate="tanh")                        # noqa: E731
    x = ln(vit(W, v, pixels.double(), 2, "vision_model.", act, 1e-6), W, "vision_model.post_layernorm", 1e-6)
    assert len(x) == 4
    with torch.no_grad():
        near(scorer.model.tower(pixels[None])[0], x)
    assert -1 <= scorer.score([frame], "a dog")["clip"] <= 1
    for size in (38, {"height": 38, "width": 38}):
        (folder / "preprocessor_config.json").write_text(json.dumps(dict(size=size, resample=2)))
        picture = c.scored_picture(folder, 38, True)
        assert picture.func is c.squash and picture.keywords == dict(mean_std=c.HALF, how=2)
    for i, (more, files) in enumerate([
            ({}, dict(tokenizer_config__json={"tokenizer_class": "GemmaTokenizerFast"})),
            (dict(text_config=t | {"vocab_size": 256000}), {})]):
        folder = folder_of(tmp_path / str(i), config | more, {} if more else tensors, **files)
        said = refused(capsys, folder, call=c.open_text_encoder)
        assert "SigLIP 2" in said or more                                # sizes are checked first


CLIP_SIGHT = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                  image_size=28, patch_size=14)


def whole_clip():
    """(config.json, tensors) of a CLIP with both towers."""
    shapes = text_shapes(CLIP_TEXT) | vit_shapes(CLIP_SIGHT, "vision_model.") | {
        "visual_projection.weight": (8, 16), "text_projection.weight": (8, 16), "logit_scale": ()}
    return dict(model_type="clip", text_config=CLIP_TEXT, vision_config=CLIP_SIGHT, projection_dim=8), {
        n: w if w.dim() else torch.tensor(4.6) for n, w in weights(shapes).items()}


def scorer_of(folder):
    return c.Scorer(SimpleNamespace(clip=str(folder), aesthetics=None), folder, [], torch.device("cpu"))


@pytest.mark.parametrize("told, how", [
    ({}, (28, "crop", 3, c.CLIP_MEAN)), (dict(size=28, crop_size=28), (28, "crop", 3, c.CLIP_MEAN)),
    (dict(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, resample=2, do_center_crop=True),
     (32, "crop", 2, c.CLIP_MEAN)),
    (dict(size={"height": 28, "width": 28}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3,
          resample="1"), (28, "squash", 1, ((0.5,) * 3, (0.25,) * 3))),
    (dict(size={"shortest_edge": 28}, crop_size=24), "takes 28 x 28 px"),
    (dict(size={"shortest_edge": 28}, do_center_crop=False), "not cut: its model takes 28 x 28 px"),
    (dict(do_normalize=False), "has do_normalize False"),
    (dict(rescale_factor=1.0), "has rescale_factor 1.0"), (dict(resample=9), "9 is not a valid Resampling")])
@pytest.mark.parametrize("file", ["preprocessor_config__json", "processor_config__json"])
def test_v02_clip_sees_pictures_as_its_folder_says(told, how, file, tmp_path, capsys):
    """Mean, standard deviation, size, resampling and crop of --clip's image processor, in both files."""
    config, tensors = whole_clip()
    folder = folder_of(tmp_path / "m", config, tensors, **{
        file: {"image_processor": told} if file.startswith("processor") else told})
    if isinstance(how, str):
        assert how in refused(capsys, folder, call=scorer_of)
        return
    scorer, (short, cut, resample, mean_std) = scorer_of(folder), how
    frame = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    picture = Image.fromarray(frame)
    if cut == "squash":
        picture = picture.resize((28, 28), resample)
    else:
        h, w, edge = short, int(short * 60 / 40), (int(short * 60 / 40) - 28) // 2
        picture = picture.resize((w, h), resample).crop((edge, (h - 28) // 2, edge + 28, (h - 28) // 2 + 28))
    mean, std = (torch.tensor(each, dtype=torch.float64)[:, None, None] for each in mean_std)
    wanted = (torch.from_numpy(np.array(picture)).permute(2, 0, 1).double() / 255 - mean) / std
    near(scorer.picture(frame, scorer.size)[0][0], wanted, 1e-5)
    W, ids = double(tensors), scorer.text.ids(["a dog"])[0]
    seen = vit(W, CLIP_SIGHT, wanted, 2, "vision_model.")[0]
    seen = lin(ln(seen, W, "vision_model.post_layernorm", 1e-5), W, "visual_projection")
    x = W["text_model.embeddings.token_embedding.weight"][ids[0]]
    x = blocks(W, CLIP_TEXT, x + W["text_model.embeddings.position_embedding.weight"], 2, "text_model.encoder.",
               lambda y: y * (1.702 * y).sigmoid(), 1e-5, lambda i, j: j <= i)
    said = lin(ln(x, W, "text_model.final_layer_norm", 1e-5)[int((ids[0] == scorer.text.after).int().argmax())],
               W, "text_projection")
    scorer.text.end = scorer.text.after              # this tokenizer's EOS
    assert scorer.score([frame], "a dog")["clip"] == pytest.approx(float(F.cosine_similarity(seen, said, 0)),
                                                                   abs=1e-5)


@pytest.mark.parametrize("before", ["", "module.", "model.", "clip.model."])
def test_p02_text_encoders_under_wrappers_names(before, tmp_path):
    """CLIP's and T5's names with prefixes of pipelines and trainers; a T5 stack without encoder."""
    tensors, config = weights(text_shapes(CLIP_TEXT)), CLIP_TEXT | {"model_type": "clip_text_model"}
    want = c.open_text_encoder(folder_of(tmp_path / "want", config, tensors)).encode(["a dog"])[0]
    for bare in (False, True):
        named = {before + (n.removeprefix("text_model.") if bare else n): w for n, w in tensors.items()}
        result = c.open_text_encoder(folder_of(tmp_path / f"{bare}", config, named)).encode(["a dog"])[0]
        assert torch.equal(result, want)
    scored, whole = whole_clip()
    scorer = scorer_of(folder_of(tmp_path / "clip", scored, {before + n: w for n, w in whole.items()}))
    assert torch.equal(scorer.model.visual.weight, whole["visual_projection.weight"])
    t5 = dict(model_type="t5", d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=270,
              feed_forward_proj="gated-gelu")
    layer = "block.0.layer."
    shapes = {"shared.weight": (270, 16), "encoder.final_layer_norm.weight": (16,),
              f"encoder.{layer}0.layer_norm.weight": (16,), f"encoder.{layer}1.layer_norm.weight": (16,),
              f"encoder.{layer}0.SelfAttention.relative_attention_bias.weight": (32, 2),
              **{f"encoder.{layer}0.SelfAttention.{n}.weight": (16, 16) for n in "qkvo"},
              **{f"encoder.{layer}1.DenseReluDense.wi_{i}.weight": (24, 16) for i in (0, 1)},
              f"encoder.{layer}1.DenseReluDense.wo.weight": (16, 24)}
    tensors = weights(shapes)
    want = c.open_text_encoder(folder_of(tmp_path / "t5", t5, tensors)).encode(["a dog"])[0]
    whole = tensors | {f"decoder.{layer}0.layer_norm.weight": torch.ones(16)}
    bare = {n.replace("shared", "encoder.embed_tokens").removeprefix("encoder."): w for n, w in tensors.items()}
    for i, named in enumerate((tensors, whole, bare)):
        folder = folder_of(tmp_path / f"t5{i}", t5, {before + n: w for n, w in named.items()})
        assert torch.equal(c.open_text_encoder(folder).encode(["a dog"])[0], want)


@pytest.mark.parametrize("before", ["base_model.model.", "module.base_model.model.", "model."])
@pytest.mark.parametrize("is_late", [False, True])
def test_p02_captioners_under_peft_and_lightning(before, is_late, tmp_path, capsys):
    """Qwen2-VL's names of 4.45 and 4.52 after PEFT's, and in a LightningModule that calls it model."""
    v, tensors = qwen_parts(False)
    config = TINY | dict(model_type="qwen2_vl", vision_config=v, rope_scaling={"mrope_section": [2, 1, 1]})
    late = {n.replace("model.", "model.language_model.", 1).replace("visual.", "model.visual.", 1): w
            for n, w in tensors.items()}
    named = {before + n: w for n, w in (late if is_late else tensors).items()}
    model = c.open_vlm(folder_of(tmp_path / "m", config, named))
    assert torch.equal(model.decoder.layers[1].up.weight, tensors["model.layers.1.mlp.up_proj.weight"])
    q = before + "model.layers.0.self_attn.q_proj."
    folder = folder_of(tmp_path / "l", config, named | {f"{q}lora_A.default.weight": torch.zeros(2, 32)})
    assert "a LoRA that is not merged into its model" in refused(capsys, folder, call=c.open_vlm)


def test_a_lora_beside_a_config_is_named(tmp_path, capsys):
    told = dict(peft_type="LORA", base_model_name_or_path="Qwen/Qwen2-VL-7B-Instruct")
    for config in (TINY | {"model_type": "llama"}, CLIP_TEXT | {"model_type": "clip_text_model"}):
        folder = folder_of(tmp_path / config["model_type"], config, None, adapter_config__json=told)
        save_file({"base_model.model.a.lora_A.weight": torch.zeros(2)}, folder / "adapter_model.safetensors")
        err = refused(capsys, folder, call=c.open_text_encoder if "clip" in str(folder) else c.open_vlm)
        assert "is a LoRA adapter of Qwen/Qwen2-VL-7B-Instruct: merge it" in err


@pytest.mark.parametrize("more", [
    dict(rms_norm_eps="1e-5", hidden_size="32", num_attention_heads="4"), dict(tie_word_embeddings="false"),
    dict(rope_scaling={"type": "linear", "factor": "4.0"}), dict(rope_theta="10000.0"),
    dict(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=None),
    dict(rope_scaling=None, quantization_config=None, architectures=None, text_config=None, layer_types=None,
         partial_rotary_factor=None, attention_bias=None, head_dim=None, bos_token_id=None)])
def test_v02_numbers_as_text_and_nulls(more, tmp_path, capsys):
    """Numbers as strings are converted; a null is an absent key, as in transformers."""
    tensors = weights(lm_shapes(TINY))
    model = c.open_vlm(folder_of(tmp_path / "m", TINY | {"model_type": "llama"} | more, tensors))
    rope = {k: float(v) if k == "factor" else v for k, v in (more.get("rope_scaling") or {}).items()}
    W = double(tensors)
    near(logits_of(model, model.request("a", IDS, [], None, [])), lm(
        W, TINY | dict(rope=rope, rms_norm_eps=float(more.get("rms_norm_eps", 1e-6))),
        W["model.embed_tokens.weight"][IDS], torch.arange(len(IDS)).expand(3, -1)))
    assert model.spec.longest == (2048 if "max_position_embeddings" in more else 0)
    folder = folder_of(tmp_path / "n", TINY | {"model_type": "llama", "num_attention_heads": None}, tensors)
    assert "must be numbers above 0" in refused(capsys, folder, call=c.open_vlm)


def test_v02_clip_whose_parts_are_null(tmp_path, capsys):
    """Old configs with text_config_dict: the class's sizes, or those of the other dict."""
    config, tensors = whole_clip()
    said = dict(config, text_config=None, vision_config=None, text_config_dict=CLIP_TEXT,
                vision_config_dict=CLIP_SIGHT)
    assert scorer_of(folder_of(tmp_path / "m", said, tensors)).size == 28
    config = dict(config, text_config=None)
    assert "token_embedding.weight is [270, 16], not [49408, 512]" in refused(
        capsys, folder_of(tmp_path / "n", config, tensors), call=scorer_of)


def test_activations_by_every_name_of_transformers():
    """ACT2FN's names; each is one of four formulas."""
    x = torch.linspace(-6, 6, 99, dtype=torch.float64)
    tanh = 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
    curves = {"gelu gelu_python": x * 0.5 * (1 + torch.erf(x / 2**0.5)), "silu swish": x / (1 + (-x).exp()),
              "gelu_new gelu_fast gelu_accurate gelu_pytorch_tanh gelu_python_tanh": tanh, "relu": x.clamp(min=0),
              "quick_gelu": x / (1 + (-1.702 * x).exp())}
    assert {name for names in curves for name in names.split()} == set(c.ACTS)
    for names, curve in curves.items():
        for name in names.split():
            near(c.ACTS[name](x), curve, 1e-9)


# -- generation_config.json ------------------------------------------------------------------------

def greedy(model, said, n, penalty=1.0, size=0):
    """n greedy tokens by transformers' formulas of repetition_penalty and no_repeat_ngram_size."""
    ids = list(said)
    for _ in range(n):
        x = torch.cat([model.decoder.embed.weight[ids]])[None]
        scores = model.decoder.logits(model.decoder(x, torch.arange(len(ids))[None]))[0, -1].tolist()
        for i in set(ids):
            scores[i] *= 1 / penalty if scores[i] >= 0 else penalty
        for i in range(size and len(ids) - size + 1):
            if ids[i:i + size - 1] == ids[len(ids) - size + 1:]:
                scores[ids[i + size - 1]] = -math.inf
        ids.append(int(np.argmax(scores)))
    return ids[len(said):]


@pytest.mark.parametrize("where", ["generation_config__json", "config__json"])
@pytest.mark.parametrize("penalty, size", [(1.05, 0), (1.3, 0), (0.8, 0), (1.0, 1), (1.0, 2), (1.1, 3)])
@torch.no_grad()
def test_answers_are_held_back_as_generation_config_says(penalty, size, where, tmp_path):
    """Greedy answers, alone and in a batch; sampled ones obey the rule; the prompt counts."""
    config, said = TINY | {"model_type": "llama"}, dict(repetition_penalty=penalty, no_repeat_ngram_size=size)
    tensors = weights(lm_shapes(TINY))
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:1] + 0.02 * tensors["lm_head.weight"]    # all near
    tensors |= {n: 0.05 * w for n, w in tensors.items() if "o_proj" in n or "down" in n}  # the last token decides
    more = {where: said} if where.startswith("gen") else {}
    model = c.open_vlm(folder_of(tmp_path / "m", config | (said if not more else {}), tensors, **more),
                       template="vicuna")
    assert model.penalties == (penalty, size)
    prompts = [IDS, ([7] + greedy(model, [7], 2)) * 2, [7]]
    prompts[1].pop()                                                         # the token that would follow
    wanted = [greedy(model, ids, 12, penalty, size) for ids in prompts]
    assert any(wanted[i] != greedy(model, ids, 12) for i, ids in enumerate(prompts))
    requests = [model.request(str(i), ids, [], None, []) for i, ids in enumerate(prompts)]
    for batch in (1, 3):
        result = {int(request.key): ids for request, ids, _ in c.generate(
            model.decoder, requests, batch, 12, penalties=model.penalties)}
        assert [result[i] for i in range(3)] == wanted
    (_, ids, score), = c.generate(model.decoder, requests[:1], 1, 1, penalties=model.penalties)
    raw = logits_of(model, requests[0])[-1].log_softmax(-1)[ids[0]]
    assert score == pytest.approx(float(raw), abs=1e-5)                      # the model's own
    for _, ids, _ in c.generate(model.decoder, requests, 3, 12, temperature=2.0, penalties=(1.0, 1)):
        assert len(set(ids)) == 12
    called, plain = [], c.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c, "generate", lambda *at: called.append(at[-1]) or plain(*at))
        list(model.write(requests[:1], most=2))
    assert called == [(penalty, size)]


def test_what_is_seen_counts_as_its_slot_where_the_published_code_counts_it(tmp_path):
    """Qwen2-VL passes ids to generate(), LLaVA's own code only embeddings."""
    v, tensors = qwen_parts(False)
    config = TINY | dict(model_type="qwen2_vl", vision_config=v, rope_scaling={"mrope_section": [2, 1, 1]})
    model = c.open_vlm(folder_of(tmp_path / "m", config, tensors))
    for is_video in (False, True):
        request, _ = picture(model, is_video)
        assert request.counted == [model.tokens.id("<|video_pad|>" if is_video else "<|image_pad|>")
                                if i < 0 else i for i in request.ids] and -1 in request.ids
    model.spec.counts_prompt = False
    assert picture(model)[0].counted == []


def test_what_generation_config_says_and_is_not_applied_is_named(tmp_path, capsys):
    config, tensors = TINY | {"model_type": "llama"}, weights(lm_shapes(TINY))
    said = dict(num_beams=4, suppress_tokens=[1, 2], repetition_penalty="1.1", temperature=0.2, top_k=1, do_sample=True)
    V.say_once.cache_clear()
    model = c.open_vlm(folder_of(tmp_path / "m", config, tensors, generation_config__json=said))
    err = capsys.readouterr().err
    assert "num_beams 4, suppress_tokens [1, 2] of its generation_config.json: not applied" in err
    assert err.count("\n") == 1 and model.penalties == (1.1, 0)
    usual = dict(num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0, suppress_tokens=None, guidance_scale=None)
    model = c.open_vlm(folder_of(tmp_path / "n", config | {"repetition_penalty": 1.5}, tensors,
                                 generation_config__json=usual))
    assert capsys.readouterr().err == "" and model.penalties is None         # generation_config.json comes first
    for i, wrong in enumerate((dict(repetition_penalty=-1), dict(no_repeat_ngram_size=1.5),
                               dict(repetition_penalty=[2]), dict(no_repeat_ngram_size=-1))):
        folder = folder_of(tmp_path / str(i), config, tensors, generation_config__json=wrong)
        told = refused(capsys, folder, call=c.open_vlm)
        assert "generation_config.json" in told or "no_repeat_ngram_size -1: above 0" in told or "above 0" in told


# -- refusals --------------------------------------------------------------------------------------

@pytest.mark.parametrize("says, config", [
    ("quantized by gptq", dict(quantization_config={"quant_method": "gptq", "bits": 4})),
    ("quantized by awq", dict(quantization_config={"quant_method": "awq"})),
    ("quantized by fp8", dict(quantization_config={"quant_method": "fp8"})),
    ("quantized by bitsandbytes", dict(quantization_config={"quant_method": "bitsandbytes"})),
    ("model_type qwen3_moe is not supported: llama, mistral", dict(model_type="qwen3_moe")),
    ("model_type llava_next is not supported", dict(model_type="llava_next")),
    ("a LlamaForSequenceClassification, which generates no text", dict(
        architectures=["LlamaForSequenceClassification"])),
    ("rope_scaling yarn is not supported", dict(rope_scaling={"rope_type": "yarn", "factor": 4.0})),
    ("rope_scaling longrope is not supported", dict(rope_scaling={"type": "longrope"})),
    ("'factor' is missing", dict(rope_scaling={"type": "linear"})),
    ("attention_bias is True", dict(attention_bias=True)), ("mlp_bias is True", dict(mlp_bias=True)),
    ("use_sliding_window is True", dict(model_type="qwen2", use_sliding_window=True)),
    ("partial_rotary_factor", dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5))),
    ("layer_types", dict(model_type="qwen2", layer_types=["full_attention", "sliding_attention"]))])
def test_refusals_name_the_one_cause(says, config, tmp_path, capsys):
    folder = folder_of(tmp_path / "m", TINY | {"model_type": "llama"} | config, weights(lm_shapes(TINY)))
    err = refused(capsys, folder, call=c.open_vlm)
    assert says in err and len(err) < 400, err
    if "quantized" in says:
        nested = {"text_config": TINY | config, "model_type": "llava", "vision_config": CLIP_L}
        assert says in refused(capsys, folder_of(tmp_path / "n", nested, None), call=c.open_vlm)
        (tmp_path / "t").mkdir()
        (tmp_path / "t" / "config.json").write_text(json.dumps({"model_type": "t5"} | config))
        assert says in refused(capsys, tmp_path / "t", call=c.open_text_encoder)


def test_other_folders_are_refused_in_one_line(tmp_path, capsys):
    """CogVLM2 as published (without num_multi_query_heads), LLaVA-1.6, LLaVA of other parts, a LoRA
    adapter, integer weights, missing shards, T5 v1.0."""
    v = dict(hidden_size=1792, image_size=1344, num_positions=9217, num_hidden_layers=63, num_heads=16,
             intermediate_size=15360, hidden_act="gelu", layer_norm_eps=1e-6, patch_size=14)
    cog = dict(architectures=["CogVLMForCausalLM"], hidden_size=4096, intermediate_size=14336,
               template_version="chat", vision_config=v, vocab_size=128256)
    text, sight, tensors = llava_parts(["vision_tower"], 28, {"num_hidden_layers": 1})
    port = dict(model_type="llava", text_config=text, vision_config=sight | {"image_size": 28})
    own = text | dict(model_type="llava_llama", mm_vision_tower="openai/clip", mm_hidden_size=16,
                      mm_projector_type="mlp2x_gelu")
    for i, (says, config, weight) in enumerate([
            ("a CogVLM2, which is not supported", cog, {"model.vision.conv.weight": torch.zeros(1)}),
            ("no folder clip within or beside it", own, tensors),
            ("vision_config is siglip_vision_model", port | dict(
                vision_config=sight | {"model_type": "siglip_vision_model"}), tensors),
            ("vision_config is pixtral", port | {"vision_config": {"model_type": "pixtral"}}, tensors),
            ("text_config is of a phi: known are llama, mistral", port | {"text_config": {"model_type": "phi"}},
             tensors), ("select strategy full", port | dict(vision_feature_select_strategy="full"), tensors),
            ("as quantized weights are", TINY | {"model_type": "llama"}, {
                n: w.to(torch.int8) for n, w in weights(lm_shapes(TINY)).items()})]):
        assert says in refused(capsys, folder_of(tmp_path / str(i), config, weight), call=c.open_vlm)
    folder_of(tmp_path / "own" / "clip", sight | {"image_size": 28}, None, False)
    for i, (says, more) in enumerate([("image_aspect_ratio is anyres", dict(image_aspect_ratio="anyres")),
                                      ("mm_projector_type is linear", dict(mm_projector_type="linear")),
                                      ("mm_video_tower", dict(mm_video_tower="LanguageBind_Video"))]):
        folder = folder_of(tmp_path / "own" / str(i), own | more, tensors)
        assert says in refused(capsys, folder, call=c.open_vlm)
    folder = folder_of(tmp_path / "lora", {}, None, adapter_config__json={"peft_type": "LORA"})
    (folder / "config.json").unlink()
    assert "is a LoRA adapter" in refused(capsys, folder, call=c.open_vlm)
    folder = folder_of(tmp_path / "t5", dict(model_type="t5"), {})
    assert "feed_forward_proj relu of a t5" in refused(capsys, folder, call=c.open_text_encoder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused_by_name(value, dtype, tmp_path, capsys):
    """One number of one tensor, as the file names it; large finite ones are read."""
    tensors = {n: w.to(dtype) for n, w in weights(lm_shapes(TINY)).items()}
    q = "model.layers.1.self_attn.k_proj.weight"
    large = {q: torch.full_like(tensors[q], torch.finfo(dtype).max)}         # their sum overflows
    config = TINY | {"model_type": "llama"}
    assert c.open_vlm(folder_of(tmp_path / "large", config, tensors | large)).penalties is None
    tensors[q][3, 4] = value
    folder = folder_of(tmp_path / "m", config, tensors)
    assert f"{folder}: {q} holds 1 numbers that are NaN or infinite" in refused(capsys, folder, call=c.open_vlm)
    tensors = {n: w.to(dtype) for n, w in weights(text_shapes(CLIP_TEXT)).items()}
    name = "text_model.final_layer_norm.weight"
    tensors[name][0] = value
    folder = folder_of(tmp_path / "t", CLIP_TEXT | {"model_type": "clip_text_model"}, tensors)
    assert f"{name} holds 1" in refused(capsys, folder, call=c.open_text_encoder)


def test_refusals_name_the_files_tensors(tmp_path, capsys):
    """Tensors that are missing, of another shape, or unexpected have the file's names in the message."""
    text, v, tensors = llava_parts(["vision_tower"], 28)
    config, body = dict(model_type="llava", text_config=text, vision_config=v | {"image_size": 28}), "language_model."
    q, fc = f"{body}model.layers.1.self_attn.q_proj.weight", "vision_tower.vision_model.encoder.layers.0.mlp.fc1."
    for i, (drop, change, says) in enumerate([
            ([q], {}, f"{q} is missing"), ([f"{fc}bias"], {}, f"{fc}bias is missing"),
            ([f"{body}lm_head.weight"], {}, "lm_head.weight is missing"),
            ([], {q: torch.zeros(9, 32)}, f"{q} is [9, 32], not [32, 32]"),
            ([], {f"{body}model.layers.1.mlp.gates.weight": torch.zeros(2)}, "layers.1.mlp.gates.weight is unexpected"),
            ([], {f"{body}model.layers.7.self_attn.q_proj.weight": torch.zeros(2)},
             f"{body}model.layers.7.self_attn.q_proj.weight is unexpected")]):
        named = {n: w for n, w in (tensors | change).items() if n not in drop}
        err = refused(capsys, folder_of(tmp_path / str(i), config, named), call=c.open_vlm)
        assert says in err and "decoder." not in err and "tower.layers" not in err, err
    v, tensors = qwen_parts(True)
    config = TINY | dict(model_type="qwen2_5_vl", vision_config=v, rope_scaling={"mrope_section": [2, 1, 1]})
    for i, (name, shape, says) in enumerate([
            ("visual.blocks.1.attn.qkv.weight", (95, 32), "has 95 rows, which 2 queries"),
            ("visual.blocks.5.attn.qkv.weight", (96, 32), "is unexpected")]):
        folder = folder_of(tmp_path / f"q{i}", config, tensors | {name: torch.zeros(shape)})
        assert f"{name} {says}" in refused(capsys, folder, call=c.open_vlm)


def test_a_tokenizer_of_another_model_is_refused_before_work(tmp_path, capsys):
    """Refused when the question is encoded; of a text encoder when it is opened."""
    config = TINY | {"model_type": "llama", "vocab_size": 100}
    model = c.open_vlm(folder_of(tmp_path / "m", config, weights(lm_shapes(config))), template="vicuna")
    args = SimpleNamespace(frames=None, prompt=None, style="long", train=False)
    assert "they do not belong together" in refused(capsys, model, "m", args, call=c.sampling_rules)
    config = CLIP_TEXT | {"model_type": "clip_text_model", "vocab_size": 200}
    folder = folder_of(tmp_path / "t", config, weights(text_shapes(config)))
    assert "they do not belong together" in refused(capsys, folder, call=c.open_text_encoder)


@pytest.mark.parametrize("form", ["model-{}.safetensors", "pytorch_model-{}.bin", "diffusion_pytorch_model-{}.bin",
                                  "model.fp16-{}.safetensors", "model-{}.bf16.safetensors",
                                  "diffusion_pytorch_model.fp16-{}.safetensors"])
def test_v05_shards_without_an_index(form, tmp_path, capsys):
    """In all namings of variants, exactly one complete set of files is read."""
    kept = {name: torch.full((2,), float(i)) for i, name in enumerate("abc")}

    def write(form, tensors, n=3):
        names = sorted(tensors)
        for i in range(n):
            part = {name: tensors[name] for name in names[i::n]}
            path = tmp_path / form.format(f"{i + 1:05d}-of-{n:05d}")
            torch.save(part, path) if path.suffix == ".bin" else save_file(part, path)
    write(form, kept)
    write("optimizer-{}.bin", {"d": torch.ones(1)}, 1)
    stray = tmp_path / form.format("00001-of-00002")                     # of an earlier save
    torch.save({"a": torch.ones(9)}, stray) if stray.suffix == ".bin" else save_file({"a": torch.ones(9)}, stray)
    assert str(c.read_tensors(tmp_path)) == str(kept)
    write("model.fp32-{}.safetensors", {name: t + 1 for name, t in kept.items()})   # better than half
    result = c.read_tensors(tmp_path)
    assert result.keys() == kept.keys() and result["c"][0] == (2 if "16" not in form else 3)
    for path in tmp_path.glob("*fp32*"):
        path.unlink()
    (tmp_path / form.format("00002-of-00003")).unlink()
    capsys.readouterr()                              # which of two variants is read
    assert "holds 1 of 2 shards" in refused(capsys, tmp_path, call=c.read_tensors)
    stray.unlink()
    assert "holds 2 of 3 shards" in refused(capsys, tmp_path, call=c.read_tensors)


def test_v05_a_captioner_of_shards_and_variants(tmp_path):
    tensors = weights(lm_shapes(TINY))
    folder = folder_of(tmp_path / "m", TINY | {"model_type": "llama"}, None)
    names = sorted(tensors)
    for i in range(2):
        part = {name: tensors[name] for name in names[i::2]}
        save_file({name: t.half() * 0 for name, t in part.items()},
                  folder / f"model.fp16-{i + 1:05d}-of-00002.safetensors")
        save_file(part, folder / f"model-{i + 1:05d}-of-00002.safetensors")
    assert torch.equal(c.open_vlm(folder).decoder.embed.weight, tensors["model.embed_tokens.weight"])
    for path in folder.glob("model-*"):
        path.unlink()
    assert not c.open_vlm(folder).decoder.embed.weight.any()


def test_r06_training_starts_without_git(tmp_path):
    """In a PATH without any program, as python:3.11-slim has no git."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import train_vae; "
            "train_vae.start_run('run', {'kind': 'captioner', 'args': {}}); print(train_vae.git_revision())")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, text=True,
                          env=dict(os.environ, PATH=str(tmp_path)), capture_output=True)
    assert done.returncode == 0 and done.stdout.strip() == "None", done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["git"] is None


def test_what_stands_in_a_files_place_is_named(tmp_path, capsys):
    """Pointers of Git LFS, a folder's folder, a file of a folder, LoRA's additions."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4096\n"
    for name in ("model.safetensors", "pytorch_model.bin"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(pointer)
        with pytest.raises(SystemExit):
            V.read_tensors(folder)
        assert "is a Git LFS pointer" in capsys.readouterr().err
    hub = tmp_path / "models--a--b" / "snapshots" / "0123"
    hub.mkdir(parents=True)
    (hub / "config.json").write_text("{}")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    for path, says in ((hub.parents[1], f"name {hub}"), (hub / "config.json", f"name {hub}"),
                       (tmp_path / "lora", "merge_and_unload")):
        with pytest.raises(SystemExit):
            V.read_config(path, "captioner")
        assert says in capsys.readouterr().err


def test_folders_that_are_not_what_is_asked_are_named(tmp_path, capsys):
    """Other things instead of weights, of the index's files, of model_type, of a tokenizer."""
    def line(call, name, config, tensors=None, lies=(), tokenizer=True):
        folder = folder_of(tmp_path / name, config, tensors, tokenizer)
        for each in lies:
            path = folder / each
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"GGUF" + bytes(40))
        return refused(capsys, folder, call=call)
    llama, tensors = TINY | {"model_type": "llama"}, weights(lm_shapes(TINY))
    for i, (lies, says) in enumerate([
            ("llama-Q4_K_M.gguf", "llama-Q4_K_M.gguf is there, GGUF is quantized"),
            ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.safetensors is there, a LoRA: merge it"),
            ("adapter_model.bin", "adapter_model.bin is there, a LoRA: merge it"),
            ("model.safetensors.incomplete", "a download that did not end"),
            (".cache/huggingface/download/abc.0f.incomplete", "abc.0f.incomplete is there, a download that did not"),
            ("tf_model.h5", "tf_model.h5 is there, a form that is not read")]):
        assert says in line(c.open_vlm, f"lies{i}", llama, None, [lies])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "x.gguf").write_bytes(b"GGUF")
    for call in (c.open_vlm, c.open_text_encoder, V.load_published):
        assert "x.gguf is there, GGUF is quantized" in refused(capsys, tmp_path / "bare", call=call)
    for file in ("x.gguf", "x.safetensors.incomplete"):
        (tmp_path / file).write_bytes(b"GGUF" if "gguf" in file else b"")
        assert ("GGUF" if "gguf" in file else "did not end") in refused(capsys, tmp_path / file, call=V.read_tensors)
    folder = folder_of(tmp_path / "index", llama, None)
    names = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "names 2 files, of which 2 are not there: fetch model-00001-of-00002.safetensors and the others" in refused(
        capsys, folder, call=c.open_vlm)
    save_file({n: t for n, t in tensors.items() if "00001" in names[n]}, folder / names[min(tensors, key=names.get)])
    assert "of which 1 are not there: fetch model-00002-of-00002.safetensors" in refused(capsys, folder, call=c.open_vlm)
    bare = {k: v for k, v in llama.items() if k not in ("model_type", "architectures")}
    assert 'names neither model_type nor architectures: fetch the published one, or add "model_type", one of llama' in (
        line(c.open_vlm, "kindless", bare, tensors))
    assert "its config.json names no model_type: known text encoders are t5" in line(
        c.open_text_encoder, "kindless_t", {k: v for k, v in CLIP_TEXT.items() if k != "model_type"}, {})
    assert "its config.json names no model_type" in line(scorer_of, "kindless_c", {"projection_dim": 24}, {})
    told = line(c.open_text_encoder, "mute", CLIP_TEXT | {"model_type": "clip_text_model"},
                weights(text_shapes(CLIP_TEXT)), tokenizer=False)
    assert "has no tokenizer" in told and "put those of the published folder there" in told and "--" not in told
    assert "--" not in line(c.open_vlm, "mute_lm", llama, tensors, tokenizer=False)
    v, sees = qwen_parts(False)
    config = TINY | dict(model_type="qwen2_vl", vision_config=v, rope_scaling={"mrope_section": [2, 1, 1]})
    assert "by --tokenizer" in line(c.open_vlm, "mute_vlm", config, sees, tokenizer=False)


def test_a_plain_file_comes_before_variants_and_the_line_says_so(tmp_path, capsys):
    """As transformers and diffusers do without `variant`; the file times do not matter."""
    for i, stem in enumerate(("model", "diffusion_pytorch_model", "pytorch_model")):
        folder, end = tmp_path / stem, "bin" if "py" in stem[:2] else "safetensors"
        folder.mkdir()
        for n, name in enumerate((f"{stem}.{end}", f"{stem}.fp16.{end}")):
            (torch.save if end == "bin" else save_file)({"a": torch.full((2,), float(n))}, folder / name)
            os.utime(folder / name, (1e9 + n, 1e9 + n))
        V.say_once.cache_clear()
        assert V.read_tensors(folder)["a"].tolist() == [0, 0]
        assert f"{stem}.{end} is read; {stem}.fp16.{end} beside it is not" in capsys.readouterr().err
        (folder / f"{stem}.{end}").unlink()
        V.say_once.cache_clear()
        assert V.read_tensors(folder)["a"].tolist() == [1, 1] and not capsys.readouterr().err


def test_templates_by_who_reads_them(tmp_path):
    """For a language model the tokenizer's files come first, for a captioner the processor's. The default in
    additional_chat_templates/ is used."""
    files = dict(chat_template="J", processor_config="P", tokenizer_config="T")
    for name, template in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"chat_template": template}))
    assert (c.chat_template(tmp_path, True), c.chat_template(tmp_path)) == ("T", "J")
    (tmp_path / "chat_template.json").unlink()
    assert (c.chat_template(tmp_path, True), c.chat_template(tmp_path)) == ("T", "P")
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("R")
    assert c.chat_template(tmp_path, True) == "T"
    (more / "default.jinja").write_text("D")
    assert (c.chat_template(tmp_path, True), c.chat_template(tmp_path)) == ("D", "D")
    (tmp_path / "chat_template.jinja").write_text("X")
    assert c.chat_template(tmp_path, True) == "X"
    config, tensors = TINY | {"model_type": "llama"}, weights(lm_shapes(TINY))
    template = "{% for m in messages %}A {{ m['content'] }} B{% endfor %}"
    model = c.open_vlm(folder_of(tmp_path / "m", config, tensors, chat_template__json={"chat_template": "{{ nothing"},
                                 tokenizer_config__json={"chat_template": template}))
    assert model.spec.prompt == "A {q} B"


@pytest.mark.parametrize("made, pads", [("CLIPImageProcessor", False), ("CLIPImageProcessorFast", False),
                                        ("LlavaImageProcessor", True), ("LlavaImageProcessorFast", True), (None, True)])
def test_do_pad_is_of_llavas_own_image_processor(made, pads, tmp_path):
    text, v, tensors = llava_parts(["vision_tower"], 28)
    config = dict(model_type="llava", text_config=text, vision_config=v | {"image_size": 28})
    told = dict(do_pad=True, **({"image_processor_type": made} if made else {}))
    model = c.open_vlm(folder_of(tmp_path / "m", config, tensors, preprocessor_config__json=told))
    assert (model.spec.picture.func is c.pad_square) == pads


def test_a_folder_that_was_saved_twice(tmp_path, capsys):
    """diffusers reads an index before a whole file, transformers the other way round; two sets of
    shards without an index are refused."""
    for stem, wanted in (("diffusion_pytorch_model", 2.0), ("model", 1.0)):
        folder = tmp_path / stem
        folder.mkdir()
        save_file({"a": torch.ones(2)}, folder / f"{stem}.safetensors")
        part = f"{stem}-00001-of-00001.safetensors"
        save_file({"a": 2 * torch.ones(2)}, folder / part)
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {"a": part}}))
        assert V.read_tensors(folder)["a"].tolist() == [wanted] * 2
    for n in (1, 2):
        for i in range(n):
            save_file({f"b{i}": torch.ones(2)},
                      tmp_path / f"model-{i + 1:05d}-of-{n:05d}.safetensors")
    with pytest.raises(SystemExit):
        V.read_tensors(tmp_path)
    assert "two sets of shards" in capsys.readouterr().err


@pytest.mark.parametrize("wrap", [
    lambda state: {"module": state, "epoch": 1}, lambda state: {"state_dict": state},
    lambda state: {f"_orig_mod.module.{name}": x for name, x in state.items()},
    lambda state: {f"module._orig_mod.{name}": x for name, x in state.items()},
    lambda state: {f"_forward_module.{name}": x for name, x in state.items()}])
def test_p02_state_dicts_in_training_checkpoints(wrap, tmp_path):
    state = {"model.norm.weight": torch.arange(3.0), "lm_head.weight": torch.ones(2, 3)}
    torch.save(wrap(state), tmp_path / "pytorch_model.bin")
    result = c.published_tensors(tmp_path, c.LM_MARK)
    assert result.keys() == state.keys() and all(torch.equal(result[k], state[k]) for k in state)


@pytest.mark.parametrize("before", ["", "module.", "base_model.model.", "wrapped.pipe.", "net._orig_mod."])
def test_p02_one_rule_for_what_stands_before_names(before):
    """For denoisers, autoencoders, towers, text encoders and captioners; other networks' tensors are ignored."""
    for mark, ours, names in (
            (D.MARK, "", "x_embedder.proj.weight blocks.0.a"), (V.MARK, "", "encoder.conv_in.weight decoder.a"),
            (c.TOWER_MARK, "", "vision_model.embeddings.patch_embedding.weight vision_model.a"),
            (*c.T5_MARK, "encoder.block.0.layer.0.layer_norm.weight shared.weight "
             "decoder.block.0.layer.0.layer_norm.weight"),
            (*c.CLIP_MARK, "text_model.embeddings.token_embedding.weight text_projection.weight"),
            (c.LM_MARK, "", "model.embed_tokens.weight model.a visual.a lm_head.weight"),
            (c.LM_MARK, "", "language_model.model.embed_tokens.weight vision_tower.a"),
            (c.LM_MARK, "", "model.language_model.embed_tokens.weight model.visual.a lm_head.weight")):
        beside = {"text_encoders.a": 0} if before.startswith("wrapped") else {}
        result = V.unwrapped({**{before + name: i for i, name in enumerate(names.split())}, **beside}, mark, ours)
        assert result == {name: i for i, name in enumerate(names.split())}, (mark, before)


def test_a_vocabulary_with_holes(tmp_path):
    table = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<u>": 1, "z": 9}, "<u>"))
    table.save(str(tmp_path / "tokenizer.json"))
    assert len(c.Tokens(tmp_path)) == 10


def test_pictures_that_are_squeezed_are_refused(tmp_path):
    for size, is_known in (({"shortest_edge": 28}, True), ({"height": 28, "width": 28}, False)):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(
            {"do_center_crop": True, "size": size, "crop_size": {"height": 28, "width": 28}}))
        with contextlib.nullcontext() if is_known else pytest.raises(ValueError, match="size"):
            c.image_processor(tmp_path, 28)
