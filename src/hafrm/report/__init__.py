"""How results are shown: tables on the terminal, and one HTML page about several runs.

`terminal` and `html` render the `hafrm.results.Table`s that every result has. `page` makes a self-contained
page from run folders: `run_files` reads them into typed results, the modules named `*_sections` turn these
into tables, plots and text, and `cautions` lists what to be careful about.

Nothing here computes a result or decides what is significant; results do. `page` needs the extra `report`
(matplotlib, jinja2). Start with `page`.
"""
