"""Stage "vae": a small AutoencoderKL, 8x down to 16 channels.

Trained mostly on 64x64 crops (it is convolutional), the face more often than the rest, and at
the end on whole pictures. Loss: L1 on pixels, on their horizontal and vertical differences (crisp
edges) and on averages of 8x8 pixels, on differences of the colour channels, L2 on pixels, plus a small KL term that keeps
the latents compact.
"""
import time

import numpy as np
import torch
import torch.nn.functional as F

import common
from sheet import sheet


def build():
    from diffusers import AutoencoderKL
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64), layers_per_block=1, latent_channels=16,
        norm_num_groups=4, sample_size=128, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.0, shift_factor=0.0)
    # Start with little posterior noise and quiet residual branches: both speed up the start.
    torch.nn.init.constant_(model.encoder.conv_out.bias[16:], -5.0)
    for name, p in model.named_parameters():
        if ".conv2.weight" in name or ".to_out.0.weight" in name:
            p.data.mul_(0.1)
    return model


def batch(sets, rng, n, crop):
    out = np.empty((n, crop, crop, 3), np.uint8)
    for i in range(n):
        pixels = sets[1] if rng.random() < 0.15 else sets[0]
        k = rng.integers(len(pixels))
        lo, hi = (20, 48) if rng.random() < 0.6 else (0, 65)      # near the eyes, or anywhere
        x, y = (rng.integers(lo, hi), rng.integers(lo, hi)) if crop < 128 else (0, 0)
        piece = pixels[k, y:y + crop, x:x + crop]
        out[i] = piece[:, ::-1] if rng.random() < 0.5 else piece
    return torch.from_numpy(out).permute(0, 3, 1, 2).float() / 127.5 - 1


def similarity(x, y, window=7):
    """Structural similarity (SSIM) of pictures in [-1, 1], with a flat window."""
    mean = lambda t: F.avg_pool2d(t, window, 1)
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.02 ** 2, 0.06 ** 2
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean()


def distance(x, y):
    """How far the picture y is from x."""
    l1 = (y - x).abs().mean()
    dx = lambda t: t[..., 1:] - t[..., :-1]
    dy = lambda t: t[..., 1:, :] - t[..., :-1, :]
    edges = (dx(y) - dx(x)).abs().mean() + (dy(y) - dy(x)).abs().mean()
    d = y - x
    pool = F.avg_pool2d(d, 8).abs().mean()
    chroma = (d[:, 0] - d[:, 1]).abs().mean() + (d[:, 2] - d[:, 1]).abs().mean()
    return l1 + 0.5 * edges + pool + 2 * d.square().mean() + 0.5 * chroma + 0.2 * (1 - similarity(x, y)), l1, edges


def loss_of(model, x, kl_weight):
    q = model.encode(x).latent_dist
    loss, l1, edges = distance(x, model.decode(q.sample()).sample)
    kl = 0.5 * (q.mean.pow(2) + q.var - 1 - q.logvar).mean()
    return loss + kl_weight * kl, (l1, edges, kl)


@torch.no_grad()
def preview(model, pixels, path):
    x = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    y = model.decode(model.encode(x).latent_dist.mean).sample
    print(f'SSIM {similarity(x, y.clamp(-1, 1)).item():.4f}')
    psnr = -10 * torch.log10(((y.clamp(-1, 1) - x) / 2).pow(2).mean()).item()
    if path:
        from PIL import Image
        both = torch.stack([x, y], 1).flatten(0, 1).clamp(-1, 1)
        both = ((both + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        sheet([Image.fromarray(p) for p in both], columns=6, zoom=2).save(path)
    return psnr


def train(o):
    sets = [np.load(f"{o.run}/{n}.npy", mmap_mode="r") for n in ("plain", "marks")]
    test, sets = sets[0][:12], [sets[0][12:], sets[1]]
    path = f"{o.run}/vae.pt"
    model = build().to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(model.parameters(), o.lr, (0.9, 0.99), weight_decay=1e-4)
    avg, budget = common.Average(model, 0.997), common.Budget(o.minutes)
    step = common.resume(path, model, opt, avg, budget)
    torch.manual_seed(o.seed + 1000 * common.rank() + step)
    rng, saved, sums = np.random.default_rng([o.seed, step, common.rank()]), time.time(), np.zeros(3)
    print("parameters", sum(p.numel() for p in model.parameters()))
    while (done := budget.progress()) < 1:
        for g in opt.param_groups:
            g["lr"] = common.rate(done, step, o.lr, 60)
        whole = done > 0.85
        x = batch(sets, rng, o.batch // 4 if whole else o.batch, 128 if whole else 64)
        loss, parts = loss_of(model, x.to(memory_format=torch.channels_last), 3e-4)
        opt.zero_grad()
        loss.backward()
        common.average_gradients(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        opt.step()
        avg.update(model)
        sums += [p.item() for p in parts]
        step += 1
        if step % 50 == 0:
            l1, edges, kl = sums / 50
            print(f"vae step {step} {done:.1%} l1 {l1:.4f} edges {edges:.4f} kl {kl:.2f}")
            sums[:] = 0
        if common.rank() == 0 and time.time() - saved > 150:
            saved = time.time()
            common.save(path, model=model.state_dict(), opt=opt.state_dict(),
                        avg=avg.module.state_dict(), step=step, spent=budget.spent)
            print(f"vae checkpoint, PSNR {preview(avg.module, test, f'{o.run}/vae.png'):.2f} dB")
    common.save(path, model=model.state_dict(), opt=opt.state_dict(),
                avg=avg.module.state_dict(), step=step, spent=budget.spent)
    if common.rank():
        return
    print(f"vae done, step {step}, PSNR {preview(avg.module, test, f'{o.run}/vae.png'):.2f} dB")
