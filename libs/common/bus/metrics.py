"""The numbers the bus tells Prometheus, the same for every adapter."""

from __future__ import annotations

from prometheus_client import Counter

PUBLISHED = Counter("sagittal_bus_published", "Events made durable.", ["event"])
UNHEARD = Counter("sagittal_bus_unheard", "Events published while no queue was bound to them.", ["event"])
HANDLED = Counter("sagittal_bus_handled", "Events handled and acknowledged.", ["queue"])
RETRIED = Counter("sagittal_bus_retried", "Events put back to be tried again later.", ["queue"])
DEAD = Counter("sagittal_bus_dead", "Events given up and kept as dead letters.", ["queue"])
OUTBOX = Counter("sagittal_bus_outbox", "Events kept in the outbox because the broker was away.", ["event"])
