"""Tasks from images and videos: what each clip of a timeline is given, and what becomes of it; on the
demo's model, tests/demo, that it keeps what it is given, moves on from it and meets both ends."""
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare_data as P
import sample as S
import test_sample
import train_vae as V

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
    """(sampler, timeline before and after it was told, jobs of each step)."""
    args = S.parse_options(["tiny", "--prompt", "p", "--steps", "2", "--frames", "9", "--device", "cpu",
                            *map(str, options)])
    args.quiet, jobs = True, []
    sampler = S.open_sampler(args, torch.device("cpu"))
    denoise = sampler.denoise
    sampler.denoise = lambda now, *more: [jobs.extend(now), denoise(now, *more)][1]
    timeline, = sampler([S.request_of(args, {"prompt": "p"})])
    return sampler, timeline, jobs


def shown(sampler, timeline):
    return np.stack(list(sampler.frames(timeline)))


def test_a_first_frame_is_kept_exactly_and_given(inside):
    sampler, timeline, (job,) = opened("--image", "a.mp4")
    first = sampler.encode(S.read_media("a.mp4", 10.0, 32, 48)[:1])
    (given, at), = job.cond_latents
    assert at == 0 and torch.equal(given, first) and torch.equal(job.first_latent, first)
    assert torch.allclose(timeline.segments[0].latents[:, :1], first, atol=1e-6)
    own = next(sampler.decode(first))[0]                     # the autoencoder's own reconstruction
    assert away(shown(sampler, timeline)[0], own) <= 1


def test_a_last_frame_is_given_at_its_time(inside):
    _, _, (job,) = opened("--image", "a.mp4", "--last", "b.mp4")
    assert [at for _, at in job.cond_latents] == [0.0, 0.8] and job.first_latent is not None
    _, _, (job,) = opened("--last", "b.mp4")
    assert [at for _, at in job.cond_latents] == [0.8] and job.first_latent is None


def test_an_extension_sees_the_end_of_the_part_before_encoded_separately(inside):
    """As training's halves are: the first latent is of one frame, without a past."""
    sampler, timeline, jobs = opened("--video", "a.mp4", "--extend", 3, "--context", 9)
    frames = S.read_media("a.mp4", 10.0, 32, 48)
    (given, at), = jobs[0].cond_latents
    assert at == -0.9 and torch.equal(given, sampler.encode(frames[-9:]))
    decoded = lambda segment: np.concatenate(list(sampler.decode(segment.latents)))
    for before, job in zip(timeline.segments[1:], jobs[1:]):
        (given, at), = job.cond_latents
        assert at == -0.9 and job.first_latent is None
        assert torch.equal(given, sampler.encode(decoded(before)[-9:]))
    video = shown(sampler, timeline)
    assert len(video) == 17 + 3 * 9 == timeline.count() and away(video[:17], frames) == 0
    assert len({job.noise[0, 0, 0, 0].item() for job in jobs}) == 3


@pytest.mark.parametrize("n_frames, seen", [(9, 5), (13, 5), (17, 5), (21, 9), (33, 13)])
def test_an_extension_sees_as_much_as_in_training(n_frames, seen, inside):
    """Unless told, as many latents as the first half of a clip that long has (train_vae.py), of a
    file and of a part alike, however few are decoded at a time."""
    sampler, timeline, jobs = opened("--video", "a.mp4", "--frames", n_frames, "--extend", 2,
                                  "--chunk", 1)
    (_, _, half), *_ = [part for part in V.separate_parts("k", 0, max(n_frames, 13), 4) if part[0] == "k:a"]
    assert half == seen
    for segment, job in zip(timeline.segments, jobs):
        (given, at), = job.cond_latents
        frames = np.concatenate([*sampler.decode(segment.latents)]) if segment.frames is None else \
            segment.frames
        assert given.shape[1] == 1 + (seen - 1) // 4 and at == pytest.approx(-seen / 10)
        assert torch.equal(given, sampler.encode(frames[-seen:]))


def test_extension_backwards_comes_before(inside):
    sampler, timeline, jobs = opened("--video", "a.mp4", "--extend", -2)
    frames = S.read_media("a.mp4", 10.0, 32, 48)
    assert jobs[0].cond_latents[0][1] == jobs[1].cond_latents[0][1] == 0.9
    assert torch.equal(jobs[0].cond_latents[0][0], sampler.encode(frames[:5]))
    later = np.concatenate(list(sampler.decode(timeline.segments[1].latents)))
    assert torch.equal(jobs[1].cond_latents[0][0], sampler.encode(later[:5]))
    assert away(shown(sampler, timeline)[18:], frames) == 0


