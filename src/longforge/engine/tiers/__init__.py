"""Pages beyond the pool: a second tier in host memory and a third in a folder that processes share.

A page leaves the pool as one record (`record.py`) under a key that stands for all tokens up to its end
(`keys.py`). Whether a record is worth fetching is measured, not assumed (`gate.py`). The engine sees `Tiers`.
"""

from longforge.engine.tiers.files import FileTier
from longforge.engine.tiers.fingerprint import weights_fingerprint
from longforge.engine.tiers.gate import Gate
from longforge.engine.tiers.host import HostTier
from longforge.engine.tiers.keys import Namespace, PageName, page_key, root_key
from longforge.engine.tiers.record import RecordFormat
from longforge.engine.tiers.stats import TiersStats, TierStats
from longforge.engine.tiers.tiers import Tiers

__all__ = [
    "FileTier",
    "Gate",
    "HostTier",
    "Namespace",
    "PageName",
    "RecordFormat",
    "TierStats",
    "Tiers",
    "TiersStats",
    "page_key",
    "root_key",
    "weights_fingerprint",
]
