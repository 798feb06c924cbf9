"""Stage 3, captions: a captioner, learnt from the captioned clips, that captions the others.

In:   data/NAME/ as prepare_data.py left it.
Out:  runs/NAME-captioner/  (--train) config.json, tokenizer.json (byte-level BPE of the captions),
                            log.jsonl, samples/ (held-out frames and what it says), step-000100/
      data/NAME/shard-00000.captions-RUN.jsonl   one row a clip {"key", "caption", "prompt",
                            "scores": {"logprob": mean over the tokens}}; data/NAME/captions-RUN.png
      data/NAME/shard-00000.text-HASH8.safetensors   (encode_captions) the captions as a published
                            text encoder reads them; HASH8 names the encoder

The idea: a vision tower turns frames into tokens, a connector turns these into the decoder's width,
and a decoder reads them as the beginning of its text and goes on with the caption. Two things make
it learn from some hundred clips in two minutes: a second loss asks of the visual tokens alone which
words the caption holds (the strongest token answers), and a share of the words that the decoder
reads is blanked, so that it has to look instead of remembering. The same loss without the words'
share, or with AdamW in place of Muon, leaves the tower far behind (README, what did not help).

Frames: --model says how many. They are spread evenly from a clip's first frame to its last (a still
is repeated), scaled to fit a square, bicubic, their shape kept, centred on black. For training
they are spread over a random 70 to 100% of the clip, zoomed, shifted, tinted and made noisy, all
frames of a clip alike; never mirrored, since a caption may say left or right.

    python caption.py demo --train               # two minutes on two cores, after prepare_data.py
    python caption.py demo                       # captions the clips that have none: seconds
    python caption.py demo --train --run quick --steps 20                # a look, under a minute
    torchrun --nproc_per_node 8 caption.py mine --train --model captioner-s

A clip's own captions are those of the data set's metadata. What captioners wrote is never learnt
from, and --vlm OTHER captions the same clips again, into files of its own. A run that is killed
goes on with the same command; a shard that is done is left alone until its file is removed.

Axes: B clips, n frames of a clip, S their side in px, N visual tokens, L text tokens, D width,
A heads, E head dim. Layers are pre-norm; rotary positions count all visual tokens as one place.
Papers: Vaswani 2017 (1706.03762); Dosovitskiy 2020 (ViT, 2010.11929); Xiao 2021 (convolutional
stems, 2106.14881); Liu 2023 (visual tokens as a prefix, 2304.08485); Fang 2014 (words from regions,
1411.4952); Su 2021 (rotary positions, 2104.09864); Ainslie 2023 (grouped queries, 2305.13245);
Raffel 2019 (T5, 1910.10683); Chung 2023 (UMT5, 2304.09151); Radford 2021 (CLIP, 2103.00020).
"""
import functools
import hashlib
import html
import json
import math
import os
import re
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from kernels.attention import attention
from prepare_data import (atomic, clip_frames, contact_sheet, dataset_dir, json_line, number,
                          open_dataset, refuse, rng, run_dir)
from train_vae import (RUN_FORMAT, Linear, MuonAdamW, Stream, barrier, fit, is_finished, last_step,
                       load_step, lr_at, option_parser, optimizer_tensors, prefetch, read_config,
                       read_header, read_tensors, restore_optimizer, setup, skip_clips, start_run,
                       take_step, training_options)

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ["<pad>", "<bos>", "<eos>"]
MODELS = {  # frames: side in px, number; tubelet: frames, px; stem: channels, blocks; layers
    "captioner-xs": dict(size=48, frames=4, t_patch=4, patch=8, channels=64, blocks=2, width=128,
                         heads=4, tower_depth=1, depth=2),
    "captioner-s": dict(size=112, frames=8, t_patch=2, patch=16, channels=96, blocks=3, width=384,
                        heads=6, tower_depth=6, depth=6),
}

# ------------------------------------------------------------------------------------------------
# Text
# ------------------------------------------------------------------------------------------------


