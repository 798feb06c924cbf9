"""prepare_data.py and sample.py's reader on media as people have them, made here: HDR, HEIC, damage
that decoders conceal, interlaced and odd pictures, times that lie; by mutators whatever else."""
import contextlib
import functools
import io
import json
import math
import re
import struct
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import prepare_data as pd  # noqa: E402
from test_media import scenery  # noqa: E402


def options(**told):
    return {**vars(pd.parse_options(["x"])), "meta": None, **told}


def clips(path, **told):
    """([(row, suffix, bytes)], [rejects]) of a file."""
    result = [(row, suffix, file.seek(0) or file.read()) if file else row for row, suffix, file in
             pd.clips_of(path.parent, path.name, [], options(min_seconds=0, **told))]
    return [one for one in result if isinstance(one, tuple)], \
        [one for one in result if isinstance(one, dict)]


def frames_of(data):
    """(uint8 [T, H, W, 3], first frame) of a clip's bytes."""
    with av.open(io.BytesIO(data)) as container:
        result = list(container.decode(video=0))
    return np.stack([pd.Video(Path("x.mp4")).rgb(frame) for frame in result]), result[0]


def write(path, frames, codec="libx264", rate=24, pix_fmt="yuv420p", pts=None, base=None,
          options=None, gop=12, **tags):
    """A video of uint8 [H, W, 3], or of uint16 [3, H, W] planes for yuv444p10le."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, options=options or {
            "libx265": {"x265-params": "log-level=none:lossless=1"}, "libx264": {
                "qp": "0", "preset": "ultrafast"}, "libsvtav1": {"crf": "5", "preset": "12"}}.get(
                    codec, {}))
        deep = frames[0].dtype == np.uint16
        stream.height, stream.width = frames[0].shape[1:] if deep else frames[0].shape[:2]
        context, stream.pix_fmt = stream.codec_context, pix_fmt
        context.thread_count, context.gop_size = 1, gop
        if base:
            context.time_base = base
        for name, value in tags.items():
            setattr(context, name, value)
        for n, pixels in enumerate(frames):
            if deep:
                frame = av.VideoFrame(pixels.shape[2], pixels.shape[1], "yuv444p10le")
                for plane, values in zip(frame.planes, pixels):
                    rows = np.zeros((plane.height, plane.line_size // 2), np.uint16)
                    rows[:, :plane.width] = values
                    plane.update(rows.tobytes())
                frame = frame.reformat(format=pix_fmt)
            else:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                frame = frame.reformat(format=pix_fmt, dst_color_range=2 if "j" in pix_fmt else 1)
            for name in tags:
                if hasattr(frame, name) and name != "framerate":
                    with contextlib.suppress(AttributeError):
                        setattr(frame, name, tags[name])
            frame.pts, frame.time_base = pts[n] if pts else n, base or Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


# -- HDR -------------------------------------------------------------------------------------------

def primaries_matrix(source):
    """Linear RGB of these primaries (D65) in BT.709's, from their chromaticities."""
    def to_xyz(corners):
        xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in corners]).T
        white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
        return xyz * np.linalg.solve(xyz, white)
    return np.linalg.inv(to_xyz([(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)])) @ to_xyz(source)


BT2020, P3 = [(0.708, 0.292), (0.170, 0.797), (0.131, 0.046)], \
    [(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)]


def pq_light(code):                                    # SMPTE ST 2084, cd/m2
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 4096 * 128, 3424 / 4096, 2413 / 4096 * 32, \
        2392 / 4096 * 32
    power = np.float64(code) ** (1 / m2)
    return 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def pq_code(light):
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 4096 * 128, 3424 / 4096, 2413 / 4096 * 32, \
        2392 / 4096 * 32
    power = (np.float64(light) / 10000) ** m1
    return ((c1 + c2 * power) / (1 + c3 * power)) ** m2


