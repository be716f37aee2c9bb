"""PEFT's tests on encoder-decoder models."""

from .adapt import adapt, with_moves
from .cases import tables
from .released import load

with_moves(load("testing_common"))
_released = with_moves(load("test_encoder_decoder_models"))

TestEncoderDecoder = adapt(_released.TestEncoderDecoderModels, tables("SEQ_2_SEQ_LM", ("t5", "bart")))
