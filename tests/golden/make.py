"""Writes the golden files: tiny random Qwen2.5-VL models and what transformers computes with them.

Usage: python tests/golden/make.py            (torch, transformers 5, Pillow, safetensors; one thread; about a minute)

Each case is a folder that is also a complete checkpoint (config, weights, tokenizer, template, processor), so every command can be pointed at
it, with pictures, `messages.json` (the last turn is the assistant's) and `expected.safetensors`:

  input_ids [T] i64, position_ids [3,T] i64, image_grid_thw [I,3] i64, labels [T] i64 (-100 where not trained)
  pixel_index [P,1176] u8, pixel_table [3,256] f32   pixel_values[p, v] = pixel_table[channel of v, pixel_index[p, v]]; exact, a quarter of the size
  image_features [tokens,D] f32
  logits_last [8,V] f32, logits_lse [T] f32, logits_signed [T] f32 (each row against `signs`), logprobs [T] f32 (of token t after those before it)
  loss [1] f32 (mean over the trained tokens), losses [10] f32 (AdamW, lr 1e-3, betas 0.9 0.999, eps 1e-8, decay 0.01, the same batch; before each step)
  prompt_ids [T'] i64, greedy_ids [12] i64 (after the conversation without its last turn)
  grad.NAME [2 + k] f32   norm, sum against `signs`, then k entries evenly spread over the flat tensor (all of them up to 64)
"""
import json, os, shutil, sys

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

torch.set_num_threads(1)
HERE = os.path.dirname(os.path.abspath(__file__))
NANO = os.path.join(HERE, "..", "..", "assets", "nano")
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
SPREAD = 64

# `dtype`: how the weights are stored; they are rounded to it first, so that everything is computed with the stored values in f32.
# `flat`: config.json in the published spelling. `shards`: split over several files.
CASES = {
    "gqa_tied": dict(
        text=dict(hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, rope=(1e6, [1, 1, 2])),
        vision=dict(depth=3, hidden_size=32, intermediate_size=72, num_heads=2, window_size=56, fullatt_block_indexes=[1]),
        tied=True, rows=2048, dtype=torch.float32, flat=False, shards=None, pixels=(4, 16),
        pictures=[("shapes", 112, 112, "RGB")],  # 4 x 4 merged tokens, windows of 2 x 2: they divide
        turns=[("user", [0, "Question: Where is the dog? Output the coordinates of the key image area in JSON."]),
               ("assistant", ['```json\n[{"bbox_2d":[12,34,96,112],"label":"dog"}]\n```'])]),
    "mha_untied": dict(
        text=dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, rope=(1e4, [2, 2, 2])),
        vision=dict(depth=2, hidden_size=48, intermediate_size=64, num_heads=3, window_size=112, fullatt_block_indexes=[0]),
        tied=False, rows=2048, dtype=torch.bfloat16, flat=True, shards=None, pixels=(20, 80),
        pictures=[("shapes", 301, 203, "RGB")],  # 11 x 7 merged tokens, windows of 4 x 4: they do not divide
        turns=[("system", "Name the place first. Then put the answer in \\boxed{}."), ("user", ["What number is on the plate under the lighthouse?", 0]),
               ("assistant", "It says naïve 数 1234. \\boxed{47}")]),
    "two_images": dict(
        text=dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3, rope=(5e5, [2, 1, 1])),
        vision=dict(depth=4, hidden_size=32, intermediate_size=48, num_heads=4, window_size=84, fullatt_block_indexes=[1, 3]),
        tied=True, rows=2048, dtype=torch.float16, flat=False, shards="150KB", pixels=(9, 24),
        pictures=[("shapes", 640, 360, "L"), ("stripes", 97, 500, "P")],  # one side that windows of 3 divide, one that they do not
        turns=[("user", [0, "Picture A. ", 1, "Picture B. Which object is in both images?\n(A) cat\n(B) dog\n"]), ("assistant", "The dog.\n\\boxed{B}")]),
    "three_turns": dict(
        text=dict(hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, rope=(1e6, [2, 3, 3])),
        vision=dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, window_size=112, fullatt_block_indexes=[]),
        tied=True, rows=2056, dtype=torch.float32, flat=True, shards=None, pixels=(4, 20),
        pictures=[("shapes", 1000, 700, "RGB"), ("stripes", 28, 28, "RGB"), ("shapes", 28, 1000, "RGB")],
        turns=[("user", [0, "Find the cat."]), ("assistant", '```json\n[{"bbox_2d":[3,4,90,80],"label":"cat"}]\n```'),
               ("user", ["Here is the enlarged area.", 1, "Question: What number is written here? Put the final answer in \\boxed{}."]), ("assistant", "I cannot see it."),
               ("user", [2, "Look again."]), ("assistant", "\\boxed{7}")]),
}


