"""A LoRA of an invented person on pocket, as a user would have it trained from pictures of herself.

    python train_person.py user1001 [--pictures 20] [--rank 4] [--steps 800] [--lr 4e-3] [--caption-dropout 0.1]
    python train_person.py user1001 --retrained                 # the same person from new pictures
    python train_person.py user1002 --algorithm lokr --rank 32 --steps 600 --lr 8e-3    # LoKr by LyCORIS, which learns slowly

Writes <name>.safetensors (diffusers' names) and <name>.kohya.safetensors (the same factors under
flattened names, with alpha), or <name>.lokr.safetensors, all bf16 and below 300 kB, and a log of
the options and losses. A training that was stopped goes on from its last 50 steps. torch, diffusers and peft as pinned in requirements.txt, and lycoris-lora.

The base is guidance-distilled. As ai-toolkit does, the guidance embedding is 1 while training,
where the base's prediction is the plain one that the loss is about; --guidance takes another value,
or "random" for 1 to 6.
"""
import argparse
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import people

HERE = Path(__file__).resolve().parent
LIMIT = 300_000     # bytes of a file
# What is trained: the first of these lists that stays below the limit at the chosen rank.
ATTENTION = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
TEXT = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
MLP = ["ff.net.0.proj", "ff.net.2", "proj_mlp"]
SINGLE_OUT = ["proj_out"]
TARGETS = [ATTENTION + TEXT + MLP + SINGLE_OUT, ATTENTION + TEXT + SINGLE_OUT, ATTENTION + TEXT, ATTENTION,
           ["attn.to_q", "attn.to_v"], ["attn.to_v"]]


def modules(transformer, ends):
    """The linear layers of the blocks whose names end so."""
    return {k: m for k, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)
            and "transformer_blocks" in k and any(k.endswith("." + e) for e in ends)}


def pick(transformer, rank, algorithm):
    """All layers that fit. A tensor costs about 140 bytes of header; each layer has two and, for kohya, an alpha.
    Kronecker products are small enough for every layer."""
    for ends in TARGETS:
        found = modules(transformer, ends)
        if algorithm == "lokr" or sum(2 * rank * (m.in_features + m.out_features) + 420 for m in found.values()) < LIMIT:
            return found
    raise SystemExit(f"rank {rank} does not fit into {LIMIT} bytes")


