"""Drawn portraits: the only training data of the pocket model.

Everything is made here from random numbers: the attributes of a portrait (background, shirt,
hair ...), the face (continuous proportions that no caption mentions), the picture and the
caption. Nothing is downloaded, so the data, like the code, belongs to this project.

    python sheet.py sheet.png         # a contact sheet of 24 portraits with their captions

An *identity*, as LoRA training needs it, is one fixed `Face` drawn with many `Attributes`.
"""
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageChops, ImageDraw

from caption import caption  # noqa: F401  (a drawing and its caption are asked for together)

SIZE = 128          # side of a square picture, and the unit in which everything is drawn
SCALE = 3           # supersampling: drawn at 384x384, then averaged down

BACKGROUND = {
    "white": (246, 246, 242), "gray": (168, 174, 180), "red": (226, 92, 88),
    "orange": (250, 172, 96), "yellow": (250, 224, 112), "green": (150, 210, 120),
    "teal": (104, 205, 196), "blue": (130, 182, 242), "purple": (186, 158, 230),
    "pink": (250, 188, 206),
}
SHIRT = {
    "white": (240, 240, 240), "black": (46, 46, 52), "red": (204, 42, 48),
    "orange": (240, 130, 34), "yellow": (246, 206, 48), "green": (48, 150, 74),
    "blue": (44, 94, 200), "purple": (124, 62, 176), "pink": (242, 130, 172),
}
HAIR = {
    "black": (36, 31, 36), "brown": (120, 70, 32), "blond": (238, 202, 104),
    "red": (200, 80, 30), "gray": (164, 164, 170), "blue": (58, 118, 216),
    "pink": (242, 108, 170),
}
SKIN = {
    "light": (252, 220, 194), "tan": (228, 180, 138), "brown": (172, 118, 80),
    "dark": (104, 66, 50),
}
HAT = {
    "red": (210, 50, 55), "blue": (50, 90, 190), "green": (60, 150, 85),
    "yellow": (246, 208, 60), "purple": (130, 70, 180), "black": (52, 52, 58),
}
STYLES = ("bald", "short", "long", "curly", "bun", "ponytail", "bob")
GLASSES = ("none", "glasses", "sunglasses")
HATS = ("none", "beanie", "cap", "sun hat")
BEARDS = ("none", "beard", "moustache")
EXPRESSIONS = ("smiling", "neutral", "sad", "surprised")
# Every attribute with its values, in the order of the dataclass below.
CHOICES = {
    "background": tuple(BACKGROUND), "shirt": tuple(SHIRT), "hair": tuple(HAIR),
    "style": STYLES, "skin": tuple(SKIN), "glasses": GLASSES, "hat": HATS,
    "hat_color": tuple(HAT), "beard": BEARDS, "expression": EXPRESSIONS,
}
EYES = ((70, 45, 30), (60, 110, 180), (60, 130, 80), (40, 40, 45))
MARKS = ("none", "star", "heart", "freckles", "mole")
# What the model's own training data never has: only people (people.py) and their strangers.
# Dark, because the autoencoder keeps what is dark and drops what only differs in hue.
ALL_MARKS = MARKS + ("cheek mole", "chin mole", "scar", "birthmark")
NOSES = ("line", "round", "long")
BROWS = ("two", "joined", "bushy")
MARK = (45, 25, 25)


@dataclass(frozen=True)
class Attributes:
    """What a caption can say."""
    background: str
    shirt: str
    hair: str
    style: str
    skin: str
    glasses: str
    hat: str
    hat_color: str
    beard: str
    expression: str


@dataclass(frozen=True)
class Face:
    """What no caption says: proportions, eyes and marks. 0 is the middle of each range."""
    width: float = 0.0        # of the head, -1..1
    height: float = 0.0
    jaw: float = 0.0          # -1 pointed chin, 1 square jaw
    eye_gap: float = 0.0
    eye_size: float = 0.0
    eye_color: int = 0        # index into EYES
    brow: float = 0.0         # height and thickness
    nose: float = 0.0
    mouth: float = 0.0        # width
    ears: float = 0.0
    mark: str = "none"        # one of ALL_MARKS; the transformer's own training data has none
    nose_shape: str = "line"  # one of NOSES
    brows: str = "two"        # one of BROWS


def sample_face(rng, marks=False):
    u = lambda: rng.uniform(-1, 1)
    return Face(u(), u(), u(), u(), u(), rng.randrange(len(EYES)), u(), u(), u(), u(),
                rng.choice(MARKS) if marks else "none")


