"""The descriptor pool of our generated messages.

It is our own and not the process-wide default: client packages register messages of the same full names
(``inference.ModelInferRequest``, ``grpc.health.v1.HealthCheckRequest``) from other files, and one pool refuses that.
"""

from __future__ import annotations

from typing import Final

from google.protobuf.descriptor_pool import DescriptorPool

POOL: Final = DescriptorPool()
