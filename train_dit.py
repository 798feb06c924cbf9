"""Stage 4: latents + captions -> a denoiser on packed space-time patches.

In:   data/NAME/ with latents (train_vae.py --encode) and captions (the metadata's, caption.py's).
Out:  runs/NAME/  config.json (its "data": sizes, lengths, rates and words of the training clips,
                  see data_summary), tokenizer.json (byte-level BPE of the captions), log.jsonl,
                  samples/ (videos' frames at each evaluation), loss.png (from the first one on),
                  step-000100/ (model, ema, optimizer: safetensors; state.json),
                  held_out.txt (keys of its held-out clips, the same when others are added),
                  best.safetensors (ema at the lowest held-out loss: what is sampled)

The idea: flow matching. A clip's latent x_0 is mixed with noise, x_t = (1 - t) x_0 + t noise, and a
transformer learns the velocity noise - x_0 from x_t, t and the caption. Clips keep their own
length, size and shape: their patches lie end to end in one packed row of --row_tokens tokens,
attention stays within each clip (cu_seqlens), and no clip is padded; only the end of a row is. With
--given, a share of the clips gets conditioning frames: clean tokens (t = 0) of their own time that
join the clip's attention and bear no loss. One model then continues, connects and loops videos.
The models gpt-* (VideoGPT's prior) predict the codes of a VQ or FSQ autoencoder, one by one.

    python train_dit.py demo                     # three minutes on two cores
    python train_dit.py demo --run quick --steps 10 --eval_every 10      # a look, under a minute
    python train_dit.py compare demo quick       # both logs in one picture, and a table
    python train_dit.py mine --model video-b --estimate --price_per_hour 2        # before a run
    torchrun --nproc_per_node 8 -- train_dit.py mine --model video-b --row_tokens 16384

Models (--model; --init takes a run or published weights, whose sizes `dit`, `sit`, `uvit`, `wan`
and `gpt` take over):
    video-xxs, -xs, -xs-2, -s, -b   ours, in Wan's shape: rotary (t, y, x), QK RMSNorm; captions
    dit-s-2 .. dit-xl-8             DiT: labels; noise and learned variance on DDPM's path
    sit-s-2 .. sit-xl-8             SiT: DiT's network, velocity
    uvit-s-2-cifar10 .. uvit-h-4-imagenet512, uvit-s-2-coco     U-ViT: labels, or CLIP's tokens
    gpt-xs, gpt-ucf, gpt-ucf-class  VideoGPT's prior on codes; clips of one shape (--shape)
    wan-1.3b, wan-14b, wan-i2v-14b, wan-ti2v-5b                 Wan 2.1, 2.2: UMT5 (--text_encoder)

Axes: B clips, T' H' W' the latent grid, C channels, N tokens of a row, L text tokens, D width,
A heads, E head dim, P patch volume. Time runs from t = 0, clean, to t = 1, noise.
Papers: Peebles & Xie 2022 (DiT, 2212.09748); Lipman et al. 2022 (flow matching, 2210.02747);
Ma et al. 2024 (SiT, 2401.08740); Dehghani et al. 2023 (packing, 2307.06304); Wan 2025 (2503.20314);
Yan et al. 2021 (VideoGPT, 2104.10157).
"""
import prepare_data  # noqa: F401  first of all: Ctrl-C, and what is not installed, in a line
import argparse
import copy
import functools
import json
import math
import os
import random
import re
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from caption import (EOS, TextEmbeddings, TextTower, encode_captions, open_text_encoder,
                     open_tokenizer, read_as_config, read_published, train_tokenizer)
from kernels import backend
from kernels.adaln import gate_residual_ln_modulate, ln_modulate
from kernels.attention import attention
from kernels.linear import Linear
from kernels.optim import MuonAdamW
from kernels.patchify import patchify, unpatchify
from kernels.rope import qk_norm_rope
from prepare_data import (atomic, contact_sheet, dataset_dir, dataset_name, number, one_line,
                          open_dataset, refuse, rng, run_dir, script, sweep)
from train_vae import (Namespace, barrier, bench, checked, chosen, claim,
                       decode_long, ema_update, epoch_order, fit, gaussians, innermost,
                       is_finished, is_run, last_checkpoint, latents_path, load_autoencoder,
                       load_step, lr_at, lying_in, model_path, normaliser, moved, one_run,
                       optimizer_tensors, option_parser, peak_mib, plain, read_class, read_config,
                       read_header, read_log, read_tensors, refuse_nan, restore_optimizer,
                       save_file, say_once, setup, sheet_frames, split_rows, start_run,
                       sum_over_ranks, take_step, tensor_sum, to_frames, training_options)


# -- the objective ---------------------------------------------------------------------------------


# Times and the coefficients at them broadcast against x: [B, 1, 1, 1, 1] for latents, [N, 1] for
# packed tokens. Errors keep x's shape: the caller takes each clip's mean.
class Objective(NamedTuple):
    """What the network predicts, on which path, and how the error is weighted."""
    prediction: str = "velocity"    # velocity | noise | score | x | ddpm
    path: str = "linear"            # linear | gvp | vp, or in 1000 steps: ddpm (DiT's) | sd
    weighting: str = "none"         # none | velocity | likelihood | min-snr
    shift_tokens: int = 0           # see token_shift


def objective_of(args):
    """The Objective of a run's options; defaults for runs older than an option."""
    options = {**args, "prediction": args.get("objective")}
    return Objective(**{k: options[k] for k in Objective._fields if options.get(k) is not None})


STEPPED = {"ddpm": "linear", "sd": "scaled_linear"}     # the betas of DiT, and of U-ViT's latents


def interpolant(path, t):
    """(alpha, sigma, d alpha / dt, d sigma / dt) of a path: linear, GVP (a quarter circle), VP
    (DDPM with rate 0.1 + 19.9 t), as in SiT; of a path in 1000 steps without derivatives."""
    if path in STEPPED:
        c = ddpm_at(ddpm_tables(STEPPED[path]), (1000 * t).round().long() - int(path == "sd"))
        return c["alpha"], c["sigma"], None, None
    if path == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path == "gvp":
        alpha, sigma = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
        return alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha
    log_alpha, slope = -t * (0.05 + 19.9 / 4 * t), -(0.05 + 19.9 / 2 * t)
    alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
    return alpha, sigma, slope * alpha, -slope * alpha.square() / sigma


def interval(objective, is_sampling=False):
    """(first, last) time between which no formula divides by zero (SiT's limits; predicting x
    divides by sigma too)."""
    if objective.path == "vp":
        return (1e-3 if is_sampling else 1e-5), 1.0
    ends = {"noise": (1e-3, 1 - 1e-3), "score": (1e-3, 1 - 1e-3), "x": (1e-3, 1.0)}
    return ends.get(objective.prediction, (0.0, 1.0))


def shifted(t, shift):
    """Timestep shift s towards noise: t' = s t / (1 + (s - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def token_shift(shift, n, base):
    """The shift of a clip of n tokens: shift sqrt(n / base), since at the same t more of a larger
    clip can still be seen through the noise (Esser et al. 2024, 2403.03206). base 0: constant."""
    return shift * (n / base) ** 0.5 if base else shift


def draw_t(random, law="logit-normal", shift=1.0, span=(0.0, 1.0), mean=0.0, std=1.0):
    """A training time: drawn by `law`, shifted, and scaled to `span`. random: a numpy Generator."""
    if law == "uniform":
        t = random.random()
    else:
        t = 1 / (1 + math.exp(-(mean + std * random.standard_normal())))
    return span[0] + (span[1] - span[0]) * shifted(t, shift)


def network_time(objective, t):
    """The network's timestep; of paths in steps n / 1000, n from 0 (DiT) or from 1 (U-ViT)."""
    if objective.path not in STEPPED:
        return t
    return ((1000 * t).floor().clamp(max=999) + int(objective.path == "sd")) / 1000


def interpolate(objective, x0, noise, t):
    """x_t on the path from data (t = 0) to noise (t = 1)."""
    alpha, sigma, _, _ = interpolant(objective.path, t)
    return alpha * x0 + sigma * noise


def target(objective, x0, noise, t):
    """The regression target: velocity dx_t / dt, noise, x_0, or sigma times the score."""
    if objective.prediction == "velocity":
        _, _, d_alpha, d_sigma = interpolant(objective.path, t)
        return d_alpha * x0 + d_sigma * noise
    return {"noise": noise, "x": x0, "score": -noise}[objective.prediction]


def weight(objective, t, gamma=5.0):
    """The weight of the squared error: a function of the error of x_0, which is `ratio` times the
    output's. velocity and likelihood: SiT's; min-snr: Hang et al. 2023, 2303.09556."""
    alpha, sigma, d_alpha, d_sigma = interpolant(objective.path, t)
    det = alpha * d_sigma - d_alpha * sigma
    of_x0 = {"velocity": (det / sigma).square(), "likelihood": det * alpha / sigma ** 3,
             "min-snr": (alpha / sigma).square().clamp(max=gamma)}[objective.weighting]
    ratio = {"x": 1.0, "velocity": sigma / det}.get(objective.prediction, sigma / alpha)
    return of_x0 * ratio ** 2


def squared_error(objective, output, x0, noise, t):
    """The weighted squared error, elementwise. DDPM's learned variance adds `ddpm_bits`."""
    if objective.prediction == "ddpm":
        c = ddpm_at(ddpm_tables(), (1000 * t).round().long())
        eps, v = output.chunk(2, -1)                         # a token's channels: eps, then v
        bits = ddpm_bits(eps.detach(), v, x0, c["alpha"] * x0 + c["sigma"] * noise, c)
        return (eps - noise).square() + bits
    if objective.prediction == "score":
        output = interpolant(objective.path, t)[1] * output
    error = (output - target(objective, x0, noise, t)).square()
    return error if objective.weighting == "none" else weight(objective, t) * error


def to_velocity_x0_noise(objective, output, x, t):
    """(velocity, x_0, noise) of an output at x_t = x. On a path in steps velocity is None, and t
    may be a pair (alpha, sigma)."""
    alpha, sigma, d_alpha, d_sigma = interpolant(objective.path, t) if torch.is_tensor(t) else (
        *t, None, None)
    if objective.path in STEPPED:
        noise = output[..., :x.shape[-1]]                    # DiT's variance follows
        return None, (x - sigma * noise) / alpha, noise
    if objective.prediction == "velocity":
        det = alpha * d_sigma - d_alpha * sigma              # not 0 at either end of linear and GVP
        return output, (d_sigma * x - sigma * output) / det, (alpha * output - d_alpha * x) / det
    if objective.prediction == "x":
        x0, noise = output, (x - alpha * output) / sigma
    else:
        noise = output if objective.prediction == "noise" else -sigma * output
        x0 = (x - sigma * noise) / alpha
    return d_alpha * x0 + d_sigma * noise, x0, noise