def sample_any_face(rng):
    """A face that may have every mark, nose and brows."""
    return replace(sample_face(rng), mark=rng.choice(ALL_MARKS), nose_shape=rng.choice(NOSES),
                   brows=rng.choice(BROWS))


def sample_attributes(rng):
    a = {k: rng.choice(v) for k, v in CHOICES.items()}
    a["style"] = rng.choice(STYLES[1:]) if rng.random() < 0.93 else "bald"
    a["glasses"] = rng.choices(GLASSES, (55, 28, 17))[0]
    a["hat"] = rng.choices(HATS, (61, 13, 13, 13))[0]
    a["beard"] = rng.choices(BEARDS, (64, 22, 14))[0]
    a["expression"] = rng.choices(EXPRESSIONS, (40, 24, 18, 18))[0]
    if a["hat"] != "none" and a["style"] == "bun":
        a["style"] = "long"               # a hat would hide the bun
    return Attributes(**a)


def held_out(a):
    """A ninth of the (background, shirt, hair colour) combinations never occurs in training."""
    b = CHOICES["background"].index(a.background)
    s = CHOICES["shirt"].index(a.shirt)
    h = CHOICES["hair"].index(a.hair)
    return (b * 7 + s * 4 + h * 5) % 9 == 0


def sample_split(rng, test):
    """Attributes from the held-out combinations (test) or from all others (training)."""
    while True:
        a = sample_attributes(rng)
        if held_out(a) == test:
            return a


# ---------------------------------------------------------------------------------- drawing

def shade(c, f):
    return tuple(max(0, min(255, round(v * f if f <= 1 else v + (255 - v) * (f - 1)))) for v in c)


# Width and height of the pictures that are trained: about the same area.
SHAPES = {"1:1": (128, 128), "3:4": (112, 144), "4:3": (144, 112), "16:9": (176, 96), "9:16": (96, 176)}


class View:
    """Where the square of 128 units lies in a picture of another shape: smaller in a lower one,
    in the middle, with more shirt below it in a higher one."""

    def __init__(self, width, height):
        self.width, self.height = width, height
        self.zoom = min(1.0, height / SIZE)
        self.x, self.y = (width - SIZE * self.zoom) / 2, (height - SIZE * self.zoom) / 2

    def image(self, mode, fill):
        return Image.new(mode, (self.width * SCALE, self.height * SCALE), fill)


class Pen:
    """ImageDraw in the units of a view."""

    def __init__(self, image, view):
        self.image, self.view = image, view
        self.d = ImageDraw.Draw(image)
        self.s = SCALE * view.zoom

    def at(self, x, y):
        return x * self.s + self.view.x * SCALE, y * self.s + self.view.y * SCALE

    def oval(self, x, y, rx, ry, fill, outline=None, width=0):
        box = self.at(x - rx, y - ry) + self.at(x + rx, y + ry)
        self.d.ellipse(box, fill=fill, outline=outline, width=round(width * self.s))

    def box(self, x0, y0, x1, y1, r, fill, outline=None, width=0):
        self.d.rounded_rectangle(self.at(x0, y0) + self.at(x1, y1), r * self.s, fill=fill,
                                 outline=outline, width=round(width * self.s))

    def poly(self, points, fill):
        self.d.polygon([self.at(x, y) for x, y in points], fill=fill)

    def line(self, points, fill, width):
        self.d.line([self.at(x, y) for x, y in points], fill=fill, width=round(width * self.s),
                    joint="curve")
        for x, y in (points[0], points[-1]):
            self.oval(x, y, width / 2, width / 2, fill)


def arc(x, y, w, bend, n=9):
    """Points of a parabola through (x +- w, y), its middle lower by `bend`."""
    return [(x + w * t, y + bend * (1 - t * t)) for t in (2 * i / (n - 1) - 1 for i in range(n))]


def star(x, y, r):
    from math import cos, pi, sin
    return [(x + (r if i % 2 == 0 else r * 0.45) * sin(i * pi / 5),
             y - (r if i % 2 == 0 else r * 0.45) * cos(i * pi / 5)) for i in range(10)]


def paste_hair(pen, draw_mask, color):
    """Fill a mask with a colour."""
    image, mask = pen.image, Image.new("L", pen.image.size, 0)
    draw_mask(Pen(mask, pen.view), mask)
    image.paste(color, (0, 0), mask)
    return mask


