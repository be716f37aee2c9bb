"""Reasoning: instructions taken apart, answers graded, choices scored, texts generated, the harness."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from cli_helpers import SHARED, recipe, save_bert, save_llama, save_tokenizer, write_rows
from slicefine.cli.main import main
from slicefine.errors import ConfigError, DataError
from slicefine.tasks import Columns, DataSettings, ModelSettings, TaskSettings, get_task, reasoning
from slicefine.tasks.answers import answer_names, extract_letter, extract_number, grade, parse_question
from slicefine.tasks.causal_lm import IGNORED
from slicefine.tasks.generation import choice_likelihoods, generate_answers, likelihood_choice
from slicefine.tasks.reasoning import CANDIDATE, TEMPLATE, evaluate_reasoning
from slicefine.training.language import answer_questions, evaluate_harness, harness_model
from slicefine.training.run import train
from slicefine.training.trained import load_trained

pytestmark = pytest.mark.filterwarnings(  # PEFT asks for it
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
REASONING = SHARED / "data" / "reasoning"
STORIES = SHARED / "models" / "stories260k"
real_rows = pytest.mark.skipif(not REASONING.is_dir(), reason="the real reasoning files are not beside the repository")
real_model = pytest.mark.skipif(not STORIES.is_dir(), reason="the real language model is not beside the repository")
COMMONSENSE = ["arc-easy", "arc-challenge", "openbookqa", "boolq", "piqa", "siqa", "winogrande"]
BEGINNINGS = ["Once upon a time there was a little", "Lily", "The dog ran to the", "One day, Tom and his mom went to"]


def rows_of(name: str, split: str = "test") -> list[dict[str, Any]]:
    with gzip.open(REASONING / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def ask(question: str, *choices: str, answer: int = 0) -> dict[str, str]:
    names = [f"answer{i + 1}" for i in range(len(choices))]
    listed = " ".join(f"Answer{i + 1}: {choice}" for i, choice in enumerate(choices))
    head = f"Please choose the correct answer to the question: {question}\n\n{listed}\n\n"
    right = names[answer]
    return {
        "instruction": f"{head}Answer format: {'/'.join(names)}",
        "output": f"the correct answer is {right}",
        "answer": right,
    }


# -- questions ----------------------------------------------------------------------------------------------------


@real_rows
@pytest.mark.parametrize("name", COMMONSENSE)
def test_every_real_instruction_is_taken_apart(name: str):
    for row in rows_of(name):
        question = parse_question(row["instruction"])
        assert row["answer"] in question.names
        assert question.text
        assert all(question.choices)
        marks = [] if name == "boolq" else [f"{n.capitalize()}: {c}" for n, c in zip(*_parts(question), strict=True)]
        rebuilt = [question.text, *marks, f"Answer format: {'/'.join(question.names)}"]
        assert row["instruction"].split(": ", 1)[1].split() == " ".join(rebuilt).split()  # nothing lost, nothing moved


def _parts(question: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return question.names, question.choices


def test_a_question_is_told_from_its_choices():
    question = parse_question(ask("what is red?", "the sun at: dusk", "grass")["instruction"])
    assert (question.text, question.choices) == ("what is red?", ("the sun at: dusk", "grass"))
    assert answer_names("... Answer format: true/false") == ("true", "false")


def test_instructions_without_format_or_choice_are_refused():
    with pytest.raises(DataError, match=r"instruction 'What is it\?' does not end with its answer format"):
        parse_question("What is it?")
    with pytest.raises(DataError, match=r"names answer2, but has no 'Answer2:'"):
        parse_question("What? Answer1: this Answer format: answer1/answer2")


# -- answers ------------------------------------------------------------------------------------------------------


@real_rows
@pytest.mark.parametrize("name", COMMONSENSE)
def test_references_of_commonsense_tasks_are_right_and_others_wrong(name: str):
    for row in rows_of(name):
        assert grade("commonsense", row["output"], row["answer"]) == (True, True)
        other = next(n for n in parse_question(row["instruction"]).names if n != row["answer"])
        assert grade("commonsense", f"it is {other}, or {row['answer']}", row["answer"]) == (False, True)


@real_rows
@pytest.mark.parametrize("name", ["multiarith", "addsub", "singleeq", "svamp"])
def test_the_last_number_is_the_stated_answer(name: str):
    stated = 0
    for row in rows_of(name):
        said = re.search(r"The answer is \$?(-?[\d,]*\.?\d+)\.?$", row["output"])
        if said:
            stated += 1
            assert extract_number(row["output"]) == float(said[1].replace(",", ""))
        assert grade("number", f"so it is {row['answer']}.", row["answer"]) == (True, True)
    assert stated > 300


@real_rows
def test_worked_solutions_of_gsm8k_give_their_answers():
    for row in rows_of("gsm8k", "test_original"):
        assert grade("number", row["answer"], row["answer"].split("#### ")[1]) == (True, True)


@real_rows
def test_stated_letters_are_read_and_capitals_of_words_are_not():
    found = [
        (extract_letter(row["output"]), re.search(r"\(([A-E])\)\.?\s*$", row["output"])) for row in rows_of("aqua")
    ]
    assert sum(said is not None for _, said in found) == 252
    assert all(letter == said[1] for letter, said in found if said)
    assert {row["answer"] for name in ("aqua", "mathqa") for row in rows_of(name)} == set("ABCDE")


@pytest.mark.parametrize(
    ("kind", "text", "reference", "expected"),
    [
        ("commonsense", "", "answer1", (False, False)),
        ("commonsense", "answer5", "answer2", (False, True)),  # a choice that the question does not have
        ("commonsense", "answer2", "true", (False, False)),
        ("commonsense", "false is not true", "true", (False, True)),
        ("number", "no idea", "3", (False, False)),
        ("number", "it is -1,234.5", "-1234.5", (True, True)),
        ("number", "0.3334", "0.3333", (True, True)),
        ("number", "0.335", "0.3333", (False, True)),
        ("number", "12 apples", "1,2", (True, True)),
        ("letter", "The answer is (B). The answer is D", "D", (True, True)),
        ("letter", "none", "A", (False, False)),
    ],
)
def test_answers_are_graded(kind: str, text: str, reference: str, expected: tuple[bool, bool]):
    assert grade(kind, text, reference) == expected


def test_references_of_another_kind_are_refused():
    with pytest.raises(DataError, match=r"answer '12' is no name of a choice; expected true, false, or solution"):
        grade("commonsense", "", "12")
    with pytest.raises(DataError, match=r"answer 'A' is no number; for letters use kind letter"):
        grade("number", "", "A")
    with pytest.raises(DataError, match=r"answer '12' is no letter from A to E; for numbers use kind number"):
        grade("letter", "", "12")
    with pytest.raises(ConfigError, match=r"kind='essay' is unknown; expected one of commonsense, number, letter"):
        grade("essay", "", "12")


# -- multiple choice ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"))


MIXED = [
    ask("the film was", "good", "very very bad", answer=1),
    ask("one plus two is", "three", "two", "one", "nice", answer=0),
    ask("the", "film", "weak film", "fine", answer=2),
]


def choosing(model: str) -> Any:
    columns = Columns(prompt="instruction", label="answer")
    return get_task(TaskSettings("multiple-choice"), ModelSettings(model), DataSettings(columns=columns))


def test_padding_of_choices_changes_neither_loss_nor_gradient(bert: str):
    task, splits = choosing(bert), {"train": Dataset.from_list(MIXED)}
    task.read(splits)
    loaded = task.load()
    prepared = task.prepare(splits, loaded)
    model, rows = loaded.model, [prepared.splits["train"][i] for i in range(3)]
    batch = prepared.collator(rows)
    assert batch["input_ids"].shape[:2] == (3, 4)
    output = model(**batch)
    output.loss.backward()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = []
    for row in MIXED:  # each pair on its own, scored by the encoder and the head, without any padding
        question, right = parse_question(row["instruction"]), int(row["answer"][-1]) - 1
        pairs = [loaded.processor(question.text, choice, return_tensors="pt") for choice in question.choices]
        scores = torch.cat([model.classifier(model.bert(**pair).pooler_output)[0] for pair in pairs])
        losses.append(-torch.log_softmax(scores, 0)[right])
        index = len(losses) - 1
        torch.testing.assert_close(output.logits[index, : len(scores)], scores)
        assert bool((output.logits[index, len(scores) :] < -1e30).all())
    torch.stack(losses).mean().backward()
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())
    assert loaded.new_modules == ["classifier"]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, msg=name)


def test_predictions_of_batches_with_fewer_choices_stand_above_what_fills_them_up(bert: str):
    task, splits = choosing(bert), {"train": Dataset.from_list(MIXED)}
    prepared = task.prepare(splits, task.load())
    logits = torch.tensor([[-700.0, -800.0, torch.finfo(torch.float32).min]])
    found = prepared.preprocess_logits(logits, torch.tensor([0]))
    filled = np.concatenate([found.numpy(), np.full((1, 2), -100.0)], axis=1)
    assert task.compute(filled, np.array([0])) == {"accuracy": 1.0}


def test_rows_that_are_no_questions_are_named(bert: str):
    task, good = choosing(bert), ask("the", "film", "one")
    with pytest.raises(
        DataError, match=r"train set, row 1: answer 'answer3' in column 'answer' is none of answer1, an"
    ):
        task.read({"train": Dataset.from_list([good, {**good, "answer": "answer3"}])})
    with pytest.raises(
        DataError, match=r"train set, row 0: instruction 'why\?' does not end .* set data.columns.prompt"
    ):
        task.read({"train": Dataset.from_list([{**good, "instruction": "why?"}])})
    with pytest.raises(
        DataError, match=r"column 'prompt' \(data.columns.prompt\), .* missing; the columns are instruc"
    ):
        get_task(TaskSettings("multiple-choice"), ModelSettings(bert), DataSettings()).read(
            {"train": Dataset.from_list([good])}
        )


def test_choosing_is_learnt_and_read_back(bert: str, tmp_path: Path):
    """The right choice is the good word."""
    pairs = [("good", "bad"), ("fine", "poor"), ("great", "awful"), ("nice", "weak")]
    rows = [
        ask("the film was", *([a, b, "the"][: 2 + i % 2] if i % 4 < 2 else [b, a]), answer=int(i % 4 > 1))
        for i in range(64)
        for a, b in [pairs[i // 4 % 4]]
    ]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    write_rows(tmp_path / "data" / "validation.jsonl", rows[:16])
    settings = recipe(bert, str(tmp_path / "data"), tmp_path / "run", task__name="multiple-choice")
    settings.data.columns = Columns(prompt="instruction", label="answer")
    settings.training.learning_rate, settings.training.epochs = 2e-2, 6
    report = train(settings)
    assert report["after"]["validation"]["accuracy"] > 0.9
    assert report["reload_identical"] is True
    again = load_trained(tmp_path / "run" / "adapter")
    splits = {"validation": Dataset.from_list(rows[:16])}
    again.task.read(splits)
    prepared = again.task.prepare(splits, again.loaded)
    batch = prepared.collator([prepared.splits["validation"][i] for i in range(16)])
    with torch.no_grad():
        right = again.model(**batch).logits.argmax(-1) == batch["labels"]
    assert float(right.float().mean()) == pytest.approx(report["after"]["validation"]["accuracy"])


# -- generation and likelihood ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories() -> tuple[Any, Any]:
    if not STORIES.is_dir():
        pytest.skip("the real language model is not beside the repository")
    return AutoModelForCausalLM.from_pretrained(STORIES).eval(), AutoTokenizer.from_pretrained(STORIES)


@pytest.fixture(scope="module")
def absolute(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A random model with learnt positions, which wrong positions under padding would show in."""
    folder = tmp_path_factory.mktemp("gpt2")
    save_tokenizer(folder, pair=False)
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=22, n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5, eos_token_id=4,
        bos_token_id=4, resid_pdrop=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel(config), AutoTokenizer.from_pretrained(folder)


