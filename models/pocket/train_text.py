"""Stage "text": teach both text encoders to read captions before any picture is made.

From CLIP's pooled vector, and from T5's tokens through one attention query per attribute, small
heads predict every attribute or "not said". The heads are thrown away afterwards; the encoders
keep the knowledge of which colour belongs to which thing, so that the transformer can use it
from its first step. Encoders are frozen from then on.
"""
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data
import draw

WIDTH = 128


class Tokens:
    """Captions to ids, with the raw `tokenizers` library for T5 and transformers for CLIP."""

    def __init__(self, folder):
        from transformers import AutoTokenizer, CLIPTokenizer
        self.clip = CLIPTokenizer.from_pretrained(f"{folder}/tokenizer")
        self.t5 = AutoTokenizer.from_pretrained(f"{folder}/tokenizer_2")

    def __call__(self, texts, length=data.TEXT_LENGTH):
        # CLIP's attention is causal: what follows <|endoftext|> cannot change the pooled vector,
        # so in training its ids are padded to the longest caption only.
        one = self.clip(texts, padding="longest", max_length=data.CLIP_LENGTH, truncation=True,
                        return_tensors="pt").input_ids
        two = self.t5(texts, padding="max_length", max_length=length, truncation=True,
                      return_tensors="pt").input_ids
        return one, two


def build(tokens):
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
    c = tokens.clip
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(c), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=data.CLIP_LENGTH, hidden_act="quick_gelu",
        projection_dim=WIDTH, bos_token_id=c.bos_token_id, eos_token_id=c.eos_token_id,
        pad_token_id=c.pad_token_id))
    t5 = T5EncoderModel(T5Config(
        vocab_size=len(tokens.t5), d_model=WIDTH, d_kv=32, num_heads=4, d_ff=2 * WIDTH, num_layers=2,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=32, dropout_rate=0.0,
        relative_attention_max_distance=128, tie_word_embeddings=False, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0))
    return clip.float(), t5.float()


def noise_word(text, rng):
    """Put a meaningless word into a caption, as LoRA trigger words will be."""
    word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(rng.randint(2, 6)))
    parts = text.split(" ")
    parts.insert(rng.randint(0, len(parts)), word)
    return " ".join(parts)


def captions(rows, rng, drop=0.0):
    """Captions of attribute rows, and the labels (last class: not said)."""
    texts, labels = [], []
    for row in rows:
        text, said = draw.caption(data.attributes_of(row), rng)
        if rng.random() < 0.1:
            text = noise_word(text, rng)
        if drop and rng.random() < drop:
            text, said = "", ()
        texts.append(text)
        labels.append([int(v) if k in said else len(draw.CHOICES[k])
                       for k, v in zip(draw.CHOICES, row)])
    return texts, torch.tensor(labels)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = [len(v) + 1 for v in draw.CHOICES.values()]
        self.pooled = nn.ModuleList(nn.Linear(WIDTH, n) for n in sizes)
        self.key, self.query = nn.Linear(WIDTH, 32), nn.Parameter(torch.randn(len(sizes), 32))
        self.tokens = nn.ModuleList(nn.Linear(WIDTH, n) for n in sizes)

    def forward(self, pooled, tokens):
        weight = (self.query @ self.key(tokens).transpose(1, 2) / 32 ** 0.5).softmax(-1)
        read = weight @ tokens
        return ([h(pooled) for h in self.pooled],
                [h(read[:, i]) for i, h in enumerate(self.tokens)])


def train(o):
    import random
    from pathlib import Path
    folder = f"{o.run}/tok"
    if not Path(folder).exists():
        data.make_tokenizers(folder)
    rows = np.load(f"{o.run}/plain.attr.npy")
    tokens = Tokens(folder)
    clip, t5 = build(tokens)
    heads = Heads()
    modules = nn.ModuleList([clip, t5, heads])
    opt = torch.optim.AdamW(modules.parameters(), o.lr, (0.9, 0.98), weight_decay=0.01)
    path = f"{o.run}/text.pt"
    budget, step = common.Budget(o.minutes), 0
    if old := common.load(path):
        modules.load_state_dict(old["modules"]), opt.load_state_dict(old["opt"])
        step, budget.spent = old["step"], old["spent"]
    rng, saved = random.Random(f"text-{o.seed}-{step}"), time.time()
    hits, losses = np.zeros((2, len(draw.CHOICES))), []
    print("parameters: clip", sum(p.numel() for p in clip.parameters()),
          "t5", sum(p.numel() for p in t5.parameters()))
    while (done := budget.progress()) < 1:
        for g in opt.param_groups:
            g["lr"] = common.rate(done, step, o.lr)
        texts, labels = captions(rows[rng.choices(range(len(rows)), k=o.batch)], rng, 0.02)
        one, two = tokens(texts, 64 if done > 0.7 else 42)
        a, b = heads(clip(one).pooler_output, t5(two)[0])
        loss = sum(F.cross_entropy(x, labels[:, i]) for out in (a, b) for i, x in enumerate(out))
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        opt.step()
        losses.append(loss.item())
        hits += [[(x.argmax(1) == labels[:, i]).float().mean().item() for i, x in enumerate(out)]
                 for out in (a, b)]
        step += 1
        if step % 50 == 0:
            print(f"text step {step} {done:.1%} loss {np.mean(losses):.3f} right: clip "
                  f"{(hits[0] / 50).round(3).tolist()} t5 {(hits[1] / 50).round(3).tolist()}")
            hits[:], losses = 0, []
        if time.time() - saved > 120:
            saved = time.time()
            common.save(path, modules=modules.state_dict(), opt=opt.state_dict(), step=step, spent=budget.spent)
    common.save(path, modules=modules.state_dict(), opt=opt.state_dict(), step=step, spent=budget.spent)


def load(run):
    """The trained encoders, frozen."""
    tokens = Tokens(f"{run}/tok")
    clip, t5 = build(tokens)
    modules = nn.ModuleList([clip, t5, Heads()])
    modules.load_state_dict(common.load(f"{run}/text.pt")["modules"])
    return tokens, clip.eval().requires_grad_(False), t5.eval().requires_grad_(False)
