"""Trained models as directories that other software loads, and the proof that it gets the same scores.

`stock_export` writes directories, `golden` holds the scores that consumers must get, `proof` replays them
in a fresh process, `checklist` verifies anybody's reward directory, `reward_servers` a running server.
Nothing here trains, and nothing here scores for its own sake.
"""
