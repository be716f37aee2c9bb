"""PEFT's tests on feature extraction and on sequence classification."""

from .adapt import adapt, with_moves
from .cases import tables
from .released import load

with_moves(load("testing_common"))
_features = with_moves(load("test_feature_extraction_models"))
_classes = with_moves(load("test_seq_classifier"))

TestFeatureExtraction = adapt(
    _features.TestPeftFeatureExtractionModel, tables("FEATURE_EXTRACTION", ("bert", "roberta"))
)
TestSequenceClassification = adapt(
    _classes.TestSequenceClassificationModels,
    tables("SEQ_CLS", ("bert-classifier", "roberta-classifier", "llama-classifier")),
)
