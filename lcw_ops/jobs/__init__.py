"""Training of very deep networks on small real data, with checkpoints that survive ``kill -9``.

``train`` and ``profile`` are the commands; ``loop`` is one step and its state, ``checkpoints`` the files of a run.
"""
