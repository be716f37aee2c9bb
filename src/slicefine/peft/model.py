"""`SliceFineModel`: PEFT's tuner for SliceFine. It wraps layers and makes the mover; training needs nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, NoMatchingPeftModuleError
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper, get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..coupling import check_coupled, fitted, structure
from ..delta import KINDS
from ..errors import AdapterFileError, ConfigError, UnsupportedError
from ..guards import check_frozen, refuse_not_finite
from ..layer import SliceLayer
from ..mover import Mover
from ..pace import check_progress
from ..quantised import format_of, place_of
from ..schedule import Schedule
from ..sharded import placed_like, whole
from ..state import read_sample
from ..targets import set_module, shared_names, warn_about_unknown
from ..transfer import BESIDE, ORIGINALS, check_tensors, expect, file_tensors, load_tensors, tensor_name, weight_facts
from ..tuner import warn_about_clamped, warn_about_lost
from ..weights import TRAINABLE, is_linear, kind_of, lies_beside
from .biases import bias_tensors, biases_of, check_one_has_biases, find_biases, hold_biases, refuse_biases
from .callback import SliceFineCallback
from .config import SliceFineConfig
from .layer import ParamWrapper, SliceFineLinear
from .registration import install_trainer_callback

__all__ = ["SliceFineModel"]

# TRL trains on from an adapter with a copy of it as the reference: it adds one of this name with the trained one's own
# configuration object, and copies the parameters, which for slices are not all there is
_REFERENCE = "ref"


class SliceFineModel(BaseTuner):  # type: ignore[misc]
    """PEFT tuner that trains one moving slice per target layer, in place.

    Args:
        model: the model to adapt.
        config: a `SliceFineConfig`; it is copied, so that it can be used again.
        adapter_name: name of the adapter.
    """

    prefix: str = "slicefine_"
    tuner_layer_cls = SliceFineLinear
    # the paper trains all linear layers (Section 3, Table 4)
    target_module_mapping: dict[str, Any] = dict.fromkeys(
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "all-linear"
    )

    # -- injection ------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap the target layers, then make the mover that moves their slices.

        A failure leaves the model as it was: no layer stays wrapped.
        """
        install_trainer_callback(SliceFineCallback)
        config: Any = self.peft_config[adapter_name]
        twins = [name for name, other in self.peft_config.items() if other is config and name != adapter_name]
        if not config.inference_mode:  # a run's state must not leak into the user's object
            config = self.peft_config[adapter_name] = copy.copy(config)
        if next(_sliced_layers(model, adapter_name), None) is not None:
            raise ConfigError(f"adapter {adapter_name!r} exists already; delete it first or choose another name.")
        listed = config.target_modules  # as it was given: PEFT replaces "all-linear" by a list
        self._clamped: dict[str, int] = {}
        self._structure = structure(model, config.whole_heads, config.coupled)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            self._inject(model, adapter_name, config, *args, **kwargs)
            self._reach_inside(model, adapter_name, config)
            hold_biases(model, adapter_name, config.bias, warn=not config.inference_mode)
            self._check_reserve(model, adapter_name, config)
            made = [layer for _, layer in _sliced_layers(model, adapter_name)]
            plans = {(s := layer.states[adapter_name]).layer_name: (s.schedule, layer.shape) for layer in made}
            check_coupled(plans, self._structure)
            self._make_mover(model, adapter_name, config)
            if adapter_name == _REFERENCE and twins:
                _copy_slices(model, twins[0], adapter_name)
        except Exception:
            _remove_adapter(model, adapter_name)
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        warn_about_clamped(self._clamped)
        warn_about_unknown(model, listed)

    def _inject(self, model: nn.Module, adapter_name: str, config: Any, *args: Any, **kwargs: Any) -> None:
        """PEFT's injection, which may find nothing where all that is meant lies inside layers with adapters."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError:
            if not list(self._inside(model, adapter_name, config)):
                raise
            targets = config.target_modules
            try:
                config.target_modules = DUMMY_TARGET_MODULES  # PEFT's word for: none of those that it looks at
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            finally:
                config.target_modules = targets

    def _reach_inside(self, model: nn.Module, adapter_name: str, config: SliceFineConfig) -> None:
        """PEFT passes by what lies inside a layer with adapters: the output projection of packed attention."""
        for key, attention in list(self._inside(model, adapter_name, config)):
            self._create_and_replace(config, adapter_name, attention.out_proj, "out_proj", attention, key)

    def _inside(self, model: nn.Module, adapter_name: str, config: SliceFineConfig) -> Iterator[tuple[str, Any]]:
        """Output projections that an adapter targets and has not yet, by name, with the attention that they are of."""
        for name, layer in _sliced_layers(model):
            inside = getattr(layer.base_layer, "out_proj", None) if layer.kind.layout == "packed" else None
            key = f"{name.replace('.base_layer', '')}.out_proj"
            if inside is None or adapter_name in getattr(inside, "states", ()):
                continue
            if self._check_target_module_exists(config, key):
                yield key, layer.base_layer

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        """As PEFT's; "all-linear" means layers, too, that are no nn.Linear: quantised ones, and packed attention."""
        config: Any = super()._prepare_adapter_config(peft_config, model_config)
        if config.target_modules != "all-linear":
            return config
        known = (nn.Linear, Conv1D, BaseTunerLayer)
        if any(is_linear(module) and not isinstance(module, known) for module in self.model.modules()):
            output = getattr(self.model, "get_output_embeddings", lambda: None)()
            named = self.model.named_modules()
            # below a wrapped layer the base is what trains; the adapter goes to the wrapper
            config.target_modules = {
                name.replace(".base_layer", "") for name, m in named if is_linear(m) and m is not output
            }
        return config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        """As PEFT's; it takes a full name for a match without a look at ``layers_to_transform``, so ask by ending."""
        targets = peft_config.target_modules
        if peft_config.layers_to_transform is not None and isinstance(targets, set) and key in targets:
            peft_config = copy.copy(peft_config)
            peft_config.target_modules = {key.rpartition(".")[2]}
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _check_reserve(self, model: nn.Module, adapter_name: str, config: SliceFineConfig) -> None:
        """Slices of another naming of the layers would be kept out of by nobody."""
        names = {layer.states[adapter_name].layer_name for _, layer in _sliced_layers(model, adapter_name)}
        if config.reserve and names and not config.inference_mode and names.isdisjoint(config.reserve):
            raise ConfigError(
                f"reserve: none of its {len(config.reserve)} layers ({next(iter(config.reserve))}, ...) is trained "
                f"here ({sorted(names)[0]}, ...). Train the same layers of the same model class, or leave it out."
            )

    def _check_new_adapter_config(self, config: Any) -> None:
        check_one_has_biases(self.peft_config)
        super()._check_new_adapter_config(config)

    def disable_adapter_layers(self) -> None:
        """As PEFT's, without its warning of biases: their originals are back, too."""
        self._enable_adapter_layers(enabled=False)

    def _make_mover(self, model: nn.Module, adapter_name: str, config: SliceFineConfig) -> None:
        layers: dict[str, SliceLayer] = dict(_sliced_layers(model, adapter_name))
        if layers:
            progress = check_progress(config.progress, "adapter_config.json")
            mover = Mover(adapter_name, layers, config.move_settings(), progress=progress)
            if config.total_steps is not None:
                mover.begin_run(config.total_steps)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The fp32 master is the default; ``autocast_adapter_dtype=False`` asks for the layer's own precision."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for _, layer in () if autocast_adapter_dtype else _sliced_layers(self.model, adapter_name):
            layer.cast_active(adapter_name, layer.dense().dtype)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        facts = (peft_config.weights or {}).get(current_key, {})
        wrapped = isinstance(target, SliceFineLinear) and (
            parameter_name is None or getattr(target, "parameter_name", None) == parameter_name
        )
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        additive = _additive(peft_config, base, facts, current_key)
        if wrapped:
            layer: Any = target
            if additive != (layer.packed is not None):
                raise ConfigError(
                    f"{current_key}: adapter {adapter_name!r} has additive={additive}, and the adapters that the layer "
                    f"has already have additive={not additive}; one layer keeps its slices in one place."
                )
        else:
            layer = self._new_layer(target, adapter_name, current_key, parameter_name, additive)
        layer.update_layer(
            adapter_name,
            self._layer_schedule(peft_config, layer, current_key),
            current_key,
            peft_config.history,
            peft_config.init_weights,
            peft_config.inference_mode,
        )
        layout = (peft_config.layout or {}).get(current_key)
        if layout is not None:
            shapes = {kind: tuple(shape) for kind, shape in layout.items() if kind in KINDS}
            expect(layer, adapter_name, shapes, read_sample(facts, layer.shape, current_key))
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _new_layer(
        self, target: nn.Module, adapter_name: str, key: str, parameter_name: str | None, additive: bool
    ) -> SliceFineLinear:
        """The layer with room for slices; what cannot be trained, or is tied to something else, is refused."""
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        kind = kind_of(base, parameter_name)
        if kind is None:
            raise UnsupportedError(
                f"{key}: SliceFine trains the weights of {TRAINABLE} layers, not {type(base).__name__}. "
                f"Leave it out of target_{'modules' if parameter_name is None else 'parameters'}, or add it to "
                "exclude_modules."
            )
        weight = place_of(base) if kind.layout == "quantised" else getattr(base, kind.parameter)
        own = tensor_name(key, kind.parameter)
        names = {name.replace(".base_layer", "") for name in shared_names(self.model, weight)}
        tied = sorted(names - {own}) if len(names) > 1 else []
        if tied:
            raise ConfigError(
                f"{key}: its weight is tied to {tied[0]}, and a slice trained in place would change both. "
                "Exclude the layer, or untie the weights first."
            )
        if parameter_name is not None:
            return ParamWrapper(target, adapter_name, parameter_name)
        return SliceFineLinear(target, adapter_name, additive)

    def _layer_schedule(self, config: SliceFineConfig, layer: SliceFineLinear, key: str) -> Schedule:
        """The layer's schedule; a rank that is too large is an error when it was named for this very layer."""
        pattern = get_pattern_key(list(config.rank_pattern), key)  # the key itself when nothing matches
        rank = config.rank_pattern.get(pattern)
        schedule = config.schedule(rank)
        schedule = fitted(schedule, self._structure.get(key), key, layer.shape)
        found = layer.fitted(schedule, key).clamped(layer.shape)
        if found is not None:
            axis, size = found
            if rank is not None and pattern == key:
                raise ConfigError(
                    f"rank_pattern names {key} with rank {rank}, but its weight has {size} {axis}s only; "
                    f"choose at most {size // (layer.kind.unit if axis == 'column' else 1)}."
                )
            self._clamped[key] = size
        return schedule

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put the layer in place; its parameter was made on the right device, and its weight must stay untouched."""
        # an attention module's own projections lie in it
        while isinstance(parent, SliceFineLinear) and child_name != "base_layer":
            parent = parent.base_layer
        setattr(parent, child_name, new_module)
        if isinstance(new_module, SliceFineLinear):
            new_module.train(child.training)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's; quantised weights are checked before the first one changes, and what they lost is said."""
        layers = dict(_sliced_layers(self.model))
        check_frozen(layers.values(), "merge_and_unload" if merge else "unload")
        for layer in layers.values() if merge else ():
            layer.check_fold()
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        warn_about_lost({name: layer.lost for name, layer in layers.items() if layer.lost is not None})
        return model

    def __getattr__(self, name: str) -> Any:
        """Forward missing attributes to the wrapped model."""
        return super().__getattr__(name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise UnsupportedError(
                "SliceFine: one batch with several adapters (adapter_names=...) is not possible, since all adapters "
                "share the dense weight. Run one batch per adapter with set_adapter, which is cheap."
            )
        yield

    # -- several adapters -----------------------------------------------------------------------------------------

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter whose delta is the weighted sum of other adapters' deltas.

        Args:
            adapters: names of adapters with the same mode and ranks.
            weights: one factor each.
            adapter_name: name of the new adapter.
            combination_type: ``"linear"``; LoRA's factor-wise combinations have no meaning for slices.

        Raises:
            ConfigError: for unknown names, other lengths, a name in use, or adapters of different mode or rank.
        """
        if combination_type != "linear":
            raise UnsupportedError(
                f"combination_type={combination_type!r}: SliceFine adds slices, so 'linear' is the only combination."
            )
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or len(adapters) != len(weights) or not adapters:
            raise ConfigError(
                f"add_weighted_adapter: got {len(adapters)} adapters and {len(weights)} weights, unknown: {unknown}; "
                f"known adapters are {sorted(self.peft_config)}."
            )
        if adapter_name in self.peft_config:
            raise ConfigError(f"add_weighted_adapter: {adapter_name!r} exists already; choose another name.")
        configs: list[Any] = [self.peft_config[name] for name in adapters]
        schedules = [c.schedule() for c in configs]
        if len({(s.mode, s.row_rank, s.column_rank, s.mask_fraction) for s in schedules}) > 1:
            raise ConfigError("add_weighted_adapter: the adapters differ in mode or rank; combine equal ones.")
        refuse_biases({name: self.peft_config[name] for name in adapters})
        wrappers = self._modules_to_save_of(adapters)
        saved = sorted({name for c in configs for name in c.modules_to_save or ()})
        # the parts' layers were visited at different times, so the sum stands under no window
        no_window = {"window": None, "window_order": "top-down", "window_dwell": "uniform"}
        no_window |= {"reserve": None, "share": None}
        config = self.peft_config[adapter_name] = replace(
            configs[0],
            layout=None,
            weights=None,
            progress=None,
            target_modules=_all_targets(configs),
            modules_to_save=saved or None,
            **no_window,
        )
        for wrapper, source in wrappers:
            wrapper.update(adapter_name)  # type: ignore[no-untyped-call]
            wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[source].state_dict())
            wrapper.modules_to_save[adapter_name].requires_grad_(False)
        for _, layer in list(_sliced_layers(self.model)):
            parts = {name: w for name, w in zip(adapters, weights, strict=True) if name in layer.states}
            if parts:
                layer.combine(adapter_name, parts)
                layer.set_adapter(layer.active_adapters)
        self._make_mover(self.model, adapter_name, config)

    def _modules_to_save_of(self, adapters: list[str]) -> list[tuple[ModulesToSaveWrapper, str]]:
        """Each fully trained module of ``adapters`` with the one adapter that has it; two cannot be combined."""
        result = []
        for name, module in self.model.named_modules():
            if isinstance(module, TrainableTokensWrapper) and any(a in module._adapters for a in adapters):
                raise UnsupportedError(
                    f"add_weighted_adapter: {name} has trainable tokens, which cannot be combined with weights. "
                    "Train the adapters without trainable_token_indices, or merge them one after the other."
                )
            if not isinstance(module, ModulesToSaveWrapper):
                continue
            owners = [adapter for adapter in adapters if adapter in module.modules_to_save]
            if len(owners) > 1:
                raise ConfigError(  # PEFT's own words
                    "Cannot add weighted adapters if they target the same module with modules_to_save, but found 1 "
                    f"such instance(s). {name} belongs to {owners}."
                )
            result += [(module, owner) for owner in owners]
        return result

    # -- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """PEFT's selection, plus the tensors' shapes in the configuration, for loaders that compare shapes first."""
        layers = list(_sliced_layers(model, adapter_name))
        check_frozen([layer for _, layer in layers], f"save adapter {adapter_name!r}")
        if any(layer.states[adapter_name].layout for _, layer in layers):  # a file was announced and never came
            for _, layer in layers:
                layer.states[adapter_name].layout = {}
            state_dict = model.state_dict()
        result: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        result = {key: tensor for key, tensor in result.items() if f".{cls.prefix}{ORIGINALS}" not in key}
        config.layout, config.weights = {}, {}
        beside = {layer.packed is not None for _, layer in layers}
        config.additive = beside.pop() if len(beside) == 1 else None  # layer by layer: `weights`
        mover = next((layer.states[adapter_name].mover for _, layer in layers), None)
        config.progress = (None if mover is None else mover.sound_progress()) or None
        for path, layer in layers:
            tensors = file_tensors(layer, adapter_name)
            name = layer.states[adapter_name].layer_name
            path = path.removeprefix("base_model.model.")
            active = f"{path}.{cls.prefix}active"
            for key in [key for key in result if f".{active}" in f".{key}"]:
                gathered = result[key].shape == layer.room(adapter_name)  # at ZeRO's stage 3 nothing may be here
                # under FSDP2: gathered, like the finished slices
                result[key] = whole([result[key]])[0] if gathered else layer.values(adapter_name)
                if config.save_values == "base":
                    result[key] = result[key].to(layer.dense().dtype)
            config.layout[name] = {kind: list(tensor.shape) for kind, tensor in tensors.items()}
            if not layer.states[adapter_name].deferred:
                config.weights[name] = weight_facts(layer, adapter_name) | ({} if path == name else {"path": path})
        biases = bias_tensors(model, adapter_name, state_dict)
        slices = {key: tensor for key, tensor in result.items() if cls.prefix in key} | biases
        refuse_not_finite(slices, f"save adapter {adapter_name!r}")
        return result | biases

    @classmethod
    def _get_learnable_bias_state_dict(cls, *_: Any) -> dict[str, Tensor]:
        """None of PEFT's choice by name: `bias_tensors` has them, also while the adapter is not applied."""
        return {}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Insert the adapter's name and check that the file fits the model before anything is changed.

        Raises:
            AdapterFileError: if the file lacks a layer, has one too many, or has other shapes.
        """
        prefix = "base_model.model."
        renamed = dict(state_dict)
        apart = (".base_layer.", f".{cls.prefix}{ORIGINALS}.")
        unused = {key for key in state_dict if f".{cls.prefix}" in key and not any(part in key for part in apart)}
        for name, layer in _sliced_layers(model, adapter_name):
            own: dict[str, Tensor] = {}
            # where the file has it: another adapter's layers may lie between, there or here
            layer_name = layer.states[adapter_name].layer_name
            facts = (config.weights or {}).get(layer_name)
            path = name if facts is None else facts.get("path", layer_name)
            for kind in ("active", *KINDS, BESIDE):
                key, stored = f"{name}.{cls.prefix}{kind}", f"{path}.{cls.prefix}{kind}"
                for candidate in (stored, f"{prefix}{stored}", f"{key}.{adapter_name}"):
                    if candidate in state_dict:
                        own[kind] = state_dict[candidate]
                        renamed.pop(candidate, None)
                        renamed[f"{key}.{adapter_name}"] = own[kind]
                        unused.discard(candidate)
            _check_kind(layer, BESIDE in own, name)
            check_tensors(layer, adapter_name, own)
        if unused:
            raise AdapterFileError(
                f"the adapter file has slices for {sorted(unused)[0].partition('.' + cls.prefix)[0]} "
                f"({len(unused)} tensors in all), which this model does not train. It was made for another base model "
                "or other target_modules."
            )
        biases = biases_of(model, adapter_name)
        if biases is not None:
            keys = find_biases(biases, model, renamed)
            biases.load({name: renamed.pop(key) for name, key in keys.items()})
        # PEFT 0.21.2 does it with newer versions of transformers; else it would copy whole tensors into parts
        places = {key: parameter for key, parameter in model.named_parameters() if key in renamed}
        return renamed | {key: placed_like(renamed[key], parameter) for key, parameter in places.items()}


def _sliced_layers(model: nn.Module, adapter_name: str | None = None) -> Iterator[tuple[str, SliceFineLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, SliceFineLinear) and (adapter_name is None or adapter_name in module.states):
            yield name, module


def _additive(config: SliceFineConfig, base: nn.Module, facts: dict[str, Any], key: str) -> bool:
    """Whether slices lie beside a layer's weight: as in the file that the adapter comes from, or else as configured."""
    if not facts:
        return lies_beside(base, config.additive, key)
    found = bool(facts.get("additive", False))
    if not found and format_of(base) is not None:
        raise _values_do_not_fit(key)
    return found


def _copy_slices(model: nn.Module, source: str, target: str) -> None:
    """Make adapter ``target`` hold what ``source`` holds; both were made by one configuration."""
    for _, layer in _sliced_layers(model, target):
        active = layer.slicefine_active[source].detach().clone()
        load_tensors(layer, target, file_tensors(layer, source) | {"active": active})


def _check_kind(layer: SliceFineLinear, beside: bool, name: str) -> None:
    """Raise `AdapterFileError` unless a file's slices are of the kind that the layer's are: values or differences."""
    if layer.packed is not None and not beside:
        raise _values_do_not_fit(name)
    if layer.packed is None and beside:
        raise AdapterFileError(
            f"{name}: the file's slices are differences, and this layer's are values. Load the folder as a new adapter "
            "(PeftModel.from_pretrained), or make this one with additive=True."
        )


def _values_do_not_fit(name: str) -> AdapterFileError:
    return AdapterFileError(
        f"{name}: the adapter's slices hold values of a weight that was not quantised, and here they lie beside the "
        "weight, as differences. Load it onto the base without quantisation, or export it to LoRA (slicefine export), "
        "which fits both."
    )


def _all_targets(configs: list[SliceFineConfig]) -> set[str] | str:
    """Target modules that select every layer of several configurations."""
    targets: list[Any] = [c.target_modules for c in configs]
    if all(isinstance(target, set) for target in targets):
        return set().union(*targets)
    if not all(isinstance(target, str) for target in targets):
        raise ConfigError("add_weighted_adapter: some adapters name their target_modules in a list, others in a str.")
    distinct: list[str] = list(dict.fromkeys(targets))
    return distinct[0] if len(distinct) == 1 else "|".join(f"({target})" for target in distinct)


def _remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of every layer, and the wrapper away where it was the only one."""
    for name, layer in reversed(list(_sliced_layers(model))):  # what lies inside comes out first
        if adapter_name in layer.states:
            layer.delete_slice(adapter_name)
        if not layer.states:
            set_module(model, name, layer.unwrapped())
