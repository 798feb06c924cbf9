"""Given frames and clips: extra tokens of a clip's block, encoded on their own, without a loss."""
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import prepare_data as P
import train_dit as D
import train_vae as V

OPTIONS = dict(channels=5, vocab=300, dim=48, depth=2, heads=2, patch=(1, 2, 2), text=(32, 1, 2),
               rope_base=100.0)
SHAPES, RATES = [(5, 3, 4, 4), (5, 1, 2, 6), (5, 2, 4, 2), (5, 4, 4, 2)], [8.0, None, 12.0, 10.0]
TEXTS = [[5, 6, 7, 2], [2], [9, 2], [8, 7, 2]]
TIMES = torch.tensor([0.2, 0.9, 0.5, 0.7])


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


GIVENS = [[(normal(20, 5, 1, 4, 4), 0.0), (normal(21, 5, 1, 4, 4), 1.0)], [],
          [(normal(22, 5, 2, 4, 2), -0.75)], [(normal(23, 5, 3, 4, 2), 1.3)]]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = D.Denoiser(**OPTIONS)
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return model


def packed(which, n_tokens=None, cond_latents=GIVENS):
    """(row, x0 tokens, noise tokens, t) of these clips with what they are given."""
    pick = lambda items: [items[i] for i in which]
    shapes, cond_latents, patch = pick(SHAPES), pick(cond_latents), OPTIONS["patch"]
    row = D.lay_out(shapes, pick(RATES), pick(TEXTS), 4, patch, n_tokens, cond_latents=cond_latents)
    latents, noises = ([normal(9 * k + i, *SHAPES[i]) for i in which] for k in range(2))
    x0 = D.patchify(D.with_cond_latents(latents, cond_latents), patch)
    x0 = torch.nn.functional.pad(x0, (0, 0, 0, len(row.table_index) - len(x0)))
    noise = torch.zeros_like(x0).index_copy(0, row.targets, D.patchify(noises, patch))
    return row, x0, noise, TIMES[which]


@pytest.mark.parametrize("how", [D.Objective(), D.Objective("noise", "vp", "min-snr"),
                                 D.Objective("x", "gvp", "velocity")])
def test_a_clip_with_givens_among_others_equals_it_alone(model, how):
    """At t = 0 the weights of some losses are not finite: no gradient may hear of that."""
    model.objective = how
    losses = D.clip_losses(model, *packed([0, 1, 2, 3], 60), "fp32")
    losses.sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(grad.isfinite().all() for grad in together.values())
    model.zero_grad()
    for b in range(4):
        loss = D.clip_losses(model, *packed([b]), "fp32")
        loss.sum().backward()
        assert torch.allclose(loss, losses[b:b + 1], rtol=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, together[name],
                              atol=2e-5 * max(1.0, together[name].abs().max())), name
    assert not torch.allclose(losses, D.clip_losses(
        model, *packed([0, 1, 2, 3], 60, [[]] * 4), "fp32"), rtol=1e-3)      # they do matter


def test_what_is_given_is_clean_and_bears_no_loss(model):
    row, x0, noise, t = packed([0, 1, 2, 3], 60)
    counts = [12 + 8, 3, 4 + 4, 8 + 6]
    assert row.cu_seqlens.tolist() == [0, *np.cumsum(counts)] and len(row.targets) == 12 + 3 + 4 + 8
    given = torch.tensor([i for i in range(int(row.cu_seqlens[-1])) if i not in row.targets])
    assert (row.table_index[given] == 4).all() and (row.table_index[row.targets] < 4).all()
    assert row.shapes == D.lay_out(row.shapes, [1.0] * 8, [[]] * 8, 4, (1, 2, 2)).shapes
    seen = {}

    def net(x, t, row):
        seen.update(x=x, t=t, out=x.clone().requires_grad_())
        return seen["out"]
    net.objective = D.Objective()
    D.clip_losses(net, row, x0, noise, t, "fp32").sum().backward()
    assert torch.equal(seen["t"], torch.cat([t, torch.zeros(1)]))
    assert torch.equal(seen["x"][given], x0[given])
    is_touched = seen["out"].grad.abs().sum(1) > 0
    assert is_touched.nonzero()[:, 0].tolist() == row.targets.tolist()