def slow_likelihood(model: Any, tokenizer: Any, prompt: str, choice: str) -> tuple[float, int]:
    """Token by token, one sequence at a time, in double precision."""
    seen = list(tokenizer(prompt)["input_ids"])
    answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
    total = 0.0
    for token in answer:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([seen])).logits[0, -1].double()
        total += float(scores[token]) - float(torch.logsumexp(scores, 0))
        seen.append(token)
    return total, len(answer)


CHOICES = [
    ["girl", "made of the old stone", "x"],
    ["and Tom"],
    ["park", "was"],
    ["the park", "a big dog", "zoo", "eat"],
]


def test_likelihoods_are_those_of_single_sequences(stories: tuple[Any, Any]):
    found = choice_likelihoods(*stories, BEGINNINGS, CHOICES, batch_size=3)
    for prompt, choices, row in zip(BEGINNINGS, CHOICES, found, strict=True):
        for choice, one in zip(choices, row, strict=True):
            total, tokens = slow_likelihood(*stories, prompt, choice)
            assert one.total == pytest.approx(total, abs=1e-4)
            assert (one.tokens, one.size) == (tokens, len(choice.encode()))
    assert likelihood_choice(*stories, BEGINNINGS, CHOICES)[:3] == [0, 0, 0]


def test_likelihoods_know_learnt_positions(absolute: tuple[Any, Any]):
    model, tokenizer = absolute
    model.train()  # dropout must not be on
    prompts, choices = ["the film was", "one"], [["good", "very very bad"], ["plus two is three", "film"]]
    found = choice_likelihoods(model, tokenizer, prompts, choices, batch_size=4)
    assert model.training
    model.eval()
    for prompt, listed, row in zip(prompts, choices, found, strict=True):
        for choice, one in zip(listed, row, strict=True):
            assert one.total == pytest.approx(slow_likelihood(model, tokenizer, prompt, choice)[0], abs=1e-4)


