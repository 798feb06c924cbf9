"""Bottlenecks, losses, figures and fine-tuning of the autoencoder: each on its own, then by command."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import prepare_data
import sample as S
import train_dit as D
import train_vae as V

FIXTURES = Path(__file__).with_name("fixtures")
SMALL = ["--steps", "2", "--eval_every", "2", "--log_every", "1", "--n_eval", "6", "--batch", "2",
         "--size", "16", "--frames", "5"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small data set named demo, where the commands run."""
    folder = tmp_path_factory.mktemp("vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare_data.main(["demo", "--demo_files", "8"])
        yield folder


# ---- parts

def test_every_clip_comes_once_an_epoch_and_steps_have_equal_pixels():
    rows = [{"key": f"k{i}", "frames": 1 + 8 * (i % 2), "height": 16 + 8 * (i % 3), "width": 16}
            for i in range(60)]
    shape = lambda row: (row["frames"], row["height"], row["width"])
    budget = V.Budget(rows, 0, 3, 0.0, shape, 1)
    for epoch in range(2):
        steps = [budget(epoch * budget.n_steps + i) for i in range(budget.n_steps)]
        keys = [row["key"] for step in steps for row, _ in step]
        assert sorted(keys) == sorted(row["key"] for row in rows)
        pixels = [sum(math.prod(shape(row)) for row, _ in step) for step in steps]
        assert max(pixels) - min(pixels) <= 2 * 9 * 32 * 16
    at = budget.n_steps + 2
    assert V.Budget(rows, 0, 3, 0.0, shape, 1)(at) == budget(at)
    stills = V.Budget(rows, 0, 3, 0.5, shape, 1)
    drawn = [is_still for i in range(stills.n_steps) for _, is_still in stills(i)]
    assert len(drawn) == 60 and 15 < sum(drawn) < 45 and stills.n_steps < budget.n_steps
    with pytest.raises(SystemExit):
        V.Budget(rows, 0, 1, 0.0, shape, 4)


def test_a_codebook_finds_the_clusters_and_restarts_dead_codes():
    torch.manual_seed(0)
    centres, book = 5 * torch.randn(16, 4), V.Codebook(48, 4)
    book.codebook[:40] = 99.0                                         # far from everything
    for _ in range(60):
        z = centres[torch.randint(16, (256,))] + 0.05 * torch.randn(256, 4)
        codes = book.codes(z.T[None, :, None, None])[0, 0, 0]
        book.update(z, codes, 0.9)
        book.restart(z[torch.randperm(256)[:48]])
    away = (centres[:, None] - book.codebook).norm(dim=-1)
    assert away.min(1).values.max() < 0.2
    assert V.perplexity(codes, 48) > 12
    z = torch.randn(2, 4, 3, 2, 2, requires_grad=True)
    chosen, codes, loss = book(z)
    assert torch.allclose(chosen, book.lookup(codes)) and loss.shape == (2,)
    chosen.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))                    # straight through


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (3, 4), (2,)])
def test_fsq_codes_and_points_are_one_to_one(levels):
    book = V.FSQ(levels)
    points = book.codebook
    assert points.shape == (math.prod(levels), len(levels)) and len(points.unique(dim=0)) == len(points)
    assert points.min() >= -1 and points.max() <= 1
    z = 3 * torch.randn(2, len(levels), 3, 4, 4)
    chosen, codes, loss = book(z)
    assert torch.allclose(chosen, book.lookup(codes), atol=1e-6) and (loss == 0).all()
    assert torch.equal(book.codes(z), codes) and codes.max() < book.n_codes
    if len(levels) == 2:
        assert len(codes.unique()) == book.n_codes


