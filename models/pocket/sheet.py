"""Contact sheets: many small pictures, and what they should show, in one."""
import argparse
import random

from PIL import Image, ImageDraw

import draw


def sheet(pictures, texts=None, columns=6, zoom=1):
    """A contact sheet; `texts` are written under the pictures."""
    w, h = pictures[0].size
    w, h = w * zoom, h * zoom
    foot = 48 if texts else 0
    rows = -(-len(pictures) // columns)
    out = Image.new("RGB", (columns * (w + 4), rows * (h + foot + 4)), (30, 30, 30))
    d = ImageDraw.Draw(out)
    for i, pic in enumerate(pictures):
        x, y = i % columns * (w + 4), i // columns * (h + foot + 4)
        out.paste(pic.resize((w, h), Image.NEAREST) if zoom > 1 else pic, (x, y))
        if texts:
            n = w // 6
            for k in range(0, min(len(texts[i]), 4 * n), n):
                d.text((x, y + h + 1 + 11 * (k // n)), texts[i][k:k + n], fill=(255, 255, 255))
    return out


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description="Draw a contact sheet of random training portraits.")
    ap.add_argument("output", help="PNG file to write")
    ap.add_argument("--seed", type=int, default=0, help="another seed draws other people")
    ap.add_argument("--marks", action="store_true", help="also draw marks (star, freckles ...)")
    args = ap.parse_args()
    rng = random.Random(args.seed)
    people = [draw.sample_attributes(rng) for _ in range(24)]
    pictures = [draw.draw(a, draw.sample_face(rng, args.marks), rng) for a in people]
    sheet(pictures, [draw.caption(a, rng)[0] for a in people], zoom=2).save(args.output)
