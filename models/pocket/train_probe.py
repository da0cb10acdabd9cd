"""Train the probe on drawings, and measure it.

    python train_probe.py data  --run RUN     # draw, and pass a part through the autoencoder
    python train_probe.py train --run RUN     # writes probe.safetensors
    python train_probe.py test  --run RUN     # 2000 held-out drawings, 1000 of them through the autoencoder

RUN is the folder of train.py (its autoencoder is used); the pictures go to RUN/probe or --data.

The probe shall read generated pictures, which are softer and more smudged than drawings. So a part
of the pictures went through the model's own autoencoder, some with noise on the latents, and every
picture of a batch is moved, tinted and made noisy, and some are blurred in patches. Attributes and
faces are sampled independently, so nothing about a face can be read from hair or clothes. What a
picture does not show is not asked (hair colour of the bald) or learnt to be unsure about: the nine
measures are trained with their own predicted variance (Gaussian likelihood), so that sunglasses,
which hide the size of the eyes, turn into a large variance instead of an error.
"""
import argparse
import multiprocessing
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import common
import draw
import probe

TRAIN, PASSED, TEST, TEST_PASSED = 24000, 4500, 2000, 1000
STRETCH = 2.0       # faces up to twice the usual range, so that people may lie outside it


def sample_face(rng):
    """Plain faces as the model draws them, any marks, and any marks with stretched proportions."""
    kind = rng.random()
    if kind < 0.35:
        return draw.sample_face(rng)
    face = draw.sample_any_face(rng)
    if kind < 0.6:
        return face
    return draw.replace(face, **{k: STRETCH * getattr(face, k) for k in probe.FEATURES})


def labels(a, face):
    """One row of numbers: attribute indices, measures, indices of the kinds. -1: not to be asked."""
    want = probe.asked(a)
    return ([v.index(want[k]) if k in want else -1 for k, v in draw.CHOICES.items()]
            + [getattr(face, k) for k in probe.FEATURES]
            + [v.index(getattr(face, k)) for k, v in probe.KINDS.items()])


def _one(job):
    seed, test = job
    rng = random.Random(seed)
    a, face = draw.sample_split(rng, test=test), sample_face(rng)
    return np.asarray(draw.draw(a, face, rng)), labels(a, face)