def test_scores_equal_their_formulas():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 2, 24, 24) * 2 - 1
    assert torch.allclose(V.ssim(x, x), torch.ones(2)) and (V.flicker(x, x) == 0).all()
    a, b = x[:1, :1, :1, :11, :11], (0.5 * x + 0.2)[:1, :1, :1, :11, :11]
    line = np.exp(-(np.arange(11) - 5.0)**2 / 4.5)
    w = np.outer(line, line) / line.sum()**2                          # the one window, by hand
    p, q = a.double().numpy()[0, 0, 0], b.double().numpy()[0, 0, 0]
    mp, mq = (w * p).sum(), (w * q).sum()
    vp, vq, c = (w * p * p).sum() - mp**2, (w * q * q).sum() - mq**2, (w * p * q).sum() - mp * mq
    by_hand = (2 * mp * mq + 4e-4) * (2 * c + 36e-4) / ((mp**2 + mq**2 + 4e-4) * (vp + vq + 36e-4))
    assert V.ssim(a, b).item() == pytest.approx(by_hand, abs=1e-5)
    other = x.clone()
    other[:, :, 1] = (x[:, :, 1] + 2 / 255 * 10).clamp(-1, 1)
    assert 8 < V.flicker(other, x).mean() < 10.1                       # ten levels brighter at once


def test_blended_tiles_equal_the_untiled_result():
    x = torch.randn(1, 2, 3, 50, 37, dtype=torch.float64)
    same = V.tiled(lambda part, _: part, x, 16, 1)
    assert torch.allclose(same, x, atol=1e-12)
    twice = lambda part, _: part.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert torch.allclose(V.tiled(twice, x, 16, 2), twice(x, 0), atol=1e-12)
    half = lambda part, _: part[..., ::4, ::4]
    x = torch.randn(1, 2, 3, 64, 48, dtype=torch.float64)
    assert torch.allclose(V.tiled(half, x, 32, 0.25), half(x, 0), atol=1e-12)
    steps = V.tiled(lambda part, place: torch.zeros_like(part) + place[1], x, 16, 1)[0, 0, 0, 0]
    assert steps[0] == 0 and steps[-1] == 32 and steps.diff().abs().max() <= 6   # no seam jumps