def train_tokenizer(texts, vocab_size):
    """Byte-level BPE learnt from `texts` (an iterable of str): a tokenizers.Tokenizer of at most
    `vocab_size` tokens. Ids 0, 1, 2 are <pad>, <bos>, <eos>; every byte is a token, so any UTF-8
    text survives encode and decode. The ids depend on the texts alone, not on their order. Raises
    ValueError for a vocabulary too small to hold every byte."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    least = len(SPECIAL) + len(alphabet)
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size}: at least {least}, for every byte and 3 marks")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=sorted(alphabet))
    tokenizer.train_from_iterator(sorted(texts), trainer)
    # The marks keep their ids but are no 'added tokens': a caption that spells "<eos>" is text.
    plain = json.loads(tokenizer.to_str()) | {"added_tokens": []}
    return tokenizers.Tokenizer.from_str(json.dumps(plain))


def encode(tokenizer, text, most):
    """Ids of a caption with its marks; of a text of over `most` tokens the first `most`, no end."""
    ids = tokenizer.encode(text).ids
    return [BOS, *ids, EOS] if len(ids) <= most else [BOS, *ids[:most]]


def pad(lists):
    """int64 [B, L] of B lists of ids."""
    return nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in lists], True, PAD)


# ------------------------------------------------------------------------------------------------
# One transformer layer for all
# ------------------------------------------------------------------------------------------------


ACTS = {"gelu": F.gelu, "gelu_new": functools.partial(F.gelu, approximate="tanh"), "silu": F.silu,
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


@dataclass(frozen=True)
class Stack:
    """The shape of a stack of transformer layers; a published family is one such row."""
    width: int
    depth: int
    heads: int
    kv_heads: int = 0           # 0: as many as heads
    ffn: int = 0                # hidden width of the MLP; 0: 4 * width
    norm: str = "ln"            # "ln" or "rms"
    glu: bool = False           # a gated MLP, or a plain one
    causal: bool = False
    rope: float = 1e4           # base of the rotary positions; models that add positions use none
    eps: float = 1e-5
    act: str = "gelu"           # of the MLP, by its published name: a key of ACTS
    head: int = 0               # head dim; 0: width / heads
    bias: bool = True           # of the linear layers
    scale: float | None = None  # of the attention's scores; None: head dim^-0.5

    def __post_init__(self):
        heads, shared = self.heads, self.kv_heads or self.heads
        if (not self.head and self.width % (2 * heads)) or heads % shared:
            raise ValueError(f"width {self.width}, heads {heads}, kv_heads {self.kv_heads}: heads "
                             "must cut width into even parts, and kv_heads must divide heads")
        if self.act not in ACTS:
            raise ValueError(f"activation {self.act} is not one of {', '.join(sorted(ACTS))}")

    @property
    def head_dim(self):
        return self.head or self.width // self.heads

    def layers(self):
        return nn.ModuleList(Layer(self) for _ in range(self.depth))

    def make_norm(self):
        return (nn.RMSNorm if self.norm == "rms" else nn.LayerNorm)(self.width, eps=self.eps)


def rotary(positions, stack):
    """(cos, sin), each [..., E/2], of the angles at positions [...]: base^(-2i/E) a step."""
    i = torch.arange(0, stack.head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() * stack.rope ** (-i / stack.head_dim)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """x [..., A, E] turned: feature i pairs with i + E/2 (Llama's layout)."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[..., None, :].to(x.dtype), sin[..., None, :].to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Layer(nn.Module):
    """A pre-norm transformer layer: attention, then an MLP."""

    def __init__(self, stack):
        super().__init__()
        self.stack, width, ffn = stack, stack.width, stack.ffn or 4 * stack.width
        inner = stack.heads * stack.head_dim
        shared = (stack.kv_heads or stack.heads) * stack.head_dim
        linear = functools.partial(nn.Linear, bias=stack.bias)
        self.norm1, self.norm2 = stack.make_norm(), stack.make_norm()
        self.q, self.k, self.v = linear(width, inner), *(linear(width, shared) for _ in "kv")
        self.out = linear(inner, width)
        self.gate = linear(width, ffn) if stack.glu else None
        self.up, self.down = linear(width, ffn), linear(ffn, width)

    def attend(self, x, turn, cu, cache, bias):
        q, k, v = (f(x).unflatten(-1, (-1, self.stack.head_dim)) for f in (self.q, self.k, self.v))
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)                    # [B, N, A or KV, E]
        if cu is not None:                                               # packed: [L, A or KV, E]
            k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], 1) for y in (k, v))
            return self.out(attention(q, k, v, cu, cu, self.stack.scale).flatten(1))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.add(self, k, v)
        if bias is not None:                                             # scores in float32, too
            q, k, v = q.float(), k.float(), v.float()
        # One new query sees all that the cache holds; several are a text's beginning: a square.
        o = F.scaled_dot_product_attention(q, k, v, bias, scale=self.stack.scale,
                                           is_causal=self.stack.causal and q.shape[2] > 1,
                                           enable_gqa=q.shape[1] != k.shape[1])
        return self.out(o.transpose(1, 2).flatten(2).to(x.dtype))

    def forward(self, x, turn=None, cu=None, cache=None, bias=None):
        """x [B, N, D], or [L, D] packed with cu int32 [B+1]; turn: the positions' (cos, sin);
        bias: float32 [B or 1, A, N, N], added to the attention's scores."""
        x = x + self.attend(self.norm1(x), turn, cu, cache, bias)
        h, act = self.norm2(x), ACTS[self.stack.act]
        h = act(self.up(h)) if self.gate is None else act(self.gate(h)) * self.up(h)
        return x + self.down(h)


class Cache:
    """Keys and values of a stack of layers, [B, KV, room, E] each, laid out once for all tokens."""

    def __init__(self, stack, batch, room, like):
        shape = 2, batch, stack.kv_heads or stack.heads, room, stack.head_dim
        self.shape, self.like, self.kept, self.filled = shape, like, {}, 0

    def add(self, layer, k, v):
        """Puts k, v [B, KV, new, E] after what is there; returns views of all, [B, KV, all, E]."""
        if layer not in self.kept:
            self.kept[layer] = self.like.new_zeros(self.shape)
        both, end = self.kept[layer], self.filled + k.shape[2]
        both[0, :, :, self.filled:end], both[1, :, :, self.filled:end] = k, v
        return both[0, :, :, :end], both[1, :, :, :end]


