"""`SliceFineConfig`: what a user writes instead of ``LoraConfig``."""

from __future__ import annotations

import numbers
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType

from ..biases import BIASES
from ..errors import AdapterFileError, ConfigError, SliceFineError, nearest
from ..files.adapter import CONFIG, mend, owned_slices, read_config
from ..geometry import Slice
from ..pace import MoveSettings
from ..schedule import Schedule
from ..tuner import ADAPTER_VERSION, share_visits
from ..window import make_window
from .registration import NAME

__all__ = ["SliceFineConfig"]

# PEFT has no discovery of methods: a process that did not import slicefine cannot read the adapter's type
_TEMPLATE = "# Model Card for Model ID"  # the title of PEFT's own, with dozens of places to fill in
_ABOUT = """# SliceFine adapter

Slices of {base} (mode {mode}, rank {r}), trained in place; no added parameters. A slice is a few whole rows or columns
of a weight; training moves on to others from time to time. The file holds the lines that were trained, when each was,
and checksums.

## What can be done with it

- `model.merge_and_unload()` gives a plain model with the trained values in it, `model.unload()` the base, bit for bit.
- `slicefine info FOLDER` shows which rows and columns were trained and when; `slicefine verify FOLDER` compares
  checksums.
- `slicefine export --adapter FOLDER --output lora` writes an ordinary LoRA adapter with the same effect, for PEFT, vLLM
  or llama.cpp.

## Citation

```bibtex
@article{{kowsher2025slicefine,
  title = {{SliceFine: The Universal Winning-Slice Hypothesis for Pretrained Networks}},
  author = {{Kowsher, Md and Polat, Ali O. and Mohammady Ardehaly, Ehsan and Salehi, Mehrdad and Ghiasi, Zia and
            Murali, Prasanth and Chen, Chen}},
  journal = {{arXiv preprint arXiv:2510.08513}},
  year = {{2025}}
}}
```

"""
_CARD = """
## Loading this adapter

It was trained with [SliceFine](https://arxiv.org/abs/2510.08513). Import the package before loading it:

```python
import slicefine
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
"""

_IN_PLACE = "a slice is trained in place: nothing is added that would need it. Leave it out."
_WITHOUT = {
    "lora_alpha": _IN_PLACE,
    "lora_dropout": _IN_PLACE,
    "init_lora_weights": "a slice starts from the pretrained values. Leave it out, or see start_values.",
    "use_rslora": _IN_PLACE,
    "use_dora": _IN_PLACE,
    "alpha_pattern": _IN_PLACE,
    "fan_in_fan_out": "how a layer stores its weight is seen by itself. Leave it out.",
}


class _UnknownSettingError(ConfigError, TypeError):  # PEFT looks for a TypeError with these words
    pass


def _hint(name: str, known: list[str]) -> str:
    meant = "did you mean r?" if name in ("rank", "lora_r") else nearest(name, known)
    return f"SliceFineConfig got an unexpected keyword argument {name!r}: {_WITHOUT.get(name, meant)}"