def test_without_givens_a_row_is_what_it_was():
    row = D.lay_out(SHAPES, RATES, TEXTS, 4, (1, 2, 2), 40)
    lengths = [12, 3, 4, 8]
    coords = [D.clip_coords(shape, fps, 4, (1, 2, 2)) for shape, fps in zip(SHAPES, RATES)]
    assert row.shapes == SHAPES and row.cu_seqlens.tolist() == [0, 12, 15, 19, 27]
    assert row.table_index.tolist() == [b for b in range(4) for _ in range(lengths[b])] + [3] * 13
    assert row.targets.tolist() == list(range(27)) and row.table_index.dtype == torch.int32
    assert np.array_equal(row.coords, np.concatenate([*coords, np.zeros((13, 3), np.float32)]))
    assert torch.equal(row.table_times(TIMES), TIMES)


def test_givens_stand_at_their_own_time_and_place():
    """A last frame, 8 frames on, where frame 8 is; a clip before at negative times."""
    row = D.lay_out([(5, 3, 4, 4)], [8.0], [[2]], 4, (1, 2, 2), None, "video",
                    [[(normal(0, 5, 1, 4, 4), 0.0), (normal(0, 5, 1, 4, 4), 8 / 8.0),
                      (normal(0, 5, 2, 4, 4), -5 / 8.0)]])
    own, first, last, before = row.coords.split([12, 4, 4, 8])
    assert torch.equal(first, own[:4])
    assert torch.allclose(last[:, 0] / D.TIME_UNIT, torch.tensor(8.5 / 8))
    assert torch.allclose(before[::4, 0] / D.TIME_UNIT, torch.tensor([-4.5 / 8, -2 / 8]))
    for part in (last, before[:4], before[4:]):
        assert torch.equal(part[:, 1:], own[:4, 1:])
    plain = D.clip_coords((5, 2, 2, 2), None, None, (1, 2, 2), -3)
    assert plain.tolist() == [[-3, 0, 0], [-2, 0, 0]]


def test_generation_keeps_what_is_given_in_both_passes(model, monkeypatch):
    """One step of Euler by hand: guided velocity of a clip whose given tokens never change."""
    monkeypatch.setattr(D, "decode_long", lambda vae, z: [z])
    monkeypatch.setattr(D, "to_frames", lambda video: video)
    config = {"latents_mean": [0.0] * 5, "latents_std": [1.0] * 5}
    which, noises = [0, 2], [normal(30, *SHAPES[0]), normal(31, *SHAPES[2])]
    pick = lambda items: [items[i] for i in which]
    sample = lambda cond_latents: D.generate(model, None, config, pick(SHAPES), pick(RATES), pick(TEXTS),
                                       noises, 1, 3.0, cond_latents=cond_latents)
    for b, i in enumerate(which):
        outs = []
        for text in (TEXTS[i], [D.EOS]):
            row = D.lay_out([SHAPES[i]], [RATES[i]], [text], 4, (1, 2, 2), None, "video", [GIVENS[i]])
            x = D.patchify(D.with_cond_latents([noises[b]], [GIVENS[i]]), (1, 2, 2))
            with torch.no_grad():
                outs.append(model(x, torch.tensor([1.0, 0.0]), row)[row.targets])
        velocity = D.unpatchify(outs[1] + 3 * (outs[0] - outs[1]), [SHAPES[i]], (1, 2, 2))[0]
        assert torch.allclose(sample(pick(GIVENS))[b], noises[b] - velocity, atol=1e-4)
    assert not torch.allclose(sample(None)[0], sample(pick(GIVENS))[0], atol=1e-2)