def passed(vae, pixels, noise=0.0, seed=0, batch=16):
    """Pictures after the autoencoder; `noise` is the largest deviation added to the latents of
    every second picture, in units of the latents' own."""
    out, gen = np.empty_like(pixels), torch.Generator().manual_seed(seed)
    for i in range(0, len(pixels), batch):
        x = torch.from_numpy(pixels[i:i + batch]).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            z = vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist.mean
            size = noise * torch.rand(len(z), 1, 1, 1, generator=gen) * z.std()
            size[::2] = 0
            y = vae.decode(z + size * torch.randn(z.shape, generator=gen)).sample.clamp(-1, 1)
        out[i:i + batch] = ((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return out


def data(o):
    import train_flow
    o.data.mkdir(parents=True, exist_ok=True)
    vae = train_flow.load_vae(o.run).to(memory_format=torch.channels_last)
    for name, count, through in (("train", TRAIN, PASSED), ("test", TEST, TEST_PASSED)):
        pixels, rows = [], []
        with multiprocessing.Pool(1) as pool:
            jobs = [(f"probe-{name}-{i}", name == "test") for i in range(count)]
            for p, row in pool.imap(_one, jobs, 64):
                pixels.append(p), rows.append(row)
        pixels = np.stack(pixels)
        np.save(o.data / f"{name}.npy", pixels)
        np.save(o.data / f"{name}.labels.npy", np.array(rows, np.float32))
        print(name, "drawn", f"{time.process_time():.0f} s", flush=True)
        # The last of the training drawings, but the first of the test drawings.
        part = pixels[-through:] if name == "train" else pixels[:through]
        np.save(o.data / f"{name}.passed.npy", passed(vae, part, 0.3 if name == "train" else 0.0))
        print(name, "passed", f"{time.process_time():.0f} s", flush=True)


# ------------------------------------------------------------------------------------ training

class Spoil:
    """Moves, tints, blurs and soils a batch of uint8 pictures, a little: what is to be read must
    still be there. Noise, blots and masks are made once; making them anew would cost more than the training."""

    def __init__(self, rng, pad=3):
        self.rng, self.pad = rng, pad
        soft = lambda x: F.interpolate(x, size=(128, 128), mode="bilinear").contiguous(memory_format=torch.channels_last)
        self.noise = torch.randn(32, 3, 128, 128).contiguous(memory_format=torch.channels_last)
        self.blots = soft(torch.randn(64, 3, 10, 10))
        self.masks = soft((torch.rand(64, 1, 8, 8) < torch.rand(64, 1, 1, 1)).float())

    def some(self, bank, n):
        """n of a bank, each weighted by a random number up to 1."""
        at = torch.from_numpy(self.rng.integers(0, len(bank), n))
        return bank[at].flip(3 if self.rng.random() < 0.5 else 2) * torch.rand(n, 1, 1, 1)

    def __call__(self, pixels):
        n, pad = len(pixels), self.pad
        wide = np.pad(pixels, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
        move = self.rng.integers(0, 2 * pad + 1, (n, 2))
        x = torch.from_numpy(np.stack([p[y:y + 128, x:x + 128] for p, (x, y) in zip(wide, move)]))
        x = x.permute(0, 3, 1, 2).float() / 127.5 - 1            # stays channels last
        a, b, c = n // 4, n // 3, n // 2
        x[:b] += (F.avg_pool2d(x[:b], 5, 1, 2, count_include_pad=False) - x[:b]) * self.some(self.masks, b)
        x[-a:] += 0.1 * self.some(self.blots, a)
        x[a:c] += 0.06 * self.some(self.noise, c - a)
        return (x * (1 + 0.03 * torch.randn(n, 1, 1, 1))).add_(0.03 * torch.randn(n, 3, 1, 1)).clamp_(-1, 1)


def loss_of(y, rows):
    """Cross entropies of all that has classes, and the likelihood of the measures."""
    part = lambda name: y[:, slice(*probe.LAYOUT[name])]
    asked, loss = rows[:, :len(draw.CHOICES)].long(), 0
    for i, name in enumerate(draw.CHOICES):
        loss = loss + F.cross_entropy(part(name), asked[:, i], ignore_index=-1)
    at = len(draw.CHOICES) + len(probe.FEATURES)
    for i, name in enumerate(probe.KINDS):
        loss = loss + 0.5 * F.cross_entropy(part(name), rows[:, at + i].long())
    unsure = part("log_variance").clamp(-6, 2)
    wrong = (part("features") - rows[:, len(draw.CHOICES):at]).square()
    return loss + 0.25 * (unsure + wrong / unsure.exp()).sum(1).mean()


def train(o):
    torch.manual_seed(o.seed)
    rng = np.random.default_rng(o.seed)
    load = lambda n: np.load(o.data / f"{n}.npy", mmap_mode=None)
    drawn, rows, through = load("train"), load("train.labels"), load("train.passed")
    first = len(drawn) - len(through)
    net = probe.Probe().to(memory_format=torch.channels_last)
    for layer in (*net.conv, net.hidden):      # PyTorch's own start is too quiet for six layers
        torch.nn.init.kaiming_normal_(layer.weight), torch.nn.init.zeros_(layer.bias)
    if o.go_on:
        net.load_state_dict(probe.load().state_dict())
    spoil = Spoil(rng)
    print("parameters", sum(p.numel() for p in net.parameters()))
    opt = torch.optim.AdamW(net.parameters(), o.lr, (0.9, 0.98), weight_decay=1e-3)
    avg, budget, step, losses = common.Average(net, 0.995), common.Budget(o.minutes), 0, []
    while (done := budget.progress()) < 1:
        for g in opt.param_groups:
            g["lr"] = common.rate(done, step, o.lr, 200)
        a, b = rng.integers(0, len(drawn), o.batch * 2 // 3), rng.integers(0, len(through), o.batch - o.batch * 2 // 3)
        pixels = np.concatenate([drawn[a], through[b]])
        order = rng.permutation(o.batch)
        row = np.concatenate([rows[a], rows[first + b]])[order]
        loss = loss_of(net(spoil(pixels[order])), torch.from_numpy(row))
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        opt.step()
        avg.update(net)
        losses.append(loss.item())
        step += 1
        if step % 250 == 0:
            print(f"step {step} {done:.1%} loss {np.mean(losses):.3f}", flush=True)
            losses = []
        if step % 1500 == 0:
            store(avg.module)
    store(avg.module)
    print(f"done, step {step}")


def store(net):
    path = probe.HERE / "probe.safetensors"
    save_file({k: v.half().contiguous() for k, v in net.state_dict().items()}, path,
              {"input": "pixel / 127.5 - 1, NCHW, 3x128x128, RGB"})
    path.chmod(0o644)


# ----------------------------------------------------------------------------------- measuring

def table(y, rows):
    """Per attribute and kind the share of right answers, per measure the error and its claim."""
    part, out, i = lambda name: y[:, slice(*probe.LAYOUT[name])], {}, 0
    bald = rows[:, list(draw.CHOICES).index("style")] == draw.STYLES.index("bald")
    for i, name in enumerate(draw.CHOICES):
        ask = (rows[:, i] >= 0) & ~(bald & (name == "hair"))
        out[name] = float((part(name).argmax(1) == rows[:, i])[ask].mean())
    at = len(draw.CHOICES)
    sure = rows[:, list(draw.CHOICES).index("glasses")] != draw.GLASSES.index("sunglasses")
    error = part("features") - rows[:, at:at + len(probe.FEATURES)]
    unsure = np.exp(part("log_variance").clip(-6, 2) / 2)
    for i, name in enumerate(probe.FEATURES):
        out[name] = [float(np.sqrt((error[:, i] ** 2).mean())), float(np.median(np.abs(error[:, i]))), float(np.median(unsure[:, i]))]
    at += len(probe.FEATURES)
    for i, name in enumerate(probe.KINDS):
        right = part(name).argmax(1) == rows[:, at + i]
        out[name] = float((right[sure] if name == "eye_color" else right).mean())
    return out


def test(o):
    net, load = probe.load(), lambda n: np.load(o.data / f"{n}.npy")
    rows = load("test.labels")
    both = [table(probe.vectors(net, load(n)), rows[:c]) for n, c in (("test", TEST), ("test.passed", TEST_PASSED))]
    print(f"{'':12} {TEST} drawings   {TEST_PASSED} through the autoencoder")
    for name in both[0]:
        print(f"{name:12}", *(f"{v:8.2%}          " if isinstance(v, float) else
                              "rms %.2f median %.2f" % tuple(v[:2]) for v in (t[name] for t in both)))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("stage", choices=("data", "train", "test"))
    ap.add_argument("--run", default="run", help="folder of train.py, with the autoencoder")
    ap.add_argument("--data", type=Path, help="folder of the pictures, RUN/probe if not given")
    ap.add_argument("--minutes", type=float, default=11, help="time budget of the training")
    ap.add_argument("--batch", type=int, default=60, help="pictures per step")
    ap.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--go-on", action="store_true", help="train: start from probe.safetensors; take another seed")
    o = ap.parse_args()
    o.data = o.data or Path(o.run) / "probe"
    torch.set_num_threads(1)
    globals()[o.stage](o)


if __name__ == "__main__":
    main()
