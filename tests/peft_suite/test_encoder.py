"""PEFT's tests on feature extraction and on sequence classification."""

from .adapt import adapt, with_moves
from .cases import tables
from .released import load

with_moves(load("testing_common"))
_features = with_moves(load("test_feature_extraction_models"))
_classes = with_moves(load("test_seq_classifier"))

# not the pooler: PEFT's tests take the loss from the last hidden state, which it does not see
_LAYERS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
TestFeatureExtraction = adapt(
    _features.TestPeftFeatureExtractionModel, tables("FEATURE_EXTRACTION", ("bert", "roberta"), _LAYERS)
)
TestSequenceClassification = adapt(
    _classes.TestSequenceClassificationModels,
    tables("SEQ_CLS", ("bert-classifier", "roberta-classifier", "llama-classifier")),
)
