# Nothing for Python: windows of chunks over a transport, for pipeline and the engine.
