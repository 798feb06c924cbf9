"""prepare_data.py on media made here: every kind of file and damage, the folder's bytes whatever
the workers, parts and kills, and one line for wrong input."""
import hashlib
import itertools
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[1] / "prepare_data.py"
sys.path.insert(0, str(SCRIPT.parent))
import prepare_data as pd  # noqa: E402

RED, GREEN, BLUE, WHITE = (230, 30, 30), (30, 200, 60), (40, 60, 220), (250, 250, 250)


# -- media -----------------------------------------------------------------------------------------

def encode(path, frames, fps=12, codec="libx264", pix_fmt="yuv420p", pts=None, tags=(), turn=None,
           sar=None, matrix=1, crf="4"):
    """A video of RGB `frames`; pts in ms if given; tags: attributes of the encoder; turn: arguments
    of set_display_rotation; matrix: 1 = BT.709, 5 = BT.601."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=1000 if pts else fps)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        if codec == "libx264":
            stream.options = {"crf": crf, "preset": "veryfast"}
        if turn:
            stream.set_display_rotation(*turn)
        if sar:
            stream.codec_context.sample_aspect_ratio = sar
        for name, value in {"colorspace": matrix, **dict(tags)}.items():
            setattr(stream.codec_context, name, value)
        full = 2 if dict(tags).get("color_range") == 2 else 1
        for n, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format=pix_fmt, dst_colorspace=matrix, dst_color_range=full)
            frame.pts = pts[n] if pts else n
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def flat(colour, size=(64, 48)):
    return np.broadcast_to(np.uint8(colour), (size[1], size[0], 3))


def shot(colour, n_frames, size=(64, 48)):
    """A white square that moves over a coloured ground."""
    frames = np.repeat(flat(colour, size)[None], n_frames, 0)
    for n, frame in enumerate(frames):
        x = 2 + n * (size[0] - 16) // max(1, n_frames)
        frame[8:20, x:x + 12] = WHITE
    return list(frames)


def counter(n_frames):
    """Frames that tell their own number by their level, over a white bar that gives contrast."""
    frames = [np.array(flat((20 + 8 * n,) * 3)) for n in range(n_frames)]
    for frame in frames:
        frame[40:] = 255
    return frames


def numbers(clip):
    return [round((int(frame[10, 10].mean()) - 20) / 8) for frame in clip]


def quarters():
    frame = np.zeros((40, 64, 3), np.uint8)
    frame[:20, :32], frame[:20, 32:], frame[20:, :32], frame[20:, 32:] = RED, GREEN, BLUE, WHITE
    return frame


def corners(frame):
    """Names of the colours at the corners: top left, top right, bottom left, bottom right."""
    names = {"R": RED, "G": GREEN, "B": BLUE, "W": WHITE}
    return "".join(min(names, key=lambda k: np.abs(np.int16(names[k]) - frame[y, x]).sum())
                   for y, x in ((4, 4), (4, -5), (-5, 4), (-5, -5)))


def make_videos(folder):
    folder.mkdir()
    encode(folder / "cuts.mp4", shot(RED, 12) + shot(GREEN, 9) + shot(BLUE, 15))
    shutil.copy(folder / "cuts.mp4", folder / "cuts_again.mp4")
    encode(folder / "vfr.mp4", counter(8), pts=[0, 100, 200, 300, 600, 700, 800, 1000])
    for name, turn in {"turn90": (90,), "turn180": (180,), "turn270": (270,),
                       "mirror": (0, True), "turn90mirror": (90, True)}.items():
        encode(folder / f"{name}.mp4", [quarters()] * 12, turn=turn)
    encode(folder / "odd.mkv", shot(RED, 12, (65, 49)), pix_fmt="yuv444p")
    encode(folder / "old.avi", shot(GREEN, 12), codec="mpeg4")
    encode(folder / "wide.mp4", shot(BLUE, 12), sar=2)
    encode(folder / "hdr.mp4", shot(RED, 12), tags={"color_trc": 16})
    encode(folder / "black.mp4", [flat((0, 0, 0))] * 12)
    encode(folder / "short.mp4", shot(RED, 3))
    encode(folder / "tiny.mp4", shot(RED, 12, (30, 30)))
    encode(folder / "flash.mp4", shot(BLUE, 10) + [flat(WHITE)] * 2 + shot(BLUE, 24)[12:])
    encode(folder / "one.ts", shot((200, 90, 160), 12))
    encode(folder / "two.ts", shot(BLUE, 12, (48, 48)))
    joined = (folder / "one.ts").read_bytes() + (folder / "two.ts").read_bytes()
    (folder / "joined.ts").write_bytes(joined)
    (folder / "one.ts").unlink(), (folder / "two.ts").unlink()
    (folder / "sub").mkdir()
    encode(folder / "sub" / "été 中.mp4", shot(GREEN, 12))
    (folder / "sub" / "notes.txt").write_text("no video")
    (folder / "._cuts.mp4").write_bytes(b"a Mac's twin")
    encode(folder / "long.mp4", shot(RED, 60))
    make_damage(folder)
    make_pictures(folder)


def make_damage(folder):
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("404 Not Found\n" * 50)
    data = (folder / "cuts.mp4").read_bytes()
    (folder / "half.mp4").write_bytes(data[:len(data) // 2])                     # its index is lost
    noise = np.random.default_rng(0).integers(0, 256, (120, 48, 64, 3), dtype=np.uint8)
    encode(folder / "bits.mp4", list(noise), crf="40")
    data = bytearray((folder / "bits.mp4").read_bytes())
    for at in range(len(data) * 4 // 10, len(data) * 5 // 10, 37):
        data[at] ^= 255
    (folder / "bits.mp4").write_bytes(data)
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with av.open(str(folder / "cover.mp4"), "w") as container:                  # art beside a video
        cover = container.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 400
        cover.pix_fmt, cover.disposition = "yuvj420p", av.stream.Disposition.attached_pic
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(cover.encode(av.VideoFrame.from_ndarray(
            np.array(flat(WHITE, (400, 400))), format="rgb24")))
        container.mux(cover.encode())
        for pixels in shot(RED, 12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def make_pictures(folder):
    picture = Image.fromarray(quarters())
    exif = Image.Exif()
    exif[0x0112] = 6                                                             # turn clockwise
    picture.save(folder / "exif.jpg", quality=95, exif=exif, subsampling=0)
    picture.convert("CMYK").save(folder / "cmyk.JPG", quality=95)
    glass = np.dstack([quarters(), np.full((40, 64), 255, np.uint8)])
    glass[:20, :32, 3] = 0
    Image.fromarray(glass).save(folder / "glass.png")
    deep = np.linspace(0, 65535, 64 * 40).reshape(40, 64).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    picture.quantize(8).save(folder / "palette.png")
    data = (folder / "exif.jpg").read_bytes()
    (folder / "broken.jpg").write_bytes(data[:len(data) * 9 // 10])
    (folder / "page.jpg").write_text("<html>")
    frames = [Image.fromarray(frame) for frame in counter(6)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:],
                   duration=[100, 100, 300, 100, 100, 200])
    frames[0].save(folder / "single.gif")


META = [{"video": "cuts.mp4", "start": 0, "end": 1.3, "caption": "red"},         # 0 to 1 s
        {"video": "cuts.mp4", "start": "0:00:01.000", "end": "0:01.8", "caption": ["green", "g"]},
        {"video": "cuts.mp4", "label": 3, "split": "validation"},
        {"path": "odd", "text": "odd by its stem", "split": "test"},
        {"video": "sub/été 中.mp4", "caption": "une forme"},
        {"video": "gone.mp4", "start": 1, "end": 2, "caption": "lost"},
        {"video": "cuts.mp4", "start": 3, "end": 2}, {"caption": "no video"},
        {"video": "cuts.mp4", "split": "maybe"}]


def run(folder, *options, check=True, **kwargs):
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, options)], cwd=folder, text=True,
                          capture_output=True, **kwargs)
    assert not check or done.returncode == 0, done.stderr
    return done


def bytes_of(folder):
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def row_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


OPTIONS = ["--videos", "videos", "--meta", "meta.jsonl", "--shard_sources", 9, "--max_seconds", 2,
           "--near", 0]                     # pictures as plain as these look alike


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with videos/, meta.jsonl and data/set, prepared from them by two workers."""
    folder = tmp_path_factory.mktemp("prepare")
    make_videos(folder / "videos")
    lines = [json.dumps(row, ensure_ascii=False) for row in META] + ["{torn"]
    (folder / "meta.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = run(folder, "set", *OPTIONS, "--workers", 2)
    assert "Traceback" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def rows(made):
    """{source: its rows}, by the reader that later stages use."""
    result = {}
    for row in pd.open_dataset(made / "data/set"):
        result.setdefault(row["source"], []).append(row)
    return result


def clip(made, rows, source, n=0):
    return pd.read_clip(made / "data/set", rows[source][n])


# -- what becomes of each file ---------------------------------------------------------------------

def test_cuts_are_exact(made, rows):
    first, second, third = rows["cuts.mp4"]
    assert [r["frames"] for r in rows["cuts.mp4"]] == [12, 9, 15]
    assert [r["shot_start"] for r in rows["cuts.mp4"]] == [0.0, 1.0, 1.75]
    assert (third["start"], third["end"], third["fps"]) == (1.75, 3.0, 12.0)
    want = shot(RED, 12) + shot(GREEN, 9) + shot(BLUE, 15)
    got = np.concatenate([clip(made, rows, "cuts.mp4", n) for n in range(3)])
    assert np.abs(got - np.float32(want)).mean() < 4
    for n, (frame, true) in enumerate(zip(got, want)):                  # the square is where it was
        assert abs(int(np.argmax(frame[12].sum(1) > 600)) - int(
            np.argmax(true[12].sum(1) > 600))) <= 1, n


def test_flash_is_no_cut(rows):
    assert [row["frames"] for row in rows["flash.mp4"]] == [24]


def test_long_shots_are_cut_in_equal_pieces(rows):
    assert [(r["start"], r["end"], r["frames"]) for r in rows["long.mp4"]] == [
        (0.0, 1.666667, 20), (1.666667, 3.333333, 20), (3.333333, 5.0, 20)]
    assert {(r["shot_start"], r["shot_end"]) for r in rows["long.mp4"]} == {(0.0, 5.0)}


def test_variable_rate_becomes_the_median(made, rows):
    row, = rows["vfr.mp4"]
    assert (row["fps"], row["frames"], row["end"]) == (10.0, 11, 1.1)
    assert numbers(clip(made, rows, "vfr.mp4")) == [0, 1, 2, 3, 3, 3, 4, 5, 6, 6, 7]


def test_animated_gif_is_a_video_and_a_single_one_a_still(made, rows):
    row, = rows["moving.gif"]
    assert (row["fps"], row["frames"]) == (10.0, 8)
    assert numbers(clip(made, rows, "moving.gif")) == [0, 1, 2, 2, 2, 3, 4, 5]
    assert rows["single.gif"][0]["fps"] is None


@pytest.mark.parametrize("name, want", [("turn90", "GWRB"), ("turn180", "WBGR"), (
    "turn270", "BRWG"), ("mirror", "GRWB"), ("turn90mirror", "WGBR")])
def test_rotation_and_mirrors(made, rows, name, want):
    pixels = clip(made, rows, f"{name}.mp4")
    assert pixels.shape[1:3] == ((64, 40) if "90" in name or "270" in name else (40, 64))
    assert corners(pixels[0]) == want


def test_sizes(made, rows):
    assert clip(made, rows, "odd.mkv").shape == (12, 48, 64, 3)         # cropped by one
    assert clip(made, rows, "wide.mp4").shape == (12, 48, 128, 3)       # square pixels
    assert clip(made, rows, "cover.mp4").shape == (12, 48, 64, 3)       # not the 400 px cover
    assert clip(made, rows, "old.avi").shape == (12, 48, 64, 3)
    assert [(r["width"], r["frames"]) for r in rows["joined.ts"]] == [(64, 12), (48, 12)]


def test_bad_packets_are_skipped_and_counted(rows):
    got = rows["bits.mp4"]
    assert got[0]["scores"]["bad_packets"] > 0
    assert 60 <= sum(row["frames"] for row in got) <= 120


def test_every_bad_file_is_named(made):
    rejects = {row["source"]: row for row in row_lines(made / "data/set/rejected.jsonl")}
    reasons = {name: rejects[name]["reason"] for name in rejects if name}
    assert reasons == {
        "empty.mp4": "empty file", "sound.mp4": "no video stream",
        "text.mp4": "cannot be opened: Invalid data found when processing input",
        "half.mp4": "cannot be opened: Invalid data found when processing input",
        "broken.jpg": "broken picture", "page.jpg": "not a picture that can be read",
         "black.mp4": "too flat", "short.mp4": "too short",
        "tiny.mp4": "too small", "gone.mp4": "missing video"}
    short = rejects["short.mp4"]
    assert (short["shot_start"], short["shot_end"], short["figure"], short["threshold"]) == (
        0.0, 0.25, 0.25, 0.5)
    detail = [row["detail"] for row in row_lines(made / "data/set/rejected.jsonl")
              if row["reason"] == "malformed metadata row"]
    assert sorted(detail)[:2] == ["cut off, or not of its format", "no column 'video'"]
    assert "start 3, end 2: not 0 <= start < end" in detail and "split 'maybe'" in detail[2] + detail[3]
    manifest = json.loads((made / "data/set/manifest.json").read_text())
    assert manifest["counts"]["rejected"]["malformed metadata row"] == 4
    every = {path.relative_to(made / "videos").as_posix() for path in (made / "videos").rglob("*.*")
             if path.suffix != ".txt" and not path.name.startswith(".")}
    kept = {row["source"] for path in (made / "data/set").glob("shard-?????.jsonl")
            for row in row_lines(path)}
    assert kept | (set(reasons) - {"gone.mp4"}) == every                # nothing vanished
    assert manifest["counts"]["sources"] == len(every)


def test_stills_keep_their_bytes(made, rows):
    for name, want in (("exif.jpg", "BRWG"), ("cmyk.JPG", "RGBW"), ("glass.png", "WGBW"),
                       ("palette.png", "RGBW")):
        row, = rows[name]
        assert corners(clip(made, rows, name)[0]) == want, name
        assert pd.read_member(made / "data/set", row) == (made / "videos" / name).read_bytes()
        assert (row["fps"], row["frames"]) == (None, 1)
    assert rows["exif.jpg"][0]["width"] == 40
    deep = clip(made, rows, "deep.png")[0]
    assert deep[0, 0, 0] == 0 and deep[-1, -1, 0] == 255 and abs(int(deep[20, 0, 0]) - 128) < 3


@pytest.mark.parametrize("matrix, full", [(1, False), (1, True), (5, False), (5, True)])
def test_colours_by_the_files_tags(tmp_path, matrix, full):
    tags = {"color_range": 2 if full else 1}
    for colour in (RED, GREEN, BLUE, WHITE, (128, 128, 128), (0, 0, 0)):
        encode(tmp_path / "in.mp4", [flat(colour)] * 2, tags=tags, matrix=matrix)
        video = pd.Video(tmp_path / "in.mp4")
        pixels = [video.rgb(frame) for frame in video]
        assert np.abs(pixels[1] - np.int16(colour)).max() <= 4, colour
        pd.write_video(tmp_path / "out.mp4", pixels, fps=12)
        frame = next(iter(pd.Video(tmp_path / "out.mp4")))
        assert (frame.colorspace, frame.color_range, frame.color_trc) == (1, 1, 1)
        again = pd.Video(tmp_path / "out.mp4").rgb(frame)
        assert np.abs(again - np.int16(colour)).max() <= 5, colour


def test_same_frames_same_bytes(tmp_path):
    """x264 with mbtree is not reproducible on frames of few blocks, so it must stay off."""
    for n in range(2):
        pd.write_video(tmp_path / f"{n}.mp4", shot(RED, 12, (32, 32)), fps=29.97)
    data = (tmp_path / "0.mp4").read_bytes()
    assert data == (tmp_path / "1.mp4").read_bytes()
    assert b"mbtree=0" in data and b" threads=1 " in data
    with av.open(str(tmp_path / "0.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(2997, 100)


def test_wrong_timestamps_are_replaced():
    nan = np.nan
    packed = np.array([[1., 2, 4, 3, 5, 7, 6], [1, 2, 3, 4, 5, 6, 7]])          # B-frames in AVI
    assert pd.true_times(packed).tolist() == [0, 1, 2, 3, 4, 5, 6]
    joined = np.array([[5., 6, 7, 0, 1, 2], [nan] * 6])                          # starts again
    assert pd.true_times(joined).tolist() == [0, 1, 2, 3, 4, 5]
    assert pd.true_times(np.array([[nan, 2, nan, 4], [nan] * 4])).tolist() == [0, 1, 2, 3]
    assert np.allclose(pd.true_times(np.full((2, 3), nan)), [0, 0.04, 0.08])
    for more in (9, 20, 60):                          # a stream behind one of 20: shorter, or longer
        both = np.r_[np.arange(20), np.arange(more)] * 0.04 + 1
        assert np.allclose(pd.true_times(np.array([both, both])), np.arange(20 + more) * 0.04)
    wild = np.r_[np.arange(9), 70, np.arange(10, 30)].astype(float)          # one stamp alone
    assert np.allclose(pd.true_times(np.array([wild, wild])), np.arange(30))


# -- captions, splits, labels ----------------------------------------------------------------------

def test_captions_splits_and_labels(rows):
    texts = [[c["text"] for c in row["captions"]] for row in rows["cuts.mp4"]]
    assert texts == [["red"], ["green", "g"], []]
    assert {(row["split"], row["label"]) for row in rows["cuts.mp4"]} == {("val", "3")}
    assert rows["odd.mkv"][0]["captions"] == [
        {"text": "odd by its stem", "source": "meta", "weight": 1.0}]
    assert rows["odd.mkv"][0]["split"] == "test"
    assert rows["sub/été 中.mp4"][0]["captions"][0]["text"] == "une forme"
    drawn = [pd.clip_metadata(f"{n}.mp4", [], 0, 1)[0]["split"] for n in range(2000)]
    assert 60 < drawn.count("val") < 140 and drawn.count("train") + drawn.count("val") == 2000


def test_metadata_forms(tmp_path):
    def facts(name):
        pd.read_metadata([tmp_path / name], name[2:], ["x.mp4"], tmp_path / f"{name}.db")
        return pd.facts_of(tmp_path / f"{name}.db", name[2:], "x.mp4")[0]

    (tmp_path / "a.csv").write_text('video,start,end,caption\nx.mp4,1,2,"[""p"", ""q""]"\nx,,,r\n')
    (tmp_path / "a.tsv").write_text("path\ttext\tsplit\nx.mp4\ta, b\ttest\n")
    one, two = facts("a.csv")
    assert [one["captions"], two["captions"]] == [["p", "q"], ["r"]]
    fact, = facts("a.tsv")
    assert fact["captions"] == ["a, b"] and fact["split"] == "test"
    assert pd.seconds("1:02:03.25") == 3723.25 and pd.seconds("") is None
    (tmp_path / "in/cats").mkdir(parents=True)
    encode(tmp_path / "in/cats/x.mp4", shot(RED, 30))
    (tmp_path / "in/cats/x.txt").write_text("a cat\n")
    run(tmp_path, "set", "--videos", "in", "--format", "folder", "--max_fps", 6, "--max_side", 32,
        "--split", "seconds", "--max_seconds", 2)
    got = pd.open_dataset(tmp_path / "data/set")
    assert [(r["captions"][0]["text"], r["label"]) for r in got] == [("a cat", "cats")] * 2
    assert [(r["frames"], r["fps"], r["width"], r["height"]) for r in got] == [
        (12, 6.0, 32, 24), (3, 6.0, 32, 24)]


def test_pieces_of_the_length_that_was_asked_for_are_kept(tmp_path, capsys, monkeypatch):
    """Of 0.5 s at 25/s there are 12 or 13 frames; without --min_seconds what is left is kept too, as are
    equal pieces. --report alone writes its folder from a finished set; bounds without an end say 'or more'."""
    (tmp_path / "in").mkdir()
    encode(tmp_path / "in/x.mp4", shot(RED, 60), 25)
    monkeypatch.chdir(tmp_path)
    for i, (options, frames) in enumerate((
            (["--split", "seconds"], [13, 12, 13, 12, 10]), (["--split", "seconds", "--min_seconds", "0.5"],
                                                             [13, 12, 13, 12]), ([], [12] * 5))):
        pd.main([f"set{i}", "--videos", "in", "--workers", "1", "--max_seconds", "0.5", *options])
        result = [row["frames"] for row in pd.open_dataset(tmp_path / f"data/set{i}")]
        assert sorted(result) == sorted(frames) and ("min_seconds" in " ".join(options)) == bool(
            pd.read_rows(tmp_path / f"data/set{i}/rejected.jsonl"))
    pd.main(["set0", "--report"])
    assert (tmp_path / "data/set0/report/report.txt").is_file()
    for options, says in ((["set9", "--report"], "--videos DIR is needed"),
                          (["a", "--workers", "0"], "--workers: 0 is out of range, must be 1 or more"),
                          (["a", "--crf", "99"], "must be 0 to 51")):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            pd.main(options)
        assert says in capsys.readouterr().err
    monkeypatch.setattr(pd, "matmul_rate", lambda: 1e9)
    row = {"frames": 50, "height": 480, "width": 640, "start": 0, "end": 2, "fps": 25.0, "captions": []}
    told = lambda **more: pd.next_steps("mine", [row | more] * 9, False).splitlines()[0]
    assert "; less with --max_side 96 --max_fps 12)" in told()
    assert "; less with --max_seconds 2)" in told(height=64, width=96, fps=10.0, end=9)
    assert "less with" not in told(height=64, width=96, fps=12.0)


def test_captions_beside_the_files_need_no_option(tmp_path):
    (tmp_path / "in/cats").mkdir(parents=True)
    for name in "ab":
        encode(tmp_path / f"in/cats/{name}.mp4", shot(RED if name == "a" else BLUE, 12))
    (tmp_path / "in/cats/a.txt").write_text("[a cat]\n walks\n")
    done = run(tmp_path, "set", "--videos", "in", "--near", 0)
    got = {r["source"]: r for r in pd.open_dataset(tmp_path / "data/set")}
    assert [c["text"] for c in got["cats/a.mp4"]["captions"]] == ["[a cat] walks"]
    assert got["cats/b.mp4"]["captions"] == [] and got["cats/a.mp4"]["label"] is None
    assert "2 clips kept of 2: 0 rejected, 0 near-duplicates" in done.stdout
    assert "1 captioned" in done.stdout


# -- the folder ------------------------------------------------------------------------------------

def test_shards_are_webdataset(made):
    seen = set()
    for path in sorted((made / "data/set").glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            named = {row["key"]: row for row in row_lines(path.with_suffix(".jsonl"))
                     if "duplicate_of" not in row}
            assert len(members) == 2 * len(named)
            for media, text in zip(members[::2], members[1::2]):
                key, extension = media.name.split(".")
                assert text.name == f"{key}.json" and "/" not in key
                assert extension in ("mp4", "jpg", "png", "gif")
                row = named[key]
                assert (media.offset_data, media.size) == (row["offset"], row["length"])
                assert (media.mtime, media.uid, media.uname) == (0, 0, "")
                inside = json.load(tar.extractfile(text))
                assert inside == {k: v for k, v in row.items() if k not in ("offset", "length")}
                assert key not in seen
                seen.add(key)
    assert len(seen) > 25


def test_manifest_and_duplicates(made, rows):
    folder = made / "data/set"
    manifest = json.loads((folder / "manifest.json").read_text())
    twins = row_lines(folder / "duplicates.jsonl")
    assert [(r["key"][:10], r["of"][:5], r["distance"]) for r in twins] == [
        ("cuts_again", "cuts-", 0)] * 3
    assert "cuts_again.mp4" not in rows
    assert manifest["counts"]["duplicates"] == 3 and manifest["format"] == 1
    assert str(made) not in (folder / "manifest.json").read_text() + (
        folder / "plan.json").read_text()
    for files in manifest["shards"].values():
        for name, digest in files.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    with Image.open(folder / "contact.png") as sheet:
        assert sheet.width > 400 and np.asarray(sheet).std() > 20


def test_captions_of_a_later_stage_are_read(made, rows, tmp_path):
    shutil.copytree(made / "data/set", tmp_path / "set")
    key, name = rows["wide.mp4"][0]["key"], rows["wide.mp4"][0]["shard"]
    (tmp_path / "set" / f"{name}.captions-run1.jsonl").write_text(
        json.dumps({"key": key, "caption": "wide", "prompt": "", "scores": {}}) + "\n")
    row, = [row for row in pd.open_dataset(tmp_path / "set") if row["key"] == key]
    assert row["captions"] == [{"text": "wide", "source": "run1", "weight": 1.0}]


def test_workers_and_parts_give_the_same_bytes(made):
    want = bytes_of(made / "data/set")
    run(made, "one", *OPTIONS, "--workers", 1)
    assert bytes_of(made / "data/one") == want
    first = run(made, "parts", *OPTIONS, "--part", "1/2", "--workers", 2)
    assert "left to others" in first.stdout and not (made / "data/parts/manifest.json").exists()
    early = run(made, "parts", *OPTIONS, "--finish", check=False)
    assert early.returncode == 2 and "not done" in early.stderr
    rank = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    run(made, "parts", *OPTIONS, env=rank)                              # as torchrun would
    assert bytes_of(made / "data/parts") == want
    again = time.monotonic()
    assert "nothing to do" in run(made, "parts", *OPTIONS).stdout
    assert time.monotonic() - again < 5
    shutil.rmtree(made / "data/parts"), shutil.rmtree(made / "data/one")


@pytest.mark.parametrize("n_kills", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_killed_at_any_moment_and_resumed(made, n_kills):
    """kill -9 of everything, or of the parent alone, whose children must follow it."""
    draw, command = random.Random(1), [sys.executable, str(SCRIPT), "killed", *map(str, OPTIONS)]
    for n in range(n_kills):
        going = subprocess.Popen(command, cwd=made, start_new_session=True,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.3, 1.6))
        if n % 2:
            going.kill()
        else:
            os.killpg(going.pid, signal.SIGKILL)
        going.wait()
    run(made, "killed", *OPTIONS)
    assert bytes_of(made / "data/killed") == bytes_of(made / "data/set")
    shutil.rmtree(made / "data/killed")


def test_new_files_are_added_and_what_is_there_keeps_its_bytes(tmp_path):
    (tmp_path / "in").mkdir()
    encode(tmp_path / "in/b.mp4", shot(RED, 12))
    meta = tmp_path / "m.jsonl"
    meta.write_text('{"video": "b.mp4", "caption": "b"}\n')
    options = ["--videos", "in", "--meta", "m.jsonl"]
    run(tmp_path, "set", *options)
    before = bytes_of(tmp_path / "data/set")
    shutil.copy(tmp_path / "in/b.mp4", tmp_path / "in/a.mp4")           # sorts before, is the same
    encode(tmp_path / "in/c.mp4", shot(BLUE, 12))
    meta.write_text(meta.read_text() + '{"video": "c.mp4", "caption": "c"}\n')
    done = run(tmp_path, "set", *options)
    assert "2 new files under in are added to data/set" in done.stderr
    assert "2 clips kept of 3: 0 rejected, 1 near-duplicates" in done.stdout
    after = bytes_of(tmp_path / "data/set")
    assert all(after[n] == h for n, h in before.items() if n.startswith("shard-00000"))
    assert [(r["source"], r["captions"][0]["text"]) for r in pd.open_dataset(
        tmp_path / "data/set")] == [("b.mp4", "b"), ("c.mp4", "c")]
    assert "nothing to do" in run(tmp_path, "set", *options).stdout
    shutil.move(tmp_path / "in", tmp_path / "moved")                    # the same files elsewhere
    assert "nothing to do" in run(tmp_path, "set", "--videos", "moved", *options[2:]).stdout
    (tmp_path / "other").mkdir()
    encode(tmp_path / "other/b.mp4", shot(BLUE, 30))
    wrong = run(tmp_path, "set", "--videos", "other", *options[2:], check=False)
    assert wrong.returncode == 2 and "--videos in, not other" in wrong.stderr
    meta.write_text("\n" + meta.read_text())
    run(tmp_path, "set", "--videos", "moved", *options[2:])             # says the same
    assert {**bytes_of(tmp_path / "data/set"), "plan.json": 0, "manifest.json": 0} == {
        **after, "plan.json": 0, "manifest.json": 0}
    meta.write_text("\n" + meta.read_text())
    shutil.copy(meta, tmp_path / "other.jsonl")
    wrong = run(tmp_path, "set", "--videos", "moved", "--meta", "other.jsonl", check=False)
    assert wrong.returncode == 2 and "--meta m.jsonl, not other.jsonl" in wrong.stderr


@pytest.mark.skipif(pd.fcntl is None, reason="no locks")
def test_a_second_process_is_refused_and_parts_are_not(slow):
    command = [sys.executable, str(SCRIPT), "locked", "--videos", "videos"]
    quiet = {"cwd": slow, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def wait_for_work():
        while not list((slow / "data/locked").glob(".shard-*.tar")):
            assert going.poll() is None
            time.sleep(0.02)

    going = subprocess.Popen(command, **quiet)
    wait_for_work()
    for more in ([], ["--part", "2/2"]):
        done = run(slow, "locked", "--videos", "videos", *more, check=False)
        assert done.returncode == 2 and "another process prepares data/locked" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    going.kill(), going.wait()
    going = subprocess.Popen([*command, "--part", "1/2"], **quiet)
    wait_for_work()
    done = run(slow, "locked", "--videos", "videos", "--part", "2/2")
    assert "left to others" in done.stdout
    assert run(slow, "locked", "--videos", "videos", check=False).returncode == 2
    going.kill(), going.wait()


def interrupt(folder, ready, *options, n=1):
    """(status, stderr) of the script after n Ctrl-C, sent as a terminal does, to all processes."""
    going = subprocess.Popen([sys.executable, str(SCRIPT), *options], cwd=folder, text=True,
                             stderr=subprocess.PIPE, start_new_session=True)
    while not ready():
        assert going.poll() is None, going.stderr.read()
        time.sleep(0.02)
    for k in range(n):
        os.killpg(going.pid, signal.SIGINT)
        time.sleep(0.05)
    return going.wait(10), going.stderr.read()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_ends_in_one_line_and_leaves_no_empty_folder(slow, tmp_path):
    status, error = interrupt(slow, lambda: list((slow / "data/stop").glob(".shard-*.tar")),
                              "stop", "--videos", "videos")
    assert status == 130 and error.endswith("stopped; the same command goes on\n")
    assert "Traceback" not in error and not (slow / "data/stop").exists()
    for n in (1, 2):                                                    # while the demo renders
        folder = tmp_path / str(n)
        folder.mkdir()
        status, error = interrupt(folder, lambda: len(list((folder / "data/demo-videos").glob(
            "demo-*.mp4"))) > 2, "demo", n=n)
        assert status in (130, *([-signal.SIGINT] if n == 2 else [])), error
        assert "Traceback" not in error


@pytest.mark.parametrize("has_gpu, size, n_frames", [
    (False, (54, 96), 50), (False, (720, 1280), 250), (True, (360, 640), 250), (False, (8, 8), 1)])
def test_the_next_commands_fit_the_data(has_gpu, size, n_frames, monkeypatch):
    """As pasted, they parse, and a row holds four of the largest pieces."""
    import sample
    import train_dit
    import train_vae
    monkeypatch.setattr(pd, "matmul_rate", lambda: 1e11)
    row = {"frames": n_frames, "height": size[0], "width": size[1], "start": 0, "end": 2,
           "captions": []}
    head, *lines = pd.next_steps("mine", [row] * 7, has_gpu).splitlines()
    assert head.startswith("7 clips, 14 s, ") and "without text" in head
    assert [line.split()[:3] for line in lines] == [
        ["python", f"{stage}.py", "mine"] for stage in ("train_vae", "train_vae", "train_dit",
                                                        "sample")]
    assert ("minutes" in head) != has_gpu
    assert ("--max_side 96" in head) == (size == (720, 1280)), "a night's work, and what to do"
    for line, module in zip(lines, (train_vae, train_vae, train_dit, sample)):
        module.parse_options(shlex.split(line)[2:])
    words = " ".join(lines).split()
    told = {name: words[words.index(name) + 1] for name in words if name.startswith("--")}
    cells, row_tokens = int(told.get("--max_cells", 2048)), int(told["--row_tokens"])
    h, w = (side // 8 for side in size)
    pieces = train_vae.pieces("k", n_frames, h * w, cells, 4)
    longest = max(1 + (n - 1) // 4 for _, _, n in pieces)
    assert row_tokens >= 4 * longest * (h // 2) * (w // 2)
    assert int(told["--batch_tokens"]) % row_tokens == 0
    window = int(told["--size"]), int(told["--frames"])
    assert window[0] % 8 == 0 and window[0] <= max(size) and window[1] <= n_frames


def test_after_the_demo_the_next_commands_are_the_quick_start():
    row = {"frames": 13, "height": 32, "width": 48, "start": 0, "end": 1.3,
           "captions": [{"text": "a red circle moves left"}]}
    _, *lines = pd.next_steps("demo", [row], False).splitlines()
    readme = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    chain = next(line for line in readme.splitlines() if "prepare_data.py demo &&" in line)
    assert [shlex.split(line) for line in lines[:5]] == [
        shlex.split(line) for line in chain.split(" && ")[1:6]]
    assert shlex.split(lines[5]) == shlex.split(chain.split(" && ")[6])[:5]


def test_scenes_are_what_their_captions_say():
    """The second demo: two shots a file; the object's colour is where it must be, it moves, and the
    same plan draws the same frames."""
    files = pd.scene_files(12)
    shots = [shot for file in files for shot in file["shots"]]
    assert {(shot["scene"], shot["light"]) for shot in shots} == set(
        itertools.product(pd.SCENES, pd.LIGHTS)), "every scene in every light"
    assert {file["split"] for file in files} == {"train", "test"}
    for shot in shots[:3]:
        frames, other = pd.render_scene({**shot, "frames": 6}), "red"
        if shot["colour"] in ("red", "purple"):
            other = "green"
        bare = pd.render_scene({**shot, "frames": 6, "colour": other})
        covered = (frames != bare).any(-1)           # only the object has the colour
        assert 0.005 < covered.mean() < 0.2 and (covered[1] != covered[3]).any()
        assert (frames == pd.render_scene({**shot, "frames": 6})).all()
        assert np.abs(np.diff(frames.astype(int), axis=0)).mean() > 0.3
    assert len({pd.render_scene({**shot, "frames": 1}).tobytes() for shot in shots}) == len(shots)


def test_a_failed_first_attempt_leaves_no_folder(made):
    (made / "wrong.csv").write_text("a,b\n1,2\n")
    done = run(made, "new/set", "--videos", "videos", "--meta", "wrong.csv", check=False)
    assert done.returncode == 2 and not (made / "new").exists()


@pytest.mark.skipif(os.name != "posix", reason="modes")
def test_files_have_the_umasks_modes(made, tmp_path):
    mask = os.umask(0o027)
    try:
        with pd.atomic(tmp_path / "x.bin") as part:                     # as safetensors writes
            other = tmp_path / "own"
            other.touch(mode=0o600)
            os.replace(other, part)
    finally:
        os.umask(mask)
    assert (tmp_path / "x.bin").stat().st_mode & 0o777 == 0o640
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~mask for path in (
        made / "data/set").iterdir())


def worker_of(parent):
    """Process id of a shard's process, child of `parent`, or None."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_child = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent
            if is_child and b"spawn_main" in (path / "cmdline").read_bytes():
                return int(path.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return None


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A video that takes seconds, first in its shard, and one that does not."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "videos").mkdir()
    encode(folder / "unit.mp4", shot(RED, 30, (640, 360)), crf="30")
    with av.open(str(folder / "videos/a.mp4"), "w") as container, \
            av.open(str(folder / "unit.mp4")) as unit:                  # a hundred times over
        stream = container.add_stream_from_template(unit.streams.video[0])
        packets = [packet for packet in unit.demux(video=0) if packet.size]
        for n in range(100):
            for packet in packets:
                packet.stream = stream
                container.mux(packet)
                packet.pts, packet.dts = (at + 30 * packet.duration for at in (
                    packet.pts, packet.dts))
    encode(folder / "videos/b.mp4", shot(BLUE, 12))
    return folder


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker through /proc")
@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGKILL])
def test_a_decoder_that_kills_its_process_costs_one_file(slow, how):
    """SIGSEGV is a decoder's crash; SIGKILL, as the kernel has it when memory runs out, is none."""
    shutil.rmtree(slow / "data/crash", ignore_errors=True)
    going = subprocess.Popen([sys.executable, str(SCRIPT), "crash", "--videos", "videos"],
                             cwd=slow, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    seen = set()
    while len(seen) < 2 and going.poll() is None:
        child = worker_of(going.pid)
        tars = {path for path in (slow / "data/crash").glob(".shard-*.tar")
                if f".{child}-" in path.name}                           # it has begun its shard
        if child and child not in seen and tars:
            time.sleep(0.3)
            os.kill(child, how)
            seen.add(child)
        time.sleep(0.02)
    said = going.stderr.read()
    if how == signal.SIGKILL:
        assert going.wait(60) == 2 and len(seen) == 2 and "Traceback" not in said
        assert "shard 0, at a.mp4: its process was killed 2 times" in said.splitlines()[-1]
        assert not list((slow / "data/crash").glob("*.jsonl"))      # nothing is left out for good
        return
    assert going.wait(60) == 0 and len(seen) == 2, said
    assert [(r["source"], r["reason"]) for r in row_lines(slow / "data/crash/rejected.jsonl")] == [
        ("a.mp4", "decoder crashed")]
    assert [row["source"] for row in pd.open_dataset(slow / "data/crash")] == ["b.mp4"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker through /proc")
def test_a_worker_that_stands_still_costs_one_file(slow):
    """SIGSTOP is what a decoder that waits for ever looks like from outside."""
    going = subprocess.Popen([sys.executable, str(SCRIPT), "hang", "--videos", "videos",
                              "--timeout", "3", "--workers", "1"], cwd=slow,
                             stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    stopped = None
    while stopped is None and going.poll() is None:
        child = worker_of(going.pid)
        if child and list((slow / "data/hang").glob(f".shard-*.{child}-*.tar")):
            time.sleep(0.5)
            stopped = child
        time.sleep(0.02)
    while Path(f"/proc/{stopped}").exists() and going.poll() is None:
        os.kill(stopped, signal.SIGSTOP)
        time.sleep(0.1)
    assert going.wait(120) == 0 and stopped
    rejects = row_lines(slow / "data/hang/rejected.jsonl")
    assert [(r["source"], r["reason"]) for r in rejects] == [("a.mp4", "timed out")]
    assert [row["source"] for row in pd.open_dataset(slow / "data/hang")] == ["b.mp4"]


FAULTS = """
import errno, multiprocessing, os, sys, tempfile
import av, av.error
from PIL import Image

def failing(module, name, error):
    real = getattr(module, name)
    def call(*a, **k):
        if multiprocessing.parent_process():
            raise error
        return real(*a, **k)
    setattr(module, name, call)

number = getattr(errno, os.environ["FAULT"].split()[1], 0)
error = MemoryError() if not number else av.error.OSError(number, os.strerror(number), "x") \
    if os.environ["FAULT"].startswith("av") else OSError(number, os.strerror(number), "x")
failing({"av": av, "Image": Image, "tempfile": tempfile, "os": os}[os.environ["FAULT"].split()[0]],
        os.environ["FAULT"].split()[2], error)
"""


def test_errors_of_the_machine_are_none_of_the_file(tmp_path):
    """6 A: a full disk, too few descriptors, a disk that hiccups, no memory: the shard ends with a
    line, no file is left out, and the same command ends with the same bytes."""
    (tmp_path / "videos").mkdir()
    encode(tmp_path / "videos/a.mp4", np.concatenate([shot(RED, 9), shot(BLUE, 9)]))
    Image.fromarray(shot(GREEN, 1)[0]).save(tmp_path / "videos/b.png")
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(FAULTS)
    line = [sys.executable, str(SCRIPT), "set", "--videos", "videos", "--workers", "1"]
    run(tmp_path, *line[2:])
    truth = bytes_of(tmp_path / "data")
    for fault in ("tempfile ENOSPC TemporaryFile", "av EMFILE open", "Image EIO open",
                  "av nothing open", "os EDQUOT replace"):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        env = {**os.environ, "PYTHONPATH": str(tmp_path / "hook"), "FAULT": fault}
        done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
        said = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and "Traceback" not in done.stderr, (fault, done.stderr)
        assert said.startswith("prepare_data.py: shard 0") and "the same command goes on" in said
        assert not (tmp_path / "data/set/manifest.json").exists()
    run(tmp_path, *line[2:])
    assert bytes_of(tmp_path / "data") == truth


def test_few_descriptors_end_in_one_line(tmp_path):
    """6 A: whatever the limit, a finished data set is whole."""
    (tmp_path / "videos").mkdir()
    for name in "ab":
        encode(tmp_path / f"videos/{name}.mp4", np.concatenate([shot(RED, 9), shot(BLUE, 9)]))
    for limit in (9, 12, 14):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        done = subprocess.run(["sh", "-c", f"ulimit -n {limit}; exec {sys.executable} {SCRIPT} set "
                               "--videos videos --workers 1"], cwd=tmp_path, capture_output=True,
                              text=True)
        if done.returncode == 0:
            assert len(pd.open_dataset(tmp_path / "data/set")) + len(
                row_lines(tmp_path / "data/set/duplicates.jsonl")) == 4
        else:
            assert done.stderr.splitlines()[-1].startswith("prepare_data.py: "), done.stderr
            assert not (tmp_path / "data/set/manifest.json").exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker through /proc")
def test_time_in_which_all_was_stopped_does_not_count(slow):
    """6 A: a whole run stopped for longer than --timeout loses no file."""
    shutil.rmtree(slow / "data/sleep", ignore_errors=True)
    going = subprocess.Popen([sys.executable, str(SCRIPT), "sleep", "--videos", "videos",
                              "--timeout", "1", "--workers", "1"], cwd=slow,
                             stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                             start_new_session=True)
    while not list((slow / "data/sleep").glob(".shard-*.tar")) and going.poll() is None:
        time.sleep(0.02)
    child = worker_of(going.pid)
    os.killpg(going.pid, signal.SIGSTOP)
    time.sleep(4.5)
    os.kill(going.pid, signal.SIGCONT)                   # the parent wakes first
    time.sleep(0.3)
    os.killpg(going.pid, signal.SIGCONT)
    assert going.wait(60) == 0 and child, going.stderr.read()
    assert row_lines(slow / "data/sleep/rejected.jsonl") == []


def test_slow_pictures_say_that_they_are_at_work(tmp_path, monkeypatch):
    """6 A: a GIF never beat, and no video of which 64 frames take long."""
    frames = [Image.fromarray(flat((9 * n, 0, 0))) for n in range(6)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    clock, beats = iter(range(0, 100, 2)), []
    monkeypatch.setattr(pd.time, "monotonic", lambda: next(clock))
    assert len(list(pd.Video(tmp_path / "a.gif", beats.append))) == 6
    assert beats == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("n, near, is_short", [
    (900, 0.15, True), (400, 0.02, True), (300, 0.3, False), (2, 0.15, True)])
def test_pairs_by_bands_are_those_of_comparing_all(n, near, is_short, monkeypatch):
    """6 F: of clips of one length all pairs were compared, 22 s for 10,000."""
    draw = np.random.default_rng(n)
    bits = draw.integers(0, 2, (n, 4, 256), dtype=np.uint8)
    for i in range(1, n):                                  # near ones, of any crop, at any distance
        j, one, other = draw.integers(0, i), *draw.choice([(0, 0), (0, 2), (3, 0), (2, 3)])
        flips = draw.choice(256, draw.integers(0, 90), replace=False)
        bits[i, one] = bits[j, other]
        bits[i, one, flips] ^= 1
    packed = np.packbits(bits, axis=2).view(np.uint64)
    most = math.ceil(near * 256) - 1
    stop = np.full(n, n) if is_short else np.minimum(np.arange(n) + 40, n)
    away = np.array([[(bits[i, x] != bits[:, y]).sum(1) for x, y in (
        (0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (3, 0))] for i in range(n)]).min(1)
    truth = {(i, j) for i, j in zip(*np.nonzero(away <= most)) if i < j < stop[i]}
    assert truth or n < 5
    for cost in (1e12, 440.0) if most < 60 else (440.0,):  # by bands; as it chooses
        monkeypatch.setattr(pd, "NS_A_PAIR", cost)
        a, b = pd.like_pairs(packed, most, stop)
        assert set(zip(a.tolist(), b.tolist())) == truth and len(a) == len(truth)
        assert [int(one) for one in pd.bit_distance(packed[a], packed[b])] == away[a, b].tolist()


def flipped(data):
    """Bytes of which one has another bit."""
    return data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1:]


def test_sums_are_compared_once_a_process_until_a_file_changes(made, monkeypatch):
    """Two reads of one set hash its tars once; a tar that was touched is hashed again."""
    folder, hashed = made / "data/set", []
    monkeypatch.setattr(pd, "CHECKED", set())
    monkeypatch.setattr(pd, "check_sums", lambda *at: hashed.append(at[0]))
    assert pd.open_dataset(folder) == pd.open_dataset(folder) and len(hashed) == 1
    stat = (folder / "shard-00000.tar").stat()
    os.utime(folder / "shard-00000.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    pd.open_dataset(folder)
    os.utime(folder / "shard-00000.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    pd.open_dataset(folder)
    assert len(hashed) == 2


def test_flipped_bytes_of_shards_are_noticed_and_the_shard_is_made_again(tmp_path, capsys):
    """6 A: no flipped byte in a tar was noticed; C: a lost shard said 'prepare again', but that
    said 'finished'."""
    (tmp_path / "videos").mkdir()
    for name, colour in zip("abc", (RED, GREEN, BLUE)):
        encode(tmp_path / f"videos/{name}.mp4", shot(colour, 12))
    shutil.copy(tmp_path / "videos/a.mp4", tmp_path / "videos/d.mp4")          # a duplicate
    line = ["set", "--videos", "videos", "--shard_sources", "2"]
    run(tmp_path, *line)
    folder, truth = tmp_path / "data/set", bytes_of(tmp_path / "data")
    pd.verify(folder)
    assert "2 shards of 3 clips" in capsys.readouterr().out
    captions, key = folder / "shard-00000.captions-x.jsonl", pd.open_dataset(folder)[0]["key"]
    row = pd.json_line({"key": key, "caption": "a red sea"})
    captions.write_text(row)
    captions.with_name(f"{captions.name}.crc").write_text(f"{zlib.crc32(row.encode())}\n")
    assert pd.open_dataset(folder)[0]["captions"][0]["text"] == "a red sea"
    wrong = {captions.name: row.replace("sea", "tea").encode(), "shard-00000.rejected.jsonl": b"\n"}
    for name in ("shard-00001.tar", "shard-00001.jsonl", *wrong, "shard-00000.tar"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(wrong.get(name) or flipped(before))
        for check in (pd.verify, pd.open_dataset):                             # all; a sample
            with pytest.raises(SystemExit):
                check(folder)
            said = capsys.readouterr().err.splitlines()[-1]
            assert name in said and "remove" in said, said
        if name != "shard-00000.tar":
            (folder / name).write_bytes(before)
    captions.write_text(row[:-9] + "\n")
    captions.with_name(f"{captions.name}.crc").unlink()
    with pytest.raises(SystemExit):
        pd.open_dataset(folder)
    assert "line 1 is damaged" in capsys.readouterr().err
    captions.unlink()
    (folder / "shard-00000.tar").unlink()
    assert "nothing to do" not in run(tmp_path, *line).stdout
    assert bytes_of(tmp_path / "data") == truth


def test_names_do_not_steer_the_terminal(capsys):
    """6 E: escape sequences in names reached it."""
    with pytest.raises(SystemExit):
        pd.refuse("a\x1b[31mred\x1b]0;title\x07 \u202e.mp4 is café 日本")
    assert capsys.readouterr().err.endswith(
        ": a\\x1b[31mred\\x1b]0;title\\x07 \\u202e.mp4 is café 日本\n")


# -- the demo, small parts, wrong input ------------------------------------------------------------

def test_demo(tmp_path):
    run(tmp_path, "demo", "--demo_files", 8)
    got, truth = pd.open_dataset(tmp_path / "data/demo"), pd.demo_files(8)
    shots = [(file, one) for file in truth for one in file["shots"]]
    assert len(got) == len(shots) == 64
    for row, (file, one) in zip(got, shots):
        assert (row["frames"], row["split"]) == (one["frames"], file["split"])
        assert row["fps"] == file["fps"]
        assert [c["text"] for c in row["captions"]] == [one["caption"]] * one["captioned"]
        assert np.abs(pd.read_clip(tmp_path / "data/demo", row) - np.float32(
            pd.render_shot(one))).mean() < 12
    assert {row["split"] for row in got} == {"train", "test"}
    before = bytes_of(tmp_path / "data")
    assert "nothing to do" in run(tmp_path, "demo", "--demo_files", 8).stdout
    assert bytes_of(tmp_path / "data") == before


def test_files_beyond_the_usual_demo_turn_and_stop():
    """The usual files stay as they are; in further ones a shape comes back to where its caption's way
    begins, or rests where it ends, and the rest of the shot is as without."""
    usual, more = pd.demo_files(160), pd.demo_files(170)
    assert more[:160] == usual and not any({"turn", "rest"} & set(shot) for file in usual
                                           for shot in file["shots"])
    kinds = []
    for shot in (shot for file in more[160:] for shot in file["shots"]):
        way, (kind,) = pd.progress(shot), {"turn", "rest"} & set(shot)
        steps, n_more = np.diff(way), round(shot[kind] * shot["frames"])
        kinds.append((kind, len(shot["shapes"])))
        assert shot["captioned"] and 9 <= shot["frames"] - n_more <= 14 and n_more >= 5
        if kind == "turn":
            assert (steps[:n_more - 1] < 0).all() and (steps[n_more:] > 0).all() and way[-1] == 1
            assert way.min() < 0.1 and way.max() <= 1
        else:
            assert way[0] == 0 and (steps >= 0).all() and (way[1 - n_more:] == 1).all()
            frames = pd.render_shot(shot)
            assert (frames[1 - n_more:] == frames[-1]).all() and (frames[0] != frames[-1]).any()
    assert min(sum(kind == one for one, _ in kinds) for kind in ("turn", "rest")) > 20
    assert 5 < sum(n == 2 for _, n in kinds) < 40


def test_workers_stay_small(tmp_path):
    code = "import sys, prepare_data; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SCRIPT.parent)


def test_atomic_and_rng(tmp_path):
    with pytest.raises(KeyError), pd.atomic(tmp_path / "x.json") as part:
        part.write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with pd.atomic(tmp_path / "x.json") as part:
        part.write_text("whole")
        pd.sweep(tmp_path)                                              # spares a living writer
    (tmp_path / ".y.1-a.tmp.json").write_text("a dead one's")
    pd.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert pd.rng(1, "noise", 2).random() == pd.rng(1, "noise", 2).random()
    assert pd.rng(1, "noise", 2).random() != pd.rng(12, "noise", "").random()
    assert round(pd.rng(0, "demo", 1).random(), 6) == 0.436132


def test_wrong_input_is_one_line(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(made)
    (tmp_path / "none").mkdir()
    (tmp_path / "none/readme.md").touch()
    for name, change in {"other": {"format": 99}, "torn": None}.items():
        shutil.copytree(made / "data/set", tmp_path / name)
        for file in ("plan.json", "manifest.json"):
            path = tmp_path / name / file
            path.write_text(json.dumps({**json.loads(path.read_text()), **change}) if change
                            else path.read_text()[:40])
    (tmp_path / "columns.csv").write_text("a,b\n1,2\n")
    (tmp_path / "others.csv").write_text("video,caption\nelse.mp4,a\n")
    (tmp_path / "meta.dat").touch()
    prepared = [*OPTIONS]
    said = {"columns": "its columns are a, b; one of video, path, file", "no match": "names else.mp4",
            "bounds": "--min_seconds 5 is above --max_seconds 2", "flow": "--max_flow 2",
            "small": "8 or more", "fps": "0 to 1000", "option": "did you mean --videos?",
            "choice": "did you mean panda70m?", "other sources": "gone.mp4 went or changed",
            "changed": "--crf 18, not 20", "no suffix": "tells no format"}
    wrong = {
        "no folder": ["x", "--videos", "nowhere"],
        "no videos": ["x", "--videos", tmp_path / "none"],
        "no --videos": ["x"], "no name": [], "bench": ["bench", "--videos", tmp_path / "none"],
        "crf": ["x", "--videos", "videos", "--crf", 99],
        "nan": ["x", "--videos", "videos", "--min_motion", "nan"],
        "part": ["x", "--videos", "videos", "--part", "3/2"],
        "unknown": ["x", "--videos", "videos", "--hurry"],
        "meta": ["x", "--videos", "videos", "--meta", "nowhere.csv"],
        "form": ["x", "--videos", "videos", "--meta", "meta.jsonl", "--format", "folder"],
        "columns": ["x", "--videos", "videos", "--meta", tmp_path / "columns.csv"],
        "no match": ["x", "--videos", "videos", "--meta", tmp_path / "others.csv"],
        "no suffix": ["x", "--videos", "videos", "--meta", tmp_path / "meta.dat"],
        "bounds": ["x", "--videos", "videos", "--min_seconds", 5, "--max_seconds", 2],
        "flow": ["x", "--videos", "videos", "--min_flow", 5, "--max_flow", 2],
        "small": ["x", "--videos", "videos", "--max_side", 7],
        "fps": ["x", "--videos", "videos", "--max_fps", 1000000],
        "option": ["x", "--video", "videos"], "choice": ["x", "--format", "panda70"],
        "changed": ["set", *prepared, "--crf", 20], "other sources": ["set2", *prepared],
        "format": [tmp_path / "other", *prepared], "plan": [tmp_path / "torn", *prepared]}
    shutil.copytree(made / "data/set", made / "data/set2")
    (made / "data/set2/manifest.json").unlink()
    plan = json.loads((made / "data/set2/plan.json").read_text())
    plan["sources"][0][0] = "gone.mp4"
    (made / "data/set2/plan.json").write_text(json.dumps(plan))
    for name, arguments in wrong.items():
        with pytest.raises(SystemExit) as stop:
            pd.main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if "others passed over" not in line]
        assert stop.value.code == 2 and len(lines) == 1, (name, error)
        assert said.get(name, "") in error, (name, error)
    for folder in (tmp_path / "nowhere", tmp_path / "none", tmp_path / "other", tmp_path / "torn"):
        with pytest.raises(SystemExit) as stop:
            pd.open_dataset(folder)
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    done = run(made, "x", "--videos", "nowhere", check=False)
    assert done.returncode == 2 and done.stderr == (
        "prepare_data.py: --videos nowhere is not a folder\n")
    shutil.rmtree(made / "data/x", ignore_errors=True), shutil.rmtree(made / "data/set2")
