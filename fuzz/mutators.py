"""Changes that get past a parser: JSON, safetensors and YAML stay well formed while a value in them becomes odd."""

from __future__ import annotations

import json
import random
from typing import Any

# what settings and shapes are not made for
ODD: list[Any] = [
    *(None, True, False, "", "row", "column", "entries", "random_mask", "x" * 300, "../../x", "/etc/passwd"),
    *(0, 1, -1, 2, 3, 2**31, 2**40, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), -float("inf"), [], {}, [[]], [1, 2], [0, 1, "row"], {"row": [0]}, [None], "1e999"),
]
ODD_YAML = [b"\na: &a [x, x]\nb: [*a, *a]\n", b"\n? [1]\n: 2\n", b"\n--- 1\n", b"\n!!python/name:os\n"]


def change_json(content: bytes, draw: random.Random) -> bytes:
    """One to three values of a JSON document replaced, removed, copied to another place, or deeply nested."""
    value = json.loads(content)
    for _ in range(draw.randint(1, 3)):
        value = _changed(value, draw)
    return json.dumps(value).encode()


def _changed(value: Any, draw: random.Random) -> Any:
    places = list(_places(value))
    if not places:
        return draw.choice(ODD)
    parent, key = draw.choice(places)
    how = draw.random()
    if how < 0.5:
        parent[key] = draw.choice(ODD)
    elif how < 0.6:
        del parent[key]
    elif how < 0.75:
        other, at = draw.choice(places)
        parent[key] = json.loads(json.dumps(other[at]))
    elif how < 0.9 and isinstance(parent[key], (int, float)):
        parent[key] += draw.choice((-1, 1, 2, 100))
    else:
        parent[key] = [parent[key]]
    return value


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def change_safetensors(content: bytes, draw: random.Random) -> bytes:
    """The header changed as JSON with its length set right, or values in the body (small ones: journals)."""
    length = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + length], bytearray(content[8 + length :])
    if draw.random() < 0.5:
        header = change_json(header, draw)
        header += b" " * (-len(header) % 8)
    elif body:
        at = draw.randrange(0, len(body), 8)
        number = draw.choice([0, 1, 2, 3, 5, 7, -1, 2**31, 2**40, 2**62, -(2**63)])
        body[at : at + 8] = number.to_bytes(8, "little", signed=True)
    return len(header).to_bytes(8, "little") + header + bytes(body)


def change_yaml(content: bytes, draw: random.Random) -> bytes:
    """A YAML document with a value changed, or with an alias."""
    import yaml

    if draw.random() < 0.1:
        return content + draw.choice(
            [b"\na: &a [x, x]\nb: [*a, *a]\n", b"\n? [1]\n: 2\n", b"\n--- 1\n", b"\n!!python/name:os\n"]
        )
    return yaml.safe_dump(
        json.loads(change_json(json.dumps(yaml.safe_load(content), default=str).encode(), draw))
    ).encode()


def mutate(target: str, data: bytes, draw: random.Random) -> bytes:
    """A changed input of a target; raises `ValueError`, or anything, for one that is not well formed."""
    if target == "config":
        return change_json(data, draw)
    if target == "recipe":
        return data[:1] + change_yaml(data[1:], draw)
    config, _, weights = data.partition(b"\0")
    if draw.random() < 0.5:
        config = change_json(config, draw)
    else:
        weights = change_safetensors(weights, draw)
    return config + b"\0" + weights
