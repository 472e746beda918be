"""Training of very deep networks on small real data, with checkpoints that survive ``kill -9``.

``loop`` is one step and everything it depends on, ``checkpoints`` the files, ``job`` what ``lcw-ops train`` runs.
"""
