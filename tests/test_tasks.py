"""Tasks from images and videos: what each clip of a story is given, and what becomes of it; on the
demo's model, tests/demo, that it keeps what it is given, moves on from it and meets both ends."""
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare_data as P
import sample as S
import test_sample

run, away = test_sample.run, test_sample.away                # a fixture, and a measure
DEMO = Path(__file__).with_name("demo")


@pytest.fixture
def inside(run, monkeypatch):
    monkeypatch.chdir(run)
    for name, start in (("a.mp4", 0), ("b.mp4", 100)):
        if not Path(name).exists():
            frames = np.full((17, 32, 48, 3), 60, np.uint8)
            for t, frame in enumerate(frames):
                frame[8:20, 2 * t:2 * t + 12] = start + 9 * t
            P.write_video(name, frames, 10)
    return run


def opened(*options):
    """(sampler, story before and after it was told, jobs of each step)."""
    args = S.parse_options(["tiny", "--prompt", "p", "--steps", "2", "--frames", "9", "--device", "cpu",
                            *map(str, options)])
    args.quiet, jobs = True, []
    sampler = S.open_sampler(args, torch.device("cpu"))
    denoise = sampler.denoise
    sampler.denoise = lambda now, *more: [jobs.extend(now), denoise(now, *more)][1]
    story, = sampler([S.wish_of(args, {"prompt": "p"})])
    return sampler, story, jobs


def shown(sampler, story):
    return np.stack(list(sampler.frames(story)))


def test_a_first_frame_is_kept_exactly_and_given(inside):
    sampler, story, (job,) = opened("--image", "a.mp4")
    first = sampler.encode(S.read_media("a.mp4", 10.0, 32, 48)[:1])
    (given, at), = job.givens
    assert at == 0 and torch.equal(given, first) and torch.equal(job.first, first)
    assert torch.allclose(story.pieces[0].latents[:, :1], first, atol=1e-6)
    own = next(sampler.decode(first))[0]                     # the autoencoder's own reconstruction
    assert away(shown(sampler, story)[0], own) <= 1


def test_a_last_frame_is_given_at_its_time(inside):
    _, _, (job,) = opened("--image", "a.mp4", "--last", "b.mp4")
    assert [at for _, at in job.givens] == [0.0, 0.8] and job.first is not None
    _, _, (job,) = opened("--last", "b.mp4")
    assert [at for _, at in job.givens] == [0.8] and job.first is None


def test_extension_goes_on_from_latents_without_a_way_through_pixels(inside):
    sampler, story, jobs = opened("--video", "a.mp4", "--extend", 3, "--context", 9)
    frames = S.read_media("a.mp4", 10.0, 32, 48)
    (given, at), = jobs[0].givens
    assert at == -0.9 and torch.equal(given, sampler.encode(frames[-9:]))
    for before, job in zip(story.pieces[1:], jobs[1:]):
        assert job.givens == [(before.latents, -0.9)] and job.first is None
    video = shown(sampler, story)
    assert len(video) == 17 + 3 * 9 == story.count() and away(video[:17], frames) == 0
    assert len({job.noise[0, 0, 0, 0].item() for job in jobs}) == 3


def test_extension_backwards_comes_before(inside):
    sampler, story, jobs = opened("--video", "a.mp4", "--extend", -2, "--context", 5)
    frames = S.read_media("a.mp4", 10.0, 32, 48)
    assert jobs[0].givens[0][1] == jobs[1].givens[0][1] == 0.9
    assert torch.equal(jobs[0].givens[0][0], sampler.encode(frames[:5]))
    assert torch.equal(jobs[1].givens[0][0], story.pieces[1].latents)
    assert away(shown(sampler, story)[18:], frames) == 0


def test_connecting_and_looping_end_in_what_is_there(inside):
    one, other = (S.read_media(name, 10.0, 32, 48) for name in ("a.mp4", "b.mp4"))
    sampler, story, (job,) = opened("--video", "a.mp4", "--to", "b.mp4")
    video = shown(sampler, story)
    assert len(video) == 17 + 7 + 17 and away(video[:17], one) == away(video[-17:], other) == 0
    (first, at), (last, end) = job.givens
    assert (at, end) == (0.0, 0.8) and torch.equal(first, sampler.encode(one[-1:]))
    assert torch.equal(last, sampler.encode(other[:1])) and torch.equal(job.first, first)
    sampler, story, (job,) = opened("--video", "a.mp4", "--loop")
    assert torch.equal(job.givens[1][0], sampler.encode(one[:1])) and story.count() == 17 + 7
    sampler, story, jobs = opened("--loop")                  # of its own video
    frames = np.concatenate(list(sampler.decode(story.pieces[0].latents)))
    assert torch.equal(jobs[1].givens[0][0], sampler.encode(frames[-1:]))
    assert torch.equal(jobs[1].givens[1][0], sampler.encode(frames[:1])) and story.count() == 9 + 7


def test_prompts_over_time_each_have_their_part(inside):
    sampler, story, jobs = opened("--then", "q", "r")
    read = sampler.part("text")
    assert [job.text for job in jobs] == [read("p"), read("q"), read("r")] and story.count() == 27


def test_strength_says_how_much_is_made_anew(inside):
    """The less, the nearer to the video; all of it: as if there were no video."""
    sampler, story, _ = opened("--video", "a.mp4", "--strength", 1, "--steps", 4)
    _, free, _ = opened("--steps", 4)
    assert torch.allclose(story.pieces[0].latents, free.pieces[0].latents, atol=1e-4)
    z = sampler.encode(S.read_media("a.mp4", 10.0, 32, 48)[:9])
    near = [(opened("--video", "a.mp4", "--strength", s, "--steps", 4)[1].pieces[0].latents - z).norm()
            for s in (0.25, 0.5, 0.75)]
    assert near[0] < near[1] < near[2]


