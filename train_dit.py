"""Stage 4: latents + captions -> a denoiser on packed space-time patches.

In:   data/NAME/ with latents (train_vae.py --encode) and captions (the metadata's, caption.py's).
Out:  runs/NAME/  config.json, tokenizer.json (byte-level BPE of the captions), log.jsonl,
                  samples/ (videos' frames at each evaluation), loss.png,
                  step-000100/ (model, ema, optimizer: safetensors; state.json)

The idea: flow matching. A clip's latent x_0 is mixed with noise, x_t = (1 - t) x_0 + t noise, and a
transformer learns the velocity noise - x_0 from x_t, t and the caption. Clips keep their own length,
size and shape: their patches lie end to end in one row of --row_tokens tokens, attention stays
within each clip, and no clip is padded. What is left of a row is a null clip that nothing sees.

    python train_dit.py demo                     # six minutes on two cores
    python train_dit.py demo --run quick --steps 10 --eval_every 10      # a look, under a minute
    torchrun --nproc_per_node 8 train_dit.py mine --model video-b --row_tokens 16384

Axes: B clips, T' H' W' the latent grid, C channels, N tokens of a row, L text tokens, D width,
A heads, E head dim, P patch volume. Time runs from t = 0, clean, to t = 1, noise.
Papers: Peebles & Xie 2022 (DiT, 2212.09748); Lipman et al. 2022 (flow matching, 2210.02747);
Ma et al. 2024 (SiT, 2401.08740); Dehghani et al. 2023 (packing, 2307.06304); Wan 2025 (2503.20314).
"""
import copy
import functools
import json
import math
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from caption import EOS, TextTower, train_tokenizer
from kernels import backend
from kernels.adaln import gate_residual_ln_modulate, ln_modulate
from kernels.attention import attention
from kernels.patchify import patchify, unpatchify
from kernels.rope import qk_norm_rope
from prepare_data import (atomic, contact_sheet, dataset_dir, number, open_dataset, refuse, rng,
                          run_dir)
from train_vae import (Log, MuonAdamW, Stop, barrier, check_finite, decode_long, ema_update,
                       epoch_order, gaussians, init_weights, last_step, latents_path,
                       load_autoencoder, load_step, lr_at, normaliser,
                       optimizer_tensors, option_parser, prefetch, read_config, read_header,
                       read_log, restore_optimizer, save_step, setup, sheet_frames, split_rows,
                       start_run, sum_over_ranks, take_step, to_frames)

# ------------------------------------------------------------------------------------------------
# The objective: pure functions of x_t = alpha(t) x_0 + sigma(t) noise
# ------------------------------------------------------------------------------------------------

# Times, and coefficients found from them, broadcast against x: [B, 1, 1, 1, 1] for latents, [N, 1]
# for packed tokens. Errors keep x's shape: the mean over a clip is its caller's.


class Objective(NamedTuple):
    """What the network predicts, of which path, and how its error is weighed."""
    prediction: str = "velocity"    # velocity | noise | score | x | ddpm
    path: str = "linear"            # linear | gvp | vp; ddpm has its own
    weighting: str = "none"         # none | velocity | likelihood | min-snr
    shift_tokens: int = 0           # see token_shift


def objective_of(args):
    """The Objective of a run's options; the default for a run older than they are."""
    names = {"objective": "prediction"}
    fields = {names.get(name, name): value for name, value in args.items()}
    return Objective(**{name: fields[name] for name in Objective._fields if name in fields})


def interpolant(path, t):
    """(alpha, sigma, and their derivatives in t): a straight line, a quarter of a circle (GVP), or
    DDPM's variance preserving diffusion with rate 0.1 + 19.9 t (VP), as in SiT."""
    if path == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path == "gvp":
        alpha, sigma = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
        return alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha
    log_alpha, slope = -t * (0.05 + 19.9 / 4 * t), -(0.05 + 19.9 / 2 * t)
    alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
    return alpha, sigma, slope * alpha, -slope * alpha.square() / sigma


def interval(how, is_sampling=False):
    """(first, last) time between which nothing below divides by zero: SiT's, in our direction; x
    needs as much, since its noise is read by dividing by sigma."""
    if how.path == "vp":
        return (1e-3 if is_sampling else 1e-5), 1.0
    ends = {"noise": (1e-3, 1 - 1e-3), "score": (1e-3, 1 - 1e-3), "x": (1e-3, 1.0)}
    return ends.get(how.prediction, (0.0, 1.0))