def test_connecting_and_looping_end_in_what_is_there(inside):
    one, other = (S.read_media(name, 10.0, 32, 48) for name in ("a.mp4", "b.mp4"))
    sampler, timeline, (job,) = opened("--video", "a.mp4", "--to", "b.mp4")
    video = shown(sampler, timeline)
    assert len(video) == 17 + 7 + 17 and away(video[:17], one) == away(video[-17:], other) == 0
    (first, at), (last, end) = job.cond_latents
    assert (at, end) == (0.0, 0.8) and torch.equal(first, sampler.encode(one[-1:]))
    assert torch.equal(last, sampler.encode(other[:1])) and torch.equal(job.first_latent, first)
    sampler, timeline, (job,) = opened("--video", "a.mp4", "--loop")
    assert torch.equal(job.cond_latents[1][0], sampler.encode(one[:1])) and timeline.count() == 17 + 7
    sampler, timeline, jobs = opened("--loop")                  # of its own video
    frames = np.concatenate(list(sampler.decode(timeline.segments[0].latents)))
    assert torch.equal(jobs[1].cond_latents[0][0], sampler.encode(frames[-1:]))
    assert torch.equal(jobs[1].cond_latents[1][0], sampler.encode(frames[:1])) and timeline.count() == 9 + 7


def test_prompts_over_time_each_have_their_part(inside):
    sampler, timeline, jobs = opened("--then", "q", "r")
    read = sampler.part("text")
    assert [job.text for job in jobs] == [read("p"), read("q"), read("r")] and timeline.count() == 27


def test_strength_says_how_much_is_made_anew(inside):
    """The less, the nearer to the video; all of it: as if there were no video."""
    sampler, timeline, _ = opened("--video", "a.mp4", "--strength", 1, "--steps", 4)
    _, free, _ = opened("--steps", 4)
    assert torch.allclose(timeline.segments[0].latents, free.segments[0].latents, atol=1e-4)
    z = sampler.encode(S.read_media("a.mp4", 10.0, 32, 48)[:9])
    near = [(opened("--video", "a.mp4", "--strength", s, "--steps", 4)[1].segments[0].latents - z).norm()
            for s in (0.25, 0.5, 0.75)]
    assert near[0] < near[1] < near[2]


def test_a_long_video_is_decoded_as_it_is_written(inside):
    """Of each segment a chunk at a time: nothing asks for the next before the last is used."""
    sampler, timeline, _ = opened("--extend", 2, "--chunk", 1)
    asked, decode = [], sampler.decode
    sampler.decode = lambda z: (asked.append(len(part)) or part for part in decode(z))
    frames = sampler.frames(timeline)
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


OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
SHOTS = [("red", "square", "up"), ("blue", "square", "right"), ("yellow", "triangle", "left"),
         ("red", "triangle", "right"), ("green", "triangle", "up"), ("green", "circle", "left"),
         ("blue", "square", "down"), ("green", "square", "up")]


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    """[(prompt, prompt of the way back, {part: file})] of shots of 18 frames: their first 9 (a) and
    last 9 (b), their first 5 (c) and the 5 after 7 others (d)."""
    home, result = tmp_path_factory.mktemp("shots"), []
    for n, (colour, form, direction) in enumerate(SHOTS):
        shot = P.demo_shot(P.rng(n, "task"), [SHOTS[n]], "dark", 48, 32, 10)
        frames, files = P.render_shot({**shot, "frames": 18}), {}
        for name, part in (("a", frames[:9]), ("b", frames[9:]), ("c", frames[:5]), ("d", frames[12:17])):
            files[name] = str(home / f"{n}{name}.mp4")
            P.write_video(files[name], part, 10, crf=0)
        result.append((f"a {colour} {form} moves {direction}",
                      f"a {colour} {form} moves {OPPOSITE[direction]}", files))
    return result


