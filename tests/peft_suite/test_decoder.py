"""PEFT's tests on causal language models."""

from .adapt import adapt, with_moves
from .cases import tables
from .released import load

with_moves(load("testing_common"))
_released = with_moves(load("test_decoder_models"))

TestDecoder = adapt(_released.TestDecoderModels, tables("CAUSAL_LM", ("gpt2", "llama", "opt")))