def shifted(t, shift):
    """t pushed towards noise: t' = s t / (1 + (s - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def token_shift(shift, n, base):
    """The shift of a clip of n tokens: it grows with the root of n / base, since of a longer clip
    more can still be seen at the same time (Esser et al. 2024, 2403.03206). base 0: it does not."""
    return shift * (n / base) ** 0.5 if base else shift


def draw_t(random, law="logit-normal", shift=1.0, span=(0.0, 1.0), mean=0.0, std=1.0):
    """A time by a law, shifted, within a span. random: a numpy Generator."""
    if law == "uniform":
        t = random.random()
    else:
        t = 1 / (1 + math.exp(-(mean + std * random.standard_normal())))
    return span[0] + (span[1] - span[0]) * shifted(t, shift)


def network_time(how, t):
    """The time that the network is told: DDPM knows its steps n = 0..999 alone, as n / 1000."""
    return (1000 * t).floor().clamp(max=999) / 1000 if how.prediction == "ddpm" else t


def interpolate(how, x0, noise, t):
    """x_t on the path from data (t = 0) to noise (t = 1)."""
    if how.prediction == "ddpm":
        c = ddpm_at(ddpm_tables(), (1000 * t).round().long())
        return c["alpha"] * x0 + c["sigma"] * noise
    alpha, sigma, _, _ = interpolant(how.path, t)
    return alpha * x0 + sigma * noise


def target(how, x0, noise, t):
    """What the output should be: velocity dx_t / dt, noise, x_0, or sigma times the score."""
    if how.prediction == "velocity":
        _, _, d_alpha, d_sigma = interpolant(how.path, t)
        return d_alpha * x0 + d_sigma * noise
    return {"noise": noise, "x": x0, "score": -noise}[how.prediction]


def weight(how, t, gamma=5.0):
    """The factor of the squared error: a law of the error of x_0, which is `ratio` times the
    output's. velocity: as if velocity had been predicted; likelihood: its bound (both SiT's);
    min-snr: min(SNR, gamma) (Hang et al. 2023, 2303.09556)."""
    alpha, sigma, d_alpha, d_sigma = interpolant(how.path, t)
    turn = alpha * d_sigma - d_alpha * sigma
    law = {"velocity": (turn / sigma).square(), "likelihood": turn * alpha / sigma ** 3,
           "min-snr": (alpha / sigma).square().clamp(max=gamma)}[how.weighting]
    ratio = {"x": 1.0, "velocity": sigma / turn}.get(how.prediction, sigma / alpha)
    return law * ratio ** 2


def squared_error(how, output, x0, noise, t):
    """Elementwise, weighted; of a score, after scaling by sigma."""
    if how.prediction == "ddpm":
        c = ddpm_at(ddpm_tables(), (1000 * t).round().long())
        eps, v = output.chunk(2, -1)                         # a token's channels: eps, then v
        bits = ddpm_bits(eps.detach(), v, x0, c["alpha"] * x0 + c["sigma"] * noise, c)
        return (eps - noise).square() + bits
    if how.prediction == "score":
        output = interpolant(how.path, t)[1] * output
    error = (output - target(how, x0, noise, t)).square()
    return error if how.weighting == "none" else weight(how, t) * error


def read_output(how, output, x, t):
    """(velocity, x_0, noise) that an output at x_t = x stands for."""
    alpha, sigma, d_alpha, d_sigma = interpolant(how.path, t)
    if how.prediction == "velocity":
        turn = alpha * d_sigma - d_alpha * sigma             # not 0 at any end of linear and GVP
        return (output, (d_sigma * x - sigma * output) / turn,
                (alpha * output - d_alpha * x) / turn)
    if how.prediction == "x":
        x0, noise = output, (x - alpha * output) / sigma
    else:
        noise = output if how.prediction == "noise" else -sigma * output
        x0 = (x - sigma * noise) / alpha
    return d_alpha * x0 + d_sigma * noise, x0, noise


def drift_score(how, output, x, t):
    """(dx/dt of the flow, gradient of log density at x), for stochastic samplers."""
    velocity, _, noise = read_output(how, output, x, t)
    return velocity, -noise / interpolant(how.path, t)[1]


def diffusion(path, form, t, norm=1.0):
    """SiT's strengths w(t) of the noise that a stochastic sampler adds and its score takes away."""
    alpha, sigma, d_alpha, d_sigma = interpolant(path, t)
    return {"constant": norm * torch.ones_like(t), "sigma": norm * sigma, "linear": norm * t,
            "SBDM": norm * sigma * (d_sigma - d_alpha * sigma / alpha),
            "decreasing": (1 - norm * torch.cos(math.pi * t)) ** 2 / 4,
            "increasing-decreasing": norm * torch.sin(math.pi * t) ** 2}[form]


def from_sit(network, prediction="velocity"):
    """A network of SiT's, whose time runs from noise, 0, to data, 1, as one of ours: the only place
    that knows. Its velocity is ours with the other sign."""
    sign = -1 if prediction == "velocity" else 1
    return lambda x, t, *rest: sign * network(x, 1 - t, *rest)


def euler(velocity, x, n_steps, shift=1.0, progress=None, span=(0.0, 1.0)):
    """Follows dx/dt = velocity(x, t) from t = 1 to t = 0 (or within a span) in n_steps, spaced by
    the training times' shift: a float, or a float32 tensor that broadcasts with x; so is t."""
    times = [span[0] + (span[1] - span[0]) * shifted(t, shift)
             for t in np.linspace(1, 0, n_steps + 1).tolist()]
    for now, after in zip(times, times[1:]):
        x = x + (after - now) * velocity(x, now)
        if progress is not None:
            progress.update()
    return x


# DDPM with a learned variance, as DiT trains it (Nichol & Dhariwal 2021, 2102.09672).


def ddpm_betas(schedule="linear", n=1000, ends=None):
    """float64 [n]: linear (DiT's ends), scaled_linear (Stable Diffusion's) or squaredcos_cap_v2."""
    if schedule == "squaredcos_cap_v2":
        signal = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - signal[1:] / signal[:-1], 0.999)
    if schedule == "scaled_linear":
        low, high = ends or (0.00085, 0.012)
        return np.linspace(low ** 0.5, high ** 0.5, n) ** 2
    return np.linspace(*(ends or (0.1 / n, 20 / n)), n)


def respace(spec, n):
    """The steps kept of n: "" all; "250" spread evenly; "10,15,20" in equal parts of the whole;
    "ddim50" by a whole stride."""
    if spec.startswith("ddim"):
        strides = [i for i in range(1, n) if len(range(0, n, i)) == int(spec[4:])]
        if not strides:
            refuse(f"no whole stride keeps {spec[4:]} of {n} steps")
        return list(range(0, n, strides[0]))
    counts, kept, start = [int(count) for count in spec.split(",")] if spec else [n], [], 0
    for i, count in enumerate(counts):
        size = n // len(counts) + (i < n % len(counts))
        if count > size:
            refuse(f"{count} steps cannot be kept of {size}")
        stride, place = (size - 1) / max(1, count - 1), 0.0
        for _ in range(count):
            kept.append(start + round(place))
            place += stride                                  # summed and rounded as DiT does
        start += size
    return kept


