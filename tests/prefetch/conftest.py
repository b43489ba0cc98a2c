from agents import lab

__all__ = ["lab"]
