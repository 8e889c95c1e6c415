"""Groups written and read back are the same groups."""

from hafrm.data.readers import read
from hafrm.data.writing import write_groups
from hafrm.preferences import Comparison, Group, Message, Votes


def test_written_groups_read_back_with_margins_weights_votes_and_ties(tmp_path):
    prompt = (Message("system", "Be brief."), Message("user", "Which sea is \u201cred\u201d?"))
    comparisons = (
        Comparison(0, 1, margin=1.5),
        Comparison(0, 2, weight=0.5),
        Comparison(1, 2, tie=True, votes=Votes(1, 1, 3)),
    )
    group = Group("a", prompt, ("one", "two", "three"), comparisons, tags={"subset": "seas"})
    assert write_groups([group], tmp_path / "a.jsonl") == 3

    (again,) = read([tmp_path / "a.jsonl"]).groups
    assert (again.prompt, again.responses) == (group.prompt, group.responses)
    assert again.comparisons == group.comparisons
    assert again.tags == group.tags