def test_a_long_video_is_decoded_as_it_is_written(inside):
    """Of each piece a chunk at a time: nothing asks for the next before the last is used."""
    sampler, story, _ = opened("--extend", 2, "--chunk", 1)
    asked, decode = [], sampler.decode
    sampler.decode = lambda z: (asked.append(len(part)) or part for part in decode(z))
    frames = sampler.frames(story)
    next(frames)
    assert asked == [1]
    assert len(list(frames)) == 26 and asked == [1, 4, 4] * 3


def test_drift_is_measured_and_plotted(inside, tmp_path):
    S.main(["tiny", "--prompt", "p", "--extend", "2", "--frames", "5", "--steps", "2", "--device", "cpu",
            "--out", str(tmp_path)])
    path, = tmp_path.glob("p-s0-extend-*.json")
    facts = S.json.loads(path.read_text())
    assert np.array(facts["drift"]).shape == (3, 3) and path.with_name(f"{path.stem}-drift.png").exists()


def test_a_run_without_givens_and_a_class_refuse_tasks(inside, capsys):
    config = S.json.loads((inside / "runs/tiny/config.json").read_text())
    path = inside / "runs/tiny/config.json"
    path.write_text(S.json.dumps({**config, "args": {**config["args"], "given": 0}}))
    try:
        with pytest.raises(SystemExit):
            opened("--image", "a.mp4")
        assert "--given" in capsys.readouterr().err
    finally:
        path.write_text(S.json.dumps(config))


# ---- on the demo's trained model, of which what a file shows counts as the autoencoder has it


@pytest.fixture(scope="module")
def shot(tmp_path_factory):
    """A folder with parts of shots of 17 frames: a blue circle that moves down, its first 9 (a), its
    first 5 and its last 5 (c, d); a green square that moves right, its last 9 (b)."""
    home = tmp_path_factory.mktemp("shot")
    blue, green = (P.render_shot({**P.demo_shot(P.rng(n, "task"), [what], "dark", 48, 32, 10), "frames": 17})
                   for n, what in ((6, ("blue", "circle", "down")), (7, ("green", "square", "right"))))
    for name, part in (("a", blue[:9]), ("b", green[8:]), ("c", blue[:5]), ("d", blue[12:])):
        P.write_video(home / f"{name}.mp4", part, 10, crf=0)
    return home


def told(*options, prompt="a blue circle moves down"):
    """(video of the demo's model, its sampler): float [T, H, W, 3]."""
    args = S.parse_options([str(DEMO), "--prompt", prompt, "--device", "cpu", *map(str, options)])
    args.quiet = True
    sampler = S.open_sampler(args, torch.device("cpu"))
    story, = sampler([S.wish_of(args, {"prompt": prompt})])
    for piece in story.pieces:
        if piece.frames is not None:
            piece.frames = np.concatenate(list(sampler.decode(sampler.encode(piece.frames))))
    return shown(sampler, story).astype(float), sampler


def steps_of(video):
    """Mean difference of each frame and the next, of the last and the first."""
    return np.abs(np.roll(video, -1, 0) - video).mean((1, 2, 3))


def test_the_demo_model_keeps_what_it_is_given_and_moves_on(shot):
    """The given frame comes first, as the autoencoder has it; the circle goes on downwards."""
    video, sampler = told("--image", shot / "a.mp4")
    own = next(sampler.decode(sampler.encode(S.read_media(shot / "a.mp4", 10.0, 32, 48)[:1])))[0]
    assert 10 * np.log10(255**2 / max(1e-9, np.square(video[0] - own).mean())) > 30
    assert np.abs(video[-1] - video[0]).mean() > 10
    found = S.describe(video.astype(np.uint8))[0]
    assert (found["colour"], found["direction"]) == ("blue", "down")


@pytest.mark.parametrize("options, prompt, seams", [
    (["--video", "a.mp4", "--extend", 1], "a blue circle moves down", [8]),
    (["--video", "b.mp4", "--extend", -1], "a green square moves right", [8]),
    (["--video", "c.mp4", "--to", "d.mp4"], "a blue circle moves down", [4, 11]),
    (["--video", "a.mp4", "--loop"], "a blue circle moves up", [8, 15])])
def test_seams_are_no_larger_than_what_is_beside_them(options, prompt, seams, shot):
    """Forwards, backwards, between two clips and round a loop: frames differ where parts meet by no
    more than within four frames on either side."""
    options = [shot / option if str(option).endswith(".mp4") else option for option in options]
    video, _ = told("--frames", 9, *options, prompt=prompt)
    steps, is_ring = steps_of(video), "--loop" in options
    for seam in seams:
        near = [steps[j % len(steps)] for j in range(seam - 4, seam + 5)
                if j != seam and (is_ring or 0 <= j < len(steps) - 1)]
        assert steps[seam] <= 1.05 * max(near), steps.round(1)


def test_ten_extensions_keep_their_colours():
    """The ground's level, a channel's median, part by part beside the first: the shape may leave."""
    video, _ = told("--extend", 10, "--frames", 9)
    ground = np.median(video.reshape(11, -1, 3), axis=1)
    assert np.abs(ground - ground[0]).max() <= 3 * 10            # 3 levels of 255 a part
