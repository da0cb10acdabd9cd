"""Which of the people is in a picture, or nobody: from the face that the probe measures.

    python identity.py write --run RUN       # choose the threshold, write people.json
    python identity.py test  --run RUN       # accuracy on held-out people and strangers
    python identity.py reference             # eight drawings and what the probe says about them
    python identity.py folder PICTURES       # decide for every PNG of a folder

The rule. The probe gives nine measures with variances and four kinds with probabilities (softmax of
the logits). How far the picture is from a person, feature by feature:

    measure: min((measured - the person's)^2, CAP)
    kind:    KIND * (1 - probability of the person's kind)

How well the feature is visible, from 0 to 1:

    measure: 1 - variance / PRIOR            (PRIOR: the variance of a measure one cannot see at all)
    kind:    1 - entropy / log(number of kinds)

The distance is the mean of the former, weighted by visibility times `WEIGHTS`; the nearest person
is the answer if the distance is below the threshold, else nobody. Hair and clothes play no part,
skin a small one.
"""
import argparse
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

import draw
import people
import probe

CAP, KIND = 4.0, 1.5                  # how far apart two measures, or two kinds, can be
PRIOR = 0.6 / 3 + 0.4 * 4 / 3        # of the probe's training faces: 60 % within 1, 40 % within 2
WEIGHTS = {k: 1.0 for k in probe.FEATURES} | {"eye_color": 0.5, "mark": 1.0, "nose_shape": 0.5, "brows": 0.5, "skin": 0.5}
KINDS = probe.KINDS | {"skin": draw.CHOICES["skin"]}


def wanted(person):
    """A person's measures and kinds as numbers."""
    p = people.PEOPLE[person]
    has = vars(p.face) | {"skin": p.skin}
    return [has[k] for k in probe.FEATURES], {k: v.index(has[k]) for k, v in KINDS.items()}


def distances(vector, known):
    """The distance to each of the people of people.json."""
    part = lambda name: vector[slice(*probe.LAYOUT[name])].astype(np.float64)
    measured, weights = part("features"), np.array([WEIGHTS[k] for k in probe.FEATURES])
    weights = weights * np.clip(1 - np.exp(np.clip(part("log_variance"), -6, 2)) / PRIOR, 0, 1)
    kinds = {}
    for k in KINDS:
        e = np.exp(part(k) - part(k).max())
        p = e / e.sum()
        entropy = -(p * np.log(np.maximum(p, 1e-12))).sum()
        kinds[k] = p, WEIGHTS[k] * (1 - entropy / np.log(len(p)))
    out = {}
    for name, person in known.items():
        sums = (weights * np.minimum((measured - np.array(person["features"])) ** 2, CAP)).sum()
        sums += sum(w * KIND * (1 - p[person["kinds"][k]]) for k, (p, w) in kinds.items())
        out[name] = float(sums / (weights.sum() + sum(w for _, w in kinds.values())))
    return out


def nearest(vector, known):
    d = distances(vector, known)
    name = min(d, key=d.get)
    return name, d[name]


def decide(vector, rule):
    name, d = nearest(vector, rule["people"])
    return name if d < rule["threshold"] else "nobody"


def load():
    return json.loads((probe.HERE / "people.json").read_text())


# -------------------------------------------------------------------------------- test pictures

STRANGERS = ("plain", "marked", "doubles")


def stranger(sort, rng):
    """plain: as the model draws them; marked: with any marks, nose and brows; doubles: with the
    marks, nose, brows, eye colour and skin of one of the people but proportions of their own."""
    if sort == "doubles":
        p = rng.choice(list(people.PEOPLE.values()))
        f = p.face
        return draw.replace(draw.sample_face(rng), mark=f.mark, nose_shape=f.nose_shape, brows=f.brows,
                            eye_color=f.eye_color), p.skin
    return (draw.sample_face(rng) if sort == "plain" else draw.sample_any_face(rng)), None


def cases(seed, each, strangers):
    """(who, picture): `each` pictures of everyone in any attributes (also hats, sunglasses and beards as
    often as among strangers), and `strangers` of each sort."""
    out = []
    for who, count in [(p, each) for p in people.PEOPLE] + [(s, strangers) for s in STRANGERS]:
        for i in range(count):
            rng = random.Random(f"{seed}-{who}-{i}")
            a = draw.sample_attributes(rng)
            face, skin = stranger(who, rng) if who in STRANGERS else vars(people.PEOPLE[who]).values()
            out.append((who, draw.draw(draw.replace(a, skin=skin or a.skin), face, rng)))
    return out


