"""Quality gates: a candidate and the champion on the same holdout data, judged by a policy before anything is served.

``keeper`` is the way in. Nothing here decides who serves: an outcome is evidence for the rollout and for people.
"""
