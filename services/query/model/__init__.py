"""The pure rules of query and retrieve: nothing here waits."""
