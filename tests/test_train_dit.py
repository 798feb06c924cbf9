"""The denoiser on packed rows: packed equals alone, a fresh block is the identity, any row is found."""
import math
import random
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import caption
import train_dit as D
import train_vae
from conftest import DEVICE
from kernels.attention import reference

OPTIONS = dict(channels=5, vocab=300, dim=48, depth=2, heads=2, patch=(1, 1, 1), text=(32, 1, 2),
               rope_base=100.0)
SHAPES = [(5, 3, 4, 4), (5, 1, 2, 6), (5, 2, 4, 2)]
TEXTS = [[5, 6, 7, 2], [2], [9, 2]]


def shaken(**changes):
    torch.manual_seed(0)
    model = D.Denoiser(**{**OPTIONS, **changes})
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return model


def drawn(patch=(1, 1, 1), n_tokens=None):
    """(row, x0 tokens, noise tokens, t, latents) of the three clips."""
    latents = [torch.randn(*shape, generator=torch.Generator().manual_seed(i))
               for i, shape in enumerate(SHAPES)]
    noises = [torch.randn(*shape, generator=torch.Generator().manual_seed(9 + i))
              for i, shape in enumerate(SHAPES)]
    row = D.lay_out(SHAPES, [8.0, 1.0, 12.0], TEXTS, 4, patch, n_tokens)
    pad = (0, 0, 0, len(row.table_index) - int(row.cu_seqlens[-1]))
    tokens = [torch.nn.functional.pad(D.patchify(x, patch), pad) for x in (latents, noises)]
    return row, *tokens, torch.tensor([0.2, 0.9, 0.5]), latents


MILLIONS = {      # as published, with DiT's table of positions
    "dit-s-2": "32.96", "dit-s-4": "32.95", "dit-s-8": "33.15", "dit-b-2": "130.51",
    "dit-b-4": "130.48", "dit-b-8": "130.88", "dit-l-2": "458.10", "dit-l-4": "458.05",
    "dit-l-8": "458.59", "dit-xl-2": "675.13", "dit-xl-4": "675.07", "dit-xl-8": "675.68",
    "wan-1.3b": "1418.996800", "wan-14b": "14288.491584", "wan-i2v-14b": "16394.878784",
    "wan-ti2v-5b": "4999.787712", "uvit-s-2-cifar10": "44.26", "uvit-s-4-celeba64": "44.29",
    "uvit-m-4-imagenet64": "130.94", "uvit-l-4-imagenet64": "286.83",
    "uvit-l-2-imagenet256": "286.76", "uvit-h-2-imagenet256": "500.83",
    "uvit-l-4-imagenet512": "286.86", "uvit-h-4-imagenet512": "500.94", "uvit-s-2-coco": "44.69",
    "uvit-s-2-coco-deep": "58"}


@pytest.mark.parametrize("name", MILLIONS)
def test_every_published_size_has_its_parameters(name):
    with torch.device("meta"):
        network = D.Denoiser(**D.MODELS[name]).dit
    count = sum(p.numel() for p in network.parameters())
    count += network.pos_embed.numel() if name.startswith("dit") else 0
    digits = len(MILLIONS[name].partition(".")[2])
    assert f"{count / 1e6:.{digits}f}" == MILLIONS[name]
    twin = name.replace("dit", "sit")
    assert {**D.MODELS[twin], "kind": "dit"} == D.MODELS[name] or not name.startswith("dit")


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize("n_tokens", [None, 100])
def test_packed_equals_each_clip_alone(patch, n_tokens):
    """The loss of a clip does not depend on what shares its row, nor on padding."""
    model = shaken(patch=patch)
    row, x0, noise, t, _ = drawn(patch, n_tokens)
    losses = D.clip_losses(model, row, x0, noise, t, "fp32")
    losses.sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for b, shape in enumerate(SHAPES):
        part = slice(int(row.cu_seqlens[b]), int(row.cu_seqlens[b + 1]))
        separate_parts = D.lay_out([shape], [[8.0, 1.0, 12.0][b]], [TEXTS[b]], 4, patch)
        loss = D.clip_losses(model, separate_parts, x0[part], noise[part], t[b:b + 1], "fp32")
        loss.sum().backward()
        assert torch.allclose(loss, losses[b:b + 1], rtol=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, packed[name], atol=2e-5 * max(1.0, packed[name].abs().max())), name


