"""Candidates out of files of any shape, and from policies: distinct, bounded, the same after a kill."""

import json

import pytest
import torch

from hafrm.best_of_n import candidates as candidates_module
from hafrm.best_of_n.candidates import (
    Candidates,
    DrawSection,
    EndpointPolicy,
    LocalPolicy,
    draw_candidates,
    drawing_key,
    read_candidates,
    read_prompts,
)
from hafrm.best_of_n.endpoint import Endpoint, EndpointSection, Reply
from hafrm.data.reader import read_preferences
from hafrm.errors import DataError, ModelError, ServerError
from hafrm.preferences import Group, Message
from hafrm.run_folder import RecordFile
from hafrm.scoring.loading import AUTO
from support.chat_endpoint import fails, says, serving
from support.chat_tokenizers import plain_tokenizer
from support.tiny_runs import write_base

PROMPTS = [Group(f"p-{i}", (Message("user", f"Say {i}."),), (), source="p") for i in range(5)]
ROUND = (0, 0, 0)


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_prompts_come_from_rows_of_any_shape_once_each_with_ids_of_their_own(tmp_path):
    rows = [
        {"prompt": "a", "id": "x"},
        {"prompt": [{"role": "user", "content": "b"}], "id": "x"},
        {"prompt": "c", "chosen": "x", "rejected": "y"},
        {"chosen": "\n\nHuman: d\n\nAssistant: x", "rejected": "\n\nHuman: d\n\nAssistant: y"},
        {"prompt": "a", "response": "z"},
    ]
    prompts = read_prompts([write(tmp_path / "p.jsonl", rows)])
    assert [(g.id, g.prompt[-1].content) for g in prompts] == [
        ("x", "a"),
        ("x~2", "b"),
        ("p-2", "c"),
        ("p-3", "d"),
    ]
    assert all((g.source, g.responses, g.comparisons) == ("p", (), ()) for g in prompts)
    several = {"prompt": "a", "responses": ["x", "y", "x", "z"]}
    candidates = read_candidates([write(tmp_path / "c.jsonl", [several, rows[2]])], 2)
    assert [c.texts for c in candidates] == [["x", "y"], ["x", "y"]]
    assert all(c.group.comparisons == () for c in candidates)
    with pytest.raises(DataError, match="bad"):
        read_prompts([write(tmp_path / "bad.jsonl", [*rows, {"prompt": "  "}])])


def test_a_record_gives_back_what_was_drawn_and_is_a_row_of_data(tmp_path):
    candidates = Candidates(PROMPTS[0], ["x", "y", "x"], 4, 1)
    assert (candidates.group.responses, candidates.drawn) == (("x", "y"), [0, 1, 0])
    record = json.loads(json.dumps(candidates.to_record()))
    assert Candidates.from_record(record) == candidates
    (group,) = read_preferences(
        [write(tmp_path / "c.jsonl", [record])], need_comparisons=False
    ).groups
    assert (group.id, group.prompt) == ("p-0", PROMPTS[0].prompt)
    assert group.responses == ("x", "y")


class Scripted(EndpointPolicy):
    """A policy that says what a function says, round by round."""

    def __init__(self, texts):
        self.texts, self.asked = texts, []

    def cache_key(self):
        return {"policy": "scripted"}

    def write(self, prompts, num, draw_round):
        self.asked.append((len(prompts), num, draw_round))
        replies = [self.texts(prompt.id, draw_round[2]) for prompt in prompts]
        return [
            [Reply(error=texts)]
            if isinstance(texts, str)
            else [Reply(text, ended=text != "half") for text in texts]
            for texts in replies
        ]


def test_distinct_candidates_are_drawn_in_two_rounds_at_most(tmp_path):
    """p-0 has all at once; p-1 repeats and is asked again; p-2 repeats for ever; p-3 is refused; p-4 is
    blank twice."""
    script = {
        ("p-0", 0): ["a", "b", "c"],
        ("p-1", 0): ["a", "a", "b"],
        ("p-1", 3): ["b", "c", "d"],
        ("p-2", 0): ["a", "a", "a"],
        ("p-2", 3): ["a", "a", "half"],
        ("p-3", 0): "too long: far",
        ("p-4", 0): ["", "x", " "],
        ("p-4", 3): ["y", "z", "w"],
    }
    policy = Scripted(lambda name, before: script[name, before])
    drawn = draw_candidates(policy, PROMPTS, DrawSection(num=3), RecordFile(tmp_path / "c.jsonl"))
    assert [c.texts for c in drawn] == [
        ["a", "b", "c"],
        ["a", "b", "c"],
        ["a", "half"],
        [],
        ["x", "y", "z"],
    ]
    assert [c.num_blank for c in drawn] == [0, 0, 0, 0, 2]
    assert (drawn[2].num_cut, drawn[3].error) == (1, "too long: far")
    assert policy.asked == [(5, 3, ROUND), (3, 3, (0, 0, 3))]


