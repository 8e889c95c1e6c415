"""Mutated files through every reader: a short run of the script that feeds it 100,000."""

from hafrm.errors import DataError
from support.scripts import load_script

NUM = {"rows, parquet": 15, "recipe": 12, "run folder": 12, "chat template": 6}
NUM |= {"weights": 4, "config": 6, "tokenizer": 6}


def test_mutated_files_end_in_a_result_or_in_a_clear_error(tmp_path, monkeypatch):
    fuzz = load_script("tools/fuzz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hafrm.data.chat_template.PROBE_SECONDS", 0.2)
    fuzz.prepare()
    for target in fuzz.TARGETS:
        counts = fuzz.fuzz(target, NUM.get(target, 50), seed=3)
        assert set(counts) <= {"result", "error"}, target
        assert counts["error"]


def test_a_message_that_quotes_megabytes_is_cut_in_the_middle():
    text = str(DataError("begins " + "x" * 10**6 + " ends"))
    assert len(text) < 4000
    assert (text[:7], text[-5:]) == ("begins ", " ends")