@dataclass
class SliceFineConfig(PeftConfig):
    """Configuration of SliceFine: train one small slice of each weight, in place, and move it during training.

    Args:
        r: slice rank, the number of contiguous rows or columns trained at a time (the paper's tables use 1 and 5; 12
            trailed LoRA r=8 less in short runs, docs/results/accuracy.md).
        mode: ``"row"`` (output units), ``"column"`` (input features), ``"alternate"`` (a row block, then a column
            block, and so on) or ``"random_mask"`` (single entries, paper Appendix K).
        r_row, r_column: rank per orientation; ``r`` where not given.
        positions: ``"sweep"`` (index 0, stride r, wrap-around), ``"random"`` (seeded, covers everything before
            repeating), ``"fixed"`` (static), a list of start indices, `slicefine.energy_positions` of some batches
            (columns with the largest inputs first; any ``{layer name: {"row" or "column": starts}}``), or a function
            ``(visit, layer name, (rows, columns)) -> Slice``.
        mask_fraction: budget of the random mask; None means the count of a rank-r row slice.
        moves: number of moves, spread evenly over the run; fewer if a position would get less than
            ``minimum_steps`` steps. ``Trainer`` tells the run's length by itself.
        interval: steps between moves (the paper's N) instead of ``moves``.
        total_steps: optimizer steps of the run, for custom training loops.
        minimum_steps: see ``moves``.
        state_policy: optimizer state at a move: ``"reset"``, ``"rewarm"`` or ``"keep"``.
        rewarm_steps: length of the ramp of ``"rewarm"``.
        on_nonfinite: ``"raise"`` stops when a slice turned out to be NaN or infinite, ``"skip"`` leaves optimizer steps
            with NaN or infinite gradients out (one synchronisation per step).
        window: train only the layers of a moving group of blocks: how many (an int), or which share of them (a float);
            backward stops at its lower edge. None trains all layers at once. See `slicefine.window.Window`.
        window_order: ``"top-down"``, ``"bottom-up"``, ``"random"`` or ``"fixed"`` (the top window stays).
        window_dwell: visits per window: ``"uniform"``, ``"top-heavy"``, or one number each, the top one's first.
        reserve: keep out of what other adapters trained: their folders, or ``{layer: [[axis, start, width], ...]}``
            (what folders become). Positions avoid their rows and columns; entries where a row crosses a column of
            theirs stay as they are.
        share: ``[i, n]``: train the i-th of n parts of the positions (i from 0); n runs with otherwise the same
            settings can go in parallel and be put together (`slicefine compose`).
        start_values: what a slice starts from at its first visit: ``"pretrained"``, or, to study that, ``"zero"``,
            ``"xavier"``, ``"kaiming"`` or ``"lecun"``.
        additive: leave the weights untouched and keep what slices change beside them, as differences; each visited line
            then costs a little in every forward. None does so where the base is quantised, which needs it; True
            everywhere. Not for random masks. Saving fills in what was done, and loading follows the file.
        whole_heads: slices of attention's projections are whole heads: ranks are rounded up to the head size.
        coupled: train both sides of the same hidden units at a time: rows of up (and gate) with the columns of down,
            rows of values with the columns of outputs. These layers keep that orientation, and ``r_row``.
        seed: of random positions, masks, windows and start values.
        save_values: what a file holds of the last slice: ``"master"`` (its fp32 master, from which training goes on
            exactly) or ``"base"`` (the base's precision, as of all finished slices; smaller over half precision).
        history: how many moves can be undone.
        init_weights: False perturbs the first slice, so that the adapter is not the identity (for tests).
        target_modules: names, a regular expression, ``"all-linear"``, or None for the architecture's default
            (all linear layers but the head, as in the paper).
        exclude_modules: names or a regular expression of modules to leave out.
        target_parameters: names of single parameters, such as the weights of experts that are stored in one piece
            (``"experts.down_proj"``): a row slice has the same output units of all experts.
        layers_to_transform, layers_pattern: restrict to layers by index, as in LoRA.
        rank_pattern: ``{name or regular expression: rank}`` for single layers.
        bias: biases that are trained in full beside the slices: ``"none"``, ``"all"`` (of the whole model, norms
            included), or ``"slicefine_only"`` (of the layers with slices). As in LoRA, one adapter of a model may.
        modules_to_save: modules that are trained and saved in full, such as a new head.
        trainable_token_indices: train single rows of the embedding, as in LoRA.

    Raises:
        ConfigError: for a setting that is wrong or contradicts another.

    Example:
        >>> SliceFineConfig(r=5, mode="column", target_modules="all-linear").mode
        'column'
    """

    r: int = field(default=12, metadata={"help": "Slice rank: rows or columns trained at a time."})
    mode: str = field(default="alternate", metadata={"help": "row, column, alternate or random_mask."})
    r_row: int | None = field(default=None, metadata={"help": "Rank of row slices; r if None."})
    r_column: int | None = field(default=None, metadata={"help": "Rank of column slices; r if None."})
    positions: Any = field(default="sweep", metadata={"help": "sweep, random, fixed, starts, or a function."})
    mask_fraction: float | None = field(default=None, metadata={"help": "Budget of random_mask."})
    moves: int | None = field(default=8, metadata={"help": "Number of moves, spread evenly over the run."})
    interval: int | None = field(default=None, metadata={"help": "Steps between moves, instead of moves."})
    total_steps: int | None = field(default=None, metadata={"help": "Length of the run, for custom loops."})
    minimum_steps: int = field(default=50, metadata={"help": "Least steps per position when moves is given."})
    state_policy: str = field(default="reset", metadata={"help": "Optimizer state at a move."})
    rewarm_steps: int = field(default=10, metadata={"help": "Length of the ramp of rewarm."})
    on_nonfinite: str = field(default="raise", metadata={"help": "raise, or skip steps with NaN gradients."})
    window: float | None = field(default=None, metadata={"help": "Blocks that train at a time (int), or their share."})
    window_order: str = field(default="top-down", metadata={"help": "top-down, bottom-up, random or fixed."})
    window_dwell: Any = field(default="uniform", metadata={"help": "uniform, top-heavy, or visits per window."})
    reserve: Any = field(default=None, metadata={"help": "Adapters (folders) to keep out of, or their slices."})
    share: list[int] | None = field(default=None, metadata={"help": "[i, n]: part i of n of the positions."})
    start_values: str = field(default="pretrained", metadata={"help": "pretrained, zero, xavier, kaiming or lecun."})
    additive: bool | None = field(default=None, metadata={"help": "Slices beside the weights; None: if quantised."})
    whole_heads: bool = field(default=False, metadata={"help": "Slices of attention's layers are whole heads."})
    coupled: bool = field(default=False, metadata={"help": "Train both sides of the same hidden units."})
    seed: int = field(default=0, metadata={"help": "Seed of random positions, masks and windows."})
    save_values: str = field(default="master", metadata={"help": "master or base: the last slice in a file."})
    history: int = field(default=8, metadata={"help": "How many moves can be undone."})
    init_weights: bool = field(default=True, metadata={"help": "False perturbs the first slice (for tests)."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to train."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave out."})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Single parameters to train."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layer list."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Rank of single layers."})
    bias: str = field(default="none", metadata={"help": "Biases to train in full: none, all or slicefine_only."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained in full."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Embedding rows to train."}
    )
    layout: dict[str, dict[str, list[int]]] | None = field(
        default=None, metadata={"help": "Shapes of the saved tensors, filled in at save. Do not set."}
    )

    weights: dict[str, dict[str, Any]] | None = field(
        default=None, metadata={"help": "Shape, orientation and a sample of the base's weights. Do not set."}
    )
    progress: list[dict[str, float]] | None = field(
        default=None, metadata={"help": "Loss and metrics of each visit, filled in at save. Do not set."}
    )
    checksums: dict[str, str] | None = field(
        default=None,
        metadata={"help": "Of a file's tensors: saving writes, reading checks them. Do not set."},
    )
    format_version: int = field(default=ADAPTER_VERSION, metadata={"help": "Of the adapter file. Do not set."})

    def __new__(cls, *_: Any, **settings: Any) -> SliceFineConfig:
        """Refuse settings that are another method's, and say what there is instead."""
        known = {item.name for item in fields(cls)}
        for name in settings:
            if name not in known:
                raise _UnknownSettingError(_hint(name, sorted(known)))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType(NAME)
        if not isinstance(self.format_version, int) or self.format_version > ADAPTER_VERSION:
            raise AdapterFileError(
                f"the adapter has format version {self.format_version}, and this slicefine reads up to "
                f"{ADAPTER_VERSION}; update slicefine."
            )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        try:  # numpy's numbers would pass until a file is written
            self.seed = operator.index(self.seed)
        except TypeError:
            raise ConfigError(f"seed={self.seed!r} must be an integer.") from None
        if isinstance(self.mask_fraction, numbers.Real):
            self.mask_fraction = float(self.mask_fraction)
        if not isinstance(self.history, int) or isinstance(self.history, bool) or self.history < 0:
            raise ConfigError(f"history={self.history!r} must be an integer of at least 0.")
        if self.additive not in (None, True, False):
            raise ConfigError(f"additive={self.additive!r} must be true, false, or null (where the base is quantised).")
        if self.additive and self.mode == "random_mask":
            raise ConfigError("mode='random_mask' trains scattered entries in place; it cannot be additive.")
        if self.save_values not in ("master", "base"):
            raise ConfigError(f"save_values={self.save_values!r} is unknown; expected master or base.")
        if self.bias not in BIASES:
            raise ConfigError(f"bias={self.bias!r} is unknown; expected one of {', '.join(BIASES)}.")
        self.checksums = None  # of a file, not of what is trained from it
        self.reserve = owned_slices(self.reserve)
        self.schedule()
        self.move_settings()
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"`{name}` cannot be used when `target_modules` is a str: put the layers into the expression."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("`layers_pattern` needs `layers_to_transform`: say which of those layers to train.")

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """As PEFT's, of a configuration that comes from a file: it names no folders to read."""
        if not isinstance(kwargs.get("reserve"), (dict, type(None))):
            raise AdapterFileError(
                f"the adapter's configuration reserves {kwargs['reserve']!r}; a file has the slices themselves. It is "
                "corrupt."
            )
        result: dict[str, Any] = super().check_kwargs(**kwargs)  # type: ignore[no-untyped-call]
        return result

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As PEFT's, of a folder that may hold anything.

        Raises:
            AdapterFileError: if the folder's configuration is none.
        """
        folder = Path(str(pretrained_model_name_or_path), subfolder or "")
        if not (folder / CONFIG).is_file():  # on the hub
            return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)  # type: ignore[no-untyped-call]
        mend(folder)
        read_config(folder)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)  # type: ignore[no-untyped-call]
        except SliceFineError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise AdapterFileError(
                f"{folder / CONFIG}: its settings make no sense ({type(error).__name__}: {error}); the file is corrupt."
            ) from error

    def schedule(self, rank: int | None = None) -> Schedule:
        """The pure schedule of these settings; ``rank`` replaces every rank (for `rank_pattern`)."""
        row = rank if rank is not None else self.r_row if self.r_row is not None else self.r
        column = rank if rank is not None else self.r_column if self.r_column is not None else self.r
        positions = tuple(self.positions) if isinstance(self.positions, list) else self.positions
        reserve = {layer: [Slice(*block) for block in blocks] for layer, blocks in (self.reserve or {}).items()}
        if self.share is not None and not (isinstance(self.share, (list, tuple)) and len(self.share) == 2):
            raise ConfigError(f"share={self.share!r}: expected [i, n]: part i of n, counted from 0.")
        share = None if self.share is None else (self.share[0], self.share[1])
        visits = share_visits(self.mode, share, self.move_settings())
        return Schedule(
            self.mode,
            row,
            column,
            positions,
            self.mask_fraction,
            self.seed,
            reserve,
            share,
            visits,
            self.start_values,
        )

    def move_settings(self) -> MoveSettings:
        """When to move, and the policy for optimizer state."""
        return MoveSettings(
            self.moves,
            self.interval,
            self.total_steps,
            self.minimum_steps,
            self.state_policy,
            self.rewarm_steps,
            make_window(self.window, self.window_order, self.window_dwell, self.seed),
            self.on_nonfinite,
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As PEFT's, and the model card beside it says what was trained and that loading needs ``import slicefine``.

        PEFT's empty template gives way to it; a card that somebody wrote keeps its words.
        """
        super().save_pretrained(str(save_directory), **kwargs)
        card = Path(save_directory, "README.md")
        text = card.read_text(encoding="utf-8") if card.exists() else "---\nlibrary_name: peft\n---\n"
        if _CARD.strip() not in text:
            head, template, rest = text.partition(_TEMPLATE)
            if template:
                base = f"`{self.base_model_name_or_path}`" if self.base_model_name_or_path else "the base model"
                _, known, versions = rest.partition("### Framework versions")
                text = f"{head}{_ABOUT.format(base=base, mode=self.mode, r=self.r)}{known}{versions}"
            card.write_text(text.rstrip("\n") + "\n" + _CARD, encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with a position function left out: code does not belong in a file."""
        result: dict[str, Any] = super().to_dict()
        positions = result.get("positions")
        if callable(positions):
            result["positions"] = "sweep"
        elif isinstance(positions, Sequence) and not isinstance(positions, str):
            result["positions"] = [int(start) for start in positions]  # a range, say
        elif isinstance(positions, Mapping):
            result["positions"] = {
                layer: {axis: [int(start) for start in starts] for axis, starts in orders.items()}
                for layer, orders in positions.items()
            }
        return result
