"""Sampling of any size, and the image analysis that reads the demo's videos."""
import numpy as np
import pytest
import torch

import sample as S
from prepare_data import (COLOURS, DIRECTIONS, FORMS, demo_files, demo_shot, is_left_out, render_shot,
                          rng)


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
        found = S.describe(coded(render_shot(shot), tmp_path / f"{i}.mp4"))
        wanted = {(s["colour"], s["form"], s["direction"]) for s in shot["shapes"]}
        right.append({(s["colour"], s["form"], s["direction"]) for s in found} == wanted)
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
    cut = S.cut(video, dict(frames=7, height=36, width=44))
    assert np.array_equal(cut, video[:7, 2:38, 2:46])


@pytest.mark.parametrize("text", ["32", "32x", "axb", "0x9", "32x48x3"])
def test_a_wrong_size_is_refused(text, capsys):
    with pytest.raises(SystemExit) as error:
        S.parse_options(["demo", "--prompt", "x", "--size", text])
    assert error.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
