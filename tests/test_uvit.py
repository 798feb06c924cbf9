"""U-ViT on packed rows and VideoGPT's prior: published sizes and files, packed equals alone, codes
drawn one by one equal the whole."""
import argparse
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_dit as D

FIXTURES = Path(__file__).with_name("fixtures")
SMALL = dict(channels=3, size=(3, 8, 8), patch=2, dim=32, depth=4, heads=2)
KINDS = {"plain": {}, "class": dict(classes=7), "text": dict(clip=(12, 5)),
         "pixels": dict(conv=False, qkv_bias=True, time_mlp=True, hidden=48, classes=3)}
SHAPES = [(3, 3, 4, 8), (3, 1, 8, 6), (3, 2, 2, 2)]
GPT = dict(shape=(2, 4, 8), codes=11, code_dim=5, dim=24, depth=2, heads=2)


def shaken(make, **options):
    """A model whose parameters are far from their initial values."""
    torch.manual_seed(0)
    model = make(**options).eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    if make is D.GPT:
        model.codebook.normal_()
    return model


def conditions(kind, n):
    random = torch.Generator().manual_seed(1)
    if "classes" in KINDS[kind]:
        return torch.randint(3, (n,), generator=random)
    return torch.randn(n, 5, 12, generator=random) if "clip" in KINDS[kind] else None


# -- U-ViT -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("null_tokens", [0, 9])
def test_packed_equals_each_clip_alone(kind, null_tokens):
    """Nothing of the clips beside it, nor NaN in the padding, reaches a clip or a gradient."""
    model = shaken(D.UViT, **{**SMALL, **KINDS[kind]})
    random = torch.Generator().manual_seed(2)
    clips = [torch.randn(shape, generator=random) for shape in SHAPES]
    t, condition = torch.tensor([1.0, 999.5, 300.0]), conditions(kind, 3)
    x = D.patchify(clips, model.patch)
    out = model(torch.cat([x, torch.full((null_tokens, 12), math.nan)]), t, condition, SHAPES)
    assert len(out) == len(x) + null_tokens and not out[len(x):].any()
    out.square().sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for b, clip in enumerate(clips):
        alone = model(D.patchify([clip], model.patch), t[b:b + 1],
                      None if condition is None else condition[b:b + 1], SHAPES[b:b + 1])
        start = sum(math.prod(shape) // 12 for shape in SHAPES[:b])
        torch.testing.assert_close(out[start:start + len(alone)], alone, rtol=1e-4, atol=1e-5)
        alone.square().sum().backward()
    for name, p in model.named_parameters():
        bound = 2e-5 * max(1.0, packed[name].abs().max())
        assert torch.allclose(p.grad, packed[name], atol=bound, rtol=1e-4), name


def test_skips_come_last_in_first_out():
    """The innermost blocks are a pair: the first out-block takes the last in-block's output."""
    model, seen = shaken(D.UViT, **SMALL), []
    for block in [*model.in_blocks, *model.out_blocks]:
        block.register_forward_hook(lambda block, given, out: seen.append((given, out)))
    model(torch.randn(16, 12), torch.tensor([5.0]), None, [(3, 1, 8, 8)])
    (_, first), (_, second), (inner, _), (outer, _) = seen
    assert inner[2] is second and outer[2] is first


def test_initial_values():
    torch.manual_seed(0)
    model = D.UViT(**{**SMALL, "dim": 128}, classes=500, qkv_bias=True)
    assert abs(model.pos_embed.std() - 0.02) < 1e-3
    assert abs(model.label_emb.weight.std() - 1) < 0.02
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert abs(module.weight.std() / 0.02 - 1) < 0.1 and not module.bias.any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_tells_its_sizes(kind, tmp_path):
    """Plain files and training folders; what is read is written back, bit for bit."""
    options = {**SMALL, "size": (1, 8, 8), **KINDS[kind]}
    model = shaken(D.UViT, **options)
    folder = tmp_path / "7.ckpt"
    folder.mkdir()
    for path in (tmp_path / "net.pth", folder / "nnet_ema.pth"):
        torch.save(model.state_dict(), path)
    for path in (tmp_path / "net.pth", folder):
        loaded, layout, result = D.load_published(path, heads=2, text_tokens=5)
        assert layout == "uvit" and {key: result[key] for key in options} == options
        assert same(loaded.state_dict(), model.state_dict())
        assert not loaded.training and all(p.requires_grad for p in loaded.parameters())


def test_published_widths_tell_the_heads(tmp_path):
    for dim, heads in ((64, 1), (128, 2), (1152, 16)):
        torch.save(D.UViT(**{**SMALL, "size": (1, 2, 2), "dim": dim, "depth": 0, "heads": 1,
                             "hidden": 4}).state_dict(), tmp_path / "net.pth")
        assert D.load_published(tmp_path / "net.pth")[2]["heads"] == heads


def same(a, b):
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(
        a[name], b[name]) for name in a)


