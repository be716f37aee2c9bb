"""A recipe as nested dataclasses. Their defaults are the embedded run: MiniLM on docstrings, offline."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..biases import BIASES
from ..errors import ConfigError
from ..initial import START_VALUES
from ..methods import Method, find, options_of
from ..pace import MoveSettings
from ..schedule import POSITIONS, Schedule
from ..tasks.settings import DataSettings, ModelSettings, TaskSettings
from ..tuner import share_visits
from ..window import make_window

__all__ = [
    "BackboneSettings",
    "LotterySettings",
    "MethodSettings",
    "SliceSettings",
    "TrainSettings",
    "TrainingSettings",
]

_EVERY = ("epoch", "steps", "no")
_MEASURED = ("energy", "most", "least", "mixed")
_IMPORTANCE = ("wanda", "lottery")
_ROW_ORDERS = ("gradient", "sweep")


@dataclass
class MethodSettings:
    """How to fine-tune; the baselines run through the same code.

    Args:
        name: slicefine, lora, bitfit, full (all weights), head (the new head only), and so on; `slicefine methods`
            lists them all.
        options: the method's own settings, such as {r: 8}; for slicefine they are below slice.
    """

    name: str = "slicefine"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        method = find(self.name)
        if self.options and self.name == "slicefine":
            raise ConfigError(f"method.options={self.options!r}: slicefine's settings are below slice, as slice.r.")
        options_of(method, self.options)


@dataclass
class LotterySettings:
    """Iterative magnitude pruning with rewind (Frankle & Carbin 2019), before a run, on the run's own train batches.

    Args:
        rounds: of training all weights, pruning, and going back to the pretrained values.
        steps: optimizer steps per round.
        share: of the living weights that each round prunes.
        learning_rate: of AdamW, for all weights.
    """

    rounds: int = 3
    steps: int = 50
    share: float = 0.3
    learning_rate: float = 5e-5

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.steps < 1:
            raise ConfigError(f"slice.lottery: rounds={self.rounds} and steps={self.steps} must be at least 1.")
        if not 0 < self.share < 1 or not self.learning_rate > 0:
            raise ConfigError(
                f"slice.lottery: share={self.share} must lie in (0, 1), learning_rate={self.learning_rate} above 0."
            )


@dataclass
class SliceSettings:
    """The slice: how large, where, and when it moves. `target_modules` and `exclude_modules` serve LoRA as well.

    Args:
        r: rank: rows or columns that are trained at a time. The default trailed LoRA r=8 least in short runs.
        mode: row, column, alternate or random_mask. Columns keep the least for backward.
        r_row: rank of row slices; None is r.
        r_column: rank of column slices; None is r.
        positions: energy (columns in the order of their input's energy on a few training batches, rows by row_order),
            sweep, random, fixed, most, least or mixed (by importance, for rows and columns), a list of start indices,
            or {layer: {"row" or "column": starts}}.
        row_order: rows of positions=energy: gradient (in the order of the energy of their output's gradient on those
            batches) or sweep.
        importance: what most, least and mixed go by: wanda (weight times input norm on a few training batches), or
            lottery (the share of a slice that survives iterative magnitude pruning; see lottery).
        lottery: how the lottery ticket is drawn.
        start_values: what a slice starts from at its first visit: pretrained, zero, xavier, kaiming or lecun.
        mask_fraction: budget of random_mask as a fraction; None is the count of a row slice of rank r.
        moves: number of moves, spread evenly over the run.
        interval: optimizer steps between moves; overrides moves.
        minimum_steps: with moves, steps that a position gets at least.
        state_policy: optimizer state at a move: reset, rewarm or keep.
        rewarm_steps: length of the ramp of rewarm.
        on_nonfinite: raise stops at a NaN or infinite loss or slice; skip leaves steps with such gradients out.
        window: train only the layers of a moving group of blocks: how many (2), or which share of them (0.5); backward
            stops at its lower edge. None trains all layers at once.
        window_order: top-down, bottom-up, random, or fixed (the top window stays).
        window_dwell: visits per window: uniform, top-heavy, or one number each, the top window's first.
        reserve: folders of adapters whose rows and columns this run keeps out of; entries where they cross stay fixed.
        share: [i, n] trains part i (from 0) of n of the positions, beside n - 1 other runs; positions sweep or random.
        seed: of random positions, masks and windows; None is training.seed.
        target_modules: "all-linear", names, a regular expression, or null for the architecture's default.
        exclude_modules: names or a regular expression of layers to leave out.
        target_parameters: names of single parameters to train beside them, such as experts' weights in one piece.
        layers_to_transform: indices of the layers to train; null is all.
        rank_pattern: rank of single layers, by name or regular expression.
        whole_heads: slices of attention's projections are whole heads: ranks are rounded up to the head size.
        bias: biases to train whole beside the slices: none, all (of the model, norms included) or slicefine_only (of
            the layers with slices).
        coupled: train both sides of the same hidden units at a time, with r_row: rows of up with the columns of down,
            rows of values with the columns of outputs.
    """

    r: int = 12
    mode: str = "column"
    r_row: int | None = None
    r_column: int | None = None
    positions: str | list[int] | dict[str, dict[str, list[int]]] = "energy"
    row_order: str = "gradient"
    importance: str = "wanda"
    lottery: LotterySettings = field(default_factory=LotterySettings)
    start_values: str = "pretrained"
    mask_fraction: float | None = None
    moves: int | None = 8
    interval: int | None = None
    minimum_steps: int = 50
    state_policy: str = "reset"
    rewarm_steps: int = 10
    on_nonfinite: str = "raise"
    window: int | float | None = None
    window_order: str = "top-down"
    window_dwell: str | list[int] = "uniform"
    reserve: list[str] = field(default_factory=list)
    share: list[int] | None = None
    seed: int | None = None
    target_modules: str | list[str] | None = "all-linear"
    exclude_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    layers_to_transform: list[int] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    whole_heads: bool = False
    bias: str = "none"
    coupled: bool = False

    def __post_init__(self) -> None:
        row, column = self.r if self.r_row is None else self.r_row, self.r if self.r_column is None else self.r_column
        if isinstance(self.positions, str) and self.positions not in (*_MEASURED, *POSITIONS):
            known = ", ".join((*_MEASURED, *POSITIONS))
            raise ConfigError(f"slice.positions={self.positions!r} is unknown; expected {known}, or a list of starts.")
        if self.row_order not in _ROW_ORDERS:
            known = ", ".join(_ROW_ORDERS)
            raise ConfigError(f"slice.row_order={self.row_order!r} is unknown; expected one of {known}.")
        if self.importance not in _IMPORTANCE:
            known = ", ".join(_IMPORTANCE)
            raise ConfigError(f"slice.importance={self.importance!r} is unknown; expected one of {known}.")
        if self.bias not in BIASES:
            raise ConfigError(f"slice.bias={self.bias!r} is unknown; expected one of {', '.join(BIASES)}.")
        if self.share is not None and self.measured:
            raise ConfigError(
                f"slice.share: the order of positions={self.positions} differs between runs, so that their parts would "
                "meet; choose slice.positions=sweep or random."
            )
        if self.share is not None and len(self.share) != 2:
            raise ConfigError(f"slice.share={self.share!r}: expected [i, n]: part i of n, counted from 0.")
        try:
            window = make_window(self.window, self.window_order, self.window_dwell, self.seed or 0)
            moves = MoveSettings(
                self.moves,
                self.interval,
                None,
                self.minimum_steps,
                self.state_policy,
                self.rewarm_steps,
                window,
                self.on_nonfinite,
            )
            positions = "sweep" if self.measured else self.positions
            share = None if self.share is None else (self.share[0], self.share[1])
            visits = share_visits(self.mode, share, moves)
            Schedule(
                self.mode,
                row,
                column,
                positions,
                self.mask_fraction,
                share=share,
                share_visits=visits,
                start_values=self.start_values,
            )
            if self.reserve and self.mode == "random_mask":
                raise ConfigError("mode='random_mask' draws entries all over the matrix; reserve= needs slices.")
        except ConfigError as error:
            raise ConfigError(f"slice: {error}") from error

    @property
    def measured(self) -> bool:
        """Whether positions wait for a look at the data."""
        return isinstance(self.positions, str) and self.positions in _MEASURED


@dataclass
class BackboneSettings:
    """What is done to the pretrained model before it is frozen, to study what slices need of it (Appendix D).

    The changed model is written into the run's folder as ``base/``, and the adapter belongs to that one.

    Args:
        prune: share of the weights that become zero, by magnitude over the whole model; biases, norms, and the slices
            that the run will train are kept.
        reinitialise: new random weights instead of the pretrained ones: xavier, kaiming or lecun.
        seed: of the new weights.
    """

    prune: float = 0.0
    reinitialise: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.prune <= 1:
            raise ConfigError(f"backbone.prune={self.prune!r} must lie in [0, 1]: the share that becomes zero.")
        if self.reinitialise not in (None, *START_VALUES[2:]):
            known = ", ".join(START_VALUES[2:])
            raise ConfigError(f"backbone.reinitialise={self.reinitialise!r} is unknown; expected one of {known}.")

    @property
    def changed(self) -> bool:
        """Whether anything is done at all."""
        return self.prune > 0 or self.reinitialise is not None


@dataclass
class TrainingSettings:
    """The optimization.

    Args:
        epochs: passes over the train set.
        max_steps: optimizer steps; overrides epochs.
        batch_size: rows per device and step.
        eval_batch_size: rows per device when evaluating; None is four times batch_size.
        learning_rate: peak rate; None takes the method's own.
        rate_factor: multiplies learning_rate, or the method's own: one grid to search with, for all methods.
        head_learning_rate: rate of a new head; None is learning_rate.
        weight_decay: AdamW's decay.
        optimizer: a name that transformers' Trainer knows, such as adamw_torch.
        warmup_ratio: share of the steps in which the rate rises.
        schedule: a schedule that transformers knows: linear, cosine, constant, ...
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
        gradient_accumulation: batches per optimizer step.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        bf16: mixed precision.
        seed: of everything: head, order, dropout.
        evaluate: epoch, steps or no.
        evaluate_steps: optimizer steps between evaluations, with evaluate=steps.
        evaluate_before: measure the metric before training as well.
        load_best: end with the best checkpoint instead of the last one.
        early_stopping: stop after this many evaluations without a better metric.
        save_steps: optimizer steps between checkpoints, beside those at evaluations; None writes these only.
        save_limit: checkpoints to keep, beside the best one.
        group_by_length: batch texts of similar length, which saves padding.
        logging_steps: optimizer steps between entries of the loss curve.
        report_to: tensorboard, wandb, or any other that transformers knows; one or a list.
        workers: processes that prepare batches.
    """

    epochs: float = 2.0
    max_steps: int | None = None
    batch_size: int = 16
    eval_batch_size: int | None = None
    learning_rate: float | None = None
    rate_factor: float = 1.0
    head_learning_rate: float | None = None
    weight_decay: float = 0.0
    optimizer: str = "adamw_torch"
    warmup_ratio: float = 0.06
    schedule: str = "linear"
    max_grad_norm: float = 1.0
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    bf16: bool = False
    seed: int = 42
    evaluate: str = "epoch"
    evaluate_steps: int | None = None
    evaluate_before: bool = True
    load_best: bool = True
    early_stopping: int | None = None
    save_steps: int | None = None
    save_limit: int = 1
    group_by_length: bool = True
    logging_steps: int = 10
    report_to: list[str] | str = field(default_factory=list)
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation", "logging_steps", "save_limit"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name}={getattr(self, name)!r} must be at least 1.")
        for name in ("max_steps", "eval_batch_size", "early_stopping", "evaluate_steps", "save_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"training.{name}={value!r} must be at least 1; leave it out for the default.")
        for name in ("learning_rate", "rate_factor", "head_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                raise ConfigError(f"training.{name}={value!r} must be positive.")
        for name in ("weight_decay", "max_grad_norm", "workers"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"training.{name}={getattr(self, name)!r} must not be negative.")
        if not 0.0 <= self.warmup_ratio <= 1.0:
            raise ConfigError(f"training.warmup_ratio={self.warmup_ratio!r} must lie in [0, 1]: a share of the steps.")
        if self.epochs <= 0 and self.max_steps is None:
            raise ConfigError(f"training.epochs={self.epochs!r} must be positive, or give training.max_steps.")
        self._check_evaluation()

    def _check_evaluation(self) -> None:
        if self.evaluate not in _EVERY:
            raise ConfigError(f"training.evaluate={self.evaluate!r} is unknown; expected one of {', '.join(_EVERY)}.")
        if self.evaluate == "steps" and self.evaluate_steps is None:
            raise ConfigError("training.evaluate=steps needs training.evaluate_steps, the number of steps between.")
        if self.early_stopping is not None and (self.evaluate == "no" or not self.load_best):
            raise ConfigError("training.early_stopping needs evaluations and training.load_best=true.")


@dataclass
class TrainSettings:
    """Everything that `slicefine train` needs.

    Args:
        model: the pretrained model.
        data: the data set.
        task: the task.
        method: how to fine-tune.
        slice: the slice.
        backbone: what is done to the pretrained weights first.
        training: the optimization.
        output: folder for the results; None makes a new one below runs/.
        overwrite: replace the results of an earlier run in that folder.
        resume: true goes on from the last checkpoint in output; or a run's folder, or a checkpoint's.
        verify: reload what was saved and compare predictions, unload and compare weights; None does so below
            100 million parameters.
        dry_run: show the plan (layers, slices, trainable share, moves) and stop.
        quiet: print nothing.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    task: TaskSettings = field(default_factory=TaskSettings)
    method: MethodSettings = field(default_factory=MethodSettings)
    slice: SliceSettings = field(default_factory=SliceSettings)
    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    output: str | None = None
    overwrite: bool = False
    resume: bool | str = False
    verify: bool | None = None
    dry_run: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.resume is True and self.output is None:
            raise ConfigError("--resume needs --output, the folder of the run to go on with; or give --resume FOLDER.")
        if self.model.quantize is not None and self.chosen_method.saves != "adapter":
            raise ConfigError(
                f"model.quantize={self.model.quantize}: method.name={self.method.name} changes quantised weights; "
                "use slicefine, lora, or another of PEFT's adapters."
            )
        if self.model.quantize is not None and self.backbone.changed:
            raise ConfigError("backbone: a quantised model's weights are not changed; leave model.quantize out.")
        if self.backbone.changed and self.model.config is not None:
            raise ConfigError("backbone: model.config starts from random weights; there is no backbone to change.")
        if self.model.config is not None and self.method.name != "full":
            raise ConfigError(
                f"model.config starts from random weights, which method.name={self.method.name} would leave mostly "
                "untrained, and which no adapter could be attached to again. Use method.name=full, or model.path."
            )

    @property
    def learning_rate(self) -> float:
        """The peak rate: the recipe's, or the method's own."""
        rate = self.training.learning_rate or self.chosen_method.learning_rate
        return rate * self.training.rate_factor

    @property
    def chosen_method(self) -> Method:
        """The registry's entry that method.name is."""
        return find(self.method.name)

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for files."""
        return asdict(self)
