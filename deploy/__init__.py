"""Export of networks to files that leave the framework: small, checked, at any precision."""
from deploy.files import export
from models import load

__all__ = ["export", "load"]