def initialise(model, depth):
    """Initial values, drawn from torch's generator in the order of the modules.

    module                              | law    | std
    nn.Embedding                        | normal | 1
    nn.Linear, nn.Conv2d                | normal | fan_in^-0.5
    out and down of a Layer             | normal | (2 * depth * fan_in)^-0.5
    position                            | normal | 0.02
    head, words                         | zero   |
    biases 0; the norms' weights 1
    """
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            scale = 0 if last in ("head", "words") else 1
            fan_in = module.weight[0].numel() * (2 * depth if last in ("out", "down") else 1)
            nn.init.normal_(module.weight, std=scale * fan_in**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, p in model.named_parameters():
        if name.endswith("position"):
            nn.init.normal_(p, std=0.02)


class TextTower(nn.Module):
    """A small bidirectional transformer over packed texts, trained with the denoiser that reads it.

    ids int64 [L], texts end to end; cu int32 [B+1], their bounds -> [L, width]. Positions (rotary)
    start again with each text, and no text sees another. Tokens past cu[-1] are padding that
    nothing sees. An empty prompt is one token, EOS."""

    def __init__(self, vocab, width, depth, heads):
        super().__init__()
        self.stack = Stack(width, depth, heads)
        self.embed = nn.Embedding(vocab, width)
        self.layers, self.norm = self.stack.layers(), self.stack.make_norm()
        initialise(self, depth)

    def forward(self, ids, cu):
        place = torch.arange(len(ids), device=ids.device, dtype=cu.dtype)
        text = torch.searchsorted(cu[1:], place, right=True).clamp(max=len(cu) - 2)
        turn = rotary(place - cu[text], self.stack)
        x = self.embed(ids)                                              # [L, D]
        for layer in self.layers:
            x = layer(x, turn, cu)                                       # [L, D]
        return self.norm(x)


# ------------------------------------------------------------------------------------------------
# The captioner
# ------------------------------------------------------------------------------------------------


class PixelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position of [B, C, H, W]."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """A residual convolution."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.wide = PixelNorm(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + self.down(F.gelu(self.wide(self.norm(x))))


class Tower(nn.Module):
    """Frames float [B, n, 3, S, S] to tokens [B, N, D], N = n / t_patch * (S / patch)^2.

    Each frame alone goes through convolutions at half the patch's size, and only then do t_patch
    frames become one tubelet: what a thing looks like is learnt from every frame, how it moves from
    their order. (Pixels of all frames stacked at the start: forms were learnt at half the pace.)"""

    def __init__(self, stack, size, frames, t_patch, patch, channels, blocks):
        super().__init__()
        self.t_patch, step = t_patch, patch // 2
        self.stem = nn.Conv2d(3, channels, 2 * step - 1, step, padding=step // 2)
        self.blocks = nn.Sequential(*[Block(channels) for _ in range(blocks)], PixelNorm(channels))
        self.tubelets = nn.Conv2d(t_patch * channels, stack.width, 3, 2, padding=1)
        tokens = frames // t_patch * (size // patch)**2
        self.position = nn.Parameter(torch.empty(tokens, stack.width))
        self.layers, self.norm = stack.layers(), stack.make_norm()

    def forward(self, frames):
        B, n = frames.shape[:2]
        x = frames.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = self.blocks(self.stem(x))                                    # [B n, C, 2S/p, 2S/p]
        x = self.tubelets(x.reshape(B * n // self.t_patch, -1, *x.shape[2:]))
        x = x.flatten(2).transpose(1, 2).reshape(B, -1, x.shape[1])      # [B, N, D]
        x = x + self.position
        for layer in self.layers:
            x = layer(x)                                                 # [B, N, D]
        return self.norm(x)


class Decoder(nn.Module):
    """A causal language model over vectors: embedded tokens, or whatever is to be read first."""

    def __init__(self, stack, vocab):
        super().__init__()
        self.stack, self.embed = stack, nn.Embedding(vocab, stack.width)
        self.layers, self.norm = stack.layers(), stack.make_norm()
        self.head = nn.Linear(stack.width, vocab, bias=False)

    def forward(self, x, positions, cache=None):
        """x [B, L, D] at positions [L] -> hidden states [B, L, D], ready for `head`."""
        turn = rotary(positions, self.stack)
        for layer in self.layers:
            x = layer(x, turn, cache=cache)                              # [B, L, D]
        if cache is not None:
            cache.filled += x.shape[1]
        return self.norm(x)


class Captioner(nn.Module):
    """Frames float [B, n, 3, S, S] and the beginning of a caption -> the next token, at each."""

    def __init__(self, size, frames, t_patch, patch, channels, blocks, width, heads, tower_depth,
                 depth, vocab):
        super().__init__()
        self.tower = Tower(Stack(width, tower_depth, heads), size, frames, t_patch, patch, channels,
                           blocks)
        self.connector = nn.Sequential(Linear(width, width), nn.GELU(), Linear(width, width))
        self.decoder = Decoder(Stack(width, depth, heads, causal=True), vocab)
        self.words = nn.Linear(width, vocab)
        initialise(self, tower_depth + depth)

    def positions(self, n_visual, n_text):
        """All visual tokens stand at place 0, so that what is read first is looked up by what it
        shows and not by where it stands in the list; the text counts 1, 2, …"""
        places = torch.arange(n_visual + n_text, device=self.words.weight.device)
        return (places - n_visual + 1).clamp(min=0)

    def forward(self, frames, ids):
        """ids int64 [B, L] -> logits of the next tokens [B, L, vocab]; and of which tokens the
        caption holds, by the visual tokens alone, [B, vocab]: the most certain one answers."""
        seen = self.tower(frames)                                        # [B, N, D]
        x = torch.cat([self.connector(seen), self.decoder.embed(ids)], 1)
        x = self.decoder(x, self.positions(seen.shape[1], ids.shape[1]))[:, seen.shape[1]:]
        return self.decoder.head(x), self.words(seen).amax(1)

    @torch.no_grad()
    def generate(self, frames, most):
        """The likeliest next token, up to `most` times: [(ids, mean log-probability)] a clip."""
        x = self.connector(self.tower(frames))
        B, N = x.shape[:2]
        ids = torch.full((B, 1), BOS, device=x.device)
        cache, positions = Cache(self.decoder.stack, B, N + most, x), self.positions(N, most)
        x, start = torch.cat([x, self.decoder.embed(ids)], 1), 0
        is_done = torch.zeros(B, dtype=torch.bool, device=x.device)
        total, count = x.new_zeros(B), x.new_zeros(B)
        for _ in range(most):
            h = self.decoder(x, positions[start:start + x.shape[1]], cache)[:, -1]
            start += x.shape[1]
            best, token = self.decoder.head(h).log_softmax(-1).max(-1)
            total, count = total + best * ~is_done, count + ~is_done
            token = token.masked_fill(is_done, EOS)
            is_done |= token == EOS
            ids, x = torch.cat([ids, token[:, None]], 1), self.decoder.embed(token)[:, None]
            if is_done.all():
                break
        rows = ([i for i in row[1:] if i != EOS] for row in ids.tolist())
        return list(zip(rows, (total / count).tolist()))


# ------------------------------------------------------------------------------------------------
# What it looks at
# ------------------------------------------------------------------------------------------------


def spread(n, n_frames, start=0.0, stop=1.0):
    """Numbers of n frames, evenly from `start` to `stop` (shares) of a clip of n_frames."""
    return np.rint(np.linspace(start, stop, n) * (n_frames - 1)).astype(int)


def letterbox(frame, size):
    """uint8 [H, W, 3] scaled to fit a square of `size` px, shape kept, centred on black."""
    H, W = frame.shape[:2]
    h, w = (max(1, round(size * side / max(H, W))) for side in (H, W))
    square, top, left = np.zeros((size, size, 3), np.uint8), (size - h) // 2, (size - w) // 2
    small = Image.fromarray(frame).resize((w, h), Image.Resampling.BICUBIC)
    square[top:top + h, left:left + w] = np.asarray(small)
    return square


class Frames:
    """Clips as the captioner sees them: of each at most 4 n frames, evenly spread, in squares.
    The last ones used are kept, as many as fit `mib`."""

    def __init__(self, folder, rows, size, n, mib=1024):
        self.folder, self.rows = folder, {row["key"]: row for row in rows}
        self.size, self.n = size, n
        room = int(mib * 2**20 / (4 * n * size * size * 3))
        self.load = functools.lru_cache(maxsize=room)(self.load)

    def load(self, key):
        """uint8 [K, S, S, 3]"""
        row = self.rows[key]
        wanted = set(spread(min(4 * self.n, row["frames"]), row["frames"]).tolist())
        return np.stack([letterbox(frame, self.size)
                         for frame in clip_frames(self.folder, row, wanted)])

    def __call__(self, key, start=0.0, stop=1.0):
        """uint8 [n, S, S, 3] from a part of the clip, given in shares of its length."""
        frames = self.load(key)
        return frames[spread(self.n, len(frames), start, stop)]


def normalise(x):
    """Levels 0..1 to about -1..2; black, the letterbox, is -1.2."""
    return (x - 0.4) * 3


def to_input(frames):
    """uint8 [B, n, S, S, 3] to what the tower takes, float [B, n, 3, S, S]."""
    return normalise(frames.movedim(-1, -3).float() / 255)


def draw_jitter(random, strength):
    """How a clip is varied, alike in all its frames: float32 [8] of log zoom, shift x, y (half
    sides), log gain, level, and a tint of red, green, blue (normalised levels)."""
    most = np.array([0.3, 0.25, 0.25, 0.2, 0.2], np.float32)
    draws = [random.uniform(-1, 1, 5) * most, random.standard_normal(3) * 0.2]
    return strength * np.concatenate(draws).astype(np.float32)


def vary(frames, jitter):
    """uint8 [B, n, S, S, 3], varied by jitter [B, 8], as the tower takes it."""
    B, n, S = frames.shape[:3]
    zoom, zero = (-jitter[:, 0]).exp(), torch.zeros_like(jitter[:, 0])
    turn = torch.stack([zoom, zero, jitter[:, 1], zero, zoom, jitter[:, 2]], 1).view(B, 2, 3)
    grid = F.affine_grid(turn, (B, 1, S, S), align_corners=False)
    x = frames.movedim(-1, -3).flatten(1, 2).float() / 255               # [B, 3 n, S, S]
    x = normalise(F.grid_sample(x, grid, align_corners=False)).view(B, n, 3, S, S)
    light = (jitter[:, 4:5] + jitter[:, 5:]).view(B, 1, 3, 1, 1)
    return x * jitter[:, 3].exp().view(B, 1, 1, 1, 1) + light


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    keys: list              # B keys of clips
    frames: torch.Tensor    # uint8 [B, n, S, S, 3]
    jitter: torch.Tensor    # float [B, 8]
    noise: torch.Tensor     # float [B, n, 3, S, S], standard normal
    ids: torch.Tensor       # int64 [B, L + 1]
    blank: torch.Tensor     # bool [B, L]: the decoder reads PAD there

    def to(self, device):
        return Batch(self.keys, *(tensor.to(device) for tensor in self[1:]))


def draw_batch(rows, frames, texts, args, step):
    """The clips of a step, every draw keyed by the seed, its purpose, the step and the clip."""
    views, jitters, noises, ids, blanks = [], [], [], [], []
    for row in rows:
        def random(purpose, key=row["key"]):
            return rng(args.seed, purpose, step, key)
        start = random("window")
        part = 1 - 0.3 * min(1, args.vary) * start.random()
        start = (1 - part) * start.random()
        views.append(frames(row["key"], start, start + part))
        jitters.append(draw_jitter(random("jitter"), args.vary))
        noises.append(random("noise").standard_normal(views[-1].shape, np.float32))
        weights = np.array([caption["weight"] for caption in row["captions"]])
        picked = random("caption").choice(len(weights), p=weights / weights.sum())
        ids.append(texts(row["captions"][picked]["text"]))
        blanks.append(torch.from_numpy(random("blank").random(len(ids[-1]) - 1) < args.blank))
    noise = torch.from_numpy(np.stack(noises)).movedim(-1, -3)
    return Batch([row["key"] for row in rows], torch.from_numpy(np.stack(views)),
                 torch.from_numpy(np.stack(jitters)), noise, pad(ids),
                 nn.utils.rnn.pad_sequence(blanks, True))


def losses(model, x, ids, blank=None):
    """(Caption loss, summed over all tokens; words' loss, summed over clips and vocabulary), nats.
    x float [B, n, 3, S, S], as the tower takes it; ids int64 [B, L + 1]; blank bool [B, L]."""
    read, wanted = ids[:, :-1], ids[:, 1:]
    if blank is not None:
        read = read.masked_fill(blank & (read != BOS), PAD)
    logits, words = model(x, read)
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=PAD,
                           reduction="sum")
    holds = torch.zeros_like(words).scatter_(1, wanted, 1.0)
    holds[:, :len(SPECIAL)] = 0
    about = F.binary_cross_entropy_with_logits(words, holds, reduction="sum")
    return torch.stack([loss, about])


def own_captions(folder, rows):
    """The rows with the metadata's captions alone: those that a captioner wrote are left out."""
    written = {path.name.split(".captions-", 1)[1][:-len(".jsonl")]
               for path in Path(folder).glob("shard-*.captions-*.jsonl")}
    return [{**row, "captions": [c for c in row["captions"] if c["source"] not in written]}
            for row in rows]


def open_tokenizer(path, texts=None, vocab=None):
    """The run's tokenizer; made of `texts` where the file is not there yet, given these."""
    if texts is not None and not path.exists():
        with atomic(path) as part:
            train_tokenizer(texts, vocab).save(str(part))
    barrier()
    if not path.exists():
        refuse(f"{path} is missing: train the run (again)")
    return tokenizers.Tokenizer.from_file(str(path))


def word_prior(model, texts):
    """The words' bias starts at the log-odds of their shares of captions; from zero it would take
    most of the run to get there."""
    vocab = model.words.out_features
    counts = torch.stack([torch.bincount(torch.tensor(ids), minlength=vocab) > 0 for ids in texts])
    share = counts.double().mean(0).clamp(0.5 / len(texts), 1 - 0.5 / len(texts))
    with torch.no_grad():
        model.words.bias.copy_(torch.logit(share))


@torch.no_grad()
def held_out_loss(model, rows, frames, texts, size=64):
    """Nats a token over held-out clips as they are, each with its first caption."""
    total, count, device = 0.0, 0, model.words.weight.device
    for i in range(0, len(rows), size):
        part = rows[i:i + size]
        x = torch.from_numpy(np.stack([frames(row["key"]) for row in part])).to(device)
        ids = pad([texts(row["captions"][0]["text"]) for row in part]).to(device)
        total += losses(model, to_input(x), ids)[0].item()
        count += (ids[:, 1:] != PAD).sum().item()
    return total / count


def describe(model, tokenizer, x, most):
    """[(caption, mean log-probability)] of frames uint8 [B, n, S, S, 3]."""
    x = to_input(x.to(model.words.weight.device))
    return [(tokenizer.decode(ids).strip(), score) for ids, score in model.generate(x, most)]


def write_sheet(path, folder, rows, captions):
    """Four frames of each clip above its caption."""
    contact_sheet(path, [
        (list(clip_frames(folder, row, set(spread(4, row["frames"]).tolist()))), caption)
        for row, caption in zip(rows, captions)])


def train(args, run):
    rank, world, device = setup(args, args.batch, "--batch")
    folder = dataset_dir(args.name)
    rows = skip_clips(own_captions(folder, open_dataset(folder)), args.skip_clips)
    rows = [row for row in rows if row["captions"]]
    learnt = [row for row in rows if row["split"] == "train"]
    if not learnt:
        refuse(f"{folder} has no captioned clip in its training split: give prepare_data.py --meta")
    held_out = [row for row in rows if row["split"] != "train"] or learnt[:16]
    held_out = Stream(held_out, args.seed).take(0, min(len(held_out), 256))
    checkpoint = start_run(run, {"kind": "captioner", "args": vars(args),
                                 "model": MODELS[args.model]})
    sheet = run / "samples" / f"step-{args.steps:06d}.png"
    if is_finished(checkpoint, args) and sheet.exists():
        return
    tokenizer = open_tokenizer(run / "tokenizer.json", [c["text"] for row in learnt
                                                        for c in row["captions"]], args.vocab)
    texts = functools.lru_cache(maxsize=2**16)(lambda t: encode(tokenizer, t, args.max_tokens))
    torch.manual_seed(args.seed)
    model, step = Captioner(**MODELS[args.model], vocab=tokenizer.get_vocab_size()).to(device), 0
    optimizer = MuonAdamW(model, plain=("head", "words", "position", "stem"))
    if checkpoint:
        step, saved = load_step(checkpoint)
        model.load_state_dict(saved["model"])
        restore_optimizer(optimizer, model, saved["optimizer"])
    captions = [texts(c["text"]) for row in learnt for c in row["captions"]]
    if not checkpoint:
        word_prior(model, captions)
    # a caption's loss is its tokens' sum over this constant: long captions count for what they hold
    length = sum(len(ids) - 1 for ids in captions) / len(captions)
    frames = Frames(folder, learnt + held_out, MODELS[args.model]["size"],
                    MODELS[args.model]["frames"])
    stream = Stream(learnt, args.seed)
    print(f"{run}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, "
          f"{len(learnt)} captioned clips to learn from, {len(held_out)} held out, {device}",
          file=sys.stderr)

    def batch(step):
        picked = stream.take(step * args.batch, args.batch)[rank::world]
        return draw_batch(picked, frames, texts, args, step)

    def learn(step, drawn):
        keys, view, jitter, noise, ids, blank = drawn.to(device)
        x = vary(view, jitter) + 0.15 * args.vary * noise
        loss, words = losses(model, x, ids, blank) / (args.batch * length)
        (loss + args.words * words).backward()
        norm = take_step(model, optimizer, lr_at(step, args))
        return {"loss": loss.detach(), "words": words.detach()}, norm, keys

    fit(args, run, step, batch, learn,
        lambda done: {"held_out": held_out_loss(model, held_out, frames, texts)},
        lambda: {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer, model)})
    if rank == 0 and not sheet.exists():
        shown = held_out[:24]
        x = torch.from_numpy(np.stack([frames(row["key"]) for row in shown]))
        write_sheet(sheet, folder, shown,
                    [text for text, _ in describe(model, tokenizer, x, args.max_tokens)])
    barrier()


# ------------------------------------------------------------------------------------------------
# Captioning
# ------------------------------------------------------------------------------------------------


def load_captioner(name, device="cpu"):
    """(model in eval mode, tokenizer, config) of a trained run's newest checkpoint."""
    run = run_dir(name)
    config, step = read_config(run, "captioner"), last_step(run)
    if step is None or int(step.name[len("step-"):]) < config["args"]["steps"]:
        refuse(f"{run} has not finished training: run its caption.py --train command again")
    tokenizer = open_tokenizer(run / "tokenizer.json")
    model = Captioner(**config["model"], vocab=tokenizer.get_vocab_size())
    model.load_state_dict(load_file(step / "model.safetensors"))
    return model.to(device).eval().requires_grad_(False), tokenizer, config


def holds(path, keys):
    """Whether a finished file of captions holds all of `keys`."""
    if not path.exists():
        return not keys
    with open(path, encoding="utf-8") as file:
        return set(keys) <= {json.loads(line)["key"] for line in file}


def resume(part, keys, block):
    """Cuts a .part file to the whole blocks of clips that it holds, in the order of `keys`, and
    returns how many clips these are. Blocks stay as they were, so that a resumed file has the same
    bytes; a torn last line goes, and so does a file that was begun for other clips."""
    n, lines = 0, part.read_bytes().split(b"\n")[:-1] if part.exists() else []
    for line, key in zip(lines, keys):
        try:
            if json.loads(line)["key"] != key:
                break
        except ValueError:
            break
        n += 1
    n = n if n == len(keys) else n - n % block
    if part.exists():
        os.truncate(part, sum(len(line) + 1 for line in lines[:n]))
    return n


def caption_shard(model, tokenizer, config, folder, rows, path, args, bar):
    """Writes the captions of one shard's `rows` to `path`, by way of path.part."""
    part, keys = Path(f"{path}.part"), [row["key"] for row in rows]
    shape, most = config["model"], config["args"]["max_tokens"]
    frames = Frames(folder, rows, shape["size"], shape["frames"], mib=0)
    first = resume(part, keys, args.batch)
    bar.update(first)
    blocks = [keys[i:i + args.batch] for i in range(first, len(keys), args.batch)]

    def load(i):
        return torch.from_numpy(np.stack([frames(key) for key in blocks[i]]))

    with open(part, "a", encoding="utf-8") as file:
        for i, x in prefetch(load, 0, len(blocks)):
            for key, (text, score) in zip(blocks[i], describe(model, tokenizer, x, most)):
                file.write(json_line({"key": key, "caption": text, "prompt": "",
                                      "scores": {"logprob": round(score, 4)}}))
            file.flush()
            bar.update(len(blocks[i]))
        os.fsync(file.fileno())
    os.replace(part, path)


def caption(args):
    rank, world, device = setup(args)
    folder, vlm = dataset_dir(args.name), args.vlm or f"{Path(args.name).name}-captioner"
    rows, run = own_captions(folder, open_dataset(folder)), run_dir(vlm).name
    model, tokenizer, config = load_captioner(vlm, device)
    shards = {}
    for row in rows:
        if args.all or not row["captions"]:
            shards.setdefault(row["shard"], []).append(row)
    sheet, todo = folder / f"captions-{run}.png", []
    for shard in sorted(shards)[rank::world]:
        path = folder / f"{shard}.captions-{run}.jsonl"
        if not holds(path, [row["key"] for row in shards[shard]]):
            todo.append((path, shards[shard]))
    wanted = [row for shard in sorted(shards) for row in shards[shard]]
    with tqdm(total=sum(len(mine) for _, mine in todo), desc="caption", unit="clip",
              disable=rank > 0) as bar:
        for path, mine in todo:
            caption_shard(model, tokenizer, config, folder, mine, path, args, bar)
    barrier()
    if rank == 0 and wanted and (todo or not sheet.exists()):
        texts = {}
        for shard in shards:
            with open(folder / f"{shard}.captions-{run}.jsonl", encoding="utf-8") as file:
                texts.update((row["key"], row["caption"]) for row in map(json.loads, file))
        shown = Stream(wanted, 0).take(0, min(36, len(wanted)))
        write_sheet(sheet, folder, shown, [texts[row["key"]] for row in shown])
    if rank == 0:
        print(f"{folder}: {len(wanted)} clips captioned by {run}; look at {sheet}", file=sys.stderr)


# ================================================================================================
# Published models, strictly by their published names. First: T5 v1.1, UMT5 and CLIP read text
# ================================================================================================


def read_published(path):
    """The object in a published JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        refuse(f"{path} is missing, or holds no JSON")


def load_strictly(model, weights, patterns, ignored, dtype, device, where):
    """Gives `model`, made on the meta device, its published weights. `patterns` lists (pattern of
    our module's name, published name; several with | are one tensor's, one of them must be there).
    Whatever is missing, of another shape, or neither known nor `ignored`, is refused by name."""
    state, known, faults = {}, set(), []
    for name, parameter in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        theirs = next(match.expand(theirs) for ours, theirs in patterns
                      if (match := re.fullmatch(ours, module)))
        names = [f"{each}.{kind}" for each in theirs.split("|")]
        known.update(names)
        there = next((each for each in names if each in weights), None)
        if there is None:
            faults.append(f"{names[0]} is missing")
        elif (tensor := weights[there]).shape != parameter.shape:
            faults.append(f"{there} is {list(tensor.shape)}, not {list(parameter.shape)}")
        else:
            state[name] = tensor.to(device, dtype)
    faults += [f"{name} is unexpected" for name in sorted(weights)
               if name not in known and not re.fullmatch(ignored, name)]
    if faults:
        refuse(f"{where}: " + "; ".join(faults[:8]) + f"; {len(faults)} in all" * (len(faults) > 8))
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


T5_KEYS = [
    (r"embed", r"shared|encoder.embed_tokens"), (r"norm", r"encoder.final_layer_norm"),
    (r"tables.(\d+)", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias"),
    (r"layers.(\d+).norm1", r"encoder.block.\1.layer.0.layer_norm"),
    (r"layers.(\d+).norm2", r"encoder.block.\1.layer.1.layer_norm"),
    (r"layers.(\d+).([qkv])", r"encoder.block.\1.layer.0.SelfAttention.\2"),
    (r"layers.(\d+).out", r"encoder.block.\1.layer.0.SelfAttention.o"),
    (r"layers.(\d+).gate", r"encoder.block.\1.layer.1.DenseReluDense.wi_0"),
    (r"layers.(\d+).up", r"encoder.block.\1.layer.1.DenseReluDense.wi_1"),
    (r"layers.(\d+).down", r"encoder.block.\1.layer.1.DenseReluDense.wo")]
T5_IGNORED = r"decoder\..*|lm_head\.weight"                              # of a whole T5
WAN_T5 = "models_t5_umt5-xxl-enc-bf16.pth"                               # UMT5 in Wan's own layout
WAN_KEYS = [
    (r"embed", r"token_embedding"), (r"norm", r"norm"),
    (r"tables.(\d+)", r"blocks.\1.pos_embedding.embedding"),
    (r"layers.(\d+).(norm\d)", r"blocks.\1.\2"), (r"layers.(\d+).([qkv])", r"blocks.\1.attn.\2"),
    (r"layers.(\d+).out", r"blocks.\1.attn.o"), (r"layers.(\d+).gate", r"blocks.\1.ffn.gate.0"),
    (r"layers.(\d+).up", r"blocks.\1.ffn.fc1"), (r"layers.(\d+).down", r"blocks.\1.ffn.fc2")]
CLIP_KEYS = [
    (r"embed", r"text_model.embeddings.token_embedding"), (r"norm", r"text_model.final_layer_norm"),
    (r"position", r"text_model.embeddings.position_embedding"),
    (r"layers.(\d+).norm(\d)", r"text_model.encoder.layers.\1.layer_norm\2"),
    (r"layers.(\d+).([qkv]|out)", r"text_model.encoder.layers.\1.self_attn.\2_proj"),
    (r"layers.(\d+).up", r"text_model.encoder.layers.\1.mlp.fc1"),
    (r"layers.(\d+).down", r"text_model.encoder.layers.\1.mlp.fc2")]
CLIP_IGNORED = (r"text_model\.embeddings\.position_ids|vision_model\..*|logit_scale|"
                r"(text|visual)_projection\.weight")
CLIP_DEFAULTS = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
                     num_attention_heads=8, max_position_embeddings=77, vocab_size=49408,
                     hidden_act="quick_gelu", layer_norm_eps=1e-5, eos_token_id=49407)


def clean_prompt(text):
    """A prompt as Wan's models are given it: HTML's entities read; typographic quotes, ligatures
    and full-width forms made plain; control characters dropped; white space in single spaces.
    (What Wan uses, ftfy, also repairs text that was decoded wrongly.)"""
    text = text if "<" in text else html.unescape(text)
    text = re.sub("[\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\u3000\ufb00-\ufb06\uff01-\uffef]",
                  lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = re.sub("[\u201c-\u201f]", '"', re.sub("[\u02bc\u2018-\u201b]", "'", text))
    text = re.sub("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]", "", text)
    text = html.unescape(html.unescape(unicodedata.normalize("NFC", text)))
    return re.sub(r"\s+", " ", text).strip()


def clip_tokenizer(folder):
    """CLIP's BPE from its two older files."""
    part, words = tokenizers.pre_tokenizers, tokenizers.normalizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(
        str(folder / "vocab.json"), str(folder / "merges.txt"), end_of_word_suffix="</w>",
        unk_token="<|endoftext|>"))
    tokenizer.normalizer = words.Sequence([
        words.NFC(), words.Replace(tokenizers.Regex(r"\s+"), " "), words.Lowercase()])
    tokenizer.pre_tokenizer = part.Sequence([
        part.Split(tokenizers.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"),
                   "removed", invert=True), part.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return tokenizer


def open_tokens(folder, is_clip):
    """(text -> ids, ids before each text, id after it, id of padding) of a published tokenizer.
    T5's spiece.model comes first: tokenizer.json may have lost the bytes that spell rare signs."""
    marks = ["<|startoftext|>", *2 * ["<|endoftext|>"]] if is_clip else ["</s>", "<pad>"]
    if not is_clip and (folder / "spiece.model").exists():
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
        return pieces.encode, [], pieces.eos_id(), max(0, pieces.pad_id())
    if (folder / "tokenizer.json").exists():
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    elif is_clip and (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        tokenizer = clip_tokenizer(folder)
    else:
        refuse(f"{folder} has no tokenizer: neither tokenizer.json nor "
               + ("vocab.json with merges.txt" if is_clip else "spiece.model"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        told = read_published(folder / name).get("pad_token") if (folder / name).exists() else None
        marks[-1] = told["content"] if isinstance(told, dict) else told or marks[-1]
    *begin, end, pad = map(tokenizer.token_to_id, marks)
    if None in (*begin, end, pad):
        refuse(f"{folder}: the tokenizer lacks one of {', '.join(marks)}")
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, begin, end, pad


def distance_buckets(n, buckets, furthest):
    """int64 [n, n]: the row of T5's table for query i and key j. Half of the rows are for keys that
    come later; of each half the first half is for one distance each, the others widen with its
    logarithm, and the last holds all from `furthest` on."""
    place, half = torch.arange(n), buckets // 2
    away, exact = place - place[:, None], half // 2
    far = (away.abs().clamp(min=1).float() / exact).log() / math.log(furthest / exact)
    far = (exact + (far * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(away.abs() < exact, away.abs(), far) + half * (away > 0)


class TextEncoder(nn.Module):
    """A frozen text encoder, as `open_text_encoder` makes it. T5's and UMT5's add a table's row to
    the scores by the distance of two tokens (T5: the first layer's table in all, UMT5: each its
    own); CLIP's is causal and adds positions. `hash` names it in files' names."""

    def __init__(self, stack, vocab, positions=0, tables=0, buckets=32, furthest=128):
        super().__init__()
        self.buckets, self.furthest, self.max_length = buckets, furthest, positions or 512
        self.embed = nn.Embedding(vocab, stack.width)
        self.position = nn.Embedding(positions, stack.width) if positions else None
        self.tables = nn.ModuleList(nn.Embedding(buckets, stack.heads) for _ in range(tables))
        self.layers, self.norm = stack.layers(), stack.make_norm()

    def forward(self, ids, mask=None):
        """ids int64 [B, L]; mask [B, L], 0 at padding (CLIP's sees its padding and ignores it) ->
        (hidden states, those before the last layer and norm), each [B, L, D]."""
        x, bias, n = self.embed(ids), None, ids.shape[1]
        if self.position is not None:
            x = x + self.position.weight[:n]
        rows = distance_buckets(n, self.buckets, self.furthest).to(ids.device)
        for i, layer in enumerate(self.layers):
            if self.tables:
                table = self.tables[i % len(self.tables)].weight.float()
                bias = table[rows].permute(2, 0, 1)[None]                # [1, A, L, L]
                if mask is not None:
                    bias = bias.masked_fill(mask[:, None, None] == 0, -torch.inf)
            before, x = x, layer(x, bias=bias)                           # [B, L, D]
        return self.norm(x), before

    def pooled(self, ids, hidden):
        """[B, D]: CLIP's hidden state at the first end of each text. Configs that say 2, which is
        not its id, mean the largest id."""
        is_end = ids == (ids.amax(1, True) if self.end == 2 else self.end)
        return hidden[torch.arange(len(ids)), is_end.int().argmax(1)]

    def ids(self, texts, max_length=None):
        """(ids, mask), int64 [B, max_length]: texts with their marks, cut and padded."""
        most, (split, begin, end, pad), rows = max_length or self.max_length, self.tokens, []
        if self.position is not None and most > self.max_length:
            raise ValueError(f"max_length {most}: this encoder has {self.max_length} positions")
        for text in texts:
            ids = begin + split(clean_prompt(text) if self.is_wan else text)
            rows.append(ids[:most - 1] + [end])
        mask = torch.arange(most) < torch.tensor([[len(row)] for row in rows])
        return torch.tensor([row + [pad] * (most - len(row)) for row in rows]), mask.long()

    @torch.no_grad()
    def encode(self, texts, max_length=None, batch=8):
        """A tensor [L, D] for each text, up to the end of its own; of CLIP's all max_length rows,
        as the models that read them were given."""
        found, device = [], self.embed.weight.device
        for i in range(0, len(texts), batch):
            ids, mask = self.ids(texts[i:i + batch], max_length)
            lengths = (mask if self.tables else torch.ones_like(mask)).sum(1).tolist()
            ids, mask = (x[:, :max(lengths)].to(device) for x in (ids, mask))
            found += [x[:n] for x, n in zip(self(ids, mask)[0], lengths)]
        return found


def wan_config(weights):
    """What config.json would say, from the shapes in Wan's file."""
    (vocab, width), (buckets, heads), (inner, _), (ffn, _) = (
        weights[name].shape for name in (
            "token_embedding.weight", "blocks.0.pos_embedding.embedding.weight",
            "blocks.0.attn.q.weight", "blocks.0.ffn.fc1.weight"))
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    return dict(model_type="umt5", d_model=width, vocab_size=vocab, num_heads=heads, d_ff=ffn,
                d_kv=inner // heads, num_layers=depth, layer_norm_epsilon=1e-6,
                relative_attention_num_buckets=buckets, feed_forward_proj="gated-gelu")


def make_text_encoder(config):
    """(TextEncoder without weights, a text that says what it computes) of a published config."""
    kind = config.get("model_type")
    if kind in ("t5", "umt5") and config["feed_forward_proj"] == "gated-gelu":
        stack = Stack(config["d_model"], config["num_layers"], config["num_heads"],
                      ffn=config["d_ff"], norm="rms", glu=True, eps=config["layer_norm_epsilon"],
                      act="gelu_new", head=config["d_kv"], bias=False, scale=1.0)
        shape = dict(tables=stack.depth if kind == "umt5" else 1,
                     buckets=config["relative_attention_num_buckets"],
                     furthest=config.get("relative_attention_max_distance", 128))
    elif kind in ("clip", "clip_text_model"):
        config = {**CLIP_DEFAULTS, **config.get("text_config", config)}
        stack = Stack(config["hidden_size"], config["num_hidden_layers"],
                      config["num_attention_heads"], ffn=config["intermediate_size"], causal=True,
                      act=config["hidden_act"], eps=config["layer_norm_eps"])
        shape = dict(positions=config["max_position_embeddings"])
    else:
        raise ValueError(f"model_type {kind}, feed_forward_proj {config.get('feed_forward_proj')}: "
                         "known are t5 and umt5 with gated-gelu, clip and clip_text_model")
    with torch.device("meta"):
        model = TextEncoder(stack, config["vocab_size"], **shape)
    model.end = config.get("eos_token_id")
    return model, f"{stack} {shape}"


def open_text_encoder(path, device="cpu", dtype=torch.float32):
    """The TextEncoder of a Hugging Face folder, of a diffusers pipeline's, or of Wan's own layout.
    Wan's, in either layout, cleans its prompts. T5 overflows in float16, which is refused."""
    path = where = tokens = Path(path)
    index, weights, patterns = path / "model_index.json", None, None
    is_wan = index.exists() and read_published(index).get("_class_name", "").startswith("Wan")
    if (path / WAN_T5).exists():
        where, tokens, is_wan = path / WAN_T5, path / "google" / "umt5-xxl", True
        weights, patterns = read_tensors(where), (WAN_KEYS, "")
    elif (path / "text_encoder").is_dir():
        where, tokens = path / "text_encoder", path / "tokenizer"
    elif not (path / "config.json").exists():
        refuse(f"{path} holds no text encoder: neither config.json nor text_encoder/ nor {WAN_T5}")
    try:
        model, facts = make_text_encoder(wan_config(weights) if weights else
                                         read_published(where / "config.json"))
    except KeyError as error:
        refuse(f"{where}: {error} is missing, of the sizes or of the config")
    except ValueError as error:
        refuse(f"{where}: {error}")
    is_clip = model.position is not None
    if dtype == torch.float16 and not is_clip:
        refuse(f"{path}: T5 overflows in float16: use bfloat16 or float32")
    load_strictly(model, weights or read_tensors(where),
                  *patterns or ((CLIP_KEYS, CLIP_IGNORED) if is_clip else (T5_KEYS, T5_IGNORED)),
                  dtype, device, where)
    model.tokens, model.is_wan = open_tokens(tokens, is_clip), is_wan
    digest = hashlib.sha256(f"{facts} {is_wan} {dtype}".encode())
    for _, tensor in sorted(model.state_dict().items()):                 # their beginnings suffice
        digest.update(tensor.flatten()[:4096].float().cpu().numpy().tobytes())
    model.hash = digest.hexdigest()[:8]
    return model


def text_path(folder, shard, name):
    return Path(folder) / f"{shard}.text-{name}.safetensors"


def encode_captions(folder, rows, encoder, max_length=None, negative="", rank=0, world=1):
    """Writes what `encoder` makes of the captions of `rows`, of the empty prompt and of a negative
    one: a file a shard, in which tensor "7" belongs to text 7 of the header. A file that holds all
    of them is left alone; one that lacks some is made again, with what it held."""
    most, shards = max_length or encoder.max_length, {}
    for row in rows:
        texts = shards.setdefault(row["shard"], {"", negative})
        texts.update(caption["text"] for caption in row["captions"])
    for shard in tqdm(sorted(shards)[rank::world], desc="encode", unit="shard", disable=rank > 0):
        path, texts = text_path(folder, shard, encoder.hash), shards[shard]
        if path.exists():
            was = read_header(path)
            if was["max_length"] != most:
                refuse(f"{path} was encoded with at most {was['max_length']} tokens, not {most}: "
                       "give the same, or remove the file")
            if texts <= set(was["texts"]):
                continue
            texts = texts.union(was["texts"])
        texts = sorted(texts, key=lambda text: (len(text), text))        # neighbours pad little
        header = {"format": RUN_FORMAT, "encoder": encoder.hash, "max_length": most, "texts": texts}
        tensors = {str(i): x.cpu().clone() for i, x in enumerate(encoder.encode(texts, most))}
        with atomic(path) as part:
            save_file(tensors, part, {"nanosora": json.dumps(header, sort_keys=True)})
    barrier()


class TextEmbeddings:
    """What `encode_captions` wrote for some shards: text -> [L, D], read when it is asked for."""

    def __init__(self, folder, shards, name):
        self.places = {}
        for path in (text_path(folder, shard, name) for shard in sorted(set(shards))):
            if not path.exists():
                refuse(f"{path} is missing: encode the captions (again)")
            for i, text in enumerate(read_header(path)["texts"]):
                self.places.setdefault(text, (path, str(i)))

    def __getitem__(self, text):
        path, name = self.places[text]
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = option_parser(__doc__)
    parser.add_argument("name", help="data set: data/NAME, or a path with a slash")
    add = parser.add_argument_group("what to do").add_argument
    add("--train", action="store_true", help="train a captioner; else one captions the clips")
    add("--run", help="the run to train: runs/RUN, or a path with a slash (NAME-captioner)")
    add("--vlm", help="the trained run that captions (NAME-captioner)")
    add("--all", action="store_true", help="caption every clip, also those that have a caption")
    add("--batch", type=number(int, 1), default=32,
        help="clips a step, over all ranks, or at a time (%(default)s)")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="captioner-xs", choices=sorted(MODELS), help="size (%(default)s)")
    add("--vocab", type=number(int, 259), default=512,
        help="tokens of the captions' BPE at most, 259 or more (%(default)s)")
    add("--max_tokens", type=number(int, 1), default=128,
        help="longest caption, in tokens (%(default)s)")
    add = training_options(parser, steps=700, lr=8e-3, warmup=60, eval_every=350)
    add("--words", type=number(float, 0), default=2.0,
        help="weight of the words' loss (%(default)s)")
    add("--blank", type=number(float, 0, 1), default=0.3,
        help="share of tokens hidden while it learns, 0 to 1 (%(default)s)")
    add("--vary", type=number(float, 0, 3), default=1.0,
        help="strength of the clips' variation, 0 (none) to 3 (%(default)s)")
    args = parser.parse_args(argv)
    if (args.vlm and args.train) or (args.run and not args.train):
        refuse("--run goes with --train, --vlm without it")
    return args


def main(argv=None):
    args = parse(argv)
    if not args.train:
        return caption(args)
    run = run_dir(args.run or f"{Path(args.name).name}-captioner")
    train(args, run)
    print(f"{run}: trained; look at {run / 'samples'}", file=sys.stderr)


if __name__ == "__main__":
    main()
