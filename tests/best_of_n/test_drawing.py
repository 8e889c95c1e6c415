"""Candidates from policies: distinct, bounded, the same after a kill."""

import json

import pytest
import torch

from endpoint_for_tests import fails, says, serving
from hafrm.best_of_n import drawing
from hafrm.best_of_n.drawing import Draw, Drawing, DrawRound, draw_candidates, drawing_key
from hafrm.best_of_n.endpoint import Endpoint, EndpointOptions
from hafrm.best_of_n.policies import EndpointPolicy, LocalPolicy
from hafrm.data.values import Refusal
from hafrm.engine.sampling import Sampling
from hafrm.errors import ConfigError, ModelError, ServerError
from hafrm.preferences import Group, Message
from hafrm.resumable import RecordFile
from support.tiny_runs import write_base
from tokenizers_for_tests import plain_tokenizer

PROMPTS = [Group(f"p-{i}", (Message("user", f"Say {i}."),), (), source="p") for i in range(5)]


class Scripted:
    """A policy that says what a list says, round by round."""

    def __init__(self, texts):
        self.texts, self.asked = texts, []

    def cache_key(self):
        return {"policy": "scripted"}

    def close(self):
        pass

    def write(self, prompts, num, draw_round):
        self.asked.append((len(prompts), num, draw_round))
        return [self.texts(prompt.id, draw_round.num_before, num) for prompt in prompts]


def drafts(*texts):
    return [Draw(text, text != "half") for text in texts]


def test_distinct_candidates_are_asked_for_until_there_are_enough_or_tries_run_out(tmp_path):
    """p-0 has all at once; p-1 repeats and is asked again; p-2 never says but one thing; p-3 is refused;
    p-4 says nothing twice."""
    script = {
        ("p-0", 0): drafts("a", "b", "c"),
        ("p-1", 0): drafts("a", "a", "b"),
        ("p-1", 3): drafts("b", "c", "d"),
        ("p-2", 0): drafts("a", "a", "a"),
        ("p-2", 3): drafts("a", "a", "half"),
        ("p-3", 0): Refusal("too long", "far"),
        ("p-4", 0): drafts("", "x", " "),
        ("p-4", 3): drafts("y", "z", "w"),
    }
    policy = Scripted(lambda name, before, _: script[name, before])
    journal = RecordFile(tmp_path / "c.jsonl")
    found = draw_candidates(policy, PROMPTS, Drawing(3), journal)
    assert [each.group.responses for each in found] == [
        ("a", "b", "c"),
        ("a", "b", "c"),
        ("a", "half"),
        (),
        ("x", "y", "z"),
    ]
    assert [each.num_draws for each in found] == [3, 6, 6, 0, 6]
    assert [each.num_blank for each in found] == [0, 0, 0, 0, 2]
    assert found[2].num_cut == 1
    assert found[3].error == "too long: far"
    assert policy.asked == [(5, 3, DrawRound(0, 0, 0)), (3, 3, DrawRound(0, 0, 3))]


def test_repeats_are_kept_where_samples_must_be_independent(tmp_path):
    policy = Scripted(lambda *_: drafts("a", "b", "a"))
    found = draw_candidates(
        policy, PROMPTS[:1], Drawing(3, repeats=True), RecordFile(tmp_path / "c")
    )
    assert (found[0].group.responses, found[0].drawn) == (("a", "b"), (0, 1, 0))


def test_tries_may_be_fewer_than_a_full_round(tmp_path):
    policy = Scripted(lambda _n, before, num: drafts(*[f"{before}"] * num))
    (found,) = draw_candidates(
        policy, PROMPTS[:1], Drawing(4, max_draws=6), RecordFile(tmp_path / "c")
    )
    assert found.num_draws == 6
    assert [num for _, num, _ in policy.asked] == [4, 2]
    for wrong in ({"num": 1}, {"num": 4, "max_draws": 3}, {"num": 4, "seed": -1}):
        with pytest.raises(ConfigError):
            Drawing(**wrong)