def test_norms_divide_by_tokens_and_bytes(stories: tuple[Any, Any]):
    prompt, choices = "Once upon a time there was a little", ["girl", "girl named Lily. She loved to play"]
    one, two = choice_likelihoods(*stories, [prompt], [choices])[0]
    assert one.score("sum") == one.total
    assert two.score("token") == two.total / two.tokens
    assert two.score("byte") == two.total / 34
    picked = {norm: likelihood_choice(*stories, [prompt], [choices], norm=norm)[0] for norm in ("sum", "token", "byte")}
    assert picked == {"sum": 0, "token": int(two.score("token") > one.score("token")), "byte": 1}


def test_texts_are_those_of_single_prompts_without_padding(stories: tuple[Any, Any]):
    model, tokenizer = stories
    side = tokenizer.padding_side
    model.train()
    found = generate_answers(model, tokenizer, BEGINNINGS, max_new_tokens=10, batch_size=3)
    assert model.training
    model.eval()
    assert tokenizer.padding_side == side
    for prompt, text in zip(BEGINNINGS, found, strict=True):
        seen = list(tokenizer(prompt)["input_ids"])
        start = len(seen)
        for _ in range(10):  # greedy by hand
            with torch.no_grad():
                seen.append(int(model(input_ids=torch.tensor([seen])).logits[0, -1].argmax()))
        assert text == tokenizer.decode(seen[start:], skip_special_tokens=True)
    assert generate_answers(model, tokenizer, BEGINNINGS, max_new_tokens=10, batch_size=1) == found