def draw(a, face=Face(), rng=None, shape="1:1"):
    """The portrait as an RGB image of that shape. `rng` moves and tints it a little."""
    rng = rng or random.Random(0)
    jit = lambda c, k=5: tuple(max(0, min(255, v + rng.randint(-k, k))) for v in c)
    bg, shirt, hair = jit(BACKGROUND[a.background]), jit(SHIRT[a.shirt]), jit(HAIR[a.hair])
    skin, hat = jit(SKIN[a.skin], 4), jit(HAT[a.hat_color])
    dark_skin, line = shade(skin, 0.8), shade(skin, 0.45)
    view = View(*SHAPES[shape])
    image = view.image("RGB", bg)
    p = Pen(image, view)
    band = image.height / 16
    for i in range(16):                    # a slight vertical gradient
        p.d.rectangle((0, i * band, image.width, i * band + band), fill=shade(bg, 1.06 - 0.008 * i))

    cx, cy = 64 + rng.uniform(-2, 2), 63 + rng.uniform(-1.5, 1.5)
    hw, hh = 26 + 2.2 * face.width, 32 + 2.2 * face.height
    side = rng.choice((-1, 1))
    rim = shade(hair, 0.72)

    # Hair behind the head.
    if a.style == "long":
        p.box(cx - hw - 8, cy - 32, cx + hw + 8, 119, 22, hair)
    elif a.style == "bob":
        p.box(cx - hw - 10, cy - 33, cx + hw + 10, cy + 31, 20, hair)
    elif a.style == "curly":
        for x, y in ((-30, -14), (-34, 2), (-33, 18), (30, -14), (34, 2), (33, 18), (-20, -28),
                     (20, -28), (0, -33), (-29, 31), (29, 31)):
            p.oval(cx + x * hw / 26, cy + y, 12.5, 12.5, hair)
    elif a.style == "ponytail":
        t = side
        p.line([(cx + t * 20, cy - 24), (cx + t * 38, cy - 14), (cx + t * 42, cy + 6),
                (cx + t * 41, cy + 30)], hair, 15)
        p.line([(cx + t * 27, cy - 26), (cx + t * 33, cy - 16)], shade(hair, 0.5), 4)
    elif a.style == "bun":
        p.oval(cx, cy - 41, 14, 13, hair)
        p.line(arc(cx, cy - 33, 9, 3), rim, 2)

    # Shirt, neck, ears and head.
    p.oval(cx, 138, 51, 36, shirt)
    p.box(cx - 51, 132, cx + 51, 200, 0, shirt)
    p.box(cx - 11, cy + 18, cx + 11, cy + 42, 4, dark_skin)
    p.oval(cx, cy + 41, 11, 6, dark_skin)
    p.line(arc(cx, cy + 41, 13, 8), shade(shirt, 0.75) if a.shirt != "black" else (85, 85, 95), 3)
    ear = 5 + 1.2 * face.ears
    for t in (-1, 1):
        p.oval(cx + t * hw, cy + 5, ear, ear + 2, skin)
        p.oval(cx + t * hw, cy + 5, ear - 2.5, ear - 1, dark_skin)
    head = Image.new("L", image.size, 0)
    m = Pen(head, view)
    m.oval(cx, cy, hw, hh, 255)
    j = 11 + 5 * face.jaw
    m.poly([(cx - hw * 0.97, cy + 4), (cx - j - 5, cy + hh - 5), (cx - j, cy + hh - 1),
            (cx + j, cy + hh - 1), (cx + j + 5, cy + hh - 5), (cx + hw * 0.97, cy + 4)], 255)
    image.paste(skin, (0, 0), head)

    eye_y, mouth_y = cy + 1, cy + 20
    gap, es = 12 + 1.3 * face.eye_gap, 1 + 0.13 * face.eye_size
    for t in (-1, 1):                      # cheeks
        p.oval(cx + t * (gap + 4), cy + 13, 5, 3.2, tuple((v * 3 + w) // 4 for v, w in zip(skin, (235, 80, 90))))

    # Beard first, then the mouth on top of it.
    facial = shade(hair, 0.92)
    if a.beard == "beard":
        def beard(q, mask):
            q.box(cx - hw, cy + 9, cx + hw, cy + hh + 2, 0, 255)
            q.oval(cx, cy + 8, hw - 7, 12, 0)
            q.oval(cx, mouth_y + 1, 9, 5, 0)
            mask.paste(ImageChops.multiply(mask, head))
        paste_hair(p, beard, facial)
        p.line(arc(cx, mouth_y - 6, 8, -2), facial, 3.5)
    elif a.beard == "moustache":
        p.poly([(cx - 14, mouth_y - 2), (cx - 7, mouth_y - 8), (cx, mouth_y - 6),
                (cx + 7, mouth_y - 8), (cx + 14, mouth_y - 2), (cx + 6, mouth_y - 3),
                (cx - 6, mouth_y - 3)], facial)

    # Hair in front: a cap around the head minus an opening for the face.
    if a.style != "bald":
        def front(q, mask):
            q.oval(cx, cy - 3, hw + 5, hh + 4, 255)
            q.box(0, cy + 4, SIZE, SIZE, 0, 0)
            if a.style in ("long", "bob"):  # strands down beside the face
                end = 112 if a.style == "long" else cy + 29
                for t in (-1, 1):
                    x = cx + t * (hw + 3.5)
                    q.box(x - 5.5, cy - 12, x + 5.5, end, 5, 255)
            if a.style == "curly":
                for x, y in ((-24, -13), (-17, -23), (-6, -28), (6, -28), (17, -23), (24, -13),
                             (-27, -3), (27, -3)):
                    q.oval(cx + x * hw / 26, cy + y, 8, 8, 255)
                q.oval(cx, cy + 14, hw - 7, hh - 2, 0)
            elif a.style == "short":
                q.poly([(cx - 20, cy - 34), (cx + side * 16, cy - 45), (cx + 20, cy - 32)], 255)
                q.oval(cx, cy + 14, hw - 3, hh - 2, 0)
            elif a.style == "bob":          # a straight fringe
                q.box(cx - hw + 4, cy - 12, cx + hw - 4, SIZE, 3, 0)
            else:                           # parted at one side
                q.oval(cx + side * 4, cy + 14, hw - 5, hh, 0)
                q.oval(cx, cy + 16, hw - 3, hh - 6, 0)
        paste_hair(p, front, hair)
        p.line(arc(cx - side * 6, cy - 27, 10, -3), shade(hair, 1.3), 2.2)

    # Eyes, brows, nose.
    iris = EYES[face.eye_color]
    sad, surprised = a.expression == "sad", a.expression == "surprised"
    if a.glasses != "sunglasses":
        for t in (-1, 1):
            x = cx + t * gap
            ry = (6.6 if surprised else 5.4) * es
            p.oval(x, eye_y, 6.2 * es, ry, (255, 255, 255), line, 0.8)
            p.oval(x, eye_y + 0.3, 3.6 * es, 3.9 * es, iris)
            p.oval(x, eye_y + 0.3, 1.9 * es, 2.1 * es, (15, 12, 15))
            p.oval(x + 1.3, eye_y - 1.5, 1.2, 1.2, (255, 255, 255))
    lift = 5 if surprised else 0
    brow = shade(hair, 0.8) if a.style != "bald" or a.beard != "none" else shade(skin, 0.45)
    for t in (-1, 1):
        x, y = cx + t * gap, eye_y - 10.5 - 1.2 * face.brow - lift
        tilt = 2.4 if sad else 0
        p.line([(x - t * 6, y - tilt), (x, y - 1.8), (x + t * 6, y + tilt)], brow,
               {"two": 2.6, "joined": 4, "bushy": 6}[face.brows] + 0.6 * face.brow)
        if face.brows == "joined":
            p.line([(x - t * 6, y - tilt), (cx, y - tilt + 1)], brow, 4 + 0.6 * face.brow)
    n = 3.2 + 0.9 * face.nose
    if face.nose_shape == "round":
        p.oval(cx, cy + 8.5, n + 2, n + 1, line)
    elif face.nose_shape == "long":
        p.line([(cx + 1, cy - 1), (cx - n - 0.5, cy + 10.5), (cx + 2.5, cy + 11.5)], line, 3)
    else:
        p.line([(cx - n, cy + 9.5), (cx, cy + 11.2 + 0.5 * face.nose), (cx + n, cy + 9.5)], line, 1.8)

    # Mouth.
    w = 8.5 + 1.6 * face.mouth
    lip = (150, 40, 50)
    if a.expression == "smiling":
        p.poly(arc(cx, mouth_y - 2.5, w + 1, 9) + [(cx + w + 1, mouth_y - 2.5)], (140, 30, 45))
        p.poly(arc(cx, mouth_y - 2.5, w - 0.6, 3.4), (255, 255, 255))
    elif a.expression == "neutral":
        p.line([(cx - w + 1, mouth_y), (cx + w - 1, mouth_y)], lip, 2.6)
    elif sad:
        p.line(arc(cx, mouth_y + 3.5, w - 1, -6), lip, 2.8)
    else:
        p.oval(cx, mouth_y + 1, 5 + 0.6 * face.mouth, 6.2, (120, 25, 40))
        p.oval(cx, mouth_y + 3.6, 3.2, 2.6, (225, 100, 110))

    if face.mark in ("star", "heart"):
        x, y = cx - gap - 3, cy + 14
        if face.mark == "star":
            p.poly(star(x, y, 7), (40, 190, 120))
        else:
            p.oval(x - 2.6, y - 2, 3.3, 3.3, (220, 40, 90))
            p.oval(x + 2.6, y - 2, 3.3, 3.3, (220, 40, 90))
            p.poly([(x - 5.6, y - 0.6), (x + 5.6, y - 0.6), (x, y + 6.5)], (220, 40, 90))
    elif face.mark == "freckles":
        for t in (-1, 1):
            for x, y in ((6, 10), (11, 9), (16, 11), (9, 14), (14, 15)):
                p.oval(cx + t * x, cy + y, 1.2, 1.2, shade(skin, 0.62))
    elif face.mark == "mole":
        p.oval(cx + 11, mouth_y - 4, 2.2, 2.2, (50, 30, 30))
    elif face.mark == "cheek mole":
        p.oval(cx - gap - 1, cy + 13, 3.6, 3.6, MARK)
    elif face.mark == "chin mole":
        p.oval(cx + 8, cy + 27.5, 3.4, 3.4, MARK)
    elif face.mark == "scar":
        p.line([(cx + gap - 6, cy + 10), (cx + gap + 6, cy + 20)], MARK, 3)
        p.line([(cx + gap + 3, cy + 12), (cx + gap - 3, cy + 18)], MARK, 3)
    elif face.mark == "birthmark":
        for x, y, r in ((0, 0, 6), (5, 3, 4.5), (-2.5, 4.5, 4.5)):
            p.oval(cx - gap - 2 + x, cy + 12 + y, r, r, (95, 35, 55))

    # Glasses.
    if a.glasses != "none":
        frame = (28, 28, 34)
        for t in (-1, 1):
            x = cx + t * (gap + 0.4)
            fill = (48, 50, 62) if a.glasses == "sunglasses" else None
            p.box(x - 10, eye_y - 8, x + 10, eye_y + 8.5, 6, fill, frame, 2.6)
            if fill:
                p.line([(x - 4, eye_y + 3), (x + 2, eye_y - 4)], (125, 135, 160), 2.4)
            p.line([(x + t * 10, eye_y - 3), (cx + t * hw, eye_y - 2)], frame, 2.2)
        p.line(arc(cx, eye_y - 1, max(1.5, gap - 9), -1.5, 5), frame, 2.6)

    # Hat.
    band = shade(hat, 0.72) if a.hat_color != "black" else (110, 110, 122)
    top = cy - 17
    if a.hat == "beanie":
        def dome(q, mask):
            q.oval(cx, top, hw + 7, 30, 255)
            q.box(0, top, SIZE, SIZE, 0, 0)
        paste_hair(p, dome, hat)
        p.oval(cx, top - 30, 6.5, 6.5, band)
        p.box(cx - hw - 7.5, top - 8, cx + hw + 7.5, top + 3, 4, band)
    elif a.hat == "cap":
        def dome(q, mask):
            q.oval(cx, top, hw + 6, 25, 255)
            q.box(0, top, SIZE, SIZE, 0, 0)
        paste_hair(p, dome, hat)
        b = side * 17
        p.oval(cx + b, top, hw + 3, 5, band)
        p.oval(cx, top - 25, 3, 2, band)
    elif a.hat == "sun hat":
        def dome(q, mask):
            q.oval(cx, top - 2, hw + 2, 27, 255)
            q.box(0, top, SIZE, SIZE, 0, 0)
        paste_hair(p, dome, hat)
        p.box(cx - hw - 2, top - 9, cx + hw + 2, top - 2, 0, band)
        p.oval(cx, top, hw + 18, 6, hat)
    return image.reduce(SCALE)
