"""Export of networks to files that leave the framework: small, checked, at any precision."""
from models import load

__all__ = ["load"]
