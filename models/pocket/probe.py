"""Read a portrait: what its caption could say (attributes) and what no caption says (the face).

    python probe.py drawings                      # is the network right on new drawings?
    python probe.py write                         # write probe.json: layout of the outputs, prompts, seeds
    python probe.py model weights --json out.json # 200 held-out prompts through diffusers
    python probe.py folder pictures/list.json     # judge PNGs: [{"file": ..., "attributes": {...}}]

One small convolutional network (`probe.safetensors`, trained by train_probe.py) sees the 128x128 RGB
picture as pixel / 127.5 - 1 in NCHW and gives one vector of numbers, in this order:

- for every attribute of `draw.CHOICES` one logit per value: the largest is the answer. The hair
  colour of a bald person and the colour of no hat are not asked;
- nine measures of the face (`FEATURES`), in units of `draw.Face`;
- the logarithm of the variance of each of them: how unsure the network is, as when hair hides an ear;
- logits of eye colour, mark, shape of the nose and kind of brows (`KINDS`).

Who a face belongs to is decided from the last three by identity.py.
"""
import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import draw
from sheet import sheet

HERE = Path(__file__).parent
FEATURES = ("width", "height", "jaw", "eye_gap", "eye_size", "brow", "nose", "mouth", "ears")
KINDS = {"eye_color": tuple(range(len(draw.EYES))), "mark": draw.ALL_MARKS,
         "nose_shape": draw.NOSES, "brows": draw.BROWS}
WIDTHS, HIDDEN = (16, 24, 48, 64, 64), 128      # channels after each halving; units before the outputs


def layout():
    """Where each part of the output vector lies: {name: (start, end)}."""
    sizes = {k: len(v) for k, v in draw.CHOICES.items()}
    sizes |= {"features": len(FEATURES), "log_variance": len(FEATURES)} | {k: len(v) for k, v in KINDS.items()}
    places, start = {}, 0
    for name, n in sizes.items():
        places[name] = (start, start + n)
        start += n
    return places


LAYOUT = layout()


