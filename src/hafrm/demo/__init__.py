"""`hafrm demo`: a made-up preference world with a known gold reward, and a comparison that runs on it.

The world's tables, preferences and texts are data files beside this module; `examples/demo_world` writes
them. Nothing here is used by training or evaluation. Start reading at `run_demo`.
"""
