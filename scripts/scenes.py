# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "pillow"]
# ///
"""The captioned scenes of the bundled model: drawn exactly, and read off images again. train_tiny.py trains on them.

Run as a script it makes tests/golden/scenes.png and scenes.json: images, right and damaged ones, with this module's verdicts, which
src/eval must repeat.  python scripts/scenes.py [IMAGE.png ...]  (64×64 images drawn by a model are added, see scripts/README.md)
"""

import json
import pathlib
import random
import re
import sys

import numpy as np

COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 80, 220),
    "yellow": (240, 210, 40), "purple": (150, 60, 190), "orange": (245, 130, 30),
}
BACKGROUNDS = {"white": (250, 250, 250), "black": (15, 15, 15), "gray": (128, 128, 128)}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {
    "at the left": (0.25, 0.5), "at the right": (0.75, 0.5), "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75), "in the center": (0.5, 0.5),
}
RELATIONS = {  # places of the first and of the second object
    "left of": ("at the left", "at the right"), "right of": ("at the right", "at the left"),
    "above": ("at the top", "at the bottom"), "below": ("at the bottom", "at the top"),
}
RADIUS = 0.2  # of the side
FOREGROUND, SPECK, OVERLAP, NEAR, APART = 80, 0.008, 0.7, 0.15, 0.1


