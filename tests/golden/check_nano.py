"""Holds a checkpoint that foveate wrote against transformers: it must load there as it is and give the same numbers.

    foveate trace --model DIR --messages FILE.json --out TRACE.safetensors [--greedy N]
    python tests/golden/check_nano.py DIR FILE.json TRACE.safetensors

FILE.json holds the usual messages; image paths are relative to it. Prints one line a tensor; exit code 1 if one is off:
ids, positions and grids must be equal, pixels within 1e-5 (Pillow backend), features and logits within 1e-4 of the largest value.
"""
import json, os, sys

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

torch.set_num_threads(1)
folder, messages_file, trace_file = sys.argv[1:4]
trace = load_file(trace_file)
messages = json.load(open(messages_file, encoding="utf-8"))
paths = [part["image"] for m in messages if not isinstance(m["content"], str) for part in m["content"] if part["type"] == "image"]
images = [ImageOps.exif_transpose(Image.open(os.path.join(os.path.dirname(messages_file), p))) for p in paths]

loaded = AutoProcessor.from_pretrained(folder)  # what a user would write; its default backend resizes slightly differently
processor = Qwen2_5_VLProcessor(image_processor=Qwen2VLImageProcessorPil.from_pretrained(folder), tokenizer=AutoTokenizer.from_pretrained(folder),
                                video_processor=Qwen2VLVideoProcessor(), chat_template=loaded.chat_template)
model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
model.eval()
problems = {k: v for k, v in report.items() if v}
print("loading:", problems or "every tensor found, none left over")
failed = bool(problems)

# The trace may or may not end with the opening of an assistant turn.
prompts = [processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=g) for g in (True, False)]
batches = [processor(text=[p], images=images or None, return_tensors="pt") for p in prompts]
batch = next((b for b in batches if b["input_ids"].shape[1] == len(trace["input_ids"])), batches[0])
default = loaded(text=[prompts[batches.index(batch)]], images=images or None, return_tensors="pt")
pixels = torch.as_tensor(np.asarray(batch["pixel_values"])) if images else None


def compare(name, ours, theirs, tolerance):
    global failed
    ours, theirs = torch.as_tensor(np.asarray(ours)), torch.as_tensor(np.asarray(theirs))
    if ours.shape != theirs.shape:
        print(f"{name}: shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}  FAILED")
        failed = True
        return
    far = (ours.double() - theirs.double()).abs().max().item() if ours.numel() else 0.0
    if tolerance == 1e-4:
        far /= max(theirs.abs().max().item(), 1e-30)
    good = far <= tolerance
    print(f"{name}: {'equal' if far == 0 else f'{far:.1e}'}  {'ok' if good else 'FAILED'}")
    failed |= not good


compare("input_ids", trace["input_ids"], batch["input_ids"][0], 0)
compare("input_ids of AutoProcessor", trace["input_ids"], default["input_ids"][0], 0)
kinds = batch.get("mm_token_type_ids")
extra = {} if kinds is None else dict(mm_token_type_ids=kinds)
positions, _ = model.model.get_rope_index(input_ids=batch["input_ids"], image_grid_thw=batch.get("image_grid_thw"), attention_mask=batch["attention_mask"], **extra)
compare("position_ids", trace["position_ids"], positions[:, 0], 0)
with torch.no_grad():
    if images:
        compare("image_grid_thw", trace["image_grid_thw"], batch["image_grid_thw"], 0)
        compare("pixel_values", trace["pixel_values"], pixels, 1e-5)
        seen = model.model.visual(pixels, grid_thw=batch["image_grid_thw"])
        compare("image_features", trace["image_features"], seen.pooler_output if hasattr(seen, "pooler_output") else seen, 1e-4)
        batch["pixel_values"] = pixels
    logits = model(**batch).logits[0]
    compare("logits", trace["logits"], logits, 1e-4)
    ids = batch["input_ids"][0]
    logprobs = torch.log_softmax(logits[:-1], -1).gather(-1, ids[1:, None])[:, 0]
    compare("logprobs", trace["logprobs"], torch.cat([torch.zeros(1), logprobs]), 1e-4)
    if "greedy_ids" in trace:
        new = model.generate(**batch, max_new_tokens=len(trace["greedy_ids"]), do_sample=False)[0, len(ids):]
        compare("greedy_ids", trace["greedy_ids"], new, 0)
print("FAILED" if failed else "all good")
sys.exit(1 if failed else 0)