def test_padded_prompts_keep_their_learnt_positions(absolute: tuple[Any, Any]):
    prompts = ["the film was very good", "one", "two plus"]
    together = generate_answers(*absolute, prompts, max_new_tokens=6, batch_size=3)
    assert together == generate_answers(*absolute, prompts, max_new_tokens=6, batch_size=1)
    assert len(set(together)) == 3


def test_long_prompts_lose_their_beginning_with_a_warning(absolute: tuple[Any, Any]):
    model, tokenizer = absolute
    words = ("one two three plus is the film was " * 5).split()
    with pytest.warns(UserWarning, match=r"1 of 2 prompts are longer than the 28 tokens that the model has room for"):
        found = generate_answers(model, tokenizer, [" ".join(words), "one"], max_new_tokens=4)
    assert found[0] == generate_answers(model, tokenizer, [" ".join(words[-28:])], max_new_tokens=4)[0]
    with pytest.warns(UserWarning, match=r"1 of 2 prompts are longer than the 32 tokens .* beginnings were cut"):
        long = choice_likelihoods(model, tokenizer, [" ".join(words), "one"], [["good film"], ["bad"]])
    short = choice_likelihoods(model, tokenizer, [" ".join(words[-30:])], [["good film"]])
    assert long[0][0].total == pytest.approx(short[0][0].total, abs=1e-5)


