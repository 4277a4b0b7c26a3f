"""The rules of ingest: what an instance is called, where it belongs, why it is refused. Nothing here waits."""