def test_nothing_of_the_null_clip_is_seen():
    model = shaken()
    row, x0, noise, t, _ = drawn(n_tokens=100)
    losses = D.clip_losses(model, row, x0, noise, t, "fp32")
    x0[int(row.cu_seqlens[-1]):] = 1e3
    assert torch.equal(D.clip_losses(model, row, x0, noise, t, "fp32"), losses)


def test_a_fresh_model_is_the_identity_and_returns_zero():
    torch.manual_seed(0)
    model, (row, x0, _, t, _) = D.Denoiser(**OPTIONS), drawn()
    assert torch.equal(model(x0, t, row), torch.zeros_like(x0))
    dit, seen = model.dit, []
    row.freqs, row.axes = dit.freqs, dit.axes
    x = dit.embed(x0)
    tables = torch.zeros(6, 3, 48).unbind(0)
    block = dit.blocks[0]
    for m in block.parameters():
        seen.append(m)
    text = torch.randn(int(row.cu_text[-1]), 48)
    after = torch.zeros(2, 3, 48).unbind(0)
    assert torch.equal(block(x, x, tables, after, text, None, row)[0], x)


def test_initial_values_follow_the_table_of_initialise():
    torch.manual_seed(0)
    dit = D.DiT(16, text_dim=64, dim=256, depth=1, heads=4, patch=(1, 2, 2), rope_base=100.0)
    for name, module in dit.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        law = math.sqrt(2 / sum(module.weight.shape))
        if name.split(".")[0] in ("time", "text"):
            law = 0.02
        if name in ("time_table", "head") or name.endswith("cross.out"):
            law = 0.0
        assert abs(module.weight.std().item() - law) <= 0.05 * law, name
        assert module.bias.abs().max() == 0, name
    assert dit.blocks[0].table.abs().max() == 0 and dit.head_table.abs().max() == 0


def test_every_clip_is_planned_once_and_rows_are_full():
    random = np.random.default_rng(0)
    lengths = random.choice([48, 64, 72, 80, 96, 120], 500).tolist()
    keys = [f"clip-{i}" for i in range(500)]
    plan = D.plan_epoch(keys, lengths, 1024, 0, 0)
    used = [sum(lengths[i] for i in row) for row in plan]
    assert set(i for row in plan for i in row) == set(range(500))
    assert all(len(set(row)) == len(row) for row in plan) and max(used) <= 1024
    assert sum(used) >= 0.99 * 1024 * len(plan)
    assert plan == D.plan_epoch(keys, lengths, 1024, 0, 0) != D.plan_epoch(keys, lengths, 1024, 0, 1)


def test_any_row_is_found_without_those_before_it():
    class Clips:
        keys, lengths, row_tokens = [f"k{i}" for i in range(40)], [30, 50, 20, 60] * 10, 128
    walked = D.RowPlan(Clips, 7)
    rows = [walked.row(s) for s in range(60)]
    assert D.RowPlan(Clips, 7).row(57) == rows[57]


def test_coordinates_are_seconds_at_the_centre_of_what_a_latent_covers():
    coords = D.clip_coords((4, 3, 2, 4), 8.0, 4, (1, 1, 2)).reshape(3, 2, 2, 3)
    assert np.allclose(coords[:, 0, 0, 0] / D.TIME_UNIT, [0.5 / 8, 3 / 8, 7 / 8])
    assert np.allclose(coords[0, :, 0, 1], [0.5, 1.5]) and np.allclose(coords[0, 0, :, 2], [1, 3])


def test_frequencies_are_shared_out_as_in_wan():
    freqs, axes = D.rope_frequencies(128, 10000.0)
    assert [(axes == a).sum().item() * 2 for a in range(3)] == [44, 42, 42]
    assert freqs[0] == 1 and math.isclose(freqs[23].item(), 10000 ** (-2 / 42), rel_tol=1e-6)


