"""Fine-tuning image models with the losses of this package: ``clce-train``, ``clce-eval``, ``clce-compare``.

The commands are ``cli``, ``evaluate``, ``predict``, ``compare`` and ``sweep``. A run is ``loop``'s: it trains
the ``stages`` of an objective (``objectives``) by a ``trainer`` each, on ``data`` and ``models``, and has its
weights judged (``judge``, ``metrics``). ``config`` has every option once.
"""

from .errors import TrainingError

__all__ = ["TrainingError"]
