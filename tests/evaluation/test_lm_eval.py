"""The plug-in for lm-evaluation-harness, offline: a local task, local models."""

import json
import pickle
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from d2f_runtime.evaluation.__main__ import completed
from d2f_stream.core.errors import InvalidParams
from lab.embedded_model.evaluate import held_out

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'd2f-stream[eval]'")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from d2f_runtime.evaluation.lm_eval import ChatPrompt, D2FStreamLM

NUM_PROBLEMS = 6

TASK = """
task: word_problems
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
output_type: generate_until
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{result}}}}"
generation_kwargs:
  until: ["Question:", "</s>"]
  max_gen_toks: 160
  do_sample: false
filter_list:
  - name: last
    filter:
      - {{function: regex, regex_pattern: "The answer is ([0-9]+)", group_select: -1}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""

Make = Callable[..., D2FStreamLM]


@pytest.fixture
def task(tmp_path: Path) -> TaskManager:
    data = tmp_path / "problems.jsonl"
    problems = [{"question": p.question, "result": str(p.result)} for p in held_out(NUM_PROBLEMS)]
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    text = TASK.format(data=data, cache=tmp_path / "cache")
    (tmp_path / "word_problems.yaml").write_text(text)
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make models that are closed again; by default one that says a fixed sentence."""
    made: list[D2FStreamLM] = []
    folder = tmp_path / "scripted"
    folder.mkdir()
    script = {"answers": "One two. END three.", "tokens_per_step": 4}
    (folder / "script.json").write_text(json.dumps(script))

    def make(model: str | None = str(folder), **arguments: Any) -> D2FStreamLM:
        made.append(D2FStreamLM(model, **arguments))
        return made[-1]

    yield make
    for model in made:
        model.close()


def request(prompt: str = "Say it.", **settings: Any) -> Instance:
    return Instance("generate_until", {}, (prompt, settings), 0, ("task", 7, 1))


def evaluate(model: D2FStreamLM, manager: TaskManager, **arguments: Any) -> dict[str, Any]:
    results = simple_evaluate(
        model, tasks=["word_problems"], task_manager=manager, bootstrap_iters=0, **arguments
    )
    assert results is not None
    return dict(results)


def test_embedded_model_solves_a_local_task(make: Make, task: TaskManager, tmp_path: Path) -> None:
    record = tmp_path / "records" / "samples.jsonl"
    model = make(None, batch_size=4, samples=record)
    results = evaluate(model, task)
    assert results["results"]["word_problems"]["exact_match,last"] == 1.0
    entries = [json.loads(line) for line in record.read_text().splitlines()]
    assert sorted(entry["doc_id"] for entry in entries) == list(range(NUM_PROBLEMS))
    for entry in entries:
        assert entry["reason"] == "eos"
        assert 0 < entry["first_block_ms"] <= entry["latency_ms"]
        assert entry["useful_tokens"] == entry["total_tokens"] > entry["steps"] > 0
        assert entry["tokens_per_step"] == pytest.approx(
            entry["useful_tokens"] / entry["steps"], 1e-3
        )
    told = results["config"]["d2f_stream"]
    assert told["num_samples"] == NUM_PROBLEMS
    assert told["useful_tokens"] == sum(entry["useful_tokens"] for entry in entries)


def test_answers_do_not_depend_on_the_batch(make: Make, task: TaskManager) -> None:
    alone, together = (
        evaluate(make(None, batch_size=size, max_active_blocks=4), task) for size in (1, 6)
    )
    texts = [
        {sample["doc_id"]: sample["resps"] for sample in found["samples"]["word_problems"]}
        for found in (alone, together)
    ]
    assert texts[0] == texts[1]


def test_few_shot_examples_become_turns_of_a_chat(
    make: Make, task: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, histories = make(None, batch_size=4), []
    render = model.apply_chat_template

    def note(history: list[dict[str, str]], **options: Any) -> str:
        histories.append([message["role"] for message in history])
        return render(history, **options)

    monkeypatch.setattr(model, "apply_chat_template", note)
    settings = {"apply_chat_template": True, "fewshot_as_multiturn": True, "num_fewshot": 2}
    results = evaluate(model, task, **settings)
    assert histories[0] == ["user", "assistant", "user", "assistant", "user"]
    # The model's template takes the last message only, so it is as good as without examples.
    assert results["results"]["word_problems"]["exact_match,last"] == 1.0


def test_begun_answer_goes_on_after_the_prompt(make: Make) -> None:
    model = make(None)
    history = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "At"}]
    assert model.apply_chat_template(history, add_generation_prompt=False) == "How many?At"