def test_euler_follows_a_known_flow():
    """The exact velocity of a point mass: every straight line ends in it, in one step or many."""
    goal, start = torch.tensor([2.0, -1.0]), torch.tensor([0.3, 0.4])
    for n_steps in (1, 7):
        times = D.flow_grid(n_steps, 3.0).float()
        *_, end = D.runge_kutta(lambda x, t: (x - goal) / t, start, times)
        assert torch.allclose(end, goal, atol=1e-5)


def test_rows_are_the_same_when_threads_ask_for_them_at_once(monkeypatch):
    """The loader's threads meet at the end of an epoch: each row must still be one and the same."""
    class Clips:
        keys, lengths, row_tokens = [f"k{i}" for i in range(40)], [30, 50, 20, 60] * 10, 128
    separate_parts = D.RowPlan(Clips, 7)
    rows, plan_epoch = [separate_parts.row(s) for s in range(60)], D.plan_epoch

    def slow(*args):
        time.sleep(0.01)
        return plan_epoch(*args)
    monkeypatch.setattr(D, "plan_epoch", slow)
    shared = D.RowPlan(Clips, 7)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shared.row, range(60))) == rows


def test_flops_of_a_step_are_those_that_torch_counts(monkeypatch):
    """On a row without padding, with attention written out as products that the counter sees."""
    monkeypatch.setattr(D, "attention", reference)
    monkeypatch.setattr(caption, "attention", reference)
    texts = [[5] * 30, [6] * 32, [2] * 2]                # 64 tokens: no padding behind them
    row, model = D.lay_out(SHAPES, [8.0] * 3, texts, 4, (1, 1, 1)), shaken()
    x0 = torch.randn(int(row.cu_seqlens[-1]), 5)
    with FlopCounterMode(display=False) as forward:
        loss = D.clip_losses(model, row, x0, torch.randn_like(x0), torch.rand(3), "fp32").sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    wanted = D.step_flops(OPTIONS, (row.cu_seqlens[1:] - row.cu_seqlens[:-1]).tolist(), [len(t) for t in texts])
    assert forward.get_total_flops() == wanted / 3
    inputs = 2 * len(x0) * 5 * 48 + 2 * 3 * 256 * 48         # of patches and times: no gradient
    assert backward.get_total_flops() == 2 * wanted / 3 - inputs


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_saved_bytes_are_what_a_forward_pass_saves(backend, dtype):
    device = DEVICE if backend == "triton" else "cpu"
    row = D.lay_out([(5, 2, 4, 10)] * 2, [8.0] * 2, [[5] * 40, [2] * 24], 4, (1, 1, 1)).to(device)
    model, x0 = shaken().to(device), torch.randn(int(row.cu_seqlens[-1]), 5, device=device)
    own, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x            # alive: no address comes twice
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        D.clip_losses(model, row, x0, torch.randn_like(x0), torch.rand(2, device=device), dtype)
    copies = [sorted(p.shape) for p in model.parameters()]    # of weights, which autocast makes
    result = sum(x.untyped_storage().nbytes() for at, x in saved.items()
                if at not in own and sorted(x.shape) not in copies)
    assert D.saved_bytes(OPTIONS, len(x0), 64, backend, dtype) == pytest.approx(result, rel=0.25)


def test_losses_by_time_are_sums_and_numbers():
    losses, t = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 0.2, 0.6, 1.0])
    assert D.by_time(losses, t).tolist() == [[3, 2], [0, 0], [3, 1], [4, 1]]


