"""Damage to files: random bytes, lies in the header of a safetensors file, JSON of wrong types and ranges.

Every damage follows from a number, so that a finding is repeated by it. What is `forged` has checksums that fit again
or none: it may hold another update, and has to be whole or refused all the same.
"""

from __future__ import annotations

import json
import random
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADED = (".safetensors", ".compeft", ".bitdelta")
"""Suffixes of safetensors files."""
LONG_NAME = "a" * 28 + "!"
PATTERNS = [
    "(a+)+$",
    "(.*.*)*x",
    "(a|a)*$",
    "^(([a-z])+.)+$",
    "(",
    "[",
    "a{1,99999}",
    "(?P<n>a)(?P=n)",
    "x" * 20000,
    ".*" * 40,
]
NUMBERS = [
    -1, 0, 1, 2, 3, 7, 255, 256, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.0, 1e308, 1e-320,
    float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
OTHERS = [
    None, True, False, "", "x", "0", "1.0", "nan", "../../etc/passwd", "/dev/zero", "a" * 5000, [], [[]], {}, {"": 0},
    {"type": "no such part"}, {"type": 3}, ["q_proj", 3], "__class__", "\u0000", "\ud800",
]  # fmt: skip
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


@dataclass
class Damage:
    """What was done to one folder."""

    steps: list[str] = field(default_factory=list)
    forged: bool = False


def damage(folder: Path, seed: int, files: list[str], names: list[str]) -> Damage:
    """Damage one or more of `files` in `folder` in place; `names` are tensors of the base that they might name."""
    draw, done = random.Random(seed), Damage()
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        file = folder / draw.choice(files)
        content = file.read_bytes()
        try:
            if file.suffix in HEADED and draw.random() < 0.6:
                changed = _safetensors(content, draw, done, names)
            elif file.suffix in (".json", ".jsonl") and draw.random() < 0.75:
                changed = _json_file(content, draw, done, file.suffix == ".jsonl")
            else:
                changed = _bytes(content, draw, done)
        except RecursionError:  # what was nested before is nested once more
            changed = _bytes(content, draw, done)
        done.steps[-1] = f"{file.name}: {done.steps[-1]}"
        file.write_bytes(changed)
    return done


# Bytes


def _bytes(content: bytes, draw: random.Random, done: Damage) -> bytes:
    kind = draw.choice(("flip", "flip", "flip", "set", "insert", "delete", "double", "cut", "zero", "swap", "number"))
    done.steps.append(kind)
    if not content:
        return bytes([draw.randrange(256)])
    head = content[:8] if draw.random() < 0.1 else content  # the length of the header now and then
    at, span = draw.randrange(len(head)), draw.choice((1, 1, 2, 4, 8, 64, 512))
    changed = bytearray(content)
    if kind == "flip":
        for _ in range(draw.choice((1, 1, 1, 2, 5))):
            changed[draw.randrange(len(head))] ^= 1 << draw.randrange(8)
    elif kind == "set":
        changed[at] = draw.randrange(256)
    elif kind == "insert":
        changed[at:at] = draw.randbytes(span)
    elif kind == "delete":
        del changed[at : at + span]
    elif kind == "double":
        changed[at:at] = changed[at : at + span]
    elif kind == "cut":
        del changed[draw.choice((at, len(content) - span, 0, 7, 8)) :]
    elif kind == "zero":
        changed[at : at + span] = bytes([draw.choice((0, 255))]) * len(changed[at : at + span])
    elif kind == "swap":
        other = draw.randrange(len(content))
        one, two = changed[at : at + span], changed[other : other + span]
        changed[at : at + len(two)], changed[other : other + len(one)] = two, one
    else:
        width, code = draw.choice(((1, "<B"), (2, "<H"), (4, "<I"), (8, "<Q")))
        value = draw.choice(INTERESTING) & (256**width - 1)
        changed[at : at + width] = struct.pack(code, value)[: len(changed[at : at + width])]
    return bytes(changed)


# Safetensors

_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
           "F8_E4M3": 1, "F8_E5M2": 1, "U64": 8, "C64": 8, "F12": 1, "": 1}  # fmt: skip


_KINDS = (
    "offsets", "shape", "dtype", "rename", "to a base weight", "drop", "double name", "copy", "values", "not finite",
    "bytes of a tensor", "metadata", "metadata", "any JSON", "cast", "trim", "padding",
)  # fmt: skip