def test_messages_for_a_server_stay_messages(make: Make) -> None:
    messages = [{"role": "user", "content": "How many?"}]
    prompt = ChatPrompt(messages)
    assert json.loads(prompt) == messages
    for copy in (deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert (copy, copy.messages) == (prompt, messages)
    assert make()._prepare(request(prompt), 0).question.prompt == messages


def test_stop_strings_cut_the_answer_and_its_useful_tokens(make: Make, tmp_path: Path) -> None:
    model = make(samples=tmp_path / "samples.jsonl")
    assert model.generate_until([request(until=["END", "nowhere"])]) == ["One two. "]
    assert model.generate_until([request(until="two")]) == ["One "]
    first, second = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    assert first["reason"] == second["reason"] == "stop"
    assert first["useful_tokens"] == len("One two. ")  # a byte is a token here
    assert second["useful_tokens"] == len("One ")
    assert first["total_tokens"] > first["useful_tokens"]
    assert first["task"] == "task"
    assert first["doc_id"] == 7


def test_more_stop_strings_than_an_engine_takes_all_cut(make: Make) -> None:
    until = [*(f"absent {number}" for number in range(16)), "END", ""]
    assert make().generate_until([request(until=until)]) == ["One two. "]


def test_escape_until_leaves_stop_strings_alone(make: Make) -> None:
    model = make(escape_until=True)
    assert model.generate_until([request(until=["END"])]) == ["One two. END three."]


def test_model_arguments_win_over_the_task_and_the_task_over_defaults(make: Make) -> None:
    settings: dict[str, Any] = {"max_gen_toks": 3, "until": []}
    assert make().generate_until([request(**settings)]) == ["One"]
    assert make(max_new_tokens=7).generate_until([request(**settings)]) == ["One two"]
    assert make(preset="paper").generate_until([request(until=[])]) == ["One two. END three."]


def test_sampling_follows_the_task(make: Make) -> None:
    model = make(None, seed=1, max_new_tokens=40)
    sampled = request("Tom has 3 cups.", do_sample=True, temperature=5.0)
    greedy = request("Tom has 3 cups.", do_sample=False, temperature=5.0)
    plain = request("Tom has 3 cups.")
    texts = model.generate_until([sampled, greedy, plain])
    assert texts[0] != texts[1]
    assert texts[1] == texts[2]


def test_samples_differ_and_can_be_drawn_again(make: Make) -> None:
    sampled = request("Tom has 3 cups.", do_sample=True, temperature=5.0, max_gen_toks=16)
    seeded = [make(None, seed=1).generate_until([sampled] * 3) for _ in range(2)]
    assert len(set(seeded[0])) == 3
    assert seeded[0] == seeded[1]
    drawn = []
    for _ in range(2):
        random.seed(7)  # as lm-eval does
        drawn.append(make(None, batch_size=3).generate_until([sampled] * 3))
    assert len(set(drawn[0])) == 3
    assert drawn[0] == drawn[1]


def test_prompt_that_leaves_little_room_gets_a_shorter_answer(make: Make, tmp_path: Path) -> None:
    model = make(None, samples=tmp_path / "samples.jsonl")
    prompt = "five " * 240  # 480 tokens, of 512
    model.generate_until([request(prompt, max_gen_toks=160)])
    entry = json.loads((tmp_path / "samples.jsonl").read_text())
    assert entry["error"] is None
    assert entry["prompt_tokens"] + entry["total_tokens"] <= 512


def test_prompt_that_does_not_fit_is_an_empty_answer_that_says_so(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(None, samples=tmp_path / "samples.jsonl")
    assert model.generate_until([request("five " * 2000), request("", until=[])]) == ["", ""]
    entries = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {entry["reason"] for entry in entries} == {"refused"}
    assert "the model holds 512" in caplog.text
    assert "2 of 2 requests were refused" in caplog.text


def test_settings_that_do_not_exist_are_named(make: Make) -> None:
    with pytest.raises(InvalidParams, match="top_k"):
        make().generate_until([request(top_k=5)])
    with pytest.raises(InvalidParams, match="treshold"):
        make(treshold=0.9)
    with pytest.raises(InvalidParams, match="preset is 'best' but must be one of"):
        make(preset="best")
    with pytest.raises(InvalidParams, match="batch_size"):
        make(batch_size=0)


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling"])
def test_log_likelihoods_are_refused(make: Make, kind: str) -> None:
    refused = Instance("loglikelihood", {}, ("a", "b"), 0, ("mmlu", 0, 1))
    with pytest.raises(NotImplementedError, match=r"task 'mmlu'.*generate_until"):
        getattr(make(), kind)([refused])


def test_model_is_registered_by_its_name() -> None:
    assert get_model("d2f_stream") is D2FStreamLM


def test_command_line_adds_what_is_missing() -> None:
    added = ["--model", "d2f_stream", "--device", "auto"]
    assert completed(["--tasks", "gsm8k"]) == ["run", "--tasks", "gsm8k", *added]
    given = ["run", "--tasks=gsm8k", "--model=hf", "--device=cpu"]
    assert completed(given) == given
    assert completed(["ls", "tasks"]) == ["ls", "tasks"]
