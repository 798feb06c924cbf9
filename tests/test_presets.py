"""Every name in the tables of denoisers and captioners: one training step and one sample, narrower."""
import math
from types import SimpleNamespace

import pytest
import torch

import caption
import train_dit as D
import train_vae as V
from kernels.optim import MuonAdamW

NAMED = [name for name, preset in D.MODELS.items() if "dim" in preset]       # the others take --init's
Z, CODES = 4, 11


def narrow(preset):
    """The preset with narrow layers and few of them, as a run on latents of Z channels opens it."""
    kind = preset.get("kind", "video")
    small = {**preset, "dim": 48, "heads": 2, "depth": min(4, preset["depth"])}
    for key, value in dict(ffn=64, text_dim=24, image_dim=16 * bool(preset.get("image_dim")),
                           classes=5, text=(16, 1, 2), clip=(24, 7)).items():
        small.update({key: value} if preset.get(key) else {})
    if preset.get("text"):
        small["vocab"] = 300
    if kind == "gpt":
        return {**small, "shape": (2, 4, 8), "codes": CODES, "code_dim": 6}
    return small | {"video": dict(channels=Z), "wan": dict(channels=Z, out_channels=Z),
                    "uvit": dict(channels=Z, size=(1, 16, 16))}.get(
                        kind, dict(channels=Z, out_channels=2 * Z, grid=None))


def texts_of(options, n):
    if options.get("classes"):
        return list(range(n))
    width = options.get("text_dim") or (options.get("clip") or [0])[0]
    if width and not options.get("text"):
        return [torch.randn(options["clip"][1] if "clip" in options else 3 + i, width)
                for i in range(n)]
    return [[5 + i, 7, 2] for i in range(n)] if options.get("text") else [[]] * n


VAE = V.Autoencoder(dim=4, mults=(1,), downs=(), n_res=1, z_dim=Z)
CODED = SimpleNamespace(decode_codes=lambda codes: torch.zeros(len(codes), 3, 1, 8, 8))


@pytest.mark.parametrize("name", NAMED)
def test_every_denoiser_learns_and_samples(name):
    torch.manual_seed(0)
    options = narrow(D.MODELS[name])
    model, kind = D.Denoiser(**options), options.get("kind", "video")
    texts, args = texts_of(options, 2), SimpleNamespace(
        lr=1e-2, warmup=0, schedule="constant", steps=1)
    own = {"dit": ("ddpm", "ddpm"), "uvit": ("noise", "sd")}.get(kind, ("velocity", "linear"))
    if kind == "gpt":
        model.dit.codebook.normal_()
        shapes = [(1, *options["shape"])] * 2
        row, tensors = D.lay_out(shapes, [None] * 2, texts, 1, (1, 1, 1)), [
            torch.randint(CODES, (2, *options["shape"]))]
    else:
        model.objective = D.objective_of(dict(objective=own[0], path=own[1], weighting="none",
                                              shift=1.0, shift_tokens=0))
        shapes = [(Z, 1, 16, 16)] * 2 if kind == "uvit" else [(Z, 2, 8, 8), (Z, 1, 8, 16)]
        row = D.lay_out(shapes, [8.0, 8.0], texts, 4, model.dit.patch, None, kind)
        x0, noise = (D.patchify([torch.randn(s) for s in shapes], model.dit.patch) for _ in "ab")
        tensors = [x0, noise, torch.tensor([0.3, 0.8])]
    if options.get("image_dim"):                 # what sample.py gives with --image; see below
        row.image = torch.randn(10, options["image_dim"])
        row.cu_image = torch.tensor([0, 5, 10], dtype=torch.int32)
    before = [p.detach().clone() for p in model.parameters()]
    losses, _, _ = D.losses_of(model, row, *tensors, dtype="fp32")
    losses.sum().backward()
    norm = V.take_step(model, MuonAdamW(model), V.lr_at(0, args))
    assert losses.isfinite().all() and losses.min() > 0 and 0 < norm < math.inf
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    model.eval()
    if options.get("image_dim"):
        assert model(tensors[0], tensors[2], row).shape == tensors[0].shape
        return
    if kind == "gpt":
        videos = D.sample_codes(model, CODED, texts, torch.rand(2, math.prod(options["shape"])))
    else:
        none = options["classes"] - 1 if options.get("classes") else texts[0]
        videos = D.generate(model, VAE, {"latents_mean": [0.0] * Z, "latents_std": [1.0] * Z}, shapes,
                            [8.0, 8.0], texts, [torch.randn(s) for s in shapes], 2, negative=none)
    assert len(videos) == 2


@pytest.mark.parametrize("name", caption.MODELS)
def test_every_captioner_learns_and_captions(name):
    torch.manual_seed(0)
    preset = caption.MODELS[name]
    small = dict(preset, channels=8, width=16 * preset["heads"], tower_depth=1, depth=1)
    model = caption.Captioner(**small, vocab=300)
    x = torch.rand(2, small["frames"], 3, small["size"], small["size"])
    ids = torch.randint(3, 300, (2, 6))
    loss, words = caption.losses(model, x, ids)
    (loss + words).backward()
    norm = V.take_step(model, MuonAdamW(model, plain=("head", "words", "position", "stem")), 1e-2)
    assert 0 < norm < math.inf and loss.isfinite()
    assert len(model.eval().generate(x, 4)) == 2


@pytest.mark.parametrize("positions, is_placed", [("seconds", False), ("both", True)])
def test_a_flat_frame_tells_its_places_by_added_positions_alone(positions, is_placed):
    """Rotary positions say how far tokens are from each other: of equal tokens all come out equal;
    with sin-cos ones as well a token knows where in the frame it is."""
    torch.manual_seed(0)
    model = D.DiT(4, 32, 2, 2, (1, 1, 1), text_dim=8, positions=positions)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    row = D.lay_out([(4, 2, 3, 3)], [8.0], [[2]], 4, (1, 1, 1))
    row.cu_text = torch.tensor([0, 1], dtype=torch.int32)
    out = model(torch.ones(len(row.table_index), 4), torch.ones(len(row.cu_seqlens) - 1), row, torch.ones(1, 8))
    assert (out[:18].std(0).max() > 1e-3) == is_placed