def test_the_held_out_loss_is_told_by_time_and_by_shape():
    model, (row, x0, noise, t, _) = shaken(), drawn(n_tokens=100)
    losses = D.clip_losses(model, row, x0, noise, t, "fp32")
    other = D.lay_out(SHAPES[:1], [8.0], TEXTS[:1], 4, (1, 1, 1))
    separate_parts = D.clip_losses(model, other, x0[:48], noise[:48], t[1:2], "fp32")
    bank = [(["a", "b", "c"], row, x0, noise, t), (["d"], other, x0[:48], noise[:48], t[1:2])]
    result = D.held_out_loss(model, bank, torch.device("cpu"), "fp32")
    every = torch.cat([losses, separate_parts])
    assert result["held_out"] == pytest.approx(every.mean().item())
    assert result["held_out_by_shape"] == {
        "3x4x4": pytest.approx(every[[0, 3]].mean().item()),
        "1x2x6": pytest.approx(losses[1].item()), "2x4x2": pytest.approx(losses[2].item())}
    by_t = [losses[0].item(), math.nan, losses[2].item(), every[[1, 3]].mean().item()]
    assert result["held_out_by_t"] == pytest.approx(by_t, nan_ok=True)


def test_rows_are_as_full_and_even_as_is_said():
    assert D.evenness([[4, 4], [8], [2, 2, 2]], 10) == (22 / 30, 64 * 3 / (32 + 64 + 12))


def test_a_measured_rate_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    assert D.matmul_rate(torch.device("cpu"), seconds=0.01) > 1e8
    assert torch.equal(torch.get_rng_state(), before)


def test_conditions_are_told_dropped_and_begin_without_effect():
    """What is unknown is a row of zeros; a new network ignores them; two values differ once learnt."""
    code = D.condition_code([2.0, None, 24.0])
    assert code.shape == (3 * 64,) and not code[64:128].any() and code[:64].any()
    torch.manual_seed(0)
    model = D.Denoiser(**OPTIONS, conditions=2)
    row, x0, _, t, _ = drawn()
    rows = [D.lay_out(SHAPES, [8.0, 1.0, 12.0], TEXTS, 4, (1, 1, 1), conditions=[[value, None]] * 3)
            for value in (1.0, 9.0)]
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    a, b = (model(x0, t, row) for row in rows)
    assert not torch.allclose(a, b)
    torch.nn.init.zeros_(model.dit.about.weight)
    torch.testing.assert_close(*(model(x0, t, row) for row in rows))


# -- does it go well? ------------------------------------------------------------------------------


def test_a_model_that_knows_nothing_has_the_loss_of_zeros():
    """A new model returns zeros: its held-out loss is that level, whatever is predicted."""
    row, x0, noise, t, _ = drawn(n_tokens=100)
    bank = [(["a", "b", "c"], row, x0, noise, t)]
    own = row.targets
    for objective, level in (
            (D.Objective(), (noise - x0)[own].square()), (D.Objective("noise"), noise[own].square()),
            (D.Objective("x"), x0[own].square())):
        torch.manual_seed(0)
        model = D.Denoiser(**OPTIONS)
        model.objective = objective
        result = D.zero_loss(model, bank)
        assert result == D.held_out_loss(model, bank, torch.device("cpu"), "fp32")["held_out"]
        clips = [level[row.table_index[own] == b].mean().item() for b in range(3)]
        assert result == pytest.approx(np.mean(clips), rel=1e-5)
    model.kind = "gpt"
    assert D.zero_loss(model, [([], row, torch.tensor([0, 0, 1, 3]))]) == pytest.approx(
        1.5 * math.log(2))


def log_of(held, train=None):
    """A log of rows every 10 steps, evaluated at each."""
    train = train or [1 / (1 + i) for i in range(len(held))]
    return [{"step": 10 * i + 10, "loss": loss, "held_out": value}
            for i, (value, loss) in enumerate(zip(held, train))]


def test_three_rises_of_the_held_out_loss_are_said_once():
    line = D.rising(log_of([5, 3, 4, 4.5, 5]))
    assert "since step 20 (3.0000 to 5.0000)" in line and "memorises" in line
    assert "fewer --steps" in line and D.BEST in line
    assert "diverges" in D.rising(log_of([5, 3, 4, 4.5, 5], [1, 1, 2, 3, 4]))
    for held in ([5, 3, 4, 4.5], [5, 3, 4, 4.5, 5, 6], [3, 4, 3.5, 4, 5], [5, 4, 3, 2], [],
                 [5, 3, 4, None, 5], [5, 3, 4, math.nan, 5]):
        assert D.rising(log_of(held)) is None, held