def reference(code, transfer, corners=BT2020):
    """float64 [..., 3]: levels of BT.709 for R'G'B' 0..1, from BT.2100, BT.2390 and BT.1886."""
    code = np.asarray(code, np.float64)
    if transfer == 16:
        light = pq_light(code)
    else:                              # BT.2100: inverse OETF, then OOTF, 1000 cd/m2
        a = 0.17883277
        b, c = 1 - 4 * a, 0.5 - a * math.log(4 * a)
        scene = np.where(code <= 0.5, code ** 2 / 3, (np.exp((code - c) / a) + b) / 12)
        luma = scene @ np.array([0.2627, 0.6780, 0.0593])
        light = 1000 * scene * luma[..., None] ** 0.2
    top = light.max(-1, keepdims=True)
    e1, most = np.minimum(pq_code(top) / pq_code(1000), 1), pq_code(203) / pq_code(1000)
    knee = 1.5 * most - 0.5
    t = (e1 - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + \
        (-2 * t**3 + 3 * t**2) * most
    e2 = np.where(e1 < knee, e1, spline)
    light = light * pq_light(e2 * pq_code(1000)) / np.maximum(top, 1e-12)
    return (light @ primaries_matrix(corners).T / 203).clip(0, 1) ** (1 / 2.4) * 255


def patches(transfer):
    """R'G'B' [n, 3] to look at: greys from black past the peak, and colours of HDR's gamut."""
    if transfer == 16:
        greys = pq_code([0.1, 1, 5, 26, 60, 100, 203, 400, 700, 1000, 4000])
    else:
        greys = np.array([0.05, 0.1, 0.2, 0.38, 0.5, 0.6, 0.75, 0.85, 0.95, 1.0])
    colours = np.array([(0.5, 0.42, 0.36), (0.36, 0.5, 0.42), (0.3, 0.33, 0.52), (0.6, 0.5, 0.3),
                        (0.7, 0.68, 0.6)])
    return np.concatenate([np.repeat(greys[:, None], 3, 1), colours])


def hdr_video(path, transfer, codec, pix_fmt="yuv420p10le", primaries=9, side=32):
    """Patches side by side, R'G'B' coded by BT.2020's matrix in 10 bits, TV's range."""
    code = np.repeat(np.repeat(patches(transfer)[None], side, 0), side, 1)
    luma = code @ np.array([0.2627, 0.6780, 0.0593])
    planes = [64 + 876 * luma, 512 + 896 * (code[..., 2] - luma) / 1.8814,
              512 + 896 * (code[..., 0] - luma) / 1.4746]
    planes = np.stack(planes).round().astype(np.uint16)
    return write(path, [planes] * 6, codec, pix_fmt=pix_fmt, color_trc=transfer, colorspace=9,
                 color_primaries=primaries, color_range=1)


def middles(pixels, side=32):
    return pixels[side // 2, side // 2::side].astype(float)


@pytest.mark.parametrize("codec, name, pix_fmt", [
    ("libx265", "a.mp4", "yuv420p10le"), ("libx265", "a.mkv", "yuv444p12le"),
    ("libx264", "a.mov", "yuv420p10le"), ("libsvtav1", "a.mp4", "yuv420p10le")])
@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_is_tone_mapped(tmp_path, transfer, codec, name, pix_fmt):
    path = hdr_video(tmp_path / name, transfer, codec, pix_fmt)
    want, greys = reference(patches(transfer), transfer), len(patches(transfer)) - 5
    video = pd.Video(path)
    frame = next(iter(video))
    assert frame.color_trc == transfer and video.sar == 1
    lossy = 3 if codec == "libsvtav1" else 1.5                          # levels
    pixels = middles(video.rgb(frame))
    assert np.abs(pixels - want)[:greys].max() <= lossy, (pixels, want)
    light = (pixels / 255) ** 2.4 - (want / 255) ** 2.4                 # at 0 a level is no light
    assert np.abs(light[greys:]).max() <= 0.03, (pixels, want)
    (row, suffix, data), = clips(path)[0]
    assert row["converted"] == [f"{'PQ' if transfer == 16 else 'HLG'} to BT.709"]
    made, first = frames_of(data)
    assert (first.color_trc, first.color_primaries, first.colorspace) == (1, 1, 1)
    peak, middle = greys - (2 if transfer == 16 else 1), 3              # 1000 and 26 cd/m2
    assert abs(middles(made[0])[peak] - want[peak]).max() <= 0.02 * 255
    assert abs(middles(made[0])[middle] - want[middle]).max() <= 0.03 * want[middle].max() + 1
    luma = want @ np.array([0.2126, 0.7152, 0.0722])
    assert row["scores"]["brightness"] == pytest.approx(luma.mean(), abs=2)
    assert clips(path, hdr="reject")[1][0]["reason"] == "HDR"


def test_hdr_reads_alike_in_sample(tmp_path):
    import sample
    path = hdr_video(tmp_path / "a.mkv", 18, "libx265")
    seen = sample.read_media(path, 24.0, 32, 32 * len(patches(18)))
    assert np.abs(middles(seen[0]) - reference(patches(18), 18))[:-5].max() <= 1.5


def test_hdr_exactly_in_every_primaries():
    """The whole curve, and colours at random, against float64."""
    random = np.random.default_rng(0)
    for transfer in pd.HDR:
        for number, corners in ((9, BT2020), (2, BT2020), (12, P3)):
            code = np.concatenate([np.linspace(0, 1, 999)[:, None].repeat(3, 1),
                                   random.uniform(0, 1, (999, 3))])
            signal = (code * 65535).round().astype(np.uint16)
            got = pd.tone_mapped(signal[None], transfer, number)[0].astype(float)
            want = reference(signal / 65535, transfer, corners)
            assert np.abs(got - want)[:999].max() < 1.01, (transfer, number)
            assert np.abs(got - want).mean() < 0.4 and np.abs(got - want).max() < 6


def test_hdr_of_8_bits_is_never_copied(tmp_path):
    """Plain H.264 but for the tag."""
    path = write(tmp_path / "a.mp4", scenery(1, 24), color_trc=18, colorspace=9, color_primaries=9)
    (row, _, data), = clips(path)[0]
    assert row["converted"] == ["HLG to BT.709"] and frames_of(data)[1].color_trc == 1
    assert b"rc=cqp" not in data
    plain = write(tmp_path / "b.mp4", scenery(1, 24), colorspace=1)
    (row, _, data), = clips(plain)[0]
    assert "converted" not in row and b"rc=cqp" in data                 # copied, nothing said


def test_folders_begun_before_these_options_go_on_as_they_began(tmp_path):
    (tmp_path / "in").mkdir(), (tmp_path / "set").mkdir()
    (tmp_path / "in/a.mp4").write_bytes(b"x")
    args = pd.parse_options([str(tmp_path / "set"), "--videos", str(tmp_path / "in")])
    plan, is_new = pd.make_plan(args, tmp_path / "set", tmp_path / "in")
    assert is_new and (plan["options"]["hdr"], plan["options"]["interlaced"]) == (
        "tonemap", "deinterlace")
    for name in ("hdr", "interlaced", "min_damage", "max_damage"):
        del plan["options"][name]
    (tmp_path / "set/plan.json").write_text(json.dumps(plan))
    plan, is_new = pd.make_plan(args, tmp_path / "set", tmp_path / "in")
    assert not is_new and (plan["options"]["hdr"], plan["options"]["interlaced"]) == (
        "reject", "keep")


def test_dolby_vision_without_a_base_layer_is_named():
    """Profile 5: its pictures are in no R'G'B' or Y'CbCr, and no tag says so but the side data."""
    def frame(matrix, transfer):
        data = SimpleNamespace(type=SimpleNamespace(name="DOVI_METADATA"))
        return SimpleNamespace(width=64, height=48, color_trc=transfer, colorspace=matrix,
                               rotation=0, side_data=SimpleNamespace(keys=lambda: [data]))
    for matrix, transfer in ((2, 2), (2, 16), (14, 18), (15, 16)):
        with pytest.raises(pd.Unreadable, match="HDR"):
            pd.Video(Path("a.mp4")).note_tags(frame(matrix, transfer))
    video = pd.Video(Path("a.mp4"))
    video.note_tags(frame(9, 18))                      # 8.4: HLG below
    assert video.converted == {"HLG to BT.709"}


# -- pictures --------------------------------------------------------------------------------------

def box(kind, *parts):
    data = b"".join(parts)
    return struct.pack(">I4s", len(data) + 8, kind) + data


def full(kind, version, flags, *parts):
    return box(kind, bytes([version]) + flags.to_bytes(3), *parts)


def hevc_still(frame):
    """(hvcC, the sample) of one picture, as FFmpeg's MP4 holds them."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx265", rate=1, options={
            "x265-params": "log-level=none:keyint=1:crf=4:range=full"})
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, frame.format.name
        out.mux(stream.encode(frame)), out.mux(stream.encode(None))
    data = file.getvalue()
    at = data.index(b"hvcC") - 4
    header = data[at:at + int.from_bytes(data[at:at + 4])]
    file.seek(0)
    with av.open(file) as back:
        packet = next(back.demux(video=0))
        return header, bytes(packet)


def write_heic(path, planes, columns, rows, side, size, turn=0, transfer=13, primaries=1, matrix=6,
               pix_fmt="yuv420p"):
    """A HEIC as telephones write it: tiles of `side` px, a grid of them, irot. planes: frames."""
    coded = [hevc_still(frame) for frame in planes]
    n = len(coded)
    infe = [full(b"infe", 2, 0, struct.pack(">HH4s", k + 1, 0, b"hvc1"), b"\0") for k in range(n)]
    infe.append(full(b"infe", 2, 0, struct.pack(">HH4s", n + 1, 0, b"grid"), b"\0"))
    grid = struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, *size)
    colour = box(b"colr", b"nclx", struct.pack(">HHHB", primaries, transfer, matrix, 0x80))
    ipco = box(b"ipco", coded[0][0], full(b"ispe", 0, 0, struct.pack(">II", side, side)), colour,
               full(b"ispe", 0, 0, struct.pack(">II", *size)), box(b"irot", bytes([turn])))
    ipma = full(b"ipma", 0, 0, struct.pack(">I", n + 1), *(
        struct.pack(">HB3B", k + 1, 3, 0x81, 2, 3) for k in range(n)),
        struct.pack(">HB3B", n + 1, 3, 4, 3, 0x85))
    iref = full(b"iref", 0, 0, box(b"dimg", struct.pack(f">HH{n}H", n + 1, n, *range(1, n + 1))))

    def meta(start):
        places = np.cumsum([start, *(len(sample) for _, sample in coded)])
        iloc = full(b"iloc", 1, 0, struct.pack(">BBH", 0x44, 0, n + 1), *(
            struct.pack(">HHHHII", k + 1, 0, 0, 1, places[k], len(coded[k][1])) for k in range(n)),
            struct.pack(">HHHHII", n + 1, 1, 0, 1, 0, len(grid)))
        return full(b"meta", 0, 0, full(b"hdlr", 0, 0, struct.pack(">I4s12xB", 0, b"pict", 0)),
                    full(b"pitm", 0, 0, struct.pack(">H", n + 1)),
                    full(b"iinf", 0, 0, struct.pack(">H", n + 1), *infe), iref,
                    box(b"iprp", ipco, ipma), box(b"idat", grid), iloc)
    head = box(b"ftyp", b"heic", b"\0\0\0\0", b"mif1heic")
    start = len(head) + len(meta(0)) + 8
    path.write_bytes(head + meta(start) + box(b"mdat", *(sample for _, sample in coded)))
    return path


def test_heic_of_tiles_as_telephones_write_them(tmp_path):
    whole = scenery(3, 1, size=(192, 128))[0]
    tiles = [av.VideoFrame.from_ndarray(np.ascontiguousarray(
        whole[y:y + 64, x:x + 64]), format="rgb24").reformat(
            format="yuv420p", dst_colorspace=5, dst_color_range=2)
             for y in (0, 64) for x in (0, 64, 128)]
    path = write_heic(tmp_path / "a.heic", tiles, 3, 2, 64, (180, 120), turn=3)
    want = np.rot90(whole[:120, :180], 3).astype(float)
    got = pd.read_still(path)
    assert got.shape == want.shape and np.abs(got - want).mean() < 3
    (row, suffix, data), = clips(path)[0]
    assert suffix == ".png" and row["converted"] == ["HEIF to PNG"]
    assert (row["width"], row["height"], row["fps"]) == (120, 180, None)
    assert np.array_equal(pd.read_still(io.BytesIO(data)), got)
    import sample
    assert sample.read_media(path, 8.0, 180, 120).shape == (1, 180, 120, 3)
    for cut in (40, 300, 900, len(path.read_bytes()) - 30):             # damage is named
        (tmp_path / "b.heic").write_bytes(path.read_bytes()[:cut])
        assert clips(tmp_path / "b.heic")[1][0]["reason"] in (
            "broken picture", "not a picture that can be read"), cut
    (tmp_path / "c.heic").write_bytes(path.read_bytes().replace(b"grid\0", b"iovl\0"))
    assert clips(tmp_path / "c.heic")[1][0]["reason"] == "HEIF of type iovl"


def test_avif_and_heic_in_hdr(tmp_path):
    """Pillow's 8 bits of an AVIF in PQ are grey; and no tar may hold what stays HDR."""
    for transfer in pd.HDR:
        hdr_video(tmp_path / "a.mp4", transfer, "libsvtav1")
        with av.open(str(tmp_path / "a.mp4")) as source, \
                av.open(str(tmp_path / "a.avif"), "w", format="avif") as out:
            stream = source.streams.video[0]
            to = out.add_stream_from_template(stream, opaque=True)
            packet = next(source.demux(stream))
            packet.stream = to
            out.mux(packet)
        (row, suffix, data), = clips(tmp_path / "a.avif")[0]
        assert suffix == ".png" and len(row["converted"]) == 2
        want = reference(patches(transfer), transfer)
        assert np.abs(middles(pd.read_still(io.BytesIO(data))) - want)[:-5].max() <= 3
        assert clips(tmp_path / "a.avif", hdr="reject")[1][0]["reason"] == "HDR"
    Image.fromarray(scenery(1, 1)[0]).save(tmp_path / "plain.avif")
    (row, suffix, data), = clips(tmp_path / "plain.avif")[0]
    assert suffix == ".avif" and data == (tmp_path / "plain.avif").read_bytes()


def tiff(path, values, bits, photometric=1):
    """A grey TIFF of 16 or 12 packed bits a sample."""
    rows = [np.unpackbits(row.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 16 - bits:]
            for row in values]
    data = values.astype("<u2").tobytes() if bits == 16 else b"".join(
        np.packbits(row.ravel()).tobytes() for row in rows)
    tags = [(256, values.shape[1]), (257, values.shape[0]), (258, bits), (259, 1),
            (262, photometric), (273, 8), (277, 1), (278, values.shape[0])]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    entries += struct.pack("<HHII", 279, 4, 1, len(data))
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack(
        "<H", len(tags) + 1) + entries + bytes(4))


def test_s04_depth_of_pictures(tmp_path):
    """What is dark stays dark: white is what the format says, whatever the picture holds."""
    ramp = np.linspace(0, 1, 64 * 64).reshape(64, 64)

    def seen(name):
        return pd.read_still(tmp_path / name)[..., 0].astype(float)
    for name, most in (("full.png", 65535), ("dark.png", 250), ("twelve.png", 4095)):
        Image.fromarray((ramp * most).astype(np.uint16)).save(tmp_path / name)
        assert np.abs(seen(name) - ramp * most / 257).max() < 1, name
    Image.fromarray((ramp * 300).astype(np.uint16)).save(tmp_path / "dark.tif")
    assert np.abs(seen("dark.tif") - ramp * 300 / 257).max() < 1
    (tmp_path / "dark.ppm").write_bytes(b"P5 64 64 65535\n" + (ramp * 250).astype(">u2").tobytes())
    assert seen("dark.ppm").max() <= 1
    tiff(tmp_path / "twelve.tif", ramp * 4095, 12)
    assert np.abs(seen("twelve.tif") - ramp * 255).max() < 1.1
    tiff(tmp_path / "negative.tif", ramp * 65535, 16, photometric=0)
    assert np.abs(seen("negative.tif") - 255 * (1 - ramp)).max() < 1.1
    for name, most in (("one.tif", 1), ("levels.tif", 255)):
        Image.fromarray((ramp * most).astype(np.float32)).save(tmp_path / name)
        assert np.abs(seen(name) - ramp * 255).max() < 1.1, name
    holes = np.where(ramp > 0.5, np.nan, ramp).astype(np.float32)
    Image.fromarray(holes).save(tmp_path / "holes.tif")
    assert np.abs(seen("holes.tif") - np.nan_to_num(holes) * 255).max() < 1.1
    deep = np.stack([ramp, ramp[::-1], ramp.T], -1)
    for channels, mark in ((deep, 2), (np.concatenate([deep, np.ones((64, 64, 1))], -1), 6)):
        png16(tmp_path / "deep.png", (channels * 65535).round().astype(np.uint16), mark)
        assert np.abs(pd.read_still(tmp_path / "deep.png") - deep * 255).max() < 1.1
    Image.fromarray(ramp > 0.5).save(tmp_path / "bits.png")
    assert set(np.unique(seen("bits.png"))) == {0, 255}
    palette = Image.fromarray((ramp * 3).astype(np.uint8), "P")
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    palette.save(tmp_path / "holes.png", transparency=1)
    assert pd.read_still(tmp_path / "holes.png")[[0, 30, 50], 5].tolist() == [
        [200, 0, 0], [255, 255, 255], [0, 0, 200]]


def png16(path, values, kind):
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(
            ">I", zlib.crc32(name + data))
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(
        ">IIBBBBB", width, height, 16, kind, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b""))


