"""Captions of drawings, from templates with synonyms, changing order and omissions."""


def caption(a, rng, every=False):
    """A caption and the set of attributes it mentions. `every` leaves nothing out.

    What a caption leaves out is free, except that glasses, hats and beards are usually
    absent where nobody mentions them.
    """
    said = set()

    def say(name, p):
        if every or rng.random() < p:
            said.add(name)
            return True
        return False

    pick = rng.choice
    hair_word = {"blond": ("blond", "blonde"), "red": ("red", "red", "ginger"),
                 "gray": ("gray", "grey")}.get(a.hair, (a.hair,))
    gray = lambda c: pick(("gray", "grey")) if c == "gray" else c
    # with: things a person has; wear: things put on; be: adjectives.
    with_, wear, be, tail = [], [], [], []
    if a.style == "bald":
        say("style", 1)
        if a.beard != "none":
            say("hair", 0)
        be.append("bald")
    else:
        style, color = say("style", 0.85), say("hair", 0.94)
        c = pick(hair_word) if color else ""
        if style and a.style in ("bun", "ponytail"):
            with_.append(pick((f"{c} hair in a {a.style}", f"a {c} {a.style}")))
        elif style and a.style == "bob":
            with_.append(pick((f"a {c} bob", f"{c} bob hair", f"{c} hair in a bob")))
        elif style:
            with_.append(pick((f"{a.style} {c} hair", f"{a.style} {c} hair", f"{c} {a.style} hair")))
        elif color:
            with_.append(f"{c} hair")
    if a.glasses != "none":
        if say("glasses", 0.94):
            (with_ if rng.random() < 0.5 else wear).append(a.glasses)
    elif not every and rng.random() < 0.06:
        said.add("glasses")
        tail.append(pick(("no glasses", "without glasses")))
    if a.beard != "none":
        if say("beard", 0.93):
            with_.append(f"a {a.beard}")
    elif not every and rng.random() < 0.05:
        said.add("beard")
        tail.append(pick(("no beard", "clean-shaven")))
    if (every and rng.random() < 0.4) or (not every and rng.random() < 0.45):
        said.add("skin")
        if rng.random() < 0.6:
            with_.append(f"{a.skin} skin")
        else:
            be.append(f"{a.skin}-skinned")
    if say("shirt", 0.92):
        garment = rng.choices(("shirt", "t-shirt", "sweater", "top"), (7, 1, 1, 1))[0]
        wear.append(f"a {a.shirt} {garment}")
    if a.hat != "none":
        if say("hat", 0.95):
            color = say("hat_color", 0.9)
            hat = pick(("hat", "sun hat", "sun hat")) if a.hat == "sun hat" else a.hat
            wear.append(f"a {a.hat_color} {hat}" if color else f"a {hat}")
    elif not every and rng.random() < 0.05:
        said.add("hat")
        tail.append(pick(("no hat", "without a hat")))
    if say("expression", 0.5 if a.expression == "neutral" else 0.9):
        words = {"smiling": ("smiling", "smiling", "happy", "with a smile"),
                 "neutral": ("neutral", "serious", "with a neutral expression"),
                 "sad": ("sad", "frowning", "with a sad expression"),
                 "surprised": ("surprised", "surprised", "with a surprised expression")}
        w = pick(words[a.expression])
        if w.startswith("with") or rng.random() < 0.65:
            tail.append(w)
        else:
            be.append(w)
    scene = ""
    if say("background", 0.93):
        c = gray(a.background)
        scene = pick((f"{c} background", f"{c} background", f"on a {c} background",
                      f"against a {c} background", f"in front of a {c} background",
                      f"{c} backdrop", f"in front of a {c} wall"))
    for parts in (with_, wear, be, tail):
        rng.shuffle(parts)
    noun = rng.choices(("person", "man", "woman", "character"), (6, 1, 1, 1))[0]
    form = rng.random()
    if form < 0.35:                        # a list of tags
        parts = be + with_ + wear + tail + ([scene] if scene else [])
        parts = [x[2:] if x.startswith("a ") and rng.random() < 0.6 else x for x in parts]
        rng.shuffle(parts)
        text = ", ".join([pick(("portrait", f"portrait of a {noun}", f"a {noun}", noun))] + parts)
    else:                                  # a sentence
        be = be if len(be) < 3 else be[:3]
        text = f"{pick(LEADS)} a {' '.join(be + [noun])}"
        clauses = []
        if with_:
            clauses.append("with " + _list(with_, rng))
        if wear:
            clauses.append(pick(("wearing ", "wearing ", "in ")) + _list(wear, rng))
        if rng.random() < 0.3:
            clauses.reverse()
        joint = pick((" ", ", "))
        rest = tail + ([scene] if scene else [])
        if rng.random() < 0.3:
            rng.shuffle(rest)
        if clauses and rng.random() < 0.4:  # "..., smiling, wearing ..."
            text += " " + ", ".join(clauses[:1] + tail + clauses[1:] + ([scene] if scene else []))
        else:
            text += (" " + joint.join(clauses) if clauses else "") + "".join(", " + r for r in rest)
    text = " ".join(text.split()).replace(" ,", ",")
    if rng.random() < 0.2:
        text += "."
    if rng.random() < 0.2:
        text = text[0].upper() + text[1:]
    return text.strip(), said


LEADS = ("a portrait of", "a portrait of", "portrait of", "a drawing of", "an illustration of",
         "a picture of", "a drawn portrait of", "")


def _list(items, rng):
    if len(items) == 1:
        return items[0]
    return ", ".join(items[:-1]) + rng.choice((" and ", " and ", ", ")) + items[-1]
