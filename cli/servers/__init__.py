"""Real private servers on free ports, for the embedded archive, the local cluster and the tests."""