# ---- on files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of moving squares, an autoencoder after two steps, its latents."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "videos").mkdir()
    for i in range(12):
        frames = np.full((9 + 2 * i, 32, 40, 3), 40, np.uint8)
        for t, frame in enumerate(frames):
            frame[8:20, t % 28:t % 28 + 12, i % 3] = 220
        P.write_video(folder / f"videos/square-{i}.mp4", frames, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        P.main(["own", "--videos", "videos", "--workers", "1", "--min_contrast", "0"])
        V.main(["own", "--steps", "2", "--eval_every", "2", "--device", "cpu"])
        V.main(["own", "--encode", "--device", "cpu"])
    return folder


def opened(folder, given=1.0):
    rows = P.open_dataset(P.dataset_dir("own"))
    model, config = V.load_autoencoder("own-vae")
    clips = D.Clips(P.dataset_dir("own"), rows, config, (1, 1, 1), 512, given)
    clips.read_as("video")
    return rows, model, clips


def test_what_stands_alone_was_encoded_alone(folder, monkeypatch):
    monkeypatch.chdir(folder)
    rows, model, clips = opened(folder)
    assert len(rows) == len(clips.keys) == 12
    n_halves = 0
    for row in rows:
        key, frames = row["key"], P.read_clip(P.dataset_dir("own"), row)
        n, whole = V.fit_time(len(frames), 4), clips.files[row["key"]].get_tensor(row["key"])
        read = lambda name: clips.files[name].get_tensor(name).float()
        encode = lambda part: torch.cat(V.encode_long(model, V.to_tensor(part)[None]), 1)[0]
        parts = {f"{key}:last": (n - 1, n)}
        if whole.shape[1] >= 4:
            middle, n_halves = clips.info[f"{key}:b"]["first_frame"], n_halves + 1
            parts |= {f"{key}:a": (0, middle), f"{key}:b": (middle, n),
                      f"{key}:c": (n - 10, n - 5), f"{key}:d": (n - 5, n)}
            assert whole.shape[1] == sum(read(f"{key}:{half}").shape[1] for half in "ab")
            assert read(f"{key}:a").shape[1] >= 2 <= read(f"{key}:b").shape[1]
        else:
            assert f"{key}:a" not in clips.files
        for name, (start, stop) in parts.items():
            stop = start + V.fit_time(stop - start, 4)
            assert clips.info[name]["frames"] == stop - start
            separate_parts = encode(frames[start:stop])
            assert torch.allclose(read(name), separate_parts, atol=2e-3 * separate_parts.abs().max()), name
        still = encode(frames[:1])                           # why KEY:first needs no tensor
        assert torch.allclose(whole[:, :1].float(), still, atol=2e-3 * still.abs().max())
    assert 6 <= n_halves < 12


def test_draws_give_every_task_its_share(folder, monkeypatch):
    monkeypatch.chdir(folder)
    _, _, clips = opened(folder)
    seen = {}
    for epoch in range(200):
        for key in (key for key in clips.keys if f"{key}:a" in clips.files):
            names = clips.draw_conditioning(key, 0, epoch, 0.6)
            assert names == clips.draw_conditioning(key, 0, epoch, 0.6)
            kind = tuple(name[len(key):] for name in names)
            seen[kind] = seen.get(kind, 0) + 1
    shares = {kind: n / sum(seen.values()) for kind, n in seen.items()}
    assert set(shares) == {("",), ("", ":first"), ("", ":last"), ("", ":first", ":last"),
                           (":b", ":a"), (":a", ":b"), (":d", ":c"), (":c", ":d")}
    assert abs(shares.pop(("",)) - 0.4) < 0.04
    assert all(abs(share - 0.6 / 7) < 0.03 for share in shares.values())
    assert clips.draw_conditioning(clips.keys[0], 0, 0, 0.0) == [clips.keys[0]]

    key = next(key for key in clips.keys if f"{key}:a" in clips.files)
    here = clips.info[f"{key}:b"]["first_frame"]
    offsets = lambda target, *names: [at for _, at in clips.cond_latents(target, names, 0, 0)]
    assert offsets(key, f"{key}:first", f"{key}:last") == [0, (clips.info[key]["frames"] - 1) / 8]
    assert offsets(f"{key}:b", f"{key}:a") == [-here / 8]
    assert offsets(f"{key}:a", f"{key}:b") == [here / 8]


def test_rows_are_planned_with_what_is_given_and_stay_full(folder, monkeypatch):
    monkeypatch.chdir(folder)
    _, _, clips = opened(folder)
    clips.text, plan = lambda *_: [2], D.RowPlan(clips, 3, 0.7)
    used, places = [], list(range(0, 40, 4))
    for s in places:
        keys, drawn = plan.row(s)
        _, row, x0, noise, t = D.load_row(clips, keys, 3, s, 0.0, [0.5] * len(keys), drawn)
        assert len(row.table_index) == len(x0) == 512 and int(row.cu_seqlens[-1]) <= 512
        assert int(row.cu_seqlens[-1]) == sum(map(clips.count_tokens, drawn))
        used.append(int(row.cu_seqlens[-1]))
        if any(len(names) > 1 for names in drawn):
            given = torch.ones(512, dtype=bool).index_fill(0, row.targets, False)
            assert not noise[given].any() and x0[given][:5].any()
    assert np.mean(used) > 0.9 * 512
    assert D.RowPlan(clips, 3, 0.7).row(places[-1]) == plan.row(places[-1])


def test_without_the_option_nothing_given_is_read(folder, monkeypatch):
    monkeypatch.chdir(folder)
    _, _, clips = opened(folder, 0.0)
    assert set(clips.files) == set(clips.keys)
    path = next((folder / "data/own").glob("*.latents-*"))
    header = V.read_header(path)
    assert not any(":" in key for key in header["clips"])
    assert all(":" in key for key in header["alone"])
    clips.text = lambda *_: [2]
    _, row, x0, noise, _ = D.load_row(clips, clips.keys[:3], 0, 5, 0.0, [0.5] * 3)
    latents = [clips.latent(key, 0, 5) for key in clips.keys[:3]]
    noises = V.gaussians("noise", 0, 5, clips.keys[:3], [z.shape for z in latents])
    n = int(row.cu_seqlens[-1])
    assert torch.equal(x0[:n], D.patchify(latents, (1, 1, 1))) and not x0[n:].any()
    assert torch.equal(noise[:n], D.patchify(noises, (1, 1, 1))) and not noise[n:].any()


def test_a_run_with_givens_resumes_bit_for_bit(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(D.MODELS, "video-xs", dict(dim=32, depth=2, heads=2, patch=(1, 1, 1),
                                                   text=(32, 1, 2)))
    options = ["own", "--given", "0.5", "--row_tokens", "512", "--batch_tokens", "1024", "--warmup",
               "1", "--eval_every", "6", "--save_every", "3", "--log_every", "1", "--keep", "9",
               "--device", "cpu"]
    D.main([*options, "--steps", "6"])
    rows = [json.loads(line) for line in open("runs/own/log.jsonl")]
    assert len(rows) == 6 and all(np.isfinite(row["loss"]) for row in rows)
    names = ("model", "ema", "optimizer")
    whole = [load_file(f"runs/own/step-000006/{name}.safetensors") for name in names]
    shutil.rmtree("runs/own/step-000006")                    # as if killed after step 3
    D.main([*options, "--steps", "6"])
    assert rows[-1]["loss"] == [json.loads(line) for line in open("runs/own/log.jsonl")][-1]["loss"]
    for name, was in zip(names, whole):
        now = load_file(f"runs/own/step-000006/{name}.safetensors")
        assert all(torch.equal(now[key], was[key]) for key in was)


def test_older_latents_are_refused_and_encoded_again(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    path = next((folder / "data/own").glob("*.latents-*"))
    header, tensors, before = V.read_header(path), load_file(path), path.read_bytes()
    del header["alone"]
    with V.atomic(path) as part:                        # `tensors` lie in the file that goes
        V.save_file({key: x for key, x in tensors.items() if ":" not in key}, part,
                    {"nanosora": json.dumps(header, sort_keys=True)})
    opened(folder, 0.0)
    with pytest.raises(SystemExit):
        opened(folder, 0.5)
    assert "--encode" in capsys.readouterr().err
    V.main(["own", "--encode", "--device", "cpu"])
    assert path.read_bytes() == before


def test_stills_take_their_share_and_rows_stay_full(folder, monkeypatch):
    """A still is the clip's first latent, without a rate; whole clips are as they were."""
    monkeypatch.chdir(folder)
    _, _, clips = opened(folder, 0.0)
    plan = D.RowPlan(clips, 0, 0.0, 0.5)
    drawn = [names for s in range(40) for names in plan.row(s)[1]]
    stills = [target for target, in drawn if target.endswith(":first")]
    assert 0.4 < len(stills) / len(drawn) < 0.6
    for s in range(4):
        row, names = plan.row(s)
        _, laid, x0, _, _ = D.load_row(clips, row, 0, 0, 0.0, [0.5] * len(row), names)
        assert int(laid.cu_seqlens[-1]) <= clips.row_tokens == len(x0)
        assert [shape[1] == 1 for shape in laid.shapes] == [
            n[0].endswith(":first") or clips.shape[n[0]][1] == 1 for n in names]
    C, _, H, W = clips.shape[clips.keys[0]]
    assert clips.latent(f"{clips.keys[0]}:first", 0, 0).shape == (C, 1, H, W)


def test_clips_narrower_than_a_patch_and_latents_in_use_are_named(folder, monkeypatch, capsys):
    """Clips without a token made every loss NaN; training an autoencoder further left its latents,
    and the runs that were trained on them, without it."""
    monkeypatch.chdir(folder)
    rows, config = P.open_dataset(P.dataset_dir("own")), V.load_autoencoder("own-vae")[1]
    with pytest.raises(SystemExit):
        D.Clips(P.dataset_dir("own"), rows, config, (1, 5, 1), 512)
    assert "12 clips are left out" in (said := capsys.readouterr().err) and "no clip is as large" in said
    with pytest.raises(SystemExit):
        V.main(["own", "--steps", "3", "--eval_every", "2", "--device", "cpu"])
    assert f"latents-{config['hash']}" in (said := capsys.readouterr().err) and "--init own-vae" in said
    assert V.load_autoencoder("own-vae")[1] == config