def test_prompts_and_choices_that_do_not_fit_are_refused(absolute: tuple[Any, Any]):
    with pytest.raises(DataError, match=r"2 prompts came with 1 lists of choices; expected one list per prompt"):
        likelihood_choice(*absolute, ["one", "two"], [["three"]])
    with pytest.raises(DataError, match=r"prompt 0 has no choices; give at least one"):
        likelihood_choice(*absolute, ["one"], [[]])
    with pytest.raises(DataError, match=r"prompt 0: '' has no tokens; both need some text"):
        likelihood_choice(*absolute, ["one"], [["two", ""]])
    with pytest.raises(DataError, match=r"a choice of 40 tokens leaves no prompt in the 32 tokens of the model"):
        likelihood_choice(*absolute, ["one"], [["two " * 40]])
    with pytest.raises(ConfigError, match=r"norm='letter' is unknown; expected one of sum, token, byte"):
        likelihood_choice(*absolute, ["one"], [["two"]], norm="letter")
    with pytest.raises(ConfigError, match=r"max_new_tokens=32 leaves no prompt in the 32 tokens of the model"):
        generate_answers(*absolute, ["one"], max_new_tokens=32)
    with pytest.raises(ConfigError, match=r"batch_size=0 must be at least 1"):
        generate_answers(*absolute, ["one"], batch_size=0, max_new_tokens=2)


# -- the reasoning task -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


def reasoner(model: str, **task: Any) -> Any:
    data = DataSettings(columns=Columns(prompt="instruction", answer="output"))
    return get_task(TaskSettings("reasoning", **task), ModelSettings(model), data)


@pytest.mark.parametrize("prompt_loss", [False, True])
def test_prompts_get_the_template_and_answers_the_loss(llama: str, prompt_loss: bool):
    task = reasoner(llama, prompt_loss=prompt_loss)
    splits = {"train": Dataset.from_list([{"instruction": "one plus two", "output": "is three"}])}
    task.read(splits)
    loaded = task.load()
    row = task.prepare(splits, loaded).splits["train"][0]
    before = loaded.processor(TEMPLATE.format(instruction="one plus two"))["input_ids"]
    answer = loaded.processor.convert_tokens_to_ids(["is", "three", "</s>"])
    assert row["input_ids"] == before + answer
    assert row["labels"] == (before if prompt_loss else [IGNORED] * len(before)) + answer
    assert list(task.metrics) == ["perplexity", "token_loss", "token_accuracy"]


def test_reasoning_without_a_column_of_answers_is_refused(llama: str):
    with pytest.raises(
        ConfigError, match=r"task.name=reasoning needs the column of answers in words; set data.columns.an"
    ):
        get_task(TaskSettings("reasoning"), ModelSettings(llama), DataSettings())


