"""Samplers and guidance, what is written, evaluation, and the image analysis of the demo's videos."""
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import caption
import prepare_data as P
import sample as S
import train_dit as D
import train_vae as V
from prepare_data import (COLOURS, DIRECTIONS, FORMS, demo_files, demo_shot, is_left_out, render_shot,
                          rng)
from test_families import clip_folder

FIXTURES = Path(__file__).with_name("fixtures")


def coded(frames, path):
    """Frames after H.264, as prepare_data.py writes and reads them."""
    import av

    from prepare_data import write_video
    write_video(path, frames, 10)
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def test_analysis_is_right_on_clips_of_the_demo(tmp_path):
    """At least 98% of real, encoded clips, of one shape and of two, of every combination."""
    shots = [shot for file in demo_files(24) for shot in file["shots"]][::2]
    right = []
    for i, shot in enumerate(shots):
        result = S.describe(coded(render_shot(shot), tmp_path / f"{i}.mp4"))
        wanted = {(s["colour"], s["form"], s["direction"]) for s in shot["shapes"]}
        right.append({(s["colour"], s["form"], s["direction"]) for s in result} == wanted)
    assert len(right) == 96 and np.mean(right) >= 0.98


def test_analysis_fails_where_it_should():
    shot = demo_shot(rng(1, "t"), [("red", "square", "left")], "dark", 40, 40, 10)
    frames = render_shot(shot)
    assert S.describe(frames)[0]["direction"] == "left"
    assert S.describe(frames[::-1])[0]["direction"] == "right"
    assert S.describe(frames[:1].repeat(9, 0))[0]["direction"] is None
    assert S.describe(frames.transpose(0, 2, 1, 3))[0]["direction"] == "up"
    assert S.describe(frames[..., ::-1])[0]["colour"] == "blue"
    assert S.describe(np.full((9, 32, 32, 3), 40, np.uint8)) == []
    noise = np.random.default_rng(0).integers(0, 60, (9, 32, 32, 3), dtype=np.uint8)
    assert S.describe(noise) == []


def test_overlap_is_of_the_form_wherever_it_is():
    """Real renderings fit; another form, a dissolved, a doubled, a cut-off or another-coloured
    shape does not."""
    pairs = [(form, colour) for form in ("circle", "square", "triangle")
             for colour in ("purple", "yellow")]
    for i, (form, colour) in enumerate(pairs):
        shot = demo_shot(rng(i, "t"), [(colour, form, "left")], "grey", 40, 32, 10)
        frames = render_shot(shot)
        assert S.overlap(frames, colour, form).min() > 0.9
        other = {"circle": "triangle", "square": "circle", "triangle": "square"}[form]
        assert S.overlap(frames, colour, other).max() < 0.88     # a square in a circle: 0.86
        assert not S.overlap(frames, "blue", form).any()
        is_gone = np.random.default_rng(i).random(frames.shape[:3]) < 0.5
        ground = np.median(frames[:, 0], (0, 1)).astype(np.uint8)
        broken = np.where(is_gone[..., None], ground, frames)
        assert S.overlap(broken, colour, form).max() < 0.7
        twice = np.maximum(frames, frames[::-1])[:3]         # at both ends of its way
        assert S.overlap(twice, colour, form).max() < 0.75
        out = np.concatenate([frames[-1:, :, 12:], frames[-1:, :, :12]], 2)
        assert S.overlap(out, colour, form).max() < 0.8


def test_places_in_frames_beyond_the_trained_ones_come_nearer(run, monkeypatch):
    """Neither sides nor area reach further than in training; within it nothing changes."""
    monkeypatch.chdir(run)
    data = {"sizes": [[32, 48, 9], [40, 40, 5], [48, 32, 2]]}
    assert S.position_scale(None, 128, 128) == 1
    for size in data["sizes"]:
        assert S.position_scale(data, *size[:2]) == 1
    for height, width in ((48, 48), (64, 64), (80, 80), (128, 128), (16, 96), (96, 32)):
        factor = S.position_scale(data, height, width)
        assert max(height, width) * factor <= 48 + 1e-6 >= 48 * factor
        assert height * width * factor**2 <= 1600 + 1e-6 and factor < 1
    args = S.parse_options(["tiny", "--prompt", "p", "--device", "cpu"])
    sampler = S.open_sampler(args, torch.device("cpu"))
    sampler.info["data"] = data
    requests = [S.request_of(args, {"prompt": "p", "size": size}) for size in ((64, 64), (32, 48))]
    jobs = [sampler.job(sampler.open_timeline(request), 0, {"p": [5, 2], "": [2]}) for request in requests]
    z = torch.randn(*jobs[0].shape[:1], 1, *jobs[0].shape[2:])
    jobs[0] = jobs[0]._replace(cond_latents=[(z, -0.1)])           # what is given lies on the same places
    row = S.Guided(sampler.part("denoiser"), jobs, args, 4, torch.device("cpu")).row
    cells = [row.coords[row.cu_seqlens[i]:row.cu_seqlens[i + 1], 1:] for i in range(4)]
    for one, factor, size in zip(cells, [0.625, 1] * 2, [(64, 64), (32, 48)] * 2):
        last = [(side / sampler.stride - 0.5) * factor for side in size]
        assert one.min() == factor / 2 and one.amax(0).tolist() == last


def test_prompts_are_fixed_and_the_kinds_apart():
    prompts = S.demo_prompts(48)
    assert prompts == S.demo_prompts(48)
    for name, left_out in (("seen", False), ("left_out", True)):
        assert len(prompts[name]) == 48
        assert all(is_left_out(*combination) == left_out for combination in prompts[name])
    assert len(set(prompts["seen"])) == 48 and len(set(prompts["left_out"])) == 24
    every = [(c, f, d) for c in COLOURS for f in FORMS for d in DIRECTIONS]
    assert sum(is_left_out(*combination) for combination in every) == 24


def test_what_is_too_much_is_cut_about_the_centre():
    video = np.arange(9 * 40 * 48 * 3, dtype=np.uint32).reshape(9, 40, 48, 3)
    cut = S.center_crop(video, dict(height=36, width=44))
    assert np.array_equal(cut, video[:, 2:38, 2:46])


