"""Preference data: files, hub data sets and named sets become groups of text, then groups of token ids.

It never repairs, reorders or silently drops a row, and knows no model. Start at `reader.read_preferences`
(sources -> groups, with every bad row counted) and `encoding.Encoder` (groups -> token ids, exactly those
that a consumer of the exported chat template gets). Between them: `files` opens what a recipe names,
`parse` understands one row, `splits` splits and mixes by prompt, `named_sets` lists the published sets.
"""
