"""How results are shown: `hafrm.table.Table`s on the terminal.

Nothing here computes a number; results have `tables()`, and this room renders them. Start with `terminal`.
"""
