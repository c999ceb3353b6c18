"""Writes tests/golden/lora: an adapter of PEFT on the model of tests/golden/gqa_tied, and what it computes.

Usage: python tests/golden/lora.py                    (torch, transformers 5, peft, safetensors; one thread; seconds)
       python tests/golden/lora.py ADAPTER TRACE      holds an adapter that foveate wrote against PEFT: TRACE is what `foveate trace --model ADAPTER
                                                      --messages tests/golden/gqa_tied/messages.json --out TRACE` wrote of it

  adapter_config.json, adapter_model.safetensors      as PEFT saves them; ranks and alphas differ between modules
  expected.safetensors
    logprobs [T] f32 (of token t after those before it), loss [1] f32 (mean over the trained tokens)
    losses [10] f32 (AdamW on the adapter, lr 1e-2, betas 0.9 0.999, eps 1e-8, decay 0.01; before each step)
    grad.NAME [2 + k] f32   as in make.py
"""
import os, sys

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

torch.set_num_threads(1)
BASE, OUT = "tests/golden/gqa_tied", "tests/golden/lora"
SPREAD = 64
TEXT = r"model\.language_model\.layers\.\d+\.(self_attn\.(q|v|o)_proj|mlp\.(gate|down)_proj)"
TOWER = r"model\.visual\.(blocks\.[02]\.(attn\.(qkv|proj)|mlp\.up_proj)|merger\.mlp\.[02])"


def signs(n):
    i = torch.arange(n, dtype=torch.int64)
    return 1.0 - 2.0 * ((((i * 2654435761) & 0xFFFFFFFF) >> 16) & 1).double()


def fingerprint(g):
    flat = g.detach().reshape(-1).double()
    n = flat.numel()
    at = torch.arange(min(n, SPREAD)) * n // min(n, SPREAD)
    return torch.cat([flat.norm().reshape(1), (flat * signs(n)).sum().reshape(1), flat[at]]).float()


golden = load_file(os.path.join(BASE, "expected.safetensors"))
ids, labels, index = golden["input_ids"], golden["labels"], golden["pixel_index"].long()
channel = torch.arange(index.shape[1]) // (2 * 14 * 14)
batch = dict(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], pixel_values=golden["pixel_table"][channel[None].expand_as(index), index],
             image_grid_thw=golden["image_grid_thw"])
base = Qwen2_5_VLForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
image = ids == base.config.image_token_id
batch["mm_token_type_ids"] = image.long()[None]


def logprobs(model):
    logits = model(**batch).logits[0]
    out = torch.zeros(len(ids))
    out[1:] = torch.log_softmax(logits[:-1], -1).gather(-1, ids[1:, None])[:, 0]
    return out, logits


if len(sys.argv) == 3:
    adapter, trace = sys.argv[1:]
    model = PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        theirs, logits = logprobs(model)
    plain = golden["logprobs"]
    ours = load_file(trace)
    assert torch.equal(ours["input_ids"], ids), "other tokens"
    far = lambda a, b: float((a - b).abs().max() / b.abs().max())
    print(f"logits {far(ours['logits'], logits):.1e}, logprobs {far(ours['logprobs'], theirs):.1e}; the adapter moves logprobs by {far(theirs, plain):.1e}")
    assert far(ours["logits"], logits) < 1e-4 and far(theirs, plain) > 1e-3
    sys.exit()

torch.manual_seed(7)
config = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", target_modules=f"{TEXT}|{TOWER}",
                    rank_pattern={"model.language_model.layers.1.self_attn.v_proj": 5}, alpha_pattern={"model.language_model.layers.0.mlp.down_proj": 12})
model = get_peft_model(base, config)
with torch.no_grad():
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.copy_(torch.randn_like(p) * (0.3 if "lora_B" in name else p.shape[1] ** -0.5))
model.save_pretrained(OUT)
os.path.exists(os.path.join(OUT, "README.md")) and os.remove(os.path.join(OUT, "README.md"))


def loss_now():
    rows = logprobs(model)[0][1:]
    return -rows[labels[1:] != -100].mean()


with torch.no_grad():
    now, _ = logprobs(model)
loss = loss_now()
loss.backward()
learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
assert learning and all("lora_" in name for name, _ in learning)
short = lambda name: name.replace("base_model.model.", "").replace(".default", "").replace("model.language_model.", "model.").replace("model.visual.", "visual.")
gradients = {"grad." + short(name): fingerprint(p.grad) for name, p in learning}
optimizer = torch.optim.AdamW([p for _, p in learning], lr=1e-2)
losses = []
for _ in range(10):
    optimizer.zero_grad()
    l = loss_now()
    losses.append(float(l))
    l.backward()
    optimizer.step()
save_file({k: v.contiguous() for k, v in dict(logprobs=now, loss=loss.detach().reshape(1), losses=torch.tensor(losses), **gradients).items()},
          os.path.join(OUT, "expected.safetensors"))
print(f"{len(learning)} matrices, loss {losses[0]:.5f} -> {losses[-1]:.5f}, moved {float((now - golden['logprobs']).abs().max()):.3f}")
