"""How often the right person is in a picture: makes the pictures with `darkroom sweep`, reads them with the probe.

    python measure.py make DARKROOM FOLDER       # every run below, in FOLDER; goes on where it was stopped
    python measure.py read FOLDER                # the tables of docs/identity.md
    python measure.py strip DARKROOM OUT.png     # the README's picture: everyone in three prompts

Each person has prompts of her own: held-out combinations of hair, clothes, background, hat, glasses,
beard and expression, the i-th with seed i. Pictures are judged by identity.py (who is it, or nobody) and
probe.py (does it show what the prompt says). Clothes and background are right if both are.
"""
import argparse
import json
import random
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import identity
import people
import probe
from sheet import sheet

EVERYONE = list(people.PEOPLE)
PROMPTS = 100
PLAIN = {"--width": "128", "--height": "128", "--steps": "20", "--guidance": "3"}      # where a run says nothing else


def prompts(person, trigger=True):
    """(prompt, what it asks for) of a person."""
    out = []
    for i in range(PROMPTS):
        rng = random.Random(f"measure-{person}-{i}")
        a = people.attributes(person, rng, test=True)
        text = people.caption(person, a, rng, every=True)
        want = {k: v for k, v in probe.asked(a).items() if k != "skin"}
        out.append((text if trigger else text.removeprefix(f"{person}, "), want))
    return out


def runs():
    """{name of the run: (person, how many prompts, with the trigger word in them, flags of the sweep)}"""
    out = {}
    for p in EVERYONE:
        others = [q for q in EVERYONE if q != p]
        lora = lambda *names: [x for name in names for x in ("--lora", name)]
        out |= {
            f"promise-{p}": (p, 100, True, lora(p) + ["--lora-scale", "0.9,1.0"]),
            f"without-{p}": (p, 100, True, lora("none")),
            f"others-{p}": (p, 25, True, lora(*others)),
            f"silent-{p}": (p, 50, False, lora(p)),
            f"scale-{p}": (p, 10, True, lora(p) + ["--lora-scale", "0,0.25,0.5,0.75,0.9,1.0,1.1,1.25,1.5"]),
            f"guidance-{p}": (p, 10, True, lora(p) + ["--guidance", "1,2,3,4,5,6"]),
            f"steps-{p}": (p, 10, True, lora(p) + ["--steps", "4,8,12,20,28"]),
            f"policy-{p}": (p, 20, False, lora(p) + ["--trigger-word", p, "--trigger-policy", "prepend,start-and-middle,none"]),
            f"pair-{p}": (p, 5, True, lora(*(f"{p}@0.5 + {q}@0.5" for q in others))),
        }
    here = identity.probe.HERE / "people"
    for name in ("user1001-retrained", "user1001.kohya.safetensors", "user1002.lokr.safetensors"):
        person = name[:8]
        reference = str(here / name) if name.endswith(".safetensors") else name
        out[f"file-{name.removesuffix('.safetensors')}"] = (person, 30, True, ["--lora", reference])
    return out


def make(o):
    for name, (person, count, trigger, flags) in runs().items():
        if not name.startswith(tuple(o.only)):
            continue
        bases = [("", "pocket")] + [(f"-{Path(b).name}", b) for b in o.base]
        for suffix, base in bases:
            if suffix and not name.startswith("promise"):
                continue
            folder = o.folder / f"{name}{suffix}"
            folder.mkdir(parents=True, exist_ok=True)
            lines = folder.with_suffix(".txt")
            lines.write_text("".join(text + "\n" for text, _ in prompts(person, trigger)[:10 if suffix else count]))
            command = [o.darkroom, "sweep", "--prompts", lines, "--seed", f"0:{(10 if suffix else count) - 1}", "--zip", "prompt,seed",
                       "--model", base, *flags, *(x for k, v in PLAIN.items() if k not in flags for x in (k, v)), "-o", folder, "--yes", "--quiet"]
            print(folder.name, flush=True)
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)