def test_a_killed_job_resumes_to_the_candidates_that_it_would_have_got(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "CHUNK", 2)
    base = write_base(tmp_path)

    def policy():
        return LocalPolicy.from_pretrained(base, Sampling(5), batch_size=4)

    whole = draw_candidates(policy(), PROMPTS, Drawing(3), RecordFile(tmp_path / "whole.jsonl"))
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    # Killed in the middle of the second chunk's third line.
    (tmp_path / "part.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    again = draw_candidates(policy(), PROMPTS, Drawing(3), RecordFile(tmp_path / "part.jsonl"))
    assert again == whole
    assert (tmp_path / "part.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_the_cache_key_changes_with_whatever_changes_candidates(tmp_path):
    base = write_base(tmp_path)
    policy = LocalPolicy.from_pretrained(base, Sampling(5))
    same = [
        drawing_key(policy, PROMPTS, Drawing(3)),
        drawing_key(policy, PROMPTS, Drawing(3, 6)),
    ]
    assert same[0] == same[1]
    others = [
        drawing_key(policy, PROMPTS[:2], Drawing(3)),
        drawing_key(policy, PROMPTS, Drawing(3, seed=1)),
        drawing_key(LocalPolicy.from_pretrained(base, Sampling(6)), PROMPTS, Drawing(3)),
    ]
    assert len({json.dumps(each) for each in [same[0], *others]}) == 4


def test_a_policy_is_asked_through_its_template_and_ends_where_its_turns_end(tmp_path):
    """The weights are set so that the likeliest token is always the template's end of turn."""
    base = write_base(tmp_path)
    policy = LocalPolicy.from_pretrained(base, Sampling(5, temperature=0.0))
    tokenizer = policy.encoder.tokenizer
    assert policy.end_of_turn == tokenizer.convert_tokens_to_ids("<|im_end|>")
    seen = []
    model = policy._load()

    def spy(input_ids=None, **options):
        seen.append(input_ids.tolist())
        return torch.cat([input_ids, torch.full((len(input_ids), 1), policy.end_of_turn)], 1)

    model.generate = spy
    policy._model = model
    (found,) = policy.write(PROMPTS[:1], 2, DrawRound(0, 0, 0))
    assert found == [Draw("", ended=True)] * 2
    messages = [{"role": "user", "content": "Say 0."}]
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(seen[0][0]).strip() == asked.strip()


def test_prompts_that_leave_no_room_are_refused_in_their_place(tmp_path):
    policy = LocalPolicy.from_pretrained(write_base(tmp_path), Sampling(200))
    long = Group("long", (Message("user", "word " * 80),), ())
    found = policy.write([long, PROMPTS[0]], 2, DrawRound(0, 0, 0))
    assert isinstance(found[0], Refusal)
    assert "room for 56" in found[0].detail
    assert len(found[1]) == 2


def test_policies_without_template_and_reward_models_are_refused_with_the_fix(tmp_path):
    base = write_base(tmp_path)
    plain_tokenizer().save_pretrained(base)
    (base / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"no chat template.*chat_template"):
        LocalPolicy.from_pretrained(base, Sampling(5))
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    given = LocalPolicy.from_pretrained(base, Sampling(5), chat_template=str(template))
    assert given.end_of_turn == given.encoder.eos_id
    with pytest.raises(ModelError, match="no model"):
        LocalPolicy.from_pretrained(tmp_path / "nowhere", Sampling(5))


def connect(fake, cache) -> EndpointPolicy:
    endpoint = Endpoint(EndpointOptions(fake.url, retries=0), cache)
    return EndpointPolicy(endpoint, Sampling(7, 0.5, 0.9))


@pytest.mark.parametrize("kind", ["knows n", "ignores n", "rejects n"])
def test_an_endpoint_gives_as_many_draws_as_asked_whatever_it_makes_of_n(kind, tmp_path):
    counter = iter(range(1000))

    def answer(body):
        n = body.get("n", 1)
        if kind == "rejects n" and n > 1:
            return fails(400, "n must be 1")
        return says(*(f" draw {next(counter)} " for _ in range(n if kind == "knows n" else 1)))

    with serving(answer) as fake:
        found = connect(fake, tmp_path).write(PROMPTS[:2], 3, DrawRound(0, 0, 0))
        body = fake.asked[0]
    assert [len(each) for each in found] == [3, 3]
    assert len({draft.text for each in found for draft in each}) == 6
    assert all(draft.text == draft.text.strip() and draft.ended for each in found for draft in each)
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.5, 0.9, 7)


def test_a_prompt_that_an_endpoint_rejects_is_refused_in_its_place(tmp_path):
    def answer(body):
        return fails(400, "too long") if "0" in body["messages"][0]["content"] else says("x", "y")

    with serving(answer) as fake:
        found = connect(fake, tmp_path).write(PROMPTS[:2], 2, DrawRound(0, 0, 0))
        assert "too long" in found[0].detail
        assert [draft.text for draft in found[1]] == ["x", "y"]
        with pytest.raises(ServerError, match=r"rejects every request.*request"):
            connect(fake, tmp_path).write(PROMPTS[:1], 2, DrawRound(0, 0, 0))
