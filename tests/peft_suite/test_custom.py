"""PEFT's tests on its custom models: linear layers, transformers' Conv1D, several and active adapters."""

from .adapt import adapt, with_moves
from .cases import tables
from .released import load

with_moves(load("testing_common"))
_released = with_moves(load("test_custom_models"))
_TABLES = tables()

TestCustomModel = adapt(
    _released.TestPeftCustomModel,
    _TABLES,
    lora_named=(
        "test_delete_adapter_multiple_adapters_with_modules_to_save",
        "test_delete_adapter_with_multiple_adapters_works",
        "test_existing_model_card",
        "test_ignore_mismatched_sizes_with_scalar_modules_to_save",
        "test_load_does_not_overwrite_similarly_named_sibling",
        "test_multiple_active_adapters_with_different_trainable_token_indices_works",
        "test_multiple_active_adapters_with_same_trainable_token_indices_raises",
        "test_multiple_adapters_mixed_modules_to_save_merging_adapters",
        "test_multiple_adapters_same_modules_to_save_merging_adapters_raises",
        "test_non_existing_model_card",
        "test_save_embedding_layers_excludes_similarly_named_sibling",
        "test_set_adapter_non_overlapping_trainable_token_indices",
        "test_weight_bias_attributes",
    ),
)
TestMultipleActiveAdapters = adapt(_released.TestMultipleActiveAdapters, _TABLES)
TestRequiresGrad = adapt(
    _released.TestRequiresGrad,
    _TABLES,
    lora_named=("test_loading_model_with_trainble_tokens_requires_grad_set_correctly",),
)
TestMixedAdapterBatches = adapt(_released.TestMixedAdapterBatches, _TABLES)
TestDefaultTargetModules = adapt(_released.TestDefaultTargetModules, _TABLES)
TestFsdpStateDict = adapt(_released.TestPeftFsdpStateDict, _TABLES)
