"""Read attributes back from a portrait, and measure how well a model follows its prompts.

    python probe.py drawings                      # are the rules right on the drawings themselves?
    python probe.py write                         # write probe.json: rules, prompts, seeds
    python probe.py model weights --json out.json # 200 held-out prompts through diffusers
    python probe.py folder pictures/list.json     # judge PNGs: [{"file": ..., "attributes": {...}}]

The rules, simple on purpose (any language can repeat them from probe.json):

- A picture is 128x128 RGB. A region is a list of boxes [x0, y0, x1, y1], x1 and y1 excluded.
- A colour attribute (background, shirt, hair, skin): every pixel of its region finds the nearest
  colour (squared distance in RGB) among the palette and the `others`; each pixel whose nearest is
  in the palette is a vote for that name. Most votes win; no votes at all read "unknown".
  Ties go to the name that comes first in the palette.
- glasses: a pixel is dark if its largest channel is below `dark`. Share of dark pixels in the boxes
  `lenses` at least `sunglasses`: sunglasses; else in the boxes `frames` at least `glasses`: glasses;
  else none.
"""
import argparse
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

import draw
from sheet import sheet

HERE = Path(__file__).parent
TEMPLES = [[36, 54, 40, 60], [88, 54, 92, 60]]
DARK = [[28, 28, 34]]
RULES = {
    "background": dict(boxes=[[2, 3, 14, 40], [114, 3, 126, 40]], palette=draw.BACKGROUND, others=[]),
    "shirt": dict(boxes=[[46, 117, 82, 126]], palette=draw.SHIRT, others=[]),
    "hair": dict(boxes=TEMPLES, palette=draw.HAIR, others=list(draw.SKIN.values())),
    "skin": dict(boxes=[[60, 67, 68, 72]], palette=draw.SKIN, others=DARK),
    "glasses": dict(lenses=[[47, 60, 57, 68], [71, 60, 81, 68]], sunglasses=0.55,
                    frames=[[46, 69, 59, 76], [69, 69, 82, 76]], glasses=0.17, dark=84),
}
JUDGED = ("background", "shirt", "hair", "glasses", "skin")


def pixels(picture, boxes):
    a = np.asarray(picture.convert("RGB"), np.int64)
    return np.concatenate([a[y0:y1, x0:x1].reshape(-1, 3) for x0, y0, x1, y1 in boxes])


def dark_share(picture, region):
    r = RULES["glasses"]
    return float((pixels(picture, r[region]).max(1) < r["dark"]).mean())


def read(picture):
    """All attributes of one picture, as a dictionary."""
    found = {}
    for name, rule in RULES.items():
        if name == "glasses":
            found[name] = ("sunglasses" if dark_share(picture, "lenses") >= rule["sunglasses"] else
                           "glasses" if dark_share(picture, "frames") >= rule["glasses"] else "none")
            continue
        names = list(rule["palette"])
        colors = np.array(list(rule["palette"].values()) + rule["others"])
        p = pixels(picture, rule["boxes"])
        nearest = ((p[:, None] - colors[None]) ** 2).sum(2).argmin(1)
        votes = np.bincount(nearest, minlength=len(colors))[:len(names)]
        found[name] = names[int(votes.argmax())] if votes.any() else "unknown"
    return found


def prompts(count=200, seed="probe"):
    """Held-out prompts that say everything; nobody is bald, so that hair can be read."""
    rng, out = random.Random(seed), []
    while len(out) < count:
        a = draw.sample_split(rng, test=True)
        if a.style == "bald":
            continue
        text, said = draw.caption(a, rng, every=True)
        want = {k: getattr(a, k) for k in JUDGED if k in said or k == "glasses"}
        out.append(dict(prompt=text, seed=1000 + len(out), attributes=want))
    return out


def score(pairs):
    """pairs of (picture, wanted attributes) to {attribute: (right, asked)}."""
    table = {k: [0, 0] for k in JUDGED}
    table["background+shirt+hair"] = [0, 0]
    misses = []
    for i, (picture, want) in enumerate(pairs):
        got = read(picture)
        for k, v in want.items():
            if k in table:
                table[k][0] += got[k] == v
                table[k][1] += 1
        three = [k for k in ("background", "shirt", "hair") if k in want]
        if len(three) == 3:
            table["background+shirt+hair"][0] += all(got[k] == want[k] for k in three)
            table["background+shirt+hair"][1] += 1
        wrong = {k: [v, got[k]] for k, v in want.items() if k in got and got[k] != v}
        if wrong:
            misses.append(dict(picture=i, wanted_and_read=wrong))
    return table, misses


def show(table):
    for k, (right, asked) in table.items():
        print(f"{k:24} {right:4} of {asked:4}  {right / max(1, asked):7.1%}")


def judge_drawings(o):
    rng, pairs = random.Random("drawings"), []
    while len(pairs) < o.count:
        a = draw.sample_attributes(rng)
        want = {k: getattr(a, k) for k in JUDGED if k != "hair" or a.style != "bald"}
        pairs.append((draw.draw(a, draw.sample_face(rng), rng), want))
    return score(pairs)


def generate(folder, cases, guidance, steps=20, batch=10, dtype="float32"):
    """The pictures of the prompts through diffusers; each prompt has its own seed."""
    import torch
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
    rules = {k: dict(v) for k, v in RULES.items()}
    (HERE / "probe.json").write_text(json.dumps(dict(
        size=[128, 128], steps=20, guidance=o.guidance, text_tokens=64, rules=rules,
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
