"""Export of networks to files that leave the framework: small, checked, at any precision."""
from deploy.files import export

__all__ = ["export"]
