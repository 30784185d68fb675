"""Rules that refuse requests: what is refused is counted, and told in a bounded message."""

from __future__ import annotations

import numpy as np

from monitor.layout import Layout
from monitor.profile import ReferenceProfile
from monitor.schema import SchemaCheck
from monitor.types import ColumnRule
from server.monitoring.rules import RequestRules
from server.types import Tensor


def test_refusals_are_counted_and_cut() -> None:
    names = [f"{number:02d}" + "x" * 100 for number in range(20)]
    profile = ReferenceProfile.from_arrays({"s": np.array(names * 50, object).reshape(-1, 1)})
    rules = RequestRules(SchemaCheck([ColumnRule("s", range="profile", action="reject")], Layout(profile)))
    good = Tensor("s", "BYTES", (1, 1), [names[0].encode()])
    assert rules.refusal([good]) is None
    assert rules.refused == 0
    said = rules.refusal([Tensor("s", "BYTES", (1, 1), [b"another"])])
    assert said is not None
    assert said.startswith("column 's' (input 's'): rule categories: wanted one of ")
    assert len(said) <= 503
    assert rules.refused == 1
