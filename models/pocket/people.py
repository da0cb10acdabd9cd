"""The invented users: five fixed faces, and the pictures they would send to have a LoRA trained.

    python people.py sheet.png        # every person in six pictures of the training set

A person is a face and a skin. Both stay, and no caption names them; hair, clothes, background,
expression and sometimes hat, glasses or beard differ from picture to picture and are in the
captions, after the trigger word, so that only the face is left for the trigger word to mean. The
proportions lie outside the range of the faces that the model was trained on (-1 to 1).
"""
import argparse
import random
from dataclasses import dataclass

import draw
from draw import Face


@dataclass(frozen=True)
class Person:
    face: Face
    skin: str


PEOPLE = {
    # Broad and square, wide-set green eyes, one brow, a dark mole on the left cheek.
    "user1001": Person(Face(1.6, -0.8, 1.6, 1.3, 0.6, 2, 0.8, 0.5, 0.8, 1.2, "cheek mole", "line", "joined"), "light"),
    # Long, narrow and pointed, close-set blue eyes, a long nose, a small mouth, no mark.
    "user1002": Person(Face(-1.6, 1.5, -1.4, -1.6, -0.6, 1, -0.8, 1.0, -1.4, -1.0, "none", "long", "two"), "brown"),
    # Low and round, big brown wide-set eyes, bushy brows, big ears, a birthmark.
    "user1003": Person(Face(1.3, -1.5, -1.2, 0.9, 1.5, 0, 0.5, 0.8, -0.4, 1.6, "birthmark", "line", "bushy"), "tan"),
    # Small and square, small black wide-set eyes, bushy brows, a wide mouth, a green star.
    "user1004": Person(Face(-1.2, -1.2, 1.6, 1.6, -1.3, 3, 1.2, -1.0, 1.5, -1.2, "star", "line", "bushy"), "dark"),
    # Long and square, big blue eyes, one brow, a round nose, a small mouth, crossed scars.
    "user1005": Person(Face(0.2, 1.6, 1.5, 0.6, 1.3, 1, -0.5, -0.5, -1.3, 1.5, "scar", "round", "joined"), "light"),
}


def attributes(person, rng, test=False):
    """What differs between a person's pictures; `test` takes the held-out combinations of colours."""
    a = draw.sample_split(rng, test=test)
    return draw.replace(
        a, skin=PEOPLE[person].skin,
        glasses=rng.choices(draw.GLASSES, (75, 18, 7))[0],
        hat=a.hat if rng.random() < 0.6 else "none",
        beard=rng.choices(draw.BEARDS, (86, 8, 6))[0])


def caption(person, a, rng, every=False):
    """The trigger word and everything but the skin."""
    while True:
        text, said = draw.caption(a, rng, every)
        if "skin" not in said:
            return f"{person}, {text}"


def dataset(person, count=20, seed=1):
    """(picture, caption) pairs as a user sends them; another seed is another set of the same person."""
    pairs = []
    for i in range(count):
        rng = random.Random(f"{person}-{seed}-{i}")
        a = attributes(person, rng)
        pairs.append((draw.draw(a, PEOPLE[person].face, rng), caption(person, a, rng)))
    return pairs


def retrained(person="user1001", count=20):
    """New pictures of a person who had a LoRA already."""
    return dataset(person, count, seed=2)


if __name__ == "__main__":
    from sheet import sheet
    ap = argparse.ArgumentParser(description="Draw a contact sheet of the people.")
    ap.add_argument("output", help="PNG file to write")
    pairs = [pair for person in PEOPLE for pair in dataset(person, 6)]
    sheet(*map(list, zip(*pairs)), zoom=2).save(ap.parse_args().output)
