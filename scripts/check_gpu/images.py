"""Prints the largest difference between two PNG files of eight-bit RGB, or two folders of them, and its root mean square, of 255.

Needs nothing but Python.
"""

import pathlib
import struct
import sys
import zlib


def pixels(path):
    """Width, height and the bytes of an image."""
    data = pathlib.Path(path).read_bytes()
    at, packed, head = 8, b"", None
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at:at + 8])
        body = data[at + 8:at + 8 + size]
        if kind == b"IHDR":
            head = struct.unpack(">IIBBBBB", body)
        elif kind == b"IDAT":
            packed += body
        at += 12 + size
    width, height, depth, colour = head[:4]
    if (depth, colour, head[6]) != (8, 2, 0):
        sys.exit(f"{path}: expected eight-bit RGB, not interlaced")
    raw, row, out = zlib.decompress(packed), bytearray(3 * width), []
    for y in range(height):
        start = y * (3 * width + 1)
        kind, line, above = raw[start], bytearray(raw[start + 1:start + 1 + 3 * width]), row
        for x in range(3 * width):
            left, corner = (line[x - 3], above[x - 3]) if x >= 3 else (0, 0)
            up = above[x]
            if kind == 1:
                line[x] = (line[x] + left) & 255
            elif kind == 2:
                line[x] = (line[x] + up) & 255
            elif kind == 3:
                line[x] = (line[x] + (left + up) // 2) & 255
            elif kind == 4:
                guess = left + up - corner
                best = min((abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner))
                line[x] = (line[x] + best[2]) & 255
        row = line
        out.append(bytes(line))
    return (width, height), b"".join(out)


def pairs(first, second):
    """The files themselves, or the files of one name in two folders."""
    if not first.is_dir():
        return [(first, second)]
    return [(path, second / path.name) for path in sorted(first.glob("*.png"))]


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    most = squares = count = 0
    for paths in pairs(*map(pathlib.Path, sys.argv[1:])):
        (size, first), (other, second) = map(pixels, paths)
        if size != other:
            sys.exit(f"{paths[0]}: the images are {size} and {other} pixels large")
        for a, b in zip(first, second):
            most, squares, count = max(most, abs(a - b)), squares + (a - b) ** 2, count + 1
    print(most, f"{(squares / max(count, 1)) ** 0.5:.4f}")


if __name__ == "__main__":
    main()