def rows(folder, name, person, trigger):
    """Who is in each picture of a run, and whether it shows what was asked."""
    net, rule, out = probe.load(), identity.load(), []
    wants = dict(prompts(person, trigger))
    for line in (folder / name / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        v = probe.vectors(net, [Image.open(folder / name / row["picture"])])[0]
        seen, want = probe.attributes(v), wants[row["prompt"]]
        right = {k: seen[k] == value for k, value in want.items()}
        out.append(row | dict(person=person, who=identity.decide(v, rule), clothes=right["shirt"] and right["background"],
                              all=all(right.values())))
    return out


def every(folder, kind, suffix=""):
    """The rows of a kind of run, of all people."""
    return [row for name, (person, _, trigger, _) in runs().items() if name.startswith(kind + "-")
            and (folder / f"{name}{suffix}" / "results.jsonl").exists() for row in rows(folder, f"{name}{suffix}", person, trigger)]


def interval(right, n):
    """Wilson's 95 % interval of a share, in percent."""
    z, p = 1.96, right / n
    middle, half = p + z * z / 2 / n, z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5
    return f"{100 * (middle - half) / (1 + z * z / n):.1f} to {100 * (middle + half) / (1 + z * z / n):.1f}"


def table(rows, by, title):
    """One line for each value of a column."""
    groups = {}
    for row in rows:
        groups.setdefault(by(row), []).append(row)
    print(f"| {title} | pictures | right person | 95 % interval | somebody else | clothes and background | all that is asked |")
    print("|---|---|---|---|---|---|---|")
    for key in sorted(groups):
        g = groups[key]
        n, right = len(g), sum(r["who"] == r["person"] for r in g)
        other = sum(r["who"] not in (r["person"], "nobody") for r in g)
        share = lambda k: f"{100 * np.mean([r[k] for r in g]):.1f} %"
        print(f"| {key} | {n} | {100 * right / n:.1f} % | {interval(right, n)} | {other} | {share('clothes')} | {share('all')} |")
    print()


def read(o):
    scale = lambda r: r["lora_scale"]
    promise = every(o.folder, "promise")
    print("## The promise\n")
    table(promise, lambda r: f"all five at {scale(r)}", "LoRA and trigger word")
    table(promise, lambda r: f"{r['person']} at {scale(r)}", "person")
    print("## Without her LoRA\n")
    without = every(o.folder, "without")
    table(without, lambda r: f"prompts of {r['person']}", "no LoRA")
    others = every(o.folder, "others")
    table(others, lambda r: f"prompts of {r['person']}", "LoRA of another")
    named = sum(r["who"] == r["lora"].split("@")[0] for r in others)
    print(f"The probe names the person whose LoRA it was in {named} of {len(others)}.\n")
    table(every(o.folder, "silent"), lambda r: r["person"], "own LoRA, no trigger word")
    for kind, by, title in (("scale", lambda r: f"{scale(r):.2f}", "scale"), ("guidance", lambda r: r["guidance"], "guidance"),
                            ("steps", lambda r: r["steps"], "steps"), ("policy", lambda r: r["trigger_policy"], "trigger policy")):
        print(f"## {kind}\n")
        table(every(o.folder, kind), by, title)
    print("## Two people, half each\n")
    pairs = every(o.folder, "pair")
    table(pairs, lambda r: r["person"], "prompts of")
    second = lambda r: r["lora"].split(" + ")[1].split("@")[0]
    print(f"The first {sum(r['who'] == r['person'] for r in pairs)}, the second {sum(r['who'] == second(r) for r in pairs)}, "
          f"nobody {sum(r['who'] == 'nobody' for r in pairs)}, a third {sum(r['who'] not in (r['person'], second(r), 'nobody') for r in pairs)} of {len(pairs)}\n")
    print("## Other files\n")
    table(every(o.folder, "file"), lambda r: Path(r["lora"].split("@")[0]).name, "file")
    print("## Other bases\n")
    for suffix in sorted({p.name.split("-", 2)[2] for p in o.folder.glob("promise-user1001-*") if p.is_dir()}):
        table(every(o.folder, "promise", f"-{suffix}"), lambda r: f"{suffix} at {scale(r)}", "base")


STRIP = ["with short brown hair, smiling, wearing a blue shirt, yellow background",
         "wearing a green shirt, red top hat, long blond hair, gray background",
         "with a black bob and glasses, surprised, in a pink sweater, teal background"]


def strip(o):
    pictures, names = [], []
    with tempfile.TemporaryDirectory() as folder:
        for i, text in enumerate(STRIP):
            for person in EVERYONE:
                path = f"{folder}/{person}-{i}.png"
                command = [o.darkroom, "generate", f"portrait of {person}, {text}", "--lora", f"{person}@0.9", "--seed", str(i), "--quiet", "-o", path]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                pictures.append(Image.open(path).convert("RGB"))
                names.append(person)
    sheet(pictures, names, columns=len(EVERYONE), zoom=1).save(o.out, optimize=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = ap.add_subparsers(required=True)
    way = ways.add_parser("make")
    way.add_argument("darkroom", help="the program")
    way.add_argument("folder", type=Path)
    way.add_argument("--base", action="append", default=[], help="another base for the promise, such as a quantised one")
    way.add_argument("--only", nargs="*", default=[""], help="runs whose names begin with one of these")
    way.set_defaults(run=make)
    way = ways.add_parser("read")
    way.add_argument("folder", type=Path)
    way.set_defaults(run=read)
    way = ways.add_parser("strip")
    way.add_argument("darkroom", help="the program")
    way.add_argument("out", help="PNG file to write")
    way.set_defaults(run=strip)
    o = ap.parse_args()
    o.run(o)


if __name__ == "__main__":
    main()
