"""Random legal configurations of published captioners, language models and text encoders: ours
beside transformers' with equal weights. Not in the suite: it needs transformers.

    python tests/differential.py [--draws 40] [--seed 0] [--only llama mistral …]

Prints a row a family: draws whose numbers are equal, draws that were refused (by what words) and
wrong ones. transformers itself saves the folders, of float32, bfloat16 or float16, whole, in shards,
as .bin, without an index or without what equals the class's default. Compared are all logits of a
prompt (of a picture or a video, where the model sees) and 8 greedy tokens; of encoders the hidden
states, of CLIP and SigLIP the cosine. The denoisers' and autoencoders' are in differential_dit.py.

    python tests/differential.py --templates DIR

renders each *.jinja under a folder (axolotl, trl and others bring theirs) for one turn, with and
without a picture or an answer, by caption.py and by jinja2 as transformers sets it up."""
import argparse
import contextlib
import datetime
import io
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tokenizers
import torch
import transformers as T

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import caption as C  # noqa: E402

MARKS = ["</s>", "<pad>", "<image>", "<video>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>",
         "<|vision_end|>", "<|im_start|>", "<|im_end|>", "<|startoftext|>", "<|endoftext|>"]
WORDS = "a red dog walks over the beach while two birds look at a boat and it rains".split()


def pick(r, *of):
    return of[r.integers(len(of))]


def tokenizer(folder):
    """A byte-level tokenizer of 268 tokens, in which each mark of any family is one."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    table = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    table.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
    table.decoder = tokenizers.decoders.ByteLevel()
    table.add_special_tokens(MARKS)
    table.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return table


def shaken(model, r):
    """Random weights of about a trained model's size."""
    torch.manual_seed(int(r.integers(2**31)))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.data.copy_(torch.randn_like(p) * (1 if "embed_tokens" in name else p[0].numel() ** -0.5))
        elif p.dim() == 1:
            p.data.copy_(torch.randn_like(p) * 0.1 + ("norm" in name and name.endswith("weight")))
    model.tie_weights()
    return model.eval().requires_grad_(False)


def without_defaults(told, kind, keep=("model_type", "architectures", "text_config", "vision_config",
                                       "rope_parameters", "feed_forward_proj")):
    """A config without what its class says anyway."""
    usual = kind().to_dict()
    return {k: v for k, v in told.items() if k in keep or k not in usual or usual[k] != v}


def save(model, folder, r):
    """One of the ways in which folders lie on the hub; the model then holds what was saved."""
    dtype = pick(r, torch.float32, torch.float32, torch.bfloat16, torch.float16)
    for p in model.parameters():                     # but no buffers: frequencies stay float32
        p.data = p.data.to(dtype)
    model.save_pretrained(folder, max_shard_size=pick(r, "10GB", "100KB"))
    told = json.loads((folder / "config.json").read_text())
    if r.integers(2):
        for part in ("text_config", "vision_config"):
            if part in told:
                told[part] = without_defaults(told[part], type(getattr(model.config, part)))
        told = without_defaults(told, type(model.config))
    for part in (told, told.get("text_config", {})):
        if "rope_parameters" in part and told.get("model_type") != "llava" and r.integers(2):
            rope = part.pop("rope_parameters")                           # as transformers 4 wrote it
            part["rope_theta"] = rope.pop("rope_theta", 1e4)
            if rope.get("rope_type") != "default" or "mrope_section" in rope:
                rope["type"] = rope.pop("rope_type") if r.integers(2) else rope["rope_type"]
                part["rope_scaling"] = rope
    if told["model_type"] in ("qwen2_vl", "qwen2_5_vl") and "text_config" in told and r.integers(2):
        told = {k: v for k, v in told.pop("text_config").items()} | told  # as 4.45 wrote it
    said = dict(repetition_penalty=pick(r, 1.0, 1.02, 1.05, 1.1, 1.3), no_repeat_ngram_size=int(pick(r, 0, 0, 1, 2, 3)))
    for part in (told, told.get("text_config", {})):
        if said["repetition_penalty"] > 1 and part.get("hidden_act") == "silu":
            part["hidden_act"] = "swish"             # the same by another of its names
    (folder / "generation_config.json").write_text(json.dumps(said))
    (folder / "config.json").write_text(json.dumps(told))
    index = folder / "model.safetensors.index.json"
    if index.exists() and r.integers(2):
        index.unlink()
    elif not index.exists() and r.integers(4) == 0:
        path = folder / "model.safetensors"
        torch.save(C.load_file(path), folder / "pytorch_model.bin")
        path.unlink()
    return model.float()