@pytest.mark.parametrize("text", ["32", "32x", "axb", "0x9", "32x48x3"])
def test_a_wrong_size_is_refused(text, capsys):
    with pytest.raises(SystemExit) as error:
        S.parse_options(["demo", "--prompt", "x", "--size", text])
    assert error.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# ---- samplers and guidance


def normal_data(x, alpha, sigma, mean):
    """(x_0, noise), their means given x, where data are normal with deviation 0.5."""
    off = (x - mean * alpha) / (0.25 * alpha**2 + sigma**2)
    return mean + 0.25 * alpha * off, sigma * off


@pytest.mark.parametrize("sampler, most", [("euler", 0.2), ("heun", 0.02), ("midpoint", 0.02), (
    "rk4", 0.01), ("sde", 0.2), ("ddim", 0.2), ("dpm++", 0.04), ("unipc", 0.02)])
def test_samplers_turn_noise_into_a_known_distribution(sampler, most):
    """Mean 3, deviation 0.5; and of twice the steps a smaller error."""
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((4000, 1))).float()
    noise = (noise - noise.mean()) / noise.std()

    def read(x, told, t):
        x0, eps = normal_data(x, 1 - t, t, 3)
        return eps - x0, x0, eps, None

    def error(steps):
        args = S.parse_options(["x", "--prompt", "", "--sampler", sampler, "--steps", str(steps)])
        args.ends = 1.0, 0.0
        draw = lambda i: torch.from_numpy(np.random.default_rng(9 + i).standard_normal((4000, 1))).float()
        *_, x = S.trajectory(args, D.Objective(), read, noise, None, 1.0, 1.0, draw)
        return max(abs(x.mean().item() - 3), abs(x.std().item() - 0.5))
    assert error(24) < most and error(48) < max(error(12), 0.03)


def test_stepped_samplers_turn_noise_into_a_known_distribution():
    def read(x, told, at):
        return None, *normal_data(x, *at, 1), None
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((4000, 1))).float()
    for path, sampler in (("ddpm", "ddpm"), ("ddpm", "ddim"), ("sd", "dpm++"), ("sd", "unipc"),
                          ("sd", "dpm-fast"), ("sd", "ddpm")):
        args = S.parse_options(["x", "--prompt", "", "--sampler", sampler, "--steps", "80"])
        draw = lambda i: torch.from_numpy(np.random.default_rng(i).standard_normal((4000, 1))).float()
        *_, x = S.trajectory(args, D.Objective("noise", path), read, noise, None, 1.0, 1.0, draw)
        assert abs(x.mean() - 1) < 0.06 and abs(x.std() - 0.5) < 0.07, (sampler, x.mean(), x.std())


