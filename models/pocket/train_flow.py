"""Stages "transformer" and "distill": the FLUX transformer on the latents of the drawings.

Flow matching as in FLUX: x_t = (1 - t) * latent + t * noise, and the network predicts
noise - latent. "distill" then teaches a copy to answer at once what classifier-free guidance
would answer with two passes, for every guidance g between 1 and 6, read from FLUX's guidance
embedding: v(no text) + g * (v(text) - v(no text)). "schnell" makes its twin of four steps.
"""
import math
import random
import time

import numpy as np
import torch
import torch.nn.functional as F

import common
import data
import draw
import train_text
import train_vae

SQUARES, OTHERS = 40000, 5000     # drawings of 128x128, and of each other shape
SQUARE_STEPS = 0.7                # so often a step sees squares
SHIFT = math.exp(0.5 - 0.65 * 192 / 3840)     # FLUX's time shift at 64 image tokens


def build(guidance=True):
    from diffusers import FluxTransformer2DModel
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=32,
        num_attention_heads=8, joint_attention_dim=train_text.WIDTH,
        pooled_projection_dim=train_text.WIDTH, guidance_embeds=guidance, axes_dims_rope=(4, 14, 14))
    for name, p in model.named_parameters():   # every block starts as the identity
        if name.startswith("proj_out") or (".linear." in name and "norm" in name):
            torch.nn.init.zeros_(p)
    return model


