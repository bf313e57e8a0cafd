"""`sparse-peft inspect`."""

from __future__ import annotations

from ..hub import check_adapter
from ..utils.tables import show
from .app import verb
from .options import Adapter, Json, print_json


@verb("inspect", panel="Look into adapters")
def inspect(adapter: Adapter, as_json: Json = False) -> None:
    """Check every tensor of an adapter folder, without its base, and show what it holds."""
    report = check_adapter(adapter)
    if as_json:
        print_json(report)
        return
    show(report.table())
    print(f"\n{report.parameters:,} living parameters; {report.other_bytes:,} bytes beside the adapted modules.")
