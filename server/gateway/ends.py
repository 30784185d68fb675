"""How attempts end, by code, and what that says of the version that was tried: for gates and for who foretells them."""

from __future__ import annotations

from typing import Final

#: Ends that say nothing of the version at all, and are no attempts.
NOTHING: Final = frozenset({"draining"})
#: Ends that are no error of the version: the request was wrong for every version, or its caller has left.
NO_ERROR: Final = frozenset({"ok", "cancelled", "invalid_argument"})
#: Ends that no arm of an experiment is to blame for: its callers left or were wrong, as every arm's are alike. Whether
#: an input that a graph refuses is wrong is not to be told from one arm; breakers and gates, who know the new one, ask.
NO_TRIAL: Final = NOTHING | {"cancelled", "invalid_argument", "input_rejected"}
#: Ends by some limit of time; a caller who leaves has waited long enough.
LATE: Final = frozenset({"cancelled", "deadline_exceeded", "queue_timeout", "version_timeout"})
