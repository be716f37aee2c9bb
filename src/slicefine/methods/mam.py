"""Mix-and-match adapters: prefixes at attention, scaled adapters beside the feed-forward parts."""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor, nn

from .base import Base, Method, Options, freeze
from .bottleneck import Adapter, activation, add_parallel, parallel_count, seeded
from .prefix import add_prefixes, prefix_count, prefix_values, sites, sizes

__all__ = ["METHODS"]


def _build(base: Base, options: Options) -> nn.Module:
    found, generator = sites(base), seeded(base)
    bottleneck, shape, scale = int(options["bottleneck"]), activation(options), float(options["scale"])
    values = prefix_values(base, found, *sizes(options, "prefix_bottleneck"))
    draw = partial(nn.init.kaiming_uniform_, a=math.sqrt(5), generator=generator)

    def adapter(like: Tensor, width: int) -> Adapter:
        return Adapter(like, width, bottleneck, shape, scale).start(draw, nn.init.zeros_)

    freeze(base)
    add_parallel(base, adapter)
    return add_prefixes(base, found, values)


def _count(base: Base, options: Options) -> int:
    prefixes = prefix_count(sites(base), *sizes(options, "prefix_bottleneck"))
    return prefixes + parallel_count(base, int(options["bottleneck"]))


METHODS = (
    Method(
        name="mam",
        title="MAM adapter",
        source="He et al. 2021 (arXiv 2110.04366); compared with adapters 1.3.0 (mam)",
        formula="the entries of prefix, and L(2dr + r + d) for L blocks of width d",
        build=_build,
        count=_count,
        differs=(
            "where a block normalises before its parts, the adapter gets the normalised input that the feed-forward "
            "part gets; added before a dropout of the block, not after it: the same where dropout is 0"
        ),
        options={
            "length": 30,
            "prefix_bottleneck": 800,
            "flat": False,
            "bottleneck": 512,
            "non_linearity": "relu",
            "scale": 4.0,
        },
        learning_rate=1e-4,
        starts_at_base=False,
        merges=False,
    ),
)