def measured(net, seed, each, strangers, vae=None):
    """[(who, output vector)] of drawings, or of what the autoencoder makes of them."""
    who, pictures = zip(*cases(seed, each, strangers))
    pixels = np.stack([np.asarray(p) for p in pictures])
    if vae:
        from train_probe import passed
        pixels = passed(vae, pixels)
    return list(zip(who, probe.vectors(net, pixels)))


def autoencoder(run):
    import torch
    import train_flow
    return train_flow.load_vae(run).to(memory_format=torch.channels_last)


def write(o):
    """The threshold is what 2 of 100 doubles, the nearest of the strangers, come below: generated pictures are read
    less surely than drawings, so that the people need the room."""
    known = {}
    for name in people.PEOPLE:
        features, kinds = wanted(name)
        known[name] = dict(features=features, kinds=kinds)
    net = probe.load()
    rows = measured(net, "choose", 100, 500) + measured(net, "choose-passed", 20, 30, autoencoder(o.run))
    own = [distances(v, known)[who] for who, v in rows if who in known]
    doubles = [nearest(v, known)[1] for who, v in rows if who == "doubles"]
    print(f"99 % of own pictures up to {np.quantile(own, 0.99):.3f}")
    rule = dict(features=probe.FEATURES, kinds=KINDS, layout=probe.LAYOUT, cap=CAP, kind=KIND, prior=PRIOR, weights=WEIGHTS,
                log_variance=[-6, 2], threshold=round(float(np.quantile(doubles, 0.02)), 3), people=known)
    (probe.HERE / "people.json").write_text(json.dumps(rule, indent=1) + "\n")
    print("threshold", rule["threshold"])


def test(o):
    net, rule = probe.load(), load()
    for title, seed, each, strangers, vae in (("drawings", "test", 200, 500, None),
                                              ("through the autoencoder", "test-passed", 40, 70, autoencoder(o.run))):
        rows, right = measured(net, seed, each, strangers, vae), {}
        for who, v in rows:
            d = nearest(v, rule["people"])[1]
            right.setdefault(who, []).append((decide(v, rule) == (who if who in rule["people"] else "nobody"), d))
        print(title)
        for who, found in right.items():
            d = np.array([d for _, d in found])
            print(f"  {who:10} {sum(r for r, _ in found):4} of {len(found):4} right, distance {d.min():.2f} to {d.max():.2f}, mean {d.mean():.2f}")
        every = [r for found in right.values() for r, _ in found]
        print(f"  all        {sum(every):4} of {len(every):4}  {np.mean(every):.2%}")


def reference(o):
    """Drawings with the outputs, for whoever writes the probe anew in another language."""
    folder, net, rule, out = probe.HERE / "reference", probe.load(), load(), []
    folder.mkdir(exist_ok=True)
    for i, who in enumerate([*people.PEOPLE, *STRANGERS]):
        rng = random.Random(f"reference-{i}")
        a = draw.sample_attributes(rng)
        face, skin = stranger(who, rng) if who in STRANGERS else vars(people.PEOPLE[who]).values()
        picture = draw.draw(draw.replace(a, skin=skin or a.skin), face, rng)
        picture.save(folder / f"{i}.png", optimize=True)
        v = probe.vectors(net, [picture])[0]
        out.append(dict(file=f"reference/{i}.png", who=who, attributes=probe.attributes(v), identity=decide(v, rule),
                        distances={k: round(d, 5) for k, d in distances(v, rule["people"]).items()},
                        vector=[round(float(x), 5) for x in v]))
    (probe.HERE / "reference.json").write_text(json.dumps(out, indent=1) + "\n")


def folder(o):
    net, rule = probe.load(), load()
    for path in sorted(Path(o.path).glob("*.png")):
        v = probe.vectors(net, [Image.open(path)])[0]
        name, d = nearest(v, rule["people"])
        print(f"{path.name:30} {decide(v, rule):9} nearest {name} at {d:.2f}")


def main():
    import torch
    torch.set_num_threads(1)
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("what", choices=("write", "test", "reference", "folder"))
    ap.add_argument("path", nargs="?", help="folder: where the pictures are")
    ap.add_argument("--run", default="run", help="folder of train.py, with the autoencoder")
    o = ap.parse_args()
    globals()[o.what](o)


if __name__ == "__main__":
    main()