def test_6e_pictures_of_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(pd, "MOST_PIXELS", 100 * 100)
    Image.fromarray(scenery(1, 1, size=(160, 120))[0]).save(tmp_path / "a.png")
    reject, = clips(tmp_path / "a.png")[1]
    assert (reject["reason"], reject["figure"]) == ("too many pixels", 160 * 120)
    Image.fromarray(scenery(1, 1, size=(160, 120))[0]).save(tmp_path / "a.jpg")
    (row, _, _), = clips(tmp_path / "a.jpg")[0]                         # at half its size
    assert (row["width"], row["height"]) == (80, 60)
    write(tmp_path / "a.mp4", scenery(1, 12, size=(160, 120)))
    assert clips(tmp_path / "a.mp4")[1][0]["reason"] == "too many pixels"


def test_d12_delays_of_a_gif_are_hundredths(tmp_path):
    """24 a second: delays of 4, 4, 4, 4, 4 and 5 hundredths."""
    frames = [Image.fromarray(frame) for frame in scenery(2, 48, speed=(2, 0))]
    ends = np.round(np.arange(49) / 24 * 100) * 10
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:],
                   duration=np.diff(ends).astype(int).tolist())
    (row, _, data), = clips(tmp_path / "a.gif")[0]
    assert row["fps"] == pytest.approx(24, abs=0.05) and row["frames"] == 48