def text_sizes(r, heads_of=(1, 2, 4)):
    kv, per = int(pick(r, 1, 2)), int(pick(r, *heads_of))
    head = int(pick(r, 8, 16, 32))
    return dict(vocab_size=int(r.integers(268, 340)), hidden_size=kv * per * head,
                intermediate_size=int(r.integers(20, 90)), num_hidden_layers=int(r.integers(1, 4)),
                num_attention_heads=kv * per, num_key_value_heads=kv, eos_token_id=None,
                bos_token_id=None, pad_token_id=None, rms_norm_eps=float(pick(r, 1e-5, 1e-6)),
                hidden_act=pick(r, "silu", "silu", "gelu"), tie_word_embeddings=bool(r.integers(2)),
                rope_parameters={"rope_type": "default", "rope_theta": float(pick(r, 1e4, 5e5))})


def language(name, r):
    sizes = text_sizes(r)
    law = pick(r, "default", "default", "linear", "llama3", "dynamic", "yarn")
    if law != "default":
        sizes["rope_parameters"] |= dict(rope_type=law, factor=float(pick(r, 2.0, 4.0, 8.0)))
    if law == "llama3":
        sizes["rope_parameters"] |= dict(low_freq_factor=1.0, high_freq_factor=4.0,
                                         original_max_position_embeddings=64)
    if name == "mistral":
        sizes["sliding_window"] = pick(r, None, 8, 4096)
    if name in ("llama", "mistral", "qwen3") and r.integers(2):
        sizes["head_dim"] = int(pick(r, 8, 24))
    if name == "llama" and r.integers(8) == 0:
        sizes["attention_bias"] = True
    classes = dict(llama=(T.LlamaConfig, T.LlamaForCausalLM), qwen2=(T.Qwen2Config, T.Qwen2ForCausalLM),
                   mistral=(T.MistralConfig, T.MistralForCausalLM),
                   qwen3=(T.Qwen3Config, T.Qwen3ForCausalLM))
    config, make = classes[name]
    return make(config(**sizes))


def sight(r, **more):
    heads = int(pick(r, 1, 2, 4))
    return dict(hidden_size=heads * 16, intermediate_size=int(r.integers(20, 60)), image_size=int(
                pick(r, 28, 30, 42)), patch_size=int(pick(r, 7, 14)), num_attention_heads=heads,
                num_hidden_layers=int(r.integers(2, 5)), layer_norm_eps=float(pick(r, 1e-5, 1e-6)),
                hidden_act=pick(r, "quick_gelu", "gelu")) | more


def seer(name, r):
    """A LLaVA, Video-LLaVA, Qwen2-VL or Qwen2.5-VL."""
    marks = {mark: 256 + i for i, mark in enumerate(MARKS)}
    sizes = text_sizes(r)
    if name.endswith("llava"):
        kind = pick(r, T.LlamaConfig, T.MistralConfig, T.Qwen2Config) if name == "llava" else T.LlamaConfig
        is_video = name == "video_llava"
        config = (T.VideoLlavaConfig if is_video else T.LlavaConfig)(
            text_config=kind(**sizes), vision_config=T.CLIPVisionConfig(**sight(r)),
            vision_feature_layer=int(pick(r, -2, -1)), multimodal_projector_bias=bool(r.integers(4)),
            tie_word_embeddings=sizes["tie_word_embeddings"], **(
                dict(video_token_index=marks["<video>"]) if is_video else {}),
            image_token_index=marks["<image>"])
        return (T.VideoLlavaForConditionalGeneration if is_video else
                T.LlavaForConditionalGeneration)(config)
    half = sizes["hidden_size"] // sizes["num_attention_heads"] // 2
    y = half // 3
    sizes["rope_parameters"]["mrope_section"] = [half - 2 * y, y, y]
    heads = int(pick(r, 1, 2))
    v = dict(depth=int(r.integers(1, 4)), num_heads=heads, patch_size=int(pick(r, 7, 14)))
    if name == "qwen2_vl":
        v |= dict(embed_dim=heads * 16, hidden_size=sizes["hidden_size"], mlp_ratio=int(pick(r, 2, 4)))
    else:
        v |= dict(hidden_size=heads * 16, out_hidden_size=sizes["hidden_size"], intermediate_size=24,
                  window_size=int(pick(r, 56, 112)), tokens_per_second=int(pick(r, 2, 4)),
                  fullatt_block_indexes=[int(r.integers(0, 3))])
    config, make = dict(qwen2_vl=(T.Qwen2VLConfig, T.Qwen2VLForConditionalGeneration), qwen2_5_vl=(
        T.Qwen2_5_VLConfig, T.Qwen2_5_VLForConditionalGeneration))[name]
    return make(config(text_config=sizes, vision_config=v, image_token_id=marks["<|image_pad|>"],
                       video_token_id=marks["<|video_pad|>"], vision_end_token_id=marks["<|vision_end|>"],
                       vision_start_token_id=marks["<|vision_start|>"],
                       tie_word_embeddings=sizes["tie_word_embeddings"]))