def distance(shape, x, y, r):
    """Signed distance from the outline, negative inside; y points down."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.86 * r
    if shape == "triangle":
        slope = 0.4472 * (y + r)
        return np.maximum(np.maximum(y - 0.75 * r, 0.8944 * x - slope), -0.8944 * x - slope)
    x, y, bar = abs(x), abs(y), 0.36 * r
    return np.minimum(np.maximum(x - bar, y - r), np.maximum(x - r, y - bar))


def centres(side):
    rows, columns = np.mgrid[0:side, 0:side] + 0.5
    return columns, rows


def render(scene, side=64):
    """(side, side, 3) float32, 0 to 255, edges smoothed over one pixel."""
    x, y = centres(side)
    image = np.full((side, side, 3), BACKGROUNDS[scene["background"]], np.float32)
    for o in scene["objects"]:
        d = distance(o["shape"], x - o["x"] * side, y - o["y"] * side, o["r"] * side)
        cover = np.clip(0.5 - d, 0, 1).astype(np.float32)[..., None]
        image = image * (1 - cover) + cover * np.float32(COLOURS[o["colour"]])
    return image


def to_bytes(image):
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def caption(scene):
    names = [f"a {o['colour']} {o['shape']}" for o in scene["objects"]]
    said = f"{names[0]} {scene['where']}" if len(names) == 1 else f"{names[0]} {scene['where']} {names[1]}"
    return f"{said} on a {scene['background']} background"


def draw_scene(rng, jitter=(0.04, 0.05)):
    """A random scene: one object in 35 % of all, else two of different colours; places move by up to `jitter`."""
    def put(place, by):
        x, y = PLACES[place]
        keep = RADIUS + 0.02
        near = lambda v: min(max(v + rng.uniform(-by, by), keep), 1 - keep)
        return {"shape": rng.choice(SHAPES), "colour": rng.choice(list(COLOURS)), "x": near(x), "y": near(y), "r": RADIUS}

    background = rng.choice(list(BACKGROUNDS))
    if rng.random() < 0.35:
        where = rng.choice(list(PLACES))
        return {"background": background, "where": where, "objects": [put(where, jitter[0])]}
    where = rng.choice(list(RELATIONS))
    first, second = (put(place, jitter[1]) for place in RELATIONS[where])
    while second["colour"] == first["colour"]:
        second["colour"] = rng.choice(list(COLOURS))
    return {"background": background, "where": where, "objects": [first, second]}


def parse(text):
    """The scene of a caption, without places; None when it is not of the grammar."""
    thing = rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    behind = rf" on a ({'|'.join(BACKGROUNDS)}) background"
    if m := re.fullmatch(rf"{thing} ({'|'.join(PLACES)}){behind}", text):
        pairs, where, background = [m.groups()[:2]], m[3], m[4]
    elif m := re.fullmatch(rf"{thing} ({'|'.join(RELATIONS)}) {thing}{behind}", text):
        pairs, where, background = [m.groups()[:2], m.groups()[3:5]], m[3], m[6]
    else:
        return None
    return {"background": background, "where": where, "objects": [{"colour": c, "shape": s} for c, s in pairs]}


def parts(mask):
    """Sets of pixels that hang together by their sides, in the order of their first pixel."""
    mask, side = mask.copy(), len(mask)
    for i, j in zip(*np.nonzero(mask)):
        if not mask[i, j]:
            continue
        mask[i, j], todo, part = False, [(i, j)], []
        while todo:
            a, b = todo.pop()
            part.append((a, b))
            for c, d in ((a + 1, b), (a - 1, b), (a, b + 1), (a, b - 1)):
                if 0 <= c < side and 0 <= d < side and mask[c, d]:
                    mask[c, d] = False
                    todo.append((c, d))
        yield np.array(part)


def detect(image):
    """(side, side, 3), 0 to 255 → the background's name and the objects with colour, shape ("?" when none fits), overlap, centre, radius."""
    image = np.asarray(image, float)
    side, palette = len(image), np.array([*COLOURS.values(), *BACKGROUNDS.values()], float)
    nearest = ((image[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
    edge = side // 16
    strips = (nearest[:edge], nearest[-edge:], nearest[:, :edge], nearest[:, -edge:])  # corners count twice
    votes = np.bincount(np.concatenate([s.ravel() for s in strips]), minlength=len(palette))[len(COLOURS):]
    background = list(BACKGROUNDS)[votes.argmax()]
    far = ((image - np.array(BACKGROUNDS[background])) ** 2).sum(-1) > FOREGROUND ** 2
    x, y = centres(side)
    seen = []
    for part in parts(far):
        if len(part) < side * side * SPECK:
            continue
        mask = np.zeros((side, side), bool)
        mask[part[:, 0], part[:, 1]] = True
        core = mask.copy()
        core[1:-1, 1:-1] &= mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
        middle = np.median(image[core if core.any() else mask], axis=0)
        colour = list(COLOURS)[((middle - palette[: len(COLOURS)]) ** 2).sum(-1).argmin()]
        (top, left), (bottom, right) = part.min(0), part.max(0) + 1
        high, wide, cx, middle_y = bottom - top, right - left, (left + right) / 2, (top + bottom) / 2
        best = None
        for shape in SHAPES:
            r, cy = (high + wide) / 4, middle_y
            if shape == "square":
                r = (high + wide) / 4 / 0.86
            elif shape == "triangle":
                r = (high / 1.75 + wide / 1.75) / 2
                cy = middle_y + 0.125 * r
            inside = distance(shape, x - cx, y - cy, r) < 0
            overlap = (inside & mask).sum() / max(1, (inside | mask).sum())
            if best is None or overlap > best["overlap"]:
                best = {"shape": shape, "overlap": float(overlap), "x": float(cx / side), "y": float(cy / side), "r": float(r / side)}
        if best["overlap"] <= OVERLAP:
            best["shape"] = "?"
        seen.append({"colour": colour, **best})
    return background, seen


def judge(scene, image):
    """Which criteria an image of the scene meets; `ok` is background, count, colours bound to shapes, and positions together."""
    background, seen = detect(image)
    wanted, matched = scene["objects"], []
    for o in wanted:
        fits = [s for s in seen if s["colour"] == o["colour"] and s["shape"] == o["shape"] and not any(s is m for m in matched)]
        matched += fits[:1]
    bound = len(matched) == len(wanted)
    position = bound
    if bound and len(wanted) == 1:
        x, y = PLACES[scene["where"]]
        position = bool(np.hypot(matched[0]["x"] - x, matched[0]["y"] - y) < NEAR)
    elif bound:
        a, b = matched
        position = {
            "left of": a["x"] < b["x"] - APART, "right of": a["x"] > b["x"] + APART,
            "above": a["y"] < b["y"] - APART, "below": a["y"] > b["y"] + APART,
        }[scene["where"]]
    out = {
        "background": background == scene["background"],
        "count": len(seen) == len(wanted),
        "shapes": all(any(s["shape"] == o["shape"] for s in seen) for o in wanted),
        "colours": all(any(s["colour"] == o["colour"] for s in seen) for o in wanted),
        "bound": bound,
        "position": bool(position),
    }
    return {**out, "ok": out["background"] and out["count"] and out["bound"] and out["position"]}


def damaged(image, rng, how):
    """An image as a bad model might draw it."""
    noise = np.random.default_rng(rng.randrange(1 << 30))
    if how == "noisy":
        return image + noise.normal(0, 35, image.shape)
    if how == "pale":
        return 0.45 * image + 0.55 * image.mean((0, 1))
    if how == "blurred":
        for axis in (0, 1):
            image = sum(np.roll(image, k, axis) for k in range(-4, 5)) / 9
        return image
    if how == "cut":
        image = image.copy()
        image[:, 20:24] = image[0, 0]
        return image
    return image[::-1, ::-1]  # turned: left and right, above and below change places


def main():
    from PIL import Image

    golden = pathlib.Path(__file__).resolve().parent.parent / "tests/golden"
    rng, rows, images = random.Random(7), [], []
    for k in range(22):
        scene = draw_scene(rng)
        how = None if k < 10 else ("noisy", "turned", "pale", "turned", "blurred", "cut")[k % 6]
        image = render(scene)
        images.append(to_bytes(image if how is None else damaged(image, rng, how)))
        said = caption(draw_scene(rng) if k % 4 == 3 else scene)  # some are judged by another scene's caption
        rows.append({"caption": said, "damage": how, "objects": scene["objects"] if how is None else None, "drawn": caption(scene)})
    for path in map(pathlib.Path, sys.argv[1:]):  # the caption is in the file, where fastflux put it
        image = Image.open(path)
        images.append(np.asarray(image.convert("RGB")))
        rows.append({"caption": image.text["prompt"], "damage": "drawn by a model", "objects": None, "drawn": None})
    for row, image in zip(rows, images):
        background, seen = detect(image)
        row |= {"background": background, "seen": seen, "verdict": judge(parse(row["caption"]), image)}
    Image.fromarray(np.concatenate(images)).save(golden / "scenes.png", optimize=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    (golden / "scenes.json").write_text(f"[\n{lines}\n]\n")
    print(f"{len(rows)} images, {sum(r['verdict']['ok'] for r in rows)} right, {(golden / 'scenes.png').stat().st_size} bytes")


if __name__ == "__main__":
    main()
