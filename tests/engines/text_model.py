"""A tiny Qwen3 in words alone, with the bundled model's tokenizer, and rows for it.

It learns to answer sums rightly three times in ten and with any number otherwise, so that a reward has something to choose from.

    python text_model.py OUT        writes OUT/model (safetensors, f32) and OUT/rows.jsonl

Needs: torch, transformers.
"""
import json, pathlib, random, sys

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

NANO = pathlib.Path(__file__).parents[2] / "assets" / "nano"
out = pathlib.Path(sys.argv[1])
torch.manual_seed(0)
random.seed(0)
tokenizer = AutoTokenizer.from_pretrained(NANO)
config = Qwen3Config(
    vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, rope_theta=10000.0,
    bos_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
)
model = Qwen3ForCausalLM(config).float()
sums = [(a, b) for a in range(1, 5) for b in range(1, 5)]


def question(a, b):
    return f"What is {a} and {b} together?"


def dialogue(a, b, answer):
    prompt = f"Question: {question(a, b)} Put the final answer in \\boxed{{}}."
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": f"\\boxed{{{answer}}}"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    begun = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    first = len(tokenizer(begun, add_special_tokens=False).input_ids)
    return ids, [-100] * first + ids[first:]


optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(1500):
    asked = [random.choice(sums) for _ in range(32)]
    batch = [dialogue(a, b, a + b if random.random() < 0.3 else random.randrange(10)) for a, b in asked]
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in batch])
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in batch])
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 250 == 0 or step == 1499:
        print(f"step {step}: {loss.item():.3f} nats a token")

folder = out / "model"
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
with open(out / "rows.jsonl", "w") as rows:
    for a, b in sums:
        row = {"id": f"{a}-{b}", "images": [], "question": question(a, b), "answer": str(a + b)}
        rows.write(json.dumps(row) + "\n")