def _safetensors(content: bytes, draw: random.Random, done: Damage, names: list[str]) -> bytes:
    length = int.from_bytes(content[:8], "little")
    try:
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        tensors = sorted(key for key in header if key != "__metadata__")
        entries = [header[key]["data_offsets"] for key in tensors]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return _bytes(content, draw, done)
    if not tensors or not all(isinstance(one, list) and len(one) == 2 for one in entries):
        return _bytes(content, draw, done)
    kind = draw.choice(_KINDS)
    done.steps.append(kind)
    key = draw.choice(tensors)
    entry = header[key]
    try:
        begin, end = (int(one) for one in entry["data_offsets"])
    except (ValueError, TypeError):
        return _bytes(content, draw, done)
    changed = bytearray(data)
    if kind == "offsets":
        entry["data_offsets"] = draw.choice(
            (
                [end, begin],
                [begin, end + 1],
                [-8, end],
                [begin, 2**62],
                [0, 0],
                [begin, str(end)],
                [begin],
                None,
                [0.5, end],
            )
        )
    elif kind == "shape":
        turned = entry["shape"][::-1] if isinstance(entry.get("shape"), list) else 3
        entry["shape"] = draw.choice(
            ([10**15], [-1], [2**32, 2**32], [0], [], [1] * 70, ["2"], None, [end - begin], [0, 2**62], turned)
        )
    elif kind == "dtype":
        entry["dtype"] = draw.choice([*_DTYPES, 3, None])
    elif kind in ("rename", "to a base weight"):
        new = (
            draw.choice(names)
            if kind != "rename" and names
            else key[: draw.randrange(len(key) + 1)]
            + draw.choice(("", "x", ".", LONG_NAME))
            + key[draw.randrange(len(key) + 1) :]
        )
        header[new] = header.pop(key)
    elif kind == "drop":  # the rest moves up, or the file has a hole
        del header[key]
        if draw.random() < 0.8 and isinstance(end - begin, int) and 0 <= begin <= end <= len(data):
            del changed[begin:end]
            for other in header:
                if other != "__metadata__" and isinstance(header[other], dict):
                    offsets = header[other].get("data_offsets")
                    if (
                        isinstance(offsets, list)
                        and len(offsets) == 2
                        and all(isinstance(o, int) for o in offsets)
                        and offsets[0] >= end
                    ):
                        header[other]["data_offsets"] = [one - (end - begin) for one in offsets]
    elif kind == "double name":
        text = json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(entry)}}}"
        return _assembled(text, bytes(changed))
    elif kind == "copy":  # another tensor more, of the base or of nobody
        new = draw.choice(names) if names and draw.random() < 0.7 else key + draw.choice((".x", "_map", ".mine"))
        header[new] = {**entry, "data_offsets": [len(data), len(data) + end - begin]}
        changed += data[begin:end]
    elif kind in ("values", "not finite", "bytes of a tensor"):
        width = _DTYPES.get(entry.get("dtype") if isinstance(entry.get("dtype"), str) else "", 1)
        if 0 <= begin < end <= len(data):
            at = begin + draw.randrange(max((end - begin) // width, 1)) * width
            if kind == "not finite":
                fill = {8: b"\0\0\0\0\0\0\xf8\x7f", 4: b"\0\0\xc0\x7f", 2: b"\xc0\x7f"}.get(width, b"\xff")
                if draw.random() < 0.5:
                    fill = {8: b"\0\0\0\0\0\0\xf0\x7f", 4: b"\0\0\x80\x7f", 2: b"\x80\x7f"}.get(width, b"\x80")
                changed[at : at + width] = fill
            elif kind == "values":
                changed[at : at + width] = draw.randbytes(width)
            else:
                changed[begin:end] = _bytes(bytes(changed[begin:end]), draw, Damage(["x"]))[: end - begin].ljust(
                    end - begin, b"\0"
                )
    elif kind == "metadata":
        about = header.get("__metadata__")
        header["__metadata__"] = _metadata(about if isinstance(about, dict) else {}, draw)
    elif kind == "any JSON":
        header = _json_value(header, draw)
    elif kind == "cast" and 0 <= begin <= end <= len(data):  # the same bytes under another dtype and shape that fit
        dtype = draw.choice([name for name, width in _DTYPES.items() if width and (end - begin) % width == 0])
        entry["dtype"], entry["shape"] = dtype, [(end - begin) // _DTYPES[dtype]]
    elif kind == "trim" and isinstance(entry.get("shape"), list) and entry["shape"] and 0 <= begin < end <= len(data):
        rows = entry["shape"][0]
        if isinstance(rows, int) and rows > 0 and (end - begin) % rows == 0 and end == max(_ends(header), default=end):
            cut = (end - begin) // rows
            entry["shape"] = [rows - 1, *entry["shape"][1:]]
            entry["data_offsets"] = [begin, end - cut]
            del changed[end - cut : end]
    else:
        return _assembled(json.dumps(header) + " " * draw.choice((1, 8, 4096)), bytes(changed))
    forge = draw.random()
    if forge < 0.5 and isinstance(header, dict) and isinstance(header.get("__metadata__"), dict):
        done.forged = _forge(header, bytes(changed), draw) or done.forged
    return _assembled(json.dumps(header), bytes(changed))


def _ends(header: dict) -> list[int]:
    found = [one.get("data_offsets") for key, one in header.items() if key != "__metadata__" and isinstance(one, dict)]
    return [one[1] for one in found if isinstance(one, list) and len(one) == 2 and isinstance(one[1], int)]


def _assembled(header: str, data: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def _metadata(about: dict, draw: random.Random) -> Any:
    about = dict(about)
    kind = draw.randrange(5)
    if kind == 0 or not about:
        return draw.choice((None, 5, [], {"format": 5}, {"crc32": ""}, "x", {**about, "crc32": "0" * 8}))
    key = draw.choice(sorted(about))
    if kind == 1:
        del about[key]
    elif kind == 2:
        about[key + "x"] = about.pop(key)
    elif kind == 3 and isinstance(about[key], str) and about[key][:1] in ("{", "["):
        try:
            about[key] = json.dumps(_json_value(json.loads(about[key]), draw))
        except (ValueError, RecursionError):
            about[key] = "{"
    else:
        about[key] = draw.choice(("", "x", "0", "[" * 3000, str(about[key])[:-1], str(about[key])[::-1]))
    return about


_TORCH = {"F64": "torch.float64", "F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16",
          "I64": "torch.int64", "I32": "torch.int32", "I16": "torch.int16", "I8": "torch.int8", "U8": "torch.uint8",
          "BOOL": "torch.bool", "F8_E4M3": "torch.float8_e4m3fn", "F8_E5M2": "torch.float8_e5m2"}  # fmt: skip


def _forge(header: dict, data: bytes, draw: random.Random) -> bool:
    """Checksums that fit again, or none, and options likewise; whether it was done."""
    about = header["__metadata__"]
    if not all(isinstance(key, str) and isinstance(value, str) for key, value in about.items()):
        return False
    if draw.random() < 0.3:
        about.pop("options", None)
    if draw.random() < 0.5:
        return about.pop("crc32", None) is not None
    try:
        rest = json.dumps({k: v for k, v in about.items() if k != "crc32"}, sort_keys=True)
        sums = [
            zlib.crc32(data[slice(*header[key]["data_offsets"])],
                       zlib.crc32(f"{key} {_TORCH[header[key]['dtype']]} {tuple(header[key]['shape'])}".encode()))
            for key in sorted(header) if key != "__metadata__"
        ]  # fmt: skip
        about["crc32"] = "".join(f"{one:08x}" for one in (*sums, zlib.crc32(rest.encode())))
    except (KeyError, TypeError, ValueError, UnicodeEncodeError):
        return False
    return True


# JSON


def _json_file(content: bytes, draw: random.Random, done: Damage, lines: bool) -> bytes:
    done.steps.append("JSON")
    try:
        if not lines:
            return _text(_json_value(json.loads(content), draw), draw)
        rows = content.split(b"\n")
        at = draw.randrange(len(rows))
        rows[at] = _text(_json_value(json.loads(rows[at]), draw), draw)
        return b"\n".join(rows)
    except (ValueError, RecursionError):
        done.steps.pop()
        return _bytes(content, draw, done)


def _text(value: Any, draw: random.Random) -> bytes:
    text = json.dumps(value)
    if draw.random() < 0.03 and text.startswith("{") and len(text) > 2:  # a name twice
        text = text[:-1] + f', "{draw.choice(list(value) or ["x"])}": 1}}'
    return text.encode()


def _json_value(value: Any, draw: random.Random) -> Any:
    """A value with one thing in it changed."""
    value = json.loads(json.dumps(value))
    place, parent, key = value, None, None
    while isinstance(place, (dict, list)) and place and (parent is None or draw.random() < 0.75):
        parent, key = place, draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        place = parent[key]
    if parent is None:
        return draw.choice([*NUMBERS, *OTHERS])
    kind = draw.choice(
        ("number", "number", "other", "other", "near", "near", "pattern", "drop", "rename", "add", "nest", "huge list")
    )
    if kind == "number":
        parent[key] = draw.choice(NUMBERS)
    elif kind == "other":
        parent[key] = draw.choice(OTHERS)
    elif kind == "near":
        parent[key] = _near(place, draw)
    elif kind == "pattern":
        parent[key] = draw.choice((draw.choice(PATTERNS), [draw.choice(PATTERNS)], {draw.choice(PATTERNS): 1}))
    elif kind == "drop":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[draw.choice((f"{key}x", key[:-1], "", LONG_NAME))] = parent.pop(key)
    elif kind == "add" and isinstance(parent, dict):
        parent[
            draw.choice(("unknown", "__init__", "r", "sizes", "rank_pattern", "target_parameters", "auto_mapping"))
        ] = draw.choice([*NUMBERS, *OTHERS])
    elif kind == "nest":
        deep: Any = place
        for _ in range(draw.choice((2, 50, 900))):
            deep = [deep] if draw.random() < 0.5 else {"a": deep}
        parent[key] = deep
    else:
        parent[key] = [place] * draw.choice((2, 3, 1000))
    return value


def _near(value: Any, draw: random.Random) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return draw.choice((value + 1, -value, value * 2, value - 1, float(value) + 0.25))
    if isinstance(value, str):
        return draw.choice((value[1:], value + "x", value.upper(), value.replace("0", "1"), value[::-1]))
    return value
