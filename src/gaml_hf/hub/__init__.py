"""A checkpoint folder that a stranger can load: saving it whole, checking it, its model card, and pushing it."""

from .card import TOLD_ARGUMENTS, TOLD_FIELDS, render_card
from .checking import check_checkpoint
from .push import push_checkpoint, push_space
from .saving import save_checkpoint


__all__ = [
    "TOLD_ARGUMENTS",
    "TOLD_FIELDS",
    "check_checkpoint",
    "push_checkpoint",
    "push_space",
    "render_card",
    "save_checkpoint",
]