def asked(ours, theirs, name, r):
    """(Request, what transformers is given) of a prompt, and of what it sees."""
    frames = [r.integers(0, 255, (int(h), int(w), 3), np.uint8) for h, w in [r.integers(20, 60, 2)]]
    is_video = name in ("video_llava", "qwen2_vl", "qwen2_5_vl") and bool(r.integers(2))
    frames = frames * int(pick(r, 2, 4, 8)) if is_video else frames
    text = " ".join(pick(r, *WORDS) for _ in range(int(r.integers(3, 12))))
    if ours.tower is None:
        frames, is_video = [], False
    seconds = float(pick(r, 0.5, 1.0, 2.0))
    read = ours.read("\0" * bool(frames) + text, frames, is_video, seconds)
    if is_video and name.startswith("qwen"):         # transformers 5 lets a text begin before a long
        t, h, w = read[1][0][1]                      # video's end; 4.45 to 4.51, as published, do not
        step = seconds * ours.spec.rate if name == "qwen2_5_vl" else 1
        if (t - 1) * step >= max(h, w) // 2:
            read = ours.read("\0" + text, frames[:2], is_video, seconds)
    request, = ours.requests(["a"], [read])
    mark = "video" if is_video else "image"
    slot = {"llava": "<image>", "video_llava": f"<{mark}>"}.get(name, f"<|{mark}_pad|>")
    seen = torch.tensor(request.ids) < 0
    ids = torch.tensor([[ours.tokens.id(slot) if i < 0 else i for i in request.ids]])
    given = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if frames and name.startswith("qwen"):
        given[f"pixel_values{'_videos' * is_video}"] = read[1][0][0]
        given[f"{mark}_grid_thw"] = torch.tensor([read[1][0][1]])
        given["mm_token_type_ids"] = seen[None].int() * (2 if is_video else 1)
        if is_video and name == "qwen2_5_vl":
            given["second_per_grid_ts"] = torch.tensor([seconds])
    elif frames:
        pixels = torch.stack(read[1])
        key = {"llava": "pixel_values", "video_llava": f"pixel_values_{mark}s"}[name]
        given[key] = pixels[None] if is_video else pixels
    return request, given


@torch.no_grad()
def compare_writer(name, theirs, folder, r):
    ours = C.open_vlm(folder)
    request, given = asked(ours, theirs, name, r)
    h = ours.decoder(request.x[None], request.positions[..., None, :], prompts=torch.tensor(
        [len(request.ids)]))
    mine, wanted = ours.decoder.logits(h)[0], theirs(**given).logits[0]
    error = float((mine - wanted).abs().max() / wanted.std())
    theirs.generation_config = T.GenerationConfig.from_pretrained(folder)
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = None
    result = theirs.generate(**given, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, -8:].tolist()
    said = next(C.generate(ours.decoder, [request], 1, 8, penalties=ours.penalties))[1]
    return error, said == result


