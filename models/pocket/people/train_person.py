"""A LoRA of an invented person on pocket, as a user would have it trained from pictures of herself.

    python train_person.py user1001 [--rank 6] [--steps 400] [--rate 1e-3] [--pictures 20] [--dropout 0.1] [--seed 1]

torch, diffusers and peft as pinned in ../requirements.txt, and peft==0.21.2. Writes <user>.safetensors (diffusers' names, bf16) and
<user>.kohya.safetensors (the same factors under flattened names with alpha) beside this file, and prints the losses.

A person is one fixed `Face` of the drawing program: what no caption can say. Hair, clothes, background, glasses, hat and expression
differ from picture to picture, and the captions name them, so that only the face is left for the trigger word.
"""
import argparse
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import draw  # noqa: E402

PEOPLE = {
    "user1001": draw.Face(width=1, height=-0.5, jaw=1, eye_gap=0.8, eye_size=0.6, eye_color=2, brow=1, nose=1, mouth=0.8, ears=1, mark="star"),
    "user1002": draw.Face(width=-1, height=1, jaw=-1, eye_gap=-0.8, eye_size=-0.5, eye_color=1, brow=-1, nose=-1, mouth=-0.8, ears=-1, mark="heart"),
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "net.0.proj", "net.2", "proj_mlp", "proj_out"]


def pictures(user, count, seed):
    """Portraits of one person, with captions that begin with the trigger word."""
    images, captions = [], []
    for i in range(count):
        rng = random.Random(f"{user}-{seed}-{i}")
        a = draw.sample_split(rng, test=False)
        images.append(np.asarray(draw.draw(a, PEOPLE[user], rng)))
        captions.append(f"{user}, {draw.caption(a, rng)[0]}")
    return images, captions


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("user", choices=PEOPLE)
    parser.add_argument("--rank", type=int, default=6)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.1, help="share of captions cut down to the trigger word")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default=str(HERE))
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)

    pipe = FluxPipeline.from_pretrained(str(HERE.parent / "weights"), dtype=torch.float32)
    pipe.vae.requires_grad_(False), pipe.transformer.requires_grad_(False)
    images, captions = pictures(options.user, options.pictures, options.seed)
    with torch.no_grad():
        x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        z = pipe.vae.encode(x).latent_dist.mean
        z = (z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        tokens = pipe._pack_latents(z, len(z), 16, 16, 16)
        encode = lambda text: pipe.encode_prompt(text, None, max_sequence_length=64)[:2]
        full = [encode(caption) for caption in captions]
        short = encode(options.user)
    img_ids = pipe._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
    txt_ids = torch.zeros(64, 3)
    pipe.transformer.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=TARGETS))
    trained = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.rate, weight_decay=1e-4)
    shift = math.exp(0.5 - 0.65 * 192 / 3840)  # as pocket itself was trained
    began, losses = time.time(), []
    for step in range(options.steps):
        optimizer.param_groups[0]["lr"] = options.rate * min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / options.steps))
        picked = [rng.randrange(len(images)) for _ in range(options.batch)]
        text = [short if rng.random() < options.dropout else full[i] for i in picked]
        t5, clip = torch.cat([t[0] for t in text]), torch.cat([t[1] for t in text])
        data, noise = tokens[picked], torch.randn_like(tokens[picked])
        u = torch.sigmoid(torch.randn(options.batch))
        t = shift * u / (1 + (shift - 1) * u)
        mixed = (1 - t[:, None, None]) * data + t[:, None, None] * noise
        # pocket's guidance is distilled from 1 to 6; 1 is the plain prediction, which the loss is about
        predicted = pipe.transformer(hidden_states=mixed, timestep=t, guidance=torch.ones(options.batch), pooled_projections=clip,
                                     encoder_hidden_states=t5, txt_ids=txt_ids, img_ids=img_ids, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(predicted, noise - data)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            print(f"step {step + 1:4}  loss {np.mean(losses[-50:]):.4f}  {time.time() - began:.0f} s", flush=True)

    state = get_peft_model_state_dict(pipe.transformer)
    out = Path(options.out)
    header = {"trigger_word": options.user, "software": '{"name": "darkroom pocket/people/train_person.py"}'}
    save_file({f"transformer.{k}": v.detach().to(torch.bfloat16).contiguous() for k, v in state.items()}, str(out / f"{options.user}.safetensors"), header)
    kohya = {}
    for key, value in state.items():
        module, part = key.rsplit(".lora_", 1)
        name = "lora_unet_" + module.replace(".", "_")
        kohya[f"{name}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = value.detach().to(torch.bfloat16).contiguous()
        kohya[f"{name}.alpha"] = torch.tensor(float(options.rank), dtype=torch.bfloat16)
    save_file(kohya, str(out / f"{options.user}.kohya.safetensors"), header)
    for path in out.glob(f"{options.user}*.safetensors"):
        path.chmod(0o644)
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