@real_rows
def test_accuracy_by_likelihood_is_that_of_single_answers(stories: tuple[Any, Any]):
    model, tokenizer = stories
    rows = sorted(rows_of("openbookqa"), key=lambda row: len(row["instruction"]))[:2]
    rows += [row for row in rows_of("siqa") if len(row["instruction"]) < 220][:1]  # three choices
    right = 0
    for row in rows:
        names = re.findall(r"answer\d", row["instruction"].rpartition("Answer format: ")[2])
        prompt = TEMPLATE.format(instruction=row["instruction"])
        scores = [slow_likelihood(model, tokenizer, prompt, CANDIDATE.format(name))[0] for name in names]
        right += names[scores.index(max(scores))] == row["answer"]
    found = evaluate_reasoning(model, tokenizer, rows, "commonsense", by="likelihood", batch_size=5)
    assert found == {"accuracy": right / 3, "answered": 1.0, "rows": 3.0}


@real_rows
@pytest.mark.parametrize(
    ("name", "kind", "most"), [("openbookqa", "commonsense", 32), ("gsm8k", "number", 256), ("aqua", "letter", 256)]
)
def test_accuracy_by_generation_grades_what_is_written(
    name: str, kind: str, most: int, monkeypatch: pytest.MonkeyPatch
):
    rows = rows_of(name)[:40]
    seen: dict[str, Any] = {}

    def write(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> list[str]:
        seen.update(prompts=prompts, **options)
        texts = [f"so it is {row['answer']}" for row in rows]
        return [*texts[:20], *["I do not know"] * 10, *texts[30:39], "42 and a half of B or answer9"]

    monkeypatch.setattr(reasoning, "generate_answers", write)
    found = evaluate_reasoning(None, None, rows, kind)
    last = grade(kind, "42 and a half of B or answer9", rows[39]["answer"])
    assert found == {"accuracy": (29 + last[0]) / 40, "answered": (29 + last[1]) / 40, "rows": 40.0}
    assert seen["prompts"][3] == TEMPLATE.replace("{instruction}", rows[3]["instruction"])
    assert seen["max_new_tokens"] == most


@real_rows
def test_a_real_model_writes_and_is_graded(stories: tuple[Any, Any]):
    rows = sorted(rows_of("boolq"), key=lambda row: len(row["instruction"]))[:4]
    found = evaluate_reasoning(*stories, rows, "commonsense", max_new_tokens=8)
    assert found["rows"] == 4
    assert 0 <= found["accuracy"] <= found["answered"] <= 1


@real_model
def test_a_run_ends_with_questions_and_eval_asks_them_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [ask("the", "film", "one") for _ in range(12)]
    for name, part in (("train", rows), ("sums", [{**row, "answer": "3"} for row in rows])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    tests = {"words": str(tmp_path / "train.jsonl"), "sums": str(tmp_path / "sums.jsonl")}
    settings = recipe(str(STORIES), str(tmp_path / "train.jsonl"), tmp_path / "run")
    settings.data.columns = Columns(prompt="instruction", answer="output")
    settings.task = TaskSettings("reasoning", max_length=512, tests=tests, tests_limit=4)
    settings.training.max_steps, settings.slice.moves, settings.verify = 1, 0, False
    after = train(settings)["after"]["test"]
    assert set(after) == {"words", "sums", "accuracy"}
    assert after["accuracy"] == pytest.approx((after["words"] + after["sums"]) / 2)
    adapter = str(tmp_path / "run" / "adapter")
    found = answer_questions(adapter, tests, limit=4)
    assert found == after
    output = tmp_path / "answers.json"
    assert main(["eval", "--adapter", adapter, "--questions", json.dumps(tests), "--output", str(output)]) == 0
    assert set(json.loads(output.read_text())["metrics"]) == {"words", "sums", "accuracy"}
    assert "in words" in capsys.readouterr().out


def test_evaluations_that_cannot_be_are_refused():
    rows = [ask("the", "film", "one")]
    with pytest.raises(ConfigError, match=r"by='luck' is unknown; expected generation or likelihood"):
        evaluate_reasoning(None, None, rows, "commonsense", by="luck")
    with pytest.raises(ConfigError, match=r"by='likelihood' compares given answers, and kind='number' has none"):
        evaluate_reasoning(None, None, rows, "number", by="likelihood")
    with pytest.raises(DataError, match=r"there are no rows to evaluate"):
        evaluate_reasoning(None, None, [], "number")
    with pytest.raises(DataError, match=r"row 0: answer 'answer1' is no number"):
        evaluate_reasoning(None, None, rows, "number")
    with pytest.raises(
        DataError, match=r"row 0: template='\{question\}' does not fit \(KeyError: 'question'\); the col"
    ):
        evaluate_reasoning(None, None, rows, "commonsense", template="{question}")
    with pytest.raises(
        DataError, match=r"row 0: column 'label' is missing; the columns are instruction, output, answer"
    ):
        evaluate_reasoning(None, None, rows, "commonsense", reference="label")


# -- the harness --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_a_missing_harness_names_the_extra():
    with pytest.raises(ConfigError, match=r'cannot be imported \(No module .*run: pip install "slicefine\[harness\]"'):
        harness_model(None, None)


def harness_task() -> Any:
    task = pytest.importorskip("lm_eval.api.task", reason="the extra harness is not installed")
    rows = [
        {"prompt": prompt, "choices": choices, "right": i % len(choices)}
        for i, (prompt, choices) in enumerate(zip(BEGINNINGS, CHOICES, strict=True))
        if len(choices) > 1
    ]
    return task.ConfigurableTask(
        config={
            "task": "stories",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{right}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    )


@real_model
@pytest.mark.filterwarnings("default")  # the harness's own
def test_the_harness_evaluates_an_adapter(tmp_path: Path):
    task = harness_task()
    rows = [
        {"instruction": "Lily saw", "output": "a big dog"},
        {"instruction": "Tom went", "output": "to the park"},
    ] * 8
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    settings = recipe(str(STORIES), str(tmp_path / "data"), tmp_path / "run", task__name="reasoning")
    settings.data.columns, settings.data.validation_fraction = Columns(prompt="instruction", answer="output"), 0.0
    settings.training.epochs, settings.training.learning_rate = 4, 1e-2
    train(settings)
    adapter = str(tmp_path / "run" / "adapter")
    found = evaluate_harness(adapter, [task], bootstrap_iters=0)
    trained = load_trained(Path(adapter))
    ours = [
        likelihood_choice(trained.model, trained.loaded.processor, [prompt], [choices])[0] == i % len(choices)
        for i, (prompt, choices) in enumerate(zip(BEGINNINGS, CHOICES, strict=True))
        if len(choices) > 1
    ]
    assert found["stories"]["acc,none"] == pytest.approx(sum(ours) / len(ours))


@real_model
@pytest.mark.filterwarnings("default")
def test_the_harness_finds_the_same_likelihoods(stories: tuple[Any, Any]):
    task = harness_task()
    import lm_eval

    result = lm_eval.simple_evaluate(harness_model(*stories), tasks=[task], bootstrap_iters=0)
    listed = [(p, c) for p, c in zip(BEGINNINGS, CHOICES, strict=True) if len(c) > 1]
    ours = choice_likelihoods(*stories, [p for p, _ in listed], [c for _, c in listed])
    for sample, row in zip(result["samples"]["stories"], ours, strict=True):
        theirs = [float(answer[0][0]) for answer in sample["resps"]]
        assert theirs == pytest.approx([one.total for one in row], abs=1e-3)
        assert math.isfinite(sum(theirs))


@pytest.mark.filterwarnings("default")
def test_the_harness_refuses_what_is_no_language_model(bert: str, tmp_path: Path):
    pytest.importorskip("lm_eval", reason="the extra harness is not installed")
    write_rows(tmp_path / "data" / "train.jsonl", [ask("the film was", "good", "bad", answer=i % 2) for i in range(16)])
    settings = recipe(bert, str(tmp_path / "data"), tmp_path / "run", task__name="multiple-choice")
    settings.data.columns, settings.data.validation_fraction = Columns(prompt="instruction", label="answer"), 0.0
    settings.training.epochs = 1
    train(settings)
    with pytest.raises(ConfigError, match=r"trained for multiple-choice; the harness evaluates language models"):
        evaluate_harness(str(tmp_path / "run" / "adapter"), ["arc_easy"])