@functools.lru_cache
def ddpm_tables(schedule="linear", respacing="", n=1000, ends=None):
    """float64 [S] of the S kept steps, by their published names, and what x_t and the loss need."""
    kept = respace(respacing, n)
    alpha_bar = np.cumprod(1 - ddpm_betas(schedule, n, ends))[kept]
    before = np.append(1.0, alpha_bar[:-1])
    betas = 1 - alpha_bar / before
    variance = betas * (1 - before) / (1 - alpha_bar)        # 0 at the first step, of which the log
    log_variance = np.log(np.append(variance[1:2], variance[1:]))          # is the second's
    tables = dict(
        timestep_map=np.array(kept), betas=betas, log_betas=np.log(betas), alphas_cumprod=alpha_bar,
        alpha=alpha_bar ** 0.5, sigma=(1 - alpha_bar) ** 0.5,
        posterior_variance=variance, posterior_log_variance_clipped=log_variance,
        posterior_mean_coef1=betas * before ** 0.5 / (1 - alpha_bar),
        posterior_mean_coef2=(1 - before) * (1 - betas) ** 0.5 / (1 - alpha_bar))
    return {name: torch.from_numpy(table) for name, table in tables.items()}


def ddpm_at(tables, n):
    """{name: float32, of the shape of n} at the steps n (int64), and n itself."""
    found = {name: table.to(n.device, torch.float32)[n] for name, table in tables.items()}
    return {"n": n, **found}


def ddpm_mean_logvar(eps, v, x, c):
    """(mean, log variance) of the step before x_t = x; v from -1 to 1 spans the variance."""
    x0 = (x - c["sigma"] * eps) / c["alpha"]
    least, share = c["posterior_log_variance_clipped"], (v + 1) / 2
    mean = c["posterior_mean_coef1"] * x0 + c["posterior_mean_coef2"] * x
    return mean, share * c["log_betas"] + (1 - share) * least


def ddpm_bits(eps, v, x0, x, c):
    """The bound's term of a step, elementwise in bits: KL(true posterior, ours); at the first step
    the code length of x_0 in 256 levels. DiT keeps eps out of its gradient."""
    mean, logvar = ddpm_mean_logvar(eps, v, x, c)
    true_mean = c["posterior_mean_coef1"] * x0 + c["posterior_mean_coef2"] * x
    true_logvar = c["posterior_log_variance_clipped"]
    kl = 0.5 * (logvar - true_logvar - 1 + (true_logvar - logvar).exp()
                + (true_mean - mean).square() * (-logvar).exp())
    # the normal's distribution function by the same approximation as the reference
    below = lambda z: 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z ** 3)))
    upper, lower = (below((x0 - mean + half) * (-0.5 * logvar).exp()) for half in (1/255, -1/255))
    mass = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
    return torch.where(c["n"] == 0, -mass.clamp(min=1e-12).log(), kl) / math.log(2)


# ------------------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------------------

MODELS = {  # width, blocks, heads, patch (t, y, x), width / blocks / heads of the text tower
    "video-xs": dict(dim=128, depth=6, heads=4, patch=(1, 1, 1), text=(128, 2, 4), rope_base=100.0),
    "video-s": dict(dim=384, depth=12, heads=6, patch=(1, 2, 2), text=(256, 4, 4), rope_base=1000.0),
    "video-b": dict(dim=768, depth=12, heads=12, patch=(1, 2, 2), text=(512, 6, 8),
                    rope_base=1000.0),
}