def encoder(name, r):
    heads = int(pick(r, 1, 2, 4))
    if name in ("t5", "umt5"):
        make = dict(t5=(T.T5Config, T.T5EncoderModel), umt5=(T.UMT5Config, T.UMT5EncoderModel))[name]
        return make[1](make[0](
            d_model=heads * 8, d_kv=int(pick(r, 4, 8)), d_ff=int(r.integers(9, 40)), num_heads=heads,
            num_layers=int(r.integers(1, 4)), vocab_size=int(r.integers(268, 340)),
            feed_forward_proj=pick(r, *["gated-gelu"] * 7, "relu"), pad_token_id=257,
            relative_attention_num_buckets=int(pick(r, 8, 32)),
            relative_attention_max_distance=int(pick(r, 20, 128))))
    text = dict(hidden_size=heads * 16, intermediate_size=int(r.integers(9, 40)),
                num_hidden_layers=int(r.integers(1, 4)), num_attention_heads=heads,
                vocab_size=int(r.integers(268, 340)), bos_token_id=266, eos_token_id=267,
                pad_token_id=267, max_position_embeddings=int(pick(r, 24, 77)),
                hidden_act=pick(r, "quick_gelu", "gelu"), layer_norm_eps=float(pick(r, 1e-5, 1e-6)))
    if name == "clip_text":
        return pick(r, T.CLIPTextModel, T.CLIPTextModelWithProjection)(T.CLIPTextConfig(**text))
    if name == "clip":
        return T.CLIPModel(T.CLIPConfig(text_config=text, vision_config=sight(r), projection_dim=24))
    text |= dict(projection_size=heads * 16, hidden_act="gelu_pytorch_tanh", pad_token_id=256)
    v = sight(r, hidden_size=heads * 16, num_attention_heads=heads, hidden_act="gelu_pytorch_tanh")
    return T.SiglipModel(T.SiglipConfig(text_config=text, vision_config=v))


@torch.no_grad()
def compare_encoder(name, theirs, folder, r):
    text = " ".join(pick(r, *WORDS) for _ in range(int(r.integers(1, 4))))
    if name in ("clip", "siglip"):
        scorer = C.Scorer(SimpleNamespace(clip=str(folder), aesthetics=None), folder, [],
                          torch.device("cpu"))
        frame = r.integers(0, 255, (40, 50, 3), np.uint8)
        said = scorer.score([frame], text)["clip"]
        ids = scorer.text.ids([text])[0]
        pixels = torch.stack([scorer.picture(frame, scorer.size)[0][0]])
        out = theirs(input_ids=ids, pixel_values=pixels)
        return abs(said - float(out.image_embeds[0] @ out.text_embeds[0])), True
    ours = C.open_text_encoder(folder)
    ids, mask = ours.ids([text, "dog"], 20)
    result = ours(ids, mask)[0]
    wanted = theirs(input_ids=ids, **({} if name == "clip_text" else {"attention_mask": mask}))
    wanted = wanted.last_hidden_state
    rows = mask.bool() if "t5" in name else torch.ones_like(mask).bool()
    return float((result - wanted)[rows].abs().max() / wanted[rows].std()), True


def llama_tokenizer(r, folder):
    """A LlamaTokenizer of a sentencepiece model alone, as folders without tokenizer.json have it: ids of
    random texts by ours and by transformers, of what legacy says. Leading spaces of legacy ones are
    left out: there transformers 5 differs from the classes of 4 that such folders were saved by."""
    lines = [" ".join(pick(r, *WORDS) for _ in range(8)) for _ in range(60)]
    out, legacy = io.BytesIO(), bool(r.integers(2))
    C.sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=int(r.integers(290, 330)), model_type="bpe",
        byte_fallback=True, character_coverage=1.0, remove_extra_whitespaces=False, num_threads=1,
        normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2)
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    n = C.sentencepiece.SentencePieceProcessor(model_proto=out.getvalue()).get_piece_size()
    added = {str(n + i): dict(content=mark, lstrip=False, rstrip=False, normalized=False, single_word=False,
                              special=bool(r.integers(2))) for i, mark in enumerate(("<image>", "[M]"))}
    told = dict(tokenizer_class="LlamaTokenizer", legacy=legacy, bos_token="<s>", eos_token="</s>",
                unk_token="<unk>", added_tokens_decoder=added, add_bos_token=bool(r.integers(2)))
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "config.json").write_text(json.dumps(dict(model_type="llama", transformers_version="4.48.3")))
    ours, theirs = C.Tokens(folder), T.AutoTokenizer.from_pretrained(folder)
    texts = ["".join(pick(r, *WORDS, " ", "  ", "\n", "<image>", "[M]", "</s>", ". ", "é") for _ in range(12))
             for _ in range(20)]
    texts = [re.sub(r"(^|<image>|\[M\]|</s>) +", r"\1", text) if legacy else text for text in texts]
    wrong = [text for text in texts if ours.encode(text) != theirs.encode(text, add_special_tokens=False)]
    if wrong:
        print("other ids:", legacy, repr(wrong[0]), file=sys.stderr)
    return float(len(wrong)), ours.first == theirs.encode("a")[:-len(theirs.encode("a", add_special_tokens=False))]


