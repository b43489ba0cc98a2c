"""Tests here use whole agents."""

from agents import lab

__all__ = ["lab"]
