"""The bus over RabbitMQ: a topic exchange, quorum queues, publisher confirms. The only folder that knows aio_pika.

Per subscription there are three kinds of durable queues: ``<queue>`` itself, ``<queue>.wait.<milliseconds>`` for each
delay of its retry schedule (declared at first use; messages expire from there back into the queue), and
``<queue>.dead``. An event that no queue is bound to is a fact that nobody asked for, not an error: the broker returns
it (mandatory), it is counted in ``sagittal_bus_unheard_total`` and logged at debug level.
"""

from libs.common.bus.rabbitmq.bus import RabbitBus

__all__ = ["RabbitBus"]