class Foreign:
    pass


@pytest.mark.parametrize("what, told", [
    ("heads", "heads (unknown; width 32)"), ("tokens", "must form a square"),
    ("lacks", "norm.bias"), ("more", "extra"), ("other", "no DiT, SiT, U-ViT"), ("half", "not whole"),
    ("class", "test_uvit.Foreign"), ("text", "cannot be read"), ("none", "no such file")])
def test_what_does_not_load_is_refused_in_a_line(what, told, tmp_path, capsys):
    path, state = tmp_path / "net.pth", shaken(D.UViT, **{**SMALL, "size": (1, 8, 8)},
                                               clip=(12, 5)).state_dict()
    if what in ("lacks", "half"):
        del state["norm.bias" if what == "lacks" else "pos_embed"]
    saved = {"more": state | {"extra": torch.ones(1)}, "other": {"model": {"a": torch.ones(1)}},
             "class": state | {"about": Foreign()}}.get(what, state)
    torch.save(saved, path)
    if what == "text":
        path.write_text("no weights")
    elif what == "none":
        path.unlink()
    with pytest.raises(SystemExit) as stopped:
        D.load_published(path, heads=None if what == "heads" else 2,
                         text_tokens=77 if what == "tokens" else 5)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and told in message and message.count("\n") == 1, message


# -- VideoGPT's prior ------------------------------------------------------------------------------

GPTS = {"full": {}, "sparse": dict(sparse=True, shape=(2, 8, 8)), "class": dict(classes=3)}


def opened(kind):
    options = {**GPT, **GPTS[kind]}
    model = shaken(D.GPT, **options)
    codes = torch.randint(options["codes"], (2, *options["shape"]))
    return model, codes, torch.tensor([2, 0]) if kind == "class" else None


def test_the_default_size_is_the_published_one():
    with torch.device("meta"):
        model = D.GPT((4, 32, 32), 2048, 256, 576, 8, 4)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}" == "33.2"


@pytest.mark.parametrize("kind", GPTS)
def test_no_code_sees_itself_or_later_ones(kind):
    model, codes, label = opened(kind)
    before = model(codes, label).flatten(1, 3)
    for place in (0, 17, codes[0].numel() - 1):
        other = codes.flatten(1).clone()
        other[:, place] = (other[:, place] + 1) % 11
        after = model(other.view_as(codes), label).flatten(1, 3)
        torch.testing.assert_close(after[:, :place + 1], before[:, :place + 1])
        assert place + 1 == before.shape[1] or not torch.allclose(after[:, place + 1],
                                                                  before[:, place + 1])


@pytest.mark.parametrize("kind", GPTS)
def test_codes_drawn_one_by_one_equal_the_whole(kind):
    """Each drawn code is the one that the full pass over all of them gives for the same number."""
    model, codes, label = opened(kind)
    draws = torch.rand(2, codes[0].numel())
    drawn = D.generate_codes(model, draws, label, temperature=0.7)
    below = (model(drawn, label).flatten(1, 3) / 0.7).softmax(-1).cumsum(-1)         # [B, L, K]
    at = drawn.flatten(1)[..., None]
    low = torch.where(at > 0, below.gather(-1, (at - 1).clamp(min=0)), 0.0)
    assert drawn.shape == codes.shape and len(drawn.unique()) > 3
    high, u = below.gather(-1, at), draws[..., None]
    assert ((u >= low - 1e-5) & (u <= high + 1e-5)).all()
    cold = D.generate_codes(model, draws, label, temperature=1e-4)
    assert (model(cold, label).argmax(-1) == cold).float().mean() > 0.97             # but for ties