def picture(kind, width, height, mode, seed):
    """Edges, gradients and thin lines: what a wrong resize shows on. Compresses well."""
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    r = np.random.default_rng(seed)
    for y in range(height):
        draw.line([(0, y), (width, y)], fill=(255 * y // height, 90, 255 - 200 * y // height))
    for k in range(12):
        x, y = int(r.integers(0, width)), int(r.integers(0, height))
        w, h = int(r.integers(2, max(3, width // 3))), int(r.integers(2, max(3, height // 3)))
        color = tuple(int(c) for c in r.integers(0, 256, 3))
        if kind == "stripes":
            draw.line([(x, 0), (w, height)], fill=color, width=1 + k % 3)
        elif k % 2:
            draw.ellipse([x, y, x + w, y + h], fill=color)
        else:
            draw.rectangle([x, y, x + w, y + h], fill=color, outline=(255, 255, 255))
    return image.convert(mode) if mode != "P" else image.quantize(40)


def signs(n):
    """+1 or -1 by a hash of the index, the same in the test: one number that every entry of a tensor moves."""
    i = torch.arange(n, dtype=torch.int64)
    return 1.0 - 2.0 * ((((i * 2654435761) & 0xFFFFFFFF) >> 16) & 1).double()


def fingerprint(g):
    flat = g.detach().reshape(-1).double()
    n = flat.numel()
    at = torch.arange(min(n, SPREAD)) * n // min(n, SPREAD)
    return torch.cat([flat.norm().reshape(1), (flat * signs(n)).sum().reshape(1), flat[at]]).float()


def published(name):
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def flat_config(saved, text, vision, case):
    """config.json as the published checkpoints write it."""
    theta, sections = case["text"]["rope"]
    out = {k: saved[k] for k in ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"]}
    out |= {k: v for k, v in text.items() if k != "rope_parameters"} | dict(
        architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl", hidden_act="silu", rope_theta=theta, rms_norm_eps=1e-6, use_sliding_window=False,
        max_position_embeddings=4096, tie_word_embeddings=case["tied"], torch_dtype="float32",
        rope_scaling=dict(type="mrope", mrope_section=sections),
        vision_config=vision | dict(model_type="qwen2_5_vl", in_chans=3, spatial_patch_size=14, tokens_per_second=2, hidden_act="silu"))
    return out


def build(name, case):
    out = os.path.join(HERE, name)
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(out)
    torch.manual_seed(case.get("seed", 1))
    for f in TOKENIZER_FILES:
        shutil.copy(os.path.join(NANO, f), out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    eos, bos = (tokenizer.convert_tokens_to_ids(t) for t in ["<|im_end|>", "<|endoftext|>"])
    ids = {k: tokenizer.convert_tokens_to_ids(t) for k, t in dict(image="<|image_pad|>", video="<|video_pad|>", start="<|vision_start|>", end="<|vision_end|>").items()}
    low, high = (n * 28 * 28 for n in case["pixels"])
    settings = dict(image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor", patch_size=14, merge_size=2, temporal_patch_size=2,
                    image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])
    settings |= dict(min_pixels=low, max_pixels=high) if case["flat"] else dict(size=dict(shortest_edge=low, longest_edge=high))
    json.dump(settings, open(os.path.join(out, "preprocessor_config.json"), "w"), indent=1)

    # The model: random, livelier than a fresh initialisation, so that every term of the computation tells.
    theta, sections = case["text"]["rope"]
    text = {k: v for k, v in case["text"].items() if k != "rope"}
    text |= dict(vocab_size=case["rows"], rope_parameters=dict(rope_type="default", rope_theta=theta, mrope_section=sections), max_position_embeddings=4096,
                 rms_norm_eps=1e-6, bos_token_id=bos, eos_token_id=eos)
    vision = case["vision"] | dict(out_hidden_size=text["hidden_size"], patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
    config = Qwen2_5_VLConfig(text_config=text | dict(tie_word_embeddings=case["tied"]), vision_config=vision, tie_word_embeddings=case["tied"],
                              image_token_id=ids["image"], video_token_id=ids["video"], vision_start_token_id=ids["start"], vision_end_token_id=ids["end"])
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_((0.0 if key.endswith("bias") else 1.0) + 0.1 * torch.randn_like(p))
            elif "embed_tokens" in key or "lm_head" in key:
                p.copy_(torch.randn_like(p) * 0.5)
            else:
                p.copy_(torch.randn_like(p) * 1.2 / p[0].numel() ** 0.5)
            p.copy_(p.to(case["dtype"]).float())
    model.to(case["dtype"]).save_pretrained(out, **(dict(max_shard_size=case["shards"]) if case["shards"] else {}))
    for f in TOKENIZER_FILES:  # save_pretrained writes a generation_config of its own
        shutil.copy(os.path.join(NANO, f), out)
    if case["flat"]:
        saved = json.load(open(os.path.join(out, "config.json")))
        json.dump(flat_config(saved, text, vision, case), open(os.path.join(out, "config.json"), "w"), indent=1)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    rope = model.config.text_config.rope_parameters
    assert rope["rope_theta"] == theta and rope["mrope_section"] == sections, rope
    assert model.config.vision_config.window_size == vision["window_size"] and model.config.vision_config.fullatt_block_indexes == vision["fullatt_block_indexes"]
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == case["tied"]

    # The conversation.
    images = []
    for k, (kind, w, h, mode) in enumerate(case["pictures"]):
        image = picture(kind, w, h, mode, 100 * len(name) + k)
        image.save(os.path.join(out, f"picture_{k}.png"), optimize=True)
        images.append(Image.open(os.path.join(out, f"picture_{k}.png")))
    messages = [dict(role=role, content=words if isinstance(words, str) else [
        dict(type="image", image=f"picture_{w}.png") if isinstance(w, int) else dict(type="text", text=w) for w in words]) for role, words in case["turns"]]
    json.dump(messages, open(os.path.join(out, "messages.json"), "w"), indent=1, ensure_ascii=False)
    processor = Qwen2_5_VLProcessor(image_processor=Qwen2VLImageProcessorPil.from_pretrained(out), tokenizer=tokenizer,
                                    video_processor=Qwen2VLVideoProcessor(), chat_template=open(os.path.join(out, "chat_template.jinja")).read())
    encode = lambda turns, prompt: processor(text=[processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)],
                                             images=images[:sum(p["type"] == "image" for m in turns if m["role"] == "user" for p in m["content"])], return_tensors="pt")
    batch = encode(messages, False)
    tokens = batch["input_ids"][0]
    assert len(tokens) < 600

    # Trained tokens: what the assistant says, its end of turn included, the newline after it not.
    start, end, role = (tokenizer.convert_tokens_to_ids(t) for t in ["<|im_start|>", "<|im_end|>", "assistant"])
    labels, inside = torch.full_like(tokens, -100), False
    for t, token in enumerate(tokens.tolist()):
        if inside:
            labels[t] = token
            inside = token != end
        elif t >= 2 and tokens[t - 2] == start and tokens[t - 1] == role:
            inside = True  # this is the newline after "assistant"
    assert (labels != -100).sum() > 3

    # Pixels: exactly a table of 256 values a channel.
    pixels = batch["pixel_values"]
    pixels = torch.as_tensor(np.asarray(pixels))
    table = (torch.arange(256, dtype=torch.float64) / 255)[None] - torch.tensor(settings["image_mean"], dtype=torch.float64)[:, None]
    table /= torch.tensor(settings["image_std"], dtype=torch.float64)[:, None]
    by_channel = pixels.reshape(len(pixels), 3, -1).double()
    index = torch.stack([torch.searchsorted(table[c].contiguous() - 1e-3, by_channel[:, c].contiguous(), right=True) - 1 for c in range(3)], 1)
    exact = torch.stack([torch.full((256,), float("nan")) for _ in range(3)])
    for c in range(3):
        exact[c, index[:, c].reshape(-1)] = by_channel[:, c].reshape(-1).float()
        assert torch.equal(exact[c][index[:, c]], by_channel[:, c].float()), "pixel values are not a function of the byte"
    exact = torch.where(exact.isnan(), table.float(), exact)
    assert (exact - table.float()).abs().max() < 1e-6

    kinds = batch.get("mm_token_type_ids")
    extra = {} if kinds is None else dict(mm_token_type_ids=kinds)
    positions, _ = model.model.get_rope_index(input_ids=batch["input_ids"], image_grid_thw=batch["image_grid_thw"], attention_mask=batch["attention_mask"], **extra)
    forward = lambda: model(**{**batch, "pixel_values": pixels})
    with torch.no_grad():
        seen = model.model.visual(pixels, grid_thw=batch["image_grid_thw"])
        features = seen.pooler_output if hasattr(seen, "pooler_output") else seen
        logits = forward().logits[0]
        prompt = encode(messages[:-1], True)
        model.generation_config.eos_token_id = None
        greedy = model.generate(**prompt, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True)
    new = greedy.sequences[0, prompt["input_ids"].shape[1]:]
    margin = min(float(torch.topk(row[0].float(), 2).values.diff().abs()) for row in greedy.logits)
    assert margin > 2e-2, f"greedy choices of {name} are nearly tied ({margin}): change its seed"
    logprobs = torch.zeros(len(tokens))
    logprobs[1:] = torch.log_softmax(logits[:-1], -1).gather(-1, tokens[1:, None])[:, 0]

    def loss_now():
        rows = torch.nn.functional.log_softmax(forward().logits[0, :-1], -1)
        wanted = labels[1:]
        return -rows[wanted != -100].gather(-1, wanted[wanted != -100][:, None]).mean()

    loss = loss_now()
    hf = model(**{**batch, "pixel_values": pixels}, labels=labels[None]).loss
    assert abs(float(loss) - float(hf)) < 1e-5, (float(loss), float(hf))
    loss.backward()
    gradients = {"grad." + published(key): fingerprint(p.grad) for key, p in model.named_parameters()}
    files = [f for f in os.listdir(out) if f.endswith(".safetensors")]
    stored = {key for f in files for key in load_file(os.path.join(out, f))}
    assert {g[5:] for g in gradients} == stored, {g[5:] for g in gradients} ^ stored
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        l = loss_now()
        losses.append(float(l))
        l.backward()
        optimizer.step()

    save_file({k: v.contiguous() for k, v in dict(
        input_ids=tokens, position_ids=positions[:, 0].long(), image_grid_thw=batch["image_grid_thw"], labels=labels,
        pixel_index=index.reshape(len(pixels), -1).to(torch.uint8), pixel_table=exact, image_features=features,
        logits_last=logits[-8:], logits_lse=torch.logsumexp(logits, -1), logits_signed=(logits.double() @ signs(logits.shape[1])).float(), logprobs=logprobs,
        loss=loss.detach().reshape(1), losses=torch.tensor(losses), prompt_ids=prompt["input_ids"][0], greedy_ids=new, **gradients).items()},
        os.path.join(out, "expected.safetensors"))
    size = sum(os.path.getsize(os.path.join(out, f)) for f in os.listdir(out))
    print(f"{name}: {len(tokens)} tokens, grids {batch['image_grid_thw'].tolist()}, {sum(p.numel() for p in model.parameters())} parameters, "
          f"loss {losses[0]:.5f} -> {losses[-1]:.5f}, greedy margin {margin:.4f}, {size / 1e6:.2f} MB")


TEXTS = ["Question: Where is the lighthouse? Output the coordinates of the key image area in JSON.", "Find the dog.  \n\n Find\tthe CAT!\r\n",
         '```json\n[{"bbox_2d":[12,34,567,999],"label":"lighthouse"},{"bbox_2d":[0,1,2,3],"label":"hot air balloon"}]\n```',
         '```json\n[\n  {"bbox_2d": [12, 34, 567, 999], "label": "lighthouse"}\n]\n```', "Put the final answer in \\boxed{}. \\boxed{47} \\boxed{\\frac{1}{2}}",
         "0 00 007 12 999 1000 1234567 3.14 -5 1,000 ١٢٣ ½", "naïve e\u0301 \u212b ﬁ 数字 日本語 한국어 עברית 🚀👩‍🚀", "I'm we'll THEY'RE don't", "", " ", "\n", "\0\x7f\ufeff",
         "<think>Image-1</think><answer>[{\"image\":2,\"bbox_2d\":[1,2,3,4]}]</answer>", "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>x<|im_end|>\n<tool_call>"]


def tokens():
    """What transformers makes of the nano tokenizer: texts to ids and back, and rendered conversations."""
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    talk = [dict(role="user", content=[dict(type="image"), dict(type="text", text="Which?"), dict(type="image")]), dict(role="assistant", content="{x}\n"),
            dict(role="user", content=" plain\n")]
    rendered = [dict(messages=m, prompt=prompt, numbered=numbered,
                     text=tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=prompt, add_vision_id=numbered))
                for m in [talk, [dict(role="system", content="S")] + talk] for prompt in [False, True] for numbered in [False, True]]
    texts = [dict(text=t, ids=tokenizer(t).input_ids, decoded=tokenizer.decode(tokenizer(t).input_ids), plain=tokenizer.decode(tokenizer(t).input_ids, skip_special_tokens=True))
             for t in TEXTS]
    json.dump(dict(texts=texts, rendered=rendered), open(os.path.join(HERE, "tokens.json"), "w"), indent=1, ensure_ascii=False)


tokens()
for name in sys.argv[1:] or CASES:
    build(name, CASES[name])