FAMILIES = {**{name: (language, compare_writer) for name in ("llama", "mistral", "qwen2", "qwen3")},
            **{name: (seer, compare_writer) for name in ("llava", "video_llava", "qwen2_vl",
                                                         "qwen2_5_vl")},
            "llama_tokenizer": (None, llama_tokenizer),
            **{name: (encoder, compare_encoder) for name in ("t5", "umt5", "clip_text", "clip",
                                                             "siglip")}}


def draw(name, r):
    """(None or the refusal, error relative to the numbers' spread, same tokens)."""
    make, compare = FAMILIES[name]
    with tempfile.TemporaryDirectory() as folder:
        folder, said = Path(folder), io.StringIO()
        if not make:
            return None, *compare(r, folder)
        tokenizer(folder)
        theirs = save(shaken(make(name, r), r), folder, r)
        try:
            with contextlib.redirect_stderr(said):
                return None, *compare(name, theirs, folder, r)
        except SystemExit:
            return said.getvalue().partition(str(folder))[2].strip(": \n"), 0.0, True


def compare_templates(folder):
    """Prints how many renderings are equal, differ, and were refused by us alone, and of which files."""
    from transformers.utils.chat_template_utils import _compile_jinja_template as compiled
    result = Counter()
    for path in sorted(Path(folder).rglob("*.jinja")):
        text = path.read_text(encoding="utf-8")
        for content in ("{q}", [{"type": "image"}, {"type": "text", "text": "{q}"}]):
            for answer in ([], [{"role": "assistant", "content": "{a}"}]):
                names = dict(messages=[{"role": "user", "content": content}, *answer], tools=None,
                             documents=None, add_generation_prompt=not answer, bos_token="<s>",
                             eos_token="</s>", enable_thinking=False)
                try:
                    theirs = compiled(text).render(**names, strftime_now=datetime.datetime.strptime(
                        C.TODAY, "%d %b %Y").strftime)
                except Exception:                    # of what a template refuses, or cannot take
                    result["refused by jinja2"] += 1
                    continue
                if "'type'" in theirs:               # it printed the list of parts
                    result["no rendering of parts"] += 1
                    continue
                try:
                    is_equal = C.ChatTemplate(text).render(**names) == theirs
                    result["equal" if is_equal else f"WRONG: {path.name}"] += 1
                except ValueError as error:
                    result[f"refused: {path.name}: {error}"[:90]] += 1
    for what, n in result.most_common():
        print(f"{n} x {what}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--templates", metavar="DIR")
    args = parser.parse_args()
    if args.templates:
        return compare_templates(args.templates)
    T.logging.set_verbosity_error()
    T.logging.disable_progress_bar()
    print(f"transformers {T.__version__}, torch {torch.__version__}, seed {args.seed}\n\n"
          "| family | equal | largest error | wrong | refused |\n|---|---|---|---|---|")
    is_fine = True
    for name in args.only:
        errors, wrong, refusals = [], [], Counter()
        for i in range(args.draws):
            r = np.random.default_rng([args.seed, i, *name.encode()])
            refusal, error, is_same = draw(name, r)
            if refusal:
                refusals[refusal[:90]] += 1
            elif error < 5e-5 and is_same:
                errors.append(error)
            else:
                wrong.append(f"draw {i}: {error:.1e}{'' if is_same else ', other tokens'}")
        is_fine &= not wrong
        print(f"| {name} | {len(errors)} | {max(errors, default=0):.0e} | {'; '.join(wrong) or 0} | "
              + ("; ".join(f"{n} x {what}" for what, n in refusals.items()) or "0") + " |", flush=True)
    sys.exit(not is_fine)


if __name__ == "__main__":
    main()