def test_fresh_noise_of_ddim_keeps_the_distribution():
    alpha, sigma = torch.tensor([0.6, 0.8]).double(), torch.tensor([0.8, 0.6]).double()
    n, random = 200000, torch.Generator().manual_seed(0)
    eps, fresh = (torch.randn(n, 1, generator=random) for _ in range(2))
    for eta in (0.0, 0.5, 1.0):
        x, = S.ddim(lambda x, i: (torch.zeros_like(x), eps, None), eps, alpha, sigma, eta, lambda i: fresh)
        assert abs(x.std().item() - 0.6) < 0.01


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run and its autoencoder with random weights, made without training."""
    home = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    options = dict(dim=8, mults=(1, 2, 2), downs=("t", "st"), n_res=1, patch=4, z_dim=6)
    vae, stats = V.Autoencoder(**options), {"latents_mean": [0.1] * 6, "latents_std": [1.2] * 6}
    sizes = dict(channels=6, dim=32, depth=2, heads=2, patch=(1, 1, 1), text=(16, 1, 2), vocab=300)
    model = D.Denoiser(**sizes)
    for p in [*vae.parameters(), *model.parameters()]:
        p.data.add_(0.05 * torch.randn_like(p))
    args = {"shift": 1.0, "given": 0.5, "conditions": []}
    for name, network, config in (
            ("tiny-vae", vae, {"kind": "vae", "args": {}, "model": options, "hash": "abc", **stats}),
            ("tiny", model, {"kind": "denoiser", "args": args, "model": sizes,
                             "vae": {"run": "tiny-vae", "hash": "abc"}})):
        V.save_step(home / "runs" / name, 1, {"model": network.state_dict(), "ema": network.state_dict()})
        V.write_config(home / "runs" / name, {"format": 1, **config})
    caption.train_tokenizer(["a square moves"], 300).save(str(home / "runs/tiny/tokenizer.json"))
    return home


@pytest.fixture
def inside(run, monkeypatch):
    monkeypatch.chdir(run)
    return run


def make(*options, prompts=("a",)):
    """(frames of each video, the sampler) of options."""
    args = S.parse_options(["tiny", "--prompt", *prompts, "--steps", "3", "--frames", "5", "--device",
                            "cpu", *map(str, options)])
    args.quiet = True
    sampler = S.open_sampler(args, torch.device("cpu"))
    requests = [S.request_of(args, {"prompt": prompt}) for prompt in args.prompt]
    return [np.stack(list(sampler.frames(timeline))) for timeline in sampler(requests)], sampler


def away(one, other):
    return np.abs(one.astype(float) - other.astype(float)).max()


def test_noise_belongs_to_its_wish_whatever_the_batch(inside):
    """Among others, at other sizes, or alone: the same video but for rounding."""
    together, _ = make(prompts=("a", "a square", "b"))
    for prompt, video in zip(("a", "a square", "b"), together):
        assert away(make(prompts=(prompt,))[0][0], video) <= 1
    assert away(together[0], together[2]) > 5
    assert away(make("--seed", 1)[0][0], together[0]) > 5
    assert away(make("--sampler", "sde")[0][0], make("--sampler", "sde", prompts=("a", "b"))[0][0]) <= 1


def test_parts_take_turns_and_change_nothing(inside):
    whole, sampler = make()
    assert set(sampler.part.opened) == {"vae", "denoiser", "text"}
    turns, sampler = make("--offload")
    assert set(sampler.part.opened) == {"vae"} and away(whole[0], turns[0]) == 0
    assert away(make("--chunk", 1)[0][0], whole[0]) <= 1


def test_guidance_by_hand(inside):
    """Each kind against its formula, on outputs of two clips of different lengths."""
    args = S.parse_options(["tiny", "--prompt", "a", "--device", "cpu", "--cfg", "3",
                            "--rescale", "0"])
    sampler = S.open_sampler(args, torch.device("cpu"))
    model, read = sampler.part("denoiser"), sampler.part("text")
    shapes, random = [(6, 2, 4, 4), (6, 1, 4, 5)], torch.Generator().manual_seed(0)
    jobs = [S.SamplingJob(shape, 10.0, read("a square"), read(""), torch.randn(shape, generator=random))
            for shape in shapes]
    lengths = [math.prod(shape[1:]) for shape in shapes]

    def outputs(**options):
        vars(args).update(options)
        packed = S.Guided(model, jobs, args, 4, torch.device("cpu"))
        x = packed.start
        with torch.no_grad():
            return x, packed.network(x, torch.full((len(x), 1), 0.7)).chunk(2), packed(x, 0.7, 0.7)
    x, (near, far), result = outputs()
    assert torch.allclose(result[0], far + 3 * (near - far), atol=1e-5)
    assert torch.allclose(x - 0.7 * result[0], result[1], atol=1e-5)
    _, _, result = outputs(cfg_interval=(0.0, 0.5))           # outside: as if there were no guidance
    assert torch.allclose(result[0], near, atol=1e-5)
    _, _, result = outputs(cfg_interval=(0.0, 1.0), cfg_channels=2)
    assert torch.allclose(result[0][:, :2], (far + 3 * (near - far))[:, :2], atol=1e-5)
    assert torch.allclose(result[0][:, 2:], near[:, 2:], atol=1e-5)
    _, _, result = outputs(cfg_channels=None, rescale=0.6)
    for part, a, b in zip(result[0].split(lengths), near.split(lengths), far.split(lengths)):
        plain = b + 3 * (a - b)
        scaled = plain * a.std(correction=0) / plain.std(correction=0)
        assert torch.allclose(part, 0.6 * scaled + 0.4 * plain, atol=1e-5)
    _, _, result = outputs(rescale=0.0, apg=0.5)
    pairs = [(x - 0.7 * out).split(lengths) for out in (near, far)]
    for part, a, b in zip(result[1].split(lengths), *pairs):
        step = (a - b) * min(1, 0.5 / (a - b).norm())
        step = step - (step * a).sum() / a.square().sum() * a
        assert torch.allclose(part, a + 2 * step, atol=1e-4)
        assert abs((step * a).sum()) < 1e-4


def test_rows_of_zeros_behind_wans_texts_count_as_often_as_they_are():
    """As one row each, or as the 512 less the text's own that the published models read."""
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=random)
    torch.manual_seed(3)                 # of the model, whatever ran before
    model = D.Denoiser(kind="wan", channels=4, dim=48, depth=2, heads=2, patch=(1, 2, 2), text_dim=8,
                       positions="index").requires_grad_(False)
    for p in model.parameters():
        p.data.add_(0.3 * draw(*p.shape))
    jobs = [S.SamplingJob((4, n, 4, 4), 16.0, draw(length, 8), draw(1, 8), draw(4, n, 4, 4))
            for n, length in ((2, 3), (1, 512))]
    args = S.argparse.Namespace(cfg=5.0, dtype="fp32")
    packed = S.Guided(model, jobs, args, 4, torch.device("cpu"))
    each = lambda name: [getattr(job, name) for job in jobs]
    plain = D.Packed(model, each("shape"), each("fps"), each("text"), each("negative"), each("noise"), 4,
                     [[]] * 2, [[]] * 2)
    assert [len(x.row.text) for x in (packed, plain)] == [4 + 512 + 2 + 2, 4 * 512]
    t = torch.full((len(packed.start), 1), 0.6)
    result, wanted = packed.network(packed.start, t), plain.network(packed.start, t)
    assert (result - wanted).abs().max() < 1e-5 * wanted.abs().max()
    masked = S.Guided(model, jobs, args, 4, torch.device("cpu"))
    masked.row.counts = torch.ones_like(masked.row.counts)                   # else it is another text
    assert (masked.network(packed.start, t) - wanted).abs().max() > 5e-3 * wanted.abs().max()


def test_a_prompt_to_turn_away_from_takes_the_place_of_the_empty_one(inside):
    assert away(make("--negative", "a square")[0][0], make()[0][0]) > 1
    assert away(make("--negative", "a square", "--cfg", 1)[0][0], make("--cfg", 1)[0][0]) == 0


# ---- what is written