def test_a_killed_job_resumes_to_the_candidates_that_it_would_have_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(candidates_module, "CHUNK", 2)
    base, section = write_base(tmp_path), DrawSection(num=3, max_new_tokens=5, batch_size=4)

    def draw(file):
        policy = LocalPolicy(base, section, AUTO)
        return draw_candidates(policy, PROMPTS, section, RecordFile(tmp_path / file))

    whole = draw("whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    # killed within the last line of the second chunk
    (tmp_path / "part.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    assert draw("part.jsonl") == whole
    assert (tmp_path / "part.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_the_cache_key_changes_with_whatever_changes_candidates(tmp_path):
    def key(prompts=PROMPTS, **options):
        section = DrawSection(num=3, **options)
        return json.dumps(
            drawing_key(LocalPolicy(tmp_path / "base", section, AUTO), prompts, section)
        )

    write_base(tmp_path)
    keys = [key(), key(PROMPTS[:2]), key(seed=1), key(max_new_tokens=6), key(temperature=0.5)]
    assert len(set(keys)) == 5
    assert key() == keys[0]


def test_a_policy_is_asked_through_its_template_and_ends_where_its_turns_end(tmp_path):
    policy = LocalPolicy(write_base(tmp_path), DrawSection(max_new_tokens=5, temperature=0.0), AUTO)
    long = Group("long", (Message("user", "word " * 140),), ())
    refused, answered = policy.write([long, PROMPTS[0]], 2, ROUND)
    assert "the policy has room for 251" in refused[0].error
    assert len(answered) == 2
    tokenizer = policy.encoder.tokenizer
    assert policy.turn_ends == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    asked = []

    def end_at_once(input_ids=None, **_):
        asked.append(input_ids.tolist())
        return torch.cat([input_ids, torch.full((len(input_ids), 1), policy.turn_ends[0])], 1)

    policy.model.generate = end_at_once
    assert policy.write(PROMPTS[:1], 2, ROUND) == [[Reply(""), Reply("")]]
    messages = [{"role": "user", "content": "Say 0."}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(asked[0][0]).strip() == prompt.strip()


def test_policies_without_template_are_refused_with_the_fix(tmp_path):
    base = write_base(tmp_path)
    plain_tokenizer().save_pretrained(base)
    (base / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"no chat template.*chat_template\.jinja"):
        LocalPolicy(base, DrawSection(), AUTO)
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    )
    policy = LocalPolicy(base, DrawSection(), AUTO)
    assert policy.turn_ends == (policy.encoder.eos_id,)


def connect(fake, cache) -> EndpointPolicy:
    endpoint = Endpoint(fake.url, EndpointSection(retries=0), cache=cache)
    return EndpointPolicy(endpoint, DrawSection(max_new_tokens=7, temperature=0.5, top_p=0.9))


def test_an_endpoint_gives_as_many_draws_as_asked(tmp_path):
    counter = iter(range(1000))
    with serving(lambda _: says(f"draw {next(counter)}")) as fake:
        replies = connect(fake, tmp_path).write(PROMPTS[:2], 3, ROUND)
        body = fake.asked[0]
    assert [len(own) for own in replies] == [3, 3]
    assert len({reply.text for own in replies for reply in own}) == 6
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.5, 0.9, 7)


def test_a_prompt_that_an_endpoint_rejects_is_refused_in_its_place(tmp_path):
    def answer(body):
        return fails(400, "too long") if "0" in body["messages"][0]["content"] else says("x")

    with serving(answer) as fake:
        (refused,), answered = connect(fake, tmp_path).write(PROMPTS[:2], 2, ROUND)
        assert "too long" in refused.error
        assert [reply.text for reply in answered] == ["x", "x"]
        with pytest.raises(ServerError, match=r"rejects every request.*request"):
            connect(fake, tmp_path).write(PROMPTS[:1], 2, ROUND)
        # later prompts that are all rejected do not accuse an endpoint that answered before
        ((late,),) = connect(fake, tmp_path).write(PROMPTS[:1], 2, (0, 64, 0))
        assert "too long" in late.error