def test_ticks_are_round_and_few():
    assert D.ticks(0, 1100) == [0, 200, 400, 600, 800, 1000]
    assert D.ticks(0.31, 1.62) == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6])
    assert D.ticks(0.001, 0.03) == pytest.approx([0.001, 0.002, 0.005, 0.01, 0.02])
    for low, high in ((0, 1), (3.1, 3.1001), (0.9, 6), (0, 999999), (0.5, 0.5 + 1e-12)):
        assert len(D.ticks(low, high)) <= 9


def test_the_best_weights_are_those_of_the_lowest_held_out_loss(tmp_path):
    """Kept beside the checkpoints; what a killed run left of later steps does not count."""
    (tmp_path / ".best.1-aa.tmp.safetensors").write_bytes(b"of a writer that was killed")
    for step, loss in ((10, 2.0), (20, math.nan), (30, 1.0), (40, 1.5)):
        D.keep_best(tmp_path, step, loss, {"w": torch.tensor([float(step)])})
    assert [path.name for path in tmp_path.iterdir()] == [D.BEST]
    train_vae.save_step(tmp_path, 40, {"ema": {"w": torch.tensor([40.0])}})
    assert D.best_of(tmp_path) == {"step": 30, "held_out": 1.0}
    file, name = D.averaged_weights(tmp_path)
    assert D.read_tensors(file)["w"] == 30 and name == str(tmp_path / "step-000030")
    assert D.averaged_weights(tmp_path, "last")[1] == str(tmp_path / "step-000040")
    D.keep_best(tmp_path, 20, 1.2, {"w": torch.tensor([21.0])})      # it goes on from step 10
    assert D.best_of(tmp_path) == {"step": 20, "held_out": 1.2}
    whole = (tmp_path / D.BEST).read_bytes()
    for bad, read in ((whole[:-1] + bytes([whole[-1] ^ 1]), D.read_tensors),     # one bit
                      (b"cut", lambda _: D.averaged_weights(tmp_path))):
        (tmp_path / D.BEST).write_bytes(bad)
        with pytest.raises(SystemExit) as stop:
            read(tmp_path / D.BEST)
        assert stop.value.code == 2
    (tmp_path / D.BEST).unlink()
    assert D.averaged_weights(tmp_path)[1] == str(tmp_path / "step-000040")


def test_words_are_lower_case_and_single_in_scripts_without_spaces():
    assert D.words_of("A dog's 2 Straße, 猫が走る!") == ["a", "dog", "s", "2", "straße", *"猫が走る"]


def test_the_plan_of_an_epoch_is_the_plain_one_and_fast():
    """6 F: a few very short clips among 100,000 took 137 s, each epoch."""
    def plain(keys, lengths, row_tokens, seed, epoch, block):
        order, planned = D.epoch_order(range(len(keys)), lambda i: keys[i], seed, epoch), []
        for start in range(0, len(order), block):
            rows = []
            for i in sorted(order[start:start + block], key=lambda i: -lengths[i]):
                row = next((r for r in rows if sum(lengths[k] for k in r) + lengths[i]
                            <= row_tokens), None)
                rows.append([i]) if row is None else row.append(i)
            for row in rows:
                for i in order:
                    if i not in row and sum(lengths[k] for k in row) + lengths[i] <= row_tokens:
                        row.append(i)
            mixed = D.rng(seed, "rows", epoch, start).permutation(len(rows))
            planned += [rows[j] for j in mixed]
        return planned

    draw = random.Random(0)
    for n, block in ((0, 8), (1, 8), (60, 16), (300, 4096), (300, 64)):
        lengths = [draw.randint(1, draw.choice((3, 90))) for _ in range(n)]
        keys = [f"k{i}" for i in range(n)]
        assert D.plan_epoch(keys, lengths, 100, 1, 2, block) == plain(
            keys, lengths, 100, 1, 2, block)
    lengths = [draw.randint(200, 900) for _ in range(20000)]
    lengths[7] = 2
    since = time.process_time()
    D.plan_epoch([str(i) for i in range(20000)], lengths, 2048, 0, 0)
    assert time.process_time() - since < 5                    # the plain one: 100
