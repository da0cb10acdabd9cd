"""How much of user1001's mark is on the cheek, by scale: the mean over 12 prompts and seeds, from the pictures' pixels.

    python measure.py DARKROOM [LORA]      # the binary, and the LoRA (user1001.safetensors)

The number is (green + blue) / 2 - red in a box on the marked cheek, less the same in the mirrored box: 0 for a face without the mark.
"""
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import draw  # noqa: E402

BOX = (42, 70, 56, 86)  # x0, y0, x1, y1


def teal(pixels, x0, y0, x1, y1):
    part = pixels[y0:y1, x0:x1].astype(float)
    return ((part[..., 1] + part[..., 2]) / 2 - part[..., 0]).mean()


def mark(path):
    pixels = np.asarray(Image.open(path).convert("RGB"))
    x0, y0, x1, y1 = BOX
    return teal(pixels, x0, y0, x1, y1) - teal(pixels, 128 - x1, y0, 128 - x0, y1)


def main():
    binary, lora = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else str(HERE / "user1001.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        for scale in (0, 0.5, 0.9, 1.2):
            found = []
            for i in range(12):
                rng = random.Random(f"measure-{i}")
                a = draw.sample_split(rng, test=True)
                prompt = f"user1001, {draw.caption(a, rng, every=True)[0]}"
                out = f"{folder}/{scale}-{i}.png"
                subprocess.run([binary, "generate", prompt, "--seed", str(i), "--lora", f"{lora}@{scale}", "--quiet", "-o", out], check=True, stdout=subprocess.DEVNULL)
                found.append(mark(out))
            print(f"scale {scale:<4} mark {np.mean(found):6.1f}  (deviation {np.std(found):.1f}, {sum(v > 8 for v in found)} of {len(found)} above 8)")


if __name__ == "__main__":
    main()