def add_lora(transformer, found, rank):
    """Trains ordinary factors by PEFT; returns a function that gives the files' contents by suffix."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(found)))

    def files():
        state, kohya = {k: small(v) for k, v in get_peft_model_state_dict(transformer).items()}, {}
        for key, value in state.items():
            module, part = key.rsplit(".lora_", 1)
            name = "lora_unet_" + module.replace(".", "_")
            kohya[f"{name}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = value
            kohya[f"{name}.alpha"] = small(torch.tensor(float(rank)))
        return {"": {f"transformer.{k}": v for k, v in state.items()}, ".kohya": kohya}

    return [p for p in transformer.parameters() if p.requires_grad], files


def add_lokr(transformer, found, rank):
    """Trains Kronecker products by LyCORIS."""
    from lycoris.modules.lokr import LokrModule
    layers = [LokrModule("lora_unet_" + k.replace(".", "_"), m, 1.0, rank, rank, factor=8) for k, m in found.items()]
    for layer in layers:
        layer.apply_to()

    def files():
        return {".lokr": {f"{layer.lora_name}.{k}": small(v) for layer in layers for k, v in layer.state_dict().items()}}

    return [p for layer in layers for p in layer.parameters()], files


def options(o):
    """What decides the result."""
    return {k: v for k, v in vars(o).items() if k not in ("base", "output", "threads", "name")}


def small(tensor):
    return tensor.detach().to(torch.bfloat16).contiguous()


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("person", choices=people.PEOPLE)
    ap.add_argument("--pictures", type=int, choices=range(15, 28), default=20, metavar="15..27")
    ap.add_argument("--rank", type=int, choices=range(4, 33), default=4, metavar="4..32")
    ap.add_argument("--steps", type=int, default=800)
    ap.add_argument("--lr", type=float, default=4e-3)
    ap.add_argument("--batch", type=int, default=8)
    ap.add_argument("--caption-dropout", type=float, default=0.1, help="share of captions cut down to the trigger word")
    ap.add_argument("--guidance", default="1", help='guidance embedding while training: a number or "random"')
    ap.add_argument("--seed", type=int, default=1, help="of noise, order and the first factors")
    ap.add_argument("--retrained", action="store_true", help="new pictures of the same person")
    ap.add_argument("--algorithm", choices=("lora", "lokr"), default="lora")
    ap.add_argument("--base", default=str(HERE / "weights"), help="diffusers folder")
    ap.add_argument("--output", type=Path, default=HERE / "people", help="folder for the files")
    ap.add_argument("--name", help="of the files, the person's if not given")
    ap.add_argument("--threads", type=int, default=2)
    o = ap.parse_args()
    torch.set_num_threads(o.threads)
    torch.manual_seed(o.seed)
    rng = random.Random(o.seed)
    name = o.name or o.person + ("-retrained" if o.retrained else "")
    o.output.mkdir(parents=True, exist_ok=True)
    state_path = o.output / f"{name}.{o.algorithm}.pt"      # a training that was stopped goes on from here
    log = open(o.output / f"{name}.{o.algorithm}.log", "a" if state_path.exists() else "w")

    def say(*words):
        print(*words, flush=True)
        print(*words, file=log, flush=True)

    say(" ".join(f"--{k.replace('_', '-')} {v}" for k, v in options(o).items()))
    from diffusers import FluxPipeline
    pipe = FluxPipeline.from_pretrained(o.base, torch_dtype=torch.float32)
    vae, transformer = pipe.vae.requires_grad_(False), pipe.transformer.requires_grad_(False)
    pairs = people.retrained(o.person, o.pictures) if o.retrained else people.dataset(o.person, o.pictures)
    with torch.no_grad():                      # latents and texts once, then only the transformer runs
        x = torch.from_numpy(np.stack([np.asarray(p) for p, _ in pairs])).permute(0, 3, 1, 2).float() / 127.5 - 1
        z = (vae.encode(x).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
        latents = pipe._pack_latents(z, *z.shape)
        encode = lambda text: pipe.encode_prompt(text, None, max_sequence_length=64)[:2]
        full, short = [encode(caption) for _, caption in pairs], encode(o.person)
    img_ids, txt_ids = pipe._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32), torch.zeros(64, 3)

    found = pick(transformer, o.rank, o.algorithm)
    trained, files = dict(lora=add_lora, lokr=add_lokr)[o.algorithm](transformer, found, o.rank)
    say(f"{len(found)} layers, {sum(p.numel() for p in trained)} parameters")
    optimizer = torch.optim.AdamW(trained, lr=o.lr, weight_decay=1e-4)
    shift = math.exp(0.5 - 0.65 * 192 / 3840)  # as pocket itself was trained
    began, losses = time.time(), []
    if state_path.exists():
        old = torch.load(state_path, weights_only=False)
        if old["options"] != options(o):
            raise SystemExit(f"{state_path} is of a training with other options; remove it to begin anew")
        with torch.no_grad():
            for p, value in zip(trained, old["trained"]):
                p.copy_(value)
        optimizer.load_state_dict(old["optimizer"])
        losses = old["losses"]
        torch.set_rng_state(old["torch"]), rng.setstate(old["random"])
        say(f"goes on after step {len(losses)}")
    for step in range(len(losses), o.steps):
        optimizer.param_groups[0]["lr"] = o.lr * min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / o.steps))
        picked = [rng.randrange(len(pairs)) for _ in range(o.batch)]
        text = [short if rng.random() < o.caption_dropout else full[i] for i in picked]
        t5, clip = torch.cat([t[0] for t in text]), torch.cat([t[1] for t in text])
        data, noise = latents[picked], torch.randn_like(latents[picked])
        u = torch.sigmoid(torch.randn(o.batch))
        t = shift * u / (1 + (shift - 1) * u)
        mixed = (1 - t[:, None, None]) * data + t[:, None, None] * noise
        guidance = 1 + 5 * torch.rand(o.batch) if o.guidance == "random" else torch.full((o.batch,), float(o.guidance))
        predicted = transformer(hidden_states=mixed, timestep=t, guidance=guidance, pooled_projections=clip,
                                encoder_hidden_states=t5, txt_ids=txt_ids, img_ids=img_ids, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(predicted, noise - data)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == o.steps:
            part = losses[step // 50 * 50:]
            say(f"step {step + 1:4}  loss {np.mean(part):.4f}  {time.time() - began:.0f} s")
            torch.save(dict(options=options(o), trained=[p.detach() for p in trained], optimizer=optimizer.state_dict(), losses=losses,
                            torch=torch.get_rng_state(), random=rng.getstate()), state_path.with_suffix(".new"))
            state_path.with_suffix(".new").replace(state_path)

    header = {"trigger_word": o.person, "software": '{"name": "darkroom pocket/train_person.py"}'}
    for suffix, tensors in files().items():
        path = o.output / f"{name}{suffix}.safetensors"
        save_file(tensors, path, header)
        path.chmod(0o644)
        say(path.name, path.stat().st_size, "bytes" if path.stat().st_size < LIMIT else f"bytes, more than {LIMIT}")
    state_path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