@pytest.mark.parametrize("shape", [(4, 32, 32), (2, 16, 16), (2, 2, 64), (3, 4, 8), (8, 4, 4)])
def test_which_blocks_a_block_sees(shape):
    """Against the rule, block by block: near in raster order, or moved along one earlier axis."""
    last = next(i for i in (2, 1, 0) if i == 0 or math.prod(shape[i:]) > 32)
    grid = [*shape[:last], math.prod(shape[last:]) // 32]
    places = list(torch.cartesian_prod(*map(torch.arange, grid)).view(-1, len(grid)).tolist())
    mask = D.sparse_mask(shape, torch.device("cpu"))
    for row, a in enumerate(places):
        for column, b in enumerate(places):
            moved = [axis for axis in range(len(grid)) if a[axis] != b[axis]]
            is_seen = column <= row and (row - column <= 4 or len(moved) == 1
                                         and moved[0] != len(grid) - 1)
            part = mask[32 * row:32 * row + 32, 32 * column:32 * column + 32]
            assert torch.equal(part, torch.ones(32, 32).tril(0 if row == column else 32).bool()
                               if is_seen else torch.zeros_like(part)), (row, column)


def test_dropout_is_of_training_alone():
    model, codes, _ = opened("full")
    assert torch.equal(model(codes), model(codes))
    model.train()
    assert not torch.allclose(model(codes), model(codes))


@pytest.mark.parametrize("name", ["videogpt-gpt-class", "videogpt-gpt-sparse"])
def test_a_checkpoint_is_written_back_bit_for_bit(name):
    about = json.loads((FIXTURES / name / "fixture.json").read_text())["args"]["gpt"]
    path = FIXTURES / name / "gpt.ckpt"
    model, options, vqvae = D.load_gpt(path)
    assert options["depth"] == about["layers"]
    assert options["sparse"] == (about["attn_type"] == "sparse")
    assert same(D.gpt_state(model, vqvae), D.read_tensors(path)["state_dict"])
    assert torch.equal(model.codebook, vqvae["codebook.embeddings"])
    codes = next(x for key, x in load_file(FIXTURES / name / "io.safetensors").items()
                 if key.endswith("in.codes"))
    assert options["shape"] == codes.shape[1:]


@pytest.mark.parametrize("what, told", [("frames", "ResNet-34"), ("state", "state_dict"),
                                        ("shape", "fc_in.weight")])
def test_a_checkpoint_of_another_form_is_refused(what, told, tmp_path, capsys):
    file = D.read_tensors(FIXTURES / "videogpt-gpt-sparse" / "gpt.ckpt")
    args = vars(file["hyper_parameters"]["args"])
    if what == "frames":
        args["n_cond_frames"] = 1
    if what == "shape":
        file["state_dict"]["fc_in.weight"] = torch.zeros(1, 1)
    saved = {"state_dict": file["state_dict"],
             "hyper_parameters": {"args": argparse.Namespace(**args)}}
    torch.save(file["state_dict"] if what == "state" else saved, tmp_path / "gpt.ckpt")
    with pytest.raises(SystemExit):
        D.load_gpt(tmp_path / "gpt.ckpt")
    assert told in capsys.readouterr().err


def test_lightning_classes_become_data(tmp_path, monkeypatch):
    """Files of Lightning 1.x name its classes as keys and hold its dictionary of options."""
    made = []
    for path, base in (("utilities.parsing.AttributeDict", dict),
                       ("callbacks.model_checkpoint.ModelCheckpoint", object)):
        *parts, name = f"pytorch_lightning.{path}".split(".")
        for n in range(1, len(parts) + 1):
            module = types.ModuleType(".".join(parts[:n]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        made.append(type(name, (base,), {"__module__": module.__name__}))
        setattr(module, name, made[-1])
    torch.save({"callbacks": {made[1]: {"best": 1.5}}, "options": made[0](heads=4),
                "args": argparse.Namespace(layers=8)}, tmp_path / "file.ckpt")
    file = D.read_tensors(tmp_path / "file.ckpt")
    assert file["options"]["heads"] == 4 and vars(file["args"])["layers"] == 8
    assert list(file["callbacks"].values()) == [{"best": 1.5}]
