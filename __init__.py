"""kdcache: knowledge distillation from a verified cache of the teacher's logits."""

__version__ = "0.1.0"
