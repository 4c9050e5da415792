"""The ranks: processes that run steps of cases, and the controller's pool of them.

``pool.py``, ``crew.py``, ``exchange.py``, ``link.py`` and ``launched.py`` run in the controller and never import torch.
``launcher.py`` runs in the launcher, where torch elastic is; ``preload.py`` in the fork server; ``worker.py``,
``groups.py``, ``execute.py`` and what these import on the ranks. ``address.py``, ``frames.py``, ``lifetime.py`` and
``blanks.py`` are used by more than one of them.
"""