def pack(z):
    """(n, 16, h, w) to FLUX's tokens of 2x2 latent pixels: (n, h/2 * w/2, 64)."""
    n, c, h, w = z.shape
    return z.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(x, h, w):
    n = len(x)
    return x.view(n, h // 2, w // 2, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, 16, h, w)


def image_ids(h=8, w=8):
    ids = torch.zeros(h, w, 3)
    ids[..., 1] = torch.arange(h)[:, None]
    ids[..., 2] = torch.arange(w)[None]
    return ids.reshape(-1, 3)


def drawings(run, shape):
    """Where the drawings of a shape are, without the file's ending."""
    return f"{run}/flow-{shape}".replace(":", "x")


def load_vae(run):
    vae = train_vae.build()
    vae.load_state_dict(common.load(f"{run}/vae.pt")["avg"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def latents(run):
    """All latents by shape, packed and normalised to zero mean and unit deviation; made once."""
    path = f"{run}/latents.pt"
    if not (old := common.load(path)):
        vae, packed = load_vae(run).to(memory_format=torch.channels_last), {}
        for shape in draw.SHAPES:
            pixels, parts = np.load(drawings(run, shape) + ".npy", mmap_mode="r"), []
            for i in range(0, len(pixels), 32):
                x = torch.from_numpy(np.array(pixels[i:i + 32])).permute(0, 3, 1, 2).float() / 127.5 - 1
                parts.append(vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist.mean.contiguous().half())
            packed[shape] = torch.cat(parts)
            print("latents", shape, len(packed[shape]))
        z = packed["1:1"].float()
        print("latents: channel deviations", z.std((0, 2, 3)).numpy().round(3))
        old = dict(shift=z.mean().item(), scale=1 / z.std().item())
        old["sets"] = {k: pack((v.float() - old["shift"]) * old["scale"]).half() for k, v in packed.items()}
        common.save(path, **old)
    return old


def grid(shape):
    """Height and width of a shape in tokens."""
    width, height = draw.SHAPES[shape]
    return height // 16, width // 16


class Text:
    """Frozen encoders. `length` is how many T5 tokens the transformer gets to see."""

    def __init__(self, run):
        self.tokens, self.clip, self.t5 = train_text.load(run)

    @torch.no_grad()
    def __call__(self, texts, length=data.TEXT_LENGTH):
        one, two = self.tokens(texts)
        return self.clip(one).pooler_output, self.t5(two)[0][:, :length]


def velocity(model, x, t, g, pooled, tokens, shape="1:1"):
    return model(hidden_states=x, timestep=t, guidance=g, pooled_projections=pooled,
                 encoder_hidden_states=tokens, img_ids=image_ids(*grid(shape)),
                 txt_ids=torch.zeros(tokens.shape[1], 3), return_dict=False)[0]


def times(n):
    """Mostly logit-normal, some uniform, shifted as inference is."""
    t = torch.where(torch.rand(n) < 0.8, torch.randn(n).sigmoid(), torch.rand(n))
    return SHIFT * t / (1 + (SHIFT - 1) * t)


@torch.no_grad()
def sample(model, text, vae, norm, prompts, guidance=1.0, steps=20, seed=0, cfg=None, shape="1:1", shift=SHIFT):
    """Euler sampling without the pipeline: uint8 pictures (n, height, width, 3)."""
    pooled, tokens = text(prompts)
    empty = text([""] * len(prompts)) if cfg else None
    h, w = grid(shape)
    x = torch.randn(len(prompts), h * w, 64, generator=torch.Generator().manual_seed(seed))
    t = torch.linspace(1, 1 / steps, steps)
    t = torch.cat([shift * t / (1 + (shift - 1) * t), torch.zeros(1)])
    g = None if guidance is None else torch.full((len(prompts),), float(guidance))
    for a, b in zip(t[:-1], t[1:]):
        v = velocity(model, x, a.expand(len(x)), g, pooled, tokens, shape)
        if cfg:
            u = velocity(model, x, a.expand(len(x)), g, *empty, shape)
            v = u + cfg * (v - u)
        x = x + (b - a) * v
    y = vae.decode(unpack(x, 2 * h, 2 * w) / norm["scale"] + norm["shift"]).sample
    return ((y.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


PROMPTS = [
    "a portrait of a person with long red hair and glasses, smiling, wearing a blue shirt, yellow background",
    "a portrait of a bald man with a beard, wearing a green shirt, orange background",
    "portrait, short black hair, sunglasses, white shirt, teal background",
    "a sad woman with a blond bun, wearing a red shirt, purple background",
    "a surprised person with curly blue hair and dark skin, wearing a yellow shirt, gray background",
    "a portrait of a person with a pink bob, wearing a black beanie and a purple shirt, white background",
]


def preview(model, text, vae, norm, path, **how):
    from PIL import Image
    from sheet import sheet
    p = sample(model, text, vae, norm, PROMPTS * 2, **how)
    sheet([Image.fromarray(x) for x in p], PROMPTS * 2, zoom=2).save(path)


def setup(o, peak, name, minutes_decay=0.999, model=None):
    model = model or build()
    opt = torch.optim.AdamW(model.parameters(), peak, (0.9, 0.95), weight_decay=0.01)
    avg, budget = common.Average(model, minutes_decay), common.Budget(o.minutes)
    return model, opt, avg, budget, common.resume(f"{o.run}/{name}.pt", model, opt, avg, budget)


def loop(o, name, model, opt, avg, budget, step, norm, text, loss_of, check, warmup=200):
    torch.manual_seed(o.seed + 1000 * common.rank() + step)
    rng = random.Random(f"{name}-{o.seed}-{step}-{common.rank()}")
    sets = {k: (v, np.load(drawings(o.run, k) + ".attr.npy")) for k, v in norm["sets"].items()}
    others = [k for k in sets if k != "1:1"]
    params, losses, saved, start = list(model.parameters()), [], time.time(), time.time()

    def store():
        common.save(f"{o.run}/{name}.pt", model=model.state_dict(), opt=opt.state_dict(),
                    avg=avg.module.state_dict(), step=step, spent=budget.spent)

    while (done := budget.progress()) < 1:
        for g in opt.param_groups:
            g["lr"] = common.rate(done, step, o.lr, warmup)
        shape = "1:1" if rng.random() < SQUARE_STEPS else rng.choice(others)
        z, rows = sets[shape]
        k = rng.choices(range(256, len(rows)), k=o.batch)
        texts, _ = train_text.captions(rows[k], rng, 0.1)
        # Padding tokens cost time and teach little: few of them until the last part.
        length = data.TEXT_LENGTH if done > 0.75 else rng.randint(24, 36)
        loss = loss_of(z[k].float(), *text(texts, length), length, shape)
        opt.zero_grad()
        loss.backward()
        common.average_gradients(params)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        avg.update(model)
        losses.append(loss.item())
        step += 1
        if step % 50 == 0:
            print(f"{name} step {step} {done:.1%} loss {np.mean(losses):.4f} "
                  f"{(time.time() - start) / len(losses):.2f} s/step")
            losses, start = [], time.time()
        if time.time() - saved > 240:
            saved = time.time()
            store()
            if common.rank() == 0:
                check(avg.module)
    store()
    if common.rank() == 0:
        check(avg.module)


def train(o):
    if common.rank() == 0:
        norm = latents(o.run)
    while not (norm := common.load(f"{o.run}/latents.pt")):
        time.sleep(3)
    text, vae = Text(o.run), load_vae(o.run)
    state = setup(o, o.lr, "transformer")
    model = state[0]
    print("parameters", sum(p.numel() for p in model.parameters()))
    rows = np.load(drawings(o.run, "1:1") + ".attr.npy")[:128]
    gen = torch.Generator().manual_seed(1)
    fixed = text(train_text.captions(rows, random.Random(1))[0])
    z, t = norm["sets"]["1:1"][:128].float(), torch.rand(128, generator=gen)[:, None, None]
    noise = torch.randn(z.shape, generator=gen)

    def check(avg):
        with torch.no_grad():
            v = velocity(avg, z + t * (noise - z), t[:, 0, 0], torch.ones(128), *fixed)
        print(f"transformer validation {F.mse_loss(v, noise - z).item():.4f}")
        preview(avg, text, vae, norm, f"{o.run}/transformer.png")

    def loss_of(z, pooled, tokens, length, shape):
        t, noise = times(len(z)), torch.randn_like(z)
        x = z + t[:, None, None] * (noise - z)
        return F.mse_loss(velocity(model, x, t, torch.ones(len(z)), pooled, tokens, shape), noise - z)

    loop(o, "transformer", *state, norm, text, loss_of, check)


def distill(o):
    norm, text, vae = common.load(f"{o.run}/latents.pt"), Text(o.run), load_vae(o.run)
    teacher = build()
    teacher.load_state_dict(common.load(f"{o.run}/transformer.pt")["avg"])
    teacher.eval().requires_grad_(False)
    state = setup(o, o.lr, "distill", 0.99)
    model = state[0]
    if not state[-1]:
        model.load_state_dict(teacher.state_dict())
        state[2].module.load_state_dict(teacher.state_dict())
    none = text([""] * o.batch)

    def loss_of(z, pooled, tokens, length, shape):
        n = len(z)
        t, noise, one = times(n), torch.randn_like(z), torch.ones(n)
        g = 1 + 5 * torch.rand(n)
        x = z + t[:, None, None] * (noise - z)
        with torch.no_grad():
            c = velocity(teacher, x, t, one, pooled, tokens, shape)
            u = velocity(teacher, x, t, one, none[0], none[1][:, :length], shape)
        return F.mse_loss(velocity(model, x, t, g, pooled, tokens, shape), u + g[:, None, None] * (c - u))

    def check(avg):
        preview(avg, text, vae, norm, f"{o.run}/distill.png", guidance=3.0)

    loop(o, "distill", *state, norm, text, loss_of, check, warmup=20)


FAST_STEPS = 4      # of the twin; its times are not shifted


def without_guidance(model, guidance):
    """The same answers as `model` gives at one guidance, from a transformer that has no embedding of it."""
    fast, state = build(guidance=False), model.state_dict()
    embed = model.time_text_embed
    with torch.no_grad():
        constant = embed.guidance_embedder(embed.time_proj(torch.tensor([1000.0 * guidance])))[0]
    bias = "time_text_embed.timestep_embedder.linear_2.bias"
    state[bias] = state[bias] + constant        # a new tensor: the old one is the model's own
    fast.load_state_dict({k: v for k, v in state.items() if "guidance_embedder" not in k})
    return fast


def schnell(o):
    """One step of the twin is to land where four steps of the guided model do."""
    norm, text, vae = common.load(f"{o.run}/latents.pt"), Text(o.run), load_vae(o.run)
    teacher = build()
    teacher.load_state_dict(common.load(f"{o.run}/distill.pt")["avg"])
    teacher.eval().requires_grad_(False)
    state = setup(o, o.lr, "schnell", 0.99, without_guidance(teacher, o.guidance).requires_grad_(True))
    model = state[0]

    def loss_of(z, pooled, tokens, length, shape):
        n, noise = len(z), torch.randn_like(z)
        t, g = 1 - torch.randint(FAST_STEPS, (n,)) / FAST_STEPS, torch.full((n,), o.guidance)
        x = start = z + t[:, None, None] * (noise - z)
        with torch.no_grad():
            for i in range(4):
                at = t - i / 4 / FAST_STEPS
                x = x - velocity(teacher, x, at, g, pooled, tokens, shape) / 4 / FAST_STEPS
        return F.mse_loss(velocity(model, start, t, None, pooled, tokens, shape), (start - x) * FAST_STEPS)

    def check(avg):
        preview(avg, text, vae, norm, f"{o.run}/schnell.png", guidance=None, steps=FAST_STEPS, shift=1.0)

    loop(o, "schnell", *state, norm, text, loss_of, check, warmup=20)
