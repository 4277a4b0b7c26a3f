"""What indexing does, a file per capability."""

from services.indexing.handlers.announce import announce_quiet_studies
from services.indexing.handlers.index import Reading, index_instances
from services.indexing.handlers.rebuild import rebuild_index

__all__ = ["Reading", "announce_quiet_studies", "index_instances", "rebuild_index"]
