"""Networks that leave the framework: files that are small, checked, and run at any precision."""
from models import load

__all__ = ["load"]
