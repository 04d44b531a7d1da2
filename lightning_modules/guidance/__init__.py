"""Guidance: scales of training, and negative prompts through attention."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.guidance.prompting import negative_attention, negative_prompting

__all__ = ["negative_attention", "negative_prompting"]


def __getattr__(name: str) -> Any:
    """Import what needs diffusers only when it is asked for: the mathematics uses this package, too."""
    if name in __all__:
        from lightning_modules.guidance import prompting as negative

        return getattr(negative, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