def sinusoid(t, width=256):
    """[B] times in [0, 1] to [B, width]: cosines, then sines, of 1000 t at widths/2 frequencies."""
    frequencies = torch.exp(-math.log(10000) / (width // 2) * torch.arange(width // 2,
                            dtype=torch.float64, device="cpu")).to(t.device, torch.float32)
    angles = 1000 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def rope_frequencies(head_dim, base):
    """(freqs [E/2], axes [E/2]): the head's pairs shared out over t, y and x as in Wan: t gets what
    two equal parts for y and x leave; on an axis of width a, pair i turns by base^(-2 i / a)."""
    side = 2 * (head_dim // 6)
    widths = (head_dim - 2 * side, side, side)
    freqs = [base ** (-2 * i / width) for width in widths for i in range(width // 2)]
    axes = [axis for axis, width in enumerate(widths) for _ in range(width // 2)]
    return torch.tensor(freqs, dtype=torch.float32), torch.tensor(axes, dtype=torch.int32)


class SelfAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def forward(self, h, row):
        qkv = self.qkv(h).unflatten(-1, (3, self.heads, -1))                         # [N, 3, A, E]
        q, k = qk_norm_rope(qkv[:, 0], qkv[:, 1], row.coords, row.freqs, row.axes,
                            self.q_norm.to(h.dtype), self.k_norm.to(h.dtype))        # [N, A, E]
        return self.out(attention(q, k, qkv[:, 2], row.cu, row.cu).flatten(1))       # [N, D]


class CrossAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.RMSNorm(dim, 1e-6), nn.RMSNorm(dim, 1e-6)

    def forward(self, h, text, row):
        k, v = self.kv(text).chunk(2, -1)                                            # [L, D]
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (self.q_norm(self.q(h)),
                                                                self.k_norm(k), v))
        return self.out(attention(q, k, v, row.cu, row.cu_text).flatten(1))          # [N, D]


class Block(nn.Module):
    """Self-attention and MLP, modulated and gated by the clip's row of a table; cross-attention
    between them, behind a plain LayerNorm. `after` is the (shift, scale) of what comes next, whose
    norm is computed together with the last residual."""

    def __init__(self, dim, heads):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, dim))
        self.attn, self.cross = SelfAttention(dim, heads), CrossAttention(dim, heads)
        self.cross_weight = nn.Parameter(torch.ones(dim))
        self.cross_bias = nn.Parameter(torch.zeros(dim))
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, h, m, after, text, row):
        """x, h [N, D]: the stream and its modulated norm; m: six tables [R, D]."""
        _, _, gate1, shift2, scale2, gate2 = m
        one, same = torch.ones_like(gate1), gate1.shape
        plain = self.cross_bias.expand(same), (self.cross_weight - 1).expand(same)
        x, h = gate_residual_ln_modulate(x, self.attn(h, row), gate1, *plain, row.rows)
        x, h = gate_residual_ln_modulate(x, self.cross(h, text, row), one, shift2, scale2, row.rows)
        y = self.down(F.gelu(self.up(h), approximate="tanh"))                        # [N, D]
        return gate_residual_ln_modulate(x, y, gate2, *after, row.rows)


class DiT(nn.Module):
    """The denoiser: packed noisy patches, a time a clip and packed text to velocities a patch."""

    def __init__(self, channels, text_dim, dim, depth, heads, patch, rope_base):
        super().__init__()
        self.patch, size = tuple(patch), channels * math.prod(patch)
        self.embed = nn.Linear(size, dim)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_table = nn.Linear(dim, 6 * dim)
        self.text = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.head_table, self.head = nn.Parameter(torch.zeros(2, dim)), nn.Linear(dim, size)
        freqs, axes = rope_frequencies(dim // heads, rope_base)
        self.register_buffer("freqs", freqs, persistent=False)
        self.register_buffer("axes", axes, persistent=False)
        self.initialise()

    def initialise(self):
        """All initial values.

        module                              | law            | std
        Linear                              | xavier uniform | (2 / (in + out))^0.5
        time.*, text.*                      | normal         | 0.02
        time_table, head, cross.out         | zero           | 0
        tables, biases                      | zero           | 0
        norms' weights                      | one            | 0
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if name.split(".")[0] in ("time", "text"):
                    nn.init.normal_(module.weight, std=0.02)
                if name in ("time_table", "head") or name.endswith("cross.out"):
                    nn.init.zeros_(module.weight)

    def forward(self, x, t, text, row):
        """x [N, C*P] noisy tokens; t [B] in [0, 1]; text [L, text_dim]; row: a Row, for its layout.
        Returns the velocity [N, C*P]."""
        row.freqs, row.axes = self.freqs, self.axes
        e = self.time(sinusoid(t))                                                   # [B, D]
        e0 = self.time_table(F.silu(e)).unflatten(-1, (6, -1))                       # [B, 6, D]
        tables = [(block.table + e0).float().unbind(1) for block in self.blocks]     # 6 x [B, D]
        afters = [m[:2] for m in tables[1:]]
        afters.append((self.head_table + e[:, None]).float().unbind(1))
        text = self.text(text)                                                       # [L, D]
        x = self.embed(x)                                                            # [N, D]
        h = ln_modulate(x, *tables[0][:2], row.rows)
        for block, m, after in zip(self.blocks, tables, afters):
            x, h = block(x, h, m, after, text, row)
        return self.head(h)                                                          # [N, C*P]


class TextToVideo(nn.Module):
    """The denoiser and the text tower that is trained, averaged and saved with it."""
    objective = Objective()                                  # as what its output is to be read

    def __init__(self, channels, vocab, text, **options):
        super().__init__()
        self.tower = TextTower(vocab, *text)
        self.dit = DiT(channels, text[0], **options)

    def forward(self, x, t, row):
        return self.dit(x, t, self.tower(row.ids, row.cu_text), row)


# ------------------------------------------------------------------------------------------------
# Data: packed rows of clips
# ------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """The layout of a packed row, all on one device. Tokens from cu[-1] on are the null clip."""
    shapes: list             # (C, T', H', W') of each clip
    coords: torch.Tensor     # float32 [N, 3]: t in seconds times TIME_UNIT, y and x in latent cells
    cu: torch.Tensor         # int32 [B + 1]: clip b holds tokens cu[b] to cu[b + 1]
    rows: torch.Tensor       # int32 [N]: the table row, here the clip, of each token
    ids: torch.Tensor        # int64 [L]: the captions' tokens end to end
    cu_text: torch.Tensor    # int32 [B + 1]
    freqs: torch.Tensor = None
    axes: torch.Tensor = None

    def to(self, device):
        moved = {key: value.to(device) for key, value in vars(self).items()
                 if isinstance(value, torch.Tensor)}
        return Row(**{**vars(self), **moved})


TIME_UNIT = 3.0              # rotary units a second: about one a latent frame at 12 frames/s


def clip_coords(shape, fps, time_stride, patch):
    """float32 [n, 3] of a clip's tokens: the time at the centre of the frames that a latent frame
    covers (one frame for the first, time_stride for each other), and the patch's centre in cells."""
    _, T, H, W = shape
    latent = np.arange(T)
    centre = np.where(latent == 0, 0.5, (latent - 1) * time_stride + 1 + time_stride / 2)
    t = TIME_UNIT * centre / (fps or 1.0)
    pt, ph, pw = patch
    axes = [axis.reshape(-1, size).mean(1) for axis, size in
            ((t, pt), (np.arange(H) + 0.5, ph), (np.arange(W) + 0.5, pw))]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3).astype(np.float32)


def lay_out(shapes, rates, texts, time_stride, patch, n_tokens=None):
    """The Row of clips of these shapes [(C, T', H', W')] at these frame rates under these texts
    (lists of token ids); `n_tokens`: the row's length, null clip included."""
    coords = [clip_coords(shape, fps, time_stride, patch) for shape, fps in zip(shapes, rates)]
    lengths = [len(c) for c in coords]
    left = (n_tokens or sum(lengths)) - sum(lengths)
    coords = np.concatenate(coords + [np.zeros((left, 3), np.float32)])
    rows = np.repeat(np.arange(len(shapes) + 1), lengths + [left]).clip(max=len(shapes) - 1)
    cumulate = lambda counts: torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32)
    return Row(shapes=list(shapes), coords=torch.from_numpy(coords), cu=cumulate(lengths),
               rows=torch.from_numpy(rows.astype(np.int32)),
               ids=torch.tensor([i for ids in texts for i in ids], dtype=torch.int64),
               cu_text=cumulate([len(ids) for ids in texts]))