@pytest.mark.parametrize("form", ["gif", "webp"])
def test_d12_moving_pictures_keep_their_rate(tmp_path, form):
    import sample
    args = sample.parse_options(["x", "--prompt", "a", "--format", form])
    for fps in (24.0, 25.0, 7.5):
        path = sample.save_frames(tmp_path / "a", iter(scenery(2, 48, speed=(2, 0))), fps, args)
        (row, _, _), = clips(path)[0]
        assert row["fps"] == pytest.approx(fps, rel=0.003) and row["frames"] == 48, fps
        with Image.open(path) as picture:
            delays = []
            for n in range(picture.n_frames):
                picture.seek(n)
                picture.load()
                delays.append(picture.info["duration"])
        assert abs(sum(delays) - 48 * 1000 / fps) <= 10 and max(delays) - min(delays) <= 10


# -- sizes -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("width, height", [(1, 1), (1, 64), (64, 1), (2, 64), (64, 2), (3, 3),
                                           (5, 400), (700, 2), (16000, 2)])
def test_section1_narrow_pictures_and_videos(tmp_path, width, height):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (row, _, _), = clips(tmp_path / "a.png", min_side=0, min_contrast=0)[0]
    assert (row["width"], row["height"]) == (width, height)
    assert clips(tmp_path / "a.png")[1][0]["reason"] == "too small"
    write(tmp_path / "a.mov", [np.roll(pixels, n, 1) for n in range(8)], "png", pix_fmt="rgb24")
    kept, lost = clips(tmp_path / "a.mov", min_side=0, min_contrast=0)
    assert len(kept) + len(lost) == 1
    if min(width, height) > 1 and max(width, height) < 16000:
        assert (kept[0][0]["width"], kept[0][0]["height"]) == (width // 2 * 2, height // 2 * 2)
        assert frames_of(kept[0][2])[0].shape == (8, height // 2 * 2, width // 2 * 2, 3)
    elif min(width, height) == 1:
        assert (lost[0]["reason"], lost[0]["figure"]) == ("too small", 1)


def test_d10_odd_size_of_a_sample(tmp_path, capsys):
    import sample
    args = sample.parse_options("x --prompt a --size 33x47 --frames 5 --fps 8".split())
    request = sample.request_of(args, {"prompt": "a"})
    assert (request["height"], request["width"]) == (32, 46)
    assert "33x47 is cropped to 32x46" in capsys.readouterr().err
    args.format = "png"
    request = sample.request_of(args, {"prompt": "a"})
    assert (request["height"], request["width"]) == (33, 47) and not capsys.readouterr().err


def test_6b_sizes_that_change_again_and_again(tmp_path):
    sizes = [(64, 48)] * 7 + [(80, 64)] + [(96, 72)] * 4 + [(64, 48)] * 2 + [(40, 40)] * 3
    seeds = [1] * 6 + [2, 3] + [4] * 9
    with av.open(str(tmp_path / "a.avi"), "w") as out:
        stream = out.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for n, (seed, (width, height)) in enumerate(zip(seeds, sizes)):
            picture = np.kron(np.random.default_rng(seed).integers(
                0, 255, (height // 8, width // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG", quality=95)
            packet = av.Packet(file.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, n, n, Fraction(1, 10)
            packet.is_keyframe = True
            out.mux(packet)
    kept, lost = clips(tmp_path / "a.avi")
    assert [(row["width"], row["height"], row["frames"]) for row, _, _ in kept] == [
        (64, 48, 7), (80, 64, 1), (96, 72, 4), (64, 48, 2), (40, 40, 3)] and not lost


def test_section1_side_data_of_a_type_without_a_name(tmp_path):
    """FFmpeg gives a JPEG's EXIF as side data of a type that this PyAV has no name for; beside it
    stands the rotation."""
    exif = Image.Exif()
    exif[0x112] = 6
    file = io.BytesIO()
    Image.fromarray(scenery(1, 1, size=(96, 64))[0]).save(file, "JPEG", exif=exif, quality=95)
    with av.open(str(tmp_path / "a.avi"), "w") as out:
        stream = out.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        for n in range(12):
            packet = av.Packet(file.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, n, n, Fraction(1, 10)
            packet.is_keyframe = True
            out.mux(packet)
    video = pd.Video(tmp_path / "a.avi")
    frame = next(iter(video))
    kinds = [data.type.name for data in frame.side_data.keys()]
    assert any(not isinstance(kind, str) for kind in kinds), "the test has lost its point"
    (row, _, _), = clips(tmp_path / "a.avi")[0]
    assert (row["width"], row["height"]) == (64, 96)


# -- damage, fields, times -------------------------------------------------------------------------

def damaged(path, codec, frames, spoilt=(), lost=()):
    """A video of which some packets' bytes were overwritten, and some never came."""
    write(path, frames, codec, gop=48, options={
        "libx264": {"bf": "0"}, "libx265": {"x265-params": "log-level=none:bframes=0"},
        "mpeg4": {"b": "4000000"}, "mpeg2video": {"b": "4000000"}}[codec])
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data, noise = bytearray(path.read_bytes()), np.random.default_rng(5)
    for n in spoilt:
        at, size = places[n]
        part = noise.integers(0, 256, max(8, size // 2), dtype=np.uint8).tobytes()
        data[at + size // 4:at + size // 4 + len(part)] = part
    path.write_bytes(data)
    if lost:
        with av.open(str(path)) as source, av.open(str(path.with_suffix(".mkv")), "w") as out:
            stream = source.streams.video[0]
            to = out.add_stream_from_template(stream)
            for n, packet in enumerate(source.demux(stream)):
                if packet.dts is not None and n not in lost:
                    packet.stream = to
                    out.mux(packet)
    return path.with_suffix(".mkv") if lost else path


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4", "mpeg2video"])
def test_d15_concealed_damage_is_counted(tmp_path, codec):
    ground = np.kron(np.random.default_rng(0).integers(0, 255, (16, 24, 3)), np.ones((8, 8, 1)))
    frames = [np.roll(ground.astype(np.uint8), 2 * k, 1) for k in range(72)]
    path = damaged(tmp_path / "a.mp4", codec, frames, spoilt=(20, 21, 22))
    rows = [row["scores"] for row, _, _ in clips(path)[0]]
    assert rows[0]["bad_packets"] >= 3 and max(row["damage"] for row in rows) >= 0.02, rows
    reject, *_ = clips(path, max_damage=0.01)[1]
    assert reject["reason"] == "damaged" and reject["figure"] > 0.01 == reject["threshold"]
    path = damaged(tmp_path / "b.mp4", codec, frames, lost=range(20, 30))
    assert max(row["scores"]["damage"] for row, _, _ in clips(path)[0]) >= 10 / 72 - 0.01
    whole = damaged(tmp_path / "c.mp4", codec, frames)
    (row, _, _), = clips(whole)[0]
    assert (row["scores"]["damage"], row["scores"]["bad_packets"]) == (0, 0)


@pytest.mark.parametrize("codec, n", [("mpeg2video", 30), ("libx264", 30), ("mpeg2video", 1),
                                      ("mpeg2video", 2)])
def test_d11_interlaced_video_is_deinterlaced(tmp_path, codec, n):
    """Fields of two moments each: their combs go, frames and times stay."""
    fields = scenery(4, 2 * n, speed=(3, 0), size=(192, 128))
    frames = [a.copy() for a in fields[::2]]
    for frame, later in zip(frames, fields[1::2]):
        frame[1::2] = later[1::2]
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        stream = out.add_stream(codec, rate=25, options={
            "flags": "+ildct+ilme", "b": "9000000"} if codec == "mpeg2video" else {
                "x264-params": "tff=1", "crf": "8"})
        stream.width, stream.height, stream.pix_fmt = 192, 128, "yuv420p"
        graph = av.filter.Graph()                      # marks the frames: PyAV itself cannot
        graph.link_nodes(graph.add_buffer(width=192, height=128, format="yuv420p",
                                          time_base=Fraction(1, 25)),
                         graph.add("setfield", "tff"), graph.add("buffersink")).configure()
        for k, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p")
            frame.pts, frame.time_base = k, Fraction(1, 25)
            graph.vpush(frame)
            out.mux(stream.encode(graph.vpull()))
        out.mux(stream.encode(None))

    def combs(pixels):
        luma = pixels.astype(float).mean(-1)
        return np.abs(luma[1:-1] - (luma[:-2] + luma[2:]) / 2).mean()
    raw = pd.Video(tmp_path / "a.mkv", interlaced="keep")
    stored = [(frame.pts, frame.interlaced_frame, raw.rgb(frame)) for frame in raw]
    video = pd.Video(tmp_path / "a.mkv")
    seen = [(frame.pts, video.rgb(frame)) for frame in video]
    assert all(flag for _, flag, _ in stored) and not raw.converted
    assert [at for at, _ in seen] == [at for at, _, _ in stored] and len(seen) == n
    if n > 2:
        assert np.mean([combs(pixels) for _, pixels in seen]) < 0.6 * np.mean(
            [combs(pixels) for *_, pixels in stored])
        (row, _, _), = clips(tmp_path / "a.mkv")[0]
        assert row["converted"] == ["deinterlaced"] and row["frames"] == n
        assert clips(tmp_path / "a.mkv", interlaced="reject")[1][0]["reason"] == "interlaced"


def stamped(path, stamps, base=Fraction(1, 1000), size=(64, 48)):
    return write(path, scenery(5, len(stamps), size=size), pts=stamps, base=base, rate=25,
                 options={"bf": "0", "preset": "ultrafast"})


def test_d16_rates_of_odd_times(tmp_path):
    pairs = [round(n / 2 * 1000 / 12) * 2 // 2 if n % 2 == 0 else
             round((n - 1) / 2 * 1000 / 12) + 1 for n in range(200)]
    (row, _, _), = clips(stamped(tmp_path / "pairs.mkv", pairs), max_seconds=0)[0]
    assert 20 <= row["fps"] <= 28 and 180 <= row["frames"] <= 220
    triples = [100 * (n // 3) + n % 3 for n in range(90)]
    (row, _, _), = clips(stamped(tmp_path / "triples.mkv", triples), max_seconds=0)[0]
    assert 25 <= row["fps"] <= 33
    bursts = [round(1000 / 30 * (n + n // 20 * 90)) for n in range(60)]     # 30/s, pauses of 3 s
    (row, _, _), = clips(stamped(tmp_path / "bursts.mkv", bursts), max_seconds=0)[0]
    assert row["fps"] == pytest.approx(30, abs=0.4)
    nano = stamped(tmp_path / "nano.mp4", [*range(7), 9 * 10**9 % 2**31], Fraction(1, 10**9))
    micro = stamped(tmp_path / "micro.mp4", [*range(9), 9 * 10**6, 9 * 10**6 + 1],
                    Fraction(1, 10**6))
    for path in (nano, micro):
        kept, lost = clips(path)
        assert len(kept) + len(lost) >= 1 and all(r["fps"] <= 1000 for r, _, _ in kept)
    write(tmp_path / "a.avi", scenery(5, 12, size=(64, 48)), "mpeg4")
    data = (tmp_path / "a.avi").read_bytes()
    at = data.index(b"strh") + 28
    for scale, rate in ((1, 2**32 - 1), (1, 2**31 + 1), (2**32 - 1, 1), (10**6, 1)):
        (tmp_path / "b.avi").write_bytes(data[:at] + struct.pack("<II", scale, rate)
                                         + data[at + 8:])
        kept, lost = clips(tmp_path / "b.avi", max_seconds=20)
        assert len(kept) + len(lost) >= 1, (scale, rate)


def test_6b_pixels_far_from_square(tmp_path):
    path = write(tmp_path / "a.mov", scenery(1, 12, size=(64, 48)),
                 sample_aspect_ratio=Fraction(4, 3))
    data = path.read_bytes()
    at = data.index(b"pasp") + 4
    for wide, high in ((2**31, 1), (2**31 - 1, 2**31), (1, 2**31 - 1), (0, 0), (2**32 - 1, 3)):
        path.write_bytes(data[:at] + struct.pack(">II", wide, high) + data[at + 8:])
        kept, lost = clips(path)
        assert len(kept) + len(lost) == 1, (wide, high)
        assert not kept or max(kept[0][0]["width"], kept[0][0]["height"]) <= 1024
    path.write_bytes(data)
    assert clips(path)[0][0][0]["width"] == 86


def test_6b_clips_too_large_for_a_tar(tmp_path, monkeypatch):
    monkeypatch.setattr(pd, "MOST_BYTES", 1000)
    write(tmp_path / "a.mp4", scenery(1, 12))
    reject, = clips(tmp_path / "a.mp4")[1]
    assert (reject["reason"], reject["threshold"]) == ("too large for a tar", 1000)
    Image.fromarray(scenery(1, 1)[0]).save(tmp_path / "a.png")
    assert clips(tmp_path / "a.png")[1][0]["reason"] == "too large for a tar"


@pytest.mark.parametrize("suffix", ["flv", "ts", "mpg"])
def test_6b_streams_that_begin_within_the_file(tmp_path, suffix):
    """Sound that starts after FFmpeg has looked for streams (5 MB): PyAV does not know it."""
    random = np.random.default_rng(1)
    frames = list(random.integers(0, 255, (14, 240, 320, 3), dtype=np.uint8))
    form, codec = {"flv": ("flv", "libx264"), "ts": ("mpegts", "libx264"),
                   "mpg": ("mpeg", "mpeg2video")}[suffix]

    def piece(sound, n):
        file = io.BytesIO()
        with av.open(file, "w", format=form) as out:
            told = {"qp": "1", "preset": "ultrafast"} if codec == "libx264" else {
                "b": "90000000", "qmin": "1", "qmax": "1"}
            video = out.add_stream(codec, rate=25, options=told)
            video.width, video.height, video.pix_fmt = 320, 240, "yuv420p"
            audio = out.add_stream("mp2" if suffix != "flv" else "libmp3lame",
                                   rate=44100) if sound else None
            for k in range(n):
                frame = av.VideoFrame.from_ndarray(frames[k % 14], format="rgb24")
                frame.pts, frame.time_base = k, Fraction(1, 25)
                out.mux(video.encode(frame))
            for k in range(40 if sound else 0):
                kind = audio.format.name
                silence = av.AudioFrame.from_ndarray(np.zeros(
                    (2, 1152) if audio.format.is_planar else (1, 2304), {"s16": np.int16, "s32":
                     np.int32, "flt": np.float32}[kind[:3]]), format=kind, layout="stereo")
                silence.sample_rate, silence.pts = 44100, k * 1152
                out.mux(audio.encode(silence))
            for stream in filter(None, (video, audio)):
                out.mux(stream.encode(None))
        return file.getvalue()
    n = 6 * 2**20 // (len(piece(False, 14)) // 14) + 3
    quiet, loud = piece(False, n), piece(True, 14)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(quiet + (loud[13:] if suffix == "flv" else loud + quiet))
    with av.open(str(path)) as container, pytest.raises(IndexError):    # else the point is lost
        sum(1 for _ in container.demux(video=0))
    video = pd.Video(path)
    assert sum(1 for _ in video) >= n + 12 and video.bad_packets <= 1


# -- sample.py's reader ----------------------------------------------------------------------------

def marked(k, n=48, width=96, height=64):
    frame = np.full((height, width, 3), 40, np.uint8)
    left = round(k * (width - 12) / (n - 1))
    frame[20:44, left:left + 12] = (240, 220, 60)
    return frame


def test_s05_sample_reads_videos_without_good_times(tmp_path, monkeypatch):
    import sample
    from av.bitstream import BitStreamFilterContext
    frames = [marked(k) for k in range(48)]
    write(tmp_path / "a.ts", frames[:24], rate=12), write(tmp_path / "b.ts", frames[24:], rate=12)
    (tmp_path / "joined.ts").write_bytes(
        (tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    told = {"bf": "2", "crf": "10"}
    write(tmp_path / "packed.avi", frames, rate=12, options=told)
    write(tmp_path / "whole.mp4", frames, rate=12, options=told)
    with av.open(str(tmp_path / "whole.mp4")) as source:
        stream = source.streams.video[0]
        change, data = BitStreamFilterContext("h264_mp4toannexb", stream), b""
        for packet in source.demux(stream):
            data += b"".join(map(bytes, change.filter(packet if packet.size else None)))
    (tmp_path / "elementary.mpg").write_bytes(data)
    for name in ("joined.ts", "packed.avi", "whole.mp4", "elementary.mpg"):
        seen = sample.read_media(tmp_path / name, 12.0, 64, 96)
        places = [np.flatnonzero((frame[..., 2].astype(int) - frame[..., 0] < -60).any(0)).mean()
                  for frame in seen]
        assert len(seen) == 48 and (np.diff(places) >= -1).all(), (name, len(seen))
    monkeypatch.setattr(sample, "FILM_BYTES", 0)       # of a long one nothing stays in memory
    film = sample.read_media(tmp_path / "whole.mp4", 9.0, 32, 48)
    assert isinstance(film, sample.Film) and film.shape == (36, 32, 48, 3) and len(film) == 36
    whole = np.stack(list(film))
    assert np.array_equal(film[-5:], whole[-5:]) and np.array_equal(film[:3], whole[:3])
    far = stamped(tmp_path / "far.mkv", [0, 100, 200, 300, 10**9])
    assert len(sample.read_media(far, 10.0, 32, 48)) < 200


# -- whatever else: mutators -----------------------------------------------------------------------

ODD_SIZES = [(1, 1), (1, 7), (2, 1), (3, 2), (16000, 2), (2, 3000), (17, 333), (65, 49), (640, 3)]
WRITERS = {                              # name: (codec, pixel format, options)
    "a.mp4": ("libx264", "yuv420p", {"bf": "2"}), "b.mp4": ("libx265", "yuv420p10le", {
        "x265-params": "log-level=none"}), "c.avi": ("mpeg4", "yuv420p", {"bf": "2"}),
    "d.webm": ("libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}),
    "e.mp4": ("libsvtav1", "yuv420p", {"preset": "12"}), "f.avi": ("mjpeg", "yuvj422p", {}),
    "g.mkv": ("ffv1", "yuv444p", {}), "h.mov": ("prores_ks", "yuv422p10le", {}),
    "i.flv": ("flv", "yuv420p", {}), "j.ts": ("mpeg2video", "yuv420p", {"bf": "2"}),
    "k.mpg": ("mpeg1video", "yuv420p", {}), "l.wmv": ("wmv2", "yuv420p", {}),
    "m.mov": ("qtrle", "rgb24", {}), "n.avi": ("utvideo", "yuv422p", {}),
    "o.webm": ("libvpx", "yuv420p", {"deadline": "realtime"}), "p.mkv": ("libx264", "yuv444p", {})}


def base_media(folder):
    """A healthy file of each kind: videos, animated pictures, stills."""
    frames = scenery(1, 14, speed=(2, 1), size=(64, 48))
    for name, (codec, pix_fmt, told) in WRITERS.items():
        write(folder / name, frames, codec, pix_fmt=pix_fmt, options=told or {"b": "400000"})
    pictures = [Image.fromarray(frame) for frame in frames]
    for ending in ("gif", "png", "webp", "avif"):
        pictures[0].save(folder / f"moving.{ending}", save_all=True, append_images=pictures[1:],
                         duration=80)
        pictures[0].save(folder / f"still.{ending}")
    for ending in ("jpg", "bmp", "tif", "ppm"):
        pictures[0].save(folder / f"still.{ending}")
    Image.fromarray(np.uint16(frames[0][..., 0]) * 257).save(folder / "deep.png")
    pictures[0].convert("CMYK").save(folder / "ink.jpg")
    pictures[0].quantize(16).save(folder / "palette.png", transparency=3)
    tiles = [av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:32, :32]), format="rgb24")
             .reformat(format="yuv420p", dst_color_range=2) for frame in frames[:4]]
    write_heic(folder / "tiles.heic", tiles, 2, 2, 32, (60, 60), turn=1)
    return sorted(folder.iterdir())


def spoilt(data, random):
    """Bytes after bit flips, a cut, a run of zeros, of noise, or a part twice."""
    data, n = bytearray(data), len(data)
    match int(random.integers(6)):
        case 0 | 1:
            for at in random.integers(0, n, int(random.integers(1, 40))):
                data[at] ^= 1 << int(random.integers(8))
        case 2:
            del data[int(random.integers(n)):]
        case 3:
            at = int(random.integers(n))
            data[at:at + 300] = bytes(len(data[at:at + 300]))
        case 4:
            at = int(random.integers(n))
            data[at:at + 60] = random.integers(0, 256, len(data[at:at + 60]), np.uint8).tobytes()
        case 5:
            a, b = sorted(random.integers(0, n, 2).tolist())
            data[b:b] = data[a:b]
    return bytes(data)


def of_size(path, size, random):
    pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if path.suffix == ".mov":
        write(path, [np.roll(pixels, n, 1) for n in range(5)], "png", pix_fmt="rgb24")
    else:
        Image.fromarray(pixels).save(path)


@functools.cache
def pixel_formats():
    """{pixel format: codecs} of all that this PyAV encodes by itself, to what a file can hold."""
    result = {}
    for name in sorted(av.codecs_available):
        with contextlib.suppress(ValueError):
            codec = av.Codec(name, "w")
            if codec.type == "video" and not re.search(
                    "_(qsv|nvenc|amf|v4l2m2m|vaapi|videotoolbox)|vnull|wrapped|a64|alias", name):
                for one in codec.video_formats or ():
                    result.setdefault(one.name, []).append(codec.name)
    first = ["ffv1", "rawvideo", "libx264", "libx265", "png", "tiff", "exr", "dpx"]
    return {name: sorted(result[name], key=lambda one: (
        first.index(one) if one in first else 99, one)) for name in sorted(result)}


def of_format(path, pix_fmt):
    """The path of some frames of a pixel format, in the first codec and container that takes it;
    None where none does."""
    for codec in pixel_formats()[pix_fmt]:
        for suffix in (".mkv", ".mov", ".avi", ".mxf"):
            with contextlib.suppress(av.FFmpegError, ValueError, NotImplementedError):
                return write(path.with_suffix(suffix), scenery(1, 6, size=(64, 48)), codec,
                             pix_fmt=pix_fmt, options={"preset": "ultrafast"} if "26" in codec
                             else {"strict": "-2"})
            path.with_suffix(suffix).unlink(missing_ok=True)
    return None


def mutants(base, folder, part):
    """200 files, or of these every `part`-th: a fifth of odd sizes, two of pixel formats, the
    others damaged."""
    healthy, formats = base_media(base), list(pixel_formats())
    for n in range(0, 200, part):
        random = np.random.default_rng(n)
        match n // part % 5:
            case 0:
                ending = "png jpg gif bmp tif webp mov mov".split()[n // part // 5 % 8]
                of_size(folder / f"{n:03d}.{ending}", ODD_SIZES[n // 5 % len(ODD_SIZES)], random)
            case 1 | 2 if of_format(folder / f"{n:03d}.mkv", formats[n * len(formats) // 200]):
                pass
            case _:
                path = healthy[n * 7 % len(healthy)]
                (folder / f"{n:03d}{path.suffix}").write_bytes(spoilt(path.read_bytes(), random))
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("part", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_6b_200_media_files_each_kept_or_rejected(tmp_path, part):
    from test_prepare_data import row_lines, run
    (tmp_path / "base").mkdir(), (tmp_path / "in").mkdir()
    names = mutants(tmp_path / "base", tmp_path / "in", part)
    assert len(names) == 200 // part
    run(tmp_path, "set", "--videos", "in", "--min_side", 0, "--min_contrast", 0, "--min_seconds", 0,
        "--near", 0, "--timeout", 60, "--workers", 2)
    rejects = row_lines(tmp_path / "data/set/rejected.jsonl")
    kept = {row["source"] for path in (tmp_path / "data/set").glob("shard-?????.jsonl")
            for row in row_lines(path)}
    assert kept | {row["source"] for row in rejects} == names
    faults = [row for row in rejects if row["reason"].startswith(("fault", "decoder", "timed"))]
    assert not faults and len(kept) > len(names) / 2, faults


@pytest.mark.parametrize("part", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_pixel_formats_show_the_same_picture(tmp_path, part):
    """Every one that has colour, within what its depth can hold."""
    want, seen, formats = scenery(1, 6, size=(64, 48))[0].astype(float), 0, list(pixel_formats())
    for pix_fmt in formats[::part]:
        path, kind = of_format(tmp_path / f"{pix_fmt}.mkv", pix_fmt), av.VideoFormat(pix_fmt)
        if path is None:
            continue
        got = pd.Video(path)
        got = got.rgb(next(iter(got))).astype(float)
        grey = len(kind.components) < 3 and not kind.has_palette
        truth = np.repeat((want @ [0.2126, 0.7152, 0.0722])[..., None], 3, 2) if grey else want
        bits = min(one.bits for one in kind.components)
        rough = 8 if bits > 4 else 30 if bits > 1 else 110              # few bits are dithered
        assert np.abs(got - truth).mean() < rough, pix_fmt
        seen += 1
    assert seen >= 0.8 * len(formats[::part])
