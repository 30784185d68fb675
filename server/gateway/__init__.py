"""The one use case: take a request, decide who answers, batch it, answer. Synchronous and transport-free."""

from server.gateway.core import AdmissionLimits, Gateway, GatewayPermit
from server.gateway.policy import Breakers, FeedbackIndex, ModelPolicy
from server.gateway.rollouts import RolloutBooks
from server.gateway.served import Served

__all__ = [
    "AdmissionLimits",
    "Breakers",
    "FeedbackIndex",
    "Gateway",
    "GatewayPermit",
    "ModelPolicy",
    "RolloutBooks",
    "Served",
]
