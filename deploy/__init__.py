"""Networks that leave the framework: files that are small, checked, and run at any precision."""
from deploy.packed import load

__all__ = ["load"]
