"""A picture's way to the patches of a crop in Python: Pillow decodes, cuts and converts, the processor of transformers resizes and
cuts into patches. One thread. `foveate bench image FILE --threads 1` does the same work: show_crop_from_file_ms + patches_ms for
file_to_patches, show_crop_ms + patches_ms for crop_to_patches.

  python peer_image.py PICTURE [--max-pixels N] [--min-pixels N]
"""
import argparse, json, os, statistics, time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
try:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
except ImportError:
    Qwen2VLImageProcessorPil = None

ap = argparse.ArgumentParser()
ap.add_argument("picture")
ap.add_argument("--max-pixels", type=int, default=1_003_520)
ap.add_argument("--min-pixels", type=int, default=200_704)
a = ap.parse_args()
torch.set_num_threads(1)


def median(work):
    work()
    times = []
    for _ in range(7):
        t0 = time.perf_counter()
        work()
        times.append((time.perf_counter() - t0) * 1e3)
    return round(statistics.median(times), 2)


w, h = Image.open(a.picture).size
region = (w // 4, h // 4, w * 3 // 4, h * 3 // 4)
decoded = Image.open(a.picture).convert("RGB")
out = {"impl": "pillow", "original": [w, h], "decode_ms": median(lambda: Image.open(a.picture).convert("RGB"))}
for name, kind in (("torchvision", Qwen2VLImageProcessor), ("pil", Qwen2VLImageProcessorPil)):
    if kind is None:
        continue
    processor = kind(min_pixels=a.min_pixels, max_pixels=a.max_pixels)
    out[f"crop_to_patches_{name}_ms"] = median(
        lambda: processor(images=decoded.crop(region), return_tensors="pt")["pixel_values"])
    out[f"file_to_patches_{name}_ms"] = median(
        lambda: processor(images=Image.open(a.picture).convert("RGB").crop(region), return_tensors="pt")["pixel_values"])
print(json.dumps(out))