# The samplers that training uses too: generators that yield x after each step, from noise to data.
# sample.py has the others.
RUNGE_KUTTA = {         # weights of the slopes so far at each further stage, then of all slopes
    "euler": ((), (1.0,)), "heun": (((1.0,),), (0.5, 0.5)), "midpoint": (((0.5,),), (0.0, 1.0)),
    "rk4": (((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8))}


def runge_kutta(velocity, x, times, method="euler"):
    """Follows dx/dt = velocity(x, t) along `times`, from the first to the last."""
    stages, last = RUNGE_KUTTA[method]
    for now, after in zip(times, times[1:]):
        step, slopes = after - now, [velocity(x, now)]
        for row in stages:
            ahead = sum(weight * slope for weight, slope in zip(row, slopes))
            slopes.append(velocity(x + step * ahead, now + sum(row) * step))
        x = x + step * sum(weight * slope for weight, slope in zip(last, slopes))
        yield x


def ddim(predict, x, alpha, sigma, eta=0.0, draw=None, ahead=None):
    """DDIM (Song et al. 2021, 2010.02502): predict(x, i) -> (x_0, noise, …) at point i, where x is
    alpha x_0 + sigma noise (float64 [n + 1] each); both are mixed again for the next point, with a
    share `eta` of fresh noise draw(i). ahead: (alpha, sigma) [n] to mix them for instead."""
    ahead = ahead or (alpha[1:], sigma[1:])
    for i in range(len(alpha) - 1):
        (x0, noise, *_), (a, s) = predict(x, i), (part[i] for part in ahead)
        fresh = eta * s / sigma[i] * (1 - (alpha[i] / a).square()).sqrt()
        remaining = (s.square() - fresh.square()).sqrt()
        x = a.to(x) * x0 + remaining.to(x) * noise
        x = x + fresh.to(x) * draw(i) if eta else x
        yield x


def flow_grid(n, shift=1.0, first=1.0, last=0.0):
    """float64 [n + 1] times of the linear path: n evenly spaced from `first` to before `last`,
    shifted, then 0. shift: a float, or [N, 1] for [n + 1, N, 1] times."""
    times = torch.from_numpy(np.linspace(first, last, n + 1)[:-1])
    if torch.is_tensor(shift):
        times = times.view(-1, 1, 1).to(shift.device)
    times = shifted(times, shift)
    return torch.cat([times, torch.zeros_like(times[:1])])


# -- the transformer -------------------------------------------------------------------------------

MODELS = {      # ours; published sizes are added below
    "video-xs": dict(dim=128, depth=6, heads=4, patch=(1, 1, 1), rope_base=100.0,
                     text=(128, 2, 4)),          # the text tower's width, layers and heads
    "video-xs-2": dict(dim=256, depth=6, heads=4, patch=(1, 2, 2), rope_base=100.0,
                       positions="both", text=(128, 2, 4)),  # wide tokens: real footage on a CPU
    "video-xxs": dict(dim=128, depth=4, heads=4, patch=(1, 1, 1), rope_base=100.0,
                      text=(96, 2, 4)),          # tests/demo
    "video-s": dict(dim=384, depth=12, heads=6, patch=(1, 2, 2), rope_base=1000.0,
                    text=(256, 4, 4)),
    "video-b": dict(dim=768, depth=12, heads=12, patch=(1, 2, 2), rope_base=1000.0,
                    text=(512, 6, 8)),
}


def sinusoid(t, width=256):
    """[R] times to [R, width]: cosines, then sines, of t at width / 2 frequencies, in float64
    where the device has it (at t = 1000 float32 leaves four digits)."""
    wide = torch.float32 if t.device.type == "mps" else torch.float64
    exponent = torch.arange(width // 2, dtype=wide, device=t.device) / (width // 2)
    angles = t.to(wide)[:, None] * 10000.0 ** -exponent
    return torch.cat([angles.cos(), angles.sin()], -1).float()


def rope_frequencies(head_dim, base):
    """(freqs [E/2], axes [E/2]) of a head's channel pairs, divided over t, y and x as in Wan; on an
    axis of width a, pair i has frequency base^(-2 i / a)."""
    side = 2 * (head_dim // 6)
    widths = (head_dim - 2 * side, side, side)
    freqs = [base ** (-2 * i / width) for width in widths for i in range(width // 2)]
    axes = [axis for axis, width in enumerate(widths) for _ in range(width // 2)]
    return torch.tensor(freqs, dtype=torch.float32), torch.tensor(axes, dtype=torch.int32)


@functools.lru_cache(maxsize=256)
def sincos(grid, width, device):
    """[T' H' W', width] sin-cos positions: half of the channels for the column, half for the row,
    sines first (DiT's); clips of several latent frames add the frame's (Latte's)."""
    def wave(positions, n):
        angles = np.outer(positions, 10000.0 ** (-np.arange(n // 2) / (n / 2)))
        return np.concatenate([np.sin(angles), np.cos(angles)], 1)
    T, H, W = grid
    t, y, x = (axis.ravel() for axis in np.meshgrid(*map(np.arange, grid), indexing="ij"))
    table = np.concatenate([wave(x, width // 2), wave(y, width // 2)], 1)
    table = table + wave(t, width) if T > 1 else table
    return torch.from_numpy(table).to(device, torch.float32)


class SelfAttention(nn.Module):
    def __init__(self, dim, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = Linear(dim, 3 * dim), Linear(dim, dim)
        ones = lambda: nn.Parameter(torch.ones(dim)) if qk_norm else None
        self.q_norm, self.k_norm = ones(), ones()

    def forward(self, h, row):
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(1)           # [N, A, E]
        if row.freqs is not None:
            q, k = qk_norm_rope(q, k, row.coords, row.freqs, row.axes,
                                self.q_norm.to(h.dtype), self.k_norm.to(h.dtype))
        x = attention(q, k, v, row.cu_seqlens, row.cu_seqlens)                       # [N, A, E]
        return self.out(x.flatten(1))                                                # [N, D]


class RMSNorm(nn.RMSNorm):
    """Computed in float32 whatever comes in."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


def cached(row, key, make):
    """make(), computed once where the row has a `cache` (sampling uses it in every step)."""
    if row.cache is None:
        return make()
    if key not in row.cache:
        row.cache[key] = make()
    return row.cache[key]


class CrossAttention(nn.Module):
    """Cross-attention from a clip's tokens to its text; with `image`, a second softmax over its
    image tokens, whose output is added (Wan's I2V)."""

    def __init__(self, dim, heads, image):
        super().__init__()
        self.heads = heads
        self.q, self.out = Linear(dim, dim), Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.q_norm, self.k_norm = RMSNorm(dim, 1e-6), RMSNorm(dim, 1e-6)
        self.kv_image = nn.Linear(dim, 2 * dim) if image else None
        self.k_norm_image = RMSNorm(dim, 1e-6) if image else None

    def read(self, q, kv, norm, context, row, cu_context, counts=None):
        """counts [L]: how often each row of the context occurs (see `count_texts`)."""
        def make():
            k, v = kv(context).chunk(2, -1)                                          # [L, D]
            k, v = (x.unflatten(-1, (self.heads, -1)) for x in (norm(k), v))
            return (k, v) if counts is None else count_keys(k, v, counts)
        (k, v), E = cached(row, kv, make), q.shape[2]
        q = q if counts is None else F.pad(F.pad(q, (0, 2), value=1.0), (0, 6))
        x = attention(q, k, v, row.cu_seqlens, cu_context, E ** -0.5)[..., :E]       # [N, A, E]
        return x.flatten(1)                                                          # [N, D]

    def forward(self, h, text, image, row):
        q = self.q_norm(self.q(h)).unflatten(-1, (self.heads, -1))                   # [N, A, E]
        o = self.read(q, self.kv, self.k_norm, text, row, row.cu_text, row.counts)
        if image is not None:
            o = o + self.read(q, self.kv_image, self.k_norm_image, image, row, row.cu_image)
        return self.out(o)


class Block(nn.Module):
    """A transformer block with adaLN-Zero: self-attention and MLP, each with the shift, scale and
    gate of the token's row of the modulation table; between them cross-attention to text, if any.
    The modulation is projected by each block (DiT), or once, with an offset a block (Wan). Each
    residual is fused with the norm that follows it."""

    def __init__(self, dim, heads, ffn, own_table, qk_norm, text, image):
        super().__init__()
        if own_table:
            self.modulation = nn.Linear(dim, 6 * dim)
        else:
            self.table = nn.Parameter(torch.zeros(6, dim))
        self.attn = SelfAttention(dim, heads, qk_norm)
        self.cross = CrossAttention(dim, heads, image) if text else None
        if text:
            self.cross_weight = nn.Parameter(torch.ones(dim))
            self.cross_bias = nn.Parameter(torch.zeros(dim))
        self.up, self.down = Linear(dim, ffn), Linear(ffn, dim)

    def forward(self, x, h, modulation, next_norm, text, image, row):
        """x, h [N, D]: the residual stream and its modulated norm; modulation: shift, scale and
        gate of attention and of the MLP, [R, D] each; next_norm: shift and scale of the next
        block's first norm. Returns the next x and h."""
        _, _, gate1, shift2, scale2, gate2 = modulation
        y = self.attn(h, row)
        if self.cross is not None:
            norm = [x.float().expand_as(gate1) for x in (self.cross_bias, self.cross_weight - 1)]
            x, h = gate_residual_ln_modulate(x, y, gate1, *norm, row.table_index)
            y, gate1 = self.cross(h, text, image, row), torch.ones_like(gate1)
        x, h = gate_residual_ln_modulate(x, y, gate1, shift2, scale2, row.table_index)
        y = self.down(F.gelu(self.up(h), approximate="tanh"))                        # [N, D]
        return gate_residual_ln_modulate(x, y, gate2, *next_norm, row.table_index)


class DiT(nn.Module):
    """The denoiser of packed clips: predicts the objective's target from noisy patches, times, and
    text or a class. Its options make it DiT or SiT (own_table, positions "sincos", classes, no
    text), Wan (positions "index", text, image_dim) or ours (positions "seconds"; "both" adds
    sin-cos ones, which trains faster). recompute: checkpoint every n-th block, 0: none."""

    recompute = 0

    def __init__(self, channels, dim, depth, heads, patch, out_channels=None, ffn=None, text_dim=0,
                 image_dim=0, image_tokens=0, classes=0, own_table=False, positions="seconds",
                 rope_base=10000.0, grid=None, conditions=0, time_width=256):
        super().__init__()
        self.patch, self.positions, self.grid = tuple(patch), positions, grid
        self.channels, self.out_channels = channels, out_channels or channels
        self.embed = Linear(channels * math.prod(patch), dim)
        self.time = nn.Sequential(nn.Linear(time_width, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.classes = nn.Embedding(classes, dim) if classes else None     # the last one: no class
        self.about = nn.Linear(64 * conditions, dim) if conditions else None
        if own_table:
            self.head_modulation = nn.Linear(dim, 2 * dim)
        else:
            self.time_table = nn.Linear(dim, 6 * dim)
            self.head_table = nn.Parameter(torch.zeros(2, dim))
        self.own_table = own_table
        self.text = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU("tanh"),
                                  nn.Linear(dim, dim)) if text_dim else None
        self.image = nn.Sequential(nn.LayerNorm(image_dim), nn.Linear(image_dim, image_dim),
                                   nn.GELU(), nn.Linear(image_dim, dim),
                                   nn.LayerNorm(dim)) if image_dim else None
        self.image_place = nn.Parameter(torch.zeros(
            image_tokens, image_dim)) if image_tokens else None
        is_rotary = positions != "sincos"
        self.blocks = nn.ModuleList(Block(dim, heads, ffn or 4 * dim, own_table, is_rotary,
                                          text_dim, image_dim) for _ in range(depth))
        self.head = Linear(dim, self.out_channels * math.prod(patch))
        if is_rotary:
            freqs, axes = rope_frequencies(dim // heads, rope_base)
            self.register_buffer("freqs", freqs, persistent=False)
            self.register_buffer("axes", axes, persistent=False)
        elif grid:
            self.register_buffer("pos_embed", sincos((1, *grid), dim, "cpu").clone())
        self.initialise()

    def initialise(self):
        """All initial values.

        module                              | law            | std
        Linear                              | xavier uniform | (2 / (in + out))^0.5
        time.*, text.*, classes             | normal         | 0.02
        modulation, time_table, head, about,| zero           | 0
        cross.out                           |                |
        tables, biases                      | zero           | 0
        norms' weights                      | one            | 0
        """
        zeros = ("modulation", "time_table", "head", "about", "head_modulation")
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if name.split(".")[0] in ("time", "text"):
                    nn.init.normal_(module.weight, std=0.02)
                if name.split(".")[-1] in zeros or name.endswith("cross.out"):
                    nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def modulations(self, t, row):
        """adaLN modulation at times t [R]: ([(shift, scale, gate, shift, scale, gate) a block], the
        head's (shift, scale)), float32 [R, D] each."""
        wave = sinusoid(t, self.time[0].in_features).to(self.embed.weight.dtype)
        e = self.time(wave)                                                          # [R, D]
        if self.classes is not None:
            no_class = self.classes.num_embeddings - 1       # of cond_latents
            e = e + self.classes(F.pad(row.labels, (0, len(t) - len(row.labels)), value=no_class))
        if self.about is not None:
            rows = len(t) - len(row.conditions)              # of cond_latents
            e = e + self.about(F.pad(row.conditions, (0, 0, 0, rows)))
        if self.own_table:
            c = F.silu(e)
            blocks = [block.modulation(c).float().chunk(6, -1) for block in self.blocks]
            return blocks, self.head_modulation(c).float().chunk(2, -1)
        e0 = self.time_table(F.silu(e)).unflatten(-1, (6, -1))                       # [R, 6, D]
        blocks = [(block.table + e0).float().unbind(1) for block in self.blocks]
        return blocks, (self.head_table + e[:, None]).float().unbind(1)

    def add_positions(self, x, row):
        """Adds sin-cos positions to the embedded tokens x [N, D]."""
        def of(shape):
            grid = tuple(side // p for side, p in zip(shape[1:], self.patch))
            is_own = self.grid and grid == (1, *self.grid)
            return self.pos_embed if is_own else sincos(grid, x.shape[1], x.device)
        positions = torch.cat([of(shape) for shape in row.shapes])
        return x + F.pad(positions, (0, 0, 0, len(x) - len(positions))).to(x.dtype)

    def forward(self, x, t, row, text=None, image=None):
        """x [N, C*P] noisy tokens; t [R] the network's time of each table row; row: a PackedRow;
        text [L, text_dim] and image [I, image_dim]: embeddings, packed by row.cu_text and
        row.cu_image. Returns [N, C_out*P]."""
        if self.positions != "sincos":
            row.freqs, row.axes = self.freqs, self.axes
        with torch.autocast(x.device.type, enabled=False):   # in float32, as Wan's
            modulations, last = self.modulations(t, row)
        if self.text is not None:
            text = cached(row, self.text, functools.partial(self.text, text))          # [L, D]
        if self.image is not None:
            if self.image_place is not None:
                image = image + self.image_place.repeat(len(image) // len(self.image_place), 1)
            image = self.image(image)                                                # [I, D]
        x = self.embed(x)                                                            # [N, D]
        if self.positions in ("sincos", "both"):
            x = self.add_positions(x, row)
        h = ln_modulate(x, *modulations[0][:2], row.table_index)
        next_norms = [modulation[:2] for modulation in modulations[1:]] + [last]
        for i, (block, modulation, next_norm) in enumerate(
                zip(self.blocks, modulations, next_norms)):
            if self.recompute and i % self.recompute == 0 and torch.is_grad_enabled():
                block = functools.partial(checkpoint, block, use_reentrant=False)
            x, h = block(x, h, modulation, next_norm, text, image, row)
        return self.head(h)                                                          # [N, C_out*P]


# -- packed rows of space-time patches -------------------------------------------------------------


@dataclass
class PackedRow:
    """The layout of a packed row of N tokens; those from cu_seqlens[-1] on are padding."""
    shapes: list             # (C, T', H', W') of each clip, followed by those of its cond_latents
    coords: torch.Tensor     # float32 [N, 3]: t in seconds times TIME_UNIT, y and x in latent cells
    cu_seqlens: torch.Tensor   # int32 [B + 1]: clip b and its cond_latents: tokens [b] to [b + 1]
    table_index: torch.Tensor  # int32 [N]: each token's row of the modulation table: its clip's, or
    targets: torch.Tensor      # row B of conditioning tokens. int64 [n]: the tokens to denoise
    ids: torch.Tensor        # int64 [L]: the captions' tokens end to end
    cu_text: torch.Tensor    # int32 [B + 1]
    cu_image: torch.Tensor = None            # int32 [B + 1]: the image tokens that clips read
    text: torch.Tensor = None                # [L, width]: their embeddings by a frozen encoder
    image: torch.Tensor = None               # [I, width]: image tokens that clips read (Wan's I2V)
    labels: torch.Tensor = None              # int64 [R]: classes
    conditions: torch.Tensor = None          # float32 [R, 64 * conditions]
    cache: dict = None                       # of `cached`, for a row that is sampled
    counts: torch.Tensor = None              # float32 [L]: how often each row of `text` is there
    freqs: torch.Tensor = None               # the network's rotary frequencies and their axes
    axes: torch.Tensor = None

    def to(self, device):
        return PackedRow(**{
            key: moved(value, device) if isinstance(value, torch.Tensor) else value
            for key, value in vars(self).items()})

    def table_times(self, t):
        """[R]: the clips' times t [B] and, where there are cond_latents, a last row at t = 0."""
        return F.pad(t, (0, 1)) if len(self.shapes) > len(t) else t


TIME_UNIT = 3.0              # rotary units a second: about one a latent frame at 12 frames/s


@functools.lru_cache(maxsize=64)
def clip_coords(shape, fps, time_stride, patch, offset=0.0):
    """Positions of a clip's tokens, float32 [n, 3]: the time at the centre of a latent frame (which
    covers time_stride frames, the first one) and the patch's centre in latent cells. time_stride
    None: indices of patches (Wan's). offset: the first frame's time, in seconds (patches)."""
    _, T, H, W = shape
    if time_stride is None:
        grid = np.indices([side // p for side, p in zip((T, H, W), patch)], dtype=np.float32)
        grid[0] += offset
        return grid.reshape(3, -1).T
    latent = np.arange(T)
    centre = np.where(latent == 0, 0.5, (latent - 1) * time_stride + 1 + time_stride / 2)
    t = TIME_UNIT * centre / (fps or 1.0) + TIME_UNIT * offset
    pt, ph, pw = patch
    axes = [axis.reshape(-1, size).mean(1) for axis, size in
            ((t, pt), (np.arange(H) + 0.5, ph), (np.arange(W) + 0.5, pw))]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3).astype(np.float32)


def with_cond_latents(latents, cond_latents):
    """Each clip's latent followed by its cond_latents: the order in a packed row."""
    return [x for z, cond in zip(latents, cond_latents)
            for x in (z, *(latent for latent, _ in cond))]


def lay_out(shapes, rates, texts, time_stride, patch, n_tokens=None, kind="video",
            cond_latents=None, conditions=None):
    """The PackedRow of clips of `shapes` [(C, T', H', W')], at `rates` frames/s, under `texts`:
    lists of token ids, embeddings [L, width] or labels. n_tokens: the row's length with padding;
    cond_latents: each clip's [(latent, seconds from its first frame to theirs)]; conditions: each
    clip's values. ids are padded to a multiple of 64, since shapes that repeat are cheaper."""
    time_stride = None if kind == "wan" else time_stride
    B, parts = len(shapes), []                               # (clip, table row, shape, offset)
    for b, cond in enumerate(cond_latents or [[]] * B):
        parts += [(b, b, shapes[b], 0.0), *((b, B, latent.shape, at) for latent, at in cond)]
    coords = [clip_coords(shape, rates[b], time_stride, patch, at) for b, _, shape, at in parts]
    lengths = [len(c) for c in coords]
    left = (n_tokens or sum(lengths)) - sum(lengths)
    coords = np.concatenate(coords + [np.zeros((left, 3), np.float32)])
    clips, owners, every, _ = zip(*parts)
    table_index = np.repeat([*owners, B - 1], [*lengths, left])
    ids, more, lengths_of_texts = [], {}, [0] * len(texts)
    if conditions and conditions[0]:
        more["conditions"] = torch.stack([condition_code(values) for values in conditions])
    if isinstance(texts[0], int):
        more["labels"] = torch.tensor(texts)
    elif isinstance(texts[0], torch.Tensor):
        lengths_of_texts = [WAN_TEXT if kind == "wan" else len(text) for text in texts]
        more["text"] = fill_texts(texts)[0] if kind == "wan" else torch.cat(texts)
    else:
        ids = [i for text in texts for i in text]
        lengths_of_texts = [len(text) for text in texts]
    cumulate = lambda counts: torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32)
    return PackedRow(shapes=list(every), coords=torch.from_numpy(coords),
                     cu_seqlens=cumulate(np.bincount(clips, lengths)),
                     table_index=torch.from_numpy(table_index.astype(np.int32)),
                     targets=torch.from_numpy(np.flatnonzero(table_index[:sum(lengths)] < B)),
                     ids=torch.tensor(ids + [0] * (-len(ids) % 64), dtype=torch.int64),
                     cu_text=cumulate(lengths_of_texts), **more)


def plan_epoch(keys, lengths, row_tokens, seed, epoch, block=4096):
    """Packs an epoch's clips into rows, lists of indices into `keys`: `epoch_order` in blocks, each
    by first-fit decreasing. Free capacity is filled with clips of the epoch, which then occur
    twice."""
    order = epoch_order(range(len(keys)), lambda i: keys[i], seed, epoch)
    planned, sizes = [], np.array([lengths[i] for i in order])
    least = np.minimum.reduceat(sizes, range(0, len(sizes), 256)) if len(sizes) else sizes

    def next_fit(at, left):
        """The first position of the order from `at` on whose clip has at most `left` tokens."""
        within = sizes[at:(at // 256 + 1) * 256] <= left
        if within.any():
            return at + int(within.argmax())
        beyond = least[at // 256 + 1:] <= left
        if not beyond.any():
            return len(sizes)
        at = (at // 256 + 1 + int(beyond.argmax())) * 256
        return at + int((sizes[at:at + 256] <= left).argmax())

    for start in range(0, len(order), block):
        rows, capacity = [], np.zeros(block, int)
        for i in sorted(order[start:start + block], key=lambda i: -lengths[i]):
            fits = capacity[:len(rows)] >= lengths[i]
            j = int(fits.argmax()) if fits.any() else len(rows)
            if j == len(rows):
                rows.append([])
                capacity[j] = row_tokens
            rows[j].append(i)
            capacity[j] -= lengths[i]
        for row, left in zip(rows, capacity.tolist()):
            at = next_fit(0, left)
            while at < len(order):
                if order[at] not in row:
                    row.append(order[at])
                    left -= lengths[order[at]]
                at = next_fit(at + 1, left)
        mixed = rng(seed, "rows", epoch, start).permutation(len(rows))
        planned += [rows[j] for j in mixed]
    return planned


class Clips:
    """A data set's latents by one autoencoder, with captions as token ids; or its codes by one with
    a codebook, all cropped to one shape (T', H', W'), by default the most frequent."""

    def __init__(self, folder, rows, config, patch, row_tokens, cond_share=0.0, shape=None):
        self.cond_share = cond_share                 # the share of clips with conditioning frames
        self.row_tokens, self.patch = row_tokens, patch
        self.files, self.shape, self.info, self.sums, narrow = {}, {}, {}, {}, []
        self.rows = {row["key"]: row for row in rows}
        for shard in sorted({row["shard"] for row in rows}):
            path = latents_path(folder, shard, config["hash"])
            if not path.exists():
                vae = f" --vae {config['name']}" if "name" in config else ""
                refuse(f"{path} is missing: run `python train_vae.py "
                       f"{dataset_name(Path(folder))} --encode{vae}`")
            header = read_header(path)
            if cond_share and "alone" not in header:
                refuse(f"{path} has no conditioning frames: run `python train_vae.py "
                       f"{Path(folder).name} --encode` again")
            self.time_stride, self.is_codes = header["time_stride"], "codes" in header
            self.stride = header["stride"]
            file = safe_open(path, "pt")
            for key, info in (header["clips"] | (header["alone"] if cond_share else {})).items():
                if info["clip"] not in self.rows:
                    continue
                *moments, T, H, W = file.get_slice(key).get_shape()
                C = moments[0] // 2 if moments else 1        # a code has no channels
                crop = [side // p * p for side, p in zip((T, H, W), patch)]
                if not all(crop):
                    narrow.append(info["clip"])
                    continue
                self.files[key], self.info[key] = file, info
                if key in header.get("sums", ()):            # compared when it is first read
                    self.sums[key] = header["sums"][key], path
                self.shape[key] = (C, *crop)
                self.info[f"{key}:first"] = {**info, "frames": 1, "fps": None}
                self.shape[f"{key}:first"] = (C, 1, *crop[1:])
        if narrow and not int(os.environ.get("RANK", 0)):
            print(f"{len(set(narrow))} clips are left out, smaller than a patch of "
                  f"{'x'.join(map(str, patch))} latents, such as {min(narrow)}", file=sys.stderr)
        if not self.files:
            refuse(f"{folder}: no clip is as large as a patch of {'x'.join(map(str, patch))} "
                   "latents")
        for key in random.sample(sorted(self.sums), min(64, len(self.sums))):    # before work
            self.read(key)
        self.keys = sorted(key for key in self.files if ":" not in key)
        if self.is_codes:
            crop_codes(self, shape)
        else:
            self.mean, self.std = normaliser(config)
        count = lambda T, H, W: T * H * W // math.prod(patch)
        shapes = [self.shape[key][1:] for key in self.keys]
        self.lengths = [count(*shape) for shape in shapes]
        more = 2 if cond_share else 0                             # frames; halves take no more
        longest = max(count(T + more * (T > 1), H, W) for T, H, W in shapes)
        if longest > row_tokens:
            cells = row_tokens * math.prod(patch) - more * max(H * W for _, H, W in shapes)
            refuse(f"a clip takes {longest} tokens, more than --row_tokens {row_tokens}: raise it, "
                   f"or encode again with --max_cells {cells}")

    def read_as(self, kind, tokenizer=None, embeddings=None, labels=None, conditions=()):
        """Sets the conditioning: caption ids, embeddings or a class; and which of CONDITIONS."""
        self.kind, self.tokenizer, self.embeddings = kind, tokenizer, embeddings
        self.conditions, self.has_text = conditions, bool(tokenizer) or embeddings is not None
        self.labels = labels and {label: i for i, label in enumerate(labels)}

    def read(self, key):
        tensor = self.files[key].get_tensor(key)
        if total := self.sums.get(key):
            checked(tensor, *total, key)
            self.sums[key] = None
        return tensor

    def latent(self, name, seed, step):
        """A normalised draw from the autoencoder's posterior: float32 [C, T', H', W']. KEY:first
        is KEY's first frame as a still."""
        key, (_, T, H, W) = name.removesuffix(":first"), self.shape[name]
        tensor = self.read(key)
        if self.is_codes:                                    # int64 [T', H', W'], about the centre
            top, left = (tensor.shape[1] - H) // 2, (tensor.shape[2] - W) // 2
            return tensor[:T, top:top + H, left:left + W].long()
        mean, logvar = tensor[:, :T, :H, :W].float().chunk(2)
        noise = gaussians("posterior", seed, step, [name], [mean.shape])[0]
        return (mean + (0.5 * logvar).exp() * noise - self.mean) / self.std

    def draw_conditioning(self, key, seed, epoch, share, stills=0.0):
        """[name to denoise for KEY, names of its conditioning frames ...]. With probability
        `stills` the first frame as a still; else with probability `share` the clip under its first
        frame, its last, both, or one of its halves (or of its last two short parts) under the
        other. Drawn by epoch, since the epoch's plan depends on the lengths."""
        random = rng(seed, "given", epoch, key)
        if stills and rng(seed, "still", epoch, key).random() < stills:
            return [f"{key}:first"]
        if self.shape[key][1] < 2 or random.random() >= share:
            return [key]
        first, last, *halves = (f"{key}:{name}" for name in ("first", "last", *"abcd"))
        choices = [[key, first], [key, last], [key, first, last]]
        for a, b in (halves[:2], halves[2:]):
            choices += [[b, a], [a, b]] if a in self.files else []
        return choices[int(random.integers(len(choices)))]

    def count_tokens(self, names):
        """Tokens of all that `draw_conditioning` named."""
        _, _, H, W = self.shape[names[0]]
        return sum(self.shape[name][1] for name in names) * H * W // math.prod(self.patch)

    def cond_latents(self, target, names, seed, step):
        """The target's cond_latents for `lay_out`: [(latent, its offset in seconds)] of `names`."""
        here = self.info[target]
        return [(self.latent(name, seed, step), (self.info[name]["first_frame"]
                 - here["first_frame"]) / (here["fps"] or 1.0)) for name in names]

    def text(self, key, seed, step, drop):
        """Token ids of one of the clip's captions, drawn by weight, dropped with probability
        `drop`; or its embeddings [L, width], or the index of its class."""
        row = self.rows[self.info[key]["clip"]]
        captions = row["captions"] if self.has_text else []
        random = rng(seed, "caption", step, key)
        is_dropped = random.random() < drop
        if self.labels is not None:
            return self.labels.get(None if is_dropped else row["label"], len(self.labels))
        if is_dropped or not captions:
            return [EOS] if self.embeddings is None else self.embeddings[""]
        weights = np.array([c["weight"] for c in captions], dtype=np.float64)
        picked = captions[0 if len(captions) < 2 else int(
            random.choice(len(captions), p=weights / weights.sum()))]["text"]
        return encode_text(self.tokenizer, picked) if self.tokenizer else self.embeddings[picked]

    def condition_values(self, key, seed, step, drop):
        """The clip's values of the run's conditions, all None with probability `drop`."""
        if not self.conditions or rng(seed, "conditions", step, key).random() < drop:
            return [None] * len(self.conditions)
        info = self.info[key]
        _, _, height, width = info["crop"]
        clip = {**self.rows[info["clip"]]["scores"], **info, "height": height, "width": width}
        return [CONDITIONS[name](clip) for name in self.conditions]


def words_of(text):
    """The lower-case words of a caption or prompt; of Chinese and Japanese each character."""
    single = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    return re.findall(f"[{single}]|[^\\W{single}]+", text.lower())


def data_summary(clips):
    """config["data"] of a run: what it trains on. size [h, w] in px, frames and fps (None: a still)
    are the most frequent together; sizes [[h, w, clips]]: the 50 most frequent; ranges: [min, max],
    side_range of both sides in px, grid_range of latents [T', H', W']; text: whether there are
    captions; words: their 20,000 most frequent."""
    shapes = [clips.shape[key][1:] for key in clips.keys]
    sizes = [tuple(side * clips.stride for side in shape[1:]) for shape in shapes]
    infos = [clips.info[key] for key in clips.keys]
    frames, rates = ([info[name] for info in infos] for name in ("frames", "fps"))
    spread = lambda values: [min(values), max(values)] if values else None
    (size, n, fps), _ = Counter(zip(sizes, frames, rates)).most_common(1)[0]
    texts = [caption["text"] for row in clips.rows.values() if clips.has_text
             for caption in row["captions"]]
    words = Counter(word for text in texts for word in words_of(text))
    return {
        "size": list(size), "frames": n, "fps": fps,
        "sizes": [[*size, count] for size, count in Counter(sizes).most_common(50)],
        "frames_range": spread(frames), "fps_range": spread([rate for rate in rates if rate]),
        "side_range": spread([side for size in sizes for side in size]),
        "grid_range": [[pick(axis) for axis in zip(*shapes)] for pick in (min, max)],
        "text": any(texts),
        "words": sorted(word for word, _ in words.most_common(20_000))}


def say(line):
    """Prints a line to stderr, on rank 0 alone."""
    if not int(os.environ.get("RANK", 0)):
        print(line, file=sys.stderr)


def advise(args, clips, plan, begun):
    """Says what a data set has too little of for this command. begun: config.json of a run that is
    resumed."""
    n_rows, n_clips = len(plan.epoch(0)), len(clips.keys)
    if clips.has_text and not any(row["captions"] for row in clips.rows.values()):
        say(f"{args.name}: no clip has a caption: the model trains without text, and prompts will "
            "do nothing")
    elif clips.has_text and begun and not begun.get("data", {"text": True})["text"]:
        say(f"{args.name}: clips have captions now, which this run started without: another --run "
            "trains on them")
    if n_clips < 4 * n_rows:
        wanted = -(-4 * max(clips.lengths) // 256) * 256
        say(f"{args.name}: a row of {args.row_tokens} tokens holds {n_clips / n_rows:.1f} clips on "
            f"average: for four take --row_tokens {wanted} --batch_tokens "
            f"{-(-args.batch_tokens // wanted) * wanted}, or shorter or smaller clips")
    if n_rows < 10:
        times = args.steps * args.batch_tokens / args.row_tokens / n_rows
        say(f"{args.name}: all {n_clips} clips fill {n_rows} rows, and {args.steps} steps show "
            f"each {times:.3g} times: watch the held-out loss; more clips or fewer --steps keep "
            "the model from memorising them")


def encode_text(tokenizer, text, most=256):
    """Token ids of a prompt, at most `most`, closed by EOS."""
    return tokenizer.encode(text).ids[:most - 1] + [EOS]


class RowPlan:
    """The clips of training row s, for any s: epoch after epoch of `plan_epoch`."""

    def __init__(self, clips, seed, cond_share=0.0, stills=0.0):
        self.clips, self.seed, self.shares = clips, seed, (cond_share, stills)
        self.first = [0]                                     # row number at which each epoch begins
        self.lock = threading.Lock()                         # the loader's threads share the plan

    def draw(self, key, epoch):
        return self.clips.draw_conditioning(key, self.seed, epoch, *self.shares) if any(
            self.shares) else [key]

    @functools.lru_cache(maxsize=2)
    def epoch(self, n):
        clips, lengths = self.clips, self.clips.lengths
        if any(self.shares):
            lengths = [clips.count_tokens(self.draw(key, n)) for key in clips.keys]
        return plan_epoch(clips.keys, lengths, clips.row_tokens, self.seed, n)

    def row(self, s):
        """(the keys of the clips in row s, what `draw_conditioning` draws for each)."""
        with self.lock:
            while self.first[-1] <= s:
                self.first.append(self.first[-1] + len(self.epoch(len(self.first) - 1)))
            n = int(np.searchsorted(self.first, s, side="right")) - 1
            keys = [self.clips.keys[i] for i in self.epoch(n)[s - self.first[n]]]
        return keys, [self.draw(key, n) for key in keys]


def load_row(clips, keys, seed, step, drop, times, drawn=None):
    """A training row, with draws keyed by (seed, step, key): (keys, PackedRow, x0 tokens, noise
    tokens, t [B]), or (keys, PackedRow, codes [B, T', H', W']). times: one a clip; drawn: what
    `draw_conditioning` draws for each (by default the clips alone)."""
    drawn = drawn or [[key] for key in keys]
    targets = [target for target, *_ in drawn]
    cond_latents = [clips.cond_latents(target, names, seed, step) for target, *names in drawn]
    latents = [clips.latent(key, seed, step) for key in targets]
    row = lay_out([clips.shape[key] for key in targets], [clips.info[k]["fps"] for k in targets],
                  [clips.text(key, seed, step, drop) for key in keys], clips.time_stride,
                  clips.patch, clips.row_tokens, clips.kind, cond_latents,
                  [clips.condition_values(key, seed, step, drop) for key in targets])
    if clips.is_codes:
        return keys, row, torch.stack(latents)
    noises = gaussians("noise", seed, step, keys, [x.shape for x in latents])
    left = (0, 0, 0, len(row.table_index) - int(row.cu_seqlens[-1]))    # zeros in the padding
    x0 = F.pad(patchify(with_cond_latents(latents, cond_latents), clips.patch), left)
    noise = torch.zeros_like(x0).index_copy_(0, row.targets, patchify(noises, clips.patch))
    return keys, row, x0, noise, torch.tensor(times, dtype=torch.float32)


# -- held-out losses, samples and curves -----------------------------------------------------------

BEST = "best.safetensors"    # the averaged weights of the lowest held-out loss so far


def clip_losses(model, row, x0, noise, t, dtype):
    """[B]: each clip's squared error, averaged over its target tokens and channels."""
    device, objective, clip_of = x0.device, model.objective, row.table_index[row.targets].long()
    t = network_time(objective, t)
    target_x0, target_noise, time_of = x0[row.targets], noise[row.targets], t[clip_of][:, None]
    x = x0.index_copy(0, row.targets, interpolate(objective, target_x0, target_noise, time_of))
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
        output = model(x, row.table_times(t), row).index_select(0, row.targets)
    error = squared_error(objective, output.float(), target_x0, target_noise, time_of)
    error = error.mean(-1)                                                           # [n]
    sums, counts = (torch.zeros(len(t), device=device).index_add(0, clip_of, values)
                    for values in (error, torch.ones_like(error)))
    return sums / counts


def losses_of(model, row, *tensors, dtype):
    """(each clip's loss [B], losses and their times for `by_time`) of what `load_row` returned."""
    if model.kind == "gpt":
        return code_losses(model, row, *tensors, dtype)
    losses = clip_losses(model, row, *tensors, dtype)
    return losses, losses.detach(), tensors[-1]


def by_time(losses, t, n_bins=4):
    """[n_bins, 2]: sum and number of the losses [B] whose times t [B] lie in each bin of 0 to 1."""
    bins = F.one_hot((t * n_bins).long().clamp(max=n_bins - 1), n_bins).float()      # [B, n_bins]
    return bins.T @ torch.stack([losses, torch.ones_like(losses)], 1)


@torch.no_grad()
def held_out_loss(model, bank, device, dtype):
    """Held-out figures for the log: mean loss, loss by time bin and by clip shape (T'xH'xW'); of
    codes also in bits a code."""
    all_losses, shapes = [], []
    for _, *loaded in bank:
        losses = losses_of(model, *(x.to(device) for x in loaded), dtype=dtype)
        all_losses.append([x.cpu() for x in losses])
        shapes += ["x".join(map(str, shape[1:])) for shape in loaded[0].shapes]
    losses, binned, times = (torch.cat(parts) for parts in zip(*all_losses))
    sums, counts = by_time(binned, times).unbind(1)
    by_shape = {shape: losses[torch.tensor([one == shape for one in shapes])].mean().item()
                for shape in sorted(set(shapes))}
    bits = {"bits_per_dim": losses.mean().item() / math.log(2)} if model.kind == "gpt" else {}
    return {"held_out": losses.mean().item(), "held_out_by_t": (sums / counts).tolist(),
            "held_out_by_shape": by_shape, **bits}


def zero_loss(model, bank):
    """The held-out loss of a constant model: one that returns zeros, the mean of latents and noise;
    of codes, in nats, one that predicts their frequencies."""
    if model.kind == "gpt":
        return code_entropy(torch.cat([codes.flatten() for *_, codes in bank]))
    width = 2 if model.objective.prediction == "ddpm" else 1             # noise, and its variance

    def zeros(x, t, row):
        return torch.zeros(len(x), width * x.shape[1])
    zeros.kind, zeros.objective = model.kind, model.objective
    return held_out_loss(zeros, bank, torch.device("cpu"), "fp32")["held_out"]


def guide(cond, uncond, scale, channels=None):
    """Classifier-free guidance: uncond + scale * (cond - uncond). channels: of the first so many
    (axis 1; DiT's published figures guide three of four), the others are cond's."""
    guided = (uncond + scale * (cond - uncond))[:, :channels]
    return torch.cat([guided, cond[:, guided.shape[1]:]], 1)


class Packed:
    """Clips denoised together in one packed row, followed by the same clips under `negative`, the
    unconditional texts ([]: no unconditional batch). noises: of `shapes`; the rest is as in
    lay_out."""

    def __init__(self, model, shapes, rates, texts, negative, noises, time_stride, cond_latents,
                 conditions):
        self.model, self.shapes, n = model, shapes, 2 if negative else 1
        row = lay_out(shapes * n, rates * n, texts + negative, time_stride, model.dit.patch, None,
                      model.kind, cond_latents * n, conditions * n).to(noises[0].device)
        row.cache = {}                    # texts are read once, not at every step
        self.tokens = patchify(with_cond_latents(noises, cond_latents), model.dit.patch)
        self.row, self.n, self.targets = row, n, row.targets[:len(row.targets) // n]
        self.clip = row.table_index[self.targets].long()     # of each of the target tokens
        self.lengths = torch.bincount(self.clip)
        self.first = self.lengths.cumsum(0) - self.lengths   # each clip's first target token
        self.n_rows = int(row.table_index.max()) + 1

    def network(self, x, t):
        """Outputs [n * N, C_out*P], cond then uncond, of the target tokens x [N, C*P] at the
        network's times t [N, 1]."""
        times = t[self.first, 0].repeat(self.n)
        times = F.pad(times, (0, self.n_rows - len(times)))
        tokens = self.tokens.index_copy(0, self.targets, x).repeat(self.n, 1)
        return self.model(tokens, times, self.row)[self.row.targets]


@torch.no_grad()
def generate(model, vae, vae_config, shapes, rates, texts, noises, n_steps=20, guidance=4.0,
             shift=1.0, time_stride=4, negative=(EOS,), cond_latents=None, conditions=None):
    """Samples videos uint8 [T, H, W, 3]: denoises clips from `noises` under `texts` and decodes
    them. Arguments are as in lay_out; negative: the empty text."""
    device, objective, empty = noises[0].device, model.objective, [[]] * len(shapes)
    is_guided = any(torch.is_tensor(text) or text != negative for text in texts)
    packed = Packed(model, shapes, rates, texts, [negative] * len(shapes) * is_guided, noises,
                    time_stride, cond_latents or empty, conditions or empty)
    x = packed.tokens[packed.targets]
    if objective.shift_tokens:                                     # each token by its clip's length
        shift = token_shift(shift, packed.lengths, objective.shift_tokens)[packed.clip, None]

    def read(x, t):
        t = torch.as_tensor(t, dtype=torch.float32, device=device).expand(len(x), 1)
        output = packed.network(x, t)
        output = guide(*output.chunk(2), guidance) if is_guided else output
        return to_velocity_x0_noise(objective, output, x, t)

    low, high = interval(objective, True)
    times = (low + (high - low) * flow_grid(n_steps, shift)).to(x)
    *_, x = stepped_ddim(objective, read, x, n_steps) if objective.path in STEPPED else runge_kutta(
        lambda x, t: read(x, t)[0], x, times.unbind())
    mean, std = normaliser(vae_config, device)
    return [to_frames(torch.cat(list(decode_long(vae, (z * std + mean)[None])), 2)[0])
            for z in unpatchify(x, shapes, model.dit.patch)]


def sample_held_out(model, vae, vae_config, clips, keys, seed, path, shift):
    """Writes a contact sheet of videos sampled under held-out clips' captions; in a run with
    --given each once more from its first frame."""
    rows, device = [], next(model.parameters()).device
    cond_latents = [[] for _ in keys]
    if clips.cond_share:
        cond_latents += [[(clips.latent(f"{key}:first", seed, 0).to(device), 0.0)] for key in keys]
        keys = keys * 2
    texts, negative = ([clips.text(key, seed, 0, drop) for key in keys] for drop in (0.0, 1.0))
    shapes = [clips.shape[key] for key in keys]
    if clips.is_codes:
        draws = [rng(seed, "sample", 0, key).random(math.prod(model.dit.shape)) for key in keys]
        videos = sample_codes(model, vae, texts, torch.tensor(np.array(draws)).float().to(device))
    else:
        noises = [x.to(device) for x in gaussians("sample", seed, 0, keys, shapes)]
        rates = [clips.info[key]["fps"] for key in keys]
        videos = generate(model, vae, vae_config, shapes, rates, texts, noises, shift=shift,
                          time_stride=clips.time_stride, negative=negative[0],
                          cond_latents=cond_latents,
                          conditions=[clips.condition_values(key, seed, 0, 0.0) for key in keys])
    for video, key, cond in zip(videos, keys, cond_latents):
        row = clips.rows[clips.info[key]["clip"]]
        caption = (row["captions"] or [{"text": ""}])[0]["text"] if clips.has_text else ""
        title = caption if clips.labels is None else row["label"]
        rows.append((sheet_frames(video), title + ", from its first frame" * len(cond)))
    contact_sheet(path, rows)


GREY, BLUE, RED = (170, 170, 170), (40, 90, 220), (200, 30, 30)
COLOURS = (BLUE, (220, 80, 30), (20, 150, 60), (150, 40, 150), (230, 160, 0), (0, 150, 170))


def ticks(low, high, most=8):
    """At most `most` round numbers from low to high, 1, 2 or 5 powers of ten apart; over more than
    a factor of 8 (low > 0) such numbers themselves."""
    if low > 0 and high > 8 * low:
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [m * 10.0**e for e in tens for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    least = math.floor(math.log10(max(high - low, 1e-9) / most))
    step = next(m * 10.0**e for e in range(least, least + 3) for m in (1, 2, 5)
                if (high - low) / (m * 10.0**e) <= most)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def draw_curves(path, curves, levels, unit, width=860, height=500):
    """Writes a PNG of curves (name, colour, line width, [(step, loss)], is the lowest marked),
    losses on a log scale; levels (name, colour, loss): dashed lines."""
    curves = [(*head, [(x, y) for x, y in points if y and y > 0], mark)      # no null, no NaN
              for *head, points, mark in curves]
    levels = [level for level in levels if level[2] and level[2] > 0]
    values = [y for *_, points, _ in curves for _, y in points] + [level[2] for level in levels]
    if not values:
        return
    last = max(1, *(x for *_, points, _ in curves for x, _ in points))
    low, high = 0.97 * min(values), 1.03 * max(values)
    image, left, top, right, bottom = Image.new("RGB", (width, height), "white"), 70, 64, 24, 48
    draw = ImageDraw.Draw(image)
    across = lambda step: left + (width - left - right) * step / last
    down = lambda value: height - bottom - (height - top - bottom) * (
        math.log(value / low) / math.log(high / low))
    for value in ticks(low, high):
        draw.line([(left - 4, down(value)), (width - right, down(value))], fill=(230, 230, 230))
        draw.text((left - 8, down(value)), f"{value:.4g}", fill="black", anchor="rm")
    for step in ticks(0, last):
        draw.line([(across(step), height - bottom), (across(step), height - bottom + 4)], "black")
        draw.text((across(step), height - bottom + 6), f"{step:g}", fill="black", anchor="ma")
    draw.line([(left, top), (left, height - bottom), (width - right, height - bottom)], "black")
    draw.text(((left + width - right) / 2, height - 8), "optimizer steps", "black", anchor="mb")
    draw.text((8, top - 16), unit, fill="black")
    for name, colour, value in levels:
        for x in range(left, width - right, 12):
            draw.line([(x, down(value)), (min(x + 6, width - right), down(value))], colour)
    for _, colour, wide, points, is_marked in curves:
        draw.line([(across(x), down(y)) for x, y in points], colour, wide)
        for x, y in [min(points, key=lambda point: point[1])] if is_marked and points else ():
            draw.ellipse([across(x) - 5, down(y) - 5, across(x) + 5, down(y) + 5], outline=colour,
                         width=2)
            draw.text((min(across(x), width - 110), down(y) + 8), f"{y:.4g} at step {x}", colour,
                      anchor="ma")
    x, y = 8, 6
    for name, colour in [(head[0], head[1]) for head in (*curves, *levels)]:
        if x + 26 + draw.textlength(name) > width:
            x, y = 8, y + 14
        draw.line([(x, y + 6), (x + 14, y + 6)], colour, 3)
        draw.text((x + 18, y), name, "black")
        x += 34 + draw.textlength(name)
    with atomic(path) as part:
        image.save(part, "PNG")


def loss_unit(config):
    """The unit of a run's losses, in words."""
    return "loss: nats a code" if config["model"].get("kind") == "gpt" else (
        f"loss: mean squared error of the {objective_of(config['args']).prediction}")


def plot_losses(folder, log=None):
    """Draws loss.png: training loss, held-out loss, held-out loss by time (thin), and a
    constant prediction's."""
    log = read_log(folder) if log is None else log
    evaluated = [row for row in log if "held_out" in row]
    curves = [("training", GREY, 2, [(r["step"], r.get("loss")) for r in log], False)]
    for i, colour in enumerate(COLOURS[1:5]):
        curves.append((f"held out, t {i / 4:g} to {(i + 1) / 4:g}", colour, 1,
                       [(row["step"], row["held_out_by_t"][i]) for row in evaluated], False))
    curves.append(("held out", BLUE, 3, [(r["step"], r["held_out"]) for r in evaluated], True))
    levels = [("constant prediction", RED, row.get("held_out_zero")) for row in evaluated]
    draw_curves(Path(folder) / "loss.png", curves, levels[-1:],
                loss_unit(read_config(folder, "denoiser")))


def redraw(folder):
    """Draws loss.png where it is older than the log: the run was killed after its last step."""
    drawn, log = Path(folder) / "loss.png", Path(folder) / "log.jsonl"
    if log.exists() and not (drawn.exists() and drawn.stat().st_mtime >= log.stat().st_mtime):
        plot_losses(folder)


def show_progress(folder, log):
    plot_losses(folder, log)
    if line := rising(log):
        tqdm.write(f"{folder}: {line}", file=sys.stderr)


def rising(log):
    """A line of advice if the held-out loss has just risen for the third evaluation in a row."""
    evaluated = [(row["step"], row["held_out"]) for row in log if row.get("held_out") is not None]
    fall = next((i for i in range(1, len(evaluated))
                 if not evaluated[-i][1] > evaluated[-i - 1][1]), len(evaluated))
    if fall != 4:                                            # three rises, the last one now
        return None
    (step, lowest), (last, now) = evaluated[-4], evaluated[-1]
    mean = lambda a, b: np.mean([r["loss"] for r in log if a < r["step"] <= b and r.get("loss")])
    before, after = mean(2 * step - last, step), mean(step, last)
    text = (f"held-out loss has risen for three evaluations, since step {step} ({lowest:.4f} to "
            f"{now:.4f}): ")
    if after > before:
        return text + (f"so has the training loss ({before:.4f} to {after:.4f}), the run diverges; "
                       "a lower --lr or a longer --warmup helps")
    return text + ("the model memorises its training clips. More clips, fewer --steps or a smaller "
                   f"--model help; the weights of the lowest loss are kept ({BEST})")


def keep_best(folder, done, held_out, state):
    """Saves a step's averaged weights as best.safetensors if no earlier held-out loss was as
    low. A file of its own, since checkpoints fall on other steps."""
    path = Path(folder) / BEST
    was = best_of(folder) or {"step": done}
    if was["step"] < done and not held_out < was["held_out"] or not math.isfinite(held_out):
        return                           # of a run killed after that
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    header = {"held_out": held_out, "step": done,
             "sums": {k: tensor_sum(v) for k, v in state.items()}}
    sweep(folder)                        # remains of a killed save
    try:
        with atomic(path) as part:
            save_file(state, part, {"nanosora": json.dumps(header, sort_keys=True)})
    except (OSError, SafetensorError) as error:
        refuse(f"{path} could not be saved ({error}): make room and run the same command again")


def best_of(folder):
    """{"held_out", "step"} of a run's best weights, or None where it has none."""
    path = Path(folder) / BEST
    try:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["nanosora"])
        return {name: header[name] for name in ("held_out", "step")}
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, TypeError, ValueError):
        refuse(f"{path} is damaged: remove it, and the run's last checkpoint is taken")


def averaged_weights(folder, which="best"):
    """(file, name) of the averaged weights to sample or to begin with: the best by held-out loss,
    else (an older run, or which="last") the last checkpoint's. The name is its step's folder."""
    best = best_of(folder) if which == "best" else None
    if best is None:
        last = last_checkpoint(folder)
        return last / "ema.safetensors", str(last)
    return Path(folder) / BEST, str(Path(folder) / f"step-{best['step']:06d}")


# -- the training loop -----------------------------------------------------------------------------

# What a network may be conditioned on beside the prompt: {name: its value}, of a dict that is a
# clip's in training and a request's in sampling. A new condition is a line here.
CONDITIONS = {
    "seconds": lambda clip: clip["fps"] and clip["frames"] / clip["fps"],
    "height": lambda clip: clip["height"], "width": lambda clip: clip["width"],
    "fps": lambda clip: clip["fps"], "motion": lambda clip: clip.get("motion")}


def condition_code(values):
    """A clip's conditions beside its prompt as network input, float32 [64 a value]: sinusoids of
    each value's logarithm; zeros for None."""
    numbers = torch.tensor([0.0 if value is None else value for value in values])
    is_set = torch.tensor([float(value is not None) for value in values])
    return (sinusoid(100 * torch.log1p(numbers), 64) * is_set[:, None]).flatten()


class Denoiser(nn.Module):
    """A network and the text tower that is trained, averaged and saved with it (text: its width,
    layers and heads); without a tower it takes classes, or embeddings of a frozen encoder. kind:
    video, dit, sit, wan, uvit, or gpt (VideoGPT's prior over codes, no denoiser)."""

    objective = Objective()

    def __init__(self, kind="video", text=None, vocab=0, **options):
        super().__init__()
        self.kind, self.tower = kind, TextTower(vocab, *text) if text else None
        if text:
            options["text_dim"] = text[0]
        self.dit = {"uvit": UViT, "gpt": GPT}.get(kind, DiT)(**options)

    def read(self, row):
        """The row's conditioning as the network takes it: texts end to end [L, width]; for U-ViT
        texts [B, L, width] or labels [B]; for GPT mean text embeddings [B, width] or labels; or
        None."""
        text = row.text
        if self.tower:
            text = cached(row, self.tower, lambda: self.tower(row.ids, row.cu_text))
        if self.kind not in ("uvit", "gpt"):
            return text
        if text is None:
            return row.labels
        if self.kind == "uvit":
            return text.unflatten(0, (len(row.cu_text) - 1, -1))
        lengths = row.cu_text.diff().tolist()                # padding follows
        return torch.stack([part.mean(0) for part in text[:sum(lengths)].split(lengths)])

    def forward(self, x, t, row):
        """x [N, C*P]; t [R], 0 clean to 1 noise (DiT, Wan and U-ViT count to 1000). Returns the
        objective's prediction [N, C*P], for DDPM noise and variance [N, 2 C*P]."""
        cond = self.read(row)
        if self.kind == "uvit":
            return self.dit(x, 1000 * t, cond, row.shapes)
        run = lambda x, t: self.dit(x, t, row, cond, row.image)
        out = from_sit(run, self.objective.prediction)(x, t) if self.kind == "sit" else run(
            x, 1000 * t)
        return out if self.objective.prediction == "ddpm" else out[:, :x.shape[1]]


def start_from(args, begun):
    """(network options or None, published layout or None, weights or None): from the config.json
    `begun` of a run to resume, else from --init: nothing, a run, or published weights."""
    if begun or not args.init:
        return begun and begun["model"], begun and begun["layout"], None
    path = model_path(args.init)
    if not path.exists():
        refuse(f"--init {args.init}: no such file or folder, and no such run ({path})")
    if is_run(path):
        config = read_config(path, "denoiser")
        weights = read_tensors(averaged_weights(path)[0])
        return config["model"], config.get("layout"), weights
    return start_published(args, path)


def fit_latents(args, options, is_new, vae, name, shapes):
    """Fills in a new model's options that depend on the latents (of these shapes, by the
    autoencoder of this name); refuses latents that a model with weights was not made for."""
    kind, z = options["kind"], vae.z_dim
    largest = tuple(max(shape[i] for shape in shapes) for i in (1, 2, 3))
    if kind == "gpt":
        here = dict(zip(("shape", "codes", "code_dim"), (largest, *vae.bottleneck.codebook.shape)))
        was = here if is_new else {**{key: options[key] for key in here},
                                   "shape": tuple(options["shape"])}
        if was != here:
            refuse(f"--init {args.init} has {was}, {name} and --shape give {here}")
        options |= here if is_new else {}
    elif is_new:
        options |= {"video": dict(channels=z), "wan": dict(channels=z, out_channels=z),
                    "uvit": dict(channels=z, size=largest)}.get(
                        kind, dict(channels=z, out_channels=2 * z, grid=None))
    elif options.get("out_channels") not in (None, z, 2 * z) or options["channels"] != z:
        refuse(f"--init {args.init} takes latents of {options['channels']} channels, those of "
               f"{name} have {z}")
    elif kind == "uvit" and any(a > b for a, b in zip(largest, options["size"])):
        refuse(f"--init {args.init} has positions for latents of {options['size']}, the largest "
               f"here are {largest}: prepare smaller clips, or stills")


class CountedTexts(dict):
    """Stands for TextEmbeddings where only lengths matter (--estimate): encodes nothing."""

    def __init__(self, encoder):
        self.encoder = encoder

    def __missing__(self, text):
        mask = self.encoder.ids([text])[1]                   # CLIP's padding counts
        return torch.empty(int(mask.sum()) if self.encoder.tables else mask.numel(), 0)


def open_texts(args, folder, data, options, saved, train_rows, held_out, device):
    """(tokenizer, embeddings, labels): the network's conditioning, None for the others; fills in
    the network's options for it. saved: labels of the weights' run, None for a new model."""
    is_new = saved is None
    if options.get("classes"):
        labels_seen, none = {row["label"] for row in train_rows} - {None}, options["kind"] != "gpt"
        if not labels_seen:
            refuse(f"{data} has no labels, and {args.model} is conditioned on classes: "
                   "prepare_data.py --format folder has them")
        labels = class_labels(labels_seen, 0 if is_new else options["classes"] - none, saved)
        options["classes"] = len(labels) + none                          # the last one: no class
        say(f"{len(labels)} classes, in this order: {', '.join(labels[:20])}"
            + ", …" * (len(labels) > 20))
        return None, None, labels
    if args.text_encoder:
        encoder, rows = open_text_encoder(args.text_encoder, device), train_rows + held_out
        width = encoder.embed.embedding_dim
        wanted = options["clip"][0] if options.get("clip") else not is_new and options.get(
            "text_dim")
        if wanted and wanted != width:
            refuse(f"--text_encoder {args.text_encoder} is {width} wide, {args.model} reads "
                   f"{wanted}")
        options |= {"text": None} | ({"text_dim": width} if options["kind"] != "uvit" else {})
        if args.estimate:
            return None, CountedTexts(encoder), None
        encode_captions(data, rows, encoder, rank=int(os.environ.get("RANK", 0)),
                        world=int(os.environ.get("WORLD_SIZE", 1)))
        return None, TextEmbeddings(data, {row["shard"] for row in rows}, encoder.hash), None
    if options.get("text"):
        source = args.init and run_dir(args.init)
        source = folder if (folder / "tokenizer.json").exists() else source
        texts = [c["text"] for row in train_rows for c in row["captions"]]
        tokenizer = open_tokenizer(source / "tokenizer.json") if source else (
            train_tokenizer(texts, args.vocab))
        options["vocab"] = tokenizer.get_vocab_size()
        return tokenizer, None, None
    if options.get("text_dim") or options.get("clip"):
        refuse(f"{args.model} reads embeddings of a frozen text encoder: --text_encoder DIR")
    return None, None, None


def open_stage(args, folder, begun, device):
    """(autoencoder, its config, training Clips, held-out Clips, the model's part of config.json,
    initial weights or None). begun: config.json of a run to resume."""
    data, name = dataset_dir(args.name), args.vae or f"{Path(args.name).name}-vae"
    train_rows, held_out = split_rows(chosen(open_dataset(data), args), data, folder)
    (vae, vae_config), (options, layout, weights) = load_autoencoder(name), start_from(args, begun)
    vae_config = {**vae_config, "name": name}
    if begun and begun["vae"]["hash"] != vae_config["hash"]:
        refuse(f"{folder} trains on latents of autoencoder {begun['vae']['hash']}, {name} now is "
               f"{vae_config['hash']}: name the first one by --vae, or start another --run")
    is_new, preset = options is None, MODELS[args.model]
    options = {"kind": "video", **(options or preset)}
    kind, patch = options["kind"], options.get("patch", 1)
    if "dim" not in options:
        refuse(f"--model {args.model} takes its sizes from --init: give that, or a size")
    if options.get("image_dim"):
        refuse(f"--model {args.model} reads an image beside the text, and training has none: take "
               "another, such as wan-14b")
    for size in {"dim", "depth", "heads"} & set(preset):
        if options[size] != preset[size]:
            refuse(f"--init {args.init} has {size} {options[size]}, --model {args.model} "
                   f"{preset[size]}")
    if (kind == "gpt") != bool(vae.n_codes):
        refuse(f"--model {args.model} trains on {'codes' if kind == 'gpt' else 'latents'}, which "
               f"{name} does not make: gpt models take train_vae.py --bottleneck vq or fsq, the "
               "others kl")
    patch = (1, patch, patch) if isinstance(patch, int) else tuple(patch)
    clips, shape = [], args.shape or options.get("shape")
    for rows in (train_rows, held_out):
        clips.append(Clips(data, rows, vae_config, patch, args.row_tokens, args.given, shape))
        shape = shape or clips[0].shape[clips[0].keys[0]][1:]
    fit_latents(args, options, is_new, vae, name, [
        part.shape[key] for part in clips for key in (part.keys if kind == "gpt" else part.shape)])
    classes, init = options.get("classes"), args.init and model_path(args.init)
    previous = begun or (read_config(init, "denoiser") if init and is_run(init) else {})
    texts = open_texts(args, folder, data, options, None if is_new else
                       previous.get("labels") or [], train_rows, held_out, device)
    if weights and options.get("classes") != classes:
        say(f"--init {args.init} has other classes: their embeddings are trained from scratch")
        weights = {k: v for k, v in weights.items() if not k.endswith(CLASS_TABLES)}
    if kind == "gpt":
        check_codes(args, options, vae, name, weights)
    if not is_new and len(args.conditions) != options.get("conditions", 0):
        refuse(f"--init {args.init} was trained with {options.get('conditions', 0)} --conditions")
    options |= {"conditions": len(args.conditions)} if args.conditions else {}
    for part in clips:
        part.read_as(kind, *texts, args.conditions)
    info = {"model": options, "layout": layout, "labels": texts[-1],
             "vae": {"run": name, "hash": vae_config["hash"]}, "data": data_summary(clips[0])}
    return vae, vae_config, *clips, info, weights


def held_out_bank(clips, seed):
    """A few rows of held-out clips with fixed noise and evenly spread times, so that the losses
    of two runs compare."""
    rows = plan_epoch(clips.keys, clips.lengths, clips.row_tokens, seed, 0)[:6]
    n = sum(map(len, rows))
    times = iter((rng(seed, "bank").permutation(n) + 0.5) / n)
    return [load_row(clips, [clips.keys[i] for i in row], seed, 0, 0.0, [next(times) for _ in row])
            for row in rows]


def add_gradients(model, step, loaded, lengths, args, device):
    """Backward passes over this rank's rows of a step; returns their figures for the log. lengths:
    clip lengths of every row of all ranks."""
    n_clips, by_t = sum(map(len, lengths)), torch.zeros(4, 2, device=device)
    for keys, row, *tensors in loaded:
        # dropout is drawn by row, whatever its rank
        torch.manual_seed(int(rng(args.seed, "dropout", step, keys[0]).integers(2**62)))
        losses, binned, t = losses_of(model, row.to(device), *(moved(x, device) for x in tensors),
                                      dtype=args.dtype)
        (losses.sum() / n_clips).backward()
        by_t += by_time(binned, t) * (len(keys) / len(binned))           # in clips
    full, even = evenness(lengths, args.row_tokens)
    return {"loss": by_t[:, 0].sum() / n_clips, "loss_by_t": by_t, "fullness": (full, 1),
            "evenness": (even, 1)}


def build(args, options, weights, vae):
    """The model at the start of a run."""
    torch.manual_seed(args.seed)
    model = Denoiser(**options)
    model.objective, model.dit.recompute = objective_of(vars(args)), args.recompute
    if weights:
        missing = [name for name in model.load_state_dict(weights, strict=False).missing_keys
                 if not name.endswith(CLASS_TABLES)]
        if missing:
            refuse(f"--init {args.init} has no {min(missing)}: not this model")
    if model.kind == "gpt":
        model.dit.codebook.copy_(vae.bottleneck.codebook)
    if args.lora:
        add_lora(model, args.lora)
    return model


def optimizer_of(args, model):
    return MuonAdamW(model, ("dit.head", "table", "dit.time", "pos_embd", ".w.", ".wb.",
                             "fc_out") if args.optimizer == "muon" else ("",))


@one_run
def train(args, folder):
    rows_a_step = args.batch_tokens // args.row_tokens
    rank, world, device = setup(args, rows_a_step, "--batch_tokens")
    config, begun, saved_at = {"kind": "denoiser", "args": vars(args)}, None, None
    is_begun = (folder / "config.json").exists() and not args.estimate
    args.estimate or claim(folder)                           # ranks wait, before the first makes it
    if is_begun:
        saved_at = start_run(folder, config)
        if is_finished(saved_at, args):
            return redraw(folder) if rank == 0 else None
        begun = saved_at and read_config(folder, "denoiser")
    vae, vae_config, clips, held_out, info, weights = open_stage(args, folder, begun, device)
    plan = RowPlan(clips, args.seed, args.given, args.stills)
    cost = estimate(args, info["model"], clips, plan, device)
    cost |= timed_step(args, cost, info["model"], vae, clips, plan, device)
    print_cost(args, cost, clips, held_out, device)
    advise(args, clips, plan, begun)
    if args.estimate:
        return
    if not is_begun:
        start_run(folder, {**config, **info})
    if rank == 0 and clips.tokenizer and not (folder / "tokenizer.json").exists():
        with atomic(folder / "tokenizer.json") as path:
            clips.tokenizer.save(str(path))
    model, step = build(args, info["model"], weights, vae).to(device), 0
    tokens_of = dict(zip(clips.keys, clips.lengths))
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = optimizer_of(args, model)
    if saved_at:
        step, saved = load_step(saved_at)
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved.get("average", saved["ema"]))
        restore_optimizer(optimizer, model, saved["optimizer"])
    for block in model.dit.modules() if args.compile else ():
        if isinstance(block, BLOCKS):
            block.compile()
    vae, bank = vae.to(device), held_out_bank(held_out, args.seed)
    zero = zero_loss(model, bank)

    def batch(step):
        """(this rank's rows of a step, clip lengths of every row of all ranks)"""
        rows = [plan.row(s) for s in range(step * rows_a_step, (step + 1) * rows_a_step)]
        loaded = []
        for keys, drawn in rows[rank::world]:
            times = [draw_t(rng(args.seed, "time", step, key), args.times,
                            token_shift(args.shift, tokens_of[key], args.shift_tokens),
                            interval(model.objective)) for key in keys]
            loaded.append(load_row(clips, keys, args.seed, step, args.drop, times, drawn))
        return loaded, [[clips.count_tokens(name) for name in drawn] for _, drawn in rows]

    def learn(step, data):
        figures = add_gradients(model, step, *data, args, device)
        norm = take_step(model, optimizer, lr_at(step, args))
        ema_update(ema, model, min(args.ema, (2 + step) / (11 + step)))
        return figures, norm, [key for keys, *_ in data[0] for key in keys]

    def evaluate(done):
        sample_held_out(ema, vae, vae_config, held_out, held_out.keys[:6], args.seed,
                        folder / "samples" / f"step-{done:06d}.png", args.shift)
        figures = {**held_out_loss(ema, bank, device, args.dtype), "held_out_zero": zero}
        keep_best(folder, done, figures["held_out"], merged(ema))
        show_progress(folder, [*read_log(folder), {"step": done, **figures}])
        return figures

    fit(args, folder, step, batch, learn, evaluate, lambda: {
        "model": model.state_dict(), "ema": merged(ema),
        **({"average": ema.state_dict()} if args.lora else {}),      # not merged, to resume from
        "optimizer": optimizer_tensors(optimizer, model)},
        (args.batch_tokens * cost["fullness"], cost["flops"], cost["peak"]))
    if rank == 0:
        plot_losses(folder)
        check_estimate(cost, folder)
    barrier()


def compare(names):
    """Prints a table of runs' logs and draws them into compare.png beside the first."""
    if not names or names[0].startswith("-"):
        refuse("usage: python train_dit.py compare RUN [RUN ...]")
    curves, levels, units, rows, facts = [], [], [], [], []
    for i, name in enumerate(names):
        folder = model_path(name)
        config = read_config(folder, "denoiser")
        log = read_log(folder) if (folder / "log.jsonl").exists() else []
        evaluated = [(r["step"], r["held_out"]) for r in log if r.get("held_out") is not None]
        if not evaluated:
            refuse(f"{folder} has not been evaluated yet: there is nothing to compare")
        options, colour = config["args"], COLOURS[i % len(COLOURS)]
        name = name.encode("latin-1", "replace").decode("latin-1")       # as the font can
        faint = tuple((255 + part) // 2 for part in colour)
        curves += [(f"{name}, training", faint, 1, [(r["step"], r.get("loss")) for r in log], 0),
                   (f"{name}, held out", colour, 3, evaluated, True)]
        zero = next((r["held_out_zero"] for r in log[::-1] if r.get("held_out_zero")), None)
        levels.append((f"{name}, constant prediction", colour, zero))
        units.append(loss_unit(config))
        step, best = min(evaluated, key=lambda point: (not math.isfinite(point[1]), point[1]))
        steps = np.diff([0, *(r["step"] for r in log)])      # the log has means over them
        full, seconds = (steps @ [r.get(key) or 0.0 for r in log] for key in ("fullness", "step_s"))
        tokens = full * (options.get("batch_tokens") or 0)
        rows.append([names[i], log[-1]["step"], f"{tokens / 1e6:.2f}M", f"{seconds / 60:.1f} min",
                     f"{best:.4f}", step, f"{evaluated[-1][1]:.4f}",
                     f"{zero:.4f}" if zero else "-"])
        facts.append({"data set": options.get("name"), "autoencoder": config["vae"]["hash"], **{
            f"--{key}": options.get(key) for key in ("where", "skip_clips", "objective", "path",
            "weighting", "seed", "row_tokens", "shape", "stills")}})
    head = ["run", "steps", "tokens", "time", "best held out", "at step", "last", "constant"]
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    for first, *rest in [head, *rows]:
        print(f"{first:{widths[0]}}  " + "  ".join(map("{:>{}}".format, rest, widths[1:])))
    if unlike := [name for name in facts[0] if any(f[name] != facts[0][name] for f in facts)]:
        print(f"held-out losses do not compare: the runs differ in {', '.join(unlike)}",
              file=sys.stderr)
    path = model_path(names[0]).parent / "compare.png"
    levels = levels[:1] if len({level[2] for level in levels}) == 1 else levels
    draw_curves(path, curves, levels, " and ".join(sorted(set(units))))
    print(f"{path}: the curves of {len(names)} runs", file=sys.stderr)


def load_denoiser(name, device="cpu", config=None, which="best"):
    """(model in eval mode, prompt -> text as lay_out takes it, config) of a run."""
    folder = model_path(name)
    config = config or read_config(folder, "denoiser")
    model = Denoiser(**config["model"])
    model.objective = objective_of(config["args"])
    file, step = averaged_weights(folder, which)
    last = max(Path(folder).glob("step-*"), default=None)    # by name: it is not opened
    if last and last.name > Path(step).name:
        print(f"{folder}: of its steps to {int(last.name[5:])}, {int(step[-6:])} has the lowest "
              "held-out loss, and its weights are taken", file=sys.stderr)
    model.load_state_dict(read_tensors(file))
    model.to(device).eval().requires_grad_(False)
    return model, open_reader(folder, config, device), config


def open_reader(folder, config, device="cpu"):
    """A run's function prompt -> text as lay_out takes it."""
    if config.get("labels"):
        return lambda prompt: class_of(prompt, config["labels"])
    if config["args"].get("text_encoder"):
        encoder = open_text_encoder(config["args"]["text_encoder"], device)
        return lambda prompt: encoder.encode([prompt])[0]
    if not config["model"].get("text"):                      # no conditioning
        return lambda prompt: [EOS]
    return functools.partial(encode_text, open_tokenizer(folder / "tokenizer.json"))


def class_of(prompt, labels):
    """The index of a label; of an empty prompt that of no class."""
    if prompt and prompt not in labels:
        refuse(f"'{prompt}' is no class of this run: {', '.join(labels[:12])}, …")
    return labels.index(prompt) if prompt else len(labels)


# -- the command line ------------------------------------------------------------------------------


def parse_options(argv=None):
    parser = option_parser(__doc__)
    parser.add_argument("name", help="data set: data/NAME, or a path with a slash")
    add = parser.add_argument_group("what to train").add_argument
    add("--run", help="runs/RUN, or a path with a slash (NAME)")
    add("--init", help="begin with these weights: a run, or published ones, a file or a folder")
    add("--heads", type=number(int, 1), help="of published weights, if not 64 wide (none)")
    add("--text_encoder", metavar="DIR", help="frozen T5, UMT5 or CLIP for captions (none)")
    add("--export", metavar="FILE", help="write the EMA in its published layout, and stop")
    add("--vae", help="the run whose latents to train on (NAME-vae)")
    add("--estimate", action="store_true", help="print memory, time and price of a run, and stop")
    add("--price_per_hour", type=number(float, 0), help="of all ranks, 0 or more (none)")
    add = parser.add_argument_group("model (fixed at the first start, like all below but "
                                    "--steps, --keep and --skip_clips)").add_argument
    add("--model", default="video-xs", choices=sorted(MODELS), metavar="NAME",
        help=f"size: {', '.join(sorted(MODELS))} (%(default)s)")
    add("--vocab", type=number(int, 259), default=512, help="BPE tokens, 259 on (%(default)s)")
    add("--shape", type=shape_of, metavar="T'xH'xW'", help="codes of a clip of gpt models, as in "
        "4x32x32: larger clips are cropped, smaller left out (the most frequent)")
    add("--dtype", default="fp32", choices=["fp32", "bf16"], help="of products (%(default)s)")
    add = training_options(parser, steps=1100, lr=1e-2, warmup=50, eval_every=550)
    add("--row_tokens", type=number(int, 1), default=2048, help="tokens a packed row (%(default)s)")
    add("--batch_tokens", type=number(int, 1), default=2048,
        help="tokens a step over all ranks, a multiple of --row_tokens (%(default)s)")
    share = number(float, 0, 1)
    add("--ema", type=share, default=0.995, help="decay of the EMA, 0 to 1 (%(default)s)")
    add("--drop", type=share, default=0.1, help="share of texts dropped, 0 to 1 (%(default)s)")
    add("--conditions", nargs="*", choices=CONDITIONS, default=[],
        help="conditions beside the caption: " + ", ".join(CONDITIONS) + " (none)")
    add("--given", type=share, default=0.0,
        help="share of clips with conditioning frames, 0 to 1 (%(default)s)")
    add("--stills", type=share, default=0.0,
        help="share of clips trained on as a still, their first frame, 0 to 1 (%(default)s)")
    add("--optimizer", default="muon", choices=["muon", "adamw"],
        help="of the matrices; AdamW trains the rest (%(default)s)")
    add("--lora", type=number(int, 0), default=0, metavar="RANK",
        help="rank of LoRA on the blocks' matrices, 0: train all weights (%(default)s)")
    add("--compile", action="store_true", help="compile the blocks (torch.compile)")
    add("--recompute", type=number(int, 0), default=0,
        help="checkpoint every n-th block to save memory, 0: none (%(default)s)")
    add("--objective", choices=["velocity", "noise", "score", "x", "ddpm"],
        help="the prediction; ddpm: noise and variance (velocity; dit: ddpm; uvit: noise)")
    add("--path", choices=["linear", "gvp", "vp", *STEPPED], help="interpolant: linear, quarter "
        "circle, variance preserving, or the 1000 steps of DDPM or Stable Diffusion (linear; dit: "
        "ddpm; uvit: sd)")
    add("--weighting", default="none", choices=["none", "velocity", "likelihood", "min-snr"],
        help="of the squared error over times (%(default)s)")
    add("--times", choices=["logit-normal", "uniform"],
        help="distribution of training times (logit-normal; dit, sit, uvit: uniform)")
    add("--shift", type=number(float, 0.01, 100), default=1.0,
        help="timestep shift towards noise, 0.01 to 100, 1: none (%(default)s)")
    add("--shift_tokens", type=number(int, 0), default=0,
        help="tokens at which --shift holds; it grows with their root, 0: constant (%(default)s)")
    return check_options(parser.parse_args(argv))


NOT_FOR = {                  # unused options by kind of model; --shape of all others
    "gpt": ("given", "stills", "recompute", "conditions", "objective", "path", "times"),
    "uvit": ("shape", "given", "recompute", "conditions")}


def check_options(args):
    """Fills in options that depend on the model, and refuses options that exclude each other."""
    if args.batch_tokens % args.row_tokens:
        refuse(f"--batch_tokens {args.batch_tokens} is no multiple of --row_tokens "
               f"{args.row_tokens}")
    kind = args.model.split("-")[0]
    for name in NOT_FOR.get(kind, ("shape",)):
        if getattr(args, name):
            refuse(f"--{name} is not for --model {args.model}: leave it out, or take another model")
    if kind == "gpt":
        return args
    own = {"dit": ("ddpm", "ddpm"), "uvit": ("noise", "sd")}.get(kind, ("velocity", "linear"))
    args.objective = args.objective or own[0]
    args.path = args.path or (own[1] if args.objective == own[0] else "linear")
    args.times = args.times or ("logit-normal" if kind in ("video", "wan") else "uniform")
    if (args.objective == "ddpm") != (args.path == "ddpm") or (
            args.path in STEPPED and (args.objective not in ("ddpm", "noise") or
                                      args.weighting != "none")):
        refuse(f"--objective {args.objective} --path {args.path} --weighting {args.weighting} do "
               "not go together: ddpm goes with ddpm, sd with noise, both without a weighting")
    if args.objective == "ddpm" and kind != "dit":
        refuse(f"--objective ddpm needs an output for the variance: take a dit, not {args.model}")
    if args.objective == "velocity" and args.weighting in ("velocity", "likelihood"):
        refuse(f"--weighting {args.weighting} is for --objective noise, score and x: leave it out")
    return args


@one_line
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:
        return bench("bench", argv[1:])
    if argv[:1] == ["compare"]:
        return compare(argv[1:])
    args = parse_options(argv)
    folder = run_dir(args.run or Path(args.name).name)
    if args.export:
        return export(args, folder)
    train(args, folder)
    if not args.estimate:
        best = best_of(folder)
        text = best and f", best at step {best['step']} (held-out loss {best['held_out']:.4f})"
        print(f"{folder}: trained{text or ''}; see {folder / 'samples'} and "
              f"{folder / 'loss.png'}", file=sys.stderr)


# -- memory, time and price: --estimate ------------------------------------------------------------

EFFICIENCY = 0.4             # the MFU that an estimate takes for granted where no step is timed


def matmul_rate(device, dtype="fp32", seconds=0.2):
    """The device's peak for MFU, FLOP/s: the best of a large linear layer within `seconds`."""
    n, best = 4096 if device.type == "cuda" else 1024, math.inf
    with torch.no_grad(), torch.random.fork_rng([]):
        to = dict(device=device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
        layer, x = Linear(n, n).to(**to), torch.randn(n, n).to(**to)
        layer(x)[0, 0].item()                                # .item() waits for the device
        stop = time.perf_counter() + seconds
        while (began := time.perf_counter()) < stop:
            layer(x)[0, 0].item()
            best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def step_flops(options, clips, texts):
    """FLOPs of a training step of Denoiser(**options) on clips of these lengths in tokens, each
    with a text of the length in `texts`. Forward and backward are three times the forward:

        6 * [depth * (N (6 D^2 + 2 D F) + 2 L D^2 + 2 D sum n (n + m))     blocks
             + 2 N C P D + L (W D + D^2) + B (256 D + 7 D^2)               patches, texts, times
             + layers * (12 L W^2 + 2 W sum m^2)]                          the tower, of width W

    with n tokens and m text tokens a clip, N and L in all, F the MLP's width; without text 4 D^2
    for 6 D^2. Norms, activations and padding are left out."""
    has_text = bool(options.get("text") or options.get("text_dim"))
    n, m, D = np.array(clips, float), np.array(texts, float) * has_text, options["dim"]
    ffn, (W, layers, _) = options.get("ffn") or 4 * D, options.get("text") or (0, 0, 0)
    N, L, patch = n.sum(), m.sum(), options.get("patch", 1)
    tower = layers * (12 * L * W**2 + 2 * W * (m**2).sum())
    if options.get("kind") == "gpt":
        blocks, rest = gpt_flops(options, n)
    else:
        ends = options["channels"] * (patch**2 if isinstance(patch, int) else math.prod(patch))
        blocks = N * ((4 + 2 * has_text) * D**2 + 2 * D * ffn) + 2 * L * D**2 + 2 * D * (
            n * (n + m)).sum()
        rest = 2 * N * ends * D + L * (W * D + D**2) + len(n) * (256 * D + 7 * D**2)
    return float(6 * (options["depth"] * blocks + rest + tower))


def saved_bytes(options, n_tokens, n_text, kernels, dtype):
    """Bytes of activations that a row's forward pass saves for backward. Per token and block: 20
    vectors of width D (GPT: 18), two of the MLP's width, and on torch's path ten that the Triton
    kernels recompute; per text token its keys and values. In bf16 torch's path keeps half of them
    in fp32."""
    D, (W, layers, _) = options["dim"], options.get("text") or (0, 0, 0)
    vectors = 18 if options.get("kind") == "gpt" else 20 if kernels == "triton" else 30
    numbers = vectors + 2 * (options.get("ffn") or 4 * D) / D
    size = 4 if dtype == "fp32" else 2 if kernels == "triton" else 3
    tower = n_text * (3 * options["depth"] * D + 20 * layers * W)
    logits = 4 * n_tokens * options.get("codes", 0) * 2      # and their softmax, float32
    return size * (n_tokens * options["depth"] * D * numbers + tower) + logits


def evenness(rows, row_tokens):
    """(share of tokens that are no padding, attention FLOPs of the largest row over their mean) of
    rows, lists of clip lengths."""
    work = [sum(n * n for n in row) for row in rows]
    return sum(map(sum, rows)) / len(rows) / row_tokens, max(work) * len(work) / sum(work)


def estimate(args, options, clips, plan, device):
    """{name: figure} of a run before it starts: how full the first epoch's rows are, what a step of
    all ranks costs."""
    rows = [[clips.lengths[i] for i in row] for row in plan.epoch(0)]
    some = clips.keys[::-(-len(clips.keys) // 256)]
    texts = [clips.text(key, args.seed, 0, 0.0) for key in some]
    text = sum(0 if isinstance(text, int) else len(text) for text in texts) / len(some)
    text = WAN_TEXT if clips.kind == "wan" else text
    with torch.device("meta"):
        model = Denoiser(**options)
    n, n_clips = sum(p.numel() for p in model.parameters()), sum(map(len, rows))
    flops = step_flops(options, [k for row in rows for k in row], [text] * n_clips) / len(rows)
    flops *= args.batch_tokens // args.row_tokens
    peak, = sum_over_ranks(matmul_rate(device, args.dtype))
    kernels, why = backend(device)
    full, even = evenness(rows, args.row_tokens)
    return dict(
        params=n, dit=sum(p.numel() for p in model.dit.parameters()), fullness=full, evenness=even,
        flops=flops, peak=peak, step_s=flops / peak / EFFICIENCY, kernels=kernels, why=why,
        held=peak_mib() * 2**20 if device.type == "cpu" else 0,
        # weights, gradients, average and Muon's momentum, 4 bytes each; autocast's copies
        state=(16 if args.dtype == "fp32" else 18) * n,
        row=saved_bytes(options, args.row_tokens, text * n_clips / len(rows), kernels, args.dtype))


def timed_step(args, cost, options, vae, clips, plan, device):
    """{"step_s", "is_timed"}: the step time measured on this CPU with a new model: a row's median
    times the rows, plus the optimizer. Not measured where it takes long, where texts are only
    counted, or on GPUs, where the model would have to fit."""
    if device.type != "cpu" or cost["step_s"] > 20 or args.estimate and args.text_encoder:
        return {"is_timed": False}
    world = int(os.environ.get("WORLD_SIZE", 1))
    with torch.random.fork_rng([]):
        model = build(args, options, None, vae)
        model.train()
        optimizer, parts = optimizer_of(args, model), []
        keys, drawn = plan.row(0)
        row = [load_row(clips, keys, args.seed, 0, args.drop, [0.5] * len(keys), drawn)]
        lengths = [[clips.count_tokens(name) for name in drawn]]
        stop = time.perf_counter() + 2 * (world == 1)        # ranks wait for each other: all alike
        while len(parts) < 2 or len(parts) < 6 and time.perf_counter() < stop:
            times = [time.perf_counter()]
            add_gradients(model, 0, row, lengths, args, device)
            times.append(time.perf_counter())
            take_step(model, optimizer, 0.0)
            ema_update(model, model, 0.0)
            parts.append(np.diff([*times, time.perf_counter()]))
    rows = args.batch_tokens // args.row_tokens / world
    a_row, once_a_step = np.median(parts[1:], 0)             # the first one warms up
    return {"step_s": float(rows * a_row + once_a_step), "is_timed": True}


def print_cost(args, cost, clips, held_out, device):
    """Prints a run's header, on rank 0: model, data, cost; with --estimate what GPUs hold too."""
    if int(os.environ.get("RANK", 0)):
        return
    hours = cost["step_s"] * args.steps / 3600
    price = "" if args.price_per_hour is None else f", {hours * args.price_per_hour:.2f} in all"
    tera, mib = 1e12, 2**20
    rows = [
        ("parameters", f"{cost['params'] / 1e6:.2f}M, {cost['dit'] / 1e6:.2f}M in the denoiser"),
        ("clips", f"{len(clips.keys)} of {sum(clips.lengths) / len(clips.keys):.0f} tokens to "
         f"train on, {len(held_out.keys)} held out"),
        ("rows", f"{args.batch_tokens // args.row_tokens} of {args.row_tokens} tokens a step, "
         f"{cost['fullness']:.1%} full, attention of the largest {cost['evenness']:.2f} of the "
         "mean"),
        ("fixed memory", f"{cost['state'] / mib:.0f} MiB: weights, gradients, momentum, average" +
         f"; beside {cost['held'] / mib:.0f} MiB of libraries, data, autoencoder" * (
             cost["held"] > 0)),
        ("activations", f"{cost['row'] / mib:.0f} MiB for a row of {args.row_tokens} tokens in "
         f"{args.dtype}, {cost['kernels']} kernels ({cost['why']})"),
        ("a step", f"{cost['step_s']:.3g} s: {cost['flops'] / tera:.3g} TFLOP at "
         f"{cost['flops'] / cost['peak'] / cost['step_s']:.0%} of the {cost['peak'] / tera:.3g} "
         f"TFLOP/s measured on {device}" + ", as steps were timed" * cost["is_timed"]),
        (f"{args.steps} steps", f"{hours:.2f} hours{price}")]
    for gb in (8, 16, 24, 80) if args.estimate else ():      # a tenth is left to temporaries
        most = int((0.9e9 * gb - cost["state"]) / cost["row"] * args.row_tokens) // 256 * 256
        rows.append((f"{gb} GB hold", f"--row_tokens {most}" if most > 0 else "not even one row"))
    print("\n".join(f"{name:14}{text}" for name, text in rows),
          file=sys.stdout if args.estimate else sys.stderr)


def check_estimate(cost, folder):
    """Prints the estimate beside the log's figures."""
    seconds, memory = np.array([(row["step_s"], row["peak_mib"]) for row in read_log(folder)
                                if "step_s" in row]).T
    counted = (cost["state"] + cost["row"] + cost["held"]) / 2**20
    print(f"{folder}: estimated {cost['step_s']:.3g} s a step and {counted:.0f} MiB; measured "
          f"{np.median(seconds):.3g} s and {memory.max():.0f} MiB" + (
              ", libraries, data and autoencoder counted" if cost["held"] else
              ", with data and autoencoder, which are not estimated"), file=sys.stderr)


# == published models: their sizes, DiT's diffusion, U-ViT, VideoGPT's prior, LoRA, weights ========

MODELS |= {
    **{f"{kind}-{size}-{p}": dict(kind=kind, dim=dim, depth=depth, heads=heads, patch=(1, p, p),
                                  channels=4, out_channels=8, own_table=True, positions="sincos",
                                  classes=1001, grid=(32 // p, 32 // p))
       for kind in ("dit", "sit") for p in (2, 4, 8) for size, depth, dim, heads in (
           ("s", 12, 384, 6), ("b", 12, 768, 12), ("l", 24, 1024, 16), ("xl", 28, 1152, 16))},
    **{kind: dict(kind=kind) for kind in ("dit", "sit", "wan", "uvit", "gpt")},   # as --init says
    **{f"wan-{size}": dict(kind="wan", dim=dim, depth=depth, heads=dim // 128, patch=(1, 2, 2),
                           ffn=ffn, channels=channels, out_channels=out, text_dim=4096,
                           image_dim=image, positions="index")
       for size, dim, depth, ffn, channels, out, image in (
           ("1.3b", 1536, 30, 8960, 16, 16, 0), ("14b", 5120, 40, 13824, 16, 16, 0),
           ("i2v-14b", 5120, 40, 13824, 36, 16, 1280), ("ti2v-5b", 3072, 30, 14336, 48, 48, 0))},
    **{f"uvit-{name}": dict(kind="uvit", dim=dim, depth=depth, heads=min(16, dim // 64),
                            channels=channels, size=(1, side, side), patch=patch, **more)
       for name, dim, depth, channels, side, patch, more in (
           ("s-2-cifar10", 512, 12, 3, 32, 2, {}), ("s-4-celeba64", 512, 12, 3, 64, 4, {}),
           ("s-2-coco", 512, 12, 4, 32, 2, dict(clip=(768, 77))),
           ("s-2-coco-deep", 512, 16, 4, 32, 2, dict(clip=(768, 77))),
           ("m-4-imagenet64", 768, 16, 3, 64, 4, dict(classes=1000)),
           ("l-4-imagenet64", 1024, 20, 3, 64, 4, dict(classes=1000)),
           ("l-2-imagenet256", 1024, 20, 4, 32, 2, dict(classes=1001)),
           ("l-4-imagenet512", 1024, 20, 4, 64, 4, dict(classes=1001)),
           ("h-2-imagenet256", 1152, 28, 4, 32, 2, dict(classes=1001, conv=False)),
           ("h-4-imagenet512", 1152, 28, 4, 64, 4, dict(classes=1001, conv=False)))},
    "gpt-xs": dict(kind="gpt", dim=192, depth=6, heads=4, dropout=0.1, attn_dropout=0.0,
                   text=(128, 2, 4)),
    **{name: dict(kind="gpt", dim=576, depth=8, heads=4, sparse=True, classes=classes)
       for name, classes in (("gpt-ucf", 0), ("gpt-ucf-class", 101))},
}
CLASS_TABLES = ("dit.classes.weight", "dit.label_emb.weight", ".w.weight", ".wb.weight")   # ends


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
    """The timesteps to use of n: "" all; "250" evenly spaced; "10,15,20" so many in each third;
    "ddim50" at an integer stride."""
    if spec.startswith("ddim"):
        strides = [i for i in range(1, n) if len(range(0, n, i)) == int(spec[4:])]
        if not strides:
            refuse(f"no whole stride keeps {spec[4:]} of {n} steps")
        return list(range(0, n, strides[0]))
    counts, timesteps, start = [int(count) for count in spec.split(",")] if spec else [n], [], 0
    for i, count in enumerate(counts):
        size = n // len(counts) + (i < n % len(counts))
        if count > size:
            refuse(f"{count} steps cannot be kept of {size}")
        stride, position = (size - 1) / max(1, count - 1), 0.0
        for _ in range(count):
            timesteps.append(start + round(position))
            position += stride                                  # summed and rounded as DiT does
        start += size
    return timesteps


@functools.lru_cache
def ddpm_tables(schedule="linear", respacing="", n=1000, ends=None):
    """DDPM's coefficients at the S timesteps in use, float64 [S] each, by their published names;
    and alpha, sigma."""
    timesteps = respace(respacing, n)
    alpha_bar = np.cumprod(1 - ddpm_betas(schedule, n, ends))[timesteps]
    before = np.append(1.0, alpha_bar[:-1])
    betas = 1 - alpha_bar / before
    variance = betas * (1 - before) / (1 - alpha_bar)        # 0 at the first step: its log
    log_variance = np.log(np.append(variance[1:2], variance[1:]))          # is the second's
    tables = dict(
        timestep_map=np.array(timesteps), betas=betas, log_betas=np.log(betas),
        alphas_cumprod=alpha_bar, alpha=alpha_bar ** 0.5, sigma=(1 - alpha_bar) ** 0.5,
        posterior_variance=variance, posterior_log_variance_clipped=log_variance,
        posterior_mean_coef1=betas * before ** 0.5 / (1 - alpha_bar),
        posterior_mean_coef2=(1 - before) * (1 - betas) ** 0.5 / (1 - alpha_bar))
    return {name: torch.from_numpy(table) for name, table in tables.items()}


def ddpm_at(tables, n):
    """{name: float32 of n's shape}: the tables at timesteps n (int64), and n itself."""
    stacked = torch.stack([table.float() for table in tables.values()])
    return {"n": n, **dict(zip(tables, moved(stacked, n.device)[:, n]))}


def stepped_ddim(objective, read, x, n):
    """DDIM in n of a path's 1000 steps, for the pictures of a training."""
    times = torch.linspace(1.0 if objective.path == "sd" else 0.999, 0.001, n)
    times = times.mul(1000).round().div(1000)
    alpha, sigma = (x.double() for x in interpolant(objective.path, times)[:2])
    return ddim(lambda x, i: read(x, times[i])[1:], x, F.pad(alpha, (0, 1), value=1),
                F.pad(sigma, (0, 1)))


def ddpm_bits(eps, v, x0, x, c):
    """The variational bound's term of a step, elementwise, in bits: KL(true posterior, ours), at
    the first step the negative log likelihood of x_0 in 256 levels. v from -1 to 1 interpolates
    the log variance. As in DiT, eps gets no gradient from it."""
    true_mean, mean = (c["posterior_mean_coef1"] * z + c["posterior_mean_coef2"] * x
                       for z in (x0, (x - c["sigma"] * eps) / c["alpha"]))
    true_logvar, share = c["posterior_log_variance_clipped"], (v + 1) / 2
    logvar = share * c["log_betas"] + (1 - share) * true_logvar
    kl = 0.5 * (logvar - true_logvar - 1 + (true_logvar - logvar).exp()
                + (true_mean - mean).square() * (-logvar).exp())
    # the normal's distribution function by the same approximation as the reference
    below = lambda z: 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z ** 3)))
    upper, lower = (below((x0 - mean + half) * (-0.5 * logvar).exp()) for half in (1/255, -1/255))
    mass = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
    return torch.where(c["n"] == 0, -mass.clamp(min=1e-12).log(), kl) / math.log(2)


def from_sit(network, prediction="velocity"):
    """SiT's network as one of ours. Its time runs from noise (0) to data (1), and its velocity has
    the other sign; this is the only place that converts."""
    sign = -1 if prediction == "velocity" else 1
    return lambda x, t, *rest: sign * network(x, 1 - t, *rest)


WAN_TEXT = 512               # rows of text that Wan's published models read, filled with zeros


def fill_texts(texts, most=512):
    """Prompt embeddings [L, width] padded with zeros to `most` rows each, which take part in
    attention as in Wan's published models: ([B * most, width], cu_seqlens int32 [B + 1])."""
    filled = [F.pad(text, (0, 0, 0, most - len(text))) for text in texts]
    return torch.cat(filled), torch.arange(len(texts) + 1, dtype=torch.int32,
                                           device=texts[0].device) * most


def count_texts(texts, most=512):
    """Like `fill_texts`, but each prompt's rows of zeros are one row that counts as many:
    ([L, width], cu_seqlens int32 [B + 1], counts float32 [L])."""
    left = [most - len(text) for text in texts]
    padded = [F.pad(text, (0, 0, 0, min(1, n))) for text, n in zip(texts, left)]
    counts = [text.new_ones(len(text), dtype=torch.float32) for text in padded]
    for count, n in zip(counts, left):
        count[-1] = max(1, n)
    cu = torch.tensor(np.cumsum([0, *map(len, padded)]), dtype=torch.int32, device=texts[0].device)
    return torch.cat(padded), cu, torch.cat(counts)


def count_keys(k, v, counts):
    """k, v [L, A, E] with 8 further channels, which add the logarithms of `counts` to the scores
    of queries that have ones there: one holds the value, one what its dtype rounds off."""
    log = counts.log()[:, None] * k.shape[2] ** 0.5
    more = torch.cat([log.to(k.dtype), (log - log.to(k.dtype)).to(k.dtype)], 1)
    more = F.pad(more, (0, 6))[:, None].expand(-1, k.shape[1], -1)                   # [L, A, 8]
    return torch.cat([k, more], 2), F.pad(v, (0, 8))


class UViTBlock(nn.Module):
    """A pre-norm layer; with `skip`, the stream is first joined with an earlier block's output."""

    def __init__(self, dim, heads, hidden, bias, skip=False):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(dim, 3 * dim, bias), proj=nn.Linear(dim, dim)))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, hidden), fc2=nn.Linear(hidden, dim)))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x, cu, skip=None):
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))                           # [N, D]
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        x = x + self.attn.proj(attention(q, k, v, cu, cu).flatten(1))                # [N, D]
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class UViT(nn.Module):
    """U-ViT (2209.12152): class or text, time and patches are all tokens of one sequence, and the
    second half of the blocks gets the outputs of the first half, the latest first. size (T', H',
    W'): the grid of the learned positions; a smaller clip takes its first corner. depth // 2
    blocks stand on each side of a middle one; clip: the text's width and number of tokens.
    state_dict() has the published names."""

    def __init__(self, channels, size, patch, dim, depth, heads, hidden=None, classes=0, clip=None,
                 conv=True, qkv_bias=False, time_mlp=False):
        super().__init__()
        self.patch, self.channels = (1, patch, patch), channels
        self.grid = tuple(n // p for n, p in zip(size, self.patch))
        self.extras = 1 + bool(classes) + (clip[1] if clip else 0)
        block = functools.partial(UViTBlock, dim, heads, hidden or 4 * dim, qkv_bias)
        self.pos_embed = nn.Parameter(torch.randn(1, self.extras + math.prod(self.grid), dim) / 50)
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(channels, dim, patch, patch)))
        self.time_embed = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(
            4 * dim, dim)) if time_mlp else nn.Identity()
        self.label_emb = nn.Embedding(classes, dim) if classes else None
        self.context_embed = nn.Linear(clip[0], dim) if clip else None
        self.in_blocks = nn.ModuleList(block() for _ in range(depth // 2))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(skip=True) for _ in range(depth // 2))
        self.norm, self.decoder_pred = nn.LayerNorm(dim), nn.Linear(dim, channels * patch**2)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1) if conv else None
        # positions and Linears: normal 0.02, biases 0; convolutions and labels: torch's own law
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x, t, condition, shapes):
        """x [N, C*P]: noisy tokens of clips of `shapes` [(C, T', H', W')] as `patchify` lays them,
        padding may follow; t [B] on the published scale, 1 to 1000 for latents, 0 to
        999 for pixels; condition: int64 [B] labels, [B, L, width] text, or None, as the model is.
        Returns the noise [N, C*P]. A clip's tokens are label and time, or time and text, then x."""
        cells = [tuple(n // p for n, p in zip(shape[1:], self.patch)) for shape in shapes]
        counts, positions = list(map(math.prod, cells)), self.pos_embed[0]
        time = self.time_embed(sinusoid(t, positions.shape[1]))[:, None]          # [B, 1, D]
        label = [] if self.label_emb is None else [self.label_emb(condition)[:, None]]
        text = [] if self.context_embed is None else [self.context_embed(condition)]
        extras = torch.cat([*label, time, *text], 1) + positions[:self.extras]           # [B, X, D]
        grid, proj = positions[self.extras:].unflatten(0, self.grid), self.patch_embed.proj
        patches = F.linear(x[:sum(counts)], proj.weight.flatten(1), proj.bias).split(counts)
        h = torch.cat([part for extra, patch, (nt, ny, nx) in zip(extras, patches, cells)
                       for part in (extra, patch + grid[:nt, :ny, :nx].flatten(0, 2))])
        lengths, skips = [self.extras + n for n in counts], []
        cu = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=x.device)
        for block in self.in_blocks:
            skips.append(h := block(h, cu))
        h = self.mid_block(h, cu)
        for block in self.out_blocks:
            h = block(h, cu, skips.pop())
        h = torch.cat([clip[self.extras:] for clip in h.split(lengths)])             # [n, D]
        h = self.decoder_pred(self.norm(h)).unflatten(-1, (-1, self.channels))       # [n, P, C]
        h = h.mT.flatten(1)                                  # [n, C*P], as patchify has it
        if self.final_layer is not None:                     # a frame is an image of its batch
            h = patchify([self.final_layer(z.transpose(0, 1)).transpose(0, 1)
                          for z in unpatchify(h, shapes, self.patch)], self.patch)
        return F.pad(h, (0, 0, 0, len(x) - len(h)))


def crop_codes(clips, shape):
    """Crops all of the Clips to one shape, by default the most frequent; smaller ones are left
    out."""
    sizes = [clips.shape[key][1:] for key in clips.keys]
    shape = shape or max(sorted(set(sizes)), key=sizes.count)
    small = [key for key, size in zip(clips.keys, sizes) if any(a < b for a, b in zip(size, shape))]
    text = f"smaller than codes of {'x'.join(map(str, shape))}: {', '.join(small[:8])}"
    if len(small) == len(clips.keys):
        refuse(f"all clips are {text}: choose another --shape")
    if small:
        say(f"{len(small)} of {len(sizes)} clips are left out, {text}" + ", …" * (len(small) > 8))
    clips.keys = sorted(set(clips.keys) - set(small))
    clips.shape |= {key: (1, *shape) for key in clips.keys}


class CodeNorm(nn.Module):
    """VideoGPT's LayerNorm, its 1e-5 outside of the root; a class or text sets gain and bias."""

    def __init__(self, dim, classes, text_dim):
        super().__init__()
        if width := classes or text_dim:
            self.w, self.wb = nn.Linear(width, dim, False), nn.Linear(width, dim, False)
            nn.init.constant_(self.w.weight, classes**-0.5 if classes else 0.0)
        else:
            self.g, self.b = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x, cond):
        gain, bias = (self.g, self.b) if cond is None else (
            1 + self.w(cond)[:, None], self.wb(cond)[:, None])                       # [B, 1, D]
        var, mean = torch.var_mean(x.float(), -1, correction=0, keepdim=True)
        return ((x.float() - mean) * (1e-5 + var.rsqrt()) * gain + bias).to(x.dtype)


class GPTBlock(nn.Module):
    def __init__(self, dim, depth, heads, norm, dropout, attn_dropout):
        super().__init__()
        self.heads, self.dropout, self.attn_dropout = heads, dropout, attn_dropout
        self.pre_attn_norm, self.pre_fc_norm = norm(), norm()
        self.attn = nn.ModuleDict({name: nn.Linear(dim, dim, name == "fc")
                                   for name in ("w_qs", "w_ks", "w_vs", "fc")})
        self.fc_block = nn.ModuleDict({"0": nn.Linear(dim, 4 * dim), "2": nn.Linear(4 * dim, dim)})
        for name, linear in self.attn.items():
            nn.init.normal_(linear.weight, std=(dim * (depth if name == "fc" else 1))**-0.5)

    def forward(self, x, cond, mask, cache, first):
        h, drop = self.pre_attn_norm(x, cond), self.dropout * self.training
        q, k, v = (self.attn[name](h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for name in ("w_qs", "w_ks", "w_vs"))                             # [B, A, L, E]
        if cache is not None:
            cache[:, :, :, first:first + x.shape[1]] = torch.stack([k, v])
            k, v = cache[:, :, :, :first + x.shape[1]]
        h = F.scaled_dot_product_attention(q, k, v, mask, self.attn_dropout * self.training,
                                           is_causal=mask is None and cache is None)
        x = x + F.dropout(self.attn.fc(h.transpose(1, 2).flatten(2)), drop)
        h = self.fc_block["0"](self.pre_fc_norm(x, cond))
        return x + F.dropout(self.fc_block["2"](h * torch.sigmoid(1.702 * h)), drop)


@functools.lru_cache(maxsize=4)
def sparse_mask(shape, device, block=32, local=4):
    """bool [L, L]: which codes (columns) a code sees. Runs of `block` codes form a grid; one sees
    itself, the `local` before it, and earlier ones that differ along one axis, not the last."""
    axis = max(i for i in range(len(shape)) if i == 0 or math.prod(shape[i:]) > block)
    grid = *shape[:axis], math.prod(shape[axis:]) // block
    at = np.stack(np.unravel_index(np.arange(math.prod(grid)), grid), -1)            # [M, axes]
    differs, number = at[:, None] != at, np.arange(len(at))
    seen = (number[:, None] - number <= local) | (differs.sum(-1) == 1) & ~differs[..., -1]
    return torch.from_numpy(seen.repeat(block, 0).repeat(block, 1)).tril().to(device)


class GPT(nn.Module):
    """VideoGPT's prior (2104.10157): predicts each code of a clip, in raster order, from those
    before it. shape (T', H', W'): of the codes, L in all; codes, code_dim: of the codebook, which
    the VQ-VAE owns; dim: a multiple of 3; sparse: by `sparse_mask`. It has the published names.
    text_dim is ours: each norm's gain and bias come from a text instead of a class."""

    patch = (1, 1, 1)

    def __init__(self, shape, codes, code_dim, dim, depth, heads, sparse=False, classes=0,
                 text_dim=0, dropout=0.2, attn_dropout=0.3):
        super().__init__()
        self.shape, self.heads, self.sparse, self.classes = tuple(shape), heads, sparse, classes
        norm = functools.partial(CodeNorm, dim, classes, text_dim)
        self.register_buffer("codebook", torch.zeros(codes, code_dim))
        self.fc_in = nn.Linear(code_dim, dim, False)
        self.attn_stack = nn.ModuleDict(dict(
            right_shift=nn.ParameterDict(dict(sos=0.02 * torch.randn(dim))),
            pos_embd=nn.ModuleDict(dict(emb=nn.ParameterDict(
                {f"d_{i}": 0.01 * torch.randn(n, dim // 3) for i, n in enumerate(shape)}))),
            attn_nets=nn.ModuleList(GPTBlock(dim, depth, heads, norm, dropout,
                                             0 if sparse else attn_dropout) for _ in range(depth))))
        self.norm, self.fc_out = norm(), nn.Linear(dim, codes, False)
        nn.init.normal_(self.fc_in.weight, std=0.02)
        nn.init.zeros_(self.fc_out.weight)

    def run(self, x, first, cond, caches=None):
        """Logits [B, n, K] from the inputs x [B, n, D] of the places first, first + 1, ..."""
        if self.classes:                                     # behind the last one: no class, zeros
            cond = F.one_hot(cond, self.classes + 1)[:, :-1].to(x)
        last = first + x.shape[1]
        index = np.stack(np.unravel_index(np.arange(first, last), self.shape))
        index = moved(torch.from_numpy(index), x.device)
        tables, blocks = self.attn_stack.pos_embd.emb.values(), self.attn_stack.attn_nets
        x = x + torch.cat([table[i] for table, i in zip(tables, index)], -1)
        mask = sparse_mask(self.shape, x.device)[first:last, :last] if self.sparse else None
        for block, cache in zip(blocks, caches or [None] * len(blocks)):
            x = block(x, cond, mask, cache, first)                                   # [B, n, D]
        return self.fc_out(self.norm(x, cond))

    def forward(self, codes, cond=None):
        """codes int64 [B, T', H', W']; cond: labels int64 [B], texts [B, text_dim]
        or None; to logits [B, T', H', W', K]: those at a place are of the code there, given all
        before it."""
        x = self.fc_in(self.codebook[codes.flatten(1)[:, :-1]])                      # [B, L-1, D]
        sos = self.attn_stack.right_shift.sos.to(x).expand(len(codes), 1, -1)
        return self.run(torch.cat([sos, x], 1), 0, cond).unflatten(1, self.shape)

    def losses(self, codes, cond=None):
        """[B, L]: the cross-entropy of each code, in nats."""
        logits = self(codes, cond).flatten(0, -2).float()                            # [B L, K]
        return F.cross_entropy(logits, codes.flatten(), reduction="none").view(len(codes), -1)

    def step(self, previous, position, caches, cond=None):
        """Logits [B, K] of the code at `position` from the one before it [B] (at 0 any) and
        what earlier steps left in `caches`, a list, empty at first: keys and values a block."""
        x = self.fc_in(self.codebook[previous])                                      # [B, D]
        x = x if position else self.attn_stack.right_shift.sos.to(x).expand_as(x)
        if not caches:
            size = 2, len(x), self.heads, math.prod(self.shape), x.shape[1] // self.heads
            caches += [x.new_zeros(size) for _ in self.attn_stack.attn_nets]
        return self.run(x[:, None], position, cond, caches)[:, 0]


def code_losses(model, row, codes, dtype):
    """`losses_of` of codes, in nats; instead of a time their position in raster order, 0 to 1."""
    with torch.autocast(codes.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        losses = model.dit.losses(codes, model.read(row))                            # [B, L]
    n = losses.shape[1]
    position = torch.arange(n, device=codes.device).expand_as(losses) / n
    return losses.mean(1), losses.detach().flatten(), position.flatten()


def code_entropy(codes):
    """The loss, in nats, of predicting the codes' frequencies."""
    counts = codes.bincount().double()
    share = counts[counts > 0] / counts.sum()
    return -(share * share.log()).sum().item()


def check_codes(args, options, vae, name, weights):
    """Refuses a GPT's weights for codes of another autoencoder, and shapes that `sparse` is not
    for."""
    shape = tuple(options["shape"])
    if weights and not torch.equal(weights["dit.codebook"], vae.bottleneck.codebook):
        refuse(f"--init {args.init} was trained on codes of another autoencoder than {name}")
    if options.get("sparse") and len(sparse_mask(shape, "cpu")) != math.prod(shape):
        refuse(f"--model {args.model} sees blocks of 32 codes, and --shape "
               f"{'x'.join(map(str, shape))} is no whole number of them: name another")


def gpt_flops(options, n):
    """(of a block, of codes in and out) multiply-adds of a GPT's forward on clips of n codes each,
    for `step_flops`: codes attend to half of each other or less; texts enter the norms alone."""
    N, D = n.sum(), options["dim"]
    seen = sparse_mask(tuple(options["shape"]), "cpu").sum().item() if options.get(
        "sparse") else n[0] * (n[0] + 1) / 2
    return N * 12 * D**2 + 2 * D * len(n) * seen, N * (options["code_dim"] + options["codes"]) * D


@torch.no_grad()
def generate_codes(model, draws, cond=None, temperature=1.0, progress=iter):
    """Codes int64 [B, T', H', W'], one by one. draws [B, L]: uniform numbers in [0, 1);
    temperature: above 0; progress: what to wrap the loop in, such as tqdm."""
    caches, codes = [], torch.zeros_like(draws, dtype=torch.int64)
    for position in progress(range(draws.shape[1])):
        logits = model.step(codes[:, position - 1], position, caches, cond)                # [B, K]
        below = (logits.float() / temperature).softmax(-1).cumsum(-1)
        codes[:, position] = (below < draws[:, position, None] * below[:, -1:]).sum(-1)
    return codes.unflatten(1, model.shape)


@torch.no_grad()
def sample_codes(model, vae, texts, draws, temperature=1.0, progress=iter):
    """Videos of codes that a prior draws under `texts` (as lay_out takes them), by numbers `draws`
    [B, L] (as generate_codes does); uint8 [T, H, W, 3] of each."""
    row = lay_out([(1, *model.dit.shape)] * len(texts), [None] * len(texts), texts, 1, (1, 1, 1))
    cond = model.read(row.to(draws.device))
    codes = generate_codes(model.dit, draws, cond, temperature, progress)
    return [to_frames(video) for video in vae.decode_codes(codes)]


BLOCKS = (Block, UViTBlock, GPTBlock)


class LoRA(nn.Module):
    """A frozen weight plus B A of low rank (Hu et al. 2021, 2106.09685)."""

    def __init__(self, weight, rank):
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight):
        return weight + self.b @ self.a


def add_lora(model, rank):
    """Freezes the model and adds a LoRA to each matrix of its blocks."""
    model.requires_grad_(False)
    blocks = [m for m in model.dit.modules() if isinstance(m, BLOCKS)]
    for layer in [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]:
        register_parametrization(layer, "weight", LoRA(layer.weight, rank))


def merged(model):
    """The state dict with LoRA merged into the weights."""
    added = {f"{name}.weight": m.weight for name, m in model.named_modules() if is_parametrized(m)}
    return added | {name: value for name, value in model.state_dict().items()
                    if ".parametrizations." not in name}


# Our modules (or tensors) and theirs, without `blocks.N.`; a|b: two or more of theirs, joined, are
# one of ours.
DIT_KEYS = {
    "embed": "x_embedder.proj", "time.0": "t_embedder.mlp.0", "time.2": "t_embedder.mlp.2",
    "classes": "y_embedder.embedding_table", "pos_embed": "pos_embed",
    "modulation": "adaLN_modulation.1", "attn.qkv": "attn.qkv", "attn.out": "attn.proj",
    "up": "mlp.fc1", "down": "mlp.fc2", "head": "final_layer.linear",
    "head_modulation": "final_layer.adaLN_modulation.1",
}
WAN_KEYS = {                    # in Wan's own layout, and in diffusers'
    "embed": ("patch_embedding", "patch_embedding"),
    "time.0": ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    "time.2": ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    "text.0": ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    "text.2": ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    "time_table": ("time_projection.1", "condition_embedder.time_proj"),
    "image.0": ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    "image.1": ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    "image.3": ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    "image.4": ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    "image_place": ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    "head_table": ("head.modulation", "scale_shift_table"), "head": ("head.head", "proj_out"),
    "table": ("modulation", "scale_shift_table"),
    "attn.qkv": ("self_attn.q|k|v", "attn1.to_q|to_k|to_v"),
    "attn.out": ("self_attn.o", "attn1.to_out.0"),
    "attn.q_norm": ("self_attn.norm_q.weight", "attn1.norm_q.weight"),
    "attn.k_norm": ("self_attn.norm_k.weight", "attn1.norm_k.weight"),
    "cross.q": ("cross_attn.q", "attn2.to_q"), "cross.kv": ("cross_attn.k|v", "attn2.to_k|to_v"),
    "cross.kv_image": ("cross_attn.k_img|v_img", "attn2.add_k_proj|add_v_proj"),
    "cross.out": ("cross_attn.o", "attn2.to_out.0"),
    "cross.q_norm": ("cross_attn.norm_q", "attn2.norm_q"),
    "cross.k_norm": ("cross_attn.norm_k", "attn2.norm_k"),
    "cross.k_norm_image": ("cross_attn.norm_k_img", "attn2.norm_added_k"),
    "cross_weight": ("norm3.weight", "norm2.weight"), "cross_bias": ("norm3.bias", "norm2.bias"),
    "up": ("ffn.0", "ffn.net.0.proj"), "down": ("ffn.2", "ffn.net.2"),
}
LAYOUTS = {"embed.weight": "conv", "pos_embed": "batch", "image_place": "batch", "table": "batch",
           "head_table": "batch", "head.weight": "head", "head.bias": "head"}


def their_names(ours, layout):
    """([names of one of our tensors in layout "dit", "wan" or "diffusers"], how it is relaid)."""
    keys = DIT_KEYS if layout == "dit" else {
        name: pair[layout == "diffusers"] for name, pair in WAN_KEYS.items()}
    block, name = re.fullmatch(r"(blocks\.\d+\.)?(.*)", ours).groups("")
    module, end = (name, "") if name in keys else name.rsplit(".", 1)
    stem, dot, last = keys[module].rpartition(".")
    names = [block + stem + dot + one + (end and f".{end}") for one in last.split("|")]
    return names, LAYOUTS.get(name, "")


def relayout(tensor, change, patch, back=False):
    """One tensor from a published layout to ours; or, `back`, the other way, bit for bit."""
    volume = math.prod(patch)
    if change == "conv":                    # a convolution's [D, C, (pt,) ph, pw] is a matrix here
        return tensor.flatten(1)
    if change == "batch":                   # [1, ...]
        return tensor[None] if back else tensor[0]
    if change == "head":                    # theirs run (patch, channel), ours (channel, patch)
        inner = (-1, volume) if back else (volume, -1)
        return tensor.unflatten(0, inner).transpose(0, 1).flatten(0, 1)
    return tensor


def from_published(published, layout, model, path):
    """The state dict of a DiT from that of a published file; refuses keys too many or too few."""
    wanted = to_published(model.state_dict(), layout, model)
    for name, tensor in wanted.items():
        if name not in published:
            refuse(f"{path}: the weights have no {name}: not this kind of model, or not whole")
        if published[name].shape != tensor.shape:
            refuse(f"{path}: {name} is {list(published[name].shape)}, not {list(tensor.shape)}")
    left = [key for key in published if key not in wanted
            and not key.endswith("norm_added_q.weight")]     # diffusers' I2V files hold it, and
    if left:                                                 # nothing reads it
        refuse(f"{path}: the weights hold {min(left)}, which this kind of model has not")
    refuse_nan(published, path)
    state = {}
    for ours in model.state_dict():
        theirs, change = their_names(ours, layout)
        state[ours] = relayout(torch.cat([published[name] for name in theirs]), change, model.patch)
    return state


def to_published(state, layout, model):
    """The inverse: a published file's state dict."""
    patch = model.patch[1:] if layout == "dit" else model.patch
    published, conv_shape = {}, (-1, model.channels, *patch)
    for ours, tensor in state.items():
        theirs, change = their_names(ours, layout)
        merged = relayout(tensor, change, model.patch, back=True)
        merged = merged.view(conv_shape) if change == "conv" else merged
        published.update(zip(theirs, merged.chunk(len(theirs))))
    return published


def count_blocks(state):
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def dit_options(state, heads=None):
    """The options of a DiT or SiT whose published state dict this is: all but the heads can be read
    off it, and these are 64 wide in every published size but XL."""
    dim, channels, patch, _ = state["x_embedder.proj.weight"].shape
    heads = heads or (16 if dim == 1152 else dim % 64 == 0 and dim // 64)
    if not heads or dim % heads:
        refuse(f"a DiT of width {dim} needs --heads: "
               f"{f'{heads} do not divide it' if heads else 'they are not 64 wide'}")
    side = round(state["pos_embed"].shape[1] ** 0.5)
    return dict(
        channels=channels, dim=dim, patch=(1, patch, patch), own_table=True, positions="sincos",
        depth=count_blocks(state), heads=heads, grid=(side, side),
        ffn=len(state["blocks.0.mlp.fc1.bias"]),
        out_channels=len(state["final_layer.linear.bias"]) // patch**2,
        classes=len(state["y_embedder.embedding_table.weight"]))


# Published denoisers: {class: {key of config.json: the class's default}}. Sizes are read off the
# weights too, which decide where a key is left out; the number of heads is nowhere else.
CLASSES = {
    "WanModel": dict(
        model_type="t2v", patch_size=[1, 2, 2], text_len=512, in_dim=16, dim=2048, ffn_dim=8192,
        freq_dim=256, text_dim=4096, out_dim=16, num_heads=16, num_layers=32,
        window_size=[-1, -1], qk_norm=True, cross_attn_norm=True, eps=1e-6),
    "WanTransformer3DModel": dict(
        patch_size=[1, 2, 2], num_attention_heads=40, attention_head_dim=128, in_channels=16,
        out_channels=16, text_dim=4096, freq_dim=256, ffn_dim=13824, num_layers=40,
        cross_attn_norm=True, eps=1e-6, image_dim=0, added_kv_proj_dim=0, pos_embed_seq_len=0)}
MARKED_BY = {"num_attention_heads": "WanTransformer3DModel", "num_heads": "WanModel"}
WAN_SIZES = {                   # of ours: the key of each class
    "patch": ("patch_size", "patch_size"), "channels": ("in_dim", "in_channels"),
    "dim": ("dim", None), "depth": ("num_layers", "num_layers"), "ffn": ("ffn_dim", "ffn_dim"),
    "text_dim": ("text_dim", "text_dim"), "time_width": ("freq_dim", "freq_dim"),
    "out_channels": ("out_dim", "out_channels"), "image_dim": (None, "image_dim"),
    "image_tokens": (None, "pos_embed_seq_len")}
WAN_ONLY = dict(text_len=512, window_size=[-1, -1], qk_norm=True, cross_attn_norm=True, eps=1e-6)


def wan_options(state, config, layout):
    """The options of a Wan denoiser from its tensors, and from its config.json the heads."""
    embed, time_in, text, head, image, position, up = (
        state.get(their_names(ours, layout)[0][0]) for ours in (
            "embed.weight", "time.0.weight", "text.0.weight", "head.bias", "image.0.weight",
            "image_place", "blocks.0.up.weight"))
    missing = [name for name, tensor, axes in (
        ("patch embedding", embed, 5), ("time embedding", time_in, 2), ("text embedding", text, 2),
        ("head's bias", head, 1), ("blocks", up, 2)) if tensor is None or tensor.dim() != axes]
    if missing:
        refuse(f"the weights have no {missing[0]} of a Wan model: not this kind, or not whole")
    patch = tuple(embed.shape[2:])
    return dict(
        channels=embed.shape[1], dim=embed.shape[0], patch=patch, positions="index",
        depth=count_blocks(state), ffn=len(up), text_dim=text.shape[1],
        heads=config.get("num_attention_heads") or config["num_heads"],
        out_channels=len(head) // math.prod(patch),
        image_dim=0 if image is None else len(image),
        time_width=time_in.shape[1],
        image_tokens=0 if position is None else position.shape[1])


def check_wan(options, layout, config, explicit, path):
    """Refuses a config.json that contradicts the weights, or has values that are not supported."""
    for key, value in WAN_ONLY.items():
        if config.get(key, value) != value:
            refuse(f"{path}: {key} {config[key]} is not read here, only {value}")
    for ours, keys in WAN_SIZES.items():
        key, actual = keys[layout == "diffusers"], options[ours]
        if key in explicit and config[key] != (list(actual) if ours == "patch" else actual):
            refuse(f"{path}: {key} is {config[key]}, and the weights have {actual}")
    dim, heads = options["dim"], options["heads"]
    width = config.get("attention_head_dim") if "attention_head_dim" in explicit else dim // heads
    if heads * width != dim or width % 2:
        refuse(f"{path}: {heads} heads of {width} are no width of {dim}, which the weights have, "
               "in heads of an even width")


def uvit_options(state, heads, text_tokens, path):
    """The options of the U-ViT with this published state dict, which does not hold heads (None: of
    width 64, but 72 in the H models) and text_tokens."""
    if not {"pos_embed", "patch_embed.proj.weight", "mid_block.mlp.fc1.weight"} <= set(state):
        refuse(f"{path} is no U-ViT, or not whole: it has no pos_embed, patch_embed or mid_block")
    dim, channels, patch, _ = state["patch_embed.proj.weight"].shape
    heads = heads or (16 if dim == 1152 else dim % 64 == 0 and dim // 64)
    classes, text = len(state.get("label_emb.weight", ())), state.get("context_embed.weight")
    text = None if text is None else (text.shape[1], text_tokens)
    patches = state["pos_embed"].shape[1] - 1 - bool(classes) - (text_tokens if text else 0)
    side = math.isqrt(max(patches, 1))
    if not heads or dim % heads or side**2 != patches:
        refuse(f"{path}: needs --heads ({heads or 'unknown'}; width {dim}) or text_tokens (they "
               f"leave {patches} patches, which must form a square)")
    return dict(
        channels=channels, size=(1, side * patch, side * patch), patch=patch, dim=dim, heads=heads,
        depth=2 * sum(name.endswith(".skip_linear.weight") for name in state), classes=classes,
        clip=text, hidden=len(state["mid_block.mlp.fc1.weight"]),
        conv="final_layer.weight" in state, qkv_bias="mid_block.attn.qkv.bias" in state,
        time_mlp="time_embed.0.weight" in state)


MARK = r"(x_embedder\.proj|mid_block\.mlp\.fc1|patch_embedding)\.weight"

# What DiT's and SiT's trainings say of a network in `args` of their checkpoints, beside its name:
# {option: {its value, in small letters: ours}}. Others change what the network predicts.
TRAINED = {
    "path_type": {"linear": "linear", "gvp": "gvp", "vp": "vp"},
    "prediction": {name: name for name in ("velocity", "noise", "score")},
    "noise_schedule": {"linear": ""}, "predict_xstart": {"false": ""}}
TRAININGS = ("nnet_ema.pth", "*.ckpt/nnet_ema.pth", "ckpts/*.ckpt/nnet_ema.pth", "checkpoints/*.pt")


def trained_by(file, path, options):
    """{"kind": dit or sit, and where it is said "objective", "path", "weighting"} of DiT's and
    SiT's weights: both have the same names. The options of their trainings tell them apart, or
    else the name of the file or of the folders that these make around it."""
    said, left = {}, [file.get(key) for key in ("args", "config", "hparams")]
    while left:                                              # Namespaces, dicts, these nested
        folder = left.pop()
        if not isinstance(folder, dict):
            folder = getattr(folder, "__dict__", {})
        said |= {str(key).replace("-", "_"): value for key, value in folder.items()
                 if isinstance(value, (str, int, float, bool)) or value is None}
        left += [value for value in folder.values() if isinstance(value, (dict, Namespace))]
    name = str(said.get("model") or said.get("model_type") or "")
    named = re.search(r"(?<![a-z])([ds]it)(?![a-z])", name, re.I)
    if name and not named:
        refuse(f"{path} is of model {name[:40]}, which is not read here: DiT and SiT are")
    matches = re.findall(r"(?<![a-z])([ds]it)(?![a-z])", "/".join(path.absolute().parts[-3:]), re.I)
    kind = (named[1] if named else "sit" if "path_type" in said else ["", *matches][-1]).lower()
    if not kind:
        say_once(f"{path} does not say whether it is a DiT or a SiT, and is read as a DiT: of a "
                 "SiT begin the file's name with SiT")
    for key, legal in TRAINED.items():
        if said.get(key) is not None and str(said[key]).lower() not in legal:
            refuse(f"{path} was trained with {key} {str(said[key])[:40]}, which is not read here, "
                   f"only {', '.join(legal)}")
    cells, sides = options["grid"][0] * options["patch"][1], said.get("image_size")
    if sides not in (None, 8 * cells):
        say_once(f"{path} says image_size {sides}, its positions are those of {8 * cells} px, "
                 "which are taken")
    is_fixed = options["out_channels"] == options["channels"]
    if said.get("learn_sigma") not in (None, not is_fixed):
        say_once(f"{path} says learn_sigma {said['learn_sigma']}, the weights have "
                 f"{options['out_channels']} outputs, which are taken")
    read = lambda key, usual: TRAINED[key][str(said.get(key) or usual).lower()]
    settings = {"kind": kind or "dit", "is_said": bool(named) or "path_type" in said}
    if kind == "sit":
        settings |= {"objective": read("prediction", "velocity"),
                     "path": read("path_type", "linear"),
                     "weighting": str(said.get("loss_weight") or "none").lower()}
    return settings


def class_labels(names, n_rows, saved):
    """The labels `names` in the order of their class indices: as `saved`, those of the run to
    resume or to begin with; with a published class table of n_rows, a number is its
    row; else sorted, numbers by value."""
    if saved and names <= {*saved}:
        return saved
    numbers = {label: int(label) for label in sorted(names) if re.fullmatch("[0-9]{1,9}", label)}
    rows = {number: label for label, number in numbers.items() if number < n_rows}
    if strange := rows and sorted(names - {*rows.values()}):
        refuse(f"labels are numbers of the class table's rows, 0 to {n_rows - 1}, but for "
               f"{', '.join(strange[:12])}: rename these, or leave them out (--where)")
    return [rows.get(n, str(n)) for n in range(n_rows)] if rows else sorted(
        names, key=lambda label: (label not in numbers, numbers.get(label, 0), label))


def start_published(args, path):
    """`start_from` of published weights; refuses options that their training contradicts."""
    network, layout, options = load_published(path, args.heads)
    kind = {"dit": args.model.split("-")[0], "uvit": "uvit", "gpt": "gpt"}.get(layout, "wan")
    said = getattr(network, "trained", {})
    if said.get("is_said"):              # by the options of its training
        for name, wanted in (("model", said["kind"]), ("objective", said.get("objective")),
                             ("path", said.get("path"))):
            setting = kind if name == "model" else getattr(args, name)
            if wanted and setting != wanted:
                refuse(f"--init {args.init} was trained with {name} {wanted}, --{name} is "
                       f"{setting}: give --{name} {wanted}")
        weighting = said.get("weighting", args.weighting)
        if said.get("objective") != "velocity" and weighting != args.weighting:
            say_once(f"--init {args.init} was trained with --weighting {weighting}")
    weights = {f"dit.{name}": value for name, value in network.state_dict().items()}
    return {"kind": kind, **options}, layout, weights


def export(args, folder):
    """Writes a run's averaged weights in their published layout."""
    model, _, config = load_denoiser(folder)
    layout, state = config.get("layout"), model.dit.state_dict()
    if layout is None:
        refuse(f"{folder} did not begin with published weights: its own files are safetensors too")
    if layout == "gpt":                  # its file holds the VQ-VAE of its codes
        start = config["args"]["init"]
        while not Path(start).is_file():
            start = read_config(run_dir(start), "denoiser")["args"]["init"]
        state = gpt_state(model.dit, load_gpt(start)[2])
    elif layout != "uvit":
        state = to_published(state, layout, model.dit)
    with atomic(args.export) as path:
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    print(f"{args.export}: {len(state)} tensors as {layout} names them", file=sys.stderr)


def load_published(path, heads=None, text_tokens=77):
    """(network, layout, its options) of published weights: a DiT's or SiT's .pt file (a plain state
    dict, or one of their training checkpoints, of which the average is taken; `trained` of the
    network is what `trained_by` says), a Wan folder in either layout, a U-ViT's .pth, the last
    checkpoint of a training's folder, the checkpoint of a VideoGPT's prior; all in float32. heads,
    text_tokens: what some files do not hold."""
    path, layout = Path(path), "dit"
    if path.is_dir():
        path = max((candidate for form in TRAININGS for candidate in path.glob(form)), default=path,
                   key=lambda candidate: (len(str(candidate)), candidate))
    if path.is_dir():
        refuse_experts(path)
        path = path / "transformer" if (path / "transformer").is_dir() else path
        if not (path / "config.json").is_file():
            refuse(f"{path} is a pipeline without its transformer/: fetch that too" if
                   (path / "model_index.json").is_file() else f"{path} has no config.json: not a "
                   f"published folder, nor a run{lying_in(path)}")
        name, config, explicit = read_class(path / "config.json", CLASSES, lambda config: next(
            (name for key, name in MARKED_BY.items() if key in config), None))
        layout = {"WanModel": "wan"}.get(name, "diffusers")
    file = read_tensors(path)
    if "hyper_parameters" in file:
        model, options, _ = load_gpt(path, file)
        return model, "gpt", options
    state = plain(innermost(file), path, MARK)
    with read_as_config(path):
        if "mid_block.mlp.fc1.weight" in state and layout == "dit":
            options = uvit_options(state, heads, text_tokens, path)
            return filled(UViT, options, state, path), "uvit", options
        if layout == "dit" and "x_embedder.proj.weight" not in state:
            refuse(f"{path} has no x_embedder.proj.weight: no DiT, SiT, U-ViT or VideoGPT's prior" +
                   "; of Wan name the folder" * ("patch_embedding.weight" in state))
        options = (dit_options(state, heads) if layout == "dit" else
                   wan_options(state, config, layout))
    if layout != "dit":
        check_wan(options, layout, config, explicit, path / "config.json")
    with torch.device("meta"):
        model = DiT(**options)
    model.load_state_dict(from_published(state, layout, model, path), assign=True)
    if layout == "dit":
        model.trained = trained_by(file, path, options)
    if model.positions != "sincos":      # buffers that no file holds
        model.freqs, model.axes = rope_frequencies(options["dim"] // options["heads"], 10000.0)
    return model.eval(), layout, options


def refuse_experts(path):
    """Refuses the two networks of Wan 2.2's A14B, in either layout."""
    index = read_published(path / "model_index.json", {})
    second = index.get("transformer_2")
    if (path / "transformer_2").is_dir() or isinstance(second, list) and any(second) or (
            (path / "high_noise_model").is_dir() or (path / "low_noise_model").is_dir()):
        refuse(f"{path} has two networks, for much noise and for little (Wan 2.2 A14B), which is "
               "not read yet: take a Wan of one network, such as TI2V-5B")


def filled(make, options, state, path):
    """make(**options) holding the tensors of `state`, in eval mode; names and shapes must agree."""
    with torch.device("meta"):
        model = make(**options)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        refuse(f"{path}: {error}")
    refuse_nan(state, path)
    return model.eval()


def load_gpt(path, file=None):
    """(GPT, its options, the VQ-VAE's state dict) of a published Lightning .ckpt, or of the `file`
    that was read from it; masks are ignored."""
    file = file or read_tensors(path)
    try:
        state, args = dict(file["state_dict"]), vars(file["hyper_parameters"]["args"])
        codebook = state["vqvae.codebook.embeddings"]
        options = dict(
            shape=tuple(len(state[f"attn_stack.pos_embd.emb.d_{i}"]) for i in range(3)),
            codes=len(codebook), code_dim=codebook.shape[1], dim=args["hidden_dim"],
            depth=args["layers"], classes=args.get("class_cond_dim") or 0, sparse=args["attn_type"]
            == "sparse", **{key: args[key] for key in ("heads", "dropout", "attn_dropout")})
    except (KeyError, TypeError) as error:
        refuse(f"{path} is no checkpoint of VideoGPT's prior: {error}")
    if args.get("n_cond_frames") or any(name.startswith("resnet.") for name in state):
        refuse(f"{path} is conditioned on frames through a ResNet-34: that form does not load here")
    vqvae = {name[6:]: state.pop(name) for name in list(state) if name.startswith("vqvae.")}
    state = {name: x for name, x in state.items() if not name.endswith(".attn.attn.mask")}
    return filled(GPT, options, state | {"codebook": codebook}, path), options, vqvae


def gpt_state(model, vqvae):
    """The published state dict of a GPT with the VQ-VAE whose codes it predicts."""
    state = model.state_dict() | {f"vqvae.{name}": x for name, x in vqvae.items()}
    del state["codebook"]
    for i in range(0 if model.sparse else len(model.attn_stack.attn_nets)):
        mask = torch.ones(math.prod(model.shape), math.prod(model.shape)).tril()
        state[f"attn_stack.attn_nets.{i}.attn.attn.mask"] = mask
    return state


def shape_of(text):
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not T'xH'xW', such as 4x32x32")
    return list(map(int, text.split("x")))                   # as config.json has it


if __name__ == "__main__":
    script(main)