class Probe(torch.nn.Module):
    """Five times a 3x3 convolution of stride 2 and SiLU, then two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.ModuleList(
            torch.nn.Conv2d(a, b, 3, 2, 1) for a, b in zip((3,) + WIDTHS, WIDTHS))
        self.hidden = torch.nn.Linear(WIDTHS[-1] * 16, HIDDEN)
        self.out = torch.nn.Linear(HIDDEN, LAYOUT["brows"][1])

    def forward(self, x):
        for conv in self.conv:
            x = torch.nn.functional.silu(conv(x))
        return self.out(torch.nn.functional.silu(self.hidden(x.flatten(1))))


def load(path=HERE / "probe.safetensors"):
    net = Probe()
    net.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return net.eval().requires_grad_(False)


def vectors(net, pictures):
    """The outputs for pictures (n, 128, 128, 3) of uint8, or a list of images."""
    if not isinstance(pictures, np.ndarray):
        pictures = np.stack([np.asarray(p.convert("RGB")) for p in pictures])
    out = []
    for i in range(0, len(pictures), 100):
        x = torch.from_numpy(pictures[i:i + 100]).permute(0, 3, 1, 2).float() / 127.5 - 1
        out.append(net(x).numpy())
    return np.concatenate(out)


def attributes(vector):
    """The attributes that one output vector tells."""
    return {k: v[int(vector[slice(*LAYOUT[k])].argmax())] for k, v in draw.CHOICES.items()}


def asked(a):
    """The attributes that a picture of `a` can show."""
    want = dict(vars(a))
    if a.style == "bald":
        del want["hair"]
    if a.hat == "none":
        del want["hat_color"]
    return want


def prompts(count=200, seed="probe"):
    """Held-out prompts that say everything but, often, the skin."""
    rng, out = random.Random(seed), []
    while len(out) < count:
        a = draw.sample_split(rng, test=True)
        text, said = draw.caption(a, rng, every=True)
        said = said | {"glasses", "hat", "beard"}        # nobody mentions them where they are absent
        out.append(dict(prompt=text, seed=1000 + len(out),
                        attributes={k: v for k, v in asked(a).items() if k in said}))
    return out


def score(pairs):
    """pairs of (picture, wanted attributes) to {attribute: (right, asked)} and the misses."""
    three = ("background", "shirt", "hair")
    table = {k: [0, 0] for k in (*draw.CHOICES, "+".join(three), "all")}
    misses, read = [], vectors(load(), [p for p, _ in pairs])
    for i, (vector, (_, want)) in enumerate(zip(read, pairs)):
        got = attributes(vector)
        wrong = {k: [v, got[k]] for k, v in want.items() if got[k] != v}
        groups = [(k, (k,)) for k in want] + [("all", tuple(want))]
        if all(k in want for k in three):
            groups.append(("+".join(three), three))
        for name, members in groups:
            table[name][0] += not any(k in wrong for k in members)
            table[name][1] += 1
        if wrong:
            misses.append(dict(picture=i, wanted_and_read=wrong))
    return table, misses


def show(table):
    for k, (right, n) in table.items():
        print(f"{k:24} {right:4} of {n:4}  {right / max(1, n):8.2%}")


def judge_drawings(o):
    """New drawings of the held-out combinations, half of the faces with marks."""
    rng, pairs = random.Random("drawings"), []
    while len(pairs) < o.count:
        a = draw.sample_split(rng, test=True)
        face = draw.sample_any_face(rng) if len(pairs) % 2 else draw.sample_face(rng)
        pairs.append((draw.draw(a, face, rng), asked(a)))
    return score(pairs)


def generate(folder, cases, guidance, steps=20, batch=10, dtype="float32"):
    """The pictures of the prompts through diffusers; each prompt has its own seed."""
    from diffusers import FluxPipeline
    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    out = []
    for i in range(0, len(cases), batch):
        part = cases[i:i + batch]
        out += pipe([c["prompt"] for c in part], height=128, width=128, num_inference_steps=steps,
                    guidance_scale=guidance, max_sequence_length=64,
                    generator=[torch.Generator().manual_seed(c["seed"]) for c in part]).images
    return out


def judge_model(o):
    cases = prompts(o.count)
    pictures = generate(o.path, cases, o.guidance, o.steps)
    if o.sheet:
        sheet(pictures[:24], [c["prompt"] for c in cases], zoom=2).save(o.sheet)
    return score([(p, c["attributes"]) for p, c in zip(pictures, cases)])


def judge_folder(o):
    path = Path(o.path)
    path = path / "list.json" if path.is_dir() else path
    cases = json.loads(path.read_text())
    return score([(Image.open(path.parent / c["file"]), c["attributes"]) for c in cases])


def write(o):
    (HERE / "probe.json").write_text(json.dumps(dict(
        size=[128, 128], steps=20, guidance=o.guidance, text_tokens=64,
        layout=LAYOUT, values=draw.CHOICES, features=FEATURES, kinds=KINDS,
        prompts=prompts(o.count)), indent=1) + "\n")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("what", choices=("drawings", "write", "model", "folder"))
    ap.add_argument("path", nargs="?", default=str(HERE / "weights"), help="model or folder to judge")
    ap.add_argument("--count", type=int, default=200, help="how many prompts or drawings")
    ap.add_argument("--guidance", type=float, default=3.0, help="value of the guidance embedding")
    ap.add_argument("--steps", type=int, default=20, help="denoising steps")
    ap.add_argument("--json", help="also write the figures to this file")
    ap.add_argument("--sheet", help="model: write a contact sheet of the first 24 pictures")
    o = ap.parse_args()
    if o.what == "write":
        return write(o)
    table, misses = dict(drawings=judge_drawings, model=judge_model, folder=judge_folder)[o.what](o)
    show(table)
    if o.json:
        Path(o.json).write_text(json.dumps(dict(
            figures={k: dict(right=r, asked=n) for k, (r, n) in table.items()}, misses=misses), indent=1) + "\n")


if __name__ == "__main__":
    main()