def plan_epoch(keys, lengths, row_tokens, seed, epoch, block=4096):
    """Rows of clips for one epoch: a list of lists of indices into `keys`, in the order of
    `epoch_order`. Clips are taken in blocks, the longest first, each into the first row
    with room; rows with room left at the end of the epoch are topped up with clips seen already."""
    order = epoch_order(range(len(keys)), lambda i: keys[i], seed, epoch)
    planned = []
    for start in range(0, len(order), block):
        rows, room = [], []
        for i in sorted(order[start:start + block], key=lambda i: -lengths[i]):
            fits = np.flatnonzero(np.array(room) >= lengths[i])
            if not len(fits):
                rows.append([])
                room.append(row_tokens)
            j = int(fits[0]) if len(fits) else -1
            rows[j].append(i)
            room[j] -= lengths[i]
        shortest = min(lengths[i] for i in order)
        for row, left in zip(rows, room):
            for i in order:
                if left < shortest:
                    break
                if lengths[i] <= left and i not in row:
                    row.append(i)
                    left -= lengths[i]
        mixed = rng(seed, "rows", epoch, start).permutation(len(rows))
        planned += [rows[j] for j in mixed]
    return planned


class Clips:
    """The latents of a data set by one autoencoder, with their captions as token ids."""

    def __init__(self, folder, rows, config, patch, row_tokens, tokenizer):
        self.mean, self.std = normaliser(config)
        self.tokenizer, self.row_tokens, self.patch = tokenizer, row_tokens, patch
        self.files, self.shape, self.about, self.rows = {}, {}, {}, {row["key"]: row for row in rows}
        for shard in sorted({row["shard"] for row in rows}):
            path = latents_path(folder, shard, config["hash"])
            if not path.exists():
                refuse(f"{path} is missing: run `python train_vae.py {Path(folder).name} --encode`")
            header = read_header(path)
            self.time_stride = header["time_stride"]
            file = safe_open(path, "pt")
            for key, about in header["clips"].items():
                if about["clip"] not in self.rows:
                    continue
                C, T, H, W = file.get_slice(key).get_shape()
                crop = [side // p * p for side, p in zip((T, H, W), patch)]
                self.files[key], self.about[key] = file, about
                self.shape[key] = (C // 2, *crop)
        self.keys = sorted(self.files)
        self.lengths = [math.prod(self.shape[key][1:]) // math.prod(patch) for key in self.keys]
        longest = max(self.lengths)
        if longest > row_tokens:
            refuse(f"a clip has {longest} tokens, more than --row_tokens {row_tokens}: raise that, or "
                   f"encode again with --max_cells {row_tokens * math.prod(patch)}")

    def latent(self, key, seed, step):
        """A draw from the autoencoder's posterior, normalised: float32 [C, T', H', W']."""
        C, T, H, W = self.shape[key]
        mean, logvar = self.files[key].get_tensor(key)[:, :T, :H, :W].float().chunk(2)
        noise = gaussians("posterior", seed, step, [key], [mean.shape])[0]
        return (mean + (0.5 * logvar).exp() * noise - self.mean) / self.std

    def text(self, key, seed, step, drop):
        """Token ids of one of the clip's captions, drawn by weight; dropped with chance `drop`."""
        captions = self.rows[self.about[key]["clip"]]["captions"]
        random = rng(seed, "caption", step, key)
        if random.random() < drop or not captions:
            return [EOS]
        weights = np.array([c["weight"] for c in captions], dtype=np.float64)
        picked = captions[int(random.choice(len(captions), p=weights / weights.sum()))]
        return encode_text(self.tokenizer, picked["text"])

    def lay_out(self, keys, texts):
        return lay_out([self.shape[key] for key in keys], [self.about[key]["fps"] for key in keys],
                       texts, self.time_stride, self.patch, self.row_tokens)


def load_tokenizer(path):
    """The run's tokenizer.json; refuses a damaged one."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:           # the library raises nothing narrower
        refuse(f"{path} is no tokenizer: {error}")


def encode_text(tokenizer, text, most=256):
    """Token ids of a prompt, at most `most`, closed by EOS."""
    return tokenizer.encode(text).ids[:most - 1] + [EOS]


class RowPlan:
    """Row s of training for any s: epoch after epoch of `plan_epoch`."""

    def __init__(self, clips, seed):
        self.clips, self.seed = clips, seed
        self.first = [0]                                     # row number at which each epoch begins
        self.lock = threading.Lock()                         # the loader's threads share the plan

    @functools.lru_cache(maxsize=2)
    def epoch(self, n):
        return plan_epoch(self.clips.keys, self.clips.lengths, self.clips.row_tokens, self.seed, n)

    def row(self, s):
        """The keys of the clips in row s."""
        with self.lock:
            while self.first[-1] <= s:
                self.first.append(self.first[-1] + len(self.epoch(len(self.first) - 1)))
            n = int(np.searchsorted(self.first, s, side="right")) - 1
            return [self.clips.keys[i] for i in self.epoch(n)[s - self.first[n]]]


def load_row(clips, keys, seed, step, drop, times):
    """All that one row of training needs, drawn by (seed, step, key): (keys, Row, x0 tokens, noise
    tokens, t [B]). `times`: the time of each clip."""
    latents = [clips.latent(key, seed, step) for key in keys]
    noises = gaussians("noise", seed, step, keys, [x.shape for x in latents])
    texts = [clips.text(key, seed, step, drop) for key in keys]
    row = clips.lay_out(keys, texts)
    left = (0, 0, 0, len(row.rows) - int(row.cu[-1]))        # the null clip's tokens are zeros
    tokens = [F.pad(patchify(group, clips.patch), left) for group in (latents, noises)]
    return keys, row, *tokens, torch.tensor(times, dtype=torch.float32)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def clip_losses(model, row, x0, noise, t, dtype):
    """[B]: each clip's squared error, its own mean over tokens and channels."""
    device, rows, how = x0.device, row.rows, model.objective
    t = network_time(how, t)
    time_of = t[rows.long()][:, None]
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
        output = model(interpolate(how, x0, noise, time_of), t, row)
    error = squared_error(how, output.float(), x0, noise, time_of).mean(-1)          # [N]
    n = int(row.cu[-1])                                      # the null clip does not count
    sums = torch.zeros(len(t), device=device).index_add(0, rows[:n].long(), error[:n])
    return sums / (row.cu[1:] - row.cu[:-1])


@torch.no_grad()
def held_out_loss(model, bank, device, dtype, n_bins=4):
    """(mean loss, loss by time bin) over the fixed bank of clips, noise and times."""
    losses, times = [], []
    for _, row, x0, noise, t in bank:
        moved = row.to(device), x0.to(device), noise.to(device), t.to(device)
        losses.append(clip_losses(model, *moved, dtype).cpu())
        times.append(t)
    losses, bins = torch.cat(losses), (torch.cat(times) * n_bins).long().clamp(max=n_bins - 1)
    by_bin = [losses[bins == b].mean().item() for b in range(n_bins)]
    return losses.mean().item(), by_bin


@torch.no_grad()
def generate(model, vae, vae_config, shapes, rates, texts, noises, n_steps=20, guidance=4.0, shift=1.0,
             time_stride=4, progress=None):
    """Latents to videos: denoises clips of `shapes` [(C, T', H', W')] from `noises` under `texts`
    (token ids), all in one packed row with their unguided twins; returns uint8 [T, H, W, 3] each."""
    device, n = noises[0].device, len(shapes)
    twice = 2 if guidance != 1 else 1
    patch = model.dit.patch
    row = lay_out(shapes * twice, rates * twice, texts + [[EOS]] * n * (twice - 1), time_stride, patch)
    row, how = row.to(device), model.objective
    first, lengths = row.cu[:n].long(), row.cu[1:n + 1] - row.cu[:n]
    if how.shift_tokens:                                     # each token by its clip's length
        shift = token_shift(shift, lengths, how.shift_tokens).repeat_interleave(lengths)[:, None]

    def velocity(x, t):
        t = torch.as_tensor(t, dtype=torch.float32, device=device).expand(len(x), 1)
        output = model(x.repeat(twice, 1), t[first, 0].repeat(twice), row)
        if twice == 2:
            output, unguided = output.chunk(2)
            output = unguided + guidance * (output - unguided)
        return read_output(how, output, x, t)[0]

    tokens = euler(velocity, patchify(noises, patch), n_steps, shift, progress, interval(how, True))
    mean, std = normaliser(vae_config, device)
    videos = []
    for z in unpatchify(tokens, shapes, patch):
        parts = decode_long(vae, (z * std + mean)[None])
        videos.append(to_frames(torch.cat(list(parts), 2)[0]))
    return videos


def sample_held_out(model, vae, vae_config, clips, keys, seed, path, shift):
    """A sheet of videos sampled at held-out clips' captions, sizes and lengths."""
    rows, device = [], next(model.parameters()).device
    texts = [clips.text(key, seed, 0, 0.0) for key in keys]
    shapes = [clips.shape[key] for key in keys]
    noises = [x.to(device) for x in gaussians("sample", seed, 0, keys, shapes)]
    videos = generate(model, vae, vae_config, shapes, [clips.about[key]["fps"] for key in keys], texts,
                      noises, shift=shift, time_stride=clips.time_stride)
    for video, ids in zip(videos, texts):
        rows.append((sheet_frames(video), clips.tokenizer.decode(ids)))
    contact_sheet(path, rows)


def plot_losses(folder, width=640, height=360):
    """loss.png: the training loss (grey) and the held-out loss (blue) over steps, on a log scale."""
    log = read_log(folder)
    lines = [([(r["step"], r["loss"]) for r in log], (170, 170, 170)),
             ([(r["step"], r["held_out"]) for r in log if "held_out" in r], (40, 90, 220))]
    values = [value for points, _ in lines for _, value in points]
    low, high, last = math.log(min(values)), math.log(max(values)), max(r["step"] for r in log)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    place = lambda step, value: (60 + (width - 80) * step / last, height - 30 - (height - 60)
                                 * (math.log(value) - low) / max(1e-9, high - low))
    for points, colour in lines:
        if len(points) > 1:
            draw.line([place(*point) for point in points], fill=colour, width=2)
    for value in (math.exp(low), math.exp((low + high) / 2), math.exp(high)):
        draw.text((8, place(0, value)[1] - 6), f"{value:.3f}", fill="black")
    draw.text((60, height - 20), f"0 to {last} steps; grey: training, blue: held out", fill="black")
    with atomic(Path(folder) / "loss.png") as path:
        image.save(path, "PNG")


def open_stage(args, folder):
    """(autoencoder, its config, tokenizer, training Clips, held-out Clips)."""
    data = dataset_dir(args.name)
    train_rows, held_out = split_rows(open_dataset(data), data)
    vae_name = args.vae or f"{Path(args.name).name}-vae"
    vae, vae_config = load_autoencoder(vae_name)
    if (folder / "tokenizer.json").exists():
        tokenizer = load_tokenizer(folder / "tokenizer.json")
    elif args.init:
        tokenizer = load_tokenizer(run_dir(args.init) / "tokenizer.json")
    else:
        texts = [c["text"] for row in train_rows for c in row["captions"]]
        tokenizer = train_tokenizer(texts, args.vocab)
    patch = MODELS[args.model]["patch"]
    clips = [Clips(data, rows, vae_config, patch, args.row_tokens, tokenizer)
             for rows in (train_rows, held_out)]
    return vae, vae_config, tokenizer, *clips


def held_out_bank(clips, seed):
    """A few rows of held-out clips with fixed noise and evenly spread times, for figures that two
    runs can compare to three digits."""
    plan = plan_epoch(clips.keys, clips.lengths, clips.row_tokens, seed, 0)[:6]
    n, bank, place = sum(len(row) for row in plan), [], 0
    spread = rng(seed, "bank").permutation(n)
    for indices in plan:
        keys = [clips.keys[i] for i in indices]
        times = [(spread[place + j] + 0.5) / n for j in range(len(keys))]
        place += len(keys)
        bank.append(load_row(clips, keys, seed, 0, 0.0, times))
    return bank


def train(args, folder):
    rank, world, device = setup(args)
    rows_a_step = args.batch_tokens // args.row_tokens
    vae, vae_config, tokenizer, clips, held_out = open_stage(args, folder)
    options = dict(MODELS[args.model], channels=vae.z_dim, vocab=tokenizer.get_vocab_size())
    checkpoint = start_run(folder, {"kind": "denoiser", "args": vars(args), "model": options, "vae":
                                    {"run": args.vae or f"{Path(args.name).name}-vae",
                                     "hash": vae_config["hash"]}})
    if rank == 0 and not (folder / "tokenizer.json").exists():
        with atomic(folder / "tokenizer.json") as path:
            tokenizer.save(str(path))
    torch.manual_seed(args.seed)
    model, step = TextToVideo(**options).to(device), 0
    model.objective = objective_of(vars(args))               # the average's copy has it too
    tokens_of = dict(zip(clips.keys, clips.lengths))
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer, plan = MuonAdamW(model, plain=("dit.head", "table", "dit.time")), RowPlan(clips, args.seed)
    if checkpoint:
        step, tensors, _ = load_step(checkpoint)
        model.load_state_dict(tensors["model"])
        ema.load_state_dict(tensors["ema"])
        restore_optimizer(optimizer, model, tensors["optimizer"])
    elif args.init:
        model.load_state_dict(init_weights(args.init, "denoiser", "ema", options))
        ema.load_state_dict(model.state_dict())
    vae, bank = vae.to(device), held_out_bank(held_out, args.seed)
    print_header(args, folder, model, clips, held_out, device)

    def batch(step):
        """This rank's rows of a step, and the number of clips in all of its rows."""
        rows = [plan.row(step * rows_a_step + i) for i in range(rows_a_step)]
        loaded = []
        for keys in rows[rank::world]:
            times = [draw_t(rng(args.seed, "time", step, key), args.times,
                            token_shift(args.shift, tokens_of[key], args.shift_tokens),
                            interval(model.objective)) for key in keys]
            loaded.append(load_row(clips, keys, args.seed, step, args.drop, times))
        return loaded, sum(len(keys) for keys in rows)

    log, stop, began = Log(folder, step), Stop(), time.time()
    bar = tqdm(total=args.steps, initial=step, desc="train_dit", unit="step", disable=rank > 0)
    for step, (loaded, n_clips) in prefetch(batch, step, args.steps):
        loss, done, is_last = torch.zeros((), device=device), step + 1, step + 1 == args.steps
        for _, row, x0, noise, t in loaded:
            moved = row.to(device), x0.to(device), noise.to(device), t.to(device)
            share = clip_losses(model, *moved, args.dtype).sum() / n_clips
            share.backward()
            loss += share.detach()
        lr = lr_at(step, args)
        norm = take_step(model, optimizer, lr)
        ema_update(ema, model, min(args.ema, (1 + done) / (10 + done)))
        is_evaluated = done % args.eval_every == 0 or is_last
        if done % args.log_every == 0 or is_evaluated:
            total, = sum_over_ranks(loss.item())
            check_finite(total, folder, step, [key for keys, *_ in loaded for key in keys])
            entry = dict(step=done, loss=total, grad_norm=norm.item(), lr=lr, clips=n_clips,
                         seconds=round(time.time() - began, 2))
            if rank == 0 and is_evaluated:
                entry["held_out"], entry["held_out_by_t"] = held_out_loss(ema, bank, device, args.dtype)
                sample_held_out(ema, vae, vae_config, held_out, held_out.keys[:6], args.seed,
                                folder / "samples" / f"step-{done:06d}.png", args.shift)
            log.write(**entry)
            bar.set_postfix_str(f"loss {total:.4f}")
        bar.update()
        if done % args.save_every == 0 or is_last or stop:
            save_step(folder, done, {"model": model.state_dict(), "ema": ema.state_dict(),
                                     "optimizer": optimizer_tensors(optimizer, model)}, {})
            if stop and not is_last:
                sys.exit(143)
    bar.close()
    if rank == 0:
        plot_losses(folder)
    barrier()


def print_header(args, folder, model, clips, held_out, device):
    n, tokens = sum(p.numel() for p in model.parameters()), sum(clips.lengths)
    kernels, why = backend(device)
    print(f"{folder}: {n / 1e6:.2f}M parameters ({sum(p.numel() for p in model.dit.parameters()) / 1e6:.2f}"
          f"M denoiser); {len(clips.keys)} clips of {tokens / len(clips.keys):.0f} tokens to learn from, "
          f"{len(held_out.keys)} held out; {args.batch_tokens // args.row_tokens} rows of "
          f"{args.row_tokens} tokens a step; {device}, {kernels} kernels ({why})", file=sys.stderr)


def load_denoiser(name, device="cpu", weights="ema"):
    """(model in eval mode, tokenizer, config) of a run's newest checkpoint."""
    folder = run_dir(name)
    config = read_config(folder, "denoiser")
    step = last_step(folder)
    if step is None:
        refuse(f"{folder} has no checkpoint yet: run its train_dit.py command again")
    model = TextToVideo(**config["model"])
    model.objective = objective_of(config["args"])
    model.load_state_dict(load_file(step / f"{weights}.safetensors"))
    return (model.to(device).eval().requires_grad_(False),
            load_tokenizer(folder / "tokenizer.json"), config)


def parse_options(argv=None):
    parser = option_parser(__doc__)
    parser.add_argument("name", help="data set: data/NAME, or a path with a slash")
    add = parser.add_argument_group("what to train").add_argument
    add("--run", help="runs/RUN, or a path with a slash (NAME)")
    add("--init", help="run whose weights and tokenizer to begin with (none)")
    add("--vae", help="the run whose latents to train on (NAME-vae)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="(%(default)s)")
    add = parser.add_argument_group("model (fixed at the first start, like all below but "
                                    "--steps)").add_argument
    add("--model", default="video-xs", choices=sorted(MODELS), help="size (%(default)s)")
    add("--vocab", type=number(int, 259), default=512,
        help="tokens of the captions' BPE, 259 or more (%(default)s)")
    add("--dtype", default="fp32", choices=["fp32", "bf16"], help="of matrix products (%(default)s)")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=number(int, 1), default=900, help="optimizer steps (%(default)s)")
    add("--row_tokens", type=number(int, 1), default=2048, help="tokens a packed row (%(default)s)")
    add("--batch_tokens", type=number(int, 1), default=2048,
        help="tokens a step over all ranks, a multiple of --row_tokens (%(default)s)")
    add("--lr", type=number(float, 0, 1), default=1e-2, help="highest learning rate (%(default)s)")
    add("--warmup", type=number(int, 0), default=50, help="steps of warm-up (%(default)s)")
    add("--ema", type=number(float, 0, 1), default=0.995,
        help="decay of the averaged weights, 0 to 1 (%(default)s)")
    add("--drop", type=number(float, 0, 1), default=0.1,
        help="share of captions dropped, 0 to 1 (%(default)s)")
    add("--objective", default="velocity", choices=["velocity", "noise", "score", "x", "ddpm"],
        help="what the model predicts; ddpm: DiT's noise and variance (%(default)s)")
    add("--path", default="linear", choices=["linear", "gvp", "vp"],
        help="from data to noise: straight, a quarter circle, DDPM's diffusion (%(default)s)")
    add("--weighting", default="none", choices=["none", "velocity", "likelihood", "min-snr"],
        help="of the squared error over times (%(default)s)")
    add("--times", default="logit-normal", choices=["logit-normal", "uniform"],
        help="law of the training times (%(default)s)")
    add("--shift", type=number(float, 0.01, 100), default=1.0,
        help="how far times are pushed towards noise, 0.01 to 100, 1: not (%(default)s)")
    add("--shift_tokens", type=number(int, 0), default=0,
        help="tokens at which the shift is --shift; it grows with their root, 0: not (%(default)s)")
    add("--seed", type=number(int, 0), default=0, help="of every draw (%(default)s)")
    add("--log_every", type=number(int, 1), default=20, help="steps a row of the log (%(default)s)")
    add("--eval_every", type=number(int, 1), default=300,
        help="steps between held-out figures and samples (%(default)s)")
    add("--save_every", type=number(int, 1), default=200,
        help="steps between checkpoints (%(default)s)")
    args = parser.parse_args(argv)
    if args.batch_tokens % args.row_tokens:
        refuse(f"--batch_tokens {args.batch_tokens}: must be a multiple of --row_tokens "
               f"{args.row_tokens}")
    if args.objective == "ddpm":         # its loss is there; a head of 2 C outputs is not yet
        refuse("--objective ddpm: no model learns a variance yet; take --objective noise --path vp")
    if args.objective == "velocity" and args.weighting in ("velocity", "likelihood"):
        refuse(f"--weighting {args.weighting} is for --objective noise, score and x: leave it out")
    return args


def main(argv=None):
    args = parse_options(argv)
    folder = run_dir(args.run or Path(args.name).name)
    train(args, folder)
    print(f"{folder}: trained; look at {folder / 'samples'} and {folder / 'loss.png'}", file=sys.stderr)


if __name__ == "__main__":
    main()