def test_every_sample_has_its_recipe_and_the_recipe_makes_it_again(inside, tmp_path, monkeypatch):
    S.main(["tiny", "--prompt", "it's a", "--seed", "4", "--frames", "6", "--fps", "7", "--size", "33x38",
            "--steps", "3", "--sampler", "heun", "--out", str(tmp_path), "--device", "cpu"])
    path, = tmp_path.glob("it-s-a-s4-????????.json")
    facts = json.loads(path.read_text())
    assert facts["n_frames"] == 6 and facts["how"]["sampler"] == "heun" and facts["autoencoder"] == "abc"
    program, script, *options = shlex.split(facts["command"])
    S.main([*options, "--out", str(tmp_path / "again")])
    first, again = (folder / facts["file"] for folder in (tmp_path, tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()
    frames = list(P.Video(first))
    assert len(frames) == 6 and (frames[0].width, frames[0].height) == (38, 32)      # H.264: even
    page = (tmp_path / "index.html").read_text()
    assert f'src="{path.stem}.mp4"' in page and "it&#x27;s a" in page and "http" not in page


def test_a_rewritten_prompt_and_what_was_asked_are_both_kept(inside, tmp_path):
    S.main(["tiny", "--prompt", "a", "--frames", "3", "--steps", "2", "--out", str(tmp_path),
            "--device", "cpu", "--rewrite", str(Path(__file__).with_name("fixtures") / "vlm-qwen2")])
    (path,) = tmp_path.glob("*.json")
    facts = json.loads(path.read_text())
    assert facts["wish"]["asked"] == "a" != facts["wish"]["prompt"]
    assert shlex.split(facts["command"])[4] == facts["wish"]["prompt"]       # made again without it


@pytest.mark.parametrize("form", ["gif", "webp", "png"])
def test_other_formats(form, inside, tmp_path):
    S.main(["tiny", "--prompt", "a", "--frames", "3", "--steps", "2", "--format", form, "--out",
            str(tmp_path), "--device", "cpu"])
    path, = tmp_path.glob("a-s0-*.json")
    if form == "png":
        assert sorted(p.name for p in path.with_suffix("").iterdir()) == [f"{i:05d}.png" for i in range(3)]
    else:
        with Image.open(path.with_suffix(f".{form}")) as picture:
            assert picture.n_frames == 3 and picture.size == (48, 32)
            picture.seek(2)
            picture.load()
            assert picture.info["duration"] == 100
    S.main(["tiny", "--prompt", "b", "--frames", "1", "--steps", "2", "--out", str(tmp_path), "--device",
            "cpu"])
    with Image.open(next(tmp_path.glob("b-s0-*.png"))) as picture:
        assert picture.size == (48, 32)


def test_prompts_of_a_file_are_shared_out_and_never_made_twice(inside, tmp_path):
    """Two ranks, one of them stopped early, then one rank: the same bytes as from one unbroken run."""
    rows = [{"prompt": "a", "seed": 3}, {"prompt": "a square", "size": "40x32", "frames": 9},
            {"prompt": "b"}, {"prompt": "c", "seconds": 0.9}, {"prompt": "d"}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["tiny", "--prompts", str(tmp_path / "list.jsonl"), "--frames", "5", "--steps", "2",
              "--batch", "2", "--device", "cpu"]
    S.main([*common, "--out", str(tmp_path / "whole")])
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(Path(S.__file__).parent))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                           "--master_port", "29713", "--", S.__file__, *common, "--out",
                           str(tmp_path / "two")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    names = sorted(p.name for p in (tmp_path / "whole").glob("0*"))
    assert len([name for name in names if name.endswith(".mp4")]) == 5
    same = lambda folder: all((tmp_path / "whole" / n).read_bytes() == (tmp_path / folder / n).read_bytes()
                              for n in names)
    assert same("two")
    one = lambda name: next((tmp_path / "two").glob(name))
    for name in ("00001-a-square-s0-*.json", "00003-c-s0-*.json", "00003-c-s0-*.mp4"):
        one(name).unlink()                                   # as if killed before these were whole
    kept = one("00004-d-s0-*.mp4").stat().st_mtime_ns
    S.main([*common, "--out", str(tmp_path / "two")])
    assert same("two") and one("00004-d-s0-*.mp4").stat().st_mtime_ns == kept
    assert json.loads(one("00003-c-s0-*.json").read_text())["n_frames"] == 9
    one("00000-a-s3-*.mp4").unlink()                         # a removed video is made again
    S.main([*common, "--out", str(tmp_path / "two")])
    assert same("two") and one("00004-d-s0-*.mp4").stat().st_mtime_ns == kept
    (tmp_path / "list.txt").write_text("a\n\nb\n")
    args = S.parse_options(["tiny", "--prompts", str(tmp_path / "list.txt")])
    args.size, args.fps, args.frames = (32, 32), 10.0, 5
    assert [request["prompt"] for request in S.read_prompts(args)] == ["a", "b"]


@pytest.mark.parametrize("row, says", [
    ('{"prompt": "a", "frames": "ten"}', "--frames"), ('{"prompt": "a", "frames": 2.5}', "--frames"),
    ('{"prompt": "a", "fps": 0}', "--fps"), ('{"prompt": "a", "seed": -1}', "--seed"),
    ('{"prompt": "a", "size": 32}', "HxW"), ('{"prompt": "a", "strength": 3}', "--strength"),
    ('{"prompt": "a", "loop": "yes"}', "--loop"), ('{"prompt": "a", "mood": 1}', "mood"),
    ('{"prompt": 5}', "text"), ("[1]", "dict"), ('{"prompt"', "delimiter")])
def test_a_wrong_row_of_prompts_is_named_by_its_line(row, says, tmp_path, capsys):
    (tmp_path / "list.jsonl").write_text('{"prompt": "-a", "then": ["b"], "loop": false}\n\n' + row)
    with pytest.raises(SystemExit) as end:
        S.read_prompts(S.parse_options(["x", "--prompts", str(tmp_path / "list.jsonl"), "--size",
                                        "32x48", "--fps", "8", "--seconds", "1"]))
    line, = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and "list.jsonl, line 3: " in line and says in line


DATA = {"size": [40, 36], "frames": 9, "fps": 12.5, "sizes": [[40, 36, 7]], "frames_range": [5, 17],
        "fps_range": [12.5, 25], "side_range": [36, 64], "text": True, "words": ["a", "b", "square", "狗"]}


@pytest.fixture
def learnt(inside):
    """The tiny run, which says what data it was trained on."""
    path = inside / "runs/tiny/config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), "data": DATA}))
    yield inside
    path.write_text(before)


def test_defaults_are_the_datas_and_what_is_outside_of_them_is_said(learnt, tmp_path, capsys):
    call = lambda *options: [S.main(["tiny", "--steps", "2", "--device", "cpu", "--out", str(tmp_path),
                                     *options]), capsys.readouterr().err][1]
    err = call("--prompt", "a square", "狗狗", "--n", "2", "--batch", "3")
    request = json.loads(next(tmp_path.glob("a-square-s1-*.json")).read_text())["wish"]
    assert (request["height"], request["width"], request["frames"], request["fps"]) == (40, 36, 9, 12.5)
    assert "warning" not in err and "4/4" in err             # two batches of two steps
    err = call("--prompt", "a zebra runs", "--size", "40x96", "--frames", "33", "--fps", "30")
    line, = [line for line in err.splitlines() if "warning" in line]
    for part in ("96 px (trained on 36 to 64)", "33 frames a part (trained on 5 to 17)",
                 "30 frames/s (trained on 12.5 to 25)", "the words zebra, runs"):
        assert part in line
    request = dict(prompt="a", height=40, width=40, frames=9, fps=25.0)
    assert S.outside_of_training([request], {**DATA, "text": False}) == [
        "prompts (trained without text)"]


def test_the_bar_counts_what_the_sampler_yields(inside):
    """In every sampler, in a chain, and where a video is changed: it ends at its total."""
    for options in (["--sampler", "euler"], ["--sampler", "sde"], ["--sampler", "unipc"], ["--extend", "2"]):
        args = S.parse_options(["tiny", "--prompt", "a", "--steps", "4", "--frames", "5", "--device", "cpu",
                                *options])
        sampler = S.open_sampler(args, torch.device("cpu"))
        requests = [S.request_of(args, {"prompt": "a"})]
        with sampler.progress([requests]) as sampler.bar:
            sampler(requests)
            assert sampler.bar.n == sampler.bar.total == 4 * (3 if "--extend" in options else 1)
    args.sampler, args.steps, args.extend = "euler", 8, 0
    assert S.count_steps(args, 0.5) == 4 and S.count_steps(args, 0.01) == 1
    for args.steps in (6, 7, 8):                             # orders 3, 2 and 1; each yields once
        args.sampler, points = "dpm-fast", S.level_grid(args.steps)[1:]
        x = torch.zeros(1)
        yields = list(S.dpm_fast(lambda x, i: (x,), x, *points))
        assert len(yields) == S.count_steps(args)


def test_names_tell_settings_apart_and_nothing_is_overwritten(learnt, tmp_path, capsys, monkeypatch):
    """As usual: a plain name, given or not; else a hash of what differs. What another JSON file
    describes stays, of an older checkpoint or of no sample; prompts keep letters of any script."""
    call = lambda *options: [S.main(["tiny", "--device", "cpu", "--out", str(tmp_path), *options]),
                             Path(capsys.readouterr().out.strip())][1]
    monkeypatch.setitem(S.KINDS["own"], "steps", 2)          # as usual, here
    plain = call("--prompt", "a")
    same = call("--prompt", "a", "--size", "40x36", "--fps", "12.5", "--frames", "9", "--steps", "2")
    assert plain.name == same.name == "a-s0.mp4"
    others = [call("--prompt", "a", *map(str, options)) for options in (
        ["--steps", 3], ["--cfg", 2], ["--size", "36x40"], ["--frames", 5], ["--fps", 25], ["--crf", 20],
        ["--negative", "b"], ["--vae", "tiny-vae"], ["--format", "gif"], ["--cfg_interval", 0.1, 0.9],
        ["--checkpoint", "last"])]
    assert len({path.stem for path in others} | {"a-s0"}) == 12
    before = plain.read_bytes()
    facts = json.loads((tmp_path / "a-s0.json").read_text())
    for strange in ({**facts, "weights": "runs/tiny/step-000000"}, {"mine": 1}):
        (tmp_path / "a-s0.json").write_text(json.dumps(strange))
        other = call("--prompt", "a")
        assert other.name.startswith("a-s0-") and other == call("--prompt", "a")
        assert json.loads((tmp_path / "a-s0.json").read_text()) == strange
        assert plain.read_bytes() == before
    (tmp_path / "a-s0.json").write_text("{")                 # describes nothing
    assert call("--prompt", "a") == plain
    args = S.parse_options(["x", "--prompt", "", "--fps", "10", "--size", "32x32", "--frames", "5"])
    args.defaults |= {"fps": 10.0, "frames": 5, "size": [32, 32]}
    stem = lambda prompt: S.stem_of(S.request_of(args, {"prompt": prompt}), args)
    assert stem("红色的圆, \x1b[31m向左!") == "红色的圆-31m向左-s0" and stem("हिन्दी में") == "हिन्दी-में-s0"
    assert stem("cafe\u0301 <b>") == "café-b-s0" and stem("..") == stem("") == "empty-s0"
    assert stem("🙂/..") == "slightly-smiling-face-s0" and stem("🐱\ufe0f 🐶") == "cat-face-dog-face-s0"
    assert len(stem("猫" * 300).encode()) <= 123 and stem("x" * 300) == "x" * 60 + "-s0"


def test_the_page_shows_the_samples_that_are_there(learnt, tmp_path, capsys, monkeypatch):
    """The newest first, escaped, in a table where settings share a prompt; what is being written, is
    damaged or is somebody else's is left alone; the sheet has what the page has, from several calls."""
    call = lambda *options: S.main(["tiny", "--device", "cpu", "--steps", "2", "--frames", "5", "--out",
                                    str(tmp_path), *options])
    sheet, made = S.contact_sheet, {}
    monkeypatch.setattr(S, "contact_sheet", lambda path, rows: [
        made.update({label: (frames, label)}) for frames, label in rows if path.name != "sheet.png"] +
        [sheet(path, rows)])
    call("--prompt", "a")
    for name, text in ((".a-s0.1-ab.tmp.json", ""), ("bad.json", "{"), ("list.json", "[1]"), (
            "sheet.json", '{"file": "sheet.png", "wish": {}}'), ("up.json", json.dumps({**json.loads(
                next(tmp_path.glob("a-s0-*.json")).read_text()), "file": "../a.mp4"}))):
        (tmp_path / name).write_text(text)
    call("--prompt", "<i>b</i> \x1b[31m\u202e" + "long " * 99, "--seed", "3")
    err = capsys.readouterr().err
    assert "'bad.json', 'list.json', 'sheet.json', 'up.json': not of samples" in err
    assert "shows the 2 samples of this folder; sheet.png the newest 2" in err
    page = (tmp_path / "index.html").read_text()
    assert page.index("i-b-i-31m-long") < page.index('src="a-s0') and "<table>" not in page
    assert "&lt;i&gt;b&lt;/i&gt;" in page and "<i>" not in page
    assert not {"\x1b", "\u202e"} & {*page} and "viewport" in page and "IntersectionObserver" in page
    sheet(tmp_path / "again.png", [*made.values()][::-1])
    one, other = (np.asarray(Image.open(tmp_path / name)) for name in ("sheet.png", "again.png"))
    assert len(made) == 2 and np.array_equal(one, other)
    call("--prompt", "a", "--cfg", "1", "--n", "2")
    page = (tmp_path / "index.html").read_text()
    table = page[page.index("<table>"):page.index("</table>")]
    assert table.count("<tr>") == 2 and table.count("<td>") == 2 and table.count("<video") == 3
    assert "<th>guidance 1.0, cfg 1.0</th>" in table or "<th>guidance 1.0</th>" in table
    next(tmp_path.glob("i-b*.mp4")).unlink()
    call("--prompt", "a")
    assert "i-b-i" not in (tmp_path / "index.html").read_text()


def test_pictures_that_a_run_cannot_keep_to_are_told(tmp_path, capsys, monkeypatch):
    """tests/demo, and at either end a frame like its data's, or one of a kind that it never saw."""
    shot = demo_shot(rng(77, 0), [("red", "circle", "right")], "dark", 48, 32, 10.0)
    y, x = np.mgrid[:32, :48]
    strange = np.stack([5 * x, 7 * y, 255 - 5 * x], -1).astype(np.uint8)
    for name, picture in (("known", render_shot(shot)[-1]), ("strange", strange)):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    rows = [{"prompt": f"{name} {end}", end: str(tmp_path / f"{name}.png")}
            for name in ("known", "strange") for end in ("image", "last")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    S.main([str(Path(__file__).with_name("demo")), "--prompts", str(tmp_path / "p.jsonl"), "--steps", "8", "--device",
            "cpu", "--out", str(tmp_path / "out")])
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "levels" in line]
    assert len(lines) == 2 and "strange-image" in lines[0] and "leaves --image" in lines[0]
    assert "strange-last" in lines[1] and "levels off --last" in lines[1]


def test_labels_of_sheets_say_the_task_and_are_told_apart(tmp_path, monkeypatch):
    """Of scripts without a font spelled, or in a font that has them; none runs into its neighbour."""
    label = S.label_of({"prompt": "a boat", "seed": 3, "image": "/x/ball.png", "extend": 2, "frames": 5})
    assert label == "image ball.png, extend 2: a boat (seed 3)"
    assert S.label_of({"prompt": "a boat", "seed": 3}) == "a boat (seed 3)"
    opened, whole, result = [], P.ImageFont.truetype, lambda: open("/nonexistent/font")

    def truetype(font, *more, **others):
        if not isinstance(font, str):                        # Pillow's own
            return whole(font, *more, **others)
        opened.append(font)
        return result()
    monkeypatch.setattr(P.ImageFont, "truetype", truetype)
    P.label_fonts.cache_clear()
    assert P.lettered("a cat …")[1] == "a cat …" and not opened
    for text, said in (("кот", "kaote"), ("猫 犬", "732b 72ac"), ("कब", "kaba"), ("🐱\ufe0f", "cat-face"),
                       ("cafe\u0301 – «é»", "cafe - «e»")):
        assert P.lettered(text)[1] == said
    assert opened == [*P.FONTS]
    frames = np.zeros((2, 32, 48, 3), np.uint8)
    sheets = []
    for text in ("猫" * 99, "犬" * 99, "W" * 99, "WIDE " * 40):
        P.contact_sheet(tmp_path / "sheet.png", [(frames, text)] * 3)
        sheets.append(np.asarray(Image.open(tmp_path / "sheet.png")))
        for column in (1, 2):                                # 212 px each, the label 12 px from its left
            assert (sheets[-1][:, 12 + 212 * column - 4:12 + 212 * column] == (24, 26, 30)).all(), text
    assert not np.array_equal(*sheets[:2])
    full = P.ImageFont.load_default(12)
    full.getmask = lambda text: b"box" if text == "\uffff" else b"letter"
    full.font_variant = lambda **_: full
    result = lambda: full
    P.label_fonts.cache_clear()
    assert P.lettered("кот") == (full, "кот")
    P.label_fonts.cache_clear()


def test_ctrl_c_keeps_what_is_finished(inside, tmp_path, capsys, monkeypatch):
    denoise, calls = S.Sampler.denoise, []

    def stop(*at):
        calls.append(at)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return denoise(*at)
    monkeypatch.setattr(S.Sampler, "denoise", stop)
    with pytest.raises(SystemExit) as end:
        S.main(["tiny", "--prompt", "a", "b", "c", "--batch", "1", "--steps", "2", "--frames", "5",
                "--device", "cpu", "--out", str(tmp_path)])
    assert end.value.code == 130 and "stopped" in capsys.readouterr().err.splitlines()[-1]
    assert len([*tmp_path.glob("*.mp4")]) == 1 and "1 sample" in (tmp_path / "index.html").read_text()
    assert not [*tmp_path.glob(".*")]


@pytest.mark.parametrize("name, content, says", [
    ("list.csv", b"prompt\na\n", "or .jsonl"), ("list.txt", b"caf\x81\n", "UTF-8"),
    ("list.txt", "a\n".encode("utf-16-le"), "UTF-8"), ("list.txt", b" \n\n", "holds no prompt"),
    ("list.jsonl", b"", "holds no prompt"), ("list.jsonl", b'{"prompt": "\\ud83d"}', "UTF-8"),
    ("list.jsonl", b'{"prompt": "a", "frames": 5, "seconds": 1}', "both give the length")])
def test_wrong_files_of_prompts(name, content, says, inside, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as end:
        S.main(["tiny", "--prompts", str(tmp_path / name), "--device", "cpu", "--out", str(tmp_path / "out")])
    line, = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and says in line and not (tmp_path / "out").exists()


def test_a_file_that_is_no_model_is_refused(inside, tmp_path, capsys):
    (tmp_path / "notes.pt").write_text("eggs")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    for options in ([str(tmp_path / "notes.pt")], [str(tmp_path / "picture.png")], [
            "tiny", "--vae", str(tmp_path / "notes.pt")], ["tiny", "--vae", str(tmp_path / "picture.png")]):
        with pytest.raises(SystemExit) as end:
            S.main([*options, "--prompt", "a", "--device", "cpu", "--out", str(tmp_path / "out")])
        line, = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and "no file of weights" in line


def test_what_is_large_is_said_and_what_cannot_fit_refused(inside, tmp_path, capsys, monkeypatch):
    call = lambda *options: S.main(["tiny", "--prompt", "a", "--steps", "2", "--device", "cpu", "--out",
                                    str(tmp_path / "out"), *options])
    for options in (["--seconds", "100000"], ["--size", "16000x16000"], ["--fps", "1000", "--seconds", "9999"]):
        with pytest.raises(SystemExit) as end:
            call(*options)
        line, = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and "tokens a row" in line and "GiB here" in line
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(S, "memory", lambda device: 2**20)
    call("--frames", "5")
    assert "tokens a row, about 0.000" in capsys.readouterr().err and S.memory("cpu") == 2**20


@pytest.mark.parametrize("options, says", [
    (["--video", "x.mp4"], "needs one of"), (["--strength", "0.5"], "name it by --video"),
    (["--image", "nowhere.png"], "no such file"), (["--image", ""], "names no file"),
    (["--image", "runs"], "--image runs is a folder"), (["--cfg", "1e30"], "--cfg"),
    (["--text_encoder", "x"], "not used"), (["--motion", "3"], "not trained"), (["--eta", "0.5"], "not used"),
    (["--frames", "9", "--seconds", "1"], "both give"), (["--size", "100000x100000"], "--size"),
    (["--fps", "1000000"], "--fps"), (["--out", "runs/tiny/config.json"], "cannot write"),
    (["--out", "/proc/samples"], "cannot write"), (["--sampler", "ddpm"], "--sampler ddpm"),
    (["--video", "a", "--image", "b", "--extend", "1"], "do not go together"),
    (["--prompts", "nowhere.jsonl"], "no such file"), (["--eval", "fid"], "--detector"),
    (["--vae", "tiny"], "denoiser")])
def test_wrong_requests_are_refused_in_one_line(options, says, inside, capsys):
    with pytest.raises(SystemExit) as error:
        S.main(["tiny", "--prompt", "a", "--steps", "2", "--device", "cpu", *options])
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and len(lines) == 1 and says in lines[0]


# ---- evaluation


def test_the_frechet_distance_is_the_closed_form():
    """Of Gaussians that commute; and of a distribution with itself, singular covariance too."""
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 0.0]).double()
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    mean = torch.tensor([1.0, 2.0, 2.0]).double()
    cov = lambda d: turn @ torch.diag(d) @ turn.T
    wanted = 9 + (a.sqrt() - b.sqrt()).square().sum().item()
    result = V.frechet((mean, cov(a)), (torch.zeros(3).double(), cov(b)))
    assert abs(result - wanted) < 1e-6 and abs(V.frechet((mean, cov(b)), (mean, cov(b)))) < 1e-5


class Tiny(torch.nn.Module):
    """A stand-in for I3D: moments of pixels, over all axes but the channels."""

    def forward(self, x: torch.Tensor, rescale: bool = False, return_features: bool = False):
        y = x.float().flatten(2) / (255.0 if rescale else 1.0)
        return torch.cat([y.mean(2), y.std(2)], 1)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A data set of six noisy videos, each with a caption."""
    home = tmp_path_factory.mktemp("real")
    (home / "videos").mkdir()
    for i in range(6):
        frames = np.random.default_rng(i).integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
        P.write_video(home / f"videos/{i}.mp4", frames, 10)
        (home / f"videos/{i}.txt").write_text("a square moves to the left over noise")
    P.main([str(home / "set"), "--videos", str(home / "videos"), "--workers", "1"])
    return str(home / "set")


def evaluated(kind, real, *options):
    """What --eval KIND wrote of the tiny run."""
    S.main(["tiny", "--eval", kind, "--data", real, "--size", "32x32", "--frames", "5", "--steps", "2",
            "--device", "cpu", "--n_eval", "5", *map(str, options)])
    return json.loads(Path(f"runs/tiny/eval-{kind}.json").read_text())


def test_fvd_from_prompts_to_figure(inside, real, tmp_path):
    torch.jit.script(Tiny()).save(str(tmp_path / "tiny.pt"))
    first = evaluated("fvd", real, "--detector", tmp_path / "tiny.pt", "--trust")
    assert first["fvd"] > 0 and abs(first["real_itself"]) < 1e-4 and first["real_real"] >= 0
    assert first["protocol"]["real"]["n"] == 5 and len(first["hash"]) == 8
    assert (inside / f"runs/tiny/eval-real-{S.hash_of(first['protocol']['real'])}.safetensors").exists()
    assert evaluated("fvd", real, "--detector", tmp_path / "tiny.pt", "--trust") == first       # as it is kept
    assert evaluated("fid", real, "--detector", tmp_path / "tiny.pt", "--trust")["fid"] > 0


def test_similarity_to_the_prompt(inside, real, tmp_path, monkeypatch):
    """The mean cosine by a CLIP folder; of the real clips what caption.py's score says of them."""
    folder = clip_folder(tmp_path / "clip")
    result = evaluated("clip", real, "--clip", folder)
    assert -1 <= result["clip"] <= 1 and result["protocol"]["real"]["n"] == 5
    scorer = caption.Scorer(S.argparse.Namespace(clip=folder, aesthetics=None), None, [], "cpu")
    how = S.argparse.Namespace(data=real, frames=5, fps=10.0, size=(32, 32), n_eval=5)
    source, rows = S.real_clips(how)
    say = lambda row: (row["captions"] or [{"text": ""}])[0]["text"]
    scores = [scorer.score(S.clip_at(source, row, how)[[0, 1, 2, 4]], say(row))["clip"] for row in rows]
    assert abs(result["real"] - np.mean(scores)) < 1e-5
    monkeypatch.setattr(caption.Scorer, "score", lambda self, frames, text: {"clip": len(frames) / 8})
    assert evaluated("clip", real, "--clip", folder)["clip"] == 0.5


# ---- Wan's image to video: the picture as channels and, by CLIP's tower, as tokens


TOWER = {   # names of the tower in Wan's file and in diffusers' folder
    "cls_embedding": "embeddings.class_embedding", "pos_embedding": "embeddings.position_embedding.weight",
    "patch_embedding": "embeddings.patch_embedding", "pre_norm": "pre_layrnorm",
    "post_norm": "post_layernorm", "transformer": "encoder.layers", "norm1": "layer_norm1",
    "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}


def tower_weights(width=160, depth=3, patch=4, side=8):
    """Random weights of a vision tower by the names in Wan's file."""
    shapes = {"cls_embedding": (1, 1, width), "pos_embedding": (1, (side // patch) ** 2 + 1, width),
              "patch_embedding.weight": (width, 3, patch, patch), "head": (width, 8)}
    linear = {"attn.to_qkv": (3 * width, width), "attn.proj": (width, width),
              "mlp.0": (2 * width, width), "mlp.2": (width, 2 * width)}
    for n in range(depth):
        shapes |= {f"transformer.{n}.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"transformer.{n}.{name}.bias": shape[:1] for name, shape in linear.items()}
    for norm in ("pre_norm", "post_norm", *(f"transformer.{n}.norm{i}" for n in range(depth) for i in "12")):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    random = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=random) for name, shape in shapes.items()}


def tower_by_hand(w, x, heads=2):
    """Hidden states before the last layer, [1, N, width], of normalised pixels [1, 3, 8, 8]."""
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])
    linear = lambda x, name: F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
    x = F.conv2d(x, w["patch_embedding.weight"], stride=4).flatten(2).mT
    x = norm(torch.cat([w["cls_embedding"], x], 1) + w["pos_embedding"], "pre_norm")
    for layer in ("transformer.0", "transformer.1"):
        qkv = linear(norm(x, f"{layer}.norm1"), f"{layer}.attn.to_qkv")
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(y, f"{layer}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{layer}.norm2"), f"{layer}.mlp.0")), f"{layer}.mlp.2")
    return x


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    """Two folders of one small I2V model with random weights: in Wan's layout and in diffusers'."""
    home, tower = tmp_path_factory.mktemp("i2v"), tower_weights()
    torch.manual_seed(0)
    network = D.DiT(36, 48, 1, 2, (1, 2, 2), out_channels=16, ffn=64, text_dim=32, image_dim=160,
                    positions="index")
    for p in network.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    vae, about = V.load_autoencoder(FIXTURES / "wan-vae-original")
    for layout, part in (("wan", ""), ("diffusers", "transformer")):
        (home / layout / part).mkdir(parents=True)
        state = D.to_published(network.state_dict(), layout, network)
        save_file({name: value.contiguous() for name, value in state.items()},
                  home / layout / part / "diffusion_pytorch_model.safetensors")
    own, theirs = home / "wan", home / "diffusers"
    (own / "config.json").write_text(json.dumps(
        {"_class_name": "WanModel", "num_heads": 2, "num_layers": 1, "ffn_dim": 64}))
    (theirs / "transformer/config.json").write_text(json.dumps(
        {"_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "num_layers": 1, "ffn_dim": 64}))
    shutil.copy(FIXTURES / "wan-vae-original/Wan2.1_VAE.pth", own)
    (theirs / "vae").mkdir()
    names = V.published_names(vae, "diffusers")
    save_file({names[name]: value for name, value in vae.state_dict().items()},
              theirs / "vae/diffusion_pytorch_model.safetensors")
    (theirs / "vae/config.json").write_text(json.dumps(
        {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
         "temperal_downsample": [False, True, True],
         **{name: about[name] for name in ("latents_mean", "latents_std")}}))
    torch.save({f"visual.{name}": x for name, x in tower.items()} | {"textual.head.0.weight": torch.ones(1),
               "log_scale": torch.ones(())}, own / S.WAN_CLIP)
    renamed = {}
    for name, x in tower.items():
        for wan, other in TOWER.items():
            name = name.replace(wan, other)
        if ".attn.to_qkv." in name:
            renamed |= {name.replace("attn.to_qkv", f"self_attn.{part}_proj"): segment.clone()
                        for part, segment in zip("qkv", x.chunk(3))}
        elif name != "head":
            renamed[name] = x.flatten() if name.endswith("class_embedding") else (
                x[0] if "position" in name else x).contiguous()
    (theirs / "image_encoder").mkdir()
    save_file({f"vision_model.{name}": x for name, x in renamed.items()},
              theirs / "image_encoder/model.safetensors")
    (theirs / "image_encoder/config.json").write_text(json.dumps(dict(
        hidden_size=160, intermediate_size=320, num_hidden_layers=3, num_attention_heads=2, image_size=8,
        patch_size=4, hidden_act="gelu")))
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(home / "picture.png")
    return home


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_the_tokens_of_an_image_are_the_towers_last_but_one(layout, i2v):
    picture = np.random.default_rng(1).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in caption.CLIP_MEAN)
    x = (torch.from_numpy(picture).permute(2, 0, 1) / 255 - mean) / std
    result = S.open_image_encoder(i2v / layout, "cpu")(picture)
    assert torch.allclose(result, tower_by_hand(tower_weights(), x[None])[0], atol=1e-5)
    wide = np.pad(picture, ((0, 0), (4, 4), (0, 0)), mode="reflect")         # this its middle
    is_cut = torch.equal(S.open_image_encoder(i2v / layout, "cpu")(wide), result)
    assert is_cut == (layout == "diffusers")


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_wan_makes_a_video_of_an_image(layout, i2v, tmp_path, monkeypatch, capsys):
    """In both layouts, from the command line; what the tower sees makes a difference."""
    command = [str(i2v / layout), "--prompt", "a", "--size", "32x32", "--frames", "5", "--steps", "2",
               "--device", "cpu", "--text_encoder", str(FIXTURES / "wan-umt5"), "--out", str(tmp_path),
               "--format", "png", "--offload"]
    look = lambda: np.stack([np.asarray(Image.open(path)) for folder in tmp_path.iterdir()
                             if folder.is_dir() for path in sorted(folder.iterdir())])
    with pytest.raises(SystemExit):
        S.main(command)
    assert "--image" in capsys.readouterr().err
    S.main([*command, "--image", str(i2v / "picture.png")])
    facts, = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert facts["how"]["shift"] == 3.0 and facts["wish"]["negative"].startswith("镜头晃动")
    video, read = look(), S.open_image_encoder
    assert video.shape == (5, 32, 32, 3) and video.std() > 5
    monkeypatch.setattr(S, "open_image_encoder", lambda *at: lambda picture: -read(*at)(picture))
    S.main([*command, "--image", str(i2v / "picture.png")])
    assert np.abs(look().astype(int) - video).max() > 3
