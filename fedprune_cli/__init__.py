"""fedprune: personalized, pruned federated learning over a modelled radio (see round/ first)."""

from pathlib import Path

__version__ = "0.1.0"

_PACKAGE = Path(__file__).parent
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