def lpips_by_hand(vgg, linear, y, x):
    """The published formula, a frame of [B, 3, T, H, W] at a time."""
    shift, scale = (torch.tensor(each)[:, None, None] for each in (
        (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    frames = []
    for t in range(x.shape[2]):
        pair, place, total = [(video[:, :, t] - shift) / scale for video in (y, x)], 0, 0
        for i, widths in enumerate(V.Perceptual.WIDTHS):
            if i:
                pair, place = [F.max_pool2d(h, 2) for h in pair], place + 1
            for _ in widths:
                weight, bias = (vgg[f"features.{place}.{kind}"] for kind in ("weight", "bias"))
                pair = [F.conv2d(h, weight, bias, padding=1).clamp(min=0) for h in pair]
                place += 2
            a, b = (h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10) for h in pair)
            total = total + ((a - b)**2 * linear[f"lin{i}.model.1.weight"]).sum(1).mean((1, 2))
        frames.append(total)
    return torch.stack(frames).mean(0)


def test_lpips_is_the_published_formula_and_is_read_by_its_published_names(tmp_path, capsys):
    torch.manual_seed(0)
    vgg, place, width = {"classifier.0.weight": torch.zeros(1)}, 0, 3
    for widths in V.Perceptual.WIDTHS:
        for c_out in widths:
            vgg[f"features.{place}.weight"] = torch.randn(c_out, width, 3, 3) / (3 * width**0.5)
            vgg[f"features.{place}.bias"] = 0.1 * torch.randn(c_out)
            place, width = place + 2, c_out
        place += 1
    linear = {f"lin{i}.model.1.weight": torch.rand(1, n[0], 1, 1) for i, n in
              enumerate(V.Perceptual.WIDTHS)}
    torch.save(vgg, tmp_path / "vgg.pth")
    torch.save(linear, tmp_path / "lpips.pth")
    lpips = V.Perceptual(tmp_path / "vgg.pth", tmp_path / "lpips.pth")
    x = torch.rand(2, 3, 2, 16, 16) * 2 - 1
    y = (x + 0.3 * torch.randn_like(x)).requires_grad_()
    away = lpips(y, x)
    assert away.shape == (2,) and (away > 1e-3).all() and (lpips(x, x) == 0).all()
    assert torch.allclose(away, lpips_by_hand(vgg, linear, y, x), rtol=1e-5)
    away.sum().backward()
    assert y.grad.abs().sum() > 0
    del linear["lin3.model.1.weight"]
    torch.save(linear, tmp_path / "lpips.pth")
    with pytest.raises(SystemExit):
        V.Perceptual(tmp_path / "vgg.pth", tmp_path / "lpips.pth")
    assert "lin3.model.1.weight is missing" in capsys.readouterr().err


def test_the_adversarial_weight_is_the_ratio_of_gradient_norms():
    layer = nn.Linear(4, 4)
    y = layer(torch.randn(3, 4))
    a, b = y.square().mean(), 5 * y.abs().mean()
    grads = [torch.autograd.grad(each, layer.weight, retain_graph=True)[0] for each in (a, b)]
    weight = V.adaptive_weight(a, b, layer.weight)
    assert weight.item() == pytest.approx((grads[0].norm() / (grads[1].norm() + 1e-4)).item())


def test_held_out_clips_without_a_split_are_drawn_by_hash():
    rows = [{"key": f"k{i}", "split": "train"} for i in range(100)]
    train, held = V.split_rows(rows, "x")
    assert len(held) == 5 and len(train) == 95 and V.split_rows(rows[::-1], "x")[1] == held
    official = [{**row, "split": "val" if i < 3 else "train"} for i, row in enumerate(rows)]
    assert [row["key"] for row in V.split_rows(official, "x")[1]] == ["k0", "k1", "k2"]


def test_few_held_out_clips_become_five_files_or_shots(tmp_path, capsys):
    """Whole files, so that no shot is on both sides; shots or clips where files are few; an official
    split, and that of a run from before, stay."""
    def made(n_files, n_shots=1, n_pieces=1):
        return [{"key": f"f{i}-{k}-{j}", "source": f"f{i}.mp4", "shot_start": float(k),
                 "split": prepare_data.drawn_split(f"f{i}.mp4")}
                for i in range(n_files) for k in range(n_shots) for j in range(n_pieces)]

    def units(rows, *names):
        train, held = V.split_rows(rows, "x")
        sides = [{tuple(row[name] for name in names) for row in part} for part in (train, held)]
        assert not sides[0] & sides[1] and len(train) + len(held) == len(rows)
        assert V.split_rows(rows[::-1], "x")[0] == train[::-1]
        return len(sides[1])
    drawn = {row["source"] for row in made(25, 4) if row["split"] == "val"}
    assert 0 < len(drawn) < 5 and units(made(25, 4), "source") == 5
    assert drawn < {row["source"] for row in V.split_rows(made(25, 4), "x")[1]}
    assert "5 of 25 files" in capsys.readouterr().err
    assert units(made(7, 8, 2), "source", "shot_start") >= 5
    assert "shots are held out, since five files" in capsys.readouterr().err
    assert units(made(1, 1, 20), "key") == 5 and units(made(1, 1, 3), "key") == 1
    assert units(made(10), "source") == 2
    assert made(1)[0]["split"] == "val"                      # a draw that leaves nothing to learn
    capsys.readouterr()
    one = V.split_rows(made(1), "x")
    assert one[0] == one[1] == made(1) and "its only clip is trained and evaluated on" in capsys.readouterr().err
    large = [{**row, "split": "train"} for row in made(400)]
    assert units(large, "source") == 20
    uneven = large[:25] + [{**large[0], "key": f"long{i}", "shot_start": float(i)}
                           for i in range(500)]
    train, held = V.split_rows(uneven, "x")
    assert len(held) <= len(uneven) / 4
    official = [{**row, "split": "val" if row["source"] == "f24.mp4" else "train"}
                for row in made(25)]
    assert official[-1]["split"] != made(25)[-1]["split"]
    assert [row["key"] for row in V.split_rows(official, "x")[1]] == ["f24-0-0"]
    for run, more, n in (("old", {}, len(drawn)), ("new", {"split": "files"}, 5)):
        (tmp_path / run).mkdir()
        V.write_config(tmp_path / run, {"format": 1, "kind": "vae", "args": {}, **more})
        assert len(V.split_rows(made(25), "x", tmp_path / run)[1]) == n
    V.start_run(tmp_path / "made", {"kind": "vae", "args": {}})
    assert not V.has_older_split(tmp_path / "made") and V.has_older_split(tmp_path / "old")


# ---- commands

def log(run):
    return V.read_log(Path("runs") / run)


def coded(name):
    """Trains an autoencoder with codes and encodes the data set; a finished one stays as it is."""
    options = {"vq": ["--codes", "32"], "fsq": ["--codes", "5", "4", "3", "--stills", "0.5"]}
    V.main(["demo", "--run", name, *SMALL, "--bottleneck", name, *options[name]])
    V.main(["demo", "--encode", "--vae", name])


@pytest.mark.parametrize("name, n_codes", [("vq", 32), ("fsq", 60)])
def test_codes_are_trained_and_encoded(place, name, n_codes):
    coded(name)
    row = log(name)[-1]
    assert 0 < row["usage"] <= 1 and 1 <= row["perplexity"] <= n_codes
    model, config = V.load_autoencoder(name)
    assert model.n_codes == n_codes and model.bottleneck.codebook.shape == (n_codes, model.z_dim)
    path = next(Path("data/demo").glob(f"*.latents-{config['hash']}.safetensors"))
    header, codes = V.read_header(path), load_file(path)
    assert header["codes"] == n_codes and not header["alone"] and set(codes) == set(header["clips"])
    for key, code in list(codes.items())[:5]:
        facts = header["clips"][key]
        assert code.dtype == torch.int32 and 0 <= code.min() and code.max() < n_codes
        assert code.shape == (1 + (facts["frames"] - 1) // 4, facts["crop"][2] // 8, facts["crop"][3] // 8)
        video = model.decode_codes(code[None].long())
        assert video.shape[2:] == (facts["frames"], *facts["crop"][2:])


def test_a_prior_of_real_codes_is_sampled(place):
    coded("fsq")
    D.main(["demo", "--run", "prior", "--vae", "fsq", "--model", "gpt-xs", "--steps", "2",
            "--eval_every", "2"])
    assert 0 < V.read_log("runs/prior")[-1]["held_out"] < 2 * math.log(60)
    S.main(["prior", "--prompt", "a red circle moves left", "--device", "cpu"])
    video = list(prepare_data.Video(Path("runs/prior/samples/a-red-circle-moves-left-s0.mp4")))
    model = S.load_denoiser("prior")[0]
    times, rows, columns = model.dit.shape
    assert len(video) == 1 + 4 * (times - 1)
    assert (video[0].height, video[0].width) == (8 * rows, 8 * columns)


def test_a_run_with_codes_and_a_discriminator_resumes_bit_for_bit(place):
    options = [*SMALL, "--bottleneck", "vq", "--codes", "16", "--gan", "0.1", "--gan_start", "1"]
    V.main(["demo", "--run", "whole", *options, "--steps", "4", "--schedule", "constant"])
    V.main(["demo", "--run", "broken", *options, "--schedule", "constant"])
    V.main(["demo", "--run", "broken", *options, "--steps", "4", "--schedule", "constant"])
    a, b = (load_file(Path(f"runs/{run}/step-000004/{part}.safetensors"))
            for part in ("model", ) for run in ("whole", "broken"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    terms = log("whole")
    assert "gan" not in terms[0] and all(
        math.isfinite(terms[3][name]) for name in ("l1", "mse", "latent", "gan", "discriminator"))
    assert {path.name for path in Path("runs/whole/step-000004").iterdir()} == {
        f"{part}{end}.safetensors" for part in ("model", "discriminator")
        for end in ("", "-optimizer")} | {"state.json"}


@pytest.mark.parametrize("source", ["sd-vae", "wan-vae-original", "videogpt-vqvae/vqvae.ckpt"])
def test_published_weights_are_fine_tuned_and_encode(place, source):
    path, name = str(FIXTURES / source), f"tuned-{source[:3]}"
    V.main(["demo", "--run", name, "--init", path, *SMALL, "--decoder_only", "--lr", "1e-3"])
    before, after = V.load_autoencoder(path)[0].state_dict(), V.load_autoencoder(name)[0].state_dict()
    moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert "decoder" in moved and moved <= set(V.DECODER)
    V.main(["demo", "--encode", "--vae", path, "--max_cells", "9999"])
    config = V.load_autoencoder(path)[1]
    header = V.read_header(next(Path("data/demo").glob(f"*.latents-{config['hash']}.safetensors")))
    assert header["autoencoder"] == config["hash"] and ("codes" in header) == ("gpt" in source)


class Colours(nn.Module):
    """A detector with the standard files' calls: mean colours of an image, or of a video."""

    def forward(self, x: torch.Tensor, return_features: bool = True, rescale: bool = False,
                resize: bool = False) -> torch.Tensor:
        return x.float().flatten(2).mean(2)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_eval_prints_figures_with_their_protocol(place, tmp_path, capsys):
    torch.jit.script(Colours()).save(tmp_path / "colours.pt")
    V.main(["demo", "--run", "plain", *SMALL])
    capsys.readouterr()
    detectors = ["--rfid", str(tmp_path / "colours.pt"), "--rfvd", str(tmp_path / "colours.pt"),
                 "--trust"]
    V.main(["demo", "--eval", "--vae", "plain", "--n_eval", "6", *detectors])
    said, first = capsys.readouterr().out, json.loads(Path("runs/plain/eval.json").read_text())
    assert 10 < first["psnr"] < 60 and 0 < first["ssim"] <= 1 and first["flicker"] >= 0
    assert first["rfid"] >= 0 and first["rfvd"] >= 0 and len(first["latents_std"]) == 24
    assert first["protocol"]["clips"] == 6 and first["protocol"]["data"] in said
    V.main(["demo", "--eval", "--vae", "plain", "--n_eval", "6", *detectors])
    assert json.loads(Path("runs/plain/eval.json").read_text()) == first
    assert Path("runs/plain/eval.png").exists()


@pytest.mark.parametrize("name", V.MODELS)
def test_every_preset_trains_encodes_and_decodes(place, name, monkeypatch):
    """By the commands; narrower, all else as it is."""
    preset = V.MODELS[name]
    small = dict(preset, dim=8, **({"dec_dim": 16} if "dec_dim" in preset else {}),
                 **({"groups": 4} if "groups" in preset else {}))
    monkeypatch.setitem(V.MODELS, name, small)
    V.main(["demo", "--run", f"preset-{name}", "--model", name, *SMALL, "--steps", "1",
            "--eval_every", "1"])
    V.main(["demo", "--encode", "--vae", f"preset-{name}"])
    model, config = V.load_autoencoder(f"preset-{name}")
    latents = load_file(V.latents_path("data/demo", "shard-00000", config["hash"]))
    z = next(x for key, x in latents.items() if ":" not in key)[None, :model.z_dim].float()
    with torch.no_grad():
        video = torch.cat(list(V.decode_long(model, z)), 2)
    assert video.shape[2] == 1 + (z.shape[2] - 1) * model.time_stride and video.isfinite().all()


def test_a_published_autoencoder_without_a_slash_is_evaluated_twice(place):
    (place / "image-vae").symlink_to(FIXTURES / "sd-vae")
    for _ in range(2):                           # the first must not stand in the second's way
        V.main(["demo", "--eval", "--vae", "image-vae", "--n_eval", "2"])
    assert Path("runs/demo-eval/eval.json").exists() and not Path("runs/image-vae").exists()


@pytest.mark.parametrize("options, says", [
    (["--codes", "8"], "--codes belongs to"),
    (["--bottleneck", "vq", "--codes", "8", "8"], "one number"),
    (["--decoder_only"], "--init"),
    (["--init", "nowhere"], "nowhere"),
    (["--init", str(FIXTURES / "clip-text")], "no autoencoder"),
    (["--init", str(FIXTURES / "sd-vae"), "--model", "vae-s"], "leave --model and"),
    (["--init", str(FIXTURES / "sd-vae"), "--bottleneck", "vq"], "--bottleneck out"),
    (["--eval", "--vae", str(FIXTURES / "sd-vae"), "--rfid", str(FIXTURES / "sd-vae/fixture.json")],
     "no TorchScript"),
    (["--where", "flow >"], "flow"),
    (["--where", "nothing > 3"], "nothing"),
    (["--perceptual", "a.pth", "b.pth"], "a.pth")])
def test_wrong_options_end_in_one_line(place, capsys, options, says):
    with pytest.raises(SystemExit) as stop:
        V.main(["demo", "--run", "wrong", *options])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and says in error and len(error.splitlines()) == 1