def told(rows, *options):
    """Videos of the demo's model, float [T, H, W, 3]; what files show as the autoencoder has it."""
    args = S.parse_options([str(DEMO), "--prompt", "p", "--device", "cpu", *map(str, options)])
    args.quiet = True
    sampler = S.open_sampler(args, torch.device("cpu"))
    timelines = sampler([S.request_of(args, row) for row in rows])
    for segment in (segment for timeline in timelines for segment in timeline.segments if segment.frames is not None):
        segment.frames = again(sampler, segment.frames)
    return [shown(sampler, timeline).astype(float) for timeline in timelines]


def again(sampler, frames):
    """Frames as the autoencoder has them."""
    return np.concatenate(list(sampler.decode(sampler.encode(frames))))


def steps_of(video):
    """Mean difference of each frame and the next, of the last and the first."""
    return np.abs(np.roll(video, -1, 0) - video).mean((1, 2, 3))


def seam(video, at, is_ring=False):
    """The difference where parts meet over the largest within four frames on either side."""
    steps = steps_of(video)
    near = [steps[j % len(steps)] for j in range(at - 4, at + 5)
            if j != at and (is_ring or 0 <= j < len(steps) - 1)]
    return steps[at] / max(near)


def test_the_demo_model_keeps_what_it_is_given_and_moves_on(shots):
    """The given frame comes first, as the autoencoder has it; the shape goes on in its direction."""
    videos = told([{"prompt": prompt, "image": files["a"]} for prompt, _, files in shots])
    args = S.parse_options([str(DEMO), "--prompt", "p", "--device", "cpu"])
    sampler = S.open_sampler(args, torch.device("cpu"))
    for video, (prompt, _, files) in zip(videos, shots):
        own = again(sampler, S.read_media(files["a"], 10.0, 32, 48)[:1])[0]
        assert 10 * np.log10(255**2 / max(1e-9, np.square(video[0] - own).mean())) > 30
        assert np.abs(video[-1] - video[0]).mean() > 5
    result = [S.describe(video.astype(np.uint8))[0] for video in videos]
    right = [prompt == f"a {one['colour']} {one['form']} moves {one['direction']}"
             for one, (prompt, _, _) in zip(result, shots)]
    assert sum(right) >= len(shots) - 1, result


@pytest.mark.parametrize("task, seams", [("after", [8]), ("before", [8]), ("to", [4, 11]), ("loop", [8, 15])])
def test_seams_are_no_larger_than_what_is_beside_them(task, seams, shots):
    """Forwards, backwards, between two clips and round a loop: in the median shot frames differ where
    parts meet by hardly more than within four frames on either side, and in none by as much again.
    (Of the shots' own frames, each half encoded alone, it is 0.90 to 1.14 times as much.)"""
    rows = [{"after": {"prompt": way, "video": files["a"], "extend": 1},
             "before": {"prompt": way, "video": files["b"], "extend": -1},
             "to": {"prompt": way, "video": files["c"], "to": files["d"]},
             "loop": {"prompt": back, "video": files["a"], "loop": True}}[task]
            for way, back, files in shots]
    videos = told(rows, "--frames", 9)
    for at in seams:
        result = [seam(video, at, task == "loop") for video in videos]
        assert np.median(result) <= 1.15 and max(result) <= 1.8, np.round(result, 2)


@pytest.mark.parametrize("task, least", [("then", 0.77), ("extend", 0.8), ("loop", 0.8), ("video", 0.86)])
def test_a_chain_holds_its_shape(task, least, shots):
    """There and back, on past the frame's edge, round, and on from a file: in each frame, those at
    the joints too, the shape lies over the ideal form (over 24 prompts: sample.py --eval chain)."""
    rows = [{"then": {"then": [back, way]}, "extend": {"extend": 2}, "loop": {"loop": True},
             "video": {"video": files["a"], "extend": 2}}[task] | {"prompt": way}
            for way, back, files in shots]
    videos = told(rows, "--frames", 13)
    result = [S.overlap(video.astype(np.uint8), *shot[:2]) for video, shot in zip(videos, SHOTS)]
    assert np.median(result, 0).min() >= least, np.median(result, 0).round(2)


def test_ten_extensions_keep_their_colours():
    """The ground's level, a channel's median, part by part beside the first: the shape may leave."""
    video, = told([{"prompt": "a blue circle moves down", "extend": 10}], "--frames", 9)
    ground = np.median(video.reshape(11, -1, 3), axis=1)
    assert np.abs(ground - ground[0]).max() <= 2 * 10            # 2 levels of 255 a part
